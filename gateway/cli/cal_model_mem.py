"""hostler cal-model-mem"""

from __future__ import annotations

import re
from typing import NamedTuple

import click

from gateway.cli.options import as_json_option, megabytes, print_json, print_table

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

ACTIVATION_TOKENS = 2048  # computed at once
ENGINE_BYTES = 650e6  # of the GPU's own libraries


class Estimate(NamedTuple):
    """Bytes, for one request of the whole context."""

    weights: float
    kv_cache: float
    activations: float
    engine: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


@click.command("cal-model-mem")
@click.option("-n", "--model-name", help="Only for the table.")
@click.option("-s", "--size-in-billions", "size", required=True, help="Such as 7, 0.5 or 0_5.")
@click.option("-f", "--model-format", required=True, help="pytorch, ggufv2, gptq, awq, ...")
@click.option("-q", "--quantization", help="Such as none, Int4, Q4_K_M.")
@click.option("-c", "--context-length", required=True, type=click.IntRange(1), help="Tokens of prompt and answer.")
@click.option("--kv-cache-dtype", type=click.Choice(["8", "16", "32"]), default="16", show_default=True, help="Bits.")
@as_json_option
def command(
    model_name: str | None,
    size: str,
    model_format: str,
    quantization: str | None,
    context_length: int,
    kv_cache_dtype: str,
    as_json: bool,
) -> None:
    """Estimate the GPU memory of one request at a time, from size and format alone.

    Layers and widths are those of usual models of the size. Asks no gateway.
    """
    try:
        billions = float(size.replace("_", "."))
    except ValueError as exc:
        raise click.BadParameter(f"{size!r} is no size such as 7, 0.5 or 0_5.", param_hint="-s") from exc
    found = estimate(billions, model_format, quantization, context_length, int(kv_cache_dtype))
    parts = found._asdict() | {"total": found.total}
    if as_json:
        given = {"model_name": model_name, "model_size_in_billions": billions, "context_length": context_length}
        print_json(given | {f"{name}_bytes": round(size) for name, size in parts.items()})
        return
    if model_name:
        click.echo(f"{model_name}, an estimate:")
    print_table(
        {"PART": "left", "MEMORY": "right"},
        [[name.replace("_", " "), megabytes(size)] for name, size in parts.items()],
    )


def estimate(billions: float, model_format: str, quantization: str | None, context: int, kv_bits: int) -> Estimate:
    """The parts, in bytes. Raises BadParameter if the size is none."""
    if not 0 < billions < 1e5:
        raise click.BadParameter(f"{billions:g} billion parameters are no size of a model.", param_hint="-s")
    _, layers, kv_width, width = next(shape for shape in SHAPES if billions <= shape[0])
    return Estimate(
        weights=billions * 1e9 * bits_of(model_format, quantization) / 8,
        kv_cache=2 * layers * kv_width * context * kv_bits / 8,  # a key and a value in each layer
        activations=min(context, ACTIVATION_TOKENS) * width * 18 * 2,
        engine=ENGINE_BYTES,
    )


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
