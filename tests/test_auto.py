"""`--policy auto`: which measured point is taken to which model, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, only_line

from minirt import UsageError, auto
from minirt.attention_speed import Shares
from minirt.auto import Auto, choose
from minirt.bandwidth.synthetic import config_of
from minirt.policies import parse_policy
from minirt.stores import get_stores


def row(method: str, kv: str, share: float, **changes: Any) -> dict[str, Any]:
    given = {"grouped": False, "depth": 8192, "width": 4096, "read": 1.0} | changes
    return {"method": method, "kv": kv, "share": share} | given


DATA: dict[str, Any] = {
    "model": "a model",
    "head_dim": 64,
    "n_ctx": 2048,
    "efficiency": {"cpu": {"weights": 1.0, "attention": [
        row(method, kv, share) for method, kv, share in (
            ("dense", "f16", 0.5), ("dense", "q8_0", 0.4), ("sparq f16", "f16", 0.25), ("tova", "f16", 0.5),
        )
    ]}},
    "points": [point | {"kld_error": 0.0, "repetition_error": 1} for point in (
        {"policy": "dense", "kv": "f16", "kld": 0.0, "repetition": 20},
        {"policy": "dense", "kv": "q8_0", "kld": 0.001, "repetition": 20},
        {"policy": "sparq:r=8:k=64", "kv": "f16", "kld": 0.04, "repetition": 14},
        {"policy": "tova:budget=1/8", "kv": "f16", "kld": 0.2, "repetition": 12},
    )],
}  # fmt: skip
CONFIG = config_of("7b")
N = 16384
DENSE = 2 * N * 32 * 32 * 128 * 2  # bytes of the cache


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "frontier", lambda: DATA)


def pick(speed: str | None = None, kv_bytes: str | None = None, **changes: Any) -> auto.Candidate:
    given = {"config": CONFIG, "n_ctx": N, "weight_bytes": 0, "kv": "auto", "device": "cpu"} | changes
    return choose(Auto.parse(speed, kv_bytes), **given)


@pytest.mark.usefixtures("measured")
def test_the_least_divergence_that_is_fast_enough() -> None:
    assert str(pick("1x").policy) == "dense"
    quick = pick("1.2x")
    assert (str(quick.policy), quick.kv) == ("dense", "q8_0")
    assert quick.speed == pytest.approx(0.4 / 0.5 * 64 / 34)  # bytes of 32 numbers
    sparse = pick("2x")
    # 8 of 64 components are 16 of 128, 64 of 2048 tokens 512 of 16384; 512 n = 64 n + 525,312 at n = 1173
    assert str(sparse.policy) == "sparq:r=16:k=512:dense_until=1280"
    bytes_of = N * 16 + 2 * 512 * 128 + 2 * 128  # a head, in float16 numbers; the mean is float32
    assert sparse.speed == pytest.approx(0.25 / 0.5 * 2 * N * 128 / bytes_of)
    assert sparse.full_bytes == pytest.approx(2 * 32 * 32 * bytes_of / 0.25)


def test_shares_are_those_measured_nearest() -> None:
    near = [row("dense", "f16", 0.1 * i, depth=depth) for i, depth in enumerate((1024, 4096, 65536), 1)]
    near.append(row("dense", "f16", 0.5, depth=1024, width=512))
    near += [row("tova", "f16", share, read=read) for share, read in ((0.6, 1.0), (0.7, 0.1))]
    shares = Shares(near)
    found = [shares.of("dense", "f16", False, depth, 4096, 1.0) for depth in (10, 1500, 3000, 10**6)]
    assert found == pytest.approx([0.1, 0.1, 0.2, 0.3])
    assert shares.of("dense", "f16", False, 1024, 500, 1.0) == 0.5
    assert [shares.of("tova", "f16", False, 8192, 4096, read) for read in (0.9, 0.2)] == [0.6, 0.7]


def test_shares_that_were_not_measured_are_put_together() -> None:
    f16, q8_0, q4_0 = (row("dense", kv, share) for kv, share in (("f16", 0.8), ("q8_0", 0.6), ("q4_0", 0.4)))
    coded, sparse = row("sparq q4", "f16", 0.2), row("sparq f16", "f16", 0.5, grouped=True)
    shares = Shares([f16, q8_0, q4_0, coded, sparse, row("dense", "f16", 0.5, grouped=True)])

    def share(method: str, kv: str, grouped: bool) -> float:
        return shares.of(method, kv, grouped, 4096, 1024, 0.2)

    assert share("sparq q4", "q8_0", False) == pytest.approx(0.2 * 6 / 8)
    assert share("sparq q4", "q8_0/q4_0", False) == pytest.approx(0.2 * 4 / 8)
    assert share("sparq q4", "q8_0", True) == pytest.approx(0.2 * 6 / 8 * 5 / 8)
    assert share("dense", "q8_0", True) == pytest.approx(0.5 * 6 / 8)
    assert share("sparq f16", "f16", False) == 0.5, "no more than where keys are shared"
    assert share("sparq f16", "q8_0-plain", True) == pytest.approx(0.5 * 4 / 8), "as slow as any type"
    assert share("d2o-code", "f16", True) == 0.2, "as slow as any method"
    assert Shares([row("tova", "f16", 0.3)]).of("tova", "q8_0", True, 100, 64, 1.0) == 0.3
    assert Shares([]).of("dense", "f16", True, 4096, 1024, 1.0) == 1.0


@pytest.mark.parametrize("share", [0.25, 0.05])
def test_a_coded_index_is_as_fast_as_it_was_measured(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever one in float16 is."""
    rows = [*DATA["efficiency"]["cpu"]["attention"], row("sparq q4", "f16", share)]
    point = {
        "policy": "sparq:r=8:k=64:k_index=q4",
        "kv": "f16",
        "kld": 0.04,
        "repetition": 14,
        "kld_error": 0.0,
        "repetition_error": 1,
    }
    data = DATA | {"points": [DATA["points"][0], point], "efficiency": {"cpu": {"attention": rows}}}
    monkeypatch.setattr(auto, "frontier", lambda: data)
    bytes_of = N * 16 * 132 // 256 + 2 * 512 * 256 + 128 * 4  # a head: 16 components, 512 rows, the mean
    assert pick("2x").speed == pytest.approx(share / 0.5 * 2 * N * 256 / bytes_of)


