"""The command line: what is said where, exit codes, and every wrong flag in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Cli, minirt, on_terminal, only_line, quiet_env
from make_gguf import tiny

COMMANDS = ("bench", "chat", "run", "info", "palu", "perplexity", "tokenize")
REFERENCE = ("--device", "reference")


# -- help and errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "--version", "--nosuch"])
def test_help_needs_neither_numpy_nor_numba(flag: str) -> None:
    code = f"""
import sys
from minirt.cli import main
try:
    main(["{flag}"])
finally:
    print([m for m in ("numpy", "numba", "jinja2", "tokenizers") if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=quiet_env()).stdout
    assert out.splitlines()[-1] == "[]"
    assert flag != "--help" or all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_examples(cli: Cli, command: str) -> None:
    for flag in ("--help", "-h"):
        result = cli(command, flag)
        assert result.exit_code == 0
        assert f"minirt {command}" in result.stdout.partition("Examples:")[2]


def test_minirt_alone_shows_its_help(cli: Cli) -> None:
    assert "Examples:" in cli().stdout
    assert cli("--version").stdout.startswith("minirt ")


def test_no_command_is_described_by_half(cli: Cli) -> None:
    commands = cli("--help").stdout.partition("Commands:")[2].partition("Examples:")[0]
    assert all(f"\n  {command} " in commands for command in COMMANDS)
    assert "..." not in commands


@pytest.mark.parametrize("args", [("nosuch",), ("run", "--nosuch"), ("info", "a", "b"), ("run", "-n")])
def test_usage_errors_are_one_line(cli: Cli, args: tuple[str, ...]) -> None:
    result = cli(*args)
    assert result.exit_code == 2
    assert args[-1] in only_line(result.stderr)
    assert result.stdout == ""


WRONG_ENGINE = [
    ("--policy", "nosuch"),
    ("--policy", ""),
    ("--kv", "q99"),
    ("--kv", "F16"),
    ("--device", "tpu"),
    ("--threads", "0"),
    ("--threads", "-1"),
    ("--threads", "10000"),
    ("--threads", "two"),
    ("--ctx", "-1"),
    ("--ctx", "1"),
    ("--ctx", "7"),
    ("--ctx", "1e3"),
    ("--ctx", "1000000000000"),
    ("--ctx", "9" * 30),
]
WRONG_SAMPLING = [
    ("--temp", "-1"),
    ("--temp", "nan"),
    ("--temp", "inf"),
    ("--temp", "hot"),
    ("--top-k", "-1"),
    ("--top-k", "1.5"),
    ("--top-p", "1.01"),
    ("--top-p", "-0.1"),
    ("--min-p", "2"),
    ("--min-p", "nan"),
    ("--repeat-penalty", "0"),
    ("--repeat-last-n", "-1"),
    ("--seed", "-2"),
    ("--seed", "18446744073709551616"),
    ("-n", "0"),
    ("-n", "-2"),
    ("-n", "many"),
    ("--stop", ""),
]


@pytest.mark.parametrize("flags", WRONG_ENGINE + WRONG_SAMPLING, ids=" ".join)
def test_wrong_values_of_run(cli: Cli, tiny: Path, flags: tuple[str, str]) -> None:
    device = () if flags[0] == "--device" else REFERENCE
    result = cli("run", tiny, "-p", "hello", *device, *flags)
    assert result.exit_code == 2
    line = only_line(result.stderr)
    assert flags[0].lstrip("-").partition("-")[0] in line.lower()
    assert result.stdout == ""


@pytest.mark.parametrize("flags", WRONG_ENGINE[:8], ids=" ".join)
def test_wrong_values_of_perplexity(cli: Cli, tiny: Path, flags: tuple[str, str]) -> None:
    device = () if flags[0] == "--device" else REFERENCE
    result = cli("perplexity", tiny, "-f", __file__, *device, *flags)
    assert result.exit_code == 2
    only_line(result.stderr)


@pytest.mark.parametrize("flags", [*WRONG_SAMPLING, ("--system", "\udcff")], ids=lambda f: " ".join(map(ascii, f)))
def test_wrong_values_of_chat(cli: Cli, flags: tuple[str, str]) -> None:
    result = cli("chat", "nosuch.gguf", *flags)
    assert result.exit_code == 2, "found before the model is opened"
    only_line(result.stderr)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["nosuch.gguf", "/", __file__, "a\0b.gguf", "x\n\x1b[31m.gguf"], ids=ascii)
