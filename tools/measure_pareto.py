"""Measures what policies, budgets and KV types cost in quality, beside the bytes they read and hold. Writes JSON.

    python tools/measure_pareto.py --model smollm2-q4_0.gguf --text tinyshakespeare.txt -o tools/results/pareto.json

Divergence is from dense attention to a float16 cache, where the second half of each window is decoded token by token;
repetition is that task of `minirt eval`, in shorter texts of which k is the same share. Palu's points are of copies of
the model with low-rank keys and values, which are made here. OUTPUT is renewed after each measurement, and what it
holds is not measured again.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from minirt import Llama
from minirt.bandwidth.grid import Machine, commit
from minirt.palu import convert
from minirt.perplexity import Divergence, cut_windows, decoded_logits, dense_log_probs, first_scored
from minirt.policies import in_proportion, parse_policy
from minirt.progress import Progress
from minirt.stores import get_stores

BOUNDED = ("window", "streaming", "lm-infinite", "h2o", "tova", "d2o")
BUDGETS = ("1/2", "1/4", "1/8")
FIGURE_9 = ((10, 170), (5, 170))  # r = d/12 of heads of 128, or of this model's; k = S/12
POINTS = [  # (policy, KV type)
    *(("dense", kv) for kv in ("f16", "q8_0", "q8_0/q4_0", "q4_0")),
    *((f"sparq:r={r}:k={k}", "f16") for r in (8, 16, 32) for k in (64, 128, 256)),
    *((f"sparq:r={r}:k={k}", "f16") for r, k in (*FIGURE_9, (16, 32), (16, 512))),
    *((f"sparq:r={r}:k={k}:k_index=q4", "f16") for r, k in ((16, 64), (16, 128), (32, 128), (32, 256))),
    *(("sparq:r=32:k=128", kv) for kv in ("q8_0", "q4_0")),
    *((f"sparq:r={r}:k={k}:k_index=q4", "q8_0") for r, k in ((16, 64), (16, 128), (32, 256))),
    *((f"sparq:r={r}:k=auto", "f16") for r in (8, 12, 16, 32)),
    *((f"sparq:r=12:k={k}", "f16") for k in (64, 128, 256)),
    *((f"sparq:r={r}:k=auto:k_index=q4", "q8_0") for r in (16, 32)),
    *((f"topk:k={k}", "f16") for k in (32, 128)),
    *((f"{name}:budget={budget}", "f16") for name in BOUNDED for budget in BUDGETS),
    *((f"{name}:budget={budget}", "f16") for name, budget in (("tova", "1/16"), ("h2o", "1/5"), ("d2o", "1/5"))),
    ("d2o-code:budget=1/4", "f16"),
    *((f"{name}:budget={budget}", "q8_0") for name in ("h2o", "tova") for budget in BUDGETS),
    *((f"{name}:budget=1/4", "q8_0") for name in ("streaming", "lm-infinite", "d2o")),
    *((f"{name}:budget=1/4", "q4_0") for name in ("h2o", "tova")),
]
LOW_RANK = [  # (policy, KV type, share of the rank that is kept)
    *(("dense", latent, keep) for keep in (0.7, 0.5) for latent in ("latent-f16", "latent-q4")),
    ("h2o:budget=1/4", "latent-q4", 0.7),
]
N_CTX, WINDOWS = 2048, 4
EXAMPLES, LENGTH = 16, 1024  # of repetition
SEEN = range(first_scored(N_CTX) + 1, N_CTX)  # tokens in the cache when the scored ones are predicted


def measured(llama: Llama, windows: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    """Divergence under the model's policy from base [steps, windows, n_vocab]; bytes of cache that a step read, on
    average, and that are held, as shares of dense attention's to float16."""
    found, read = Divergence(), []
    for (logits, tokens), log_base in zip(decoded_logits(llama, windows, read), base, strict=True):
        found.add(logits, tokens, log_base)
    numbers = found.statistics()
    names = ("ppl", "ppl_base", "ppl_ratio", "ppl_ratio_error", "kld", "kld_error", "same_top", "same_top_error")
    config, dense = llama.config, parse_policy("dense")
    plan = dense.plan(config, N_CTX, *get_stores("f16"))
    whole = statistics.fmean(dense.bytes_read(config, plan, n) for n in SEEN)
    held = llama.session.cache.plan.nbytes(config) / plan.nbytes(config)
    return {"read": statistics.fmean(read) / whole, "held": held} | {name: numbers[name] for name in names}


