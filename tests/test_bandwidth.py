"""`minirt bandwidth`: bytes counted and by formula, what is timed, how grids go on, every wrong flag in one line."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Cli, only_line

from minirt import ModelError, UsageError
from minirt.bandwidth import attention, caches, copy_bandwidth, models, paired, synthetic, throughput
from minirt.bandwidth.attention import Cell, resolve
from minirt.bandwidth.counted import CountedOps
from minirt.bandwidth.grid import Rows
from minirt.cli.bandwidth import _Clock
from minirt.decoder import Decoder
from minirt.devices import open_ops
from minirt.llama import bytes_per_token
from minirt.policies import Dense, parse_policy
from minirt.reference import ReferenceOps
from minirt.stores import get_stores

ROOM = 1 << 30
RESULTS = Path(__file__).parents[1] / "tools" / "results"
SHAPE = synthetic.Shape(2, 64, 4, 2, 32, 96, 48)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minirt.bandwidth.memory.BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr("minirt.bandwidth.memory.READ_SECONDS", 0.0)
    monkeypatch.setattr("minirt.bandwidth.attention.TOUCHED", 1 << 10)
    monkeypatch.setattr("minirt.bandwidth.paired.PIECE", 0.0)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    ops, config = ReferenceOps(), synthetic.config_of(SHAPE)
    return Decoder(config, synthetic.weights_of(ops, config, "Q8_0"), ops, Dense())


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q8_0/q4_0"])
@pytest.mark.parametrize(
    "spec",
    [
        "dense", "sparq:r=8:k=16", "sparq:r=8:k=16:reallocate=on", "sparq:r=8:k=16:k-index=q4",
        "sparq:r=8:k=16:k-index=none", "topk:k=16",
        "window:budget=32", "streaming:budget=32", "lm-infinite:budget=32",
    ],
)  # fmt: skip
def test_what_a_step_reads_is_what_the_formula_says(kv: str, spec: str) -> None:
    assert counted(spec, kv, 300)[0] == counted(spec, kv, 300)[1]


@pytest.mark.parametrize(("spec", "heads", "sums"), [("tova:budget=32", 1, False), ("h2o:budget=32", 2, True)])
def test_what_evicts_reads_positions_and_sums_besides(spec: str, heads: int, sums: bool) -> None:
    read, formula = counted(spec, "f16", 300)
    assert read == formula + 2 * 2 * 33 * heads * 4 * (2 if sums else 1)  # sequences, layers, slots


def counted(spec: str, kv: str, depth: int) -> tuple[int, int]:
    """Bytes that a step of two sequences reads, counted and by the formula."""
    config, policy, ops = synthetic.config_of(SHAPE), parse_policy(spec), ReferenceOps()
    plan = policy.plan(config, depth, *get_stores(kv))
    cache = Decoder(config, synthetic.factors_of(ops, config), ops, policy).new_cache(plan, 2)
    synthetic.fill(ops, cache, policy, config, depth - 1)
    cache.n_seen[:] = depth - 1
    seen, rng = CountedOps(ops, plan), np.random.default_rng(0)
    for layer in range(config.n_layer):
        rows, q = synthetic.RandomRows(ops, rng, 2, plan, config), synthetic.random_queries(ops, rng, 2, config)
        policy.attend(seen, cache, layer, q, *rows(np.full(2, depth - 1)))
    assert seen.written > 0
    return seen.read, 2 * policy.bytes_read(config, plan, depth)


def test_memory_that_is_copied_counts_on_both_sides() -> None:
    assert copy_bandwidth(1) > 0
    assert copy_bandwidth(2) > 0


# -- random caches and models ------------------------------------------------------------------------------------------


def test_a_random_cache_is_what_a_prompt_would_leave() -> None:
    """Filling leaves attention out; rows, index and means must not show it."""
    config, policy = synthetic.config_of(SHAPE), parse_policy("sparq:r=8:k=16:reallocate=on")
    plan, found = policy.plan(config, 700, *get_stores("f16")), []
    for ops in (ReferenceOps(), open_ops("cpu", 1)):
        cache = Decoder(config, synthetic.factors_of(ops, config), ops, policy).new_cache(plan, 2)
        synthetic.fill(ops, cache, policy, config, 700)
        assert cache.n_seen.tolist() == [700, 700]
        found.append(cache)
    mean = found[0].layers[1].v.astype(np.float32).mean(axis=2)
    np.testing.assert_allclose(found[0].side["mean"][1], mean, atol=1e-4)
    np.testing.assert_allclose(found[1].side["mean"][1], mean, atol=1e-4)
    rows = found[0].layers[0].k
    assert np.array_equal(rows, found[1].layers[0].k.view(np.float16).reshape(rows.shape))
    assert not np.array_equal(rows[0, :, :188], rows[0, :, 512:])  # no chunk twice
    assert not np.array_equal(rows[0], rows[1])


@pytest.mark.parametrize("name", ["window", "h2o", "tova"])
def test_filling_takes_what_is_counted(name: str) -> None:
    """Also of a policy that takes a prompt at once: keys and values of a layer after the other, not those of all."""
    config, policy, ops = synthetic.config_of(SHAPE, 12), parse_policy(f"{name}:budget=1000"), open_ops("cpu", 1)
    plan = policy.plan(config, 8192, *get_stores("f16"))
    made = Decoder(config, synthetic.factors_of(ops, config), ops, policy)
    first, second = made.new_cache(plan), made.new_cache(plan)
    synthetic.fill(ops, first, policy, config, 8192)  # compiles
    tracemalloc.start()
    synthetic.fill(ops, second, policy, config, 8192)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < synthetic.filling_bytes(policy, plan, config, 8192)


def test_policies_that_keep_all_tokens_share_their_rows() -> None:
    texts = ("dense", "sparq:r=4:k=8", "sparq:r=8:k=16", "sparq:r=8:k-index=q4", "tova:budget=16")
    config, ops = synthetic.config_of(SHAPE), ReferenceOps()
    policies = {text: parse_policy(text) for text in texts}
    plans = {text: policy.plan(config, 256, *get_stores("f16")) for text, policy in policies.items()}
    made = caches.caches_of(Decoder(config, synthetic.factors_of(ops, config), ops, Dense()), policies, plans)
    dense, few, more, coded, tova = (made[text] for text in texts)
    assert dense.layers is few.layers is coded.layers is not tova.layers
    assert few.side["index"][0] is more.side["index"][0]
    assert not dense.side
    arrays = [*dense.layers, *tova.layers]
    sides = [few.side["index"], coded.side["codes"], coded.side["scales"], *tova.side.values()]
    held = sum(a.nbytes for kv in arrays for a in kv) + sum(a.nbytes for of in sides for a in of)
    assert caches.caches_bytes(config, policies, plans) == held
    caches.fill_all(ops, made, policies, config, 200)
    assert {int(cache.n_seen[0]) for cache in made.values()} == {200}
    assert np.array_equal(few.side["index"][0][0, 0, 0, :, 5], dense.layers[0].k[0, 0, 5])
    assert np.abs(tova.layers[0].k).sum() > 0


@pytest.mark.parametrize("kind", synthetic.TYPES)
def test_a_random_model_decodes(kind: str) -> None:
    config, ops = synthetic.config_of(SHAPE), ReferenceOps()
    weights = synthetic.weights_of(ops, config, kind)
    made = Decoder(config, weights, ops, Dense())
    logits = made.decode(made.new_cache(Dense().plan(config, 8, *get_stores("f16"))), [3])
    assert logits.shape == (1, SHAPE.n_vocab)
    assert np.isfinite(logits).all()
    assert 0.01 < logits.std() < 100
    on_cpu = synthetic.weights_of(open_ops("cpu", 1), config, kind)
    table = synthetic.weight_bytes(config, kind) - bytes_per_token(on_cpu)
    assert 0 < table < 1.2 * synthetic.weight_bytes(config.of_layers([]), kind)


# -- timing ------------------------------------------------------------------------------------------------------------


def test_calls_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []

    def call(name: str, seconds: float) -> Any:
        def run() -> None:
            order.append(name)
            now[0] += seconds

        return run

    monkeypatch.setattr("minirt.bandwidth.paired.time.perf_counter", lambda: now[0])
    timed = paired.in_turn({"a": call("a", 0.1), "b": call("b", 0.3)}, lambda: None, 3, piece=0.2)
    assert "".join(order) == "aabb" + 3 * "aab"
    assert timed["a"].median == pytest.approx(0.1)
    assert timed["b"].record() == pytest.approx({"ms": 300, "ms_low": 300, "ms_high": 300})
    assert paired.Timed.of([1.0, 2.0, 3.0, 10.0]) == (2.5, 1.75, 4.75)


def test_shares_of_the_shape() -> None:
    assert resolve("sparq:r=d/12:k=S/12", 4096, 128) == "sparq:r=10:k=341"
    assert resolve("tova:budget=1/8", 4096, 128) == "tova:budget=1/8"
    assert resolve("sparq:r=d/200", 4096, 128) == "sparq:r=1"
    with pytest.raises(UsageError, match="S/NUMBER"):
        resolve("sparq:k=S/0", 4096, 128)


def test_attention_is_measured_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, texts = Cell(2, 200, 4, 2, 32, "f16"), ["dense", "sparq:r=d/4:k=S/10", "tova:budget=20"]
    ops, calls = open_ops("cpu", 1), []
    records = attention.measure(ops, cell, texts, rounds=2, room=ROOM, advance=lambda: calls.append(0))
    assert len(calls) == attention.stages(texts, 2)
    dense, sparq, tova = records
    assert sparq["resolved"] == "sparq:r=8:k=20"
    assert dense["bytes_read"] == dense["bytes_formula"] == 2 * 200 * 2 * 2 * 32 * 2
    assert sparq["bytes_read"] == sparq["bytes_formula"] == 2 * 2 * (200 * 8 + 2 * 20 * 32) * 2
    assert sparq["speed_up"] == dense["ms"] / sparq["ms"]
    assert tova["ratio_of_bytes"] == dense["bytes_formula"] / tova["bytes_formula"]
    assert all(0 < record["error"] < 1e-3 for record in records)


def no_newest(attend: Any, ops: Any, q: Any, kv: Any, first: Any, stop: Any) -> Any:
    return attend(ops, q, kv, first, stop - np.int32(1))


def no_last_head(attend: Any, *args: Any) -> Any:
    out = attend(*args).copy()
    out[-1, -1] = 0.0
    return out


@pytest.mark.parametrize("wrong", [no_newest, no_last_head])
def test_what_is_wrong_is_not_measured(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a row of many, or a head."""
    ops = open_ops("cpu", 1)
    right = type(ops).attend
    monkeypatch.setattr(type(ops), "attend", lambda *args: wrong(right, *args))
    with pytest.raises(ModelError, match=r"B=16 S=4096 4/2x32 f16, dense: the result is off by"):
        attention.measure(ops, Cell(16, 4096, 4, 2, 32, "f16"), ["dense"], rounds=1, room=ROOM)


