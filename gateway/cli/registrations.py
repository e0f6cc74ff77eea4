"""hostler registrations"""

from __future__ import annotations

import click

from gateway.cli.options import as_json_option, model_type_option, print_json, print_table, text, with_client
from gateway.client import Client

# model type -> what a table shows beside type, name and origin: title and key
COLUMNS: dict[str, dict[str, str]] = {
    "llm": {"LANGUAGE": "model_lang", "ABILITY": "model_ability"},
    "embedding": {"LANGUAGE": "language", "DIMENSIONS": "dimensions"},
    "rerank": {"LANGUAGE": "language"},
    "image": {"FAMILY": "model_family"},
    "audio": {"FAMILY": "model_family", "MULTILINGUAL": "multilingual"},
    "video": {"FAMILY": "model_family", "ABILITY": "model_ability"},
}


@click.command("registrations")
@model_type_option
@click.option("--custom", is_flag=True, help="Only your own.")
@as_json_option
@with_client
def command(client: Client, model_type: str, custom: bool, as_json: bool) -> None:
    """List the models of a type that can be launched, built-in and your own."""
    found = client.registrations(model_type, detailed=True)
    if custom:
        found = [one for one in found if not one.get("is_builtin")]
    if as_json:
        print_json(found)
        return
    columns = COLUMNS.get(model_type.lower(), {})
    print_table(
        dict.fromkeys(("TYPE", "NAME", *columns, "BUILT-IN"), "left"),
        [
            [model_type, one["model_name"], *(text(one.get(key)) for key in columns.values()), _origin(one)]
            for one in found
        ],
    )


def _origin(one: dict[str, object]) -> str:
    return "yes" if one.get("is_builtin") else "no"
