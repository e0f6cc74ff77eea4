"""hostler list"""

from __future__ import annotations

import click

from gateway.cli.options import as_json_option, print_json, print_table, with_client
from gateway.client import Client


@click.command("list")
@as_json_option
@with_client
def command(client: Client, as_json: bool) -> None:
    """List the models that can be asked for, loaded or not."""
    models = client.get("/v1/models")["data"]
    if as_json:
        print_json(models)
        return
    columns = dict.fromkeys(("UID", "STATE", "MODEL", "ENGINE", "FORMAT", "ABILITIES"), "left")
    print_table(
        columns | {"CONTEXT": "right"},
        [
            [
                model["id"],
                model["status"],
                model["model_name"],
                model["model_engine"],
                f"{model['model_format']} {model['quantization']}",
                " ".join(model["model_ability"]),
                str(model["context_length"]),
            ]
            for model in models
        ],
    )
