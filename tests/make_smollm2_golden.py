"""Produce data/smollm2_golden.npz and ../tools/results/smollm2_llamacpp_truth.json: what llama.cpp makes of SmolLM2.

Run by hand, in the environment of make_golden.py (llama-cpp-python, gguf, numpy, click):

    python tests/make_smollm2_golden.py SmolLM2-135M-Instruct.Q4_1.gguf tinyshakespeare.txt

llama.cpp rounds activations to 8 bits on quantised weights, so the truth is its answer on an F16 copy of the same
weights, made by its own quantiser, with float32 KV cache and without flash attention. Runs on other copies and caches
are compared with that one over the whole vocabulary. Texts are tokenised without BOS, as the file demands.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import gguf
import golden
import jinja2
import llama_cpp as lc
import numpy as np
from make_golden import LlamaCpp

N_WINDOWS, N_CTX = 20, 512
SCORED = slice(N_CTX // 2, N_CTX - 1)  # positions whose logits are scored, as llama-perplexity does
N_KEPT, TOP = 2, 64  # windows and tokens per position that go into the npz
N_GREEDY = 96
CHAT = "What is gravity?"
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "Ingredients for pancakes:\n- 2 cups of flour\n- ",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    CHAT,
    "La tour Eiffel est un monument situé à",
    "今天天气很好，我们",
)


def quantize(source: Path, target: Path, ftype: int) -> Path:
    """A copy of `source` in another llama_ftype by llama.cpp's quantiser."""
    params = lc.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = ftype, True, 2
    if lc.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise click.ClickException(f"llama.cpp cannot convert {source}")
    return target


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities float32 of float32 logits [..., n_vocab]."""
    x = logits - logits.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def score(path: Path, windows: np.ndarray, kv: str) -> np.ndarray:
    """Log-probabilities float32 [W, 255, n_vocab] at the scored positions of windows int32 [W, 512]."""
    peer = LlamaCpp(path, N_CTX, kv)
    out = np.empty((len(windows), SCORED.stop - SCORED.start, peer.n_vocab), np.float32)
    for i, tokens in enumerate(windows):
        peer.clear()
        out[i] = log_softmax(peer.decode(tokens, SCORED.start)[:-1])
    peer.close()
    return out


def of_next(logprobs: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Log-probabilities float32 [W, 255] of the true next tokens."""
    ids = windows[:, SCORED.start + 1 : SCORED.stop + 1]
    return np.take_along_axis(logprobs, ids[..., None], -1)[..., 0]


def summary(logprobs: np.ndarray, truth: np.ndarray, windows: np.ndarray) -> dict[str, float]:
    """Perplexity, mean KL divergence from `truth` in nats, their standard errors, and agreement of the top token."""
    nll = -of_next(logprobs, windows).astype(np.float64).ravel()
    ppl = np.exp(nll.mean())
    result = {"ppl": ppl, "ppl_error": ppl * nll.std(ddof=1) / np.sqrt(nll.size)}
    if logprobs is not truth:
        kld = np.concatenate(
            [
                np.einsum("tv,tv->t", np.exp(t, dtype=np.float64), t.astype(np.float64) - ours)
                for t, ours in zip(truth, logprobs, strict=True)
            ]
        )
        result |= {
            "mean_kld": kld.mean(),
            "mean_kld_error": kld.std(ddof=1) / np.sqrt(kld.size),
            "max_kld": kld.max(),
            "same_top1": (logprobs.argmax(-1) == truth.argmax(-1)).mean(),
        }
    return {k: float(f"{v:.6g}") for k, v in result.items()}


