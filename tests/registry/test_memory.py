"""How much memory a model takes."""

from __future__ import annotations

import pytest

from registry.memory import (
    Attention,
    Cache,
    billions_of,
    bits_of,
    estimate,
    kv_cache_bytes,
    most_tokens,
    usual_shape,
    usual_weight_bytes,
)

WHOLE = Attention(layers=2, key=8, value=8)
WINDOWED = Attention(layers=3, key=8, value=8, window=10)


def total(billions: float, model_format: str, quantization: str | None, tokens: int, bits: float) -> int:
    attention, width = usual_shape(billions)
    cache = Cache(tokens=tokens, key_bits=bits, value_bits=bits)
    return estimate(usual_weight_bytes(billions, model_format, quantization), attention, width, cache).total


@pytest.mark.parametrize(
    ("attention", "cache", "n_bytes"),
    [
        ([WHOLE], Cache(tokens=100), 2 * 16 * 100 * 2),
        ([WHOLE], Cache(tokens=100, sequences=4), 2 * 16 * 100 * 2 * 4),
        ([WHOLE], Cache(tokens=100, key_bits=8, value_bits=4), 2 * 8 * 100 * 12 // 8),
        ([WINDOWED], Cache(tokens=100), 3 * 16 * 10 * 2),
        ([WINDOWED], Cache(tokens=5), 3 * 16 * 5 * 2),
        ([WHOLE, WINDOWED], Cache(tokens=100), 2 * 16 * 100 * 2 + 3 * 16 * 10 * 2),
        ([], Cache(tokens=100), 0),
    ],
)
def test_the_cache(attention: list[Attention], cache: Cache, n_bytes: int) -> None:
    assert kv_cache_bytes(attention, cache) == n_bytes


def test_the_most_tokens_that_fit_are_the_last_that_do() -> None:
    cache = Cache(tokens=10_000, sequences=2)
    found = most_tokens([WHOLE], cache, 12_345)
    assert kv_cache_bytes([WHOLE], Cache(tokens=found, sequences=2)) <= 12_345
    assert kv_cache_bytes([WHOLE], Cache(tokens=found + 1, sequences=2)) > 12_345
    assert most_tokens([WHOLE], cache, 1) == 0
    assert most_tokens([WHOLE], cache, 10**9) == 10_000


def test_more_of_anything_needs_more_memory() -> None:
    base = total(7, "pytorch", None, 4096, 16)
    assert total(14, "pytorch", None, 4096, 16) > base
    assert total(7, "pytorch", None, 8192, 16) > base
    assert total(7, "pytorch", None, 4096, 32) > base
    assert total(7, "gptq", "Int4", 4096, 16) < base
    assert total(400, "fp8", "fp8", 4096, 16) > base


@pytest.mark.parametrize(
    ("model_format", "quantization", "at_least", "at_most"),
    [
        ("pytorch", None, 16, 16),
        ("pytorch", "none", 16, 16),
        ("pytorch", "8-bit", 8, 9),
        ("gptq", "Int4", 4, 5),
        ("gptq", "Int8", 8, 9),
        ("fp8", "fp8", 8, 8),
        ("ggufv2", "Q4_K_M", 4, 5),
        ("ggufv2", "Q8_0", 8, 9),
        ("ggufv2", "F16", 16, 16),
        ("mlx", "4bit", 4, 5),
    ],
)
def test_bits_of_a_weight(model_format: str, quantization: str | None, at_least: float, at_most: float) -> None:
    assert at_least <= bits_of(model_format, quantization) <= at_most


@pytest.mark.parametrize(
    ("size", "billions"),
    [(7, 7), ("0_5", 0.5), ("7B", 7), (0.6, 0.6), ("many", None), (0, None), ("nan", None), ("inf", None)],
)
def test_sizes_as_specs_write_them(size: float | str, billions: float | None) -> None:
    assert billions_of(size) == billions
