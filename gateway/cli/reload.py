"""hostler reload"""

from __future__ import annotations

import time

import click

from gateway.calls import DRAIN_TIMEOUT_S, PROGRESS_PAUSE_S
from gateway.cli.launch import LaunchCommand
from gateway.cli.options import as_json_option, tell, with_client
from gateway.client import Client


@click.command("reload", cls=LaunchCommand, options_metavar="--model-uid UID [--KEY VALUE]...")
@click.option("-u", "--model-uid", required=True, metavar="UID", help="The model.")
@click.option(
    "--drain-timeout",
    type=click.FloatRange(0),
    default=DRAIN_TIMEOUT_S,
    show_default=True,
    help="Seconds that the requests in flight on a copy may take.",
)
@as_json_option
@with_client
def command(client: Client, model_uid: str, drain_timeout: float, as_json: bool) -> None:
    """Change options of a model that is served, and wait until its copies have started anew, one after the other.

    Pairs of --KEY VALUE are options of the engine; `none` takes one away. If a copy does not start with them, all is
    as it was.
    """
    changes = click.get_current_context().meta["extras"]
    status = client.reload(model_uid, drain_timeout_s=drain_timeout, **changes)
    while status["status"] == "reloading":
        time.sleep(PROGRESS_PAUSE_S)
        status = client.reload_status(model_uid)
    if status["error"]:
        raise click.ClickException(status["error"])
    tell(f"{model_uid} is reloaded.", status, as_json)
