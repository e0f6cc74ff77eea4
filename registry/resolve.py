"""From what a user asks for to the exact thing to load, or the reason why not. Pure: no disk, no network."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal, InvalidOperation
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from registry.additions import (
    TRANSFORMER_WEIGHTS,
    Addition,
    AdditionWishes,
    NoAddition,
    choose_additions,
    possible_sources,
    without_transformer,
)
from registry.decode import did_you_mean
from registry.hubs import HUBS
from registry.registry import Registry
from registry.schema import ABILITIES, FAMILIES, GGUF, NO_FILES, LLMFamily, ModelFamily, ModelSpec, Source
from registry.sources import BadUri, gguf_patterns, is_gguf, source_of

PYTORCH = "pytorch"


class Selection(AdditionWishes, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
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
    multimodal_projector: str | None = None
    model_ability: tuple[str, ...] | None = None


def name_of(selection: Selection) -> str | None:
    """What the model is called: as the selection says, else as its files are."""
    if selection.model_name or not (place := selection.model_path or selection.model_id):
        return selection.model_name
    name = place.rstrip("/").rpartition("/")[2]
    return Path(name).stem if is_gguf(name) else name


class Artifact(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The exact thing to load after all choices.

    Of the family's specs it has the one that was chosen. `projector` is one of the source's files; `additions` have
    sources of their own.
    """

    family: ModelFamily
    spec: ModelSpec
    source: Source
    projector: str | None = None
    additions: tuple[Addition, ...] = ()

    @property
    def local_path(self) -> Path | None:
        """Where the files are if they are on this machine anyway; None if a hub has to fetch them."""
        return Path(self.source.model_id) if self.source.model_hub == "local" else None

    @property
    def has_files(self) -> bool:
        """Whether there is anything to fetch and to load."""
        return self.source.model_hub != NO_FILES

    def loads(self, name: str) -> bool:
        """Whether that file of its source is loaded, by its path there, and not what an addition replaces."""
        is_replaced = any(addition.role == "gguf" for addition in self.additions)
        return not (is_replaced and any(fnmatchcase(name, pattern) for pattern in TRANSFORMER_WEIGHTS))

    @property
    def sources(self) -> tuple[Source, ...]:
        """All that is to be here before it can be loaded, its own first."""
        return (self.source, *(addition.source for addition in self.additions))

    @property
    def possible_sources(self) -> tuple[Source, ...]:
        """Those, and what other wishes for additions would come to."""
        lean = (without_transformer(self.source),) if self.spec.gguf_model_id else ()
        return tuple(dict.fromkeys((*self.sources, *lean, *possible_sources(self.family, self.spec))))


class NotResolved(ValueError):
    """No artifact fits the selection; the text says what was looked for and what exists nearest."""


def resolve(registry: Registry, selection: Selection, hubs: Sequence[str] = ()) -> Artifact:
    """Choose the exact thing to load: the first of `candidates`.

    Raises:
        NotResolved: with a sentence for the user.
    """
    return candidates(registry, selection, hubs)[0]


def candidates(registry: Registry, selection: Selection, hubs: Sequence[str] = ()) -> tuple[Artifact, ...]:
    """All that fits, best first; one at least.

    `model_path` names files on this machine, `model_id` (with `model_hub`) those of a hub; either goes before
    the catalogue, of which `model_name` names a family. The other fields choose among that family's specs, in
    the family's order. Whether the files exist is for the hub to find out.

    Args:
        hubs: the ones that the site prefers, best first; their specs go before those of others, and never rule
            them out. With none given the family's order counts, and huggingface among specs otherwise alike.
            Specs with a model_uri need no hub.
    Raises:
        NotResolved: nothing fits; with a sentence for the user.
    """
    found, refusal = [], None
    for artifact in _candidates(registry, selection, hubs):
        try:
            found.append(_with_additions(registry, artifact, selection))
        except NoAddition as exc:
            refusal = refusal or NotResolved(str(exc))
    if refusal and not found:
        raise refusal
    return tuple(found)


