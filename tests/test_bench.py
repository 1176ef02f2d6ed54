"""The benchmark: what is timed and what is not, llama-bench's lists and fields, and every wrong flag in one line."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cli, only_line

from minirt import Llama, UsageError
from minirt.bandwidth import available_memory, read_bandwidth
from minirt.bench import Result, Workload, all_workloads, check_room, measure, record
from minirt.cache import Cache
from minirt.cli.number_lists import expand
from minirt.llama import bytes_per_token
from minirt.policies.dense import Dense

# llama-bench's fields that apply here, in its order
FIELDS = [
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename", "model_type", "model_size",
    "model_n_params", "n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "n_prompt", "n_gen", "n_depth",
    "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts",
]  # fmt: skip
OWN_FIELDS = [
    "policy", "policy_name", "policy_parameters", "n_sequences", "bytes_per_token", "weight_bytes_per_token",
    "kv_bytes_per_token", "bytes_per_second", "memory_bytes_per_second", "percent_of_memory",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minirt.bandwidth.memory.BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr("minirt.bandwidth.memory.READ_SECONDS", 0.0)


@pytest.fixture(scope="module")
def llama(tiny: Path) -> Iterator[Llama]:
    with Llama.load(tiny, device="reference", n_ctx=8) as model:
        yield model


# -- what is measured --------------------------------------------------------------------------------------------------


def test_workloads_in_the_order_and_with_the_names_of_llama_bench() -> None:
    found = all_workloads([512, 0], [128], [(64, 32), (0, 0)], [0, 4096], [1, 4])
    assert [(w.name, w.n_sequences) for w in found] == [
        ("pp512", 1), ("tg128", 1), ("tg128", 4), ("pp64+tg32", 1), ("pp64+tg32", 4),
        ("pp512 @ d4096", 1), ("tg128 @ d4096", 1), ("tg128 @ d4096", 4),
        ("pp64+tg32 @ d4096", 1), ("pp64+tg32 @ d4096", 4),
    ]  # fmt: skip
    assert found[4].n_tokens == 4 * 96
    assert found[-1].n_ctx == 4096 + 96
    assert all_workloads([0], [0]) == []


@dataclass(frozen=True)
class Recorder(Dense):
    """Dense attention that notes what each call found in the cache; a rewind can keep `most` tokens."""

    events: list[Any] = field(default_factory=list)
    most: int = 1 << 20

    def prefill(self, ops: Any, cache: Cache, layer: int, seq: int, q: Any, k: Any, v: Any) -> Any:
        if layer == 0:
            self.events.append(("prefill", seq, int(cache.n_seen[seq]), len(k)))
        return super().prefill(ops, cache, layer, seq, q, k, v)

    def attend(self, ops: Any, cache: Cache, layer: int, q: Any, k: Any, v: Any) -> Any:
        if layer == 0:
            self.events.append(("decode", *cache.n_seen.tolist()))
        return super().attend(ops, cache, layer, q, k, v)

    def rewind(self, ops: Any, cache: Cache, seq: int, n: int) -> int:
        assert n <= cache.n_seen[seq], "tokens that are not there cannot be kept"
        return super().rewind(ops, cache, seq, min(n, self.most))


class Clock:
    """Notes each look at the clock among the events; a second passes from one to the next."""

    def __init__(self, events: list[Any]):
        self.events, self.seconds = events, itertools.count()

    def perf_counter_ns(self) -> int:
        self.events.append("clock")
        return next(self.seconds) * 10**9

    def strftime(self, *_: object) -> str:
        return "now"

    def gmtime(self) -> None: ...


@pytest.fixture
def events(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens in `measure`, with a Recorder; its `most` may be given by indirect parametrisation."""
    policy = Recorder(most=getattr(request, "param", Recorder.most))
    monkeypatch.setattr("minirt.bench.parse_policy", lambda name: policy)
    monkeypatch.setattr("minirt.bench.time", Clock(policy.events))
    return policy.events


FILL = [("prefill", 0, 0, 5), ("prefill", 1, 0, 5)]
STEPS = ["clock", ("decode", 5, 5), ("decode", 6, 6), "clock"]


def test_steps_begin_at_the_depth_which_is_filled_once_and_not_timed(llama: Llama, events: list[Any]) -> None:
    result = measure(llama, Workload(n_gen=2, n_depth=5, n_sequences=2), repetitions=2)
    assert events == FILL + 3 * STEPS
    assert result.samples_ns == (10**9, 10**9), "the warm-up is not among them"
    assert result.avg_ts == 4.0, "2 steps of 2 sequences in a second"


