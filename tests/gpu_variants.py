"""The kernels that models of real shapes run, compiled for cards that are not there, and what they need of these.

Which kernels those are, with which constants, is found out by running one layer of such models on a device that only
notes what it would launch.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from nvrtc import Resources, nvrtc_for
from test_dequantize import random_tensor

from kernels_gpu.device import source_of
from kernels_gpu.ops import GpuOps
from minirt.bandwidth.grid import commit
from minirt.config import ModelConfig, PaluConfig, RopeScaling
from minirt.decoder import Decoder
from minirt.ops import KV, MergeRule
from minirt.policies import parse_policy
from minirt.rope import make_rope
from minirt.stores import get_stores
from minirt.weights import LayerWeights, Weights

CARDS = {61: (20, 48), 75: (40, 64), 80: (108, 163), 87: (16, 163), 90: (132, 227)}  # multiprocessors of one of many,
# and KiB of shared memory that a block may have; 61: with the wheels of CUDA 12 only
SHAPES = {"7b": (32, 32, 128), "8b": (32, 8, 128), "smollm2": (9, 3, 64)}  # H_q, H_kv, d
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32", "IQ4_XS", "Q2_K", "Q3_K")
POLICIES = ("dense", "sparq:k=64", "sparq:k=auto:most=64:k_index=q4", "topk:k=64", "lm-infinite:budget=256")
ALL_STORES = ("dense", "lm-infinite:budget=256")  # on these shapes; the other policies on the smallest one
LATENTS = {"7b": "latent-f16", "8b": "latent-q4"}
EIGHT = (64, 8, 128)  # of a larger one, whose groups of eight query heads take the most registers
OF_EIGHT = {"h2o:budget=256": "f32", "lm-infinite:budget=256": "f32", "sparq:k=64": "f32", "dense": "q8_0"}
GROUPS = (5, 6, 7, 12)  # of Qwen2, Mistral Large
EVICTING = {"7b": "f32", "8b": "f16", "smollm2": "q8_0"}  # keys and values of shapes that H2O and D2O run on
LONG_CONTEXT = 1 << 18  # where several blocks of a card choose for a KV head
Variant = tuple[str, tuple[tuple[str, Any], ...]]  # a file and its constants


tensor = cache(random_tensor)  # whatever its numbers


class NotingDevice:
    """A card with endless memory that launches nothing."""

    name, memory, driver = "noting", (1 << 50, 1 << 50), "13.0"

    def __init__(self, arch: int):
        self.capability = arch // 10, arch % 10
        self.multiprocessors, kib = CARDS[arch]
        self.shared_memory = kib << 10
        self.variants: dict[Variant, set[str]] = {}

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.zeros(shape, dtype)

    zeros = empty

    def upload(self, array: np.ndarray) -> Any:
        return array

    def download(self, array: Any) -> Any:
        return array

    def view(self, array: Any, dtype: Any) -> Any:
        return array.view(dtype)

    def concatenate(self, arrays: list[Any]) -> Any:
        return np.concatenate(arrays)

    def kernel(self, file: str, name: str, **constants: int | str) -> Callable[..., None]:
        self.variants.setdefault((file, tuple(sorted(constants.items()))), set()).add(name)
        return lambda grid, block, *args, shared=0: None

    def capture(self, run: Callable[[], None]) -> None:
        return None

    def refresh(self, host: np.ndarray, array: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def config(n_head: int, n_head_kv: int, d: int) -> ModelConfig:
    return ModelConfig(
        architecture="llama", name="", n_layer=1, n_embd=n_head * d, n_head=n_head, n_head_kv=n_head_kv, head_dim=d,
        n_ff=512, n_vocab=96, n_ctx_train=1 << 16, rms_eps=1e-5, rope_base=1e4, rope_dim=d,
        rope_scaling=RopeScaling("none"), rope_interleaved=True, sliding_window=0, palu=None,
    )  # fmt: skip


def weights(ops: GpuOps, c: ModelConfig, kind: str) -> Weights:
    q, kv, n, ff = c.n_head * c.head_dim, c.n_head_kv * c.head_dim, c.n_embd, c.n_ff
    shapes = {"wq": (q, n), "wk": (kv, n), "wv": (kv, n), "wo": (n, q)}
    shapes |= {"w_gate": (ff, n), "w_up": (ff, n), "w_down": (n, ff)}
    norm, none = np.ones(n, np.float32), dict.fromkeys(("bq", "bk", "bv", "q_norm", "k_norm"))
    layer = {name: ops.matrix(tensor(kind, *shape)) for name, shape in shapes.items()}
    output = ops.matrix(tensor(kind, c.n_vocab, n))
    return Weights(output, [LayerWeights(attn_norm=norm, ffn_norm=norm, **none, **layer)], norm, output, None)


def low_rank(ops: GpuOps, c: ModelConfig, w: Weights) -> tuple[ModelConfig, Weights]:
    """The same model with half of the rank: three quarters of it of values."""
    palu = PaluConfig(4, (c.head_dim,), (3 * c.head_dim,), "f16", False)
    groups, rope = c.n_head_kv // palu.group_size, make_rope(c)
    first, second = (
        [tensor("F16", *shape) for shape in shapes]
        for shapes in zip(
            *(((groups * r, c.n_embd), (c.n_head_kv * c.head_dim, r)) for r in (palu.k_ranks[0], palu.v_ranks[0])),
            strict=True,
        )
    )
    c = replace(c, palu=palu)
    factors = ops.factor(second[0], c, None, None, rope), ops.factor(second[1], c, None)
    wk, wv = map(ops.matrix, first)
    layer = replace(w.layers[0], wk=wk, wv=wv, k_factor=factors[0], v_factor=factors[1])
    return c, replace(w, layers=[layer])


def run(ops: GpuOps, c: ModelConfig, w: Weights, spec: str, kv: str, batch: int = 1, n_ctx: int = 1024) -> None:
    """A prompt, two steps, and some of it forgotten."""
    policy, n = parse_policy(spec), 600
    decoder = Decoder(c, w, ops, policy)
    cache = decoder.new_cache(policy.plan(c, n_ctx, *get_stores(kv, c.palu)), batch)
    for seq in range(batch):
        decoder.prefill(cache, [1] * n, seq, logits="none")
    for _ in range(2):
        decoder.choose(cache, [1] * batch)
    decoder.rewind(cache, 0, n - 10)


def merge(ops: GpuOps, c: ModelConfig, kv: str) -> None:
    """D2O's own calls: kept slots must be some, and those that a device finds which launches nothing are not."""
    n, one, rule = 3000, np.ones(1, np.int32), MergeRule(0.7, 1.0, True, False)
    layer = KV(*(ops.allocate(store, (1, c.n_head_kv, n, c.head_dim)) for store in get_stores(kv)))
    heads = np.zeros((1, c.n_head_kv), np.int32)
    ops.merge_evicted(layer, heads.T + np.arange(n // 3, dtype=np.int32), 4, heads[0].astype(np.float32), rule)
    ops.merge(layer, heads, n * one, 4 * one, one, heads.astype(np.float32), rule)


def variants_of(arch: int) -> dict[Variant, set[str]]:
    device = NotingDevice(arch)
    ops = GpuOps(device)
    for name, shape in SHAPES.items():
        c = config(*shape)
        w = weights(ops, c, "Q8_0")
        for spec in POLICIES:
            for kv in ("f16", "q8_0", "q4_0", "f32") if name == "smollm2" or spec in ALL_STORES else ("f16",):
                run(ops, c, w, spec, kv)
        for spec in ("sparq:k=64", "sparq:k=64:k_index=q4"):
            run(ops, c, w, spec, "f16", n_ctx=LONG_CONTEXT)
        if name in LATENTS:
            run(ops, *low_rank(ops, c, w), "dense", LATENTS[name])
        run(ops, c, w, "h2o:budget=256", EVICTING[name])
        merge(ops, c, EVICTING[name])
    c = config(*EIGHT)
    w = weights(ops, c, "Q8_0")
    for spec, kv in OF_EIGHT.items():
        run(ops, c, w, spec, kv)
    for group in GROUPS:
        c = config(2 * group, 2, 128)
        run(ops, c, w := weights(ops, c, "Q8_0"), "dense", "f16")
        run(ops, c, w, "sparq:k=64", "f16", n_ctx=LONG_CONTEXT)
    c = config(4, 4, 64)
    for kind in TYPES:
        for batch in (1, 2, 4, 8, 16, 32, 64) if kind in ("Q4_0", "Q8_0", "Q6_K", "F16") else (1, 4, 64):
            run(ops, replace(c, n_embd=256), weights(ops, replace(c, n_embd=256), kind), "dense", "f16", batch)
    return device.variants


def resources(arch: int) -> dict[str, Resources] | None:
    """What each kernel needs of a multiprocessor, by file, name and constants. None without an NVRTC for this
    capability."""
    if not (nvrtc := nvrtc_for(arch)):
        return None
    found = {}
    for (file, constants), names in variants_of(arch).items():
        options = ["-std=c++17", *(f"-D{name}={value}" for name, value in constants)]
        used = nvrtc.compile(source_of(file), arch, options=options).resources
        shown = " ".join(f"{name}={value}" for name, value in constants)
        found |= {f"{file} {name} {shown}".strip(): used[name] for name in names}
    return found


def report() -> str:
    """JSON, a line for each kernel: [registers of a thread, bytes of a block's static shared memory, bytes spilled] on
    each capability; null where it is not used."""
    found = {arch: r for arch in CARDS if (r := resources(arch)) is not None}
    facts = {
        "date": datetime.date.today().isoformat(), "commit": commit(), "capabilities": list(found),
        "nvrtc": [nvrtc_for(arch).version for arch in found],
        "numbers": ["registers", "shared bytes", "spilled bytes"],
    }  # fmt: skip
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in facts.items()]
    rows = [
        f"  {json.dumps(name)}: {json.dumps([numbers(of.get(name)) for of in found.values()], separators=(',', ':'))}"
        for name in sorted({name for of in found.values() for name in of})
    ]
    return "\n".join(["{", *lines, ' "kernels": {', ",\n".join(rows), " }", "}", ""])


def numbers(used: Resources | None) -> list[int] | None:
    return None if used is None else [used.registers, used.shared, used.spill]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(report())  # python tests/gpu_variants.py tools/results/gpu_resources.json
