"""How much memory a launch takes: by its files' headers if they are here, else by sizes that are told. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from engines.base import Launch, Needs
from registry.hubs.base import PICKLES, SAFETENSORS
from registry.memory import Attention, Cache, Estimate, billions_of, estimate, usual_shape, usual_weight_bytes
from registry.schema import ModelSpec
from registry.sources import is_gguf
from registry.weights import Facts

USUAL_TOKENS = 4096  # of a cache, where nobody says


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What each copy takes, in bytes, and what that is told from. `tokens` are those of one of `sequences`."""

    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    engine_bytes: int
    total_bytes: int
    tokens: int
    sequences: int
    replicas: int
    basis: str


class Sizing(msgspec.Struct, frozen=True):
    """An estimate, what it is of, and what it is told from."""

    estimate: Estimate
    attention: tuple[Attention, ...]
    cache: Cache
    basis: str


def size_up(
    launch: Launch,
    needs: Needs,
    sizes: Mapping[str, int] | None,
    facts: Facts | None,
    unknown: list[str],
    *,
    is_on_gpu: bool,
    added_bytes: int = 0,
) -> Sizing | None:
    """What one copy takes; None, which is added to `unknown`, if nobody knows.

    Args:
        sizes: the bytes of each file that is to be loaded; None if they are not known.
        facts: what the files say, if they are here.
        added_bytes: of what is loaded beside the model's own files.
    """
    spec = launch.artifact.spec
    billions = billions_of(spec.model_size_in_billions) if spec.model_size_in_billions is not None else None
    weight_bytes, basis = _weight_bytes(sizes, facts, spec, billions)
    if weight_bytes is None:
        unknown.append("How much memory it takes: neither its files nor a size in billions are known.")
        return None
    if facts and facts.is_attention_known and facts.width:
        attention, width = facts.attention, facts.width
        basis += ", and the cache from them too"
    else:
        params = billions or (facts and facts.parameters and facts.parameters / 1e9) or _billions(weight_bytes, spec)
        attention, width = usual_shape(params)
        if launch.artifact.family.model_type != "LLM":
            attention = ()
        basis += ", and the cache as usual models of that size have it: an estimate" if attention else ""
    cache = needs.cache or Cache(tokens=_tokens(launch, facts))
    if launch.artifact.projector:
        weight_bytes += sum(size for name, size in (sizes or {}).items() if "mmproj" in name.lower())
    weight_bytes += added_bytes
    sized = estimate(weight_bytes, attention, width, cache, on_gpu=is_on_gpu)
    return Sizing(sized, attention, cache, basis)


def _weight_bytes(
    sizes: Mapping[str, int] | None, facts: Facts | None, spec: ModelSpec, billions: float | None
) -> tuple[int | None, str]:
    if facts and facts.weight_bytes:
        headers = "the headers of its files" if facts.elements else "the size of its files"
        return facts.weight_bytes, f"weights from {headers}"
    if sizes and (listed := _listed_weights(sizes)):
        return listed, "weights from the sizes that the hub tells"
    if billions:
        return (
            usual_weight_bytes(billions, spec.model_format, spec.quantization),
            f"weights from {billions:g} billion parameters and the format, an estimate",
        )
    return None, ""


def _listed_weights(sizes: Mapping[str, int]) -> int:
    return sum(
        size
        for name, size in sizes.items()
        if not name.lower().endswith(".json")
        and ((is_gguf(name) and "mmproj" not in name.lower()) or SAFETENSORS.search(name) or PICKLES.search(name))
    )


def _billions(weight_bytes: int, spec: ModelSpec) -> float:
    """How many parameters so many bytes are, roughly."""
    per_billion = usual_weight_bytes(1, spec.model_format, spec.quantization)
    return min(max(weight_bytes / per_billion, 0.001), 9e4)


def _tokens(launch: Launch, facts: Facts | None) -> int:
    """Of a cache whose engine does not say how large it makes it."""
    family = launch.artifact.family
    for key in ("context_length", "max_model_len", "context_size", "n_ctx"):
        if isinstance(said := launch.options.get(key), int) and said > 0:
            return said
    known = (facts.context_length if facts else None, getattr(family, "context_length", None))
    return next(filter(None, (*known, getattr(family, "max_tokens", None))), USUAL_TOKENS)


def told(sizing: Sizing, replicas: int) -> Memory:
    parts = sizing.estimate
    return Memory(
        weights_bytes=parts.weights,
        kv_cache_bytes=parts.kv_cache,
        activations_bytes=parts.activations,
        engine_bytes=parts.engine,
        total_bytes=parts.total,
        tokens=sizing.cache.tokens,
        sequences=sizing.cache.sequences,
        replicas=replicas,
        basis=f"{sizing.basis}; activations and the engine's own are always an estimate.",
    )