def repetition(model: str, policy: str, kv: str, threads: int) -> dict[str, float]:
    """Characters of a passage that are repeated, on average, and the standard error."""
    policy = str(in_proportion(parse_policy(policy), LENGTH, N_CTX))
    flags = ["--task", "repetition", "-n", EXAMPLES, "--length", LENGTH, "-t", threads, "-o", "json"]
    command = [sys.executable, "-m", "minirt", "eval", model, "--policy", policy, "--kv", kv, *map(str, flags)]
    (found,) = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {"repetition": found["score"], "repetition_error": found["score_error"]}


@click.command()
@click.option("--model", required=True, help="A GGUF file.")
@click.option("--text", required=True, help="... measured on it.")
@click.option("--threads", default=2, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(model: str, text: str, threads: int, output: Path) -> None:
    """Measures all points, and writes OUTPUT."""
    known = json.loads(output.read_text()) if output.exists() else {"points": []}
    points = {(point["policy"], point["kv"], point.get("keep")): point for point in known["points"]}
    settings = {"model": Path(model).name, "text": Path(text).name, "n_ctx": N_CTX, "windows": WINDOWS}
    settings |= {"examples": EXAMPLES, "length": LENGTH}
    if any(known.get(name, value) != value for name, value in settings.items()):
        raise click.ClickException(f"{output} holds points of other settings than {settings}")
    every = [*((*pair, None) for pair in POINTS), *LOW_RANK]
    wanted = [point for point in every if not {"kld", "repetition"} <= points.get(point, {}).keys()]
    if not wanted:
        return
    with Progress("dense attention"), Llama.load(model, n_ctx=N_CTX, threads=threads) as llama:
        windows = cut_windows(llama.tokenize(Path(text).read_text()), N_CTX, WINDOWS)
        base = np.stack([rows.copy() for rows in dense_log_probs(llama, windows)])
        machine = Machine(llama.decoder.ops, threads)
    for i, (policy, kv, keep) in enumerate(wanted):
        with Progress(f"{policy}, {kv}: point {i + 1} of {len(wanted)}"), tempfile.TemporaryDirectory() as folder:
            file = model
            if keep is not None:
                file = str(Path(folder) / "low_rank.gguf")
                convert(model, file, keep=keep, threads=threads)
            point = points.get((policy, kv, keep), {"policy": policy, "kv": kv})
            commits = dict.fromkeys([point["commit"], commit()] if "commit" in point else [commit()])
            if "kld" not in point:
                with Llama.load(file, n_ctx=N_CTX, policy=policy, kv=kv, threads=threads) as llama:
                    point |= measured(llama, windows, base)
            if "repetition" not in point:
                point |= repetition(file, policy, kv, threads)
        point |= {} if keep is None else {"keep": keep}
        points[policy, kv, keep] = point | {"cpu": machine.name, "commit": ", ".join(commits)}
        facts = settings | machine.facts()
        output.write_text(json.dumps(facts | {"points": list(points.values())}, indent=1) + "\n")
        click.echo(
            f"{policy:28} {kv:10} read {100 * point['read']:5.1f} %  held {100 * point['held']:5.1f} %  "
            f"KLD {point['kld']:.4f}  same {100 * point['same_top']:.1f} %  repeated {point['repetition']:.1f}"
        )


if __name__ == "__main__":
    main()
