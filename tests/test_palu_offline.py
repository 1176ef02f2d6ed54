"""Palu, offline: factors and their optimum, ranks and what they promise, Hadamard matrices, the file, the command."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import gguf
import golden  # puts tools on the path
import numpy as np
import pytest
from conftest import Cli, only_line
from hypothesis import given, settings
from hypothesis import strategies as st
from make_gguf import tiny
from make_model import make_model

from minirt import Llama, ModelError, UsageError
from minirt.palu import convert, ranks
from minirt.palu import side_file as side_file_module
from minirt.palu.calibration import cut, input_moments, own_text, reader
from minirt.palu.conversion import group_heads, share_ranks
from minirt.palu.factors import LEAST, compose, factorise, spectrum
from minirt.palu.hadamard import rotation
from minirt.reference import rms_norm

assert golden
RNG = np.random.default_rng
ARCHITECTURES = ("llama", "qwen2", "qwen3")


def small(path: Path, architecture: str = "llama", **options: Any) -> Path:
    """A random model whose groups of 2 KV heads are 64 wide."""
    shape = {"n_layer": 2, "n_embd": 96, "n_head": 4, "n_head_kv": 2, "head_dim": 32, "n_ff": 64, "n_vocab": 300}
    make_model(str(path), architecture=architecture, **{**shape, "n_ctx": 64, "seed": 5, **options})
    return path


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no reason to say more."""
    monkeypatch.setattr("minirt.progress.PATIENCE", 1e6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("palu")
    return {name: small(folder / f"{name}.gguf", name) for name in ARCHITECTURES}


def composed(file: Path, original: Path, target: Path) -> Path:
    """The Palu file as an ordinary model: its factors multiplied, in float32. Read and written by the gguf package."""
    palu, source = gguf.GGUFReader(file), gguf.GGUFReader(original)
    tensors = {t.name: t for t in palu.tensors}
    groups = int(source.fields[f"{architecture(source)}.attention.head_count_kv"].contents()) // int(
        palu.fields["palu.group_size"].contents()
    )
    writer = gguf.GGUFWriter(target, architecture(source))
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        writer.add_key_value(
            field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
        )
    for t in source.tensors:
        stem = t.name.removesuffix(".weight")
        if f"{stem}_a.weight" in tensors:
            a, b = (np.asarray(tensors[f"{stem}_{x}.weight"].data, np.float32) for x in "ab")
            writer.add_tensor(t.name, compose(a, b, groups).astype(np.float32))
        else:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def architecture(reader: gguf.GGUFReader) -> str:
    return str(reader.fields["general.architecture"].contents())


# -- factors -----------------------------------------------------------------------------------------------------------


