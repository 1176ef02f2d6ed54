"""Chat: the conversation and its token ids, the commands, and chats through a pipe."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Cli, minirt, only_line

from minirt import Llama, ModelError, Sampling
from minirt.cli.chat import Chat
from minirt.cli.conversation import Conversation, load_conversation, save_conversation
from minirt.cli.lines import read_message
from minirt.cli.terminal import printable

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FLAGS = ("--device", "reference", "--temp", "0", "-n", "6", "--chat-template", CHATML)


# -- messages ----------------------------------------------------------------------------------------------------------


def messages(*lines: str) -> list[tuple[str, bool]]:
    given = iter(lines)

    def line(prompt: str) -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    found = []
    while True:
        try:
            found.append(read_message(line))
        except EOFError:
            return found


def test_messages_of_one_and_of_several_lines() -> None:
    assert messages("one", "two") == [("one", True), ("two", True)]
    assert messages("one\\", "two\\", "three", "four") == [("one\ntwo\nthree", True), ("four", True)]
    assert messages("a path\\\\", "next") == [("a path\\\\", True), ("next", True)]
    assert messages('"""one', "", 'two"""', "three") == [("one\n\ntwo", False), ("three", True)]
    assert messages('"""', "/clear", '"""') == [("/clear", False)]
    assert messages('"""all in one"""') == [("all in one", False)]
    assert messages('"""cut', "off") == [("cut\noff", False)]


def test_control_characters_are_stripped() -> None:
    assert printable("a\x1b[31mb\x07\r\x7f\x9b2Jc\n\td\x00é漢🙂") == "a[31mb2Jc\n\tdé漢🙂"


# -- the conversation --------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tiny: Path) -> Iterator[Llama]:
    with Llama.load(tiny, device="reference", kv="f32", chat_template=CHATML) as model:
        yield model


def chat(llama: Llama, system: str = "", n: int | None = 6, temperature: float = 0, seed: int | None = None) -> Chat:
    return Chat(llama, Conversation(llama, system), Sampling(temperature, seed=seed), n, (), False)


def rendered(llama: Llama, conversation: Conversation) -> list[int]:
    return llama.tokenizer.encode(llama.template.render(conversation.messages), add_bos=False, parse_special=True)


def test_only_new_tokens_are_computed_each_turn(llama: Llama) -> None:
    c = chat(llama, system="be")
    held = 0
    for text in ("hello", "the inner one", "and there"):
        c.ask(text)
        assert c.last is not None
        prompt = c.conversation.prompt()  # of a next turn: it has the answer and its end behind what was computed
        assert len(llama.session.tokens) - held == c.last.timings.prompt_tokens + c.last.timings.tokens
        held = len(llama.session.tokens)
        assert prompt[:held] == llama.session.tokens
        assert llama.tokenizer.decode(prompt, special=True) == llama.template.render(c.conversation.messages)


def test_ids_of_an_answer_stay_the_models_own(llama: Llama) -> None:
    """Greedy answers of a random model are seldom what encoding their text would give."""
    conversation = Conversation(llama)
    conversation.add("user", "x")
    prompt = conversation.prompt()
    odd = [llama.tokenizer.encode(c)[0] for c in "the"]
    assert odd != llama.tokenizer.encode("the")
    conversation.answered(prompt, "the", odd)
    conversation.add("user", "y")
    assert conversation.prompt()[: len(prompt) + 3] == prompt + odd
    assert conversation.prompt() != rendered(llama, conversation)


def test_ids_that_are_not_the_text_are_not_kept(llama: Llama) -> None:
    conversation = Conversation(llama)
    conversation.add("user", "x")
    conversation.answered(conversation.prompt(), "one ", llama.tokenizer.encode("one STOP"))
    conversation.add("user", "y")
    assert conversation.prompt() == rendered(llama, conversation)


def test_regen_begins_from_the_same_ids(llama: Llama) -> None:
    c = chat(llama)
    for text in ("one", "two", "three"):
        c.ask(text)
    before = c.conversation.prompt()
    last = c.conversation.messages[-1]
    c.handle("/regen", True)
    assert c.last is not None
    assert c.last.timings.prompt_tokens == 1, "all but the last token of the prompt is in the cache"
    assert c.conversation.messages[-1] == last
    assert c.conversation.prompt() == before


