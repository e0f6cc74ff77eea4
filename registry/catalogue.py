"""The families that ship with us, and those of catalogue files that a site keeps. Read-only.

A catalogue file is a JSON object: model type -> list of families, each in the form of a registration. An item of
`model_specs` may be condensed: instead of one source and quantization it may have `hubs`, which maps each hub to
the fields that differ there and `quantizations`, a list. It stands for one spec for each hub and quantization.
A family without a model_family is its own.

Families are made from the file when they are asked for, and kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from registry.decode import DecodeError, did_you_mean, parse
from registry.schema import FAMILIES, FlatFamily, ModelFamily, decode_family

# model type -> its file in registry/builtin
CATALOGUE: dict[str, str] = {
    "LLM": "llm.json",
    "embedding": "embedding.json",
    "rerank": "rerank.json",
    "image": "image.json",
    "audio": "audio.json",
    "video": "video.json",
}

SOURCE_FIELDS = ("model_id", "model_hub", "model_revision", "model_uri")


class Entry:
    """A family as its file has it, made into one when it is first asked for."""

    __slots__ = ("_data", "_family", "_is_ours", "_model_type")

    def __init__(
        self,
        model_type: str,
        data: Mapping[str, Any] | None = None,
        *,
        family: ModelFamily | None = None,
        is_ours: bool = False,
    ) -> None:
        self._model_type = model_type
        self._data = data
        self._family = family
        self._is_ours = is_ours

    def family(self) -> ModelFamily:
        """The family.

        Raises:
            DecodeError: the data is wrong; the text names the family and the place.
        """
        if self._family is None:
            assert self._data is not None
            self._family = _family(self._model_type, self._data, self._is_ours)
            self._data = None
        return self._family


class Catalogue:
    """Families by type and name, in the order of their files; a later one of a name replaces an earlier one."""

    def __init__(
        self, families: Iterable[ModelFamily] = (), *, builtin: bool = False, files: Iterable[Path] = ()
    ) -> None:
        self._with_builtin = builtin
        self._added: dict[str, dict[str, Entry]] = {}
        self._groups: dict[str, dict[str, Entry]] = {}
        self._folded: dict[str, dict[str, str]] = {}
        for path in files:
            for model_type, entries in read(path).items():
                self._added.setdefault(model_type, {}).update(entries)
        for family in families:
            entry = Entry(family.model_type, family=family)
            self._added.setdefault(family.model_type, {})[family.model_name] = entry

    def find(self, model_type: str, model_name: str) -> ModelFamily | None:
        """The family of exactly that name."""
        entry = self._group(model_type).get(model_name)
        return entry.family() if entry else None

    def find_folded(self, model_type: str, model_name: str) -> ModelFamily | None:
        """The first family of that name but for case."""
        if model_type not in self._folded:
            folded: dict[str, str] = {}
            for name in self._group(model_type):
                folded.setdefault(name.casefold(), name)
            self._folded[model_type] = folded
        spelt = self._folded[model_type].get(model_name.casefold())
        return self.find(model_type, spelt) if spelt is not None else None

    def has(self, model_type: str, model_name: str) -> bool:
        """Whether there is a family of exactly that name."""
        return model_name in self._group(model_type)

    def names(self, model_type: str) -> tuple[str, ...]:
        """All names of a type."""
        return tuple(self._group(model_type))

    def list(self, model_type: str) -> Iterator[ModelFamily]:
        """All families of a type."""
        return (entry.family() for entry in self._group(model_type).values())

    def _group(self, model_type: str) -> dict[str, Entry]:
        if model_type not in self._groups:
            shipped = _builtin(model_type) if self._with_builtin else {}
            self._groups[model_type] = shipped | self._added.get(model_type, {})
        return self._groups[model_type]


def read(path: Path) -> dict[str, dict[str, Entry]]:
    """The families of a site's catalogue file, by type and name. All are decoded at once, so that errors show.

    Raises:
        DecodeError: it cannot be read, or is wrong; the text names the file and the place.
    """
    try:
        data = parse(path.read_bytes())
    except OSError as exc:
        raise DecodeError(f"The catalogue {path} cannot be read: {exc.strerror or exc}.") from exc
    except DecodeError as exc:
        raise DecodeError(f"The catalogue {path} is damaged. {exc}") from exc
    if not isinstance(data, dict):
        raise DecodeError(f"The catalogue {path} is no object of model types and lists of families.")
    found = {}
    for model_type, families in data.items():
        if model_type not in FAMILIES:
            hint = did_you_mean(model_type, FAMILIES, what="Model types")
            raise DecodeError(f"The catalogue {path} has the unknown model type {model_type!r}. {hint}")
        try:
            found[model_type] = _entries(model_type, families)
            for entry in found[model_type].values():
                entry.family()
        except DecodeError as exc:
            raise DecodeError(f"The catalogue {path} is wrong: {model_type}: {exc}") from exc
    return found


@cache
def _builtin(model_type: str) -> dict[str, Entry]:
    if model_type not in CATALOGUE:
        return {}
    text = resources.files("registry").joinpath("builtin", CATALOGUE[model_type]).read_bytes()
    return _entries(model_type, msgspec.json.decode(text)[model_type], is_ours=True)


def _entries(model_type: str, families: object, *, is_ours: bool = False) -> dict[str, Entry]:
    if not isinstance(families, list):
        raise DecodeError("Expected a list of families")
    entries = {}
    for index, data in enumerate(families):
        if not isinstance(data, dict) or not isinstance(data.get("model_name"), str):
            raise DecodeError(f"Expected an object with a model_name - at `[{index}]`")
        entries[data["model_name"]] = Entry(model_type, data, is_ours=is_ours)
    return entries


# -- one family


def _family(model_type: str, data: Mapping[str, Any], is_ours: bool) -> ModelFamily:
    kind = FAMILIES[model_type]
    whole = dict(data) | {"is_builtin": True}
    if "model_family" in kind.__struct_fields__:
        whole.setdefault("model_family", whole["model_name"])
    if "model_specs" in whole:
        whole["model_specs"] = list(expand(whole["model_specs"]))
    if issubclass(kind, FlatFamily):
        _name_one_source(whole)
    if is_ours:  # checked when it was made
        return msgspec.convert(whole, kind)
    try:
        return decode_family(model_type, whole)
    except DecodeError as exc:
        raise DecodeError(f"{data['model_name']}: {exc}") from exc


def expand(specs: object) -> Iterator[Any]:
    """The specs that condensed ones stand for; others as they are."""
    for spec in specs if isinstance(specs, list | tuple) else (specs,):
        hubs = spec.get("hubs") if isinstance(spec, Mapping) else None
        if not isinstance(hubs, Mapping):
            yield spec
            continue
        shared = {key: value for key, value in spec.items() if key != "hubs"}
        shared.setdefault("model_format", "pytorch")
        for hub, of_hub in hubs.items():
            if not isinstance(of_hub, Mapping):
                raise DecodeError(f"Expected an object - at `$.model_specs[...].hubs.{hub}`")
            own = {key: v for key, v in of_hub.items() if key not in ("quantizations", "quantization_parts")}
            parts = of_hub.get("quantization_parts") or {}
            for quantization in of_hub.get("quantizations") or ("none",):
                one = {**shared, "quantization": quantization, "model_hub": hub, **own}
                if quantization in parts:
                    one["quantization_parts"] = {quantization: parts[quantization]}
                else:
                    one.pop("model_file_name_split_template", None)
                yield one


def _name_one_source(data: dict[str, Any]) -> None:
    """Families with one source have it beside their name; so let those with several show their first."""
    specs = data.get("model_specs") or ()
    first = next((spec for spec in specs if isinstance(spec, Mapping)), {})
    for field in SOURCE_FIELDS:
        if field in first:
            data.setdefault(field, first[field])
