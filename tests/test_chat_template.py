"""Chat templates: the usual families to the letter, and hostile ones stopped in time."""
# ruff: noqa: E501, since templates break where their authors break them

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import minirt.chat_template
from minirt.chat_template import FALLBACK, MAX_SOURCE, ChatTemplate, load_template
from minirt.errors import ModelError, UsageError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>'you'</b>"},
    {"role": "assistant", "content": " Hello! "},
    {"role": "user", "content": "Bye"},
]

# Small versions of what the models of each family ship, with what they print for TALK.
FAMILIES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>'you'</b><|im_end|>\n"
        "<|im_start|>assistant\n Hello! <|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}"
        "{% endif %}{% if loop.index0 == 0 and system != false %}"
        "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi <b>'you'</b> [/INST] Hello! </s><s>[INST] Bye [/INST]",
    ),
    "llama-3": (
        "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = '26 Jul 2024' %}\n{%- endif %}\n"
        "{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}\n"
        "    {%- if loop.first %}\n        {{- 'Today: ' + date_string + '\n' }}\n    {%- endif %}\n"
        "    {{- message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi <b>'you'</b><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": (
        "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set loop_messages = messages[1:] %}"
        "{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}{%- for message in loop_messages %}"
        "{%- if message.role == 'user' %}{%- if loop.last and system is defined %}"
        "{{- '[INST] ' + system + '\n\n' + message.content + '[/INST]' }}{%- else %}"
        "{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}{%- elif message.role == 'assistant' %}"
        "{{- ' ' + message.content | trim + eos_token }}{%- else %}{{- raise_exception('Only user and assistant') }}"
        "{%- endif %}{%- endfor %}",
        "<s>[INST] Hi <b>'you'</b>[/INST] Hello!</s>[INST] Be brief.\n\nBye[/INST]",
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% else %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "<|system|>\nBe brief.</s>\n<|user|>\nHi <b>'you'</b></s>\n<|assistant|>\n Hello! </s>\n<|user|>\nBye</s>\n<|assistant|>\n",
    ),
    "gemma": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\n\n' %}{% continue %}{% endif %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + ns.system + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% set ns.system = '' %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<s><start_of_turn>user\nBe brief.\n\nHi <b>'you'</b><end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    ),
    "deepseek": (
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{% set ns.system = m['content'] %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}"
        "{% if m['role'] == 'assistant' and m['content'] is not none %}{% set content = m['content'].split('</think>')[-1] %}"
        "{{ '<｜Assistant｜>' + content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
        "<s>Be brief.<｜User｜>Hi <b>'you'</b><｜Assistant｜> Hello! </s><｜User｜>Bye<｜Assistant｜><think>\n",
    ),
    "qwen": (
        "{%- if tools %}\n    {{- '<|im_start|>system\\n# Tools\\n' }}\n    {%- for tool in tools %}\n"
        "        {{- tool | tojson }}\n    {%- endfor %}\n    {{- '<|im_end|>\\n' }}\n{%- endif %}\n"
        "{%- macro turn(role, text) -%}\n    {{- '<|im_start|>' + role + '\\n' + text + '<|im_end|>' + '\\n' }}\n{%- endmacro %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role in ('user', 'system') or (message.role == 'assistant' and not message.tool_calls) %}\n"
        "        {{- turn(message.role, message.content) }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
        "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>'you'</b><|im_end|>\n"
        "<|im_start|>assistant\n Hello! <|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    ),
    "fallback": (FALLBACK, "System: Be brief.\n\nUser: Hi <b>'you'</b>\n\nAssistant:  Hello! \n\nUser: Bye\n\nAssistant:"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    source, text = FAMILIES[name]
    template = ChatTemplate(source, "<s>", "</s>")
    assert template.render(TALK) == text
    closed = template.render(TALK, add_generation_prompt=False)
    assert text.startswith(closed.rstrip("\n"))


def test_extras_reach_the_template():
    template = ChatTemplate(FAMILIES["qwen"][0])
    assert template.render(TALK, enable_thinking=False).endswith("assistant\n<think>\n\n</think>\n\n")
    tool = {"name": "look", "text": "<é>", "n": 1.5}
    assert '# Tools\n{"name": "look", "text": "<é>", "n": 1.5}<|im_end|>' in template.render(TALK, tools=[tool])


def test_what_transformers_offers():
    render = ChatTemplate(
        "{% generation %}{{ strftime_now('%Y') | length }}{% endgeneration %}"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}\n"
        "    {% if true %}\n{{ {'b': 1, 'a': '<'} | tojson(indent=1, sort_keys=true) }}\n    {% endif %}\n"
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}"
    ).render
    assert render(TALK) == "401" + '{\n "a": "<",\n "b": 1\n}\n' + "Hi <b>'you'</b>|Bye"


def test_text_survives_whatever_it_holds():
    odd = "\0\x1b\r\n\u2028 {{ 1 }} 😀 \udcff \\u0041 \"'"
    assert ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": odd}]) == odd
    long = "é😀" * 500_000
    assert ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": long}]) == long


REFUSED = {
    "a{{ '\\ud800' }}": r"prints the lone surrogate '\\ud800'",
    "{# nothing #}": "prints nothing for this conversation",
    "{{": "line 1: unexpected 'end of template'",
    "a\n{% if %}": "line 2: Expected an expression",
    "{% frob %}": "line 1: Encountered unknown tag 'frob'",
    "{{ 'x' | frob }}": "No filter named 'frob'",
    "{{ raise_exception('no\nway\x1b[2J') }}": r"refused: no way \[2J",
    "{{ raise_exception('x' * 5000) }}": "refused: x{50}",
    "{{ frob.x }}": "'frob' is undefined",
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{{ ''.__class__.__mro__ }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ messages.append(1) }}": "access to attribute 'append' of 'list' object is unsafe",
    "{{ range(10 ** 9) | list }}": "Range too big",
    "{% include 'x' %}": "no loader for this environment",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recurses too deeply",
    "{{" + "(" * 20_000 + "}}": "recurses too deeply",
    "{{ 'a' * 10 ** 9 }}": "needs more than 512 MB of memory",
    "{{ 'a' | center(10 ** 9) }}": "needs more than 512 MB of memory",
    "{{ '%1000000000d' % 1 }}": "needs more than 512 MB of memory",
    "{{ messages | tojson(indent=10 ** 9) }}": "needs more than 512 MB of memory",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "512 MB|over 2 s",
    "{% for i in range(90000) %}{{ 'x' * 100 }}{% endfor %}": "prints more than 4194304 characters",
    "{{ 'x' * (50 * 2 ** 20) }}": "prints more than 4194304 characters",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "takes over 2 s to render",
    "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x == n.x | list }}"
    "{{ n.x }}": "takes over 2 s to render|512 MB",
    "{{ 9 ** (9 ** 9) }}": "takes over 2 s to render|512 MB",
}  # fmt: skip


