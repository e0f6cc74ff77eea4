"""How much memory a launch takes: as it says itself, as was seen, by its files' headers, or by sizes that are told.

The one place where it is reckoned; all but `needs_now`, which reads the headers, is pure.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from engines.base import Engine, Launch, Needs
from gateway.experience import Experience
from gateway.placement import cache_bytes_of, needs_of
from registry import weights
from registry.hubs.base import PICKLES, SAFETENSORS
from registry.hubs.local import sizes_in
from registry.memory import (
    CPU_ENGINE_BYTES,
    Attention,
    Cache,
    Estimate,
    billions_of,
    copied_bytes,
    estimate,
    usual_shape,
    usual_weight_bytes,
)
from registry.schema import ModelSpec
from registry.sources import is_gguf
from registry.weights import Facts

USUAL_TOKENS = 4096  # of a cache that grows as it is used
SEEN_FACTOR = 1.05  # of what was seen, for what was not


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What each copy takes, in bytes, and what that is told from. `tokens` are those of one of `sequences`.

    `total_bytes` is what it gets. The parts are an estimate, which may be another.
    """

    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    engine_bytes: int
    total_bytes: int
    tokens: int
    sequences: int
    replicas: int
    basis: str


class Sizing(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica asks for with all that is known of its memory; `basis` says from what.

    `estimate` has the parts of the estimate, None where there is nothing to estimate from.
    """

    needs: Needs
    basis: str
    estimate: Estimate | None = None


async def needs_now(
    launch: Launch,
    engine: Engine,
    index: int,
    paths: Sequence[Path],
    experience: Experience,
    *,
    has_gpus: bool,
    specs: Sequence[ModelSpec] = (),
) -> Needs:
    """What that replica asks of this machine; for `specs` see `size_up`.

    Args:
        paths: where its files are, and then those of what is loaded with it.
    """

    def read() -> tuple[Facts | None, int]:
        if not launch.artifact.has_files:
            return None, 0
        return weights.read(paths[0], launch.artifact.loads), bytes_beside(launch, paths[0], paths[1:])

    facts, beside = await asyncio.to_thread(read)
    weight_bytes = beside + ((facts and facts.weight_bytes) or 0)
    needs = msgspec.structs.replace(needs_of(launch, engine.needs(launch), index), weight_bytes=weight_bytes)
    if launch.memory_bytes is not None:
        facts, beside = None, 0
    return size_up(
        launch, needs, None, facts, [], experience, has_gpus=has_gpus, specs=specs, beside_bytes=beside
    ).needs


def bytes_beside(launch: Launch, model_path: Path | None, additions: Sequence[Path] = ()) -> int:
    """Of files that are loaded too: a draft model, adapters, the projector beside the model, and `additions`."""
    named = [launch.options.get("model_draft")]
    adapters = launch.options.get("lora_list")
    for adapter in adapters if isinstance(adapters, list | tuple) else ():
        named.append(adapter.get("local_path") if isinstance(adapter, dict) else None)
    paths = [*additions, *(Path(name) for name in named if isinstance(name, str))]
    if launch.artifact.projector and model_path:
        folder = model_path if model_path.is_dir() else model_path.parent
        paths.append(folder / Path(launch.artifact.projector).name)
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):  # the engine says what it lacks
            total += sum(sizes_in(path).values()) if path.is_dir() else path.stat().st_size
    return total


def size_up(
    launch: Launch,
    needs: Needs,
    sizes: Mapping[str, int] | None,
    facts: Facts | None,
    unknown: list[str],
    experience: Experience,
    *,
    has_gpus: bool,
    specs: Sequence[ModelSpec] = (),
    beside_bytes: int = 0,
) -> Sizing:
    """What one copy takes; 0 bytes, and a sentence in `unknown`, if nobody knows.

    Args:
        needs: what the engine asks for.
        sizes: the bytes of each file that is to be loaded; None if they are not known.
        facts: what the files say, if they are here.
        specs: of the family, for advice.
        beside_bytes: of `bytes_beside`, without what is among `sizes`.
    """
    on_gpu = has_gpus and not needs.is_for_cpu
    if needs.chooses and on_gpu and needs.n_gpu is None and needs.gpu_idx is None and launch.memory_bytes is None:
        return Sizing(needs=needs, basis="unknown, as it picks among the GPUs by itself")
    estimated = _estimated(launch, needs, sizes, facts, specs, beside_bytes, on_gpu=on_gpu)
    may_differ = needs.is_elastic or needs.may_split or bool(needs.gpu_layers)
    may_differ |= estimated is not None and bool(estimated.needs.shorter)
    seen = None if may_differ else experience.peak_bytes(launch, on_gpu=on_gpu)
    if launch.memory_bytes is not None:
        told, basis = launch.memory_bytes, "as the launch says (memory)"
    elif seen is not None:
        told, basis = round(seen * SEEN_FACTOR), "as was seen in earlier runs"
    elif estimated is not None:
        return estimated
    else:
        if launch.artifact.has_files:
            unknown.append("How much memory it takes: neither its files nor a size in billions are known.")
        told, basis = 0, "unknown"
    if estimated is None:
        return Sizing(needs=msgspec.structs.replace(needs, memory_bytes=told), basis=basis)
    splits = {} if launch.memory_bytes is not None else estimated.needs.splits
    known = msgspec.structs.replace(estimated.needs, memory_bytes=told, shorter={}, splits=splits)
    return Sizing(needs=known, basis=basis, estimate=estimated.estimate)


def _estimated(
    launch: Launch,
    needs: Needs,
    sizes: Mapping[str, int] | None,
    facts: Facts | None,
    specs: Sequence[ModelSpec],
    beside_bytes: int,
    *,
    on_gpu: bool,
) -> Sizing | None:
    if not launch.artifact.has_files:  # nothing of the model is loaded here
        return None
    spec = launch.artifact.spec
    billions = billions_of(spec.model_size_in_billions) if spec.model_size_in_billions is not None else None
    weight_bytes, basis = _weight_bytes(sizes, facts, spec, billions)
    if weight_bytes is None:
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
    weight_bytes += beside_bytes
    if launch.artifact.projector:
        weight_bytes += sum(size for name, size in (sizes or {}).items() if "mmproj" in name.lower())
    cache = _cache(launch, needs, facts)
    needs = msgspec.structs.replace(needs, cache=cache, attention=attention)

    def parts_of(cache: Cache) -> Estimate:
        parts = estimate(weight_bytes, attention, width, cache, on_gpu=on_gpu)
        kv_cache = cache_bytes_of(msgspec.structs.replace(needs, cache=cache))
        copied = copied_bytes(attention, width, cache) if needs.copies_cache else 0
        return msgspec.structs.replace(
            parts,
            kv_cache=kv_cache,
            activations=parts.activations + copied,
            engine=needs.overhead_bytes or parts.engine,
        )

    parts = parts_of(cache)
    needs = msgspec.structs.replace(
        needs,
        memory_bytes=parts.total,
        overhead_bytes=parts.engine,
        shorter={
            tokens: parts_of(msgspec.structs.replace(cache, tokens=tokens)).total for tokens in _shorter(needs, cache)
        },
        lighter=_lighter(spec, specs, weight_bytes, parts.total - weight_bytes),
        splits=dict(_splits(parts, _layer_bytes(facts, weight_bytes, attention))) if on_gpu and needs.can_split else {},
    )
    return Sizing(needs=needs, basis=basis, estimate=parts)


def _cache(launch: Launch, needs: Needs, facts: Facts | None) -> Cache:
    """As the engine sets it up, with room for as many sequences as it has at least."""
    cache = needs.cache or Cache(tokens=_tokens(launch, needs, facts))
    sequences = max(cache.sequences, needs.cache_tokens // cache.tokens)
    return msgspec.structs.replace(cache, sequences=sequences)


def _layer_bytes(facts: Facts | None, weight_bytes: int, attention: Sequence[Attention]) -> tuple[int, ...]:
    """As the headers say, else evenly."""
    if facts and facts.layer_bytes:
        return facts.layer_bytes
    layers = sum(part.layers for part in attention)
    return (weight_bytes // layers,) * layers if layers else ()


def _splits(parts: Estimate, layer_bytes: Sequence[int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """The last layers go first; what is no layer may be on both sides."""
    layers, of_layers = len(layer_bytes), sum(layer_bytes)
    on_gpu = of_layers
    for count in range(layers - 1, 0, -1):
        on_gpu -= layer_bytes[layers - count - 1]
        cache = parts.kv_cache * count // layers
        gpu = parts.weights - of_layers + on_gpu + cache + parts.activations + parts.engine
        yield count, (gpu, parts.weights - on_gpu + parts.kv_cache - cache + CPU_ENGINE_BYTES)


def _shorter(needs: Needs, cache: Cache) -> Iterator[int]:
    """Powers of two below the context, as long as each request may still be as long as is usual."""
    if not needs.can_shorten or needs.cache_bytes is not None or not needs.attention:
        return
    tokens = 2 ** (cache.tokens.bit_length() - 1)
    tokens //= 1 + (tokens == cache.tokens)
    while tokens >= max(needs.cache_tokens, USUAL_TOKENS):
        yield tokens
        tokens //= 2


def _lighter(chosen: ModelSpec, specs: Sequence[ModelSpec], weight_bytes: int, rest_bytes: int) -> dict[str, int]:
    """What specs in the same format would take whose weights are fewer, the largest first."""
    found: dict[str, int] = {}
    for spec in specs:
        billions = billions_of(spec.model_size_in_billions) if spec.model_size_in_billions is not None else None
        if billions is None or spec.model_format != chosen.model_format:
            continue
        fewer = usual_weight_bytes(billions, spec.model_format, spec.quantization)
        if fewer < weight_bytes:
            quantization = "" if spec.quantization in (None, "none") else f" {spec.quantization}"
            found.setdefault(f"{spec.model_size_in_billions}B{quantization}", fewer + rest_bytes)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


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


def _tokens(launch: Launch, needs: Needs, facts: Facts | None) -> int:
    """Of a cache whose engine does not say how large it makes it: all that the model was made for if it is set up at
    the start, else as many as are usual.
    """
    family = launch.artifact.family
    for key in ("context_length", "max_model_len", "context_size", "n_ctx"):
        if isinstance(said := launch.options.get(key), int) and said > 0:
            return said
    known = (facts.context_length if facts else None, getattr(family, "context_length", None))
    longest = next(filter(None, (*known, getattr(family, "max_tokens", None))), USUAL_TOKENS)
    return longest if needs.cache_tokens else min(longest, USUAL_TOKENS)


def told(sizing: Sizing, replicas: int) -> Memory | None:
    """For people; None if there is nothing to tell."""
    parts, cache = sizing.estimate, sizing.needs.cache
    if parts is None or cache is None:
        return None
    is_estimate = sizing.needs.memory_bytes == parts.total
    guessed = "activations and the engine's own are" if is_estimate else "the parts are"
    return Memory(
        weights_bytes=parts.weights,
        kv_cache_bytes=parts.kv_cache,
        activations_bytes=parts.activations,
        engine_bytes=parts.engine,
        total_bytes=sizing.needs.memory_bytes,
        tokens=cache.tokens,
        sequences=cache.sequences,
        replicas=replicas,
        basis=f"{sizing.basis}; {guessed} always an estimate.",
    )
