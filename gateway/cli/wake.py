"""hostler wake"""

from __future__ import annotations

import click

from gateway.cli.options import as_json_option, tell, with_client
from gateway.client import Client


@click.command("wake")
@click.argument("uid")
@as_json_option
@with_client
def command(client: Client, uid: str, as_json: bool) -> None:
    """Have a model be ready that sleeps, or that is not loaded; returns once it is."""
    model = client.wake(uid)
    tell(f"{uid} is {model['status']}.", model, as_json)