def test_rows_are_counted_that_are_read() -> None:
    """By a policy that finds out how many."""
    texts = ["dense", "sparq:r=8:k=auto:most=100:local=4"]
    cell, ops = Cell(2, 300, 4, 2, 32, "f16"), open_ops("cpu", 1)
    auto = attention.measure(ops, cell, texts, rounds=1, room=ROOM)[1]
    assert auto["bytes_formula"] == auto["bytes_read"] < 2 * 2 * (300 * 8 + 2 * 100 * 32) * 2
    config, work = synthetic.config_of(SHAPE), models.Workload(2, 300, "f16", 1, 1)
    decoder = Decoder(config, synthetic.weights_of(ops, config, "Q8_0"), ops, Dense())
    policy = parse_policy(texts[1])
    most = 2 * policy.bytes_read(config, policy.plan(config, work.n_ctx, *get_stores("f16")), 300)
    assert 0 < models.measure(decoder, work, texts, room=ROOM)[1]["kv_bytes"] < most
    records = throughput.measure(decoder, work, texts, room=ROOM, most=4)
    assert 0 < records[1]["bytes_read"] - bytes_per_token(decoder.weights) < most


def test_what_does_not_fit_is_told_before_it_is_allocated(decoder: Decoder) -> None:
    with pytest.raises(caches.NoRoom, match=r"B=1 S=16777216 4/2x32 f16: the caches need 4\.0 GiB, 1\.0 GiB are free"):
        attention.measure(ReferenceOps(), Cell(1, 1 << 24, 4, 2, 32, "f16"), ["dense"], rounds=1, room=ROOM)
    with pytest.raises(caches.NoRoom):
        models.measure(decoder, models.Workload(1, 1 << 24, "f16", 1, 1), ["dense"], room=ROOM)
    with pytest.raises(caches.NoRoom):
        throughput.measure(decoder, models.Workload(64, 1 << 20, "f16", 1, 1), ["dense"], room=ROOM, most=64)