def test_rows_that_auto_reads_are_those_it_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of 512 where it was measured, after 1,536 tokens on average, so a quarter of 4096 of 16384."""
    most, read = 2 * 64 * 2, 1536 * 8 * 2 + 512 / 4 * 2 * 64 * 2  # bytes of a head: dense's of a token, and its own
    point = DATA["points"][2] | {"policy": "sparq:r=8:k=auto:reallocate=off", "read": read / (1536 * most)}
    data = DATA | {"points": [DATA["points"][0], point]}
    monkeypatch.setattr(auto, "frontier", lambda: data)
    picked = pick("2x")
    assert str(picked.policy).startswith("sparq:r=16:k=auto:most=4096:")
    assert picked.full_bytes == pytest.approx(32 * 32 * (N * 16 * 2 + 4096 / 4 * 2 * 128 * 2) / 0.25)


@pytest.mark.usefixtures("measured")
def test_types_that_were_not_measured() -> None:
    for kv in ("f32", "q8_0-plain", "q8_0/f16"):
        with pytest.raises(UsageError, match=rf"^--kv {kv}: .* fits this model \(of f16, q8_0\)$"):
            pick("2x", kv=kv)


@pytest.mark.usefixtures("measured")
def test_a_device_where_nothing_was_measured() -> None:
    """It goes by bytes, and says so."""
    for device, said in (("gpu", True), ("reference", True), ("cpu", False)):
        picked = pick("2x", device=device)
        assert ("the speed is of bytes alone" in auto.reason(picked, CONFIG, N, None)) == said
    assert picked.speed < pick("2x", device="gpu").speed


@pytest.mark.usefixtures("measured")
def test_weights_take_their_time_too() -> None:
    weights = DENSE
    assert pick("1.2x", weight_bytes=weights).speed == pytest.approx(3 / (1 + 34 / 64 / 0.4))
    with pytest.raises(UsageError, match=r"--speed 3x: the most to expect at 16384 tokens is 2\.\d\dx \(tova"):
        pick("3x", weight_bytes=weights)


def test_of_those_that_are_as_good_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, _, sparq, _ = DATA["points"]
    other = sparq | {"policy": "sparq:r=4:k=64", "kld": 0.05}
    for error, r in ((0.0049, 16), (0.0051, 8)):
        data = DATA | {"points": [dense, sparq | {"kld_error": error}, other]}
        monkeypatch.setattr(auto, "frontier", lambda data=data: data)
        assert str(pick("1.2x").policy).startswith(f"sparq:r={r}:")


@pytest.mark.usefixtures("measured")
def test_the_least_divergence_that_is_small_enough() -> None:
    half = pick(kv_bytes="9/16")
    assert (str(half.policy), half.kv, half.held) == ("dense", "q8_0", DENSE * 34 // 64)
    assert str(pick(kv_bytes="1/2").policy) == "tova:budget=1/8"
    assert str(pick(kv_bytes="2GiB").policy) == "tova:budget=1/8"
    with pytest.raises(UsageError, match=r"--kv-bytes 1MiB: the least is 13 % \(tova:budget=1/8 with --kv f16\)"):
        pick(kv_bytes="1MiB")


def test_what_forgets_is_taken_if_nothing_else_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little it diverges."""
    h2o = {
        "policy": "h2o:budget=1/4",
        "kv": "f16",
        "kld": 0.01,
        "repetition": 5,
        "kld_error": 0.0,
        "repetition_error": 1,
    }
    monkeypatch.setattr(auto, "frontier", lambda: DATA | {"points": [*DATA["points"], h2o]})
    assert str(pick("2x").policy).startswith("sparq")
    assert "the least divergence and does not forget the text (0.040 nats" in auto.reason(pick("2x"), CONFIG, N, None)
    monkeypatch.setattr(auto, "frontier", lambda: DATA | {"points": [*DATA["points"][:2], h2o]})
    picked = pick("1.8x")
    assert str(picked.policy) == "h2o:budget=1/4"
    assert "the least divergence (0.010 nats" in auto.reason(picked, CONFIG, N, None)
    assert auto.reason(picked, CONFIG, N, None).endswith("; it forgets: it repeats 25 % of what dense does")


