"""How models write the tools that they call, and how such texts are read: one Form for each way.

Which one is a model's is told by its chat template, which writes earlier calls in the same way.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Calls = list[tuple[str, Any]]
"""Name and arguments of each call."""
Types = Mapping[str, Mapping[str, Any]]
"""Name of a tool -> name of an argument -> its JSON schema."""


class Form(NamedTuple):
    """Calls stand between `start` and `end`; without an end, up to the answer's end.

    With `openings` there is no start either: an answer that begins with one of them is calls as a whole. `read` raises
    ValueError, or another error of what it meets, if the text is no call.
    """

    read: Callable[[str, Types], Calls]
    start: str = ""
    end: str = ""
    openings: tuple[str, ...] = ()
    has_short_ids: bool = False


def tools_of(tools: list[Any]) -> Types:
    """The types of the arguments of a request's tools."""
    found = {}
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        parameters = function.get("parameters") if isinstance(function, dict) else None
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        if isinstance(function, dict) and "name" in function:
            found[str(function["name"])] = properties if isinstance(properties, dict) else {}
    return found


def _as_call(call: Any) -> tuple[str, Any]:
    return str(call["name"]), call.get("arguments", call.get("parameters", {}))


def _typed(text: str, name: str, key: str, types: Types) -> Any:
    """An argument that is written bare, as the tool's schema has it."""
    schema = types.get(name, {}).get(key, {})
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


XML_NAME = re.compile(r"<function=([^>]+)>")
XML_ARGUMENT = re.compile(r"<parameter=([^>]+)>(.*?)</parameter>", re.DOTALL)
GLM_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def _read_tagged(text: str, types: Types) -> Calls:
    """JSON (Hermes, Qwen), or <function=...> (Qwen3-Coder), or <arg_key> (GLM-4.5): all between the same tags."""
    text = text.strip()
    if found := XML_NAME.match(text):
        name = found[1].strip()
        given = {key.strip(): value.strip("\n") for key, value in XML_ARGUMENT.findall(text)}
    elif text.startswith(("{", "[")):
        return [_as_call(json.loads(text))]
    else:
        name = text.split("<arg_key>")[0].strip()
        given = {key.strip(): value for key, value in GLM_ARGUMENT.findall(text)}
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(name)
    return [(name, {key: _typed(value, name, key, types) for key, value in given.items()})]


def _read_mistral(text: str, types: Types) -> Calls:
    """[{"name": ..., "arguments": ...}, ...], or of newer ones name[ARGS]{...}."""
    if text.lstrip().startswith(("[", "{")):
        calls = json.loads(text)
        return [_as_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    found = []
    for part in text.split("[TOOL_CALLS]"):
        name, _, arguments = part.partition("[ARGS]")
        found.append((name.split("[CALL_ID]")[0].strip(), json.loads(arguments)))
    return found


def _read_llama3(text: str, types: Types) -> Calls:
    """{"name": ..., "parameters": ...}, several with semicolons between them."""
    text = text.strip().removeprefix("<|python_tag|>")
    found, decoder = [], json.JSONDecoder()
    while text.strip():
        call, end = decoder.raw_decode(text.lstrip())
        found.append(_as_call(call))
        text = text.lstrip()[end:].lstrip("; \n")
    return found


def _read_pythonic(text: str, types: Types) -> Calls:
    """[name(key=value), ...], a list of calls as Python writes them."""
    tree = ast.parse(text.strip().removeprefix("<|python_start|>").removesuffix("<|python_end|>"), mode="eval").body
    if not isinstance(tree, ast.List) or not tree.elts:
        raise ValueError(text)
    found = []
    for call in tree.elts:
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError(text)
        given = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
        found.append((ast.unparse(call.func), given))
    return found


DEEPSEEK_CALL = re.compile("<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>", re.DOTALL)
FENCED = re.compile(r"(.+?)\n```json\n(.*?)\n```", re.DOTALL)


def _read_deepseek(text: str, types: Types) -> Calls:
    """type, name and fenced JSON (V3, R1), or name and JSON (V3.1), with marks around each call."""
    found = []
    for first, second in DEEPSEEK_CALL.findall(text):
        fenced = FENCED.fullmatch(second.strip())
        name, arguments = (fenced[1], fenced[2]) if fenced else (first, second)
        found.append((name.strip(), json.loads(arguments)))
    if not found:
        raise ValueError(text)
    return found


# Of the above, what tokenizers may have as special tokens, which are left out of texts elsewhere.
MARKS = frozenset(
    [
        *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|python_start|>", "<|python_end|>"),
        *(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")),
    ]
)
FORMS = {
    "tagged": Form(_read_tagged, "<tool_call>", "</tool_call>"),
    "mistral": Form(_read_mistral, "[TOOL_CALLS]", has_short_ids=True),  # its templates refuse others
    "deepseek": Form(_read_deepseek, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    "llama3": Form(_read_llama3, openings=("<|python_tag|>", "{")),
    "pythonic": Form(_read_pythonic, openings=("<|python_start|>", "[")),
}
# What a template has in it -> the form; the first that fits counts.
SIGNS = (
    ("<tool_call>", "tagged"),
    ("[TOOL_CALLS]", "mistral"),
    ("<｜tool▁calls▁begin｜>", "deepseek"),
    ("<|python_start|>", "pythonic"),
    ("[func_name1(params_name1=params_value1", "pythonic"),
    ("<|python_tag|>", "llama3"),
    ('{"name": function name, "parameters":', "llama3"),
)


def form_of(template: str) -> Form:
    """How a model of this chat template writes calls; the commonest way if nothing tells."""
    return FORMS[next((name for sign, name in SIGNS if sign in template), "tagged")]
