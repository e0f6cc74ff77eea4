"""From a spec to its Source: addresses, file name templates, parts and projectors. Pure: no disk, no network."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from registry.schema import GGUF, ModelSpec, Source

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


class BadUri(ValueError):
    """A model_uri that names no files on this machine; the text is a sentence for the user."""


def local_path(uri: str) -> Path | None:
    """The path that a model_uri names; None if it is an address of another scheme.

    Raises:
        BadUri: the path is not absolute.
    """
    found = _SCHEME.fullmatch(uri)
    if found and found[1].lower() != "file":
        return None
    path = unquote(found[2]).removeprefix("localhost") if found else uri
    if "\0" in path or not path.startswith("/"):
        raise BadUri(
            f"Model URI cannot be a relative path: {uri[:500]}. Give an absolute path on the server, such as "
            "/models/my-model or file:///models/my-model."
        )
    return Path(path)


def scheme_of(uri: str) -> str:
    """The scheme of an address; empty for a path."""
    found = _SCHEME.fullmatch(uri)
    return found[1] if found else ""


def source_of(
    spec: ModelSpec,
    *,
    model_file: str | None = None,
    model_revision: str | None = None,
    projector: str | None = None,
    cache_config: Mapping[str, Any] | None = None,
) -> Source:
    """Where the spec's files are.

    Args:
        model_file: a file or pattern to take in place of the spec's own; {quantization} is replaced.
        model_revision: in place of the spec's own.
        projector: a multimodal projector's file, beside the model's.
        cache_config: the family's: allow_patterns and ignore_patterns.
    Raises:
        BadUri: the spec's model_uri is of no use.
    """
    files = _files(spec, model_file)
    if projector and files:
        files = (*files, glob.escape(projector))
    if spec.model_uri:
        return _local_source(spec.model_uri, files, projector)
    is_whole = not files
    return Source(
        model_hub=spec.model_hub,
        model_id=fill(spec.model_id or "", spec.quantization),
        model_revision=model_revision or spec.model_revision,
        files=files,
        allow_patterns=_patterns_of(cache_config, "allow_patterns") if is_whole else (),
        ignore_patterns=_patterns_of(cache_config, "ignore_patterns") if is_whole else (),
    )


def fill(template: str, quantization: str, part: str = "") -> str:
    """A template with its places filled in."""
    return template.replace("{quantization}", quantization).replace("{part}", part)


def gguf_patterns(quantization: str | None) -> tuple[str, ...]:
    """What to look for where no file name is known."""
    chosen = None if quantization is None or quantization.casefold() == "none" else quantization
    return (f"*{glob.escape(chosen)}*.gguf",) if chosen else ("*.gguf",)


def is_gguf(name: str) -> bool:
    """Whether that is the name of a GGUF file."""
    return name.lower().endswith(".gguf")


def _files(spec: ModelSpec, model_file: str | None) -> tuple[str, ...]:
    if model_file:
        known = "" if spec.quantization.casefold() == "none" else spec.quantization
        return (model_file.replace("{quantization}", glob.escape(known) if known else "*"),)
    parts = _parts(spec)
    if parts and spec.model_file_name_split_template:
        split = spec.model_file_name_split_template
        return tuple(glob.escape(fill(split, spec.quantization, part)) for part in parts)
    if spec.model_file_name_template:
        return (glob.escape(fill(spec.model_file_name_template, spec.quantization)),)
    return gguf_patterns(spec.quantization) if spec.model_format == GGUF else ()


def _parts(spec: ModelSpec) -> tuple[str, ...]:
    wanted = spec.quantization.casefold()
    by_name = spec.quantization_parts or {}
    return next((parts for name, parts in by_name.items() if name.casefold() == wanted), ())


def _local_source(uri: str, files: tuple[str, ...], projector: str | None) -> Source:
    path = local_path(uri)
    if path is None:
        raise BadUri(
            f"Unsupported URL scheme: {scheme_of(uri)!r}, of model_uri {uri[:500]!r}. "
            "Give an absolute path or a file:// address."
        )
    if "*" in path.name:
        path, files = path.parent, (path.name,)
    elif is_gguf(path.name):
        # One file named in full; with a projector, which lies beside it, it is one of two in its folder.
        path, files = (path.parent, (glob.escape(path.name),)) if projector else (path, ())
    if projector and files and files[-1] != glob.escape(projector):
        files = (*files, glob.escape(projector))
    return Source(model_hub="local", model_id=str(path), files=files)


def _patterns_of(cache_config: Mapping[str, Any] | None, key: str) -> tuple[str, ...]:
    value = (cache_config or {}).get(key)
    if isinstance(value, str):
        return (value,)
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list | tuple) else ()
