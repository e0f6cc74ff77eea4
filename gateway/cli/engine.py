"""hostler engine"""

from __future__ import annotations

from typing import Any

import click

from gateway.cli.options import as_json_option, model_type_option, print_json, print_table, text, with_client
from gateway.client import Client

COLUMNS = ("NAME", "ENGINE", "FORMAT", "SIZE", "QUANTIZATION")


@click.command("engine")
@click.option("-n", "--model-name", required=True, help="A family of the catalogue, or one of your own.")
@model_type_option
@click.option("-en", "--model-engine", help="Only this engine.")
@click.option("-f", "--model-format", help="Only this format.")
@click.option("-s", "--model-size-in-billions", "size", help="Only this size.")
@click.option("-q", "--quantization", help="Only this quantization.")
@as_json_option
@with_client
def command(
    client: Client,
    model_name: str,
    model_type: str,
    model_engine: str | None,
    model_format: str | None,
    size: str | None,
    quantization: str | None,
    as_json: bool,
) -> None:
    """Show which engines run a model, in which formats, and why others do not."""
    found = client.engines(model_name, model_type)
    if found is None:
        raise click.ClickException(f"There is no {model_type} model {model_name!r}; see `hostler registrations`.")
    wanted = {"model_format": model_format, "model_size_in_billions": size, "quantization": quantization}
    chosen = {
        engine: entries if isinstance(entries, str) else [entry for entry in entries if _fits(entry, wanted)]
        for engine, entries in found.items()
        if model_engine is None or engine.lower() == model_engine.lower()
    }
    if as_json:
        print_json(chosen)
        return
    rows = [
        _row(model_name, engine, entry)
        for engine, entries in chosen.items()
        if not isinstance(entries, str)
        for entry in entries
    ]
    if rows:
        print_table(dict.fromkeys(COLUMNS, "left"), rows)
    for engine, reason in chosen.items():
        if isinstance(reason, str):
            click.echo(f"{engine} cannot run it: {reason}")
    if not rows:
        raise click.ClickException(f"Nothing here runs {model_name} so.")


def _row(model_name: str, engine: str, entry: dict[str, Any]) -> list[str]:
    facts = [entry.get("model_format"), entry.get("model_size_in_billions"), _quantizations(entry)]
    return [text(entry.get("model_name", model_name)), engine, *[text(fact) for fact in facts]]


def _quantizations(entry: dict[str, Any]) -> list[str]:
    return entry.get("quantizations") or [one for one in [entry.get("quantization")] if one]


def _fits(entry: dict[str, Any], wanted: dict[str, str | None]) -> bool:
    has: dict[str, list[Any]] = {
        "model_format": [entry.get("model_format")],
        "model_size_in_billions": [entry.get("model_size_in_billions")],
        "quantization": _quantizations(entry),
    }
    return all(value is None or _plain(value) in map(_plain, has[name]) for name, value in wanted.items())


def _plain(value: Any) -> str:
    return str(value).lower().replace("_", ".")
