"""hostler vllm-models"""

from __future__ import annotations

import click

from gateway.cli.options import as_json_option, print_json, print_table, with_client
from gateway.client import Client


@click.command("vllm-models")
@as_json_option
@with_client
def command(client: Client, as_json: bool) -> None:
    """List the models that vLLM runs, by what they can do."""
    found = client.vllm_models()
    if as_json:
        print_json(found)
        return
    print_table(
        {"ABILITY": "left", "NAME": "left"},
        [[ability, name] for ability, names in found.items() for name in names],
    )
