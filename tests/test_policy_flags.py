"""KV policies as users meet them: flags on every command, wrong values in one line, chats that outgrow a budget."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import Cli, only_line
from make_gguf import tiny as tiny_gguf
from test_chat import CHATML, chat, said

from minirt import Llama, ModelError, Sampling, UsageError
from minirt.cli import main
from minirt.devices import compilations
from minirt.ops import NO_POSITION
from minirt.policies import POLICIES, make_policy, parse_policy
from minirt.policies.base import flag, parameters

VERSES = Path(__file__).parent / "data" / "verses.txt"
REFERENCE = ("--device", "reference")
COMMANDS = ("chat", "run", "perplexity", "warmup", "bench")
PARAMETERS = sorted({name for policy in POLICIES.values() for name in parameters(policy)})
ALL = {
    "dense": (),
    "sparq": (
        "--r", 4, "--k", "auto", "--eps", 0.01, "--most", 8, "--local", 2, "--dense-until", 9, "--reallocate", "on",
        "--gqa", "sum-logit", "--k-index", "q4",
    ),
    "topk": ("--k", 8),
    "window": ("--budget", 8),
    "streaming": ("--sinks", 2, "--recent", 8, "--positions", "reindexed"),
    "lm-infinite": ("--sinks", 2, "--recent", 8, "--limit", 9),
    "h2o": ("--budget", "1/8", "--recent", 3, "--compress", "chunked"),
    "tova": ("--budget", "8KiB", "--per", "head", "--compress", "stepwise"),
    "d2o": ("--budget", 10, "--sinks", 2, "--recent", 3, "--beta", 0.5, "--e", 1),
    "d2o-code": ("--budget", 10, "--sinks", 2),
}  # fmt: skip


# -- the flags ---------------------------------------------------------------------------------------------------------


def test_every_policy_and_every_parameter_is_tried_here() -> None:
    assert list(ALL) == list(POLICIES)
    assert {f for flags in ALL.values() for f in flags[::2]} == {flag(name) for name in PARAMETERS}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_them_under_a_heading_of_their_own(cli: Cli, command: str) -> None:
    options, _, ours = cli(command, "--help").stdout.partition("\nKV policy:\n")
    ours = ours.partition("Examples:")[0]
    assert all(re.search(rf"^  {flag(name)} ", ours, re.MULTILINE) for name in PARAMETERS)
    assert "--policy" in ours
    assert all(name in ours for name in POLICIES)
    assert "--policy NAME" not in options
    text = " ".join(ours.split())
    assert "[sparq: 32]" in text
    assert "[streaming, d2o, d2o-code: 4; lm-infinite: 16]" in text
    assert "[window, streaming, lm-infinite, h2o, tova, d2o, d2o-code: 512]" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_no_flag_means_two_things(command: str) -> None:
    found = main.commands[command]
    params = found.get_params(click.Context(found))
    for names in ([o for p in params for o in (*p.opts, *p.secondary_opts)], [p.name for p in params]):
        assert len(set(names)) == len(names)


def loaded_policy(cli: Cli, monkeypatch: pytest.MonkeyPatch, *flags: object) -> str:
    """The policy that a model would be loaded with."""

    def load(*args: object, policy: object, **options: object) -> None:
        raise ModelError(f"policy {policy}")

    monkeypatch.setattr(Llama, "load", load)
    return only_line(cli("run", "model.gguf", "-p", "x", *flags).stderr).removeprefix("minirt: policy ")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "dense"),
        (("--policy", "sparq"), "sparq"),
        (("--policy", "sparq", "--r", 16, "--k", 64), "sparq:r=16:k=64"),
        (("--policy", "sparq:r=16:k=64"), "sparq:r=16:k=64"),
        (("--policy", "sparq", "--k", "auto", "--eps", "0.05", "--most", 256), "sparq:k=auto:eps=0.05:most=256"),
        (("--policy", "sparq:k=auto"), "sparq:k=auto"),
        (("--k", 64, "--policy", "sparq:r=16"), "sparq:r=16:k=64"),
        (("--policy", "tova", "--budget", "1/8", "--per", "head"), "tova:budget=1/8:per=head"),
        (("--policy=h2o", "--budget=64MiB", "--recent=7"), "h2o:budget=64MiB:recent=7"),
        (("--policy", "d2o", "--e", 1, "--beta", ".25"), "d2o:beta=0.25:e=1.0"),
    ],
)
def test_flags_and_text_make_one_policy(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, flags: tuple[object, ...], expected: str
) -> None:
    assert loaded_policy(cli, monkeypatch, *flags) == expected


@pytest.mark.parametrize("policy", ALL)
def test_every_policy_in_every_command(cli: Cli, tiny: Path, policy: str) -> None:
    flags = (*REFERENCE, "--policy", policy, *ALL[policy])
    text = "the inner one and the other one are here and there"
    run = cli("run", tiny, *flags, "-p", text, "-n", 20, "--temp", 0)
    talk = cli("chat", tiny, *flags, "--chat-template", CHATML, "-n", 20, "--temp", 0, input=f"{text}\nand then\n")
    score = cli("perplexity", tiny, *flags, "-c", 64, "--chunks", 2, "-f", VERSES, "--decode", "--kld")
    speed = cli("bench", tiny, *flags, "-r", 1, "-p", 4, "-n", 3, "-d", 61)
    compiled = cli("warmup", tiny, *flags)
    for result in (run, talk, score, speed, compiled):
        assert result.exit_code == 0, result.stderr
        assert result.stdout


# -- wrong values ------------------------------------------------------------------------------------------------------

WRONG = [
    ("sparq --r 17 --k 8", "--r 17 is out of range (1 to 16, the size of a head)"),
    ("sparq --r 0", "--r 0 is out of range (1 or more)"),
    ("sparq --r -1", "--r -1 is out of range (1 or more)"),
    ("sparq --r 1.5", "--r 1.5 is not a whole number"),
    ("sparq --r nan", "--r nan is not a whole number"),
    ("sparq --r 1_0", "--r 1_0 is not a whole number"),
    ("sparq --r 4 --k 0", "--k 0 is out of range (1 or more)"),
    ("sparq --r 4 --k 65", "--k 65 is out of range (1 to 64, the context)"),
    ("sparq --r 4", "--k 128 is out of range (1 to 64, the context)"),
    ("topk --k 8 --k-index q4", "--k-index is not a parameter of --policy topk (it has: --k)"),
    ("topk --k 65", "--k 65 is out of range (1 to 64, the context)"),
    ("sparq --r 4 --k 8 --local 9", "--local 9 is out of range (0 to 8, the tokens that are read)"),
    ("sparq --r 4 --k most", "--k most is not a whole number or auto"),
    ("sparq --r 4 --k 8 --eps 0.1", "--eps goes with --k auto, not with --k 8"),
    ("sparq --r 4 --k 8 --most 9", "--most goes with --k auto, not with --k 8"),
    ("sparq --r 4 --k auto --eps -1", "--eps -1.0 is out of range (0 or more)"),
    ("sparq --r 4 --k auto --eps nan", "--eps nan is out of range (0 or more)"),
    ("sparq --r 4 --k auto --eps 1e400", "--eps inf is out of range (0 or more)"),
    ("sparq --r 4 --k auto --eps few", "--eps few is not a number"),
    ("sparq --r 4 --k auto --most 65", "--most 65 is out of range (1 to 64, the context)"),
    ("sparq --r 4 --k auto --most 8 --local 9", "--local 9 is out of range (1 to 8, the tokens that are read)"),
    ("sparq --r 4 --k auto --local 0", "--local 0 is out of range (1 to 512, the tokens that are read)"),
    ("topk --k auto", "--k auto is not a whole number"),
    ("sparq --r 4 --k 8 --gqa max", "--gqa max is not one of: sum-prob, sum-logit"),
    ("sparq --r 4 --k 8 --k-index q8", "--k-index q8 is not one of: f16, q4"),
    ("sparq --r 4 --k 8 --budget 9", "it has: --r, --k, --eps, --most, --local, --dense-until, --reallocate, --gqa"),
    ("dense --r 4", "--r is not a parameter of --policy dense (it has: none)"),
    ("window --sinks 4", "--sinks is not a parameter of --policy window (it has: --budget)"),
    ("tova --budget 0", "--budget 0 is out of range (8 to 64 tokens, the context)"),
    ("tova --budget 7", "--budget 7 is out of range (8 to 64 tokens, the context)"),
    ("tova --budget 65", "--budget 65 is out of range (8 to 64 tokens, the context)"),
    ("tova --budget -8", "--budget -8 is not a number of tokens, a fraction like 1/8, or bytes like 64MiB"),
    ("tova --budget 1e1", "is not a number of tokens"),
    ("tova --budget nan", "is not a number of tokens"),
    ("tova --budget 1/0", "--budget 1/0 is out of range (a fraction above 0, at most 1)"),
    ("tova --budget 9/8", "--budget 9/8 is out of range (a fraction above 0, at most 1)"),
    ("tova --budget 1/9", "--budget 1/9 gives 7 tokens per layer, which is out of range (8 to 64 tokens"),
    ("tova --budget 1KiB", "gives 2 tokens per layer, which is out of range (8 to 64 tokens"),
    ("tova --budget 1GiB", "tokens per layer, which is out of range (8 to 64 tokens"),
    ("tova --per token", "--per token is not one of: layer, head"),
    ("h2o --compress never", "--compress never is not one of: oneshot, chunked, stepwise"),
    ("h2o --budget 16 --recent 16", "--recent 16 is out of range (0 to 15, within the budget)"),
    ("d2o --budget 16 --recent 12", "--recent 12 is out of range (0 to 11, with --sinks within the budget)"),
    ("d2o --budget 16 --sinks 16", "--sinks 16 is out of range (0 to 15, within the budget)"),
    ("d2o --budget 16 --sinks 99999999999999999999", "is out of range (0 to 15, within the budget)"),
    ("d2o --budget 16 --beta nan", "--beta nan is out of range (0 to 1)"),
    ("d2o --budget 16 --beta 1.1", "--beta 1.1 is out of range (0 to 1)"),
    ("d2o --budget 16 --e inf", "--e inf is out of range (0 to 1000)"),
    ("d2o --budget 16 --e x", "--e x is not a number"),
    ("d2o --compress stepwise", "--compress stepwise does not go with --policy d2o"),
    (
        "streaming --budget 16 --recent 10",
        "--budget 16 is not --sinks 4 and --recent 10 together: leave out --budget or --recent",
    ),
    ("streaming --budget 16 --sinks 16", "--sinks 16 is out of range (0 to 15, within the budget)"),
    ("streaming --recent 65", "--recent 65 is out of range (1 to 64, the context)"),
    ("streaming --recent 8 --sinks 64", "--sinks 64 is out of range (0 to 63, within the budget)"),
    ("streaming --recent 8 --sinks 9999999999999", "is out of range (0 to 63, within the budget)"),
    ("streaming --positions left", "--positions left is not one of: true, reindexed"),
    ("lm-infinite --limit 65", "--limit 65 is out of range (1 to 64, the context)"),
    ("lm-infinite --limit 99999999999999999999", "is out of range (1 to 64, the context)"),
    ("nosuch", "unknown policy 'nosuch' (one of: dense, sparq, topk, window, streaming, lm-infinite, h2o, tova"),
    ("sparq:r", "'r' is not PARAMETER=VALUE"),
    ("sparq:", "'' is not PARAMETER=VALUE"),
    ("sparq:r=", "'r=' is not PARAMETER=VALUE"),
    ("sparq:x=4", "--x is not a parameter of --policy sparq (it has: --r, --k"),
    ("sparq:r=4:r=4", "r is given twice"),
    ("sparq:r=4 --r 4", "--r is given twice"),
    ("sparq --r 4 --r 4", "--r is given twice"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_a_wrong_value_is_one_line_before_the_model_is_read(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, flags: str, message: str
) -> None:
    def read(*args: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("minirt.llama.load_weights", read)
    given = (tiny, *REFERENCE, "--policy", *flags.split())
    for result in (
        cli("run", *given, "-c", 64, "-p", "x"),
        cli("chat", *given, "-c", 64, input="x\n"),
        cli("perplexity", *given, "-c", 64, "-f", VERSES, "--kld"),
        cli("warmup", *given, "-c", 64),
        cli("bench", *given, "-p", 64, "-n", 0),
    ):
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in only_line(result.stderr)


def test_what_needs_no_model_is_found_without_one(cli: Cli) -> None:
    for flags in ("nosuch", "sparq:r", "sparq --r 0", "dense --k 9", "sparq:r=4 --r 4", "tova --budget x"):
        for command in ("run", "chat", "warmup"):
            more = ("-p", "x") if command == "run" else ()
            assert cli(command, "nosuch.gguf", *more, "--policy", *flags.split()).exit_code == 2


def test_a_model_with_a_sliding_window_has_a_policy_already(cli: Cli, tmp_path: Path) -> None:
    model = tiny_gguf()
    model.keys["llama.attention.sliding_window"] = ("u32", 32)
    path = model.write(tmp_path / "sliding.gguf")
    for policy in ("streaming", "sparq:r=4:k=8"):
        for command in (("run", path, "-p", "x"), ("bench", path)):
            result = cli(*command, *REFERENCE, "--policy", policy)
            name = policy.partition(":")[0]
            assert result.exit_code == 2
            assert f"--policy {name}: this model itself reads only the last 32 tokens" in only_line(result.stderr)
    assert cli("run", path, *REFERENCE, "-p", "x", "-n", 2).exit_code == 0


# -- chats -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tiny: Path) -> Iterator[Llama]:
    with Llama.load(tiny, device="reference", kv="f32", chat_template=CHATML) as model:
        model.tokenizer.eog_ids = frozenset()  # an answer is as long as it may be
        yield model


@pytest.mark.parametrize("spelled", ["sparq:r=4:k=8", "sparq r=4 k=8", "sparq --r 4 --k=8", "  sparq   r=4:k=8 "])
@pytest.mark.parametrize("set_", ["/set policy {}", "/set policy={}"])
def test_a_policy_set_in_a_chat_reads_the_conversation_anew(
    llama: Llama, capsys: pytest.CaptureFixture[str], spelled: str, set_: str
) -> None:
    c = chat(llama)
    c.ask("one and the other")
    before = list(c.conversation.messages)
    assert said(c, capsys, set_.format(spelled)) == ""
    assert str(llama.decoder.policy) == "sparq:r=4:k=8"
    assert "policy               sparq:r=4:k=8\n" in said(c, capsys, "/set")
    assert c.conversation.messages == before
    c.ask("two")
    assert c.last is not None
    assert c.last.timings.prompt_tokens == len(llama.session.tokens) - c.last.timings.tokens
    assert c.conversation.messages[:2] == before


def test_a_policy_that_cannot_be_set_changes_nothing(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    c = chat(llama)
    said(c, capsys, "/set policy tova budget=20")
    c.ask("one")
    before = list(llama.session.tokens)
    for text, message in (
        ("", "unknown policy ''"),
        ("nosuch", "unknown policy 'nosuch' (one of: dense, sparq,"),
        ("sparq r", "'r' is not PARAMETER=VALUE"),
        ("sparq r=17 k=8", "--r 17 is out of range (1 to 16, the size of a head)"),
        ("h2o budget=257", "--budget 257 is out of range (8 to 256 tokens, the context)"),
        ("h2o r=4", "--r is not a parameter of --policy h2o"),
    ):
        assert not c.handle(f"/set policy {text}", True)
        line = only_line(capsys.readouterr().err)
        assert line.startswith("minirt: /set policy: ")
        assert message in line
    assert str(llama.decoder.policy) == "tova:budget=20"
    assert llama.session.tokens == before


def test_stats_of_a_bounded_policy(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    c = chat(llama, n=30)
    said(c, capsys, "/set policy window budget=16")
    c.ask("one and the other")
    n = len(llama.session.tokens)
    stats = " ".join(said(c, capsys, "/stats").split())
    assert f"policy window:budget=16, 0.0 MiB of cache read per token, {100 * 16 / n:.1f} % of dense" in stats
    assert f"tokens held 16 of {n} per layer, {n - 16} evicted" in stats
    assert llama.session.cache.nbytes(llama.config, 0) == 16 * 512
    said(c, capsys, "/set policy sparq r=4 k=16")
    c.ask("two")
    n = len(llama.session.tokens)
    assert f"tokens held {n} of {n} per layer, 0 evicted" in " ".join(said(c, capsys, "/stats").split())
    index = 2 * 2 * 512 * 16 * 4  # a block of 512 tokens in each layer
    assert llama.session.cache.nbytes(llama.config, 0) == n * 512 + index


def test_what_a_sequence_has_filled_grows_with_it(llama: Llama) -> None:
    sizes = {}
    for policy in ("dense", "h2o:budget=16"):
        llama.set_policy(policy)
        sizes[policy] = []
        for n in (1, 40):
            llama.session.feed([5] * n)
            sizes[policy].append(llama.session.cache.nbytes(llama.config, 0))
    assert sizes["dense"] == [512, 40 * 512]
    assert sizes["h2o:budget=16"][1] <= 17 * 512 + 2 * (2 * 17 * 8 + 8)
    assert sizes["h2o:budget=16"][1] == llama.session.cache.plan.nbytes(llama.config)


def test_positions_have_an_end(cli: Cli, tiny: Path) -> None:
    """A bounded policy needs no memory for a context that no one could fill."""
    flags = ("run", tiny, *REFERENCE, "--policy", "streaming", "-p", "x", "-n", 2)
    assert cli(*flags, "-c", 1 << 30).exit_code == 0
    result = cli(*flags, "-c", (1 << 30) + 1)
    assert (result.exit_code, "(8 to 1073741824)" in only_line(result.stderr)) == (2, True)


@pytest.mark.parametrize("policy", ["streaming:budget=32", "tova:budget=32", "h2o:budget=32:compress=chunked"])
def test_a_long_chat_in_little_memory(tiny: Path, policy: str) -> None:
    with Llama.load(tiny, device="reference", n_ctx=100_000, policy=policy, chat_template=CHATML) as llama:
        llama.tokenizer.eog_ids = frozenset()
        session = llama.session
        assert session.cache.plan.nbytes(llama.config) < 64 * 1024
        c = chat(llama, n=40)
        for i in range(30):
            before = len(session.tokens)
            c.ask(f"the {i} of them")
            assert c.last is not None
            assert c.last.timings.prompt_tokens < 40, "only what is new is read"
            assert len(session.tokens) == before + c.last.timings.prompt_tokens + 39
        assert len(session.tokens) > 1500
        assert llama.decoder.policy.held(llama.config, session.cache, 0) == 32


# -- pinned system prompts ---------------------------------------------------------------------------------------------

SYSTEM = [{"role": "system", "content": "be the one"}]
HEAD = "<|im_start|>system\nbe the one<|im_end|>\n<|im_start|>user\n"


def ids(llama: Llama, text: str) -> list[int]:
    return llama.tokenizer.encode(text, add_bos=False, parse_special=True)


@pytest.mark.parametrize("text", ["hello", "0", "x", "0x", "", " in", "<|im_end|>"])
def test_the_head_is_what_precedes_the_users_text(llama: Llama, text: str) -> None:
    messages = [*SYSTEM, {"role": "user", "content": text}]
    talk = [*messages, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    head = ids(llama, HEAD)
    for conversation in (messages, talk):
        tokens = llama.chat_prompt(conversation)
        assert tokens[: llama.head_length(conversation, tokens)] == head
    alone = [{"role": "user", "content": text}]
    begin = ids(llama, "<|im_start|>user\n")
    assert llama.head_length(alone, llama.chat_prompt(alone)) == len(begin)
    assert llama.head_length(SYSTEM, llama.chat_prompt(SYSTEM)) == 0


def kept(llama: Llama) -> list[int]:
    """Positions that an evicting policy holds, in the second layer's first head."""
    cache, policy = llama.session.cache, llama.decoder.policy
    slots = min(int(cache.n_seen[0]), int(policy.limits(cache, 1)[0]) + 1)  # type: ignore[attr-defined]
    return sorted(p for p in cache.side["positions"][1][0, 0, :slots].tolist() if p != NO_POSITION)