def test_without_warm_up(llama: Llama, events: list[Any]) -> None:
    result = measure(llama, Workload(n_gen=2, n_depth=5, n_sequences=2), repetitions=2, warmup=False)
    assert events == FILL + 2 * STEPS
    assert len(result.samples_ns) == 2


@pytest.mark.parametrize("events", [0], indirect=True)
def test_a_policy_that_cannot_rewind_is_filled_again(llama: Llama, events: list[Any]) -> None:
    measure(llama, Workload(n_gen=2, n_depth=5, n_sequences=2), repetitions=2)
    assert events == 3 * (FILL + STEPS)


@pytest.mark.parametrize("events", [3], indirect=True)
def test_a_policy_that_keeps_a_part_is_filled_from_there(llama: Llama, events: list[Any]) -> None:
    measure(llama, Workload(n_gen=1, n_depth=5), repetitions=1)
    run = ["clock", ("decode", 5), "clock"]
    assert events == [("prefill", 0, 0, 5), *run, ("prefill", 0, 3, 2), *run]


def test_prompts_go_in_chunks(llama: Llama, events: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minirt.session.PREFILL_CHUNK", 8)
    result = measure(llama, Workload(n_prompt=10, n_depth=9), repetitions=1, warmup=False)
    fill, run = [("prefill", 0, 0, 8), ("prefill", 0, 8, 1)], [("prefill", 0, 9, 8), ("prefill", 0, 17, 2)]
    assert events == [*fill, "clock", *run, "clock"]
    assert (result.avg_ts, result.bytes_per_token, result.bytes_per_second) == (10.0, None, None)


def test_a_prompt_and_its_answer_for_each_sequence(llama: Llama, events: list[Any]) -> None:
    result = measure(llama, Workload(n_prompt=3, n_gen=1, n_sequences=2), repetitions=1, warmup=False)
    assert events == ["clock", ("prefill", 0, 0, 3), ("prefill", 1, 0, 3), ("decode", 3, 3), "clock"]
    assert result.avg_ts == 8.0


def test_the_model_session_is_left_alone(llama: Llama) -> None:
    llama.session.feed([1, 2, 3])
    measure(llama, Workload(n_gen=2, n_depth=4), kv="f32", repetitions=1)
    assert llama.session.tokens == [1, 2, 3]
    assert llama.session.cache.n_seen.tolist() == [3]


def test_bytes_are_shared_weights_and_own_cache(llama: Llama) -> None:
    c, weights = llama.config, bytes_per_token(llama.decoder.weights)
    row = 2 * c.n_layer * c.n_head_kv * c.head_dim * 2  # K and V in float16
    result = measure(llama, Workload(n_gen=3, n_depth=10, n_sequences=2), repetitions=1)
    assert result.weight_bytes_per_token == weights / 2
    assert result.kv_bytes_per_token == row * (11 + 12 + 13) / 3
    assert result.bytes_per_token == weights / 2 + row * 12
    assert result.bytes_per_second == pytest.approx(result.bytes_per_token * result.avg_ts)
    wide = measure(llama, Workload(n_gen=3, n_depth=10, n_sequences=2), kv="f32", repetitions=1)
    assert wide.kv_bytes_per_token == 2 * result.kv_bytes_per_token


def test_mean_and_deviation_of_the_samples(llama: Llama) -> None:
    result = Result(Workload(n_gen=10), "dense", "f16", "now", (10**9, 2 * 10**9, 5 * 10**9), 60.0, 40.0)
    assert result.samples_ts == [10.0, 5.0, 2.0]
    assert result.avg_ts == pytest.approx(17 / 3)
    assert result.stddev_ts == pytest.approx(np.std([10.0, 5.0, 2.0], ddof=1))
    facts = record(llama, result, 2000.0)
    assert facts["avg_ns"] == 2_666_666_667
    assert facts["bytes_per_second"] == pytest.approx(100 * 17 / 3)
    assert facts["percent_of_memory"] == pytest.approx(100 * 100 * 17 / 3 / 2000)
    assert record(llama, result)["percent_of_memory"] is None
    assert Result(Workload(n_gen=1), "dense", "f16", "now", (5,), 1.0, 1.0).stddev_ts == 0.0


def test_progress_counts_tokens_to_the_end(llama: Llama) -> None:
    heard: list[tuple[int, int]] = []
    measure(
        llama, Workload(n_gen=2, n_depth=5, n_sequences=2), repetitions=2, progress=lambda *counts: heard.append(counts)
    )
    assert heard == [(5, 22), (10, 22), (14, 22), (18, 22), (22, 22)]


def test_what_cannot_fit_is_found_before_it_is_tried(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_room(tiny, [Workload(n_gen=8)], ["dense"], ["f16", "f32"])
    with pytest.raises(UsageError, match=r"tg8 @ d16000000, 9999 sequences: the KV cache needs .* GiB"):
        check_room(tiny, [Workload(n_gen=8, n_depth=16_000_000, n_sequences=9999)], ["dense"], ["f16"])
    monkeypatch.setattr("minirt.bench.available_memory", lambda: 1 << 20)
    with pytest.raises(UsageError, match="free"):
        check_room(tiny, [Workload(n_gen=8, n_depth=4096)], ["dense"], ["f16"])


def test_a_policy_that_does_not_fit_is_found_before_it_is_tried(tiny: Path) -> None:
    check_room(tiny, [Workload(n_gen=32)], ["sparq:r=16:k=32", "tova:budget=1/4"], ["f16"])
    for policy, message in (("sparq:r=4:k=33", "--k 33"), ("topk", "--k 128"), ("h2o:budget=1/8", "--budget 1/8")):
        with pytest.raises(UsageError, match=f"tg32: {message}.* is out of range"):
            check_room(tiny, [Workload(n_gen=64, n_depth=99), Workload(n_gen=32)], [policy], ["f16"])


@pytest.mark.parametrize("policy", ["window:budget=8", "tova:budget=8", "d2o:budget=8:sinks=1"])
def test_a_bounded_policy_reads_no_more_at_depth(llama: Llama, policy: str) -> None:
    near, far = (measure(llama, Workload(n_gen=2, n_depth=n), policy=policy, repetitions=2) for n in (20, 200))
    assert near.kv_bytes_per_token == far.kv_bytes_per_token
    dense = measure(llama, Workload(n_gen=2, n_depth=200), repetitions=1)
    assert far.kv_bytes_per_token is not None
    assert dense.kv_bytes_per_token is not None
    assert far.kv_bytes_per_token < dense.kv_bytes_per_token / 10
    assert far.policy == policy


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("threads", [1, 2])
def test_bandwidth_is_a_positive_number(device: str, threads: int) -> None:
    assert read_bandwidth(threads, device) > 0
    assert available_memory() > 0


# -- lists -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("512", [512]),
        ("0", [0]),
        ("128,256, 64", [128, 256, 64]),
        ("1-4", [1, 2, 3, 4]),
        ("3-3", [3]),
        ("0-4096+1024", [0, 1024, 2048, 3072, 4096]),
        ("1-10+4", [1, 5, 9]),
        ("1-64*2", [1, 2, 4, 8, 16, 32, 64]),
        ("16,1-3,8-40*4", [16, 1, 2, 3, 8, 32]),
    ],
)
def test_lists_and_ranges(text: str, numbers: list[int]) -> None:
    assert list(expand(text)) == numbers