def inputs(n: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Activations [tokens, n] as uneven as real ones: few directions hold most of the energy."""
    rng = RNG(seed)
    return rng.standard_normal((tokens, n)) * np.logspace(1, -2, n) @ rng.standard_normal((n, n)) + rng.random(n)


def lost(weight: np.ndarray, a: np.ndarray, b: np.ndarray, n_groups: int, x: np.ndarray) -> float:
    """The mean squared error of the outputs."""
    return float((((weight - compose(a, b, n_groups)) @ x.T) ** 2).sum() / len(x))


@pytest.mark.parametrize(("n_groups", "width", "n", "tokens", "rank"), [(1, 64, 96, 500, 32), (3, 32, 80, 300, 16)])
def test_whitening_loses_the_least_and_as_much_as_it_says(
    n_groups: int, width: int, n: int, tokens: int, rank: int
) -> None:
    weight, x = RNG(1).standard_normal((n_groups * width, n)).astype(np.float32), inputs(n, tokens)
    found = spectrum(weight, x.T @ x / tokens, width)
    error = lost(weight, *factorise(weight, found, rank, False), n_groups, x)
    plain = lost(weight, *factorise(weight, spectrum(weight, None, width), rank, False), n_groups, x)
    assert error == pytest.approx(found.energies[:, rank:].sum(), rel=1e-3)
    assert error < 0.7 * plain


def test_whitening_equals_the_svd_of_the_whitened_weight() -> None:
    """Palu's own way: C = L L^T, SVD of W L, B = U S^1/2, A = S^1/2 V^T L^-1."""
    weight, x = RNG(2).standard_normal((48, 64)), inputs(64, 400)
    moment = x.T @ x / len(x)
    root = np.linalg.cholesky(moment)
    u, s, vt = np.linalg.svd(weight @ root, full_matrices=False)
    theirs = (u[:, :32] * s[:32]) @ vt[:32] @ np.linalg.inv(root)
    a, b = factorise(weight.astype(np.float32), spectrum(weight.astype(np.float32), moment, 48), 32, False)
    assert np.abs(b @ a - theirs).max() < 1e-4 * np.abs(theirs).max()
    scale = np.maximum(s[:32], LEAST * s[:32].mean())
    assert (scale == s[:32])[:8].all()
    assert np.linalg.norm(a @ root, axis=1) == pytest.approx(s[:32] / np.sqrt(scale), rel=1e-3)
    assert np.linalg.norm(b, axis=0) == pytest.approx(np.sqrt(scale), rel=1e-3)


@pytest.mark.parametrize("moment", [None, "few tokens", "nothing"])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_all_ranks_give_the_weight_back(moment: str | None, scale: float) -> None:
    """Also if the inputs, or the weight, span less."""
    weight = (scale * RNG(3).standard_normal((64, 40))).astype(np.float32)
    x = inputs(40, 5) * (moment != "nothing")
    found = spectrum(weight, None if moment is None else x.T @ x, 32)
    for rotated in (False, True):
        a, b = factorise(weight, found, 32, rotated)
        assert np.isfinite(a).all()
        assert np.isfinite(b).all()
        assert np.abs(compose(a, b, 2) - weight).max() < 1e-5 / LEAST**0.5 * scale + 1e-30


def test_inputs_that_the_text_had_not_fit_into_four_bits(models: dict[str, Path], tmp_path: Path) -> None:
    """The text spans a few of 96 directions, and all is kept: what is lost is what four bits lose."""
    convert(models["llama"], tmp_path / "q4.gguf", keep=1.0, calibration="to be or not to be, " * 40, latent="q4")
    tokens = RNG(0).integers(0, 300, 40).tolist()
    with Llama.load(models["llama"], kv="f32") as exact, Llama.load(tmp_path / "q4.gguf") as other:
        assert other.session.cache.plan.k_store.name == "latent-q4"
        truth = exact.logits(tokens)
        assert np.linalg.norm(other.logits(tokens) - truth) < 0.3 * np.linalg.norm(truth)


# -- Hadamard ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 12, 20, 28, 32, 36, 64, 80, 96, 160, 192, 224, 288, 416, 480, 512])
def test_hadamard_matrices(n: int) -> None:
    h = rotation(n)
    assert np.abs(h @ h.T - np.eye(n)).max() < 1e-12
    assert np.abs(h).max() - np.abs(h).min() < 1e-12, "all components weigh the same"


@pytest.mark.parametrize(("n", "block"), [(23, 1), (46, 2), (92, 4), (184, 8)])
def test_sizes_without_a_construction_are_rotated_in_blocks(n: int, block: int) -> None:
    h = rotation(n)
    assert np.abs(h @ h.T - np.eye(n)).max() < 1e-12
    assert (h != 0).sum() == n * block


@pytest.mark.parametrize("rank", [32, 64, 96, 80])
def test_rotation_changes_no_product(rank: int) -> None:
    weight, x = RNG(4).standard_normal((192, 128)).astype(np.float32), inputs(128, 600)
    found = spectrum(weight, x.T @ x, 96)
    plain, rotated = (factorise(weight, found, rank, on) for on in (False, True))
    products = [compose(*factors, 2) for factors in (plain, rotated)]
    assert np.abs(products[0] - products[1]).max() < 1e-4 * np.abs(products[0]).max()
    spread = [np.ptp((a @ x.T).reshape(2, rank, -1), axis=1).mean() for a, _ in (plain, rotated)]
    assert spread[1] < 0.95 * spread[0], "latents are easier to quantise"


# -- ranks -------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    n_layer=st.integers(1, 12), width=st.sampled_from([8, 32, 48, 64, 80, 128, 192, 240, 512]),
    keep=st.floats(0.01, 1.0), seed=st.integers(0, 99),
)  # fmt: skip
def test_ranks_keep_the_promise(n_layer: int, width: int, keep: float, seed: int) -> None:
    rng = RNG(seed)
    try:
        total = ranks.total_rank(keep, n_layer, width)
    except UsageError:
        assert keep * width < min(32, width)
        return
    scores = rng.random((n_layer, 2)) ** 3
    gain = -np.sort(-(rng.random((n_layer, 2, width)) ** 4))
    for found in (
        ranks.uniform(total, n_layer, width), ranks.prior(total, n_layer, width),
        ranks.by_scores(scores, total, width), ranks.by_gain(gain, total, width),
    ):  # fmt: skip
        assert found.shape == (n_layer, 2)
        assert ((found % 32 == 0) | (found == width)).all()
        assert found.min() >= min(32, width)
        assert found.max() <= width
        assert found.sum() <= keep * 2 * n_layer * width + 1e-6
        assert found.sum() > total - 32 or (found == width).all()


