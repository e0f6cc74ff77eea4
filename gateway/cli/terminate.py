"""hostler terminate"""

from __future__ import annotations

import click

from gateway.cli.options import model_uid_option, uid_of, with_client
from gateway.client import Client


@click.command("terminate")
@click.argument("uid", required=False)
@model_uid_option
@with_client
def command(client: Client, uid: str | None, model_uid: str | None) -> None:
    """Stop a launched model, after the requests in flight, and forget it."""
    model = uid_of(uid, model_uid)
    client.terminate(model)
    click.echo(f"{model} is terminated.")