WRONG_LISTS = [
    "", ",", "1,,2", "1,", "x", "-1", "1.5", "1e3", "4-1", "1-", "1-4+", "1-4+0", "1-4*1", "0-8*2", "1-4/2", "1*2", "²",
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG_LISTS)
def test_wrong_lists(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        list(expand(text))


# -- the command -------------------------------------------------------------------------------------------------------

SMALL = ("--device", "reference", "-r", 2, "-p", 4, "-n", 3)


def test_a_table_like_that_of_llama_bench(cli: Cli, tiny: Path) -> None:
    result = cli("bench", tiny, *SMALL, "-d", "0,6")
    assert result.exit_code == 0, result.stderr
    head, rule, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in result.stdout.splitlines()]
    assert head == ["model", "size", "params", "backend", "threads", "test", "t/s", "GB/s", "% of bandwidth"]
    assert all(set(cell) <= {"-", ":"} for cell in rule)
    assert [row[5] for row in rows] == ["pp4", "tg3", "pp4 @ d6", "tg3 @ d6"]
    assert {(row[0], row[3]) for row in rows} == {("llama 91K Q8_0", "reference")}
    assert all(len(row[6].split(" ± ")) == 2 for row in rows)
    assert [bool(row[7]) and bool(row[8]) for row in rows] == [False, True, False, True]
    assert len({len(line) for line in result.stdout.splitlines()}) == 1


