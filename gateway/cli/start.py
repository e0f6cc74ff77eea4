"""hostler start"""

from __future__ import annotations

import click

from gateway.cli.options import as_json_option, tell, with_client
from gateway.client import Client


@click.command("start")
@click.argument("uid")
@as_json_option
@with_client
def command(client: Client, uid: str, as_json: bool) -> None:
    """Load a model now; one that has failed is tried again. `hostler ps` shows how far it is."""
    model = client.start(uid)
    tell(f"{uid} is {model['status']}.", model, as_json)
