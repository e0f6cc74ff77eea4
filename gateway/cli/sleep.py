"""hostler sleep"""

from __future__ import annotations

import click

from gateway.cli.options import as_json_option, tell, with_client
from gateway.client import Client


@click.command("sleep")
@click.argument("uid")
@as_json_option
@with_client
def command(client: Client, uid: str, as_json: bool) -> None:
    """Have a model sleep, if its engine can and it answers nobody. Its next request wakes it, sooner than a load."""
    model = client.sleep(uid)
    tell(f"{uid} is {model['status']} (tier {model['tier']}).", model, as_json)
