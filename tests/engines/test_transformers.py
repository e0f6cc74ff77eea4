"""transformers: from a launch to the worker's argv and options; and how the worker splits text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from llms import FOLDER, a_family, a_launch, a_package, a_python, an_artifact

from engines.base import Endpoint, EngineSettings, Placement
from engines.environments import worker_argv
from engines.transformers import Transformers
from engines.workers.answers import Message, Text, message_of
from engines.workers.tool_calls import FORMS, form_of, tools_of
from registry.decode import DecodeError

SOCKET = Endpoint(socket="/run/a.sock", api_key="the-secret-key")
ENGINE = Transformers(settings=EngineSettings(python=sys.executable))


def options_of(options: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """What the worker is told."""
    command = ENGINE.command(a_launch(options, **more), FOLDER, Placement(), SOCKET, None)
    told: dict[str, Any] = json.loads(command.env["WORKER_OPTIONS"])
    return told


def test_where_the_library_is_not_it_says_what_to_install(tmp_path: Path) -> None:
    assert "hostler engines install transformers" in str(Transformers().installed())
    python = a_python(tmp_path)
    engine = Transformers(settings=EngineSettings(python=str(python)))
    assert engine.installed() == f"{python} has no torch and no transformers"
    for name in ("torch", "transformers"):
        a_package(python, name, f"{name}-1", {"__init__.py": ""})
    assert engine.installed() is None


@pytest.mark.parametrize(
    ("model_format", "reason"),
    [("pytorch", None), ("gptq", None), ("ggufv2", "transformers loads pytorch, gptq, awq, bnb, fp4, fp8, not ggufv2")],
)
def test_which_formats_it_accepts(model_format: str, reason: str | None) -> None:
    assert ENGINE.accepts(an_artifact(model_format=model_format)) == reason


def test_the_whole_command() -> None:
    launch = a_launch({"n_threads": 2, "context_length": 99}, envs={"X": "1"}, n_gpu=0)
    command = ENGINE.command(launch, FOLDER, Placement(gpu_uuids=()), SOCKET, None)
    assert command.argv == (
        *worker_argv("generation", sys.executable),
        *("--model", "/models/qwen", "--uid", "mine", "--host", "/run/a.sock", "--port", "0"),
    )
    assert (command.env["WORKER_API_KEY"], command.env["X"]) == ("the-secret-key", "1")
    assert command.env["CUDA_VISIBLE_DEVICES"] == ""
    assert json.loads(command.env["WORKER_OPTIONS"]) == {
        "context_length": 99,
        "kv_cache_tokens": 396,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "continuous_batching": True,
        "n_threads": 2,
        "device": "cpu",
    }


def test_what_the_family_says_reaches_it() -> None:
    family = a_family(
        chat_template="{{ messages }}",
        reasoning_start_tag="<think>",
        reasoning_end_tag="</think>",
        stop=("<end>",),
        stop_token_ids=(2,),
    )
    told = options_of({"enable_thinking": False}, family=family)
    assert told["chat_template"] == "{{ messages }}"
    assert told["reasoning_tags"] == ["<think>", "</think>"]
    assert told["template_values"] == {"enable_thinking": False}
    assert "reasoning_tags" not in options_of({"reasoning_content": False}, family=family)
    assert ENGINE.defaults(a_launch(family=family)) == {"stop": ["<end>"], "stop_token_ids": [2]}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context_lenght": 2}, ["'context_lenght'", "'context_length'"]),
        ({"max_num_seqs": 0}, ["`options.max_num_seqs`", ">= 1"]),
        ({"lora_list": [{"lora_name": name, "local_path": "/l"} for name in "ab"]}, ["merges one", "vLLM"]),
        ({"tool_form": "xml"}, ["`options.tool_form`", "xml"]),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_by_its_name(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DecodeError) as caught:
        ENGINE.read_options(options)
    assert [word for word in words if word not in str(caught.value)] == []


# --- text out of tokens: here a token is a byte


def of_bytes(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def told(text: str, stop: list[str]) -> tuple[list[str], bool]:
    """The pieces that are told for a text that comes byte by byte."""
    reader = Text(of_bytes, stop)
    data = text.encode()
    pieces = [reader.add([byte], is_last=at == len(data) - 1) for at, byte in enumerate(data)]
    return pieces, reader.is_stopped


def test_a_character_is_told_when_its_last_byte_has_come() -> None:
    assert told("aé€", []) == (["a", "", "é", "", "", "€"], False)


@pytest.mark.parametrize(
    ("text", "stop", "expected", "is_stopped"),
    [
        ("one STOP two", ["STOP"], "one ", True),
        ("one STO", ["STOP"], "one STO", False),
        ("SSTOP", ["STOP"], "S", True),
        ("a, b. c", [".", ","], "a", True),
        ("plain", [], "plain", False),
        ("plain", [""], "plain", False),
    ],
)
def test_text_ends_before_a_stop(text: str, stop: list[str], expected: str, is_stopped: bool) -> None:
    pieces, stopped = told(text, stop)
    assert ("".join(pieces), stopped) == (expected, is_stopped)


def test_what_may_begin_a_stop_is_held_back_until_it_is_known() -> None:
    pieces, _ = told("xSTy", ["STOP"])
    assert pieces == ["x", "", "", "STy"]


# --- messages out of text


def message(text: str, size: int, **how: Any) -> dict[str, Any]:
    """The message of a text that comes in pieces of that size."""
    reader = Message(**how)
    pieces = [text[at : at + size] for at in range(0, len(text), size)] or [""]
    deltas = [delta for piece in pieces[:-1] for delta in reader.add(piece)]
    return message_of([*deltas, *reader.add(pieces[-1], is_last=True)])


THINK = {"tags": ("<think>", "</think>")}
TOOLS = {"form": FORMS["tagged"]}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "how", "expected"),
    [
        ("hello", {}, {"content": "hello"}),
        ("<think>hm</think>\n\nhello", THINK, {"reasoning_content": "hm", "content": "hello"}),
        ("hm</think>hello", THINK | {"is_thinking": True}, {"reasoning_content": "hm", "content": "hello"}),
        ("<think>hm", THINK, {"reasoning_content": "hm", "content": ""}),
        ("<thinner", THINK, {"content": "<thinner"}),
        ("a <think>b</think> c <think>", THINK, {"reasoning_content": "b", "content": "a  c <think>"}),
        ("<think>hm</think>", {}, {"content": "<think>hm</think>"}),
        ("<tool_call>no json</tool_call>", TOOLS, {"content": "<tool_call>no json</tool_call>"}),
        (CALL, {}, {"content": CALL}),
    ],
    ids=str,
)
def test_a_message_is_split_however_its_text_comes(
    text: str, how: dict[str, Any], expected: dict[str, Any], size: int
) -> None:
    assert message(text, size, **how) == {"role": "assistant"} | expected


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_tool_calls_are_read_one_after_the_other(size: int) -> None:
    read = message(f"<think>hm</think>Well.\n{CALL}\n{CALL}{CALL.replace('f', 'g')}", size, **THINK, **TOOLS)
    assert (read["reasoning_content"], read["content"]) == ("hm", "Well.\n")
    assert [call["function"] for call in read["tool_calls"]] == [
        {"name": "f", "arguments": '{"a": 1}'},
        {"name": "f", "arguments": '{"a": 1}'},
        {"name": "g", "arguments": '{"a": 1}'},
    ]
    assert len({call["id"] for call in read["tool_calls"]}) == 3


def test_a_call_that_is_cut_off_is_read_if_it_can_be() -> None:
    assert message(CALL.removesuffix("</tool_call>"), 5, **TOOLS)["tool_calls"]
    assert message(CALL[:20], 5, **TOOLS)["content"] == CALL[:20]


@pytest.mark.parametrize(
    ("options", "fields", "expected"),
    [
        ({}, {}, (None, None, False)),
        ({"device_map": "auto"}, {}, (None, None, True)),
        ({"device": "cpu"}, {}, (None, 0, False)),
        ({"device": "cuda:2"}, {}, ((2,), None, False)),
        ({"device": "cuda:2"}, {"gpu_idx": (1,)}, ((1,), None, False)),
        ({"device": "cuda"}, {"n_gpu": 1}, (None, 1, False)),
    ],
)
def test_its_device_says_where_it_computes(options: dict[str, Any], fields: dict[str, Any], expected: Any) -> None:
    needs = ENGINE.needs(a_launch(options, **fields))
    assert (needs.gpu_idx, needs.n_gpu, needs.can_spread) == expected


@pytest.mark.parametrize(
    ("options", "tokens", "sequences"),
    [
        ({}, 4096, 4),
        ({"max_num_seqs": 1}, 4096, 1),
        ({"context_length": 1000, "max_num_seqs": 16}, 1000, 8),
        ({"context_length": 1000, "kv_cache_tokens": 2500}, 1000, 3),
        ({"context_length": 1000, "kv_cache_tokens": 64}, 64, 1),
        ({"continuous_batching": False}, None, None),
    ],
    ids=str,
)
def test_the_cache_that_the_worker_makes_is_asked_for(
    options: dict[str, Any], tokens: int | None, sequences: int | None
) -> None:
    cache = ENGINE.needs(a_launch(options)).cache
    assert (cache and cache.tokens, cache and cache.sequences) == (tokens, sequences)


def test_the_gpu_that_it_got_is_the_first_that_it_sees() -> None:
    command = ENGINE.command(a_launch({"device": "cuda:2"}), FOLDER, Placement(gpu_uuids=("GPU-2",)), SOCKET, None)
    assert json.loads(command.env["WORKER_OPTIONS"])["device"] == "cuda"
    assert command.env["CUDA_VISIBLE_DEVICES"] == "GPU-2"


# --- tool calls in the ways of families

TYPES = tools_of(
    [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {"s": {"type": "string"}}}}},
        {"type": "function", "function": {"name": "g"}},
    ]
)
QWEN_CODER = """<tool_call>
<function=f>
<parameter=s>
12
</parameter>
<parameter=n>
12
</parameter>
</function>
</tool_call>"""
GLM = """<tool_call>f
<arg_key>s</arg_key>
<arg_value>12</arg_value>
<arg_key>n</arg_key><arg_value>12</arg_value></tool_call>"""
LLAMA = '{"name": "f", "parameters": {"s": "12", "n": 12}}'
BOTH = [("f", {"s": "12", "n": 12})]
DEEPSEEK = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
DEEPSEEK_V3 = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"s": "12", "n": 12}\n```<｜tool▁call▁end｜>'
DEEPSEEK_V31 = '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"s": "12", "n": 12}<｜tool▁call▁end｜>'


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("tagged", QWEN_CODER, None, BOTH),
        ("tagged", f"Well.{GLM}\n{GLM}", "Well.", BOTH * 2),
        ("tagged", "<tool_call>g</tool_call>", None, [("g", {})]),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"s": "12", "n": 12}}]', None, BOTH),
        ("mistral", 'Well.[TOOL_CALLS]f[ARGS]{"s": "12", "n": 12}[TOOL_CALLS]g[ARGS]{}', "Well.", [*BOTH, ("g", {})]),
        ("deepseek", DEEPSEEK.format(DEEPSEEK_V3), None, BOTH),
        ("deepseek", "Well." + DEEPSEEK.format(f"{DEEPSEEK_V31}\n{DEEPSEEK_V31}"), "Well.", BOTH * 2),
        ("llama3", LLAMA, None, BOTH),
        (
            "llama3",
            f'<|python_tag|>{LLAMA}; {{"name": "g"}}',
            None,
            [*BOTH, ("g", {})],
        ),
        ("pythonic", '[f(s="12", n=12), g()]', None, [*BOTH, ("g", {})]),
        ("pythonic", '<|python_start|>[f(s="12", n=12)]<|python_end|>', None, BOTH),
    ],
    ids=str,
)
def test_calls_are_read_in_the_way_of_the_family(
    name: str, text: str, content: str | None, calls: list[tuple[str, Any]], size: int
) -> None:
    read = message(text, size, form=FORMS[name], types=TYPES)
    assert read["content"] == content
    told = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in read["tool_calls"]]
    assert told == calls
    lengths = {len(call["id"]) for call in read["tool_calls"]}
    assert lengths == {9 if name == "mistral" else 29}


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tagged", "<tool_call>two words</tool_call>"),
        ("mistral", "[TOOL_CALLS] [{"),
        ("deepseek", DEEPSEEK.format("nothing")),
        ("llama3", '{"name": "Bob", "age": 3}'),
        ("llama3", "{ is a brace"),
        ("llama3", "Well. {}"),
        ("pythonic", "[1, 2]"),
        ("pythonic", "[h()]"),
        ("pythonic", '[f(s=open("x"))]'),
        ("pythonic", "[see below"),
    ],
    ids=str,
)
def test_what_is_no_call_stays_text(name: str, text: str, size: int) -> None:
    assert message(text, size, form=FORMS[name], types=TYPES) == {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }}", "tagged"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("{{ '<｜tool▁calls▁begin｜>' }}", "deepseek"),
        ("<|python_tag|>", "llama3"),
        ('Respond in the format {"name": function name, "parameters": dictionary}.', "llama3"),
        ("[func_name1(params_name1=params_value1...)", "pythonic"),
        ("{{ messages }}", "tagged"),
    ],
)
def test_the_chat_template_tells_the_way(template: str, name: str) -> None:
    assert form_of(template) == FORMS[name]
