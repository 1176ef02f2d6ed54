"""Measures what low-rank keys and values cost: perplexity by share of the rank kept, grouping and allocation.

    python tools/measure_palu.py --model smollm2-f16.gguf --text tinyshakespeare.txt -o tools/results/palu_quality.json

Factors are rounded to float16 and multiplied, and the ordinary decoder runs with the products in place of W_k and W_v.
With --latents, whose rows are apart from the others in OUTPUT, the cache holds latents of 16 bits and fewer.

Calibrated is on the text `minirt palu` has of its own. A play of it is the beginning of tinyshakespeare: what is scored
are windows spread over the rest. An interrupted run (without --latents) goes on from OUTPUT and what lies beside it.
"""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from minirt import Llama, __version__
from minirt.bandwidth.grid import commit
from minirt.bench import cpu_name
from minirt.config import PaluConfig
from minirt.decoder import Decoder
from minirt.gguf_file import TENSOR_TYPES, Tensor
from minirt.palu import calibration, conversion
from minirt.palu.factors import compose, factorise
from minirt.palu.side_file import SideFile
from minirt.perplexity import Perplexity, cut_windows, score
from minirt.session import Session
from minirt.stores import get_stores

GROUPS, KEEPS = ("all", 1), (0.7, 0.5)
LATENTS = (("f16", True), ("q4", True), ("q4", False), ("q3", True), ("q3", False))  # and whether they are rotated
HEADS_ALONE = (1, 0.5, "fisher")  # of a rank of 32, the least there is, so that all rules agree
N_CTX = 512