def test_regen_with_a_seed_gives_another_answer_and_a_session_is_repeatable(llama: Llama) -> None:
    def session() -> list[str]:
        c = chat(llama, temperature=3.0, seed=5, n=20)
        c.ask("one")
        first = c.conversation.messages[-1]["content"]
        c.handle("/regen", True)
        return [first, c.conversation.messages[-1]["content"]]

    one = session()
    assert one[0] != one[1]
    assert session() == one


def test_a_message_without_an_answer_is_taken_back(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    c = chat(llama)
    c.ask("one")
    before = list(c.conversation.messages)
    assert not c.handle("x" * 400, True)
    err = capsys.readouterr().err
    assert "256" in err
    assert re.search(r"takes 4\d\d tokens", err)
    assert "/clear" in err
    assert c.conversation.messages == before
    assert c.handle("two", True)


def test_a_full_context_does_not_lose_the_answer(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    llama.tokenizer.eog_ids = frozenset()
    c = chat(llama, n=None)
    c.ask("x" * 200)
    assert c.conversation.messages[-1]["role"] == "assistant"
    assert "256 of 256 tokens" in capsys.readouterr().err


# -- commands ----------------------------------------------------------------------------------------------------------


def said(c: Chat, capsys: pytest.CaptureFixture[str], line: str) -> str:
    capsys.readouterr()
    c.handle(line, True)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_help_lists_every_command(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    c = chat(llama)
    text = said(c, capsys, "/help")
    for name in ["/help", "/clear", "/regen", "/system", "/set", "/stats", "/save", "/load", "/exit"]:
        assert name in text
    assert said(c, capsys, "/?") == text


def test_unknown_commands_are_errors_and_no_prompts(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    c = chat(llama)
    assert "/nosuch" in only_line(said(c, capsys, "/nosuch thing"))
    assert "/" in only_line(said(c, capsys, "/"))
    assert c.conversation.messages == []


def test_system_and_clear(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    c = chat(llama)
    said(c, capsys, "/system be brief")
    assert said(c, capsys, "/system") == "be brief\n"
    c.ask("one")
    said(c, capsys, "/system be long")
    assert [m["role"] for m in c.conversation.messages] == ["system", "user", "assistant"]
    said(c, capsys, "/clear")
    assert c.conversation.messages == [{"role": "system", "content": "be long"}]
    said(c, capsys, "/system -")
    assert c.conversation.messages == []
    assert "no answer" in only_line(said(c, capsys, "/regen"))


def test_set_shows_changes_and_refuses(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    c = chat(llama)
    assert re.search(r"top-k +40", said(c, capsys, "/set"))
    for line in ("/set temp = 0.5", "/set top-k 7", "/set --min-p=0.2", "/set seed 4", "/set max-tokens 9"):
        assert said(c, capsys, line) == ""
    assert c.sampling == Sampling(temperature=0.5, top_k=7, min_p=0.2, seed=4)
    assert c.max_tokens == 9
    said(c, capsys, "/set seed -1")
    said(c, capsys, "/set n -1")
    assert c.sampling.seed is c.max_tokens is None
    before = c.sampling
    for line in (
        "/set nosuch 1",
        "/set temp",
        "/set temp hot",
        "/set top-k 1.5",
        "/set temp -1",
        "/set temp nan",
        "/set n 0",
    ):
        only_line(said(c, capsys, line))
    assert c.sampling == before


def test_set_answers_in_the_words_it_was_asked_in(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    c = chat(llama)
    assert only_line(said(c, capsys, "/set temp nan")) == "minirt: /set temp: nan is out of range (0 to 1000)"
    assert "-1: a new one" in only_line(said(c, capsys, "/set seed -2"))
    before = c.sampling
    for line in ("/set top-k 1_0", "/set top-k ٣", "/set temp 0.٣", "/set temp 1_0"):
        assert "is not a" in only_line(said(c, capsys, line))
    assert c.sampling == before


def test_auto_is_no_policy_to_set(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    c, before = chat(llama), llama.decoder.policy
    for line in ("/set policy auto", "/set policy auto --speed 2x"):
        assert "minirt chat --policy auto" in only_line(said(c, capsys, line))
    assert llama.decoder.policy == before


def test_arguments_where_there_are_none(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    c = chat(llama)
    c.ask("one")
    before = list(c.conversation.messages)
    for name in ("clear", "stats", "regen", "show", "help", "exit", "quit"):
        line = only_line(said(c, capsys, f"/{name} foo"))
        assert line == f"minirt: /{name}: unexpected argument 'foo'"
    assert c.conversation.messages == before


def test_stats_after_clear_and_load_are_of_the_new_conversation(
    llama: Llama, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    c, path = chat(llama), tmp_path / "talk.json"
    c.ask("hello")
    said(c, capsys, f"/save {path}")
    for line in ("/clear", f"/load {path}"):
        c.ask("hello")
        said(c, capsys, line)
        stats = said(c, capsys, "/stats")
        assert "0 of 256" in stats
        assert "last answer" not in stats


def test_the_same_seed_gives_the_same_text_whenever_it_is_set(
    llama: Llama, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    c, path = chat(llama, temperature=3.0, seed=5, n=20), tmp_path / "talk.json"
    said(c, capsys, f"/save {path}")
    texts = []
    for line in ("/stats", "/clear", f"/load {path}", "/set seed 5"):
        if line.startswith("/set"):
            c.conversation.clear()
        said(c, capsys, line)
        c.ask("hi")
        texts.append(c.conversation.messages[-1]["content"])
    assert texts == 4 * texts[:1]


def test_stats_and_show(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    c = chat(llama)
    assert "0 of 256" in said(c, capsys, "/stats")
    c.ask("hello")
    for text in ("of 256", "t/s", "GB/s", "peak memory", "KV cache", "dense"):
        assert text in said(c, capsys, "/stats")
    assert said(c, capsys, "/show").startswith("user: hello\nassistant: ")


def test_save_and_load(llama: Llama, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    c, path = chat(llama, system="be é🙂", seed=3), tmp_path / "talk.json"
    c.ask("hello")
    assert "3 messages" in said(c, capsys, f"/save {path}")
    said(c, capsys, f"/save {path}")  # its own file
    fresh = chat(llama, temperature=0.9)
    assert "exists" in only_line(said(fresh, capsys, f"/save {path}"))
    assert "3 messages" in said(fresh, capsys, f"/load {path}")
    assert fresh.conversation.messages == c.conversation.messages
    assert fresh.sampling == c.sampling
    assert fresh.conversation.prompt() == rendered(llama, fresh.conversation)
    other = chat(llama)
    said(other, capsys, f"/save! {path}")
    assert load_conversation(path)[0] == []
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]


@pytest.mark.parametrize(
    "line", ["/save", "/load", "/save /nosuch/folder/x", "/load /nosuch", "/load /", "/save! /", "/load ~nosuch/x"]
)
def test_files_that_cannot_be(llama: Llama, capsys: pytest.CaptureFixture[str], line: str) -> None:
    c = chat(llama)
    c.ask("hello")
    before = list(c.conversation.messages)
    only_line(said(c, capsys, line))
    assert c.conversation.messages == before


@pytest.mark.parametrize("command", ["save", "save!", "load"])
@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "forbidden"], ids=lambda name: ascii(name[:9]))
def test_names_no_file_can_have(
    llama: Llama,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    name: str,
) -> None:
    c = chat(llama)
    c.ask("hello")
    before = list(c.conversation.messages)
    if name == "forbidden":  # a folder that may not be searched, also to root

        def stat(self: Path, *args: object, **options: object) -> os.stat_result:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "stat", stat)
        monkeypatch.setattr(Path, "exists", stat)
        monkeypatch.setattr(Path, "open", stat)
    capsys.readouterr()
    assert not c.handle(f"/{command} {tmp_path / name}", True)
    line = only_line(capsys.readouterr().err)
    assert {"x": "name too long", "a": "NUL", "f": "Permission denied"}[name[0]] in line
    assert c.conversation.messages == before
    assert list(tmp_path.iterdir()) == []


def test_save_over_what_is_no_regular_file(llama: Llama, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    c = chat(llama)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("folder", "pipe", "link"):
        line = only_line(said(c, capsys, f"/save! {tmp_path / name}"))
        assert line == f"minirt: {tmp_path / name}: not a regular file"
    assert "symbolic links" in only_line(said(c, capsys, f"/save! {tmp_path / 'loop'}"))
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "link", "loop", "pipe"]


def test_save_keeps_links_and_modes(llama: Llama, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    c, link, target = chat(llama), tmp_path / "link", tmp_path / "talk.json"
    link.symlink_to("talk.json")
    mask = os.umask(0o027)
    try:
        said(c, capsys, f"/save {link}")  # the link names nothing yet
        assert target.stat().st_mode & 0o777 == 0o640
        target.chmod(0o604)
        c.ask("hello")
        said(c, capsys, f"/save! {link}")
    finally:
        os.umask(mask)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o604
    assert len(load_conversation(target)[0]) == 2


def test_a_failed_write_is_a_line_and_the_chat_goes_on(
    llama: Llama, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    c = chat(llama)

    def fail(number: int) -> None:
        def write(*args: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(sys.modules[Chat.__module__], "show_answer", write)

    fail(errno.ENOSPC)
    assert only_line(said(c, capsys, "hello")) == "minirt: standard output: No space left on device"
    assert c.conversation.messages == []
    fail(errno.EPIPE)
    with pytest.raises(BrokenPipeError):
        c.handle("hello", True)


TALK = {"format": "minirt conversation", "version": 1}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
BAD_TALKS: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"\x89PNG",
    "no UTF-8": b'"\xff"',
    "deep": b"[" * 200_000,
    "huge number": b'{"version": ' + b"9" * 10_000 + b"}",
    "a list": b"[]",
    "no format": json.dumps({"messages": []}).encode(),
    "no messages": json.dumps(TALK).encode(),
    "messages no list": json.dumps({**TALK, "messages": {}}).encode(),
    "message no object": json.dumps({**TALK, "messages": ["hi"]}).encode(),
    "no content": json.dumps({**TALK, "messages": [{"role": "user"}]}).encode(),
    "content no text": json.dumps({**TALK, "messages": [{"role": "user", "content": 5}]}).encode(),
    "unknown role": json.dumps({**TALK, "messages": [{"role": "root\x1b[2J", "content": "a"}]}).encode(),
    "role no text": json.dumps({**TALK, "messages": [{"role": ["user"], "content": "a"}]}).encode(),
    "two users": json.dumps({**TALK, "messages": [USER, USER]}).encode(),
    "assistant first": json.dumps({**TALK, "messages": [ASSISTANT]}).encode(),
    "late system": json.dumps({**TALK, "messages": [USER, ASSISTANT, {"role": "system", "content": ""}]}).encode(),
    "no answer": json.dumps({**TALK, "messages": [USER]}).encode(),
    "surrogate": json.dumps({**TALK, "messages": [{"role": "user", "content": "\ud800"}, ASSISTANT]}).encode(),
    "sampling no object": json.dumps({**TALK, "messages": [], "sampling": 3}).encode(),
    "unknown sampling": json.dumps({**TALK, "messages": [], "sampling": {"mirostat": 2}}).encode(),
    "sampling no number": json.dumps({**TALK, "messages": [], "sampling": {"top_k": "x"}}).encode(),
    "sampling bool": json.dumps({**TALK, "messages": [], "sampling": {"top_k": True}}).encode(),
    "sampling NaN": json.dumps({**TALK, "messages": [], "sampling": {"temperature": float("nan")}}).encode(),
    "sampling range": json.dumps({**TALK, "messages": [], "sampling": {"top_p": 7}}).encode(),
    "too large": b" " * (17 << 20),
}


@pytest.mark.parametrize("name", BAD_TALKS)
def test_a_bad_conversation_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(BAD_TALKS[name])
    with pytest.raises(ModelError, match=re.escape(str(path))) as error:
        load_conversation(path)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 300


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "talk.json"
    save_conversation(path, "m", [USER, ASSISTANT], Sampling())

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ModelError, match="No space left"):
        save_conversation(path, "m", [], Sampling())
    assert load_conversation(path)[0] == [USER, ASSISTANT]
    assert len(list(tmp_path.iterdir())) == 1


# -- without a terminal ------------------------------------------------------------------------------------------------


def test_lines_of_a_pipe_are_messages_and_answers_alone_are_on_stdout(cli: Cli, tiny: Path) -> None:
    result = cli("chat", tiny, *FLAGS, input="hello\n\nthere\n")
    assert result.exit_code == 0, result.stderr
    assert "> " not in result.stdout
    assert result.stderr.count("t/s") == 4  # prompt and generation of two answers
    assert cli("chat", tiny, *FLAGS, "--no-stats", input="hello\n\nthere").stdout == result.stdout
    assert cli("chat", tiny, *FLAGS, input="").exit_code == 0


def test_commands_work_through_a_pipe(cli: Cli, tiny: Path) -> None:
    result = cli("chat", tiny, *FLAGS, "--no-stats", input="/nosuch\n/system be\n/system\n/exit\nnever\n")
    assert result.exit_code == 1, "not all that was asked for was done"
    assert result.stdout == ""
    assert result.stderr.splitlines()[0].startswith("minirt: unknown command /nosuch")
    assert result.stderr.splitlines()[1] == "be"


@pytest.mark.parametrize("line", ["/set temp hot", "/set temp -1", "/clear foo", "/regen", "/load nosuch"])
def test_a_command_that_failed_shows_in_the_exit_code(cli: Cli, tiny: Path, line: str) -> None:
    result = cli("chat", tiny, *FLAGS, "--no-stats", input=f"{line}\nhello\n")
    assert result.exit_code == 1
    assert result.stdout != "", "what comes after it is answered"
    only_line(result.stderr)
    assert cli("chat", tiny, *FLAGS, "--no-stats", input="/set temp 1\n/clear\nhello\n").exit_code == 0


@pytest.mark.parametrize("template", ["{{ '\\ud800' }}", "{{ '' }}"])
def test_a_template_that_prints_no_text_is_named(cli: Cli, tiny: Path, template: str) -> None:
    flags = (*FLAGS[:4], "--chat-template", template)
    piped = cli("chat", tiny, *flags, input="hello\n")
    asked = cli("run", tiny, *flags, "--chat", "-p", "hello")
    for result in (piped, asked):
        assert result.exit_code == 1
        assert only_line(result.stderr).startswith("minirt: --chat-template: prints ")


def test_an_answer_that_could_not_be_given_shows_in_the_exit_code(cli: Cli, tiny: Path) -> None:
    result = cli("chat", tiny, *FLAGS, "--no-stats", input="x" * 400 + "\n")
    assert result.exit_code == 1
    assert "256" in only_line(result.stderr)


def test_system_prompts(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "system").write_text("be\n")
    for flags in (("--system", "be"), ("--system-file", tmp_path / "system")):
        assert cli("chat", tiny, *FLAGS, *flags, input="/system\n").stderr == "be\n"
    both = cli("chat", tiny, *FLAGS, "--system", "a", "--system-file", "b")
    assert (both.exit_code, "together" in only_line(both.stderr)) == (2, True)
    assert cli("chat", tiny, *FLAGS, "--system-file", tmp_path).exit_code == 1
    assert cli("chat", tiny, "--chat-template", CHATML, "--show-template").stdout == CHATML + "\n"


def test_a_line_without_end(tiny: Path) -> None:
    result = minirt("chat", tiny, *FLAGS, shell="< /dev/zero", stdin=None)
    assert (result.returncode, "MiB" in only_line(result.stderr)) == (1, True)


def test_two_turns_with_smollm2(smollm2: Path) -> None:
    result = minirt("chat", "--temp", "0", "-n", "24", stdin=None, input=b"What is 2+2?\nAnd 3+3?\n")
    assert result.returncode == 0, result.stderr
    prompts = [int(n) for n in re.findall(rb"prompt (\d+) tokens", result.stderr)]
    assert len(prompts) == 2
    assert prompts[1] < 20 < prompts[0], "the second turn computes only what is new"