def test_ranks_by_rule() -> None:
    """Worked out by hand, for 4 layers of width 128."""
    half = ranks.total_rank(0.5, 4, 128)
    assert (ranks.uniform(half, 4, 128) == 64).all()
    assert (ranks.prior(half, 4, 128) == [32, 96]).all()
    assert (ranks.prior(ranks.total_rank(0.75, 4, 128), 4, 128) == [64, 128]).all()
    assert (ranks.prior(ranks.total_rank(0.375, 4, 512), 4, 512) == [128, 256]).all()  # a quarter would be 96 for keys
    scores = np.array([[1, 3], [1, 3], [1, 7], [1, 7]])  # the last two want 149 of 128: shared by the others, 25.6 a 1
    assert ranks.by_scores(scores, half, 128).tolist() == [[32, 64], [32, 64], [32, 128], [32, 128]]
    gain = np.zeros((4, 2, 128))
    gain[2, 1] = 1
    gain[0, 0, :64] = 0.5
    assert ranks.by_gain(gain, 8 * 32 + 4 * 32, 128)[[2, 0], [1, 0]].tolist() == [128, 64]


def test_all_is_kept_by_every_rule() -> None:
    for found in (ranks.uniform(384, 2, 96), ranks.prior(384, 2, 96), ranks.by_scores(np.ones((2, 2)), 384, 96)):
        assert (found == 96).all()


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("group", ["all", 1])
def test_keeping_all_equals_the_model(models: dict[str, Path], tmp_path: Path, name: str, group: int | str) -> None:
    convert(models[name], tmp_path / "palu.gguf", keep=1.0, group=group, n_windows=4)
    same = composed(tmp_path / "palu.gguf", models[name], tmp_path / "same.gguf")
    tokens = RNG(0).integers(0, 300, 40).tolist()
    with Llama.load(models[name], kv="f32") as exact, Llama.load(same, kv="f32") as other:
        assert np.abs(exact.logits(tokens) - other.logits(tokens)).max() < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_palu_file_is_a_gguf_file(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Keys, shapes and types as documented; all else byte for byte as it was."""
    out = tmp_path / "palu.gguf"
    result = convert(models[name], out, keep=0.75, latent="q3", hadamard=False, n_windows=4)
    palu, source = gguf.GGUFReader(out), gguf.GGUFReader(models[name])
    keys = {key: field.contents() for key, field in palu.fields.items() if not key.startswith("GGUF.")}
    assert {key: keys[key] for key in keys if key.startswith("palu.")} == {
        "palu.version": 1, "palu.group_size": 2, "palu.k_rank": [32, 32], "palu.v_rank": [64, 64],
        "palu.latent": "q3", "palu.hadamard": False, "palu.keep": 0.75, "palu.allocate": "prior",
        "palu.calibration": keys["palu.calibration"],
    }  # fmt: skip
    assert keys["palu.calibration"] == "minirt's own text, 4 windows of 64 tokens"
    assert result.ranks.tolist() == [[32, 64], [32, 64]]
    rows = 2 * (12 + 4 + 4), 2 * (24 + 4)  # codes and scales, and positions of keys
    assert (result.dense_bytes, result.latent_bytes) == (512, sum(rows))
    with Llama.load(out) as llama:
        assert llama.session.cache.plan.rows_bytes(llama.config, [1, 1]) == sum(rows)
    for key, field in source.fields.items():
        if not key.startswith("GGUF."):
            assert keys[key] == field.contents()
            assert palu.fields[key].types == field.types
    found, expected = ({t.name: t for t in r.tensors} for r in (palu, source))
    replaced = {f"blk.{i}.attn_{x}.weight" for i in (0, 1) for x in "kv"}
    added = {n.replace(".weight", f"_{side}.weight") for n in replaced for side in "ab"}
    assert found.keys() == expected.keys() - replaced | added
    for tensor in expected.keys() - replaced:
        assert bytes(found[tensor].data) == bytes(expected[tensor].data)
        assert found[tensor].tensor_type == expected[tensor].tensor_type
    for x, rank in (("k", 32), ("v", 64)):
        shapes = [found[f"blk.1.attn_{x}_{side}.weight"].data.shape for side in "ab"]
        assert shapes == [(rank, 96), (64, rank)]


def test_the_factors_type_follows_the_matrix(tmp_path: Path) -> None:
    """F32 stays F32; everything else becomes F16. The rest of a quantised model stays quantised."""
    model = tiny()  # keys F32, values Q8_0
    path = model.write(tmp_path / "tiny.gguf")
    convert(path, tmp_path / "palu.gguf", keep=1.0, n_windows=2)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "palu.gguf").tensors}
    assert {types["blk.0.attn_k_a.weight"], types["blk.0.attn_k_b.weight"]} == {"F32"}
    assert {types["blk.0.attn_v_a.weight"], types["blk.0.attn_v_b.weight"]} == {"F16"}
    assert types["blk.0.ffn_up.weight"] == "Q4_0"


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    path = small(tmp_path / "big.gguf", type="BF16")
    data = bytearray(path.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_v.weight")
    weights = np.full(tensor.n_elements, 1e30, np.float32).view(np.uint32) >> 16
    data[tensor.data_offset : tensor.data_offset + 2 * len(weights)] = weights.astype("<u2").tobytes()
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"finite|'blk.1.attn_v_.\.weight' would hold .* beyond F16"):
        convert(path, tmp_path / "palu.gguf", n_windows=2)
    assert not (tmp_path / "palu.gguf").exists()


def test_keys_are_rebuilt_before_bias_norm_and_rotation(tmp_path: Path) -> None:
    """k = RoPE(norm(B A x + bias)) with the factors of the file is what the composed model computes (qwen2, qwen3)."""
    for name in ("qwen2", "qwen3"):
        model, out = small(tmp_path / "model.gguf", name, head_dim=64), tmp_path / f"{name}.gguf"
        convert(model, out, keep=0.5, group=1, n_windows=4)
        tensors = {t.name: np.asarray(t.data, np.float32) for t in gguf.GGUFReader(out).tensors}
        a, b = (tensors[f"blk.0.attn_k_{side}.weight"] for side in "ab")
        same = composed(out, model, tmp_path / "same.gguf")
        with Llama.load(same, device="reference", kv="f32") as llama:
            layer, ops, config = llama.decoder.weights.layers[0], llama.decoder.ops, llama.config
            seen: dict[int, np.ndarray] = {}
            reader(llama, 7, lambda i, x, seen=seen: seen.setdefault(i, x.copy()))(np.arange(7))
            angles = ops.angles(llama.decoder.rope, np.arange(7, dtype=np.int32))
            expected = ops.qkv(seen[0], layer, config, angles)[1]
            h = (rms_norm(seen[0], layer.attn_norm, config.rms_eps) @ a.T).reshape(7, 2, -1)
            k = np.stack([h[:, g] @ b[64 * g : 64 * g + 64].T for g in (0, 1)], axis=1)
            k = k if layer.bk is None else k + layer.bk.reshape(2, 64)
            k = k if layer.k_norm is None else rms_norm(k, layer.k_norm, config.rms_eps)
            assert np.abs(ops.rotate(k.astype(np.float32), angles) - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_split_model_becomes_one_file(models: dict[str, Path], tmp_path: Path) -> None:
    """The keys that say so go."""
    source = tiny()
    names = list(source.tensors)
    tensors = source.tensors
    paths = []
    for i, part in enumerate((names[:9], names[9:])):
        source.tensors = {name: tensors[name] for name in part}
        source.keys |= {"split.no": ("u16", i), "split.count": ("u16", 2), "split.tensors.count": ("i32", len(names))}
        paths.append(source.write(tmp_path / f"m-0000{i + 1}-of-00002.gguf"))
    convert(paths[0], tmp_path / "palu.gguf", keep=1.0, n_windows=2)
    whole = gguf.GGUFReader(tmp_path / "palu.gguf")
    assert len(whole.tensors) == len(names) + 4
    assert not [key for key in whole.fields if key.startswith("split.")]


# -- going on after an interrupt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allocate", "stage"), [("prior", ""), ("kl", "probing the layers"), ("fisher", "differentiating the loss")]
)
def test_an_interrupted_conversion_goes_on(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocate: str, stage: str
) -> None:
    """The same bytes in the end, and no step done twice."""
    monkeypatch.setattr(side_file_module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(side_file_module, "SAVE_SHARE", 0)
    options: dict[str, Any] = {"keep": 0.75, "allocate": allocate, "n_windows": 3}
    convert(models["qwen2"], tmp_path / "whole.gguf", **options)
    out, part = tmp_path / "parts.gguf", tmp_path / "parts.gguf.part"
    done: list[tuple[str, int]] = []
    for label, step in (("reading the calibration text", 2), (stage, 2), ("factorising", 1), ("", 0)):

        def report(now: str, i: int, total: int, label: str = label, step: int = step) -> None:
            done.append((now, i))
            if (now, i) == (label, step):
                raise KeyboardInterrupt

        if label or not step:
            with pytest.raises(KeyboardInterrupt) if label else contextlib.nullcontext():
                convert(models["qwen2"], out, **options, report=report)
            assert part.exists() == bool(label) == (not out.exists())
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert [step for label, step in done if label == "reading the calibration text"] == [0, 1, 2, 1, 2, 3, *[3] * 2][
        : 8 if stage else 7
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.gguf", "whole.gguf"]


@pytest.mark.parametrize("content", [b"", b"my notes", b"PK\x03\x04 and no more"])
def test_a_side_file_that_is_not_ours_is_refused(models: dict[str, Path], tmp_path: Path, content: bytes) -> None:
    part = tmp_path / "palu.gguf.part"
    part.write_bytes(content)
    with pytest.raises(ModelError, match="damaged, or not made by minirt palu"):
        convert(models["llama"], tmp_path / "palu.gguf", n_windows=1)
    assert part.read_bytes() == content


def test_a_side_file_of_something_else_is_not_used(models: dict[str, Path], tmp_path: Path) -> None:
    monkey = {"prior.txt": b"to be or not to be, " * 40, "other.txt": b"that is the question. " * 40}
    clean = [tmp_path / f"clean-{name}.gguf" for name in monkey]
    for path, text in zip(clean, monkey.values(), strict=True):
        convert(models["llama"], path, calibration=text, keep=0.75)
    assert clean[0].read_bytes() != clean[1].read_bytes()

    def stop(label: str, done: int, total: int) -> None:
        if label == "factorising":
            raise KeyboardInterrupt

    out = tmp_path / "palu.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(models["llama"], out, calibration=monkey["prior.txt"], keep=0.75, report=stop)
    with pytest.warns(UserWarning, match="of another model or text"):
        convert(models["llama"], out, calibration=monkey["other.txt"], keep=0.75)
    assert out.read_bytes() == clean[1].read_bytes()


def test_probes_of_another_rank_are_not_used(tmp_path: Path) -> None:
    """Of 128, 0.5 and 0.6 cut to 64, and 0.75 to 96."""
    steps: list[tuple[str, int]] = []
    side = side_file_module.SideFile(tmp_path / "part", lambda label, done, total: steps.append((label, done)))
    with Llama.load(small(tmp_path / "m.gguf", head_dim=64), kv="f32", n_ctx=64) as llama:
        windows = cut(llama, None, 2)
        grouping, moments = group_heads(llama.config, "all"), input_moments(llama, windows, side, "moments")
        for keep, first in ((0.5, 0), (0.6, 2), (0.75, 0)):
            steps.clear()
            share_ranks("kl", llama, windows, moments, grouping, keep, side, "key")
            assert steps[0] == ("probing the layers", first)


@pytest.mark.parametrize(("name", "bos"), [("tiny_spm", 1), ("tiny", None)])
def test_windows_begin_as_the_model_was_trained(name: str, bos: int | None, request: pytest.FixtureRequest) -> None:
    text = b"A text of no great length, and its end. " * 100
    with Llama.load(request.getfixturevalue(name), n_ctx=256) as llama:
        tokens, plain = cut(llama, text, 2).tokens, llama.tokenizer.encode_bytes(text, add_bos=False)
        assert tokens.shape[0] == 2
        assert tokens[:, 0].tolist() == ([bos] * 2 if bos is not None else [plain[0], tokens[1, 0]])
        assert tokens[0, 1:].tolist() == plain[1 : tokens.shape[1]]
        assert llama.tokenizer.add_bos == (bos is not None)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(models: dict[str, Path], tmp_path: Path, cli: Cli) -> None:
    calib = tmp_path / "text.txt"
    calib.write_bytes(own_text()[:5000])
    out = tmp_path / "palu.gguf"
    flags = ["--keep", "0.8", "--group", "all", "--allocate", "prior", "--latent", "q4", "--windows", "3"]
    result = cli("palu", models["llama"], "-o", out, *flags, "--calib", calib)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"{out}: ranks of keys 32, of values 64, of 64 (2 KV heads a group): 75.0 % kept",
        "cache: 120 bytes a token as q4, 23.4 % of the 512 of a dense f16 cache",
    ]


def test_latents_are_rotated_unless_told_otherwise(models: dict[str, Path], tmp_path: Path, cli: Cli) -> None:
    """Other factors, the same products; the file says which."""
    products, firsts = [], []
    for name, flags in (("with", []), ("without", ["--no-hadamard"])):
        out = tmp_path / f"{name}.gguf"
        assert cli("palu", models["llama"], "-o", out, "--keep", "0.75", "--windows", "3", *flags).exit_code == 0
        reader = gguf.GGUFReader(out)
        assert reader.fields["palu.hadamard"].contents() is (name == "with")
        tensors = {t.name: np.asarray(t.data, np.float32) for t in reader.tensors}
        a, b = (tensors[f"blk.1.attn_v_{x}.weight"] for x in "ab")
        firsts.append(a)
        products.append(compose(a, b, 1))
    assert np.abs(firsts[0] - firsts[1]).max() > 0.01 * np.abs(firsts[0]).max()
    assert np.abs(products[0] - products[1]).max() < 1e-5 * np.abs(products[0]).max()


def test_an_output_that_appears_meanwhile_is_left_alone(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"

    def shares(*args: Any) -> np.ndarray:
        out.write_text("somebody's")
        return share_ranks(*args)

    monkeypatch.setattr("minirt.palu.conversion.share_ranks", shares)
    with pytest.raises(ModelError, match="is there already"):
        convert(models["llama"], out, keep=0.75, n_windows=2)
    assert out.read_text() == "somebody's"


def test_what_another_model_left_is_not_taken(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The side file lies beside the output, whatever the model was."""
    truth, out = tmp_path / "truth.gguf", tmp_path / "out.gguf"
    other = small(tmp_path / "other.gguf", seed=6)
    convert(other, truth, keep=0.75, n_windows=2)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("minirt.palu.conversion.write_copy", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(models["llama"], out, keep=0.75, n_windows=2)
    with pytest.warns(UserWarning, match="of another model or text"):
        convert(other, out, keep=0.75, n_windows=2)
    assert out.read_bytes() == truth.read_bytes()


BAD = [
    (["--keep", "0"], 2, "--keep 0 is out of range (above 0, up to 1)"),
    (["--keep", "nan"], 2, "--keep nan is out of range"),
    (["--keep", "0.3"], 2, "--keep 0.3 is too little: ranks are multiples of 32"),
    (["--group", "3"], 2, "--group 3 does not divide this model's 2 KV heads (one of: 1, 2, all)"),
    (["--group", "0"], 2, "--group 0 does not divide"),
    (["--group", "x"], 2, "'x' is neither a number of KV heads nor all"),
    (["--allocate", "best"], 2, "unknown allocation 'best' (one of: uniform, prior, kl, fisher)"),
    (["--latent", "q8"], 2, "unknown latent type 'q8' (one of: f16, q4, q3)"),
    (["--windows", "0"], 2, "--windows 0 is out of range"),
    (["--threads", "0"], 2, "--threads 0 is out of range"),
    (["--calib", "no.txt"], 1, "no.txt: cannot read"),
    (["--calib", "short.txt"], 1, "the calibration text is too short: it has 4 tokens, a window of this model has 64"),
]


@pytest.mark.parametrize(("flags", "code", "line"), BAD)
def test_wrong_flags(
    models: dict[str, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch,
    flags: list[str], code: int, line: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    result = cli("palu", models["llama"], "-o", "out.gguf", *flags)
    assert line in only_line(result.stderr)
    assert result.exit_code == code
    assert not list(tmp_path.glob("out*"))


def test_wrong_files(models: dict[str, Path], tmp_path: Path, cli: Cli) -> None:
    model = small(tmp_path / "m.gguf")
    done, moe = tmp_path / "done.gguf", tiny()
    convert(model, done, keep=0.75, n_windows=1)
    moe.keys["llama.expert_count"] = ("u32", 8)
    for source, out, line in (
        (model, model, "is the model itself"),
        (model, done, "is there already"),
        (model, tmp_path / "no" / "out.gguf", "cannot write: No such file or directory"),
        (model, tmp_path / "o\0ut.gguf", "cannot write: embedded null"),
        (model, tmp_path / ("o" * 250 + ".gguf"), "File name too long"),
        (model, "", "the name of the output is empty"),
        (done, tmp_path / "out.gguf", "is a Palu file already"),
        (moe.write(tmp_path / "moe.gguf"), tmp_path / "out.gguf", "mixture of experts is not supported"),
        (tmp_path / "none.gguf", tmp_path / "out.gguf", "cannot open: No such file"),
    ):
        before = done.read_bytes()
        result = cli("palu", source, "-o", out)
        assert line in only_line(result.stderr)
        assert result.exit_code == (2 if out == "" else 1)
        assert done.read_bytes() == before
        assert not (tmp_path / "out.gguf").exists()
    assert only_line(cli("palu", model).stderr).startswith("minirt: Missing option '-o'")


def test_ctrl_c_says_what_is_kept(
    models: dict[str, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minirt.palu.conversion.write_copy", stop)
    result = cli("palu", models["llama"], "-o", tmp_path / "out.gguf", "--keep", "0.75", "--windows", "2")
    assert result.exit_code == 130
    assert result.stderr.strip() == (
        f"minirt: interrupted; {tmp_path / 'out.gguf.part'} keeps what was found, the same command goes on from there"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf.part"]