def _candidates(registry: Registry, selection: Selection, hubs: Sequence[str]) -> tuple[Artifact, ...]:
    """All that fits, without additions."""
    _check_known("model_type", selection.model_type, registry.types)
    if selection.model_path:
        if selection.model_id:
            raise NotResolved("model_path and model_id both say where the files are. Leave one of them out.")
        return (_in_place(registry, selection, selection.model_path),)
    if selection.model_hub:
        _check_known("model_hub", selection.model_hub, HUBS)
    if selection.model_id:
        if _same(selection.model_hub, "local"):
            return (_in_place(registry, selection, selection.model_id),)
        return (_on_hub(registry, selection, selection.model_id),)
    if selection.model_name:
        return _from_catalogue(registry, selection, selection.model_name, hubs)
    example = next(iter(registry.names(selection.model_type)), "a-model")
    raise NotResolved(
        f"No model was named. Give a model_name (for example {example!r}), or a model_hub and a model_id, "
        "or a model_path."
    )


def without_files(registry: Registry, selection: Selection, fallback_name: str) -> Artifact:
    """What is served without files of ours: the family that `model_name` names, or one made for that name.

    Args:
        fallback_name: for a selection that names nothing.
    Raises:
        NotResolved: a type or an ability is not known.
    """
    _check_known("model_type", selection.model_type, registry.types)
    for wish in AdditionWishes.__struct_fields__:
        if getattr(selection, wish):
            raise NotResolved(f"{wish} says nothing of a model that has no files here. Leave it out.")
    name = selection.model_name or fallback_name
    return _artifact(
        registry,
        selection,
        fallback_name=name,
        model_format=selection.model_format or "none",
        quantization=selection.quantization or "none",
        source=Source(model_hub=NO_FILES, model_id=name),
    )


def inherited(registry: Registry, family: ModelFamily) -> ModelFamily:
    """The family with what it does not say itself lent by the built-in one that its model_family names.

    A language model is lent its chat template, stops, reasoning tags, tool parser and architectures, and is one
    for pictures if that one is. Where chat_template is a built-in family's name, that one's template, stops and
    tags are taken. The registration itself stays as it was given.
    """
    if not isinstance(family, LLMFamily):
        return family
    changes: dict[str, Any] = {}
    named = registry.template_base_of(family)
    if isinstance(named, LLMFamily):
        changes |= {field: getattr(named, field) for field in LENT_WITH_TEMPLATE}
    elif family.chat_template and not _JINJA.search(family.chat_template) and not registry.is_builtin(family):
        changes["chat_template"] = None
    base = registry.base_of(family)
    if isinstance(base, LLMFamily):
        for field in LENT:
            mine = changes.get(field, getattr(family, field))
            if mine is None and (lent := getattr(base, field)) is not None:
                changes[field] = lent
        if "vision" in base.model_ability and "vision" not in family.model_ability:
            changes["model_ability"] = (*family.model_ability, "vision")
    return msgspec.structs.replace(family, **changes) if changes else family


LENT_WITH_TEMPLATE = ("chat_template", "stop", "stop_token_ids", "reasoning_start_tag", "reasoning_end_tag")
LENT = (*LENT_WITH_TEMPLATE, "tool_parser", "architectures")

_JINJA = re.compile(r"\{[{%#]")


def same_size(one: float | str | None, other: float | str | None) -> bool:
    """Whether two spellings of a size in billions mean the same: 0.5, "0.5", "0_5" and "0.5B" do."""
    return _size_key(one) == _size_key(other)


# -- files on this machine