def test_a_model_that_is_none(cli: Cli, command: str, name: str) -> None:
    more = {"run": ("-p", "x"), "perplexity": ("-f", __file__), "tokenize": ("text",), "palu": ("-o", "x")}.get(
        command, ()
    )
    result = cli(command, name, *more)
    assert result.exit_code == 1
    line = only_line(result.stderr)
    assert "\x1b" not in line
    assert result.stdout == ""


def test_no_memory_is_one_line(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **options: object) -> None:
        raise MemoryError("Unable to allocate 9.09 TiB")

    monkeypatch.setattr("minirt.llama.load_weights", load)
    result = cli("run", tiny, "-p", "x", *REFERENCE)
    assert (result.exit_code, "9.09 TiB" in only_line(result.stderr)) == (1, True)


# -- run ---------------------------------------------------------------------------------------------------------------

RUN = (*REFERENCE, "--temp", "0", "-n", "12")


def answer(cli: Cli, model: Path, *args: object, input: bytes | str | None = None) -> str:
    result = cli("run", model, *RUN, *args, input=input)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_answer_alone_is_on_stdout(cli: Cli, tiny: Path) -> None:
    result = cli("run", tiny, *RUN, "-p", "hello")
    assert result.stdout == answer(cli, tiny, "-p", "hello") != ""
    assert result.stdout.endswith("\n")
    assert "t/s" in only_line(result.stderr.replace("[prompt", "minirt: [prompt"))
    assert cli("run", tiny, *RUN, "-p", "hello", "--no-stats").stderr == ""


def test_where_the_prompt_comes_from(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"hello")
    whole = answer(cli, tiny, "-p", "hello")
    assert answer(cli, tiny, "-f", tmp_path / "text") == whole
    assert answer(cli, tiny, "-p", "-", input="hello") == whole
    assert answer(cli, tiny, input="hello") == whole
    joined = answer(cli, tiny, "-p", "one\ntwo")
    (tmp_path / "text").write_bytes(b"one\n")
    assert answer(cli, tiny, "-f", tmp_path / "text", "-p", "two") == joined
    assert answer(cli, tiny, "-p", "-", "-f", tmp_path / "text", input="") == answer(cli, tiny, "-p", "one\n")


def test_a_pipe_comes_before_the_argument(tiny: Path) -> None:
    piped = minirt("run", tiny, *RUN, "-p", "two", stdin=None, input=b"one")
    assert piped.stdout == minirt("run", tiny, *RUN, "-p", "one\ntwo").stdout != b""
    assert (
        minirt("run", tiny, *RUN, "-p", "two", stdin=None, input=b"").stdout
        == minirt("run", tiny, *RUN, "-p", "two").stdout
    )


