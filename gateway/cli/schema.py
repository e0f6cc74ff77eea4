"""hostler schema"""

from __future__ import annotations

import click

from gateway.cli.options import print_json


@click.command("schema")
@click.argument("model_type", metavar="TYPE", default="LLM")
def command(model_type: str) -> None:
    """Print the JSON Schema of a type's registrations, for editors."""
    from registry.decode import did_you_mean, schema
    from registry.registry import CATALOGUE

    kinds = {name: kind for name, (_, kind) in CATALOGUE.items()}
    name = next((name for name in kinds if name.lower() == model_type.lower()), None)
    if name is None:
        raise click.UsageError(f"There is no model type {model_type!r}. {did_you_mean(model_type, kinds)}")
    print_json(schema(kinds[name]))