def _in_place(registry: Registry, selection: Selection, model_path: str) -> Artifact:
    path = _absolute(model_path, "model_path")
    model_file = selection.model_file
    is_file = is_gguf(str(path))
    model_format = selection.model_format or (
        GGUF if is_file or (model_file and is_gguf(model_file)) else _only_format(registry, selection) or PYTORCH
    )
    quantization = selection.quantization or quantization_in(model_file or path.name) or "none"
    projector = selection.multimodal_projector
    if is_file and projector:
        source = Source(model_hub="local", model_id=str(path.parent), files=(glob.escape(path.name),))
    else:
        files = () if is_file else _patterns(model_format, model_file, selection.quantization)
        source = Source(model_hub="local", model_id=str(path), files=files)
    return _artifact(
        registry,
        selection,
        model_format=model_format,
        quantization=quantization,
        source=source,
        model_uri=str(path),
    )


def _only_format(registry: Registry, selection: Selection) -> str | None:
    """The format of all specs that fit a name given beside the files."""
    family = registry.find(selection.model_name, selection.model_type) if selection.model_name else None
    formats = {spec.model_format for spec in family.specs} if family else set()
    return formats.pop() if len(formats) == 1 else None


# -- files of a hub, named by the user


def _on_hub(registry: Registry, selection: Selection, model_id: str) -> Artifact:
    hub = _known_spelling(selection.model_hub or "huggingface", HUBS)
    model_format = selection.model_format or _guess_format(selection, hub, model_id)
    quantization = selection.quantization or quantization_in(selection.model_file or "") or "none"
    files = _patterns(model_format, selection.model_file, selection.quantization)
    return _artifact(
        registry,
        selection,
        model_format=model_format,
        quantization=quantization,
        source=Source(model_hub=hub, model_id=model_id, model_revision=selection.model_revision, files=files),
    )


def _guess_format(selection: Selection, hub: str, model_id: str) -> str:
    if selection.model_file:
        return GGUF if is_gguf(selection.model_file) else PYTORCH
    if "gguf" in model_id.lower() or quantization_in(f".{selection.quantization}"):
        return GGUF
    return GGUF if hub == "pypi" else PYTORCH


def _patterns(model_format: str, model_file: str | None, quantization: str | None) -> tuple[str, ...]:
    chosen = None if _same(quantization, "none") else quantization
    if model_file:
        return (model_file.replace("{quantization}", glob.escape(chosen) if chosen else "*"),)
    return gguf_patterns(chosen) if _same(model_format, GGUF) else ()


def _artifact(
    registry: Registry,
    selection: Selection,
    *,
    fallback_name: str = "",
    model_format: str,
    quantization: str,
    source: Source,
    model_uri: str | None = None,
) -> Artifact:
    family = registry.find(selection.model_name, selection.model_type) if selection.model_name else None
    spec = ModelSpec(
        model_format=model_format,
        model_size_in_billions=selection.model_size_in_billions or _only_size(family),
        quantization=quantization,
        model_hub=source.model_hub,
        model_id=source.model_id,
        model_uri=model_uri,
        model_revision=source.model_revision,
    )
    if family is None:
        family = _unregistered(selection, name_of(selection) or fallback_name, spec)
    projector = selection.multimodal_projector
    if projector:
        main = source.files or (gguf_patterns(selection.quantization) if model_format == GGUF else ())
        source = msgspec.structs.replace(source, files=(*main, glob.escape(projector)) if main else ())
    family = _with_abilities(_with_one_spec(inherited(registry, family), spec), selection.model_ability)
    return Artifact(family=family, spec=spec, source=source, projector=projector)


def _with_additions(registry: Registry, artifact: Artifact, selection: Selection) -> Artifact:
    """The artifact with what the selection wishes for beside it.

    Raises:
        NoAddition: it cannot be had.
    """
    family = artifact.family
    specs: Sequence[ModelSpec] = (artifact.spec,)
    if selection.model_path or selection.model_id:  # these files have no second repository: the family's have
        known = registry.find(selection.model_name, selection.model_type) if selection.model_name else None
        specs = known.specs if known else ()
    additions = choose_additions(family, specs, selection)
    if not additions:
        return artifact
    has_gguf = any(addition.role == "gguf" for addition in additions)
    source = without_transformer(artifact.source) if has_gguf else artifact.source
    return msgspec.structs.replace(artifact, source=source, additions=additions)