def test_an_error_may_be_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 repeated characters 9 are less than half, 9 ± 2 may be more."""
    for error, forgets in ((0, True), (2, False)):
        h2o = {
            "policy": "h2o:budget=1/4",
            "kv": "f16",
            "kld": 0.01,
            "repetition": 9,
            "kld_error": 0.0,
            "repetition_error": error,
        }
        monkeypatch.setattr(auto, "frontier", lambda h2o=h2o: DATA | {"points": [DATA["points"][0], h2o]})
        assert pick("1.5x").forgets == forgets


def test_sparq_that_would_never_be_sparse_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense attention is a point of its own, with less memory."""
    rows = [*DATA["efficiency"]["cpu"]["attention"], row("sparq q4", "f16", 0.001)]
    sparq = DATA["points"][2] | {"policy": "sparq:r=8:k=64:k_index=q4", "kld": 0.0}
    dense = DATA["points"][0] | {"kld": 0.1}
    data = DATA | {"points": [dense, sparq], "efficiency": {"cpu": {"attention": rows}}}
    monkeypatch.setattr(auto, "frontier", lambda: data)
    assert str(pick("1x").policy) == "dense"


def test_a_size_alone_asks_for_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the best that fits is slower than dense attention to float16, it is taken; not if a speed is asked for."""
    rows = [row("dense", "f16", 0.5), row("dense", "q8_0", 0.2), row("tova", "f16", 0.5)]
    monkeypatch.setattr(auto, "frontier", lambda: DATA | {"efficiency": {"cpu": {"attention": rows}}})
    picked = pick(kv_bytes="9/16")
    assert (str(picked.policy), picked.kv, picked.speed < 1) == ("dense", "q8_0", True)
    assert str(pick("1x", "9/16").policy) == "tova:budget=1/8"


@pytest.mark.usefixtures("measured")
def test_both_at_once_and_a_given_type() -> None:
    assert str(pick("2x", "1/2").policy) == "tova:budget=1/8"
    assert pick("1.1x", kv="q8_0").kv == "q8_0"
    with pytest.raises(UsageError, match="--speed 2x"):
        pick("2x", kv="q8_0")


@pytest.mark.usefixtures("measured")
def test_what_a_model_cannot_have_is_left_out() -> None:
    assert str(pick("1.2x", config=replace(CONFIG, head_dim=80)).policy) != "dense"  # blocks are of 32 numbers
    with pytest.raises(UsageError, match="sliding window"):
        pick("2x", config=replace(CONFIG, sliding_window=512))
    short = pick("1.3x", n_ctx=64)
    assert parse_policy(str(short.policy)) == short.policy
    short.policy.check(CONFIG, 64, *get_stores(short.kv))


@pytest.mark.parametrize(
    ("speed", "kv_bytes", "message"),
    [
        (None, None, "takes --speed"), ("0.5x", None, "--speed 0.5x is not"), ("2xx", None, "--speed 2xx"),
        ("nan", None, "--speed nan"), (None, "512", "--kv-bytes 512 is not"), (None, "2/1", "--kv-bytes 2/1"),
    ],
)  # fmt: skip
def test_what_is_no_wish(speed: str | None, kv_bytes: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Auto.parse(speed, kv_bytes)


def test_what_was_measured_is_there() -> None:
    data = json.loads(auto.FRONTIER.read_text())
    shares = Shares(data["efficiency"]["cpu"]["attention"])
    for grouped in (False, True):
        coded = shares.of("sparq q4", "q8_0", grouped, 8192, 1024, 0.1)
        assert 0 < coded < shares.of("dense", "f16", grouped, 8192, 1024, 1.0)
    assert 0 < data["efficiency"]["cpu"]["weights"] <= 1
    for point in data["points"]:
        parse_policy(point["policy"])
        get_stores(point["kv"])
        assert min(point["kld"], point["repetition"], point["repetition_error"]) >= 0
    assert ("dense", "f16") in {(point["policy"], point["kv"]) for point in data["points"]}


def test_chat_and_run_say_what_they_picked(cli: Cli, tiny: Path) -> None:
    result = cli("run", tiny, "-p", "a", "-n", 2, "--no-stats", "--policy", "auto", "--kv-bytes", "1/2")
    assert result.exit_code == 0, result.stderr
    line = result.stderr.splitlines()[0]
    assert line.startswith("minirt: --policy auto: ")
    assert "tokens/s), " in line
    result = cli("chat", tiny, "--policy", "auto", "--speed", "1x", "-n", 2, input="hi\n")
    assert result.exit_code == 0, result.stderr
    assert "--policy auto: dense with --kv f16: about 1.0x dense at 256 tokens" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--policy", "auto"), "--policy auto takes --speed"),
        (("--policy", "auto", "--speed", "2x", "--r", "8"), "--r goes with a policy"),
        (("--speed", "2x"), "--speed goes with --policy auto"),
        (("--kv-bytes", "1/8"), "--kv-bytes goes with --policy auto"),
        (("--policy", "auto", "--speed", "900x"), "the most to expect"),
    ],
)
def test_wrong_flags(cli: Cli, tiny: Path, flags: tuple[str, ...], message: str) -> None:
    result = cli("run", tiny, "-p", "a", *flags)
    assert (result.exit_code, message in only_line(result.stderr)) == (2, True)
