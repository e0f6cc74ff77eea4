"""Turns plain data into Structs, with errors that name the exact place and the nearest right word.

It knows msgspec and nothing of what the Structs mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

T = TypeVar("T")

NEAREST_LIMIT = 200
MAX_TEXT_BYTES = 64 * 2**20
MAX_DEPTH = 64


class DecodeError(ValueError):
    """Data does not fit its Struct; the text names the place and says what is allowed."""


class Secret(str):
    """Text that is never shown: its repr is a mask."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def nearest(word: str, words: Iterable[str]) -> list[str]:
    """Up to three of `words` that look like `word`, best first, case aside."""
    if len(word) > NEAREST_LIMIT:
        return []  # nobody misspells so much, and comparing would take long
    from difflib import get_close_matches

    by_lower = {w.lower(): w for w in words}
    return [by_lower[m] for m in get_close_matches(word.lower(), by_lower, n=3, cutoff=0.5)]


def did_you_mean(word: str, words: Iterable[str], *, what: str = "Known") -> str:
    """A sentence that helps who misspelt `word`: near names, or else all there are."""
    words = sorted(words)
    if near := nearest(word, words):
        return "Did you mean " + " or ".join(repr(n) for n in near) + "?"
    shown = ", ".join(words[:20]) + (", ..." if len(words) > 20 else "")
    return f"{what}: {shown}." if words else f"{what}: none."


def decode(data: Any, kind: type[T], path: str = "$", *, strict: bool = True) -> T:
    """Convert plain data (dict, list, text, numbers) to `kind`.

    Args:
        data: what json.loads or yaml.safe_load gave.
        kind: a msgspec Struct, or any type that msgspec converts.
        path: how error texts name the place of `data`.
        strict: False also takes numbers and booleans written as text.
    Raises:
        DecodeError: naming the path of the first thing that is wrong.
    """
    result: T = _decode(data, kind, path, strict)
    return result


def _decode(data: Any, kind: Any, path: str, strict: bool) -> Any:
    inner = _without_notes(kind)
    if isinstance(inner, type) and issubclass(inner, msgspec.Struct) and isinstance(data, Mapping):
        return _decode_struct(data, inner, path, strict)
    if get_origin(inner) is dict and isinstance(data, Mapping):
        value_kind = get_args(inner)[1]
        return {str(key): _decode(value, value_kind, f"{path}.{key}", strict) for key, value in data.items()}
    if get_origin(inner) is tuple and isinstance(data, list | tuple) and get_args(inner)[1:] == (...,):
        item_kind = get_args(inner)[0]
        return tuple(_decode(item, item_kind, f"{path}[{index}]", strict) for index, item in enumerate(data))
    try:
        return msgspec.convert(data, kind, strict=strict, dec_hook=_decode_secret)
    except msgspec.ValidationError as exc:
        text, _, where = str(exc).partition(" - at `$")
        if text.startswith("Invalid enum value") and not where and (choices := _choices(kind)):
            text += f", expected {' or '.join(choices)}"
        raise DecodeError(f"{text} - at `{path}{where.rstrip('`')}`") from exc


def faults(data: Any, kind: Any, path: str = "$", *, strict: bool = True) -> Iterator[str]:
    """Everything that `decode` could complain of, place by place; keys that are not known aside."""
    inner = _without_notes(kind)
    if isinstance(inner, type) and issubclass(inner, msgspec.Struct) and isinstance(data, Mapping):
        types = _types(inner)
        for field in msgspec.structs.fields(inner):
            key = field.encode_name
            if key in data:
                yield from faults(data[key], types[field.name], f"{path}.{key}", strict=strict)
            elif field.required:
                yield f"Required key {key!r} is missing - at `{path}`"
        return
    if get_origin(inner) is tuple and isinstance(data, list | tuple) and get_args(inner)[1:] == (...,):
        for index, item in enumerate(data):
            yield from faults(item, get_args(inner)[0], f"{path}[{index}]", strict=strict)
        return
    try:
        _decode(data, kind, path, strict)
    except DecodeError as exc:
        yield str(exc)


