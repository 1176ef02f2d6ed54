"""The README's tables: of speed and quality beside each other, and of what single parts cost."""

from __future__ import annotations

from collections.abc import Callable

from paper_numbers import FIGURE_9
from paper_results import SMALL_HEAD_DIM, Quality, Row, Rows, repeated
from paper_tables import FIGURE_9_POLICY, MODEL, load, models, percent, table

from minirt.auto import ERRORS, REPEATED

KV_TYPES = ("f16", "q8_0", "q8_0/q4_0", "q4_0", "q8_0-plain", "q4_0-plain")


def tables(rows: Rows, quality: Quality) -> dict[str, Callable[[], str]]:
    """By the names of their places."""
    return {
        "speed": lambda: models(rows, quality, MODEL, FIGURE_9_POLICY, FIGURE_9, short=True),
        "advice": lambda: advice(quality),
        "cost": lambda: cost(load("policies_cpu.json"), quality),
        "tasks": lambda: tasks(load("eval_smollm2_4k.json")["rows"]),
        "types": lambda: types(load("stores_cpu.json")),
        "index": lambda: index(load("index_cpu.json")),
    }


def advice(quality: Quality) -> str:
    """What to take, by what is short. As with `--policy auto` what forgets comes last, and of those whose divergence
    is the least, as far as can be told, the one of fewest bytes first."""
    lines = [["all", "`--policy dense`", "100 % / 100 %", "0", "100 %", repeated(quality.dense)]]
    for what, axis in (("to read", "read"), ("to hold", "held")):
        for most in (0.55, 0.3, 0.15, 0.1):
            if fitting := [p for p in quality.points if p[axis] <= most]:
                fitting = [p for p in fitting if not forgets(p, quality)] or fitting
                best = min(fitting, key=lambda p: p["kld"])
                as_good = [p for p in fitting if p["kld"] <= best["kld"] + ERRORS * best["kld_error"]]
                p = min(as_good, key=lambda p: p[axis])
                flags = f"--policy {p['policy']}" + (f" --kv {p['kv']}" if p["kv"] != "f16" else "")
                lines.append([
                    f"{percent(most)} {what}", f"`{flags}`", f"{percent(p['read'])} / {percent(p['held'])}",
                    f"{p['kld']:.3f}", percent(p["same_top"]),
                    repeated(p) + (", forgets" if forgets(p, quality) else ""),
                ])  # fmt: skip
    head = "bytes of the cache, of dense's | take | reads / holds | KL divergence | same token | characters repeated"
    return table(head, lines)


def forgets(point: Row, quality: Quality) -> bool:
    return bool(point["repetition"] + point["repetition_error"] < REPEATED * quality.dense["repetition"])


def cost(measured: Row, quality: Quality) -> str:
    """Of each policy at the largest depth."""
    found = {tuple(name.split(" @ ")): row for name, row in measured["decoding"].items()}
    depth = max(int(at) for _, at in found)
    lines = [
        [
            f"`{policy}`", f"{row['tokens_per_second']:.0f}", percent(row["share_of_dense_bytes"]),
            quality.of(policy, depth, SMALL_HEAD_DIM),
        ]
        for (policy, at), row in found.items() if int(at) == depth
    ]  # fmt: skip
    head = (
        f"`--policy` | tokens/s at depth {depth} | bytes read there, of dense | KL divergence / same token / repeated"
    )
    return table(head, lines)


def tasks(rows: list[Row]) -> str:
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        of = {row["task"]: row for row in rows if row["policy"] == policy}
        repetition, needle = of["repetition"], of["needle"]
        lines.append([
            f"`{policy}`", percent(repetition["share_of_dense_bytes"]),
            f"{repetition['score']:.1f} ± {repetition['score_error']:.1f}", percent(needle["share_of_dense_bytes"]),
            f"{needle['score']:.0f} %",
        ])  # fmt: skip
    return table("`--policy` | repetition: bytes read | characters | needle: bytes read | found", lines)


def types(measured: Row) -> str:
    """KV types, with dense attention."""
    speed, found, lines = measured["speed"], measured["quality"], []
    for kv in KV_TYPES:
        fast = speed.get(kv, speed.get(kv.removesuffix("-plain")))  # the same bytes
        rate = f"{speed[kv]['tokens_per_second']:.0f}" if kv in speed else "-"
        more = f"{100 * (found[kv]['ppl_ratio'] - 1):+.2f} %" if kv in found else "-"
        lines.append([f"`{kv}`", f"{fast['kv_bytes_read'] / measured['depth']:.0f}", rate, more])
    return table(f"`--kv` | bytes a token | tokens/s at depth {measured['depth']} | perplexity", lines)


def index(measured: Row) -> str:
    """SparQ's second copy of the keys, by its type."""
    both, decoding, quality = ("f16", "q4"), measured["decoding"], measured["quality"]
    held = next(iter(reversed(measured["memory"].values())))
    lines = [["memory over a dense `f16` cache", *(f"{100 * (held[kind] - 1):+.1f} %" for kind in both)]]
    for row in measured["step_1"]:
        if row["r"] == 32:
            heads = f"{row['n_head']}/{row['n_head_kv']} heads of {row['head_dim']}, r = 32, {row['s']:,} tokens"
            f16, q4 = (f"{row['us'][kind] / 1e3:.{2 if row['us'][kind] < 1e4 else 1}f}" for kind in both)
            lines.append([f"ms of step 1, {heads}", f16, f"{q4} ({row['speed_up']:.1f}x)"])
    own = [decoding[f"sparq:r=16:k=128:k_index={kind}"] for kind in both]
    dense = decoding["dense"]
    rate = f"tokens/s of SmolLM2 at depth {measured['depth']}, r = 16 (dense: {dense['tokens_per_second']:.0f})"
    lines.append([rate, *(f"{row['tokens_per_second']:.0f}" for row in own)])
    lines.append(
        ["bytes read there, of dense", *(percent(row["kv_bytes_read"] / dense["kv_bytes_read"]) for row in own)]
    )
    for r in (16, 32):
        own = [quality[f"sparq:r={r}:k=128:k_index={kind}"] for kind in both]
        lines.append([f"KL divergence from dense, r = {r}", *(f"{row['kld']:.4f}" for row in own)])
        lines.append(["same most likely token", *(f"{100 * row['same_top']:.1f} %" for row in own)])
    return table(" | `--k-index f16` | `--k-index q4`", lines)
