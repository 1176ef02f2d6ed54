"""Writes GGUF files with low-rank keys and values for tests: plain truncated SVD, which `minirt palu` betters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from make_gguf import F16, F32, I32, Entry, Gguf, key_entry

from minirt.dequantize import dequantize
from minirt.gguf_file import GGUFFile, raw_keys

KINDS = {
    "palu.version": "u32", "palu.group_size": "u32", "palu.k_rank": "[i32]", "palu.v_rank": "[i32]",
    "palu.latent": "str", "palu.hadamard": "bool",
}  # fmt: skip
TYPES = {"float32": F32, "float16": F16, "int32": I32}


def factors(weight: np.ndarray, groups: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [G r, n] and B [H_kv d, r] of a projection [H_kv d, n], float32: the best of rank r for each group."""
    firsts, seconds = [], []
    for part in np.split(weight.astype(np.float64), groups):
        u, s, vt = np.linalg.svd(part, full_matrices=False)
        short = max(0, rank - len(s))  # of a group wider than the embedding
        u, s, vt = np.pad(u, ((0, 0), (0, short))), np.pad(s, (0, short)), np.pad(vt, ((0, short), (0, 0)))
        firsts.append(np.sqrt(s[:rank, None]) * vt[:rank])
        seconds.append(u[:, :rank] * np.sqrt(s[:rank]))
    return np.concatenate(firsts).astype(np.float32), np.concatenate(seconds).astype(np.float32)


def make_palu(
    source: Path,
    path: Path,
    group_size: int = 1,
    k_rank: int | Sequence[int] = 32,
    v_rank: int | Sequence[int] = 32,
    latent: str = "f16",
    type: str = "F32",
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """A copy of a model with low-rank keys and values; a rank for all layers, or of each.

    keys, tensors: what to put in place of its own, None to leave it out.
    """
    with GGUFFile.open(source) as file:
        weights = {name: dequantize(t) for name, t in file.tensors.items() if "attn_k.w" in name or "attn_v.w" in name}
        kept = {
            name: Entry(t.type.id, list(t.shape[::-1]), t.data.tobytes())
            for name, t in file.tensors.items()
            if name not in weights
        }
        arch = file.get_str("general.architecture")
        n_layer, n_head_kv = (file.get_int(f"{arch}.{key}") for key in ("block_count", "attention.head_count_kv"))
    ranks = {x: [r] * n_layer if isinstance(r, int) else [*r] for x, r in (("k", k_rank), ("v", v_rank))}
    own = {
        "palu.version": 1, "palu.group_size": group_size, "palu.k_rank": ranks["k"], "palu.v_rank": ranks["v"],
        "palu.latent": latent, "palu.hadamard": False,
    }  # fmt: skip
    made: dict[str, np.ndarray | None] = {}
    for i in range(n_layer):
        for x in "kv":
            both = factors(weights[f"blk.{i}.attn_{x}.weight"], n_head_kv // group_size, ranks[x][i])
            for factor, values in zip("ab", both, strict=True):
                made[f"blk.{i}.attn_{x}_{factor}.weight"] = values.astype({"F32": np.float32, "F16": np.float16}[type])
    made |= tensors or {}

    palu = {key: value for key, value in (own | dict(keys or {})).items() if value is not None}
    model = Gguf(raw_keys=[*raw_keys(source).values(), *(key_entry(key, KINDS[key], palu[key]) for key in palu)])
    model.tensors = kept | {
        name: Entry(TYPES[values.dtype.name], list(values.shape[::-1]), values.tobytes())
        for name, values in made.items()
        if values is not None
    }
    return model.write(path)
