"""One engine in a process of its own. Started by compare_llamacpp.py, which says over a pipe what to time.

    python tools/compare_worker.py '{"engine": "minirt", "model": "model.gguf", "threads": 2, "n_ctx": 4096}'

Each line on standard input is an object {"do": "decode" or "prefill", ...}, answered by one line. With "start": n in
the argument, llama.cpp continues a short text by n tokens instead; the engine "bandwidth" measures the memory.
Imports are made where they are needed, so that no process pays for those of another.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

PROMPT = "The capital of France is"
MINIRT_CHUNK = 512  # tokens per call, as in minirt's session
LLAMA_BATCH, LLAMA_UBATCH = 2048, 512  # llama.cpp's own defaults


class Engine:
    """What is timed is the same for both engines; a subclass says how to go back, how to read and how to step."""

    n_vocab = 0
    held = 0  # tokens of the text before the first step that the cache still holds

    def rewind(self, n: int) -> None:
        """Keeps the first n tokens in the cache."""
        raise NotImplementedError

    def read(self, tokens: Sequence[int]) -> None:
        """Appends a text to the cache and computes the logits of its last token."""
        raise NotImplementedError

    def step(self, tokens: Sequence[int]) -> None:
        """Appends tokens one by one and computes the logits of each."""
        raise NotImplementedError

    def facts(self, depth: int, n: int) -> dict[str, Any]:
        """Bytes that n steps from `depth` on must read and hold, if the engine knows."""
        return {}

    def decode(self, depth: int, n: int, seed: int) -> dict[str, Any]:
        """Seconds for n steps after `depth` tokens, which are read once and not timed."""
        self.rewind(min(self.held, depth))
        if self.held < depth:
            self.read(random_tokens(self.n_vocab, depth, 0)[self.held :])
        self.held = depth
        tokens = random_tokens(self.n_vocab, n, seed)
        begun = time.perf_counter()
        self.step(tokens)
        return {"seconds": time.perf_counter() - begun, "peak": peak_memory(), **self.facts(depth, n)}

    def prefill(self, n: int, seed: int) -> dict[str, Any]:
        """Seconds for a prompt of n tokens."""
        self.rewind(0)
        self.held = 0
        tokens = random_tokens(self.n_vocab, n, seed)
        begun = time.perf_counter()
        self.read(tokens)
        return {"seconds": time.perf_counter() - begun, "peak": peak_memory()}


class Minirt(Engine):
    def __init__(self, model: str, threads: int, n_ctx: int):
        from minirt import Llama

        self.llama = Llama.load(model, n_ctx=n_ctx, threads=threads)
        self.llama.warm_up()
        self.decoder, self.cache = self.llama.decoder, self.llama.session.cache
        self.n_vocab = self.llama.config.n_vocab

    def about(self) -> dict[str, Any]:
        kv = self.cache.plan.nbytes(self.llama.config)
        tensors = sum(tensor.data.nbytes for tensor in self.llama.file.tensors.values())
        return {"tensor_bytes": tensors, "kv_bytes_allocated": kv}

    def rewind(self, n: int) -> None:
        self.decoder.rewind(self.cache, 0, n)

    def read(self, tokens: Sequence[int]) -> None:
        for start, chunk in chunks(tokens, MINIRT_CHUNK):
            last = start + len(chunk) == len(tokens)
            self.decoder.prefill(self.cache, chunk, logits="last" if last else "none")

    def step(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.decoder.decode(self.cache, [token])

    def facts(self, depth: int, n: int) -> dict[str, Any]:
        kv = [
            self.decoder.policy.bytes_read(self.llama.config, self.cache.plan, seen)
            for seen in range(depth + 1, depth + n + 1)
        ]
        return {"bytes_per_step": self.llama.session.weight_bytes + sum(kv) / n, "kv_bytes": kv[-1]}


class LlamaCpp(Engine):
    """llama.cpp through its C interface, so that Python costs one call per batch."""

    def __init__(self, model: str, threads: int, n_ctx: int, flash: bool):
        import llama_cpp.llama_cpp as lc

        self.lc = lc
        lc.llama_backend_init()
        params = lc.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = lc.llama_model_load_from_file(os.fsencode(model), params)
        if not self.model:
            raise RuntimeError("llama.cpp cannot load the model")
        options = lc.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = n_ctx, LLAMA_BATCH, LLAMA_UBATCH
        options.n_threads = options.n_threads_batch = threads
        # flash_attn_type has a third value, "auto"; before it there was a boolean of another name
        setattr(options, "flash_attn_type" if hasattr(options, "flash_attn_type") else "flash_attn", int(flash))
        self.context = lc.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.vocab = lc.llama_model_get_vocab(self.model)
        self.n_vocab = lc.llama_vocab_n_tokens(self.vocab)

    def about(self) -> dict[str, Any]:
        return {"system_info": self.lc.llama_print_system_info().decode().strip(" |\n")}

    def rewind(self, n: int) -> None:
        memory = self.lc.llama_get_memory(self.context)
        if n == 0:
            self.lc.llama_memory_clear(memory, False)
        elif not self.lc.llama_memory_seq_rm(memory, 0, n, -1):
            raise RuntimeError("llama.cpp cannot forget the end of a text")

    def read(self, tokens: Sequence[int]) -> None:
        for start, chunk in chunks(tokens, LLAMA_BATCH):
            wanted = bytearray(len(chunk))
            wanted[-1] = start + len(chunk) == len(tokens)
            self._run(self._batch(chunk, wanted))
        self.lc.llama_synchronize(self.context)

    def step(self, tokens: Sequence[int]) -> None:
        batch = self._batch(tokens[:1], bytearray([1]))
        for token in tokens:
            batch.token[0] = token
            self._run(batch)
            self.lc.llama_synchronize(self.context)

    def generate(self, prompt: str, n: int) -> list[int]:
        """The n most likely tokens after a text."""
        lc, text = self.lc, prompt.encode()
        ids = (lc.llama_token * (len(text) + 2))()
        count = lc.llama_tokenize(self.vocab, text, len(text), ids, len(ids), True, False)
        sampler = lc.llama_sampler_init_greedy()
        self.read(ids[:count])
        answer = [lc.llama_sampler_sample(sampler, self.context, -1)]
        while len(answer) < n:
            self.step(answer[-1:])
            answer.append(lc.llama_sampler_sample(sampler, self.context, -1))
        return answer

    def _batch(self, tokens: Sequence[int], wanted: bytearray) -> Any:
        """Tokens that follow what is cached; `wanted` marks those whose logits are computed."""
        n = len(tokens)
        ids, marks = (self.lc.llama_token * n)(*tokens), (ctypes.c_int8 * n)(*wanted)
        return self.lc.llama_batch(n_tokens=n, token=ids, logits=marks)

    def _run(self, batch: Any) -> None:
        if status := self.lc.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")


def chunks(tokens: Sequence[int], size: int) -> Iterator[tuple[int, Sequence[int]]]:
    for start in range(0, len(tokens), size):
        yield start, tokens[start : start + size]


def random_tokens(n_vocab: int, n: int, seed: int) -> list[int]:
    """The same ids in every process; fewer tokens of a seed are the beginning of more."""
    return random.Random(seed).choices(range(n_vocab), k=n)


def peak_memory() -> int:
    """The most bytes of memory this process had at any time."""
    try:  # on Linux ru_maxrss also counts the process that started us
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    spec = json.loads(sys.argv[1])
    engine, start = spec.pop("engine"), spec.pop("start", 0)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints does not disturb the answers
    if engine == "bandwidth":
        from minirt.bandwidth import read_bandwidth

        print(json.dumps(read_bandwidth(**spec)), file=out)
        return
    if start:
        print(json.dumps(LlamaCpp(**spec).generate(PROMPT, start)), file=out)
        return
    worker = Minirt(**spec) if engine == "minirt" else LlamaCpp(**spec)
    print(json.dumps(worker.about()), file=out)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(worker, order.pop("do"))(**order)), file=out)


if __name__ == "__main__":
    main()
