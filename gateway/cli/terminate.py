"""hostler terminate"""

from __future__ import annotations

import click

from gateway.cli.options import as_json_option, model_uid_option, tell, uid_of, with_client
from gateway.client import Client


@click.command("terminate")
@click.argument("uid", required=False)
@model_uid_option
@as_json_option
@with_client
def command(client: Client, uid: str | None, model_uid: str | None, as_json: bool) -> None:
    """Stop a launched model, after the requests in flight, and forget it."""
    model = uid_of(uid, model_uid)
    client.terminate(model)
    tell(f"{model} is terminated.", {"model_uid": model}, as_json)
