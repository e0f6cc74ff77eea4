"""What a model is loaded with beside its own files: of a second repository, or of a path. Pure: no disk, no network.

A family names GGUF weights of its transformer, weights for few steps (lightning) and controlnets; a launch chooses.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from registry.decode import did_you_mean
from registry.schema import ModelFamily, ModelSpec, Source

Role = Literal["gguf", "lightning", "controlnet"]

# Of a pipeline whose transformer's weights come out of a GGUF file: the ones that it has no use for.
TRANSFORMER_WEIGHTS = ("transformer/*.safetensors", "transformer/*.bin", "transformer/*.index.json")


class Addition(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One such thing. `name` is the wish as the family spells it; empty where a path says it all."""

    role: Role
    source: Source
    name: str = ""

    @property
    def local_path(self) -> Path | None:
        """Where it is if it is on this machine anyway; None if a hub has to fetch it."""
        return Path(self.source.model_id) if self.source.model_hub == "local" else None

    def __str__(self) -> str:
        return f"{self.role} {self.name or self.source.model_id}"


class AdditionWishes(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which of them a launch wishes for."""

    gguf_quantization: Annotated[str, Meta(description="of the transformer, one of the family's")] | None = None
    gguf_model_path: Annotated[str, Meta(description="GGUF file of the transformer here, or its folder")] | None = None
    lightning_version: Annotated[str, Meta(description="weights for few steps that the family has")] | None = None
    lightning_model_path: Annotated[str, Meta(description="such weights here: a file, or its folder")] | None = None
    controlnet: (
        Annotated[str | tuple[str, ...], Meta(description="names of controlnets of the family, or folders")] | None
    ) = None


class NoAddition(ValueError):
    """A wish cannot be met; the text says what there is."""


class _Kind(NamedTuple):
    """How a role's files are named: by fields of the wishes, and by fields of a spec."""

    role: Role
    choice: str
    path: str
    model_id: str
    choices: str
    template: str
    place: str
    ending: str


KINDS = (
    _Kind(
        role="gguf",
        choice="gguf_quantization",
        path="gguf_model_path",
        model_id="gguf_model_id",
        choices="gguf_quantizations",
        template="gguf_model_file_name_template",
        place="{quantization}",
        ending=".gguf",
    ),
    _Kind(
        role="lightning",
        choice="lightning_version",
        path="lightning_model_path",
        model_id="lightning_model_id",
        choices="lightning_versions",
        template="lightning_model_file_name_template",
        place="{lightning_version}",
        ending=".safetensors",
    ),
)


def choose_additions(family: ModelFamily, specs: Sequence[ModelSpec], wishes: AdditionWishes) -> tuple[Addition, ...]:
    """What the wishes come to.

    Args:
        specs: of these the first that has a role's repository counts.
    Raises:
        NoAddition: with a sentence for the user.
    """
    found = []
    for kind in KINDS:
        if (choice := getattr(wishes, kind.choice)) or getattr(wishes, kind.path):
            _check_type(family, kind.choice if choice else kind.path, kind.model_id)
            found.append(_weights(family, specs, kind, choice, getattr(wishes, kind.path)))
    if wishes.controlnet:
        _check_type(family, "controlnet", "controlnet")
        names = (wishes.controlnet,) if isinstance(wishes.controlnet, str) else wishes.controlnet
        found += [_controlnet(family, name) for name in names]
    return tuple(found)


def possible_sources(family: ModelFamily, spec: ModelSpec) -> Iterator[Source]:
    """Where all that a launch of this spec could wish for is."""
    for kind in KINDS:
        for choice in getattr(spec, kind.choices) or ():
            if getattr(spec, kind.model_id):
                yield _source(spec, kind, choice)
    for one in _controlnets(family).values():
        if one.get("model_uri") or one.get("model_id"):
            yield _controlnet_source(one)


def additions_told(family: ModelFamily, spec: ModelSpec) -> list[str]:
    """Sentences on what launches can wish for, and on what no wish can be met of."""
    said = []
    for kind in KINDS:
        if not (model_id := getattr(spec, kind.model_id)):
            if lost := [name for name in (kind.choices, kind.template) if getattr(spec, name)]:
                said.append(f"{' and '.join(lost)} without {kind.model_id}: {kind.choice} cannot be wished for.")
            continue
        choices = getattr(spec, kind.choices)
        offer = f"one of {', '.join(choices)}" if choices else f"any, as there are no {kind.choices}"
        said.append(f"{kind.choice} ({offer}) is fetched from {spec.model_hub}:{model_id}.")
        template = getattr(spec, kind.template)
        if template and kind.place not in template:
            said.append(f"{kind.template} {template!r} has no {kind.place}: each {kind.choice} is the same file.")
    for name, one in _controlnets(family).items():
        where = one.get("model_uri") or (f"{one.get('model_hub') or 'huggingface'}:{one.get('model_id')}")
        is_named_only = not (one.get("model_uri") or one.get("model_id"))
        said.append(f"controlnet {name} " + ("has no model_uri or model_id." if is_named_only else f"is {where}."))
    return said


def without_transformer(source: Source) -> Source:
    """A pipeline's source without its transformer's weights, if it is one that a hub has."""
    if source.model_hub == "local" or source.files:
        return source
    return msgspec.structs.replace(source, ignore_patterns=(*source.ignore_patterns, *TRANSFORMER_WEIGHTS))


def _check_type(family: ModelFamily, wish: str, field: str) -> None:
    if field not in family.__struct_fields__:
        raise NoAddition(f"{wish} says nothing of {family.model_type} models. Leave it out.")


def _weights(
    family: ModelFamily, specs: Sequence[ModelSpec], kind: _Kind, choice: str | None, path: str | None
) -> Addition:
    spec = next((spec for spec in specs if getattr(spec, kind.model_id)), None)
    if path:
        files: tuple[str, ...] = ()
        place = _absolute(path, kind.path)
        if place.suffix.lower() not in (".gguf", ".safetensors"):
            named = spec or next((one for one in specs if getattr(one, kind.template)), None)
            files = _files(getattr(named, kind.template, None), kind, choice)
        source = Source(model_hub="local", model_id=str(place), files=files)
        return Addition(role=kind.role, name=choice or "", source=source)
    if spec is None:
        raise NoAddition(
            f"Model {family.model_name!r} has no {kind.choice} {choice!r}: it names no repository of such weights. "
            f"Give their file as {kind.path}."
        )
    known = getattr(spec, kind.choices) or ()
    spelt = next((one for one in known if one.casefold() == str(choice).casefold()), None if known else choice)
    if spelt is None:
        raise NoAddition(f"Model {family.model_name!r} has no {kind.choice} {choice!r}. It has: {', '.join(known)}.")
    return Addition(role=kind.role, name=spelt, source=_source(spec, kind, spelt))


def _source(spec: ModelSpec, kind: _Kind, choice: str) -> Source:
    files = _files(getattr(spec, kind.template), kind, choice)
    return Source(model_hub=spec.model_hub, model_id=getattr(spec, kind.model_id), files=files)


def _files(template: str | None, kind: _Kind, choice: str | None) -> tuple[str, ...]:
    if choice is None:
        return (f"*{kind.ending}",)
    if template is None:
        return (f"*{glob.escape(choice)}*{kind.ending}",)
    return (glob.escape(template.replace(kind.place, choice)),)


def _controlnets(family: ModelFamily) -> dict[str, Mapping[str, Any]]:
    return {str(one.get("model_name")): one for one in getattr(family, "controlnet", None) or ()}


def _controlnet(family: ModelFamily, name: str) -> Addition:
    if name.startswith(("/", "~", "file://")):
        folder = _absolute(name, "controlnet")
        return Addition(role="controlnet", name=name, source=Source(model_hub="local", model_id=str(folder)))
    known = _controlnets(family)
    spelt = next((one for one in known if one.casefold() == name.casefold()), None)
    if spelt is None:
        hint = did_you_mean(name, known, what="It has") if known else "It names none."
        raise NoAddition(
            f"Model {family.model_name!r} has no controlnet {name!r}. {hint} One on this machine is given by its "
            "absolute path."
        )
    if not (known[spelt].get("model_uri") or known[spelt].get("model_id")):
        raise NoAddition(
            f"Model {family.model_name!r} knows its controlnet {spelt!r} by name only, and not where its files are. "
            "Give the absolute path of its folder as controlnet."
        )
    return Addition(role="controlnet", name=spelt, source=_controlnet_source(known[spelt]))


def _controlnet_source(entry: Mapping[str, Any]) -> Source:
    if uri := entry.get("model_uri"):
        return Source(model_hub="local", model_id=str(_absolute(str(uri), "controlnet's model_uri")))
    revision = entry.get("model_revision")
    return Source(
        model_hub=str(entry.get("model_hub") or "huggingface"),
        model_id=str(entry["model_id"]),
        model_revision=str(revision) if revision else None,
    )


def _absolute(text: str, what: str) -> Path:
    try:
        path = Path(text.removeprefix("file://")).expanduser()
    except RuntimeError as exc:
        raise NoAddition(f"The {what} {text!r} names an unknown home folder. Give an absolute path.") from exc
    if not path.is_absolute() or "\0" in text:
        raise NoAddition(f"The {what} {text!r} is not an absolute path. Begin it with '/' or '~'.")
    return path
