"""Perplexity and divergence: the windows, the scoring and the base files of llama-perplexity."""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Cli, minirt, only_line

from minirt import Llama, ModelError
from minirt.perplexity import (
    BaseFile,
    Divergence,
    Perplexity,
    base_size,
    cut_windows,
    decoded_logits,
    dense_log_probs,
    encode_log_probs,
    first_scored,
    log_sum_exp,
    row_codes,
    score,
    together,
    window_logits,
    write_header,
)
from minirt.tokenizer import Tokenizer

VERSES = Path(__file__).parent / "data" / "verses.txt"
N_VOCAB = 268  # of the tiny model


@pytest.fixture(scope="module")
def llama(tiny_spm: Path) -> Iterator[Llama]:
    with Llama.load(tiny_spm, device="reference", kv="f32", n_ctx=32) as model:
        yield model


def test_windows_are_whole_and_at_least_two() -> None:
    assert cut_windows(range(70), 32).tolist() == [list(range(32)), list(range(32, 64))]
    assert cut_windows(range(128), 32, 3).shape == (3, 32)
    with pytest.raises(ModelError, match="at least 64 tokens, has 63"):
        cut_windows(range(63), 32)


def test_the_second_half_of_a_window_is_scored_after_bos(llama: Llama) -> None:
    window = np.arange(100, 132)
    expected = llama.logits([llama.tokenizer.bos_id, *range(101, 132)])  # type: ignore[list-item]
    parts = list(window_logits(llama, window))
    np.testing.assert_allclose(np.concatenate([p[0] for p in parts]), expected[16:31], atol=1e-5)
    assert np.concatenate([p[1] for p in parts]).tolist() == list(range(117, 132))


def test_a_file_without_bos_keeps_the_first_token(tiny: Path) -> None:
    with Llama.load(tiny, device="reference", kv="f32", n_ctx=33) as llama:
        expected = llama.logits(range(100, 133))
        found = np.concatenate([p[0] for p in window_logits(llama, np.arange(100, 133))])
        np.testing.assert_allclose(found, expected[16:32], atol=1e-5)


# -- the decode path ---------------------------------------------------------------------------------------------------

POLICIES = [
    "dense", "sparq:r=4:k=8", "sparq:r=4:k=8:reallocate=on", "topk:k=8", "window:budget=8", "streaming:budget=12",
    "lm-infinite:sinks=3:recent=8", "h2o:budget=10", "tova:budget=9", "tova:budget=9:compress=stepwise",
    "d2o:budget=10:sinks=2", "d2o-code:budget=10:sinks=2",
]  # fmt: skip


@pytest.fixture
def windows() -> np.ndarray:
    return np.random.default_rng(7).integers(3, 259, (5, 32)).astype(np.int32)


