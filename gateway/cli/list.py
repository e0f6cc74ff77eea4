"""hostler list"""

from __future__ import annotations

import click

from gateway.cli.options import as_json_option, print_json, print_table, text, with_client
from gateway.client import Client


@click.command("list")
@as_json_option
@with_client
def command(client: Client, as_json: bool) -> None:
    """List the models that can be asked for, loaded or not."""
    models = client.list_models()
    if as_json:
        print_json(models)
        return
    columns = dict.fromkeys(("UID", "STATE", "TYPE", "MODEL", "ENGINE", "FORMAT", "FROM", "ABILITIES"), "left")
    print_table(
        columns | {"CONTEXT": "right"},
        [
            [
                model["id"],
                text(model.get("status"))
                + (f" ({why})" if (why := model.get("failure_cause") or model.get("tier")) else ""),
                text(model.get("model_type")),
                text(model.get("model_name")),
                text(model.get("model_engine")),
                f"{model.get('model_format') or '-'} {model.get('quantization') or ''}".strip(),
                text(model.get("origin")),
                text(model.get("model_ability")),
                text(model.get("context_length") or model.get("max_tokens")),
            ]
            for model in models
        ],
    )
