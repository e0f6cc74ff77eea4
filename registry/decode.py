"""Turns plain data into Structs, with errors that name the exact place and the nearest right word.

It knows msgspec and nothing of what the Structs mean.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

T = TypeVar("T")

NEAREST_LIMIT = 200


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
    by_lower = {w.lower(): w for w in words}
    return [by_lower[m] for m in difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.5)]


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
        raise DecodeError(f"{text} - at `{path}{where.rstrip('`')}`") from exc


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
    types = get_type_hints(kind, include_extras=True)
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


def _decode_secret(kind: type, data: Any) -> Any:
    if kind is Secret:
        if isinstance(data, str):
            return Secret(data)
        raise ValueError(f"Expected `str`, got `{type(data).__name__}`")
    raise NotImplementedError(f"no way to make {kind}")


def schema(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a Struct, for editors."""
    return msgspec.json.schema(kind, schema_hook=_schema_of_secret)


def _schema_of_secret(kind: type) -> dict[str, Any]:
    if kind is Secret:
        return {"type": "string"}
    raise NotImplementedError(f"no schema of {kind}")
