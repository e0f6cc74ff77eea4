"""hostler restart"""

from __future__ import annotations

import click

from gateway.cli.options import as_json_option, tell, with_client
from gateway.client import Client

LIMIT_S = 240.0  # a start takes as long as it takes


@click.command("restart")
@as_json_option
@with_client
def command(client: Client, as_json: bool) -> None:
    """Restart the gateway as it was started, with the settings that are there now.

    Engines run on, the port and the connections of clients stay open, and requests in flight are answered by the old
    gateway, which then ends. If the new one cannot come up, nothing changes.
    """
    pids = client.post("/v1/restart", limit_s=LIMIT_S)
    tell(f"The gateway is process {pids['pid']} now.", pids, as_json)