def joined(parts: Iterator[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.stack([logits for logits, _ in parts], axis=1)


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("policy", POLICIES)
def test_windows_decoded_together_are_as_each_alone(
    tiny_spm: Path, windows: np.ndarray, policy: str, device: str
) -> None:
    with Llama.load(tiny_spm, device=device, kv="f32", n_ctx=32, policy=policy) as llama:
        found = joined(decoded_logits(llama, windows))
        alone = [joined(decoded_logits(llama, windows[i : i + 1])) for i in range(len(windows))]
        assert found.shape == (5, 15, llama.config.n_vocab)
        np.testing.assert_allclose(found, np.concatenate(alone), atol=1e-4)


def test_dense_attention_decodes_what_it_reads(llama: Llama, windows: np.ndarray) -> None:
    read = np.stack([np.concatenate([logits for logits, _ in window_logits(llama, w)]) for w in windows])
    np.testing.assert_allclose(joined(decoded_logits(llama, windows)), read, atol=1e-4)
    tokens = np.stack([tokens for _, tokens in decoded_logits(llama, windows)], axis=1)
    assert tokens.tolist() == windows[:, 17:].tolist()


@pytest.mark.parametrize("policy", POLICIES[1:-1])  # d2o-code cuts neither of two layers
def test_a_policy_acts_at_every_step(llama: Llama, windows: np.ndarray, policy: str) -> None:
    """As a session does that is fed the first half of a window and then token by token."""
    window = windows[0]
    llama.set_policy(policy)
    try:
        found = joined(decoded_logits(llama, windows[:1]))[0]
        fed = [llama.tokenizer.bos_id, *window[1:].tolist()]
        llama.session.feed(fed[:16])  # type: ignore[arg-type]
        expected = np.stack([llama.session.step(token) for token in fed[16:31]])  # type: ignore[arg-type]
    finally:
        llama.set_policy("dense")
    np.testing.assert_allclose(found, expected, atol=1e-4)
    dense = joined(decoded_logits(llama, windows[:1]))[0]
    assert np.abs(found - dense).max() > 1e-2


def test_the_base_is_held_in_blocks(llama: Llama, windows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(dense_log_probs(llama, windows))
    assert len(whole) == 31 - first_scored(32)
    logits = joined(decoded_logits(llama, windows))
    highest, log_sum = log_sum_exp(logits.reshape(-1, llama.config.n_vocab))
    expected = logits.reshape(-1, llama.config.n_vocab) - (highest + log_sum)[:, None]
    np.testing.assert_allclose(np.stack(whole, axis=1).reshape(expected.shape), expected, atol=1e-4)
    allocated: list[int] = []
    empty = np.empty

    def counted(shape: tuple[int, ...], dtype: type) -> np.ndarray:
        allocated.append(4 * math.prod(shape))
        return empty(shape, dtype)

    limit = 4 * llama.config.n_vocab * len(windows) * 4  # of 4 positions
    monkeypatch.setattr("minirt.perplexity.LOGITS_BYTES", limit)
    monkeypatch.setattr("minirt.perplexity.np.empty", counted)
    parts = [part.copy() for part in dense_log_probs(llama, windows)]
    assert max(size for size in allocated if size >= limit) == limit
    monkeypatch.undo()
    for part, one in zip(parts, whole, strict=True):
        np.testing.assert_allclose(part, one, atol=1e-5)


def test_rows_count_all_windows_one_after_the_other(llama: Llama, windows: np.ndarray) -> None:
    for decode in (False, True):
        rows = [s.rows for group in (slice(0, 2), slice(2, 5)) for s in score(llama, windows, group, decode)]
        assert sorted(np.concatenate(rows).tolist()) == list(range(5 * 15))


def test_as_many_windows_together_as_memory_holds(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    one = llama.decoder.policy.plan(llama.config, 32, *2 * [llama.session.cache.plan.k_store]).nbytes(llama.config)
    for free, expected in ((1 << 40, 8), (2 * 3 * one, 3), (0, 1)):
        monkeypatch.setattr("minirt.perplexity.available_memory", lambda free=free: free)
        assert together(llama, 32) == expected
    monkeypatch.setattr("minirt.perplexity.available_memory", lambda: 2 * 6 * one)
    assert together(llama, 32, dense=True) == 3, "the cache of dense attention is another"


def test_perplexity_and_its_error_by_hand() -> None:
    running = Perplexity()
    running.add(np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], np.float32)) + 3, np.array([0, 1]))
    running.add(np.log(np.array([[0.25, 0.5, 0.25]], np.float32)), np.array([2]))
    nll = -np.log([0.5, 0.2, 0.25])
    assert running.value == pytest.approx(math.exp(nll.mean()), rel=1e-6)
    assert running.error == pytest.approx(math.exp(nll.mean()) * math.sqrt(nll.var() / 2), rel=1e-5)


def llama_cpp_row(logits: np.ndarray) -> bytes:
    """One scored position of a base file, written out element by element as llama.cpp does, in float32."""
    f = np.float32
    top = max(logits)
    low = max(min(logits), f(top - f(16)))
    log_sum = f(math.log(sum(float(np.exp(f(x - top))) for x in logits)))
    scale = f((top - low) / f(65535))
    codes = (
        [int(np.rint(f(f(1) / scale) * f(x - low))) if x > low else 0 for x in logits] if scale else [0] * len(logits)
    )
    return (
        struct.pack("<ff", scale, f(f(low - top) - log_sum))
        + struct.pack(f"<{len(codes)}H", *codes)
        + b"\0\0" * (len(codes) % 2)
    )


@pytest.mark.parametrize("n_vocab", [6, 7])
def test_rows_are_encoded_as_llama_cpp_does(n_vocab: int) -> None:
    logits = (np.random.default_rng(n_vocab).standard_normal((20, n_vocab)) * 9).astype(np.float32)
    logits[3] = 1.5  # all the same: scale 0
    rows = encode_log_probs(logits)
    assert rows.shape == (20, row_codes(n_vocab))
    assert rows.tobytes() == b"".join(map(llama_cpp_row, logits))


def base_file(path: Path, logits: np.ndarray, windows: np.ndarray) -> Path:
    with path.open("wb") as file:
        write_header(file, windows, logits.shape[-1])
        file.write(encode_log_probs(logits).tobytes())
    return path


def test_divergence_by_hand(tmp_path: Path) -> None:
    p = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
    q = np.array([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2]])
    path = base_file(tmp_path / "base", np.log(p).astype(np.float32) - 2, np.zeros((1, 6), np.int32))
    divergence = Divergence()
    base = BaseFile(path)
    divergence.add(np.log(q).astype(np.float32) + 5, np.array([0, 2]), base.read([0, 1]))
    base.close()
    s = divergence.statistics()
    kld = (p * np.log(p / q)).sum(axis=1)
    assert s["kld"] == pytest.approx(kld.mean(), abs=1e-4)
    assert s["kld_max"] == pytest.approx(kld.max(), abs=1e-4)
    assert s["same_top"] == 0.5
    assert s["ppl"] == pytest.approx((0.6 * 0.2) ** -0.5, rel=1e-4)
    assert s["ppl_base"] == pytest.approx((0.7 * 0.4) ** -0.5, rel=1e-4)
    assert s["ppl_ratio"] == pytest.approx(s["ppl"] / s["ppl_base"], rel=1e-6)
    assert s["delta_p"] == pytest.approx((-0.1 - 0.2) / 2, abs=1e-4)
    assert s["delta_p_rms"] == pytest.approx(math.sqrt((0.1**2 + 0.2**2) / 2), abs=1e-4)