@pytest.mark.parametrize("source", REFUSED, ids=lambda source: source[:40].replace("\n", " "))
def test_bad_templates_are_one_line_in_time(source):
    start = time.monotonic()
    with pytest.raises(ModelError, match=REFUSED[source]) as error:
        ChatTemplate(source, origin="here").render(TALK)
    assert time.monotonic() - start < 5
    assert str(error.value).startswith("here: ")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 250


def test_a_template_that_hung_can_be_asked_again():
    template = ChatTemplate("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}done")
    with pytest.raises(ModelError, match="takes over 2 s"):
        template.render(TALK, n=99_999)
    assert template.render(TALK, n=3) == "done"


def test_deadline_holds_off_the_main_thread():
    template = ChatTemplate("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}done")
    said = []

    def render(n: int) -> None:
        try:
            said.append(template.render(TALK, n=n))
        except ModelError as error:
            said.append(str(error))

    threads = [threading.Thread(target=render, args=(n,)) for n in (99_999, 3, 3, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(said) == ["chat template: takes over 2 s to render", "done", "done", "done"]


SHUT_IN = """
import os, runpy, socket, subprocess, sys
runpy.run_path(sys.argv[1])["shut_in"](tuple(sys.path))
for attempt in (
    lambda: open(sys.argv[1]), lambda: open("x", "w"), lambda: os.open(sys.argv[1], 0), lambda: os.system("true"),
    lambda: subprocess.run(["true"]), lambda: socket.create_connection(("127.0.0.1", 9)), lambda: bytes(1 << 30),
):
    try:
        print("done", attempt())
    except (PermissionError, MemoryError) as error:
        print(type(error).__name__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are the system's")
def test_code_in_the_worker_could_do_nothing():
    program = str(Path(minirt.chat_template.__file__).with_name("template_worker.py"))
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", SHUT_IN, program], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["PermissionError"] * 6 + ["MemoryError"]


def test_the_worker_ends_with_the_template():
    template = ChatTemplate("{{ lipsum | string | length > 0 }}")
    template.warm()
    assert template.render(TALK) == "True"
    process = template._worker.process
    del template
    deadline = time.monotonic() + 5
    while process.returncode is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.returncode is not None


def test_a_worker_that_was_killed_is_replaced():
    template = ChatTemplate("{{ messages | length }}")
    assert template.render(TALK) == "4"
    template._worker.process.kill()
    template._worker.process.wait()
    assert template.render(TALK) == "4"


def test_a_ready_template_is_quick():
    template = ChatTemplate(FAMILIES["llama-3"][0])
    template.render(TALK)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        template.render(TALK)
        times.append(time.perf_counter() - start)
    assert sorted(times)[10] < 0.01


def test_too_long_or_of_the_wrong_type():
    with pytest.raises(ModelError, match="larger than 256 KiB"):
        ChatTemplate("x" * (MAX_SOURCE + 1))
    with pytest.raises(UsageError, match="messages must be of JSON's types"):
        ChatTemplate("x").render([{"role": "user", "content": b"x"}])
    with pytest.raises(ModelError, match=r"m.gguf: tokenizer.chat_template: expected str, found int"):
        load_template(None, {"tokenizer.chat_template": 7}, "m.gguf")


def test_load_template(tmp_path):
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"],
        "tokenizer.chat_template": "own {{ bos_token }}{{ eos_token }}",
    }
    assert load_template(None, metadata).render([]) == "own <s></s>"
    assert load_template("{{ eos_token }}!", metadata).render([]) == "</s>!"
    file = tmp_path / "t.jinja"
    file.write_text("file {{ bos_token }}", encoding="utf-8")
    assert load_template(str(file), metadata).render([]) == "file <s>"
    del metadata["tokenizer.chat_template"]
    assert load_template(None, metadata).source == FALLBACK
    with pytest.raises(ModelError, match="cannot read the chat template: No such file"):
        load_template(str(tmp_path / "gone.jinja"), metadata)
    file.write_bytes(b"\xff")
    with pytest.raises(ModelError, match="not UTF-8"):
        load_template(str(file), metadata)
