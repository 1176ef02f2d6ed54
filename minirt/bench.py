"""Speed, measured as llama-bench does: prompt processing (pp) and text generation (tg), at any depth of the context.

    with Llama.load("model.gguf", threads=2) as llama:
        result = measure(llama, Workload(n_gen=128, n_depth=4096, n_sequences=4))
        print(result.avg_ts, "tokens/s", result.bytes_per_second / read_bandwidth(2), "of the memory's speed")

Tokens are random, the same in every run. A step brings back the most likely token, as that of a greedy answer does,
and no logits. Neither tokenising nor sampling is timed, nor is filling the cache to the depth. A workload of several
sequences decodes them together, one token of each per step, so that a weight is read once for all; its tokens per
second count every sequence.
"""

from __future__ import annotations

import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bandwidth import available_memory, memory_bandwidth, read_bandwidth
from .cache import Cache
from .config import ModelConfig
from .decoder import Decoder
from .devices import physical_cores
from .errors import UsageError
from .gguf_file import GGUFFile
from .llama import MIN_CONTEXT, Llama, bytes_per_token
from .policies import POLICIES, Budget, Policy, parse_policy
from .policies.base import parameters
from .session import PREFILL_CHUNK, Progress, prompt_chunks
from .stores import get_stores, store_names, stores_text
from .version import __version__

__all__ = [
    "Result", "Workload", "all_workloads", "by_weights", "check_room", "measure", "memory_bandwidth", "read_bandwidth",
    "record",
]  # fmt: skip

SEED = 0  # of the token ids
_BACKENDS = {"cpu": "CPU", "gpu": "CUDA"}


@dataclass(frozen=True)
class Workload:
    """What one test does: n_prompt tokens of each sequence in chunks, then n_gen steps of a token each."""

    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0  # tokens of each sequence that the cache holds before the clock starts
    n_sequences: int = 1

    @property
    def name(self) -> str:
        """As llama-bench writes it: pp512, tg128 @ d4096, pp512+tg128."""
        parts = (f"{kind}{n}" for kind, n in (("pp", self.n_prompt), ("tg", self.n_gen)) if n)
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    def __str__(self) -> str:
        return self.name + (f", {self.n_sequences} sequences" if self.n_sequences > 1 else "")

    @property
    def n_tokens(self) -> int:
        """Tokens that one run computes, all sequences together."""
        return self.n_sequences * (self.n_prompt + self.n_gen)

    @property
    def n_ctx(self) -> int:
        """Tokens of a sequence at the end of a run."""
        return self.n_depth + self.n_prompt + self.n_gen


def all_workloads(
    prompts: Sequence[int],
    gens: Sequence[int],
    pairs: Sequence[tuple[int, int]] = (),
    depths: Sequence[int] = (0,),
    sequences: Sequence[int] = (1,),
) -> list[Workload]:
    """Every combination, in llama-bench's order; a length of 0 is left out. A prompt alone is one sequence's."""
    out = []
    for depth in depths:
        out += [Workload(n_prompt=n, n_depth=depth) for n in prompts if n]
        steps = [(0, n) for n in gens if n] + [pair for pair in pairs if any(pair)]
        out += [Workload(pp, tg, depth, b) for pp, tg in steps for b in (sequences if tg else (1,))]
    return out


@dataclass(frozen=True)
class Result:
    """What a workload took: nanoseconds of each run. The bytes are None where it is not decoding alone."""

    workload: Workload
    policy: str  # as `parse_policy` reads it
    kv: str
    test_time: str  # when it began, UTC, ISO 8601
    samples_ns: tuple[int, ...]
    weight_bytes_per_token: float | None  # of one step, divided by the sequences that share them
    kv_bytes_per_token: float | None  # of the cache, by the policy's formula; mean over the steps

    @property
    def samples_ts(self) -> list[float]:
        """Tokens per second of each run, all sequences together."""
        return [1e9 * self.workload.n_tokens / ns for ns in self.samples_ns]

    @property
    def avg_ts(self) -> float:
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        return _stddev(self.samples_ts)

    @property
    def bytes_per_token(self) -> float | None:
        """Weights and cache that must be read for one token."""
        if self.weight_bytes_per_token is None or self.kv_bytes_per_token is None:
            return None
        return self.weight_bytes_per_token + self.kv_bytes_per_token

    @property
    def bytes_per_second(self) -> float | None:
        """Bytes of weights and cache that were read, at avg_ts tokens per second."""
        return None if self.bytes_per_token is None else self.bytes_per_token * self.avg_ts


