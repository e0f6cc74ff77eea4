"""hostler cal-model-mem"""

from __future__ import annotations

import click
import msgspec

from gateway.amounts import megabytes
from gateway.cli.options import as_json_option, print_json, print_table
from registry.memory import Cache, estimate, usual_shape, usual_weight_bytes


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
    try:
        attention, width = usual_shape(billions)
    except ValueError as exc:
        raise click.BadParameter(str(exc), param_hint="-s") from exc
    cache = Cache(tokens=context_length, key_bits=int(kv_cache_dtype), value_bits=int(kv_cache_dtype))
    found = estimate(usual_weight_bytes(billions, model_format, quantization), attention, width, cache)
    parts = msgspec.structs.asdict(found) | {"total": found.total}
    if as_json:
        given = {"model_name": model_name, "model_size_in_billions": billions, "context_length": context_length}
        print_json(given | {f"{name}_bytes": size for name, size in parts.items()})
        return
    if model_name:
        click.echo(f"{model_name}, an estimate:")
    print_table(
        {"PART": "left", "MEMORY": "right"},
        [[name.replace("_", " "), megabytes(size)] for name, size in parts.items()],
    )
