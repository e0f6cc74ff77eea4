"""hostler unregister"""

from __future__ import annotations

import click

from gateway.cli.options import as_json_option, model_type_option, tell, with_client
from gateway.client import Client


@click.command("unregister")
@click.argument("name", required=False)
@model_type_option
@click.option("-n", "--model-name", help="Its name; may stand alone too.")
@as_json_option
@with_client
def command(client: Client, name: str | None, model_type: str, model_name: str | None, as_json: bool) -> None:
    """Forget a model of your own. What runs of it stays up, and its files stay."""
    if bool(name) == bool(model_name):
        raise click.UsageError("Give one name; `hostler registrations --custom` shows them.")
    which = name or model_name or ""
    client.unregister(which, model_type)
    tell(f"{which} is not registered any more.", {"model_type": model_type, "model_name": which}, as_json)