@pytest.mark.parametrize("policy", ["h2o:budget=48", "tova:budget=48", "d2o:budget=48", "streaming:budget=48"])
def test_the_system_prompt_stays_in_a_chat(llama: Llama, capsys: pytest.CaptureFixture[str], policy: str) -> None:
    c = chat(llama, system="be the one", n=20)
    c.pin_system = True
    said(c, capsys, f"/set policy {policy}")
    head = len(ids(llama, HEAD))
    for text in ("hello", "the other one"):
        c.ask(text)
        assert llama.session.cache.pinned.tolist() == [head]
        assert f"per layer, the first {head} pinned" in said(c, capsys, "/stats")
        if "positions" in llama.session.cache.side:
            assert kept(llama)[:head] == list(range(head))
    c.ask("and more")
    assert c.last is not None
    assert c.last.timings.prompt_tokens < 40, "the head is pinned once"
    said(c, capsys, "/system be")
    c.ask("once again")
    shorter = HEAD.replace(" the one", "")
    assert llama.session.cache.pinned.tolist() == [len(ids(llama, shorter))]
    assert c.last is not None
    assert c.last.timings.prompt_tokens > 100, "another head begins the text anew"


def test_a_system_prompt_that_leaves_no_room_is_one_line_and_the_chat_goes_on(
    llama: Llama, capsys: pytest.CaptureFixture[str]
) -> None:
    c = chat(llama, system="be the one")
    c.pin_system = True
    for policy in ("streaming", "tova", "d2o"):
        said(c, capsys, f"/set policy {policy} budget=24")
        line = only_line(said(c, capsys, "hello"))
        assert re.fullmatch(r"minirt: \d+ tokens are pinned, which leaves no room in a budget of 24", line)
        assert len(c.conversation.messages) == 1
        stats = said(c, capsys, "/stats")
        assert "last answer" not in stats
        assert "0 of 256" in stats
    said(c, capsys, "/set policy tova budget=40")
    assert c.handle("hello", True)


