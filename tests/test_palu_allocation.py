"""What ranks are shared by: exact gradients against finite differences, Fisher scores and KL probes by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import golden  # puts tools on the path
import numpy as np
import pytest
from make_model import make_model

from minirt import Llama
from minirt.config import ModelConfig
from minirt.gguf_file import GGUFFile
from minirt.palu import conversion
from minirt.palu.backward import Network
from minirt.palu.calibration import Windows, cut, input_moments
from minirt.palu.factors import Spectrum
from minirt.palu.fisher import fisher_scores
from minirt.palu.probes import gains, mean_divergence, probe_rank, project
from minirt.palu.side_file import SideFile
from minirt.weights import LayerWeights

assert golden
MODELS = {
    "llama": {"rope_freqs": 64, "tied": True},
    "llama-window": {"sliding_window": 6, "scaling": {"kind": "yarn", "factor": 4.0, "original_context": 32}},
    "qwen2": {"architecture": "qwen2", "tied": True},
    "qwen3": {"architecture": "qwen3"},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, 3 query heads for each of 2 KV heads, groups 64 wide."""
    path = tmp_path_factory.mktemp("palu") / f"{request.param}.gguf"
    shape = {"n_layer": 2, "n_embd": 48, "n_head": 6, "n_head_kv": 2, "head_dim": 32, "n_ff": 80, "n_vocab": 300}
    make_model(str(path), **shape, n_ctx=64, seed=7, **MODELS[request.param])
    return path


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 300, n).astype(np.int32)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    logits = logits.astype(np.float64)
    return float(np.mean(np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(labels)), labels]))


def test_the_loss_is_that_of_the_next_token(model: Path) -> None:
    """... as the runtime's own decoder predicts it: the network is the same, and no label is shifted twice."""
    text = tokens(150)[:40]
    with GGUFFile.open(model) as file, Llama.load(model, device="reference", kv="f32") as llama:
        network = Network(file, ModelConfig.from_gguf(file))
        logits = llama.logits(text.tolist())
        assert network.loss(text) == pytest.approx(cross_entropy(logits[:-1], text[1:]), abs=2e-5)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("field", "gradient"), [("wk", "d_k"), ("wv", "d_v")])
def test_gradients_equal_finite_differences(model: Path, layer: int, field: str, gradient: str) -> None:
    text, step = tokens(19, seed=1), 1e-5
    with GGUFFile.open(model) as file:
        network = Network(file, ModelConfig.from_gguf(file), np.float64)
        found = {g.layer: g for g in network.gradients(text)}[layer]
        exact = getattr(found, gradient).T @ found.x
        for seed in range(3):
            direction = np.random.default_rng(seed).standard_normal(exact.shape)

            def loss(sign: int, direction: np.ndarray = direction) -> float:
                weights = network.layer

                def moved(i: int) -> LayerWeights:
                    w = weights(i)
                    return replace(w, **{field: getattr(w, field) + sign * step * direction}) if i == layer else w

                network.layer = moved  # type: ignore[method-assign]
                try:
                    return network.loss(text)
                finally:
                    network.layer = weights  # type: ignore[method-assign]

            assert (loss(1) - loss(-1)) / (2 * step) == pytest.approx((exact * direction).sum(), rel=1e-5, abs=1e-8)


def test_fisher_scores_are_squared_window_by_window(model: Path, tmp_path: Path) -> None:
    windows = Windows(np.stack([tokens(24, seed) for seed in range(3)]), "")
    with GGUFFile.open(model) as file:
        config = ModelConfig.from_gguf(file)
        scores = fisher_scores(file, config, windows, SideFile(tmp_path / "part", lambda *_: None), "key")
        network, sums = Network(file, config), np.zeros((2, 64, 48))
        for window in windows.tokens:
            for g in network.gradients(window):
                if g.layer == 1:
                    sums += np.stack([g.d_k.T @ g.x, g.d_v.T @ g.x]) ** 2
    assert scores[1] == pytest.approx(np.sqrt(sums / 3).mean(axis=(1, 2)), rel=1e-4)


def test_mean_divergence() -> None:
    rng = np.random.default_rng(0)
    exact, other = rng.standard_normal((2, 100, 50)).astype(np.float32)
    p, q = (np.exp(a.astype(np.float64)) / np.exp(a.astype(np.float64)).sum(1, keepdims=True) for a in (exact, other))
    assert mean_divergence(exact, other) == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    close = exact + np.float32(1e-3) * other
    q = np.exp(close.astype(np.float64)) / np.exp(close.astype(np.float64)).sum(1, keepdims=True)
    assert mean_divergence(exact, close) == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-2)
    assert mean_divergence(exact, exact) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("keep", "width", "rank"), [(0.5, 192, 96), (0.7, 192, 128), (0.9, 64, 32), (0.1, 128, 32)])
def test_what_a_probe_cuts(keep: float, width: int, rank: int) -> None:
    assert probe_rank(keep, width) == rank


def test_a_probe_is_the_whole_model_with_one_projection_cut(model: Path, tmp_path: Path) -> None:
    """Energy times divergence per dropped energy, for the keys of the last layer and the values of the first."""
    side = SideFile(tmp_path / "part", lambda *_: None)
    with Llama.load(model, device="reference", kv="f32", n_ctx=64) as llama:
        windows = cut(llama, b"A text of no great length. " * 30, 2)
        moments = input_moments(llama, windows, side, "moments")
        grouping = conversion.group_heads(llama.config, "all")

        def projections(layer: int) -> list[tuple[np.ndarray, Spectrum]]:
            return conversion.projections(llama.file, layer, moments[layer], grouping)

        gain = gains(llama, windows, projections, grouping.width, 32, side, "kl")
        exact = [llama.logits(w.tolist())[::2] for w in windows.tokens]
        decoder = llama.decoder
        for layer, i, field in ((1, 0, "wk"), (0, 1, "wv")):
            (weight, found), layers = projections(layer)[i], list(decoder.weights.layers)
            values = project(weight, found, 32)
            layers[layer] = replace(layers[layer], **{field: replace(getattr(layers[layer], field), values=values)})
            whole, decoder.weights = decoder.weights, replace(decoder.weights, layers=layers)
            other = [llama.logits(w.tolist())[::2] for w in windows.tokens]
            decoder.weights = whole
            divergence = np.mean([mean_divergence(a, b) for a, b in zip(exact, other, strict=True)])
            energy = found.energies.sum(axis=0)
            assert divergence > 0
            assert gain[layer, i] == pytest.approx(divergence * energy / energy[32:].sum(), rel=1e-3)


def test_moments_are_those_of_the_normed_inputs(model: Path, tmp_path: Path) -> None:
    """Fast and reference decoders agree; of one layer they are worked out from the embeddings."""
    found = []
    for device in ("cpu", "reference"):
        with Llama.load(model, device=device, kv="f32", n_ctx=64) as llama:
            windows = cut(llama, b"Some words, and some more of them. " * 30, 3)
            side = SideFile(tmp_path / device, lambda *_: None)
            found.append(input_moments(llama, windows, side, "moments"))
            weights = llama.decoder.weights
            norm = weights.layers[0].attn_norm
            x = llama.decoder.ops.embed(weights.token_embd, windows.tokens.ravel()).astype(np.float64)
            x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + llama.config.rms_eps) * norm
            assert np.abs(found[-1][0] - x.T @ x / len(x)).max() < 1e-5
    assert np.abs(found[0] - found[1]).max() < 1e-4 * np.abs(found[1]).max()