def greedy(path: Path, kv: str, prompts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Greedy tokens int32 [P, 96], the second best tokens int32 [P, 96], and the logit margins float32 [P, 96]."""
    peer = LlamaCpp(path, N_CTX, kv)
    best, second = np.empty((2, len(prompts), N_GREEDY), np.int32)
    margins = np.empty((len(prompts), N_GREEDY), np.float32)
    for i, prompt in enumerate(prompts):
        peer.clear()
        logits = peer.decode(prompt, len(prompt) - 1)[0]
        for j in range(N_GREEDY):
            second[i, j], best[i, j] = np.argsort(logits, kind="stable")[-2:]
            margins[i, j] = logits[best[i, j]] - logits[second[i, j]]
            logits = peer.decode(best[i, j : j + 1])[0]
    peer.close()
    return best, second, margins


def timings(path: Path, tokens: np.ndarray) -> dict[str, Any]:
    """Tokens per second of 5 runs after one warm-up, 2 threads, F16 KV cache; on a busy machine take `best`."""
    peer = LlamaCpp(path, N_CTX, "F16")
    speeds: dict[str, list[float]] = {"prefill_pp512": [], "decode_tg128": []}
    for _ in range(6):
        peer.clear()
        start = time.perf_counter()
        peer.decode(tokens[:N_CTX], N_CTX - 1)
        speeds["prefill_pp512"].append(N_CTX / (time.perf_counter() - start))
        peer.clear()
        start = time.perf_counter()
        for i in range(128):
            peer.decode(tokens[i : i + 1])
        speeds["decode_tg128"].append(128 / (time.perf_counter() - start))
    peer.close()
    return {
        k: {"best": round(max(v[1:]), 1), "mean": round(float(np.mean(v[1:])), 1), "all": [round(x, 1) for x in v[1:]]}
        for k, v in speeds.items()
    }


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--logprobs", type=click.Path(path_type=Path), help="Also save the truth's log-probabilities here (1 GB)."
)
def main(model: Path, text: Path, logprobs: Path | None) -> None:
    reader = gguf.GGUFReader(model)
    template = reader.fields["tokenizer.chat_template"].contents()
    chat = jinja2.Environment().from_string(template).render(
        messages=[{"role": "user", "content": CHAT}], add_generation_prompt=True
    )  # fmt: skip
    texts = [chat if p is CHAT else p for p in PROMPTS]
    special = [p is CHAT for p in PROMPTS]

    with tempfile.TemporaryDirectory() as folder:
        f16 = quantize(model, Path(folder) / "f16.gguf", lc.LLAMA_FTYPE_MOSTLY_F16)
        f32 = quantize(model, Path(folder) / "f32.gguf", lc.LLAMA_FTYPE_ALL_F32)
        peer = LlamaCpp(model, N_CTX)
        prompts = [peer.tokenize(t.encode(), s) for t, s in zip(texts, special, strict=True)]
        tokens = peer.tokenize(text.read_bytes())
        peer.close()
        windows = tokens[: N_WINDOWS * N_CTX].reshape(N_WINDOWS, N_CTX)

        truth = score(f16, windows, "F32")
        results = {"F16 weights, F32 KV": summary(truth, truth, windows)}
        print(results, flush=True)
        if logprobs:
            np.save(logprobs, truth)
            np.save(logprobs.with_name(logprobs.stem + "_tokens.npy"), windows)
        for weights, path, kv in (
            ("F16", f16, "F16"),
            ("F32", f32, "F32"),
            ("Q4_1", model, "F32"),
            ("Q4_1", model, "F16"),
        ):
            name = f"{weights} weights, {kv} KV"
            results[name] = summary(score(path, windows, kv), truth, windows)
            print(name, results[name], flush=True)
        best, second, margins = greedy(f16, "F32", prompts)
        splits = {}
        for name, path, kv in (("F16 weights, F16 KV", f16, "F16"), ("F32 weights, F32 KV", f32, "F32")):
            differs = greedy(path, kv, prompts)[0] != best
            first = [int(d.argmax()) if d.any() else None for d in differs]
            splits[name] = [
                f if f is None else {"step": f, "margin": float(m[f])} for f, m in zip(first, margins, strict=True)
            ]
        print(splits, flush=True)
        speed = timings(model, tokens)
        print(speed, flush=True)

    kept = truth[:N_KEPT]
    top_ids = np.argsort(-kept, axis=-1, kind="stable")[..., :TOP]
    np.savez_compressed(
        golden.SMOLLM2_DATA,
        **{f"greedy/prompt{i}": p for i, p in enumerate(prompts)},
        **{
            "greedy/texts": np.array(texts), "greedy/parse_special": np.array(special), "greedy/tokens": best,
            "greedy/runners_up": second, "greedy/margins": margins, "windows/tokens": windows[:N_KEPT],
            "windows/top_ids": top_ids.astype(np.int32), "windows/top_logprobs": np.take_along_axis(kept, top_ids, -1),
            "windows/next_logprobs": of_next(kept, windows[:N_KEPT]),
        },
    )  # fmt: skip
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    report = {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{cpu[1] if cpu else 'unknown'}; {lc.llama_print_system_info().decode().strip(' |')}",
        "versions": {p: importlib.metadata.version(p) for p in ("llama-cpp-python", "gguf", "numpy")},
        "settings": f"{model.name}; {text.name}, first {N_WINDOWS} windows of {N_CTX} tokens, no BOS, logits at "
        f"{SCORED.start}..{SCORED.stop - 1} scored; 2 threads, flash attention off, n_batch = n_ubatch = 512, "
        "use_extra_bufts = false; divergences in nats, over the whole vocabulary, from 'F16 weights, F32 KV'",
        "runs": results,
        "greedy_first_difference_from_truth": splits,
        "tokens_per_second_q4_1_2_threads_f16_kv": speed,
    }
    target = Path(__file__).parents[1] / "tools" / "results" / "smollm2_llamacpp_truth.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