def test_nothing_to_continue(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for args in (("-p", ""), ("-f", tmp_path / "empty"), ("-p", "-")):
        result = cli("run", tiny, *args, input="")
        assert (result.exit_code, "empty" in only_line(result.stderr)) == (1, True)
    named = only_line(cli("run", tiny, "-f", tmp_path / "empty", "-p", "-", input="").stderr)
    assert f"standard input, {tmp_path}/empty: " in named
    nameless = cli("run", tiny, "-f", "")
    assert (nameless.exit_code, "name of a file is empty" in only_line(nameless.stderr)) == (2, True)
    for path in (tmp_path, tmp_path / "nosuch", "/dev/zero"):
        result = cli("run", tiny, "-f", path)
        assert (result.exit_code, str(path) in only_line(result.stderr)) == (1, True)


def test_bytes_that_are_no_text(cli: Cli, tiny: Path) -> None:
    assert answer(cli, tiny, input=b"\xff\xfe\0binary\x80")
    endless = minirt("run", tiny, shell="< /dev/zero", stdin=None)
    assert (endless.returncode, "MiB" in only_line(endless.stderr)) == (1, True)


def test_a_prompt_longer_than_the_context_names_both_numbers(cli: Cli, tiny: Path) -> None:
    line = only_line(cli("run", tiny, *REFERENCE, "-p", "x" * 300).stderr)
    assert "300" in line
    assert "256" in line


def test_an_answer_the_context_cuts_says_so(cli: Cli, tiny: Path) -> None:
    result = cli("run", tiny, *REFERENCE, "-p", "x" * 250, "-n", "-1", "--top-k", "0", "--temp", "9", "--seed", "1")
    assert result.exit_code == 0
    assert "256 of 256 tokens" in result.stderr


def test_stop_special_and_seed(cli: Cli, tiny: Path) -> None:
    text = answer(cli, tiny, "-p", "hello", "-n", "40").rstrip("\n")
    middle = text[len(text) // 2]
    assert answer(cli, tiny, "-p", "hello", "-n", "40", "-r", middle).rstrip("\n") == text[: text.index(middle)]
    plain = cli("run", tiny, *RUN, "-p", "<|im_end|>").stderr
    assert "prompt 1 tokens" in cli("run", tiny, *RUN, "-p", "<|im_end|>", "--special").stderr
    assert "prompt 10 tokens" in plain
    hot = [cli("run", tiny, *REFERENCE, "-p", "a", "-n", "20", "--temp", "5", "--seed", s).stdout for s in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def test_chat_and_system_use_the_template(cli: Cli, tiny: Path) -> None:
    template = ("--chat-template", "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}>")
    raw = answer(cli, tiny, "-p", "[user:hi]>")
    assert answer(cli, tiny, "-p", "hi", "--chat", *template) == raw
    assert answer(cli, tiny, "-p", "hi", "--system", "be", *template) == answer(
        cli, tiny, "-p", "[system:be][user:hi]>"
    )


def test_a_closed_stdout_is_no_traceback(tiny: Path) -> None:
    for command in (
        ("run", tiny, *RUN, "-n", "200", "-p", "x"),
        ("info", tiny),
        ("tokenize", tiny, "a" * 100_000),
        ("--help",),
    ):
        reader, writer = os.pipe()
        os.close(reader)
        result = minirt(*command, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        assert (result.returncode, result.stderr) == (1, b""), command
        closed = minirt(*command, shell=">&-")
        assert (closed.returncode, only_line(closed.stderr)) == (1, "minirt: standard output is closed"), command


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line(tiny: Path) -> None:
    for command in (("info", tiny), ("run", tiny, *RUN, "-p", "x", "--no-stats"), ("tokenize", tiny, "x"), ("--help",)):
        result = minirt(*command, shell="> /dev/full")
        assert result.returncode == 1
        assert only_line(result.stderr) == "minirt: standard output: No space left on device"


def test_ctrl_c_while_running_exits_130(slow_tiny: list[str]) -> None:
    process = subprocess.Popen(
        [*slow_tiny, "run", *REFERENCE, "-p", "x", "-n", "-1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    first = process.stdout.read(1)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (first + out).endswith(b"\n")
    assert b"Traceback" not in err


def test_a_narrow_locale_costs_characters_only(tiny: Path) -> None:
    env = {**quiet_env(), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = minirt("run", tiny, *RUN, "-n", "40", "-p", "x", env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()


def test_the_capital_of_france(smollm2: Path) -> None:
    result = minirt("run", "-p", "The capital of France is", "-n", "8", "--temp", "0")
    assert b"Paris" in result.stdout
    assert result.returncode == 0


# -- info --------------------------------------------------------------------------------------------------------------


def test_info_names_what_matters(cli: Cli, tiny: Path) -> None:
    out = cli("info", tiny, "--ctx", 1000).stdout
    for text in (
        "Tiny",
        "llama",
        "256",
        "Q8_0",
        "byte-level BPE",
        "smollm",
        "268 tokens",
        "<|im_end|>",
        "none in the file",
    ):
        assert text in out
    facts = json.loads(cli("info", tiny, "--ctx", 1000, "--json").stdout)
    assert facts["model"]["n_head_kv"] == 2
    assert facts["file_bytes"] == tiny.stat().st_size
    assert sum(t["bytes"] for t in facts["tensor_types"].values()) == facts["weight_bytes"]
    # 2 layers x 2 heads x 16 numbers x K and V x bytes each
    assert facts["memory"] == [{"n_ctx": n, "f32": n * 512, "f16": n * 256} for n in (1, 256, 1000)]


def test_info_of_smollm2(cli: Cli, smollm2: Path) -> None:
    facts = json.loads(cli("info", "--json").stdout)
    assert (facts["model"]["n_layer"], facts["model"]["n_ctx_train"]) == (30, 8192)
    assert facts["tensor_types"]["Q4_1"]["tensors"] == 210
    assert cli("info", "--show-template").stdout == facts["chat_template"] + "\n"


def test_info_and_tokenize_on_a_vocabulary_alone(cli: Cli, tmp_path: Path) -> None:
    model = tiny()
    model.tensors = {}
    path = model.write(tmp_path / "vocab.gguf")
    result = cli("info", path)
    assert result.exit_code == 0, result.stderr
    assert "vocabulary without weights" in result.stdout
    assert json.loads(cli("info", path, "--json").stdout)["model"] is None
    assert cli("tokenize", path, "a", "--ids").exit_code == 0
    run = cli("run", path, "-p", "x")
    assert run.exit_code == 1
    only_line(run.stderr)


def test_control_characters_of_a_file_do_not_reach_the_terminal(cli: Cli, tmp_path: Path) -> None:
    model = tiny()
    model.keys["general.name"] = ("str", "evil\x1b[2J\x9b31m")
    assert "\x1b" not in cli("info", model.write(tmp_path / "m.gguf")).stdout


def test_a_terminal_gets_no_escape_sequences_of_a_file_and_a_pipe_every_byte(cli: Cli, tmp_path: Path) -> None:
    template = "a\x1b]0;evil\x07\x9bz\n\tb"
    model = tiny()
    model.keys["tokenizer.chat_template"] = ("str", template)
    path = model.write(tmp_path / "m.gguf")
    for command in ("chat", "info"):
        assert cli(command, path, "--show-template").stdout == template + "\n"
        assert on_terminal(command, path, "--show-template") == "a]0;evilz\n\tb\n"
    assert "\x1b" in minirt("tokenize", path, "\x1b[2J").stdout.decode()
    assert "\x1b" not in (pieces := on_terminal("tokenize", path, "\x1b[2J"))
    assert "-> '['" in pieces


def test_a_name_of_two_lines_is_shown_on_one(cli: Cli, tmp_path: Path) -> None:
    model = tiny()
    model.keys["general.name"] = ("str", "two\nlines")
    assert cli("info", model.write(tmp_path / "m.gguf")).stdout.splitlines()[0].endswith(": two lines")


# -- tokenize ----------------------------------------------------------------------------------------------------------


def test_tokenize_prints_ids_and_pieces(cli: Cli, tiny: Path) -> None:
    ids = cli("tokenize", tiny, "the in", "--ids").stdout
    assert ids.endswith("\n")
    lines = cli("tokenize", tiny, "the in").stdout.splitlines()
    assert [line.split(" -> ")[0].strip() for line in lines] == ids.split()
    assert "".join(line.split(" -> ")[1][1:-1] for line in lines) == "the in"


def test_tokenize_is_exact_to_the_byte(tiny: Path) -> None:
    raw = bytes(range(256)) + "é漢🙂\r\n".encode() + b"\n\n"
    result = minirt("tokenize", tiny, "--ids", "--no-parse-special", stdin=None, input=raw)
    ids = [int(i) for i in result.stdout.split()]
    from minirt.gguf_file import GGUFFile
    from minirt.tokenizer import Tokenizer

    with GGUFFile.open(tiny) as file:
        assert Tokenizer.from_metadata(file.metadata, "tiny").decode_bytes(ids) == raw


def test_tokenize_bos_and_special(cli: Cli, tiny: Path, tiny_spm: Path) -> None:
    assert cli("tokenize", tiny_spm, "a", "--ids").stdout.split()[0] == "1"
    assert cli("tokenize", tiny_spm, "a", "--ids", "--no-bos").stdout.split()[0] != "1"
    assert cli("tokenize", tiny, "<|im_end|>", "--ids").stdout == "2\n"
    assert len(cli("tokenize", tiny, "<|im_end|>", "--ids", "--no-parse-special").stdout.split()) > 2
    assert cli("tokenize", tiny, "", "--ids").stdout == "\n"


def test_tokenize_takes_a_text_alone(cli: Cli, smollm2: Path) -> None:
    assert cli("tokenize", "Hello world", "--ids").stdout == cli("tokenize", smollm2, "Hello world", "--ids").stdout
    assert cli("tokenize", "nosuch.gguf", "--ids").exit_code == 1


def test_tokenize_takes_the_name_of_a_folder_as_text(
    cli: Cli, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hello").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli("tokenize", "hello", "--ids").stdout == cli("tokenize", smollm2, "hello", "--ids").stdout != ""
