"""From a model file to a Palu file: calibrate, share the ranks, factorise layer by layer, write."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import LATENTS, ModelConfig, PaluConfig
from ..dequantize import dequantize
from ..errors import ModelError, UsageError
from ..files import whole_file
from ..gguf_file import GGUFFile
from ..llama import Llama
from ..stores import get_stores
from . import ranks
from .calibration import Windows, cut, input_moments, window_length
from .copying import Make, NewTensor, new_type, write_copy
from .factors import Spectrum, factorise, spectrum
from .fisher import fisher_scores
from .probes import gains, probe_rank
from .side_file import Report, SideFile

ALLOCATIONS = ("uniform", "prior", "kl", "fisher")
DEFAULT_GROUP = 4  # KV heads at most
VERSION = 1
NAMES = ("k", "v")


@dataclass(frozen=True)
class Grouping:
    """How a layer's KV heads are grouped."""

    size: int  # KV heads of a group
    n_groups: int
    width: int  # numbers of a group: size * head_dim, the full rank


@dataclass(frozen=True)
class Conversion:
    """What a conversion gave."""

    ranks: np.ndarray  # int64 [n_layer, 2]: of each group of keys and values
    grouping: Grouping
    latent: str
    dense_bytes: int  # of the cache per token, float16
    latent_bytes: int  # ... as latents, with their scales and positions, filled up to blocks


def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    keep: float = 0.5,
    group: int | str | None = None,
    allocate: str = "prior",
    calibration: bytes | str | None = None,
    n_windows: int = 64,
    latent: str = "f16",
    hadamard: bool = True,
    threads: int | None = None,
    report: Report | None = None,
) -> Conversion:
    """Writes a copy of a model file with low-rank keys and values.

    keep: share of the full rank that all projections together may have, above 0, up to 1; ranks are multiples of 32.
    group: KV heads factored together, a divisor of their number, or "all"; None: the largest one up to 4.
    allocate: who gets how much of it: "uniform"; "prior", a quarter to keys; "kl", where cutting moves the predictions
    most; "fisher", by the gradients of the loss. calibration: text, None for minirt's own, of which n_windows windows
    are read. latent: how the cache is to hold latents. hadamard: rotate them, for few bits. report: called with
    (stage, steps done, in all).

    Slow stages are kept in OUT.part and found there again if a conversion is interrupted. Raises UsageError if an
    argument is out of range, ModelError if a file is not usable, OUT is there or the text too short.
    """
    model, out = Path(model), Path(out)
    _check_options(keep, allocate, n_windows, latent)
    report = report or (lambda label, done, total: None)
    with GGUFFile.open(model) as file:
        if "palu.version" in file.metadata:
            raise file.error("is a Palu file already")
        config = ModelConfig.from_gguf(file)
    grouping = group_heads(config, group)
    ranks.total_rank(keep, config.n_layer, grouping.width)
    _check_output(model, out)
    side = SideFile(out.with_name(out.name + ".part"), report)
    report("loading the model", 0, 0)
    with Llama.load(model, n_ctx=window_length(config.n_ctx_train), kv="f32", threads=threads) as llama:
        llama.warm_up()
        text = calibration.encode() if isinstance(calibration, str) else calibration
        windows = cut(llama, text, n_windows)
        key = hashlib.sha256(repr((_identity(model), windows.digest)).encode()).hexdigest()[:16]
        moments = input_moments(llama, windows, side, f"moments {key}")
        chosen = share_ranks(allocate, llama, windows, moments, grouping, keep, side, key)
        keys = _metadata(chosen, grouping, keep, allocate, windows, latent, hadamard)
        replaced = _replacements(llama.file, moments, grouping, chosen, hadamard, report)
        _check_absent(out)
        with whole_file(out) as target:
            write_copy(target, llama.file, keys, dict(replaced))
    side.remove()
    return _conversion(config, chosen, grouping, latent)


