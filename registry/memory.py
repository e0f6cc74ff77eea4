"""How much memory a model takes: its weights, the cache of keys and values, and what computing needs. Pure.

What a model's own files say (`registry/weights.py`) gives its weights and cache; where they are not here, usual shapes
of models of its size stand in for them. What an engine needs beside those two is always an estimate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

# Up to how many billions of parameters -> layers, width of keys, width of all: models of today, on the large side.
SHAPES = (
    (0.7, 28, 1024, 1024),
    (2.0, 28, 1024, 2048),
    (4.5, 36, 1024, 2560),
    (9.0, 36, 1024, 4096),
    (15.0, 48, 1024, 5120),
    (35.0, 64, 1024, 5120),
    (80.0, 80, 1024, 8192),
    (140.0, 96, 1024, 12288),
    (float("inf"), 126, 1024, 16384),
)

# Bits of a weight, with the scales that go along, where the name's own number does not say it.
GGUF_BITS = {"2": 2.7, "3": 3.9, "4": 4.85, "5": 5.7, "6": 6.6, "8": 8.5, "16": 16.0, "32": 32.0}
BITS = {"gptq": 4.3, "awq": 4.3, "fp4": 4.5, "fp8": 8.0, "bnb": 4.3, "mlx": 4.5, "ggufv2": 4.85}
OTHER_SCALES = 0.3  # bits, of quantized weights that are no GGUF
UNQUANTIZED_BITS = 16.0

# Bits of one number in the cache, with its scales, by the engines' names for its type.
CACHE_BITS = {
    "f32": 32.0,
    "float32": 32.0,
    "f16": 16.0,
    "float16": 16.0,
    "bf16": 16.0,
    "bfloat16": 16.0,
    "auto": 16.0,
    "fp8": 8.0,
    "fp8_e4m3": 8.0,
    "fp8_e5m2": 8.0,
    "q8_0": 8.5,
    "q5_1": 6.0,
    "q5_0": 5.5,
    "q4_1": 5.0,
    "q4_0": 4.5,
    "iq4_nl": 4.5,
}

ACTIVATION_TOKENS = 2048  # computed at once
GPU_ENGINE_BYTES = 650_000_000  # of the GPU's own libraries
CPU_ENGINE_BYTES = 200_000_000  # of a process without them


class Attention(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Layers that keep the same of each token: numbers of its key and of its value, of one layer.

    With a `window` they keep the newest so many tokens of each sequence.
    """

    layers: int
    key: int
    value: int
    window: int | None = None


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    """The cache of keys and values that an engine sets up: tokens of each sequence, how many sequences, bits.

    `is_even`: layers with a window have as much of it as the others.
    """

    tokens: int
    sequences: int = 1
    key_bits: float = 16.0
    value_bits: float = 16.0
    is_even: bool = False


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that one copy of a model takes."""

    weights: int
    kv_cache: int
    activations: int
    engine: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.activations + self.engine


def kv_cache_bytes(attention: Sequence[Attention], cache: Cache) -> int:
    """Bytes of the cache of keys and values."""
    bits = 0.0
    for part in attention:
        tokens = cache.tokens if part.window is None or cache.is_even else min(cache.tokens, part.window)
        bits += part.layers * tokens * (part.key * cache.key_bits + part.value * cache.value_bits)
    return round(bits * cache.sequences / 8)


def copied_bytes(attention: Sequence[Attention], width: int, cache: Cache) -> int:
    """Of what a step copies out of the cache for one layer, where all of it is read: keys and values, each as wide as
    the model once they are repeated for its heads, and the values as they are.
    """
    value = max((part.value for part in attention), default=0)
    return round(cache.tokens * cache.sequences * (2 * width + value) * cache.value_bits / 8)


def most_tokens(attention: Sequence[Attention], cache: Cache, room_bytes: int) -> int:
    """The most tokens of each sequence whose cache fits into the room; 0 if none does, the wish if all do."""
    few, many = 0, cache.tokens
    while few < many:
        middle = (few + many + 1) // 2
        if kv_cache_bytes(attention, msgspec.structs.replace(cache, tokens=middle)) <= room_bytes:
            few = middle
        else:
            many = middle - 1
    return few


def estimate(
    weight_bytes: int, attention: Sequence[Attention], width: int, cache: Cache, *, on_gpu: bool = True
) -> Estimate:
    """The parts.

    Args:
        weight_bytes: of all tensors.
        width: numbers that pass from layer to layer for each token.
    """
    return Estimate(
        weights=weight_bytes,
        kv_cache=kv_cache_bytes(attention, cache),
        activations=min(cache.tokens, ACTIVATION_TOKENS) * width * 18 * 2,
        engine=GPU_ENGINE_BYTES if on_gpu else CPU_ENGINE_BYTES,
    )


def usual_shape(billions: float) -> tuple[tuple[Attention, ...], int]:
    """Layers and width of usual models of so many billions of parameters, on the large side.

    Raises:
        ValueError: that is no size of a model.
    """
    if not 0 < billions < 1e5:
        raise ValueError(f"{billions:g} billion parameters are no size of a model.")
    _, layers, key, width = next(shape for shape in SHAPES if billions <= shape[0])
    return (Attention(layers=layers, key=key, value=key),), width


def usual_weight_bytes(billions: float, model_format: str, quantization: str | None) -> int:
    """Bytes of the weights of so many billions of parameters."""
    return round(billions * 1e9 * bits_of(model_format, quantization) / 8)


def bits_of(model_format: str, quantization: str | None) -> float:
    """Bits of one weight."""
    kind = model_format.lower()
    name = (quantization or "").lower()
    number = re.search(r"\d+", name)
    if kind.startswith("gguf"):
        return GGUF_BITS.get(number[0], float(number[0])) if number else BITS["ggufv2"]
    if number and kind != "fp8":
        return float(number[0]) + (OTHER_SCALES if float(number[0]) < 16 else 0.0)
    return BITS.get(kind, UNQUANTIZED_BITS)


def billions_of(size: float | str | None) -> float | None:
    """A size as specs write it, such as 7, 0.5, "0_5" or "7B", in billions; None if it is none."""
    try:
        billions = float(str(size).strip().casefold().replace("_", ".").removesuffix("b"))
    except ValueError:
        return None
    return billions if 0 < billions < 1e5 else None