def test_pin_system_is_a_flag_and_an_argument(cli: Cli, tiny: Path, llama: Llama) -> None:
    flags = (*REFERENCE, "--chat-template", CHATML, "-n", 40, "--temp", 0, "--system", "be the one", "--no-stats")
    policy = ("--policy", "tova", "--budget", 40)
    talk = "hello there\nand you\n"
    pinned, loose = (cli("chat", tiny, *flags, *policy, *more, input=talk) for more in (("--pin-system",), ()))
    assert pinned.exit_code == loose.exit_code == 0
    assert pinned.stdout != loose.stdout
    tight = cli("chat", tiny, *flags, "--policy", "tova", "--budget", 16, "--pin-system", input=talk)
    assert tight.exit_code == 1
    assert tight.stderr.count("leaves no room in a budget of 16") == len(tight.stderr.splitlines()) == 2
    assert cli("chat", tiny, *flags, "--pin-system", input=talk).stdout == cli("chat", tiny, *flags, input=talk).stdout

    llama.set_policy("tova:budget=40")
    messages = [*SYSTEM, {"role": "user", "content": "hello there"}]
    llama.chat(messages, max_tokens=40, pin_system=True)
    assert kept(llama)[:20] == list(range(20))
    assert llama.session.cache.pinned[0] > 20
    llama.chat(messages, max_tokens=2)
    assert llama.session.cache.pinned[0] == 0
    with pytest.raises(UsageError, match="of one conversation"):
        llama.chat([messages], pin_system=True)  # type: ignore[call-overload]