def test_columns_appear_with_their_flags(cli: Cli, tiny: Path) -> None:
    flags = ("-b", "1,2", "--kv", "f16,f32", "--policy", "dense,dense", "-p", 0)
    lines = cli("bench", tiny, "--device", "reference", "-r", 1, "-n", 2, *flags).stdout.splitlines()
    head, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    found = [tuple(row[head.index(name)] for name in ("policy", "kv", "batch", "test")) for row in rows]
    assert found == 2 * [("dense", kv, b, "tg2") for kv in ("f16", "f32") for b in ("1", "2")]


POLICIES = "dense,sparq:r=4:k=16,lm-infinite:recent=20:sinks=3:limit=10,tova:budget=1/4"


def test_policies_side_by_side(cli: Cli, tiny: Path) -> None:
    flags = ("--device", "reference", "-r", 1, "-p", 0, "-n", 2, "-d", 62, "--policy", POLICIES)
    lines = cli("bench", tiny, *flags).stdout.splitlines()
    assert len({len(line) for line in lines}) == 1, "a long policy widens its column"
    head, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    specs = ["dense", "sparq:r=4:k=16", "lm-infinite:sinks=3:recent=20:limit=10", "tova:budget=1/4"]
    assert [row[head.index("policy")] for row in rows] == specs
    records = json.loads(cli("bench", tiny, *flags, "-o", "json").stdout)
    assert [r["policy"] for r in records] == specs
    assert [r["policy_name"] for r in records] == ["dense", "sparq", "lm-infinite", "tova"]
    assert records[0]["policy_parameters"] == {}
    assert records[1]["policy_parameters"] == {
        "r": 4, "k": 16, "eps": None, "most": None, "local": None, "dense_until": None, "reallocate": "auto",
        "gqa": "sum-prob", "k_index": "f16",
    }  # fmt: skip
    assert records[3]["policy_parameters"] == {"budget": "1/4", "compress": "oneshot", "per": "layer"}


def test_flags_go_with_one_policy(cli: Cli, tiny: Path) -> None:
    flags = ("bench", tiny, "--device", "reference", "-r", 1, "-p", 0, "-n", 2, "-d", 62)
    records = json.loads(cli(*flags, "--policy", "sparq:r=4", "--k", 16, "-o", "json").stdout)
    assert [r["policy"] for r in records] == ["sparq:r=4:k=16"]
    result = cli(*flags, "--policy", "sparq,topk", "--k", 16)
    assert (result.exit_code, "one --policy" in only_line(result.stderr)) == (2, True)
    result = cli(*flags, "--k", 16)
    assert (result.exit_code, "--policy dense" in only_line(result.stderr)) == (2, True)


def test_json_has_the_fields_of_llama_bench(cli: Cli, tiny: Path) -> None:
    prompt, steps = json.loads(cli("bench", tiny, *SMALL, "-d", 5, "-o", "json").stdout)
    assert list(steps) == FIELDS + OWN_FIELDS + ["samples_ns", "samples_ts"]
    assert (prompt["n_prompt"], prompt["n_gen"], prompt["n_depth"]) == (4, 0, 5)
    assert prompt["bytes_per_token"] is None
    assert (steps["n_prompt"], steps["n_gen"], steps["type_k"], steps["policy"]) == (0, 3, "f16", "dense")
    assert steps["model_filename"] == str(tiny)
    assert len(steps["samples_ns"]) == len(steps["samples_ts"]) == 2
    assert all(isinstance(ns, int) for ns in [steps["avg_ns"], steps["stddev_ns"], *steps["samples_ns"]])
    assert steps["avg_ts"] == pytest.approx(sum(steps["samples_ts"]) / 2)
    assert steps["bytes_per_token"] == steps["weight_bytes_per_token"] + steps["kv_bytes_per_token"]
    assert steps["memory_bytes_per_second"] > 0


