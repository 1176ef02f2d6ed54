"""`minirt bench`: how fast a model runs here, in the words of llama-bench."""

from __future__ import annotations

import itertools
import re

import click

from ..errors import UsageError
from ..progress import Progress
from .bench_output import FORMATS, open_output
from .number_lists import MAX_NUMBER, list_option, numbers, usable_cpus
from .options import KV_DEFAULT, KV_HELP, Engine
from .policy_flags import PolicyCommand


def _positive(ctx: click.Context, option: click.Parameter, value: int) -> int:
    if not 1 <= value <= MAX_NUMBER:
        raise click.BadParameter(f"{value} is out of range (1 to {MAX_NUMBER}).")
    return value


def _pairs(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> list[tuple[int, int]]:
    out = []
    for value in values:
        match = re.fullmatch(r"\s*(\d{1,8}),\s*(\d{1,8})\s*", value, re.ASCII)
        if match is None or max(int(match[1]), int(match[2])) > MAX_NUMBER:
            raise click.BadParameter(f"'{value}' is not two numbers such as 512,128.")
        out.append((int(match[1]), int(match[2])))
    return out


def _names(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> list[str]:
    return [name.strip() for value in values for name in value.split(",")]


@click.command(
    cls=PolicyCommand,
    epilog="""\b
Examples:
  minirt bench
  minirt bench a.gguf b.gguf -p 512 -n 128 -r 3
  minirt bench model.gguf -p 0 -n 64 -d 0,1024,4096 -t 1,2
  minirt bench model.gguf -p 0 -n 32 -b 1-8*2 -o jsonl > speed.jsonl
  minirt bench -p 0 -n 32 -d 4096 --policy dense,sparq:r=16:k=64,tova:budget=512
  minirt bench -p 0 -n 32 -d 4096 --policy streaming --sinks 4 --recent 508
""",
)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@list_option("-p --n-prompt prompts", "512", "Prompt processing, N tokens (pp); 0: none.", numbers(0))
@list_option("-n --n-gen gens", "128", "Text generation, N tokens (tg); 0: none.", numbers(0))
@list_option("-pg pairs", "", "A prompt and its answer together, timed as one.", _pairs, metavar="PP,TG")
@list_option("-d --n-depth depths", "0", "Tokens in the context before the test begins.", numbers(0))
@list_option(
    "-b --batch sequences", "1", "Sequences that are generated together, a token of each per step.", numbers(1)
)
@list_option("-t --threads", "", "CPU threads.", numbers(1, usable_cpus), "physical cores")
@list_option(
    "--policy policies",
    "dense",
    "Which cached tokens are kept and read, also as NAME:r=16.",
    _names,
    metavar="NAME,...",
)
@list_option(
    "--kv kvs",
    "auto",
    KV_HELP,
    _names,
    KV_DEFAULT,
    metavar="TYPE,...",
)
@click.option(
    "--device", default="auto", metavar="NAME",
    help="auto, cpu, gpu, or reference (NumPy: slow, exact).  [default: auto]",
)  # fmt: skip
@click.option(
    "-r", "--repetitions", type=int, default=5, metavar="N", callback=_positive,
    help="Runs of each test that count.  [default: 5]",
)  # fmt: skip
@click.option("--no-warmup", is_flag=True, help="Leave out the run of each test that does not count.")
@click.option(
    "-o", "--output", type=click.Choice(list(FORMATS)), default="md", metavar="FORMAT",
    help="md, csv, json or jsonl.  [default: md]",
)  # fmt: skip
def bench(
    models: tuple[str, ...],
    prompts: list[int],
    gens: list[int],
    pairs: list[tuple[int, int]],
    depths: list[int],
    sequences: list[int],
    threads: list[int],
    policies: list[str],
    flags: list[tuple[str, str]],
    kvs: list[str],
    device: str,
    repetitions: int,
    no_warmup: bool,
    output: str,
) -> None:
    """Measures how fast models run on this machine.

    Flags, tests and figures are llama-bench's, save -b. Each flag with N,... takes several values, also as ranges
    (1-8, 0-4096+1024, 1-64*2), and may be repeated; every combination is tested. A test is run once to warm up, then
    -r times; t/s is mean ± standard deviation, all sequences together. Neither tokenising nor sampling is timed.

    GB/s: the weights and the cache that text generation had to read. The last column is its share of what the same
    threads read from memory, measured just before; it can exceed 100 % if a model fits the processor's caches.
    """
    from ..bench import all_workloads, by_weights, check_room, measure, memory_bandwidth, record
    from ..devices import physical_cores
    from ..llama import MIN_CONTEXT, default_model_path
    from ..policies import parse_policy

    if flags and len(policies) > 1:
        raise UsageError("flags of a policy go with one --policy; of several each has its own: sparq:r=16,topk:k=64")
    chosen = [parse_policy(policy, flags) for policy in policies]
    workloads = all_workloads(prompts, gens, pairs, depths, sequences)
    if not workloads:
        raise UsageError("nothing to measure: -p and -n are 0")
    paths = models or (str(default_model_path()),)
    for path in paths:
        check_room(path, workloads, chosen, kvs)
    types = {path: by_weights(path, kvs) for path in paths}
    kv_shown = any(of_file != [["f16"]] for of_file in types.values())
    shown = {"policy": policies != ["dense"], "kv": kv_shown, "batch": sequences != [1]}
    columns, width = {name for name, wanted in shown.items() if wanted}, max(len(str(policy)) for policy in chosen)
    with open_output(output, columns, width) as write:
        loads = ((path, kvs) for path in paths for kvs in types[path])
        for (path, kvs), n_threads in itertools.product(loads, threads or (physical_cores(),)):
            with Engine("dense", kvs[0], device, n_threads, MIN_CONTEXT).load(path) as llama:
                with Progress("compiling kernels"):
                    for policy in chosen:
                        llama.warm_up(policy)
                with Progress("measuring memory bandwidth"):
                    limit = memory_bandwidth(llama.decoder.ops, n_threads)
                for policy, kv, workload in itertools.product(chosen, kvs, workloads):
                    with Progress(f"measuring {workload}, {policy}", " tokens") as progress:
                        result = measure(
                            llama,
                            workload,
                            policy=policy,
                            kv=kv,
                            repetitions=repetitions,
                            warmup=not no_warmup,
                            progress=progress,
                        )
                    write(record(llama, result, limit, n_threads))