# -- the Python API ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["tova:budget=1/8", "h2o:budget=16", "lm-infinite", "d2o:budget=1/8", "window"])
def test_a_batch_keeps_what_one_keeps(llama: Llama, policy: str) -> None:
    llama.set_policy(policy)
    prompts = [llama.tokenize("the inner one and the other one " * n) for n in (1, 3, 2)]
    how = {"max_tokens": 8, "sampling": Sampling(temperature=0)}
    together = llama.generate(prompts, **how)
    assert [a.tokens for a in together] == [llama.generate(p, **how).tokens for p in prompts]
    assert llama.logits([5, 6, 7]).shape == (3, llama.config.n_vocab)


@pytest.mark.parametrize("policy", ALL)
def test_a_warm_policy_compiles_nothing_later(tiny: Path, policy: str) -> None:
    values = dict(zip((f.lstrip("-").replace("-", "_") for f in ALL[policy][::2]), ALL[policy][1::2], strict=True))
    with Llama.load(tiny, policy=make_policy(policy, values), device="cpu") as llama:
        llama.warm_up()
        before = compilations()
        for n in (1, 3, 100):
            llama.session.reset()
            llama.generate([5] * n, max_tokens=30, sampling=Sampling(temperature=0))
        assert compilations() == before


def test_warm_up_of_another_policy_leaves_the_models_own(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    small = type(parse_policy("topk")).small
    monkeypatch.setattr("minirt.policies.TopK.small", lambda self: seen.append(self) or small(self))
    llama.warm_up("topk:k=9")
    assert [str(policy) for policy in seen] == ["topk:k=9"]
    assert str(llama.decoder.policy) == "dense"