def test_csv_and_jsonl_hold_the_same_records(cli: Cli, tiny: Path) -> None:
    flags = ("--device", "reference", "-r", 1, "-p", 4, "-n", "2,3", "-n", 5, "-t", "1,2")
    lines = [json.loads(line) for line in cli("bench", tiny, *flags, "-o", "jsonl").stdout.splitlines()]
    assert [(r["n_prompt"], r["n_gen"]) for r in lines] == 2 * [(4, 0), (0, 2), (0, 3), (0, 5)]
    rows = list(csv.DictReader(cli("bench", tiny, *flags, "-o", "csv").stdout.splitlines()))
    assert list(rows[0]) == [name for name in FIELDS + OWN_FIELDS if name != "policy_parameters"]
    assert [(r["n_prompt"], r["n_gen"]) for r in rows] == [(str(r["n_prompt"]), str(r["n_gen"])) for r in lines]
    assert rows[0]["bytes_per_token"] == ""
    assert float(rows[1]["bytes_per_token"]) == lines[1]["bytes_per_token"]


def test_several_models_on_the_cpu_with_pairs(cli: Cli, tiny: Path, tiny_spm: Path) -> None:
    flags = ("-p", 0, "-n", 0, "-pg", "3,2", "-b", 2, "-r", 1, "--no-warmup", "-o", "jsonl")
    result = cli("bench", tiny, tiny_spm, "-t", 1, *flags)
    assert result.exit_code == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["model_filename"] for r in records] == [str(tiny), str(tiny_spm)]
    assert {(r["n_prompt"], r["n_gen"], r["n_sequences"], r["backends"]) for r in records} == {(3, 2, 2, "CPU")}
    assert {r["n_threads"] for r in records} == {1}


def test_a_context_beyond_the_trained_one_is_measured(cli: Cli, tiny: Path) -> None:
    result = cli("bench", tiny, "--device", "reference", "-p", 0, "-n", 2, "-d", 300, "-r", 1, "-o", "jsonl")
    assert json.loads(result.stdout)["n_depth"] == 300


@pytest.mark.parametrize("output", ["md", "csv", "json", "jsonl"])
def test_an_interrupt_keeps_what_was_measured(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    calls = iter(range(9))

    def interrupted(*args: Any, **options: Any) -> Result:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args, **options)

    monkeypatch.setattr("minirt.bench.measure", interrupted)
    result = cli("bench", tiny, *SMALL, "-d", "0,6", "-o", output)
    assert result.exit_code == 130
    lines = result.stdout.splitlines()
    if output == "json":
        assert [r["n_gen"] for r in json.loads(result.stdout)] == [0, 3]
    else:
        assert len(lines) == 2 + {"md": 2, "csv": 1, "jsonl": 0}[output]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("-p", "-1"), 2, "'-p'"),
        (("-n", "many"), 2, "'many' is not a list of numbers"),
        (("-d", ""), 2, "'-d'"),
        (("-d", "1-100000"), 2, "more than 1000 numbers"),
        (("-n", "9" * 30), 2, "out of range"),
        (("-b", "0"), 2, "0 is out of range"),
        (("-b", "1,,2"), 2, "'1,,2'"),
        (("-t", "0"), 2, "out of range"),
        (("-t", "1,10000"), 2, "10000 is out of range"),
        (("-r", "0"), 2, "out of range"),
        (("-r", "1.5"), 2, "not a valid integer"),
        (("-pg", "512"), 2, "not two numbers"),
        (("-pg", "1,99999999"), 2, "not two numbers"),
        (("-o", "xml"), 2, "'xml' is not one of"),
        (("--policy", "dense,nosuch"), 2, "unknown policy 'nosuch'"),
        (("--policy", ""), 2, "unknown policy ''"),
        (("--kv", "f16,q99"), 2, "unknown KV type 'q99'"),
        (("--device", "tpu"), 2, "unknown device 'tpu'"),
        (("-p", "0", "-n", "0"), 2, "nothing to measure"),
        (("-b", "16777216", "-d", "16777216"), 2, "GiB of memory are free"),
        (("nosuch.gguf",), 1, "nosuch.gguf"),
    ],
)
def test_wrong_flags(cli: Cli, tiny: Path, flags: tuple[str, ...], code: int, message: str) -> None:
    result = cli("bench", tiny, *flags)
    assert result.exit_code == code
    assert message in only_line(result.stderr)
    assert result.stdout == "", "found before anything is measured"


def test_help_has_examples(cli: Cli) -> None:
    assert "minirt bench" in cli("bench", "--help").stdout.partition("Examples:")[2]