# -- the command -------------------------------------------------------------------------------------------------------

FLAGS = ("-c", 64, "--device", "reference", "--kv", "f32")


def test_running_and_final_figures(cli: Cli, tiny: Path) -> None:
    result = cli("perplexity", tiny, "-f", VERSES, *FLAGS, "--chunks", 3)
    assert result.exit_code == 0, result.stderr
    running, final = result.stdout.splitlines()
    first = [part.split("]")[0] for part in running.split(",") if part]
    assert first == ["[1", "[2", "[3"]
    assert final.startswith("Final estimate: PPL = ")
    assert " +/- " in final
    facts = json.loads(cli("perplexity", tiny, "-f", VERSES, *FLAGS, "--chunks", 3, "--json").stdout)
    assert f"{facts['ppl']:.4f}" in final
    assert (facts["n_chunk"], facts["n_ctx"], facts["n_scored"]) == (3, 64, 3 * 31)


def test_a_model_does_not_diverge_from_itself_but_from_another(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    from make_gguf import tiny_model

    base = tmp_path / "base.kld"
    saved = cli("perplexity", tiny, "-f", VERSES, *FLAGS, "--chunks", 4, "--kld", base)
    assert saved.exit_code == 0, saved.stderr
    assert base.stat().st_size == base_size(64, N_VOCAB, 4)
    assert not list(tmp_path.glob("*.part"))
    same = json.loads(cli("perplexity", tiny, "--kld", base, "--device", "reference", "--kv", "f32", "--json").stdout)
    assert abs(same["kld"]) < 1e-6
    assert same["same_top"] == 1.0
    assert same["ppl_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert same["n_scored"] == 4 * 31
    other = tiny_model(tmp_path / "other.gguf", seed=1)
    far = cli("perplexity", other, "-f", VERSES, *FLAGS, "--kld", base, "--chunks", 2)
    assert far.exit_code == 0, far.stderr
    assert "Mean    KLD:" in far.stdout
    assert float(far.stdout.split("Mean    KLD:")[1].split()[0]) > 0.1


def figures(cli: Cli, *args: object) -> dict[str, float]:
    result = cli("perplexity", *args, *FLAGS, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, float] = json.loads(result.stdout)
    return found


def test_a_policy_is_compared_with_dense_attention(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    text, base = ("-f", VERSES, "--chunks", 9), tmp_path / "base.kld"
    dense, decoded = figures(cli, tiny, *text), figures(cli, tiny, *text, "--decode")
    assert decoded["ppl"] == pytest.approx(dense["ppl"], rel=1e-5)
    assert (dense["decode"], decoded["decode"]) == (False, True)
    policy = ("--policy", "tova", "--budget", 16)
    alone, found = figures(cli, tiny, *text, *policy), figures(cli, tiny, *text, *policy, "--kld")
    assert (found["policy"], found["base"], found["decode"]) == ("tova:budget=16", "dense", True)
    assert found["n_scored"] == alone["n_scored"] == 9 * 31
    assert found["ppl"] == pytest.approx(alone["ppl"], rel=1e-6)
    assert found["ppl_base"] == pytest.approx(dense["ppl"], rel=1e-6)
    assert found["kld"] > 0.01
    assert found["same_top"] < 1
    figures(cli, tiny, *text, "--kld", base)  # saves it
    saved = figures(cli, tiny, "--kld", base, *policy)
    assert saved["kld"] == pytest.approx(found["kld"], rel=1e-3)
    assert saved["same_top"] == found["same_top"]


def test_a_full_budget_does_not_diverge_and_a_base_of_a_policy_is_what_it_decodes(
    cli: Cli, tiny: Path, tmp_path: Path
) -> None:
    text, base = ("-f", VERSES, "--chunks", 3), tmp_path / "base.kld"
    for policy in ("h2o:budget=64", "sparq:r=16:k=64"):
        found = figures(cli, tiny, *text, "--policy", policy, "--kld")
        assert abs(found["kld"]) < 1e-6
        assert found["same_top"] == 1
    assert abs(figures(cli, tiny, *text, "--decode", "--kld")["kld"]) < 1e-6
    figures(cli, tiny, *text, "--policy", "window:budget=8", "--kld", base)
    same = figures(cli, tiny, "--kld", base, "--policy", "window:budget=8")
    assert abs(same["kld"]) < 1e-6
    assert figures(cli, tiny, "--kld", base)["kld"] > 0.01, "read as a prompt, by dense attention"


def test_figures_come_by_groups_of_windows(cli: Cli, tiny: Path) -> None:
    flags = ("perplexity", tiny, "-f", VERSES, *FLAGS, "--chunks", 11, "--policy", "window:budget=8")
    result = cli(*flags)
    assert [part.split("]")[0] for part in result.stdout.splitlines()[0].split(",") if part] == ["[8", "[11"]
    assert "11 windows of 64 tokens" in result.stderr
    rows = cli(*flags, "--kld").stdout.splitlines()[1:3]
    assert [row.split()[0] for row in rows] == ["8", "11"]


def test_the_first_base_is_complete_or_not_there(tiny: Path, tmp_path: Path) -> None:
    result = minirt("perplexity", tiny, "-f", VERSES, *FLAGS, "--kld", tmp_path / "no" / "base.kld")
    assert result.returncode == 1
    assert "no" in only_line(result.stderr)


def test_a_base_that_is_interrupted_leaves_nothing_behind_and_nothing_is_overwritten(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, own = tmp_path / "base.kld", tmp_path / "base.kld.part"
    own.write_text("mine")
    calls = iter(range(99))

    def interrupted(llama: Llama, window: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if next(calls) == 2:
            assert len(list(tmp_path.iterdir())) == 2, "the base is being written"
            raise KeyboardInterrupt
        return window_logits(llama, window)

    monkeypatch.setattr("minirt.perplexity.window_logits", interrupted)
    assert cli("perplexity", tiny, "-f", VERSES, *FLAGS, "--chunks", 4, "--kld", base).exit_code == 130
    assert list(tmp_path.iterdir()) == [own]
    monkeypatch.undo()
    assert cli("perplexity", tiny, "-f", VERSES, *FLAGS, "--chunks", 2, "--kld", base).exit_code == 0
    assert sorted(tmp_path.iterdir()) == [base, own]
    assert own.read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_folder_that_takes_no_files_is_not_called_full(cli: Cli, tiny: Path) -> None:
    result = cli("perplexity", tiny, "-f", VERSES, *FLAGS, "--chunks", 2, "--kld", "/proc/base.kld")
    assert result.exit_code == 1
    assert "minirt: /proc/base.kld: cannot write: " in result.stderr
    assert "MiB" not in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_standard_output_is_not_blamed_on_the_base(tiny: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, "--chunks", 2, "--kld", tmp_path / "base.kld")
    result = minirt("perplexity", tiny, "-f", VERSES, *flags, shell="> /dev/full")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == b"minirt: standard output: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_comes_before_the_figures_and_leaves_compiling_out(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_up = Llama.warm_up

    def compiling(llama: Llama) -> None:
        time.sleep(2)
        warm_up(llama)

    monkeypatch.setattr(Llama, "warm_up", compiling)
    result = cli("perplexity", tiny, "-f", VERSES, *FLAGS, "--chunks", 3)
    assert "3 windows of 64 tokens, 0." in result.output.partition("[1]")[0]
    assert result.stdout.splitlines()[0].count(",") == 3
    assert "windows of" not in cli("perplexity", tiny, "-f", VERSES, *FLAGS, "--chunks", 1).stderr


def test_a_long_text_shows_that_it_is_read_and_a_huge_one_is_refused(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate((64 << 20) + 1)
    result = cli("perplexity", tiny, "-f", huge, *FLAGS)
    assert (result.exit_code, only_line(result.stderr)) == (1, f"minirt: {huge}: more than 64 MiB")
    encode = Tokenizer.encode_bytes

    def slowly(self: Tokenizer, raw: bytes, **options: bool) -> list[int]:
        time.sleep(0.3)
        return encode(self, raw, **options)

    monkeypatch.setattr("minirt.progress.PATIENCE", 0.1)
    monkeypatch.setattr(Tokenizer, "encode_bytes", slowly)
    assert "minirt: reading the text ...\n" in cli("perplexity", tiny, "-f", VERSES, *FLAGS, "--chunks", 2).stderr


def _edit(at: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:at] + data + raw[at + len(data) :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "does not begin with"),
    "magic": (_edit(0, b"_logitz_"), "does not begin with"),
    "header only": (lambda raw: raw[:20], "its header says"),
    "cut": (lambda raw: raw[:-7], "its header says"),
    "longer": (lambda raw: raw + b"x", "its header says"),
    "n_ctx 0": (_edit(8, struct.pack("<i", 0)), "impossible header"),
    "n_ctx negative": (_edit(8, struct.pack("<i", -64)), "impossible header"),
    "n_ctx huge": (_edit(8, struct.pack("<i", 2**31 - 1)), "impossible header"),
    "n_vocab huge": (_edit(12, struct.pack("<i", 2**31 - 1)), "its header says"),
    "n_vocab negative": (_edit(12, struct.pack("<i", -1)), "impossible header"),
    "n_chunk 0": (_edit(16, struct.pack("<i", 0)), "impossible header"),
    "n_chunk huge": (_edit(16, struct.pack("<i", 2**31 - 1)), "impossible header"),
    "token too large": (_edit(20, struct.pack("<i", N_VOCAB)), "token id"),
    "token negative": (_edit(24, struct.pack("<i", -1)), "token id"),
    "scale NaN": (_edit(20 + 2 * 64 * 4, struct.pack("<f", math.nan)), "no probabilities"),
    "scale negative": (_edit(20 + 2 * 64 * 4, struct.pack("<f", -1.0)), "no probabilities"),
    "scale infinite": (_edit(20 + 2 * 64 * 4, struct.pack("<f", math.inf)), "no probabilities"),
    "probability over 1": (_edit(24 + 2 * 64 * 4, struct.pack("<f", 100.0)), "no probabilities"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> bytes:
    logits = np.random.default_rng(0).standard_normal((2 * 31, N_VOCAB)).astype(np.float32)
    windows = np.arange(128, dtype=np.int32).reshape(2, 64)
    return base_file(tmp_path_factory.mktemp("base") / "base.kld", logits, windows).read_bytes()


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_base_file_is_one_line(cli: Cli, tiny: Path, tmp_path: Path, base: bytes, name: str) -> None:
    damage, message = DAMAGE[name]
    path = tmp_path / "base.kld"
    path.write_bytes(damage(base))
    result = cli("perplexity", tiny, "--kld", path, "--device", "reference")
    assert result.exit_code == 1
    line = only_line(result.stderr)
    assert message in line
    assert str(path) in line


def test_a_base_that_does_not_fit(cli: Cli, tiny: Path, tiny_spm: Path, tmp_path: Path, base: bytes) -> None:
    path = tmp_path / "base.kld"
    path.write_bytes(base)
    result = cli("perplexity", tiny_spm, "--kld", path, "--device", "reference")
    assert (result.exit_code, "268 tokens" in only_line(result.stderr)) == (1, True)
    result = cli("perplexity", tiny, "--kld", path, "-c", 128, "--device", "reference")
    assert (result.exit_code, "windows of 64" in only_line(result.stderr)) == (2, True)
    result = cli("perplexity", tiny, "--kld", path, "-f", VERSES, "--device", "reference")
    assert (result.exit_code, "another text" in only_line(result.stderr)) == (1, True)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ((), 2, "no text"),
        (("--kld",), 2, "no text: give -f FILE"),
        (("--policy", "tova", "--kld"), 2, "no text: give -f FILE"),
        (("--kld", "--policy", "tova"), 2, "no text: give -f FILE"),
        (("-f", VERSES, "--kld"), 2, "give another --policy, or --decode"),
        (("-f", VERSES, "-c", "64", "--policy", "sparq:r=4", "--kld"), 2, "--k 128 is out of range (1 to 64"),
        (("--kld", "nowhere.kld"), 2, "no text"),
        (("-f", "nowhere.txt"), 1, "nowhere.txt"),
        (("-f", "."), 1, "."),
        (("-f", VERSES, "-c", "4096"), 1, "needs at least 8192 tokens"),
        (("-f", VERSES, "-c", "7"), 2, "--ctx"),
        (("-f", VERSES, "-c", "-1"), 2, "out of range"),
        (("-f", VERSES, "--chunks", "0"), 2, "out of range"),
        (("-f", VERSES, "--chunks", "-2"), 2, "out of range"),
        (("-f", VERSES, "--chunks", "x"), 2, "not a valid integer"),
    ],
)
def test_wrong_flags(cli: Cli, tiny: Path, flags: tuple[object, ...], code: int, message: str) -> None:
    result = cli("perplexity", tiny, "--device", "reference", *flags)
    lines = [line for line in result.stderr.splitlines() if "more than the 256 tokens" not in line]
    assert result.exit_code == code
    assert message in only_line("\n".join(lines))


def test_smollm2_scores_as_llama_cpp_does_on_exact_weights(cli: Cli, smollm2: Path) -> None:
    """40.3786 is llama.cpp's (llama-cpp-python 0.3.36) on an F16 copy of the same weights, 2 windows of 128."""
    result = cli(
        "perplexity", smollm2, "-f", VERSES, "-c", 128, "--chunks", 2, "--kv", "f32", "--device", "reference", "--json"
    )
    facts = json.loads(result.stdout)
    assert facts["n_chunk"] == 2
    assert facts["ppl"] == pytest.approx(40.3786, rel=1e-3)
