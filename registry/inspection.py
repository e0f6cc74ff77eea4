"""Looks at a registration as a whole: all that is wrong, defaulted, lent, and told by the model's files.

It judges by the same code that registers; what it adds is that it goes on after the first fault, and looks into files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from registry import weights
from registry.additions import additions_told
from registry.compat import lift
from registry.decode import DecodeError, decode
from registry.hubs.local import find
from registry.memory import Cache, billions_of, kv_cache_bytes
from registry.registry import (
    REGISTRABLE,
    RegistrationRefused,
    Registry,
    all_refusals,
    check_source,
    object_of,
    place_of,
)
from registry.resolve import inherited, quantization_in
from registry.schema import (
    ABILITIES,
    FAMILIES,
    GGUF,
    REQUIRED,
    EmbeddingFamily,
    FlatFamily,
    LLMFamily,
    ModelFamily,
    ModelSpec,
    RerankFamily,
    Source,
    encode_family,
)
from registry.sources import BadUri, source_of
from registry.weights import GGUF_FILES, Facts

# Formats whose files say so themselves -> the methods that they name there.
METHODS = {
    "gptq": ("gptq", "gptqmodel"),
    "awq": ("awq",),
    "fp8": ("fp8", "fbgemm_fp8", "compressed-tensors"),
    "bnb": ("bitsandbytes",),
    "mlx": ("mlx",),
}
SIZE_TOLERANCE = 0.35  # what a name rounds, and embeddings that are counted or not

# Abilities that say a type by themselves.
TELLING = dict.fromkeys(("text2image", "image2image", "inpainting", "ocr"), "image")
TELLING |= dict.fromkeys(("audio2text", "text2audio", "text2music"), "audio")
TELLING |= {"rerank": "rerank", "embed": "embedding"}


class SpecInspection(msgspec.Struct, frozen=True, kw_only=True):
    """One spec: where its files are, what they say, and where that contradicts the registration."""

    place: str
    model_format: str
    quantization: str
    source: str
    path: str | None = None
    facts: Facts | None = None
    inferred: tuple[str, ...] = ()
    contradictions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """All that can be said of a registration without registering it; without errors it can be.

    `defaulted` has the values of keys that were not given, by their path.
    """

    model_type: str
    model_name: str | None
    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    defaulted: dict[str, Any] = {}
    inherited: tuple[str, ...] = ()
    specs: tuple[SpecInspection, ...] = ()
    family: ModelFamily | None = None


def guess_types(data: Mapping[str, Any]) -> tuple[str, ...]:
    """The model types that the JSON can be of, by its keys and abilities; one if that is clear."""
    said = data.get("model_type")
    if isinstance(said, str) and said in FAMILIES:
        return (said,)
    if "launcher" in data:
        return ("flexible",)
    abilities = data.get("model_ability")
    listed = [one for one in abilities if isinstance(one, str)] if isinstance(abilities, list | tuple) else []
    telling = {TELLING[one] for one in listed if one in TELLING}
    if len(telling) == 1 and not set(listed) & {"chat", "generate"}:
        return tuple(telling)
    scores = {model_type: _score(model_type, data, listed) for model_type in REGISTRABLE}
    best = max(scores.values())
    return tuple(model_type for model_type, score in scores.items() if score == best)


def _score(model_type: str, data: Mapping[str, Any], abilities: list[str]) -> int:
    known = {*FAMILIES[model_type].__struct_fields__} - {"extra"}
    required = REQUIRED[model_type]
    score = 3 * sum(data.get(key) is not None for key in required) - 3 * sum(data.get(key) is None for key in required)
    score += sum(1 if key in known else -1 for key in data)
    if allowed := ABILITIES.get(model_type):
        score += sum(4 if one in allowed else -4 for one in abilities)
    return score


def inspect(registry: Registry, model_type: str, model: str | bytes | Mapping[str, Any]) -> Inspection:
    """Everything about one registration, of a type of REGISTRABLE."""
    try:
        data, lifted = lift(model_type, object_of(model))
        errors = all_refusals(model_type, model)
    except DecodeError as exc:
        return Inspection(model_type=model_type, model_name=None, errors=(str(exc),))
    name = data.get("model_name")
    if errors:
        readable = _specs_of(model_type, data)
        inspected = [_inspect_spec(None, spec, place, errors) for place, spec in readable if spec.model_uri is not None]
        return Inspection(
            model_type=model_type,
            model_name=name if isinstance(name, str) else None,
            errors=tuple(errors),
            notes=tuple(lifted),
            specs=tuple(inspected),
        )
    try:
        registered = registry.notes_on(model_type, model)
    except RegistrationRefused as exc:
        return Inspection(model_type=model_type, model_name=str(name), errors=(str(exc),), notes=tuple(lifted))
    family = registered.family
    if registry.is_builtin(family):
        errors.append(f"Model name conflicts with existing model {family.model_name}. Choose another model_name.")
    empty = () if family.specs else ("model_specs is empty: a launch has to give a model_path.",)
    with_base = inherited(registry.including(family), family)
    inspected = [_inspect_spec(with_base, spec, place_of(family, i), errors) for i, spec in enumerate(family.specs)]
    return Inspection(
        model_type=model_type,
        model_name=family.model_name,
        errors=tuple(errors),
        notes=(*registered.lifted, *empty),
        defaulted=_defaulted(family, data),
        inherited=_inherited(family, with_base),
        specs=tuple(inspected),
        family=family,
    )


def _specs_of(model_type: str, data: Mapping[str, Any]) -> list[tuple[str, ModelSpec]]:
    """The specs that can be read, of JSON that as a whole can not; by their place."""
    listed = data.get("model_specs")
    parts = {f"model_specs[{i}]": spec for i, spec in enumerate(listed if isinstance(listed, list | tuple) else ())}
    if issubclass(FAMILIES[model_type], FlatFamily):
        parts["the model"] = {key: data[key] for key in ("model_uri", "model_format") if data.get(key) is not None}
    found = []
    for place, part in parts.items():
        if isinstance(part, Mapping):
            given = {key: value for key, value in part.items() if value is not None}
            try:
                found.append((place, decode({"model_format": "pytorch"} | given, ModelSpec, strict=False)))
            except DecodeError:
                continue  # told among the faults
    return found


def _inspect_spec(family: ModelFamily | None, spec: ModelSpec, place: str, errors: list[str]) -> SpecInspection:
    """One spec, of a family unless that cannot be read; a model_uri that is of no use is added to the errors."""
    notes: list[str] = []
    try:
        notes = check_source(spec, place)
    except RegistrationRefused as exc:
        errors.append(f"{place}: {exc}")
    source = _source_or_none(spec)
    path = path_of(source) if source else None
    notes += additions_told(family, spec) if family else []
    facts = weights.read(path) if path else None
    return SpecInspection(
        place=place,
        model_format=spec.model_format,
        quantization=spec.quantization,
        source=spec.model_uri or (f"{spec.model_hub}:{spec.model_id}" if spec.model_id else "none"),
        path=str(path) if path else None,
        facts=facts,
        inferred=tuple(sentences(facts)) if facts else (),
        contradictions=tuple(contradictions(family, spec, facts)) if facts else (),
        notes=tuple(notes),
    )


def _source_or_none(spec: ModelSpec) -> Source | None:
    try:
        return source_of(spec)
    except BadUri:
        return None


def path_of(source: Source) -> Path | None:
    """Where a source of this machine has its files, or None; whatever it holds, if not what was asked for."""
    if source.model_hub != "local":
        return None
    if found := find(source):
        return found.path
    path = Path(source.model_id)
    return path if path.exists() else None


def _defaulted(family: ModelFamily, data: Mapping[str, Any]) -> dict[str, Any]:
    """What was not given and has a value nonetheless, by its path."""
    whole = encode_family(family)
    found = {key: whole[key] for key in whole if _is_default(key, whole[key], data)}
    given = data.get("model_specs")
    given = given if isinstance(given, list | tuple) else []
    for index, (spec, mine) in enumerate(zip(whole.get("model_specs") or (), given, strict=False)):
        without = {"model_hub"} if spec.get("model_uri") else set()
        for key, value in spec.items():
            if key not in without and isinstance(mine, Mapping) and _is_default(key, value, mine):
                found[f"model_specs[{index}].{key}"] = value
    return found


def _is_default(key: str, value: Any, given: Mapping[str, Any]) -> bool:
    return given.get(key) is None and value not in (None, {}, []) and key not in ("version", "is_builtin")


def _inherited(family: ModelFamily, with_base: ModelFamily) -> tuple[str, ...]:
    base = getattr(family, "model_family", None)
    changed = [name for name in family.__struct_fields__ if getattr(family, name) != getattr(with_base, name)]
    return (f"{', '.join(changed)}: lent by the built-in model that it names, {base}.",) if changed else ()


# -- what files say


def sentences(facts: Facts) -> list[str]:
    """What the files say, for people."""
    said = [f"{name}: {value}" for name, value in _told(facts) if value not in (None, "", False)]
    return [*said, *facts.problems]


def _told(facts: Facts) -> list[tuple[str, Any]]:
    per_token = kv_cache_bytes(facts.attention, Cache(tokens=1)) if facts.attention else None
    template = {True: "yes", False: "no", None: None}[facts.has_chat_template]
    size = f"{facts.parameters / 1e9:.3g} billion" if facts.parameters else None
    n_files = len(facts.files)
    return [
        ("architecture", " ".join(dict.fromkeys((facts.architecture or "", *facts.architectures))).strip()),
        (
            "weights",
            f"{facts.weight_bytes:,} bytes in {n_files} {facts.kind} file{'s' * (n_files != 1)}"
            if facts.weight_bytes
            else None,
        ),
        ("parameters", size),
        ("types", ", ".join(sorted(facts.elements)) or facts.dtype),
        ("quantization", facts.quantization),
        ("layers", facts.layers),
        ("context length", facts.context_length),
        ("KV cache", f"{per_token:,} bytes a token at 16 bits" if per_token else None),
        ("experts", f"{facts.experts}, {facts.experts_used or '?'} at once" if facts.experts else None),
        ("chat template", template if not facts.is_encoder else None),
        ("reads pictures", "yes" if facts.has_vision else None),
        ("dimensions", facts.dimensions if facts.is_encoder else None),
        ("tokens of one text", facts.max_tokens),
    ]


def contradictions(family: ModelFamily | None, spec: ModelSpec, facts: Facts) -> list[str]:
    """Where the registration says otherwise than the files, and what to write instead; None: only of the spec."""
    said = _format_contradictions(spec, facts) + _size_contradictions(spec, facts)
    declared = getattr(family, "architectures", None)
    if declared and facts.architectures and facts.kind != GGUF_FILES and not set(declared) & set(facts.architectures):
        said.append(f"architectures says {', '.join(declared)}, and the files {', '.join(facts.architectures)}.")
    if isinstance(family, LLMFamily):
        return said + _llm_contradictions(family, facts)
    if isinstance(family, EmbeddingFamily | RerankFamily):
        return said + _vector_contradictions(family, facts)
    return said


def _format_contradictions(spec: ModelSpec, facts: Facts) -> list[str]:
    if facts.kind is None:
        return []
    if (spec.model_format == GGUF) != (facts.kind == GGUF_FILES):
        return [
            f"model_format says {spec.model_format}, and the files are {facts.kind}. "
            f"Give model_format {GGUF if facts.kind == GGUF_FILES else 'pytorch'}, or other files."
        ]
    if spec.model_format == GGUF:
        declared, own = quantization_in(f".{spec.quantization}"), facts.quantization
        if declared and own and declared.upper().removeprefix("UD-") != own.upper():
            return [f"quantization says {spec.quantization}, and the file is {own}."]
        return []
    method = facts.quantization_method
    wanted = METHODS.get(spec.model_format)
    if wanted and method not in (*wanted, "unknown"):
        return [f"model_format says {spec.model_format}, and config.json names {method or 'no quantization'}."]
    if wanted is None and method is not None:
        right = next((name for name, methods in METHODS.items() if method in methods), None)
        if right and spec.model_format != right:
            return [
                f"model_format says {spec.model_format}, and config.json names {method}. Give model_format {right}."
            ]
    return []


def _size_contradictions(spec: ModelSpec, facts: Facts) -> list[str]:
    declared = billions_of(spec.model_size_in_billions) if spec.model_size_in_billions is not None else None
    if declared is None or not facts.parameters:
        return []
    own = facts.parameters / 1e9
    if abs(own - declared) <= SIZE_TOLERANCE * max(own, declared) or abs(own - declared) < 0.1:
        return []
    return [
        f"model_size_in_billions says {spec.model_size_in_billions}, and the files have {own:.3g} billion parameters."
    ]


def _llm_contradictions(family: LLMFamily, facts: Facts) -> list[str]:
    said = []
    if facts.context_length and family.context_length > facts.context_length:
        said.append(
            f"context_length says {family.context_length}, and the model was made for {facts.context_length}: "
            "beyond that its answers get worse, and some engines refuse."
        )
    if "chat" in family.model_ability and facts.has_chat_template is False and not family.chat_template:
        said.append(
            "model_ability says chat, and neither the files nor the registration have a chat template: "
            "give chat_template, or leave chat out."
        )
    if "vision" in family.model_ability and facts.has_vision is False:
        said.append("model_ability says vision, and config.json names no part that reads pictures.")
    if facts.is_encoder:
        said.append(f"The files are an encoder ({facts.architecture}): it can be an embedding or rerank model, no LLM.")
    if facts.architecture == "clip" and facts.kind == GGUF_FILES:
        said.append("The file is a multimodal projector, not a model: give it as multimodal_projectors of the model.")
    return said


def _vector_contradictions(family: EmbeddingFamily | RerankFamily, facts: Facts) -> list[str]:
    said = []
    dimensions = family.dimensions if isinstance(family, EmbeddingFamily) else None
    if dimensions and facts.dimensions and dimensions != facts.dimensions:
        said.append(f"dimensions says {dimensions}, and the files say {facts.dimensions}.")
    most = facts.context_length
    if family.max_tokens and most and family.max_tokens > most:
        said.append(f"max_tokens says {family.max_tokens}, and the model reads {most} at most.")
    return said