def scored_windows(llama: Llama, text: bytes, n: int) -> np.ndarray:
    """n windows int32 [n, N_CTX] spread over what of the text is no calibration text."""
    play = resources.files("minirt.eval.data").joinpath("shakespeare.txt").read_bytes()
    rest = text[len(play) :] if text.startswith(play) else text
    windows = cut_windows(llama.tokenizer.encode_bytes(rest, add_bos=False), N_CTX)
    return windows[np.arange(n) * len(windows) // n]


def perplexity(llama: Llama, windows: np.ndarray) -> dict[str, float]:
    running = Perplexity()
    for i in range(len(windows)):
        for scored in score(llama, windows, slice(i, i + 1), decode=False):
            running.add(scored.logits, scored.tokens)
    return {"ppl": running.value, "ppl_error": running.error}


def with_ranks(llama: Llama, moments: np.ndarray | None, grouping: conversion.Grouping, ranks: np.ndarray) -> Decoder:
    """The model's decoder with every projection at its rank; moments None: by plain SVD of the weights."""
    d, layers = llama.decoder, []
    for i, weights in enumerate(llama.decoder.weights.layers):
        both = conversion.projections(llama.file, i, None if moments is None else moments[i], grouping)
        products = []
        for (weight, found), rank in zip(both, ranks[i].tolist(), strict=True):
            a, b = factorise(weight, found, rank, rotated=False)
            halves = (factor.astype(np.float16).astype(np.float32) for factor in (a, b))
            values = np.ascontiguousarray(compose(*halves, grouping.n_groups))
            products.append(d.ops.matrix(Tensor("", TENSOR_TYPES["F32"], values.shape, values.view(np.uint8))))
        layers.append(replace(weights, wk=products[0], wv=products[1]))
    return Decoder(d.config, replace(d.weights, layers=layers), d.ops, d.policy)


def with_latents(
    llama: Llama, moments: np.ndarray, grouping: conversion.Grouping, ranks: np.ndarray, latent: str, rotated: bool
) -> Session:
    """A session of the model whose cache holds latents."""
    d, (k_ranks, v_ranks) = llama.decoder, (tuple(of_layers) for of_layers in ranks.T.tolist())
    config = replace(d.config, palu=PaluConfig(grouping.size, k_ranks, v_ranks, latent, rotated))
    layers = []
    for i, weights in enumerate(d.weights.layers):
        both = conversion.projections(llama.file, i, moments[i], grouping)
        (k_a, k_b), (v_a, v_b) = (
            map(_f16, factorise(weight, found, rank, rotated))
            for (weight, found), rank in zip(both, ranks[i].tolist(), strict=True)
        )
        k_factor = d.ops.factor(k_b, config, weights.bk, weights.k_norm, d.rope)
        factors = {"k_factor": k_factor, "v_factor": d.ops.factor(v_b, config, weights.bv)}
        layers.append(replace(weights, wk=d.ops.matrix(k_a), wv=d.ops.matrix(v_a), **factors))
    decoder = Decoder(config, replace(d.weights, layers=layers), d.ops, d.policy)
    plan = d.policy.plan(config, N_CTX, *get_stores("palu", config.palu))
    return Session(decoder, decoder.new_cache(plan), N_CTX, 0)


def _f16(values: np.ndarray) -> Tensor:
    return Tensor("", TENSOR_TYPES["F16"], values.shape, values.astype(np.float16).view(np.uint8))


def latent_rows(llama: Llama, text: bytes, n: int, side: SideFile, n_windows: int) -> Iterator[dict[str, Any]]:
    """A measurement of each type of latents: calibrated on so many windows, one rule."""
    scored, exact, session = scored_windows(llama, text, n), llama.decoder, llama.session
    yield {"latent": "none"} | perplexity(llama, scored)
    windows = calibration.cut(llama, None, n_windows)
    moments = calibration.input_moments(llama, windows, side, f"moments {windows.digest}")
    for group, keep, allocate in (*itertools.product(GROUPS[:1], KEEPS, ("prior",)), HEADS_ALONE):
        grouping = conversion.group_heads(llama.config, group)
        ranks = conversion.share_ranks(allocate, llama, windows, moments, grouping, keep, side, windows.digest)
        for latent, rotated in LATENTS:
            llama.session = with_latents(llama, moments, grouping, ranks, latent, rotated)
            llama.decoder = llama.session.decoder
            found = perplexity(llama, scored)
            llama.decoder, llama.session = exact, session
            setting = {"keep": keep, "group": grouping.size, "allocate": allocate, "latent": latent}
            yield setting | {"hadamard": rotated, "kept": float(ranks.mean() / grouping.width)} | found


def rows(llama: Llama, text: bytes, n: int, side: SideFile, skipped: int) -> Iterator[dict[str, Any]]:
    """A measurement each, but for so many at the beginning: first of the model as it is."""
    scored, exact = scored_windows(llama, text, n), llama.decoder
    if not skipped:
        yield {"allocate": "exact"} | perplexity(llama, scored)
    windows = calibration.cut(llama, None, 64)
    moments = calibration.input_moments(llama, windows, side, f"moments {windows.digest}")
    known: dict[Any, dict[str, float]] = {}
    rules = [("prior", False), *((name, True) for name in conversion.ALLOCATIONS)]
    for group, keep, (allocate, whitened) in list(itertools.product(GROUPS, KEEPS, rules))[max(skipped - 1, 0) :]:
        grouping = conversion.group_heads(llama.config, group)
        ranks = conversion.share_ranks(allocate, llama, windows, moments, grouping, keep, side, windows.digest)
        same = grouping, whitened, ranks.tobytes()  # rules may agree
        if same not in known:
            llama.decoder = with_ranks(llama, moments if whitened else None, grouping, ranks)
            known[same] = perplexity(llama, scored)
            llama.decoder = exact
        share = ranks.mean(axis=0) / grouping.width
        yield {
            "keep": keep, "group": grouping.size, "allocate": allocate, "whitened": whitened,
            "kept": float(ranks.mean() / grouping.width), "kept_k": float(share[0]), "kept_v": float(share[1]),
            "k_ranks": _count(ranks[:, 0]), "v_ranks": _count(ranks[:, 1]),
        } | known[same]  # fmt: skip


def _count(ranks: np.ndarray) -> dict[str, int]:
    """How many layers have which rank."""
    return {str(rank): n for rank, n in sorted(Counter(ranks.tolist()).items())}


@click.command()
@click.option("--model", required=True, help="A GGUF file.")
@click.option("--text", required=True, help="What is scored.")
@click.option("--windows", default=16, show_default=True, help="Windows of 512 tokens of it.")
@click.option("--latents", is_flag=True, help="Measure types of latents.")
@click.option("--calibration", default=64, show_default=True, help="With --latents: windows that are calibrated on.")
@click.option("--threads", default=2, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(model: str, text: str, windows: int, latents: bool, calibration: int, threads: int, output: Path) -> None:
    """Measures Palu's quality, and writes OUTPUT."""
    side = SideFile(output.with_suffix(".part"), lambda label, done, total: None)
    before = json.loads(output.read_text()) if output.exists() else {}
    with Llama.load(model, n_ctx=N_CTX, kv="f32", threads=threads) as llama:
        result: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), "threads": threads, "os": platform.platform(),
            "commit": commit(),
            "versions": {"minirt": __version__} | {name: version(name) for name in ("numpy", "numba")},
            "model": llama.config.name, "type": _type(llama), "text": Path(text).name, "n_ctx": N_CTX,
            "windows": windows, "factors": "f16", "rows": [],
        }  # fmt: skip
        content = Path(text).read_bytes()
        if latents:
            result["calibration_windows"] = calibration
            whole, found = {**before, "latents": result}, latent_rows(llama, content, windows, side, calibration)
        else:
            kept = {name: before.pop(name) for name in ("latents",) if name in before}
            if {**before, "date": "", "rows": []} == {**result, "date": ""}:
                result["rows"] = before["rows"]
            whole, found = result | kept, rows(llama, content, windows, side, len(result["rows"]))
        for row in found:
            result["rows"].append(row)
            output.write_text(json.dumps(whole, indent=1) + "\n")
            click.echo(f"{_label(row):32} {row['ppl']:9.3f} ± {row['ppl_error']:.3f}")
    side.remove()


def _label(row: dict[str, Any]) -> str:
    rule = "plain SVD, prior" if row.get("whitened") is False else row.get("allocate", "exact")
    latent = "" if row.get("hadamard") is None else f" {row['latent']}{'' if row['hadamard'] else ', not rotated'}"
    return f"{row.get('keep', 1):4} {row.get('group', ''):>2} {rule}{latent}"


def _type(llama: Llama) -> str:
    """Of the most weights."""
    sizes: Counter[str] = Counter()
    for tensor in llama.file.tensors.values():
        sizes[tensor.type.name] += tensor.data.nbytes
    return sizes.most_common(1)[0][0]


if __name__ == "__main__":
    main()