def _with_abilities(family: ModelFamily, abilities: tuple[str, ...] | None) -> ModelFamily:
    """The family with the abilities that the user names."""
    if not abilities:
        return family
    if "model_ability" not in family.__struct_fields__:
        raise NotResolved(f"model_ability says nothing of {family.model_type} models. Leave it out.")
    for ability in abilities:
        if family.model_type in ABILITIES:
            _check_known("model_ability", ability, ABILITIES[family.model_type])
    return msgspec.structs.replace(family, model_ability=abilities)


def _with_one_spec(family: ModelFamily, spec: ModelSpec) -> ModelFamily:
    """The family without the specs that were not chosen: those of one family can fill a megabyte."""
    if family.model_specs == (spec,) or not family.model_specs:
        return family
    return msgspec.structs.replace(family, model_specs=(spec,))


def _unregistered(selection: Selection, model_name: str, spec: ModelSpec) -> ModelFamily:
    """A family for files that no family is known of."""
    kind = FAMILIES[_known_spelling(selection.model_type, FAMILIES)]
    if kind is LLMFamily:
        return LLMFamily(model_name=model_name, model_specs=(spec,), model_ability=("chat", "generate"))
    return kind(model_name=model_name, model_specs=(spec,))


def _only_size(family: ModelFamily | None) -> int | float | str | None:
    specs = family.specs if family else ()
    sizes = {_size_key(spec.model_size_in_billions): spec.model_size_in_billions for spec in specs}
    return next(iter(sizes.values())) if len(sizes) == 1 else None


# -- a family of the registry


def _from_catalogue(
    registry: Registry, selection: Selection, model_name: str, hubs: Sequence[str]
) -> tuple[Artifact, ...]:
    family = registry.find(model_name, selection.model_type)
    if family is None:
        raise NotResolved(_unknown_name(registry, selection, model_name))
    if selection.model_ability:
        raise NotResolved(f"What {family.model_name!r} can do is known. Leave model_ability out.")
    family = inherited(registry, family)
    specs = _by_hub(_fitting(family, selection), hubs)
    found, refusal = [], None
    for spec in specs:
        try:
            found.append(_of_spec(family, spec, selection))
        except BadUri as exc:
            refusal = refusal or NotResolved(f"The model_uri of model {family.model_name!r} is of no use. {exc}")
    if refusal and not found:
        raise refusal
    return tuple(found)


def _of_spec(family: ModelFamily, spec: ModelSpec, selection: Selection) -> Artifact:
    projector = selection.multimodal_projector or spec.multimodal_projector
    if projector and spec.multimodal_projectors:
        projector = _known_spelling(projector, spec.multimodal_projectors)
    source = source_of(
        spec,
        model_file=selection.model_file,
        model_revision=selection.model_revision,
        projector=projector,
        cache_config=family.cache_config,
    )
    return Artifact(family=_with_one_spec(family, spec), spec=spec, source=source, projector=projector)


def _by_hub(specs: list[ModelSpec], hubs: Sequence[str]) -> list[ModelSpec]:
    """The specs in order of preference."""
    if hubs:
        ranks = {hub.casefold(): rank for rank, hub in enumerate(hubs)}
        return sorted(specs, key=lambda s: -1 if s.model_uri else ranks.get(s.model_hub.casefold(), len(ranks)))
    first_like: dict[tuple[object, ...], int] = {}
    for index, spec in enumerate(specs):
        first_like.setdefault(_what(spec), index)
    return sorted(specs, key=lambda s: (first_like[_what(s)], not s.model_uri and s.model_hub != "huggingface"))


