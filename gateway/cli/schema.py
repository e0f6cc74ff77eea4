"""hostler schema"""

from __future__ import annotations

import click

from gateway.cli.options import print_json


@click.command("schema")
@click.argument("model_type", metavar="TYPE", default="LLM")
def command(model_type: str) -> None:
    """Print the JSON Schema of a type's registrations, for editors."""
    from registry.decode import did_you_mean
    from registry.schema import FAMILIES, family_schema

    name = next((name for name in FAMILIES if name.lower() == model_type.lower()), None)
    if name is None:
        raise click.UsageError(f"There is no model type {model_type!r}. {did_you_mean(model_type, FAMILIES)}")
    print_json(family_schema(name))
