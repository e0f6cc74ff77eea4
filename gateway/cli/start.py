"""hostler start"""

from __future__ import annotations

import click

from gateway.cli.options import with_client
from gateway.client import Client


@click.command("start")
@click.argument("uid")
@with_client
def command(client: Client, uid: str) -> None:
    """Load a model now; one that has failed is tried again. `hostler ps` shows how far it is."""
    model = client.start(uid)
    click.echo(f"{uid} is {model['status']}.")