def _choices(kind: Any) -> list[str]:
    """What a value may be, where words are among it; null aside."""
    if get_origin(kind) is Literal:
        return [repr(word) for word in get_args(kind)]
    if get_origin(kind) is Annotated:
        return _choices(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [choice for one in get_args(kind) for choice in _choices(one)]
    return [f"`{kind.__name__}`"] if kind in (bool, int, float, str) else []


def _without_notes(kind: Any) -> Any:
    """The type within Annotated[...] and within `... | None`."""
    if get_origin(kind) is Annotated:
        return _without_notes(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        kinds = [one for one in get_args(kind) if one is not NoneType]
        return _without_notes(kinds[0]) if len(kinds) == 1 else kind
    return kind


def _decode_struct(data: Mapping[Any, Any], kind: type[msgspec.Struct], path: str, strict: bool) -> Any:
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    if kind.__struct_config__.forbid_unknown_fields:
        for key in data:
            if key not in fields:
                hint = did_you_mean(str(key), fields, what="Known keys")
                raise DecodeError(f"Unknown key {key!r} - at `{path}`. {hint}")
    types = _types(kind)
    values = {}
    for key, field in fields.items():
        if key in data:
            values[field.name] = _decode(data[key], types[field.name], f"{path}.{key}", strict)
        elif field.required:
            raise DecodeError(f"Required key {key!r} is missing - at `{path}`")
    try:
        return kind(**values)
    except (ValueError, TypeError) as exc:  # __post_init__
        raise DecodeError(f"{exc} - at `{path}`") from exc


@cache
def _types(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _decode_secret(kind: type, data: Any) -> Any:
    if kind is Secret:
        if isinstance(data, str):
            return Secret(data)
        raise ValueError(f"Expected `str`, got `{type(data).__name__}`")
    raise NotImplementedError(f"no way to make {kind}")


def parse(text: str | bytes, max_bytes: int = MAX_TEXT_BYTES) -> Any:
    """What a JSON text says; unlike json.loads, with each key once and nothing that could not be written again.

    Raises:
        DecodeError: it is no JSON, a key is there twice, or it is too large or too deep.
    """
    try:
        if len(text) > max_bytes:
            raise DecodeError(f"The JSON text is longer than {max_bytes // 2**20} MiB.")
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as exc:
        raise DecodeError(f"This is not JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}.") from exc
    except RecursionError as exc:
        raise DecodeError(f"The JSON is nested deeper than {MAX_DEPTH} levels.") from exc
    except UnicodeDecodeError as exc:
        raise DecodeError("This is not JSON: it is not UTF-8 text.") from exc
    except ValueError as exc:  # a number of thousands of digits, or a DecodeError of ours
        raise exc if isinstance(exc, DecodeError) else DecodeError(f"This is not JSON that we take: {exc}.") from exc
    check_plain(data)
    return data


def check_plain(data: Any) -> None:
    """Whether data can be written as JSON and read again.

    Raises:
        DecodeError: naming what cannot.
    """
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                for key in value:
                    if not isinstance(key, str):
                        raise DecodeError(f"Expected keys of `str`, got `{type(key).__name__}`.")
                    _check_text(key)
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
            elif isinstance(value, str):
                _check_text(value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise DecodeError(f"The number {value} is not of JSON.")
            elif isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise DecodeError("A number has more than 64 bits.")
            elif value is not None and not isinstance(value, int | float):
                raise DecodeError(f"Values of `{type(value).__name__}` are not of JSON.")
        if not below:
            return
        level = below
    raise DecodeError(f"The JSON is nested deeper than {MAX_DEPTH} levels.")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise DecodeError("A text holds half of a surrogate pair, which is no Unicode character.") from exc


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DecodeError(f"Key {key[:100]!r} is there twice. Leave one of them out.")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise DecodeError(f"The number {name} is not of JSON.")


def schema(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a Struct, for editors."""
    return msgspec.json.schema(kind, schema_hook=_schema_of_secret)


def _schema_of_secret(kind: type) -> dict[str, Any]:
    if kind is Secret:
        return {"type": "string"}
    raise NotImplementedError(f"no schema of {kind}")