def _what(spec: ModelSpec) -> tuple[object, ...]:
    """What a spec is, wherever its files are."""
    size = _size_key(spec.model_size_in_billions)
    return spec.model_format.casefold(), size, spec.quantization.casefold(), spec.engine


def _unknown_name(registry: Registry, selection: Selection, model_name: str) -> str:
    said = f"No model is named {model_name!r}. "
    if model_name.startswith(("/", "~", ".")) or is_gguf(model_name):
        return said + "For files on this machine give their absolute path as model_path."
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model_name):
        return said + f"For a repository give model_hub 'huggingface' and model_id {model_name!r}."
    return said + did_you_mean(model_name, registry.names(selection.model_type), what="Known models")


def _fitting(family: ModelFamily, selection: Selection) -> list[ModelSpec]:
    """The specs that fit, one at least; the first wish that nothing fits is the one to complain of."""
    specs = [s for s in family.specs if s.model_uri or (s.model_id and s.model_hub in (*HUBS, NO_FILES))]
    if not specs:
        hubs = sorted({s.model_hub for s in family.specs if s.model_id})
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
    return specs


def _misfit(family: ModelFamily, specs: list[ModelSpec], field: str, wish: object, met: list[str]) -> str:
    among = f" with {' and '.join(met)}" if met else ""
    there = dict.fromkeys(text for spec in specs for text in _offered(spec, field))
    said = ", ".join(there) if there else "none"
    return f"Model {family.model_name!r}{among} has no {field} {wish!r}. It has: {said}."


def _offered(spec: ModelSpec, field: str) -> tuple[str, ...]:
    if field == "multimodal_projector":
        return _projectors(spec)
    return (str(getattr(spec, field)),)


def _projectors(spec: ModelSpec) -> tuple[str, ...]:
    return (*(spec.multimodal_projectors or ()), *filter(None, [spec.multimodal_projector]))


# wish -> whether a spec fits it; in the order in which a misfit is told
WISHES: dict[str, Callable[[ModelSpec, Any], bool]] = {
    "model_format": lambda spec, wish: _same(spec.model_format, wish),
    "model_size_in_billions": lambda spec, wish: same_size(spec.model_size_in_billions, wish),
    "quantization": lambda spec, wish: _same(spec.quantization, wish),
    # Files that are on this machine need no hub, so no choice of a hub rules them out.
    "model_hub": lambda spec, wish: spec.model_uri is not None or _same(spec.model_hub, wish),
    # Files in place may have projectors beside them that their spec does not list.
    "multimodal_projector": lambda spec, wish: (
        any(_same(one, wish) for one in _projectors(spec)) or (spec.model_uri is not None and not _projectors(spec))
    ),
}


# -- small pure parts

_QUANTIZATION = re.compile(
    r"(?:^|[-._])((?:UD-)?I?Q[1-9](?:_[A-Z0-9]+)*|TQ[12]_0|MXFP4|BF16|FP?16|FP?32)(?=$|[-.])", re.IGNORECASE
)


def quantization_in(file_name: str) -> str | None:
    """The quantization that a GGUF file's name tells (its last one), as spelt there; else None."""
    found = _QUANTIZATION.findall(file_name)
    return str(found[-1]) if found else None


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
    if "\0" in path:
        raise NotResolved(f"The {what} {path!r} holds a null character. Give an absolute path.")
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as exc:
        raise NotResolved(f"The {what} {path!r} names an unknown home folder. Give an absolute path.") from exc
    if not expanded.is_absolute():
        raise NotResolved(f"The {what} {path!r} is not an absolute path. Begin it with '/' or '~'.")
    return expanded


def _known_spelling(word: str, words: Iterable[str]) -> str:
    return next((known for known in words if _same(known, word)), word)


def _check_known(field: str, word: str, words: Iterable[str]) -> None:
    words = list(words)
    if _known_spelling(word, words) not in words:
        raise NotResolved(f"{field} {word!r} is not known. {did_you_mean(word, words)}")