def test_a_model_of_some_layers_stands_for_all(decoder: Decoder) -> None:
    work, texts, calls = models.Workload(2, 100, "f16", 2, 3), ["dense", "sparq:r=8:k=16", "window:budget=16"], []
    records = models.measure(decoder, work, texts, room=ROOM, full_layers=10, advance=lambda: calls.append(0))
    assert len(calls) == models.stages(texts, 3)
    dense, sparq, _ = records
    none, weights = dense["ms_without_layers"], dense["weight_bytes"]
    assert dense["full_ms"] == pytest.approx(none + 5 * (dense["ms"] - none))
    assert dense["kv_bytes"] == 2 * 2 * 100 * 2 * 2 * 32 * 2  # sequences, layers, tokens, K and V, heads, d, bytes
    assert sparq["theory"] == (weights + dense["kv_bytes"]) / (weights + sparq["kv_bytes"])
    assert sparq["full_theory"] > sparq["theory"] > 1
    assert sparq["speed_up"] == pytest.approx(dense["ms"] / sparq["ms"])
    assert sparq["full_speed_up"] == pytest.approx(dense["full_ms"] / sparq["full_ms"])
    assert dense["tokens_per_second"] == pytest.approx(2e3 / dense["ms"])


def test_a_text_is_read_by_the_model(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(Decoder, "prefill", lambda self, cache, tokens, seq, logits: read.extend(tokens))
    work = models.Workload(1, 20, "f16", 1, 1)
    models.measure(decoder, work, ["dense"], room=ROOM, context=list(range(20)))
    assert read == list(range(20))


def test_the_same_memory_holds_more_sequences_of_a_small_cache(decoder: Decoder) -> None:
    work, texts = models.Workload(2, 100, "f16", 1, 1), ["dense", "window:budget=10", "sparq:r=8:k=16"]
    records = throughput.measure(decoder, work, texts, room=ROOM, most=16)
    found = {(r["same"], r["policy"]): r for r in records}
    assert {key: r["n_sequences"] for key, r in found.items()} == {
        ("batch", "dense"): 2, ("batch", texts[1]): 2, ("batch", texts[2]): 2,
        ("memory", "dense"): 2, ("memory", texts[1]): 16, ("memory", texts[2]): 1,
    }  # fmt: skip
    assert found["memory", texts[1]]["cache_bytes"] <= found["memory", "dense"]["cache_bytes"]
    window, dense = found["memory", texts[1]], found["memory", "dense"]
    assert window["tokens_per_second"] == pytest.approx(16e3 / window["ms"])
    assert window["speed_up"] == pytest.approx(window["tokens_per_second"] / dense["tokens_per_second"])


# -- the command -------------------------------------------------------------------------------------------------------

ALONE = ("bandwidth", "attention", "--device", "reference", "--heads", "4/2x32", "--rounds", 1)
ATTENTION = (*ALONE, "-d", "40,60")
POLICIES = ("--policy", "sparq:r=8:k=S/4")


def test_a_grid_is_printed_and_kept_and_not_measured_again(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    first = cli(*ATTENTION, *POLICIES, "--save", file)
    assert first.exit_code == 0, first.stderr
    assert [line.split("|")[3].strip() for line in first.stdout.splitlines()] == ["S", "-----:", "40", "40", "60", "60"]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["depth"], r["policy"]) for r in rows] == [(s, p) for s in (40, 60) for p in ("dense", POLICIES[1])]
    assert {"commit", "versions", "date", "os", "seed", "memory_bytes_per_second"} <= rows[0].keys()
    with file.open("a") as half:
        half.write('{"benchmark": "attent')  # killed while it wrote
    monkeypatch.setattr("minirt.bandwidth.attention.measure", lambda *a, **b: pytest.fail("measured again"))
    again = cli(*ATTENTION, *POLICIES, "--save", file)
    assert again.stdout == first.stdout
    assert len(file.read_text().splitlines()) == 4


