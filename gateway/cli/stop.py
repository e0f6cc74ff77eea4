"""hostler stop"""

from __future__ import annotations

import click

from gateway.cli.options import as_json_option, tell, with_client
from gateway.client import Client


@click.command("stop")
@click.argument("uid")
@click.option("--force", is_flag=True, help="Do not wait for requests in flight: they end with an error.")
@as_json_option
@with_client
def command(client: Client, uid: str, force: bool, as_json: bool) -> None:
    """Unload a model, after the requests in flight. Its next request loads it again."""
    model = client.stop(uid, force=force)
    tell(f"{uid} is {model['status']}.", model, as_json)