def group_heads(config: ModelConfig, group: int | str | None) -> Grouping:
    """UsageError if the group does not divide the model's KV heads."""
    n = config.n_head_kv
    if group is None:
        size = max(size for size in range(1, DEFAULT_GROUP + 1) if n % size == 0)
    elif group == "all":
        size = n
    elif isinstance(group, int) and group >= 1 and n % group == 0:
        size = group
    else:
        divisors = ", ".join(str(size) for size in range(1, n + 1) if n % size == 0)
        raise UsageError(f"--group {group} does not divide this model's {n} KV heads (one of: {divisors}, all)")
    return Grouping(size, n // size, size * config.head_dim)


def projections(
    file: GGUFFile, layer: int, moment: np.ndarray | None, grouping: Grouping
) -> list[tuple[np.ndarray, Spectrum]]:
    """W_k and W_v of a layer, and their spectra; moment None: for plain SVD."""
    weights = [projection(file, layer, name) for name in NAMES]
    return [(weight, spectrum(weight, moment, grouping.width)) for weight in weights]


def projection(file: GGUFFile, layer: int, name: str) -> np.ndarray:
    """W_k or W_v, float32 [G w, n]; ModelError if a number is not finite."""
    tensor = file.tensors[f"blk.{layer}.attn_{name}.weight"]
    weight = dequantize(tensor)
    if not np.isfinite(weight).all():
        raise file.error(f"tensor '{tensor.name}' holds a value that is not finite")
    return weight


def share_ranks(
    allocate: str,
    llama: Llama,
    windows: Windows,
    moments: np.ndarray,
    grouping: Grouping,
    keep: float,
    side: SideFile,
    key: str,
) -> np.ndarray:
    """Ranks int64 [n_layer, 2] of keys and values by one of ALLOCATIONS; key: what model and windows are."""
    n_layer, width, file = llama.config.n_layer, grouping.width, llama.file
    total = ranks.total_rank(keep, n_layer, width)
    if allocate == "uniform" or not ranks.is_choice(total, n_layer, width):
        return ranks.uniform(total, n_layer, width)
    if allocate == "prior":
        return ranks.prior(total, n_layer, width)
    if allocate == "fisher":
        scores = fisher_scores(file, llama.config, windows, side, f"fisher {key}")
        return ranks.by_scores(scores, total, width)
    rank = probe_rank(keep, width)
    gain = gains(
        llama,
        windows,
        lambda layer: projections(file, layer, moments[layer], grouping),
        width,
        rank,
        side,
        f"kl {key} {grouping.size} {rank}",
    )
    return ranks.by_gain(gain, total, width)


def _replacements(
    file: GGUFFile, moments: np.ndarray, grouping: Grouping, chosen: np.ndarray, rotated: bool, report: Report
) -> Iterator[tuple[str, tuple[list[NewTensor], Make]]]:
    """The name of each projection, and what takes its place."""
    for layer, pair in enumerate(chosen.tolist()):
        for name, rank in zip(NAMES, pair, strict=True):
            tensor = file.tensors[f"blk.{layer}.attn_{name}.weight"]
            shapes = (grouping.n_groups * rank, tensor.shape[1]), (tensor.shape[0], rank)
            specs = [
                NewTensor(f"blk.{layer}.attn_{name}_{side}.weight", new_type(tensor), shape)
                for side, shape in zip("ab", shapes, strict=True)
            ]

            def make(layer: int = layer, name: str = name, rank: int = rank) -> tuple[np.ndarray, np.ndarray]:
                weight = projection(file, layer, name)
                report("factorising", 2 * layer + NAMES.index(name), 2 * len(chosen))
                return factorise(weight, spectrum(weight, moments[layer], grouping.width), rank, rotated)

            yield tensor.name, (specs, make)


def _metadata(
    chosen: np.ndarray, grouping: Grouping, keep: float, allocate: str, windows: Windows, latent: str, hadamard: bool
) -> dict[str, str | np.ndarray | np.generic]:
    return {
        "palu.version": np.uint32(VERSION),
        "palu.group_size": np.uint32(grouping.size),
        "palu.k_rank": chosen[:, 0].astype(np.int32),
        "palu.v_rank": chosen[:, 1].astype(np.int32),
        "palu.latent": latent,
        "palu.hadamard": np.bool_(hadamard),
        "palu.keep": np.float32(keep),
        "palu.allocate": allocate,
        "palu.calibration": windows.source,
    }


def _conversion(config: ModelConfig, chosen: np.ndarray, grouping: Grouping, latent: str) -> Conversion:
    k_ranks, v_ranks = (tuple(ranks) for ranks in chosen.T.tolist())
    palu = PaluConfig(grouping.size, k_ranks, v_ranks, latent, hadamard=True)
    low_rank, every = dataclasses.replace(config, palu=palu), range(config.n_layer)
    latents = sum(store.slot_bytes(low_rank, layer) for store in get_stores("palu", palu) for layer in every)
    dense = sum(store.slot_bytes(config, layer) for store in get_stores("f16") for layer in every)
    return Conversion(chosen, grouping, latent, dense, latents)


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _check_options(keep: float, allocate: str, n_windows: int, latent: str) -> None:
    if not 0 < keep <= 1:
        raise UsageError(f"--keep {keep:g} is out of range (above 0, up to 1)")
    if allocate not in ALLOCATIONS:
        raise UsageError(f"unknown allocation '{allocate}' (one of: {', '.join(ALLOCATIONS)})")
    if latent not in LATENTS:
        raise UsageError(f"unknown latent type '{latent}' (one of: {', '.join(LATENTS)})")
    if n_windows < 1:
        raise UsageError(f"--windows {n_windows} is out of range (1 or more)")


def _check_output(model: Path, out: Path) -> None:
    """ModelError unless a new file can be written there: better now than after minutes."""
    try:
        if out.exists() and out.samefile(model):
            raise ModelError(f"{out}: is the model itself; give the output another name")
        _check_absent(out)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except ModelError:
        raise
    except (OSError, ValueError) as e:  # ValueError: a null character in the path
        raise ModelError(f"{out}: cannot write: {getattr(e, 'strerror', None) or e}") from None


def _check_absent(out: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.lstat(out)
        raise ModelError(f"{out}: is there already; remove it, or give another name")