def test_other_settings_are_measured_anew(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "a.jsonl", tmp_path / "other" / tiny.name
    other.parent.mkdir()
    other.write_bytes(tiny.read_bytes() + b"0")
    flags = ("--device", "reference", "-d", 16, "--rounds", 1, "--policy", "window:budget=8", "--save", file)
    end_to_end, throughput = ("bandwidth", "end-to-end", *flags), ("bandwidth", "throughput", *flags, "-b", 1)
    for model, command, n in (
        (tiny, (*end_to_end, "--steps", 1), 2), (tiny, (*end_to_end, "--steps", 2), 4),
        (other, (*end_to_end, "--steps", 2), 6), (tiny, (*throughput, "--most", 1), 10),
        (tiny, (*throughput, "--most", 2), 14), (tiny, (*throughput, "--most", 1), 14), (other, end_to_end, 16),
    ):  # fmt: skip
        result = cli(*command, model)
        assert result.exit_code == 0, result.stderr
        assert len(file.read_text().splitlines()) == n


def test_policies_that_were_not_measured_in_turn_are_no_cell(cli: Cli, tmp_path: Path) -> None:
    """Each is known, but beside another run of dense attention."""
    file = tmp_path / "a.jsonl"
    flags = ("attention", "--device", "reference", "--heads", "1x32", "-d", 16, "--rounds", 1, "--save", file)
    first, second = "window:budget=8", "topk:k=4"
    both = f"{first},{second}"
    for policies, n in ((first, 2), (second, 3), (both, 6), (both, 6), (second, 6)):
        if n == 3:  # as if dense attention had not been measured with the first one
            rows = file.read_text().splitlines()
            file.write_text(rows[1] + "\n")
        result = cli("bandwidth", *flags, "--policy", policies)
        assert result.exit_code == 0, result.stderr
        assert len(file.read_text().splitlines()) == n


def test_the_tool_says_what_is_wrong_in_a_line() -> None:
    tool = Path(__file__).parents[1] / "tools" / "bandwidth.py"
    command = [sys.executable, tool, "attention", "--policy", "nosuch"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, "unknown policy" in only_line(result.stderr)) == (2, True)


def test_rows_of_before_their_settings_were_kept_count_as_the_default(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes((RESULTS / "bandwidth_xeon.jsonl").read_bytes())
    with Rows(file) as rows:
        for row in list(rows.rows.values()):
            assert rows.find(**Rows.defaults | row) is row
            assert rows.find(**Rows.defaults | row | {"fingerprint": "another"}) is None


def test_ctrl_c_keeps_what_is_done(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls, file = attention.measure, iter(range(9)), tmp_path / "a.jsonl"

    def interrupted(*args: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return own(*args, **options)

    monkeypatch.setattr("minirt.bandwidth.attention.measure", interrupted)
    result = cli(*ATTENTION, *POLICIES, "--save", file, "-o", "json")
    assert result.exit_code == 130
    assert [r["depth"] for r in json.loads(result.stdout)] == [40, 40]
    assert len(file.read_text().splitlines()) == 2


def test_a_cell_without_room_is_skipped(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minirt.bandwidth.grid.available_memory", lambda: 24000)
    result = cli(*ATTENTION, *POLICIES)
    assert result.exit_code == 0
    assert [line.split("|")[3].strip() for line in result.stdout.splitlines()[2:]] == []
    assert result.stderr.count("minirt: skipped: B=1 S=") == 2


def test_a_policy_is_left_out_of_cells_that_it_does_not_fit(cli: Cli) -> None:
    result = cli(*ALONE, "-d", "16,40", "--policy", "topk:k=20,window:budget=8", "-o", "jsonl")
    assert result.exit_code == 0, result.stderr
    rows = [(r["depth"], r["policy"]) for r in map(json.loads, result.stdout.splitlines())]
    both = ("dense", "topk:k=20", "window:budget=8")
    assert rows == [*((16, policy) for policy in both if "topk" not in policy), *((40, policy) for policy in both)]
    line = "minirt: skipped: B=1 S=16 4/2x32 f16, topk:k=20: --k 20 is out of range (1 to 16, the context)"
    assert line in result.stderr.splitlines()


def test_results_of_another_commit_are_told(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    monkeypatch.setattr("minirt.bandwidth.grid.commit", lambda: "0000001")
    assert "not measured again" not in cli(*ALONE, *POLICIES, "--save", file, "-d", 40).stderr
    monkeypatch.setattr("minirt.bandwidth.grid.commit", lambda: "0000002")
    result = cli(*ATTENTION, *POLICIES, "--save", file)
    assert f"minirt: {file}: results of commit 0000001 are not measured again" in result.stderr.splitlines()
    assert [json.loads(row)["commit"] for row in file.read_text().splitlines()] == 2 * ["0000001"] + 2 * ["0000002"]


def test_what_is_skipped_takes_no_time() -> None:
    cells = [SimpleNamespace(batch=1, depth=depth, stages=4) for depth in (100, 100_000)]
    clock = _Clock(cells)
    for _ in range(2):
        clock.advance(cells[0])
    clock.end(cells[1])
    assert (clock.n, clock.total, clock.cost) == (2, 4, 2 * clock.done)
    clock.end(cells[0])
    assert (clock.total, clock.cost) == (2, clock.done)


def test_a_cell_that_runs_out_of_memory_is_skipped(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    own = attention.measure

    def measure(ops: Any, cell: Cell, *args: Any, **options: Any) -> Any:
        if cell.depth == 40:
            raise MemoryError
        return own(ops, cell, *args, **options)

    monkeypatch.setattr("minirt.bandwidth.attention.measure", measure)
    result = cli(*ATTENTION, *POLICIES)
    assert result.exit_code == 0
    assert [line.split("|")[3].strip() for line in result.stdout.splitlines()[2:]] == ["60", "60"]
    assert "minirt: skipped: attention, 4/2x32, B=1, S=40, f16: out of memory" in result.stderr


def test_whole_models_of_a_file_and_of_a_shape(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    flags = (
        "--device",
        "reference",
        "-d",
        24,
        "--rounds",
        1,
        "--policy",
        "sparq:r=4:k=8,window:budget=8",
        "-o",
        "jsonl",
    )
    text = tmp_path / "t.txt"
    text.write_text("a word and another " * 40)
    for result in (
        cli("bandwidth", "end-to-end", tiny, *flags),
        cli("bandwidth", "end-to-end", tiny, *flags, "--text", text),
        cli("bandwidth", "end-to-end", "--shape", "tiny", "--layers", 1, "--type", "F16", *flags),
    ):
        assert result.exit_code == 0, result.stderr
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert [r["policy"] for r in rows] == ["dense", "sparq:r=4:k=8", "window:budget=8"]
    assert (rows[0]["layers"], rows[0]["full_layers"]) == (1, 2)
    assert rows[0]["model"] == "tiny F16, 1 layers"
    result = cli("bandwidth", "throughput", tiny, *flags, "-b", 1)
    assert [json.loads(line)["same"] for line in result.stdout.splitlines()] == 3 * ["batch"] + 3 * ["memory"]


def test_alone_it_says_what_there_is(cli: Cli) -> None:
    result = cli("bandwidth")
    assert result.exit_code == 0
    assert "end-to-end  The time of a token of a whole model." in result.stdout


def test_the_machine(cli: Cli) -> None:
    rows = [json.loads(line) for line in cli("bandwidth", "machine", "-t", "1,2", "-o", "jsonl").stdout.splitlines()]
    assert [r["threads"] for r in rows] == [1, 2]
    assert all(r["read_bytes_per_second"] > 0 and r["copy_bytes_per_second"] > 0 for r in rows)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--heads", "32"), 2, "not N/KVxD"),
        (("--heads", "32/5x64"), 2, "a divisor"),
        (("--heads", "4x31"), 2, "an even size"),
        (("--policy", "sparq:r=d/0"), 2, "d/NUMBER"),
        (("--policy", "sparq:r=33"), 2, "--r 33 is out of range"),
        (("--policy", "sparq:k=100"), 2, "--k 100 is out of range"),
        (("--policy", "nosuch"), 2, "unknown policy"),
        (("--kv", "palu"), 2, "minirt palu"),
        (("-d", "1"), 2, "out of range"),
        (("--rounds", "0"), 2, "range"),
        (("--device", "tpu"), 2, "unknown device"),
        (("--save", "/nowhere/a.jsonl"), 1, "cannot write"),
        (("--save", "/dev/full"), 1, "not a regular file"),
    ],
)
def test_wrong_flags_of_attention(cli: Cli, flags: tuple[str, ...], code: int, message: str) -> None:
    result = cli(*ATTENTION, *POLICIES, *flags)
    assert result.exit_code == code
    assert message in only_line(result.stderr)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--shape", "tiny", "model.gguf"), "--shape goes without a MODEL"),
        (("--shape", "nosuch"), "unknown shape 'nosuch'"),
        (("--shape", "tiny", "--type", "Q2_K"), "--type Q2_K is not one of"),
        (("--layers", "2"), "--layers goes with --shape"),
        (("--shape", "tiny", "--text", "README.md"), "--text goes with a MODEL"),
    ],
)
def test_wrong_flags_of_models(cli: Cli, flags: tuple[str, ...], message: str) -> None:
    result = cli("bandwidth", "end-to-end", *flags)
    assert result.exit_code == 2
    assert message in only_line(result.stderr)


def test_a_text_that_is_too_short(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("few words")
    result = cli("bandwidth", "end-to-end", tiny, "--device", "reference", "-d", 100, "--text", text)
    assert (result.exit_code, "tokens, and the context shall have 100" in only_line(result.stderr)) == (1, True)


def test_weights_that_do_not_fit(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minirt.bandwidth.grid.available_memory", lambda: 1 << 30)
    result = cli("bandwidth", "end-to-end", "--shape", "7b", "--device", "reference")
    assert (result.exit_code, "the weights need 6.7 GiB, 0.9 GiB are free" in only_line(result.stderr)) == (1, True)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"benchmark": 1}\n')
    with pytest.raises(ModelError, match="line 1 is no result of minirt bandwidth"):
        Rows(file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ms_low", None), ("gb_per_s", "x"), ("speed_up", float("nan")), ("ratio_of_bytes", 0), ("ms", 10**400),
        ("bytes_read", [1]), ("policy", 3), ("benchmark", "machine"), ("batch", "1"),
    ],
)  # fmt: skip
def test_a_damaged_row_is_refused(cli: Cli, tmp_path: Path, field: str, value: Any) -> None:
    file = tmp_path / "a.jsonl"
    assert cli(*ATTENTION, *POLICIES, "--save", file).exit_code == 0
    first, *others = file.read_text().splitlines()
    row = json.loads(first)
    del row[field]
    file.write_text("\n".join([*others, json.dumps(row | ({} if value is None else {field: value}))]) + "\n")
    result = cli(*ATTENTION, *POLICIES, "--save", file)
    assert (result.exit_code, "line 4 is no result of minirt bandwidth" in only_line(result.stderr)) == (1, True)
