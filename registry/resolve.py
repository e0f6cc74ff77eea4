"""From what a user asks for to the exact thing to load, or the reason why not. Pure: no disk, no network."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from registry.decode import did_you_mean
from registry.hubs import HUBS
from registry.registry import Registry
from registry.schema import LLMFamily, ModelFamily, ModelSpec, Source

GGUF = "ggufv2"
PYTORCH = "pytorch"


class Selection(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Which model is wished for: a family by name, or files named in place."""

    model_name: str | None = None
    model_type: str = "LLM"
    model_format: str | None = None
    model_size_in_billions: int | float | str | None = None
    quantization: str | None = None
    model_hub: str | None = None
    model_id: str | None = None
    model_revision: str | None = None
    model_file: str | None = None
    model_path: str | None = None


class Artifact(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The exact thing to load after all choices."""

    family: LLMFamily
    spec: ModelSpec
    source: Source

    @property
    def local_path(self) -> Path | None:
        """Where the files are if they are on this machine anyway; None if a hub has to fetch them."""
        return Path(self.source.model_id) if self.source.model_hub == "local" else None


class NotResolved(ValueError):
    """No artifact fits the selection; the text says what was looked for and what exists nearest."""


def resolve(registry: Registry, selection: Selection) -> Artifact:
    """Choose the exact thing to load.

    `model_path` names files on this machine, `model_id` (with `model_hub`) those of a hub; either goes before
    the catalogue, of which `model_name` names a family. The other fields choose among that family's specs:
    the first that fits is taken. Whether the files exist is for the hub to find out.

    Raises:
        NotResolved: with a sentence for the user.
    """
    _check_known("model_type", selection.model_type, registry.types)
    if selection.model_path:
        if selection.model_id:
            raise NotResolved("model_path and model_id both say where the files are. Leave one of them out.")
        return _in_place(registry, selection, selection.model_path)
    if selection.model_hub:
        _check_known("model_hub", selection.model_hub, HUBS)
    if selection.model_id:
        if _same(selection.model_hub, "local"):
            return _in_place(registry, selection, selection.model_id)
        return _on_hub(registry, selection, selection.model_id)
    if selection.model_name:
        return _from_catalogue(registry, selection, selection.model_name)
    example = next(iter(registry.names(selection.model_type)), "a-model")
    raise NotResolved(
        f"No model was named. Give a model_name (for example {example!r}), or a model_hub and a model_id, "
        "or a model_path."
    )


def same_size(one: float | str | None, other: float | str | None) -> bool:
    """Whether two spellings of a size in billions mean the same: 0.5, "0.5", "0_5" and "0.5B" do."""
    return _size_key(one) == _size_key(other)


# -- files on this machine


def _in_place(registry: Registry, selection: Selection, model_path: str) -> Artifact:
    path = _absolute(model_path, "model_path")
    model_file = selection.model_file
    model_format = selection.model_format or (
        GGUF if _is_gguf(str(path)) or (model_file and _is_gguf(model_file)) else PYTORCH
    )
    quantization = selection.quantization or quantization_in(model_file or path.name) or "none"
    files: tuple[str, ...] = ()
    if not _is_gguf(str(path)):
        files = _patterns(model_format, model_file, selection.quantization)
    return _artifact(
        registry,
        selection,
        fallback_name=path.stem if _is_gguf(str(path)) else path.name,
        model_format=model_format,
        quantization=quantization,
        source=Source(model_hub="local", model_id=str(path), files=files),
    )


# -- files of a hub, named by the user


def _on_hub(registry: Registry, selection: Selection, model_id: str) -> Artifact:
    hub = _known_spelling(selection.model_hub or "huggingface", HUBS)
    model_format = selection.model_format or _guess_format(selection, hub, model_id)
    quantization = selection.quantization or quantization_in(selection.model_file or "") or "none"
    files = _patterns(model_format, selection.model_file, selection.quantization)
    return _artifact(
        registry,
        selection,
        fallback_name=model_id.rstrip("/").rpartition("/")[2],
        model_format=model_format,
        quantization=quantization,
        source=Source(model_hub=hub, model_id=model_id, model_revision=selection.model_revision, files=files),
    )


def _guess_format(selection: Selection, hub: str, model_id: str) -> str:
    if selection.model_file:
        return GGUF if _is_gguf(selection.model_file) else PYTORCH
    if "gguf" in model_id.lower() or quantization_in(f".{selection.quantization}"):
        return GGUF
    return GGUF if hub == "pypi" else PYTORCH


def _patterns(model_format: str, model_file: str | None, quantization: str | None) -> tuple[str, ...]:
    chosen = None if _same(quantization, "none") else quantization
    if model_file:
        return (model_file.replace("{quantization}", glob.escape(chosen) if chosen else "*"),)
    if model_format != GGUF:
        return ()
    return (f"*{glob.escape(chosen)}*.gguf",) if chosen else ("*.gguf",)


def _artifact(
    registry: Registry,
    selection: Selection,
    *,
    fallback_name: str,
    model_format: str,
    quantization: str,
    source: Source,
) -> Artifact:
    family = registry.find(selection.model_name, selection.model_type) if selection.model_name else None
    spec = ModelSpec(
        model_format=model_format,
        model_size_in_billions=selection.model_size_in_billions or _only_size(family),
        quantization=quantization,
        model_hub=source.model_hub,
        model_id=source.model_id,
        model_uri=source.model_id if source.model_hub == "local" else None,
        model_revision=source.model_revision,
    )
    if family is None:
        family = LLMFamily(
            model_name=selection.model_name or fallback_name,
            model_specs=(spec,),
            model_ability=("chat", "generate"),
        )
    return Artifact(family=family, spec=spec, source=source)


def _only_size(family: ModelFamily | None) -> int | float | str | None:
    specs = family.model_specs if family else ()
    sizes = {_size_key(spec.model_size_in_billions): spec.model_size_in_billions for spec in specs}
    return next(iter(sizes.values())) if len(sizes) == 1 else None


# -- a family of the catalogue


def _from_catalogue(registry: Registry, selection: Selection, model_name: str) -> Artifact:
    family = registry.find(model_name, selection.model_type)
    if family is None:
        raise NotResolved(_unknown_name(registry, selection, model_name))
    spec = _choose_spec(family, selection)
    return Artifact(family=family, spec=spec, source=_source(family, spec, selection))


def _unknown_name(registry: Registry, selection: Selection, model_name: str) -> str:
    said = f"No model is named {model_name!r}. "
    if model_name.startswith(("/", "~", ".")) or _is_gguf(model_name):
        return said + "For files on this machine give their absolute path as model_path."
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model_name):
        return said + f"For a repository give model_hub 'huggingface' and model_id {model_name!r}."
    return said + did_you_mean(model_name, registry.names(selection.model_type), what="Known models")


def _choose_spec(family: ModelFamily, selection: Selection) -> ModelSpec:
    """The first spec that fits; the first wish that nothing fits is the one to complain of."""
    specs = [s for s in family.model_specs if s.model_uri or (s.model_id and s.model_hub in HUBS)]
    if not specs:
        hubs = sorted({s.model_hub for s in family.model_specs if s.model_id})
        raise NotResolved(
            f"Model {family.model_name!r} names no place that its files can come from"
            + (f" but {', '.join(hubs)}, which is not supported" if hubs else "")
            + ". Give a model_path, or a model_hub and a model_id."
        )
    met: list[str] = []
    for field, fits in WISHES.items():
        wish = getattr(selection, field)
        if wish is None:
            continue
        fitting = [spec for spec in specs if fits(spec, wish)]
        if not fitting:
            raise NotResolved(_misfit(family, specs, field, wish, met))
        specs = fitting
        met.append(f"{field} {wish!r}")
    return specs[0]


def _misfit(family: ModelFamily, specs: list[ModelSpec], field: str, wish: object, met: list[str]) -> str:
    there = list(dict.fromkeys(str(getattr(spec, field)) for spec in specs))
    among = f" with {' and '.join(met)}" if met else ""
    return f"Model {family.model_name!r}{among} has no {field} {wish!r}. It has: {', '.join(there)}."


def _source(family: ModelFamily, spec: ModelSpec, selection: Selection) -> Source:
    files: tuple[str, ...] = ()
    if selection.model_file:
        files = _patterns(spec.model_format, selection.model_file, spec.quantization)
    elif spec.model_file_name_template:
        files = (glob.escape(_fill(spec.model_file_name_template, spec)),)
    elif spec.model_format == GGUF:
        files = _patterns(GGUF, None, spec.quantization)
    if spec.model_uri:
        path = _local_uri(family, spec.model_uri)
        return Source(model_hub="local", model_id=str(path), files=() if _is_gguf(str(path)) else files)
    return Source(
        model_hub=spec.model_hub,
        model_id=_fill(spec.model_id or "", spec),
        model_revision=selection.model_revision or spec.model_revision,
        files=files,
    )


def _fill(template: str, spec: ModelSpec) -> str:
    return template.replace("{quantization}", spec.quantization)


def _local_uri(family: ModelFamily, uri: str) -> Path:
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme.lower() == "file":
        return _absolute(unquote(urlsplit(uri).path), f"model_uri of model {family.model_name!r}")
    if scheme:
        raise NotResolved(
            f"The model_uri of model {family.model_name!r} has the unsupported scheme {scheme!r}. "
            "Give an absolute path or a file:// address."
        )
    return _absolute(uri, f"model_uri of model {family.model_name!r}")


# wish -> whether a spec fits it; in the order in which a misfit is told
WISHES: dict[str, Callable[[ModelSpec, Any], bool]] = {
    "model_format": lambda spec, wish: _same(spec.model_format, wish),
    "model_size_in_billions": lambda spec, wish: same_size(spec.model_size_in_billions, wish),
    "quantization": lambda spec, wish: _same(spec.quantization, wish),
    # Files that are on this machine need no hub, so no choice of a hub rules them out.
    "model_hub": lambda spec, wish: spec.model_uri is not None or _same(spec.model_hub, wish),
}


# -- small pure parts

_QUANTIZATION = re.compile(
    r"(?:^|[-._])((?:UD-)?I?Q[1-9](?:_[A-Z0-9]+)*|TQ[12]_0|MXFP4|BF16|FP?16|FP?32)(?=$|[-.])", re.IGNORECASE
)


def quantization_in(file_name: str) -> str | None:
    """The quantization that a GGUF file's name tells (its last one), as spelt there; else None."""
    found = _QUANTIZATION.findall(file_name)
    return str(found[-1]) if found else None


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def _same(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and one.casefold() == other.casefold()


def _size_key(size: float | str | None) -> Decimal | str | None:
    if size is None:
        return None
    text = str(size).strip().casefold().replace("_", ".").removesuffix("b")
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    return number if number.is_finite() else text


def _absolute(path: str, what: str) -> Path:
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as exc:
        raise NotResolved(f"The {what} {path!r} names an unknown home folder. Give an absolute path.") from exc
    if "\0" in path or not expanded.is_absolute():
        raise NotResolved(f"The {what} {path!r} is not an absolute path. Begin it with '/' or '~'.")
    return expanded


def _known_spelling(word: str, words: Iterable[str]) -> str:
    return next((known for known in words if _same(known, word)), word)


def _check_known(field: str, word: str, words: Iterable[str]) -> None:
    words = list(words)
    if _known_spelling(word, words) not in words:
        raise NotResolved(f"{field} {word!r} is not known. {did_you_mean(word, words)}")