def measure(
    llama: Llama,
    workload: Workload,
    *,
    policy: str | Policy = "dense",
    kv: str = "auto",
    repetitions: int = 5,
    warmup: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Runs a workload `repetitions` times, after a run that does not count, in a cache of its own.

    The model's session is left alone; its policy and KV type do not matter. progress: called with (tokens done, in
    all), never while the clock runs. Raises UsageError for an unknown policy or KV type, or one that does not fit.
    """
    w, config, stores = workload, llama.config, get_stores(kv, llama.config.palu)
    if stores[0].latent != llama.session.cache.plan.k_store.latent:
        raise UsageError(f"--kv {kv} takes a model that was loaded for it: latents need other weights than their keys")
    decoder = Decoder(config, llama.decoder.weights, llama.decoder.ops, parse_policy(policy))
    decoder.policy.check(config, max(w.n_ctx, MIN_CONTEXT), *stores)
    plan = decoder.policy.plan(config, max(w.n_ctx, MIN_CONTEXT), *stores)
    cache = decoder.new_cache(plan, w.n_sequences)
    tokens = np.random.default_rng(SEED).integers(config.n_vocab, size=(w.n_sequences, w.n_ctx))
    prompts = tokens[:, : w.n_depth + w.n_prompt].tolist()
    steps = tokens[:, w.n_depth + w.n_prompt :].T.tolist()
    done, total = 0, w.n_sequences * w.n_depth + (repetitions + warmup) * w.n_tokens

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(min(done, total), total)

    samples, test_time = [], time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for _ in range(repetitions + warmup):
        _set_depth(decoder, cache, prompts, w.n_depth, advance)
        begun = time.perf_counter_ns()
        if w.n_prompt:
            for seq, prompt in enumerate(prompts):
                _prefill(decoder, cache, seq, prompt[w.n_depth :])
        for step in steps:
            decoder.choose(cache, step)
        samples.append(max(time.perf_counter_ns() - begun, 1))
        advance(w.n_tokens)
    weight_bytes = kv_bytes = None
    if not w.n_prompt:
        weight_bytes = bytes_per_token(llama.decoder.weights) / w.n_sequences
        seen = itertools.product(range(w.n_sequences), range(w.n_depth + 1, w.n_ctx + 1))
        kv_bytes = statistics.fmean(decoder.policy.bytes_touched(decoder.ops, config, cache, *of) for of in seen)
    return Result(
        w, str(decoder.policy), stores_text(*stores), test_time, tuple(samples[warmup:]), weight_bytes, kv_bytes
    )


def _set_depth(
    decoder: Decoder, cache: Cache, prompts: list[list[int]], depth: int, advance: Callable[[int], None]
) -> None:
    """Makes every sequence hold the first `depth` tokens of its prompt, computing only what the policy cannot keep."""
    for seq, prompt in enumerate(prompts):
        kept = decoder.rewind(cache, seq, min(depth, int(cache.n_seen[seq])))
        for start, stop in prompt_chunks(decoder.policy, kept, depth):
            decoder.prefill(cache, prompt[start:stop], seq=seq, logits="none")
            advance(stop - start)


def _prefill(decoder: Decoder, cache: Cache, seq: int, prompt: list[int]) -> None:
    """A whole prompt in chunks, with the logits after it."""
    for start, stop in prompt_chunks(decoder.policy, 0, len(prompt)):
        decoder.prefill(cache, prompt[start:stop], seq=seq, logits="last" if stop == len(prompt) else "none")


def check_room(
    path: str | Path, workloads: Iterable[Workload], policies: Iterable[str | Policy], kvs: Sequence[str]
) -> None:
    """Raises UsageError if a policy does not fit a workload, or a workload's cache the memory beside the model.

    Nothing is loaded. ModelError as `open`.
    """
    chosen, free = [parse_policy(policy) for policy in policies], available_memory()
    for kv in kvs:
        store_names(kv)  # before the file is opened
    with GGUFFile.open(path) as file:
        config, weights = ModelConfig.from_gguf(file), _nbytes(file)
        made = list(itertools.product(chosen, [get_stores(kv, config.palu) for kv in kvs]))
        for w in workloads:
            for policy, stores in made:
                n_ctx = max(w.n_ctx, MIN_CONTEXT)
                try:
                    policy.check(config, n_ctx, *stores)
                except UsageError as e:
                    raise UsageError(f"{w}: {e}") from None
                need = policy.plan(config, n_ctx, *stores).nbytes(config, w.n_sequences)
                if need + weights > free:
                    raise UsageError(
                        f"{w}: the KV cache needs {need / 2**30:.1f} GiB and the model "
                        f"{weights / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of memory are free"
                    )


def by_weights(path: str | Path, kvs: Sequence[str]) -> list[list[str]]:
    """KV types as what they mean for a file, those together that a model loaded once can have: latents, and others."""
    with GGUFFile.open(path) as file:
        palu = ModelConfig.from_gguf(file).palu
    stores = [get_stores(kv, palu) for kv in kvs]
    return [[stores_text(*pair) for pair in same] for _, same in itertools.groupby(stores, lambda pair: pair[0].latent)]


# -- what is written down ----------------------------------------------------------------------------------------------


def record(
    llama: Llama, result: Result, memory_bytes_per_second: float | None = None, threads: int | None = None
) -> dict[str, Any]:
    """A result as JSON: llama-bench's fields, then ours, then the samples. Bytes, bytes per second, nanoseconds.

    memory_bytes_per_second: what `read_bandwidth` found before the test. threads: what was asked for, if a device does
    not know.
    """
    file, ops, w = llama.file, llama.decoder.ops, result.workload
    speed, limit = result.bytes_per_second, memory_bytes_per_second
    policy, (k, v) = parse_policy(result.policy), get_stores(result.kv, llama.config.palu)
    return {
        "build_commit": __version__,
        "build_number": 0,
        "cpu_info": cpu_name(),
        "gpu_info": ops.device_name,
        "backends": _BACKENDS.get(ops.name, ops.name),
        "model_filename": str(file.path),
        "model_type": model_type(file, llama.config),
        "model_size": _nbytes(file),
        "model_n_params": _n_params(file),
        "n_batch": PREFILL_CHUNK,
        "n_ubatch": PREFILL_CHUNK,
        "n_threads": getattr(ops, "threads", threads or physical_cores()),
        "type_k": k.name,
        "type_v": v.name,
        "n_prompt": w.n_prompt,
        "n_gen": w.n_gen,
        "n_depth": w.n_depth,
        "test_time": result.test_time,
        "avg_ns": round(statistics.fmean(result.samples_ns)),
        "stddev_ns": round(_stddev(result.samples_ns)),
        "avg_ts": result.avg_ts,
        "stddev_ts": result.stddev_ts,
        "policy": result.policy,
        "policy_name": policy.name,
        "policy_parameters": {name: _plain(getattr(policy, name)) for name in parameters(POLICIES[policy.name])},
        "n_sequences": w.n_sequences,
        "bytes_per_token": result.bytes_per_token,
        "weight_bytes_per_token": result.weight_bytes_per_token,
        "kv_bytes_per_token": result.kv_bytes_per_token,
        "bytes_per_second": speed,
        "memory_bytes_per_second": limit,
        "percent_of_memory": 100 * speed / limit if speed is not None and limit else None,
        "samples_ns": list(result.samples_ns),
        "samples_ts": result.samples_ts,
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Budget) else value


def model_type(file: GGUFFile, config: ModelConfig) -> str:
    """Architecture, parameters and the type of most weights: "llama 6.7B Q4_K"."""
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.data.nbytes
    n = _n_params(file)
    size = f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.0f}M" if n >= 1e6 else f"{n / 1e3:.0f}K"
    return f"{config.architecture} {size} {max(sizes, key=lambda name: sizes[name])}"


def cpu_name() -> str:
    """The processor, as the system calls it; empty if it does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _nbytes(file: GGUFFile) -> int:
    return sum(tensor.data.nbytes for tensor in file.tensors.values())


def _n_params(file: GGUFFile) -> int:
    return sum(math.prod(tensor.shape) for tensor in file.tensors.values())


def _stddev(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
