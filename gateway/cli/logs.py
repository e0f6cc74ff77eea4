"""hostler logs"""

from __future__ import annotations

import click

from gateway.cli.options import with_client
from gateway.client import Client


@click.command("logs")
@click.argument("uid")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("-n", "--lines", default=100, show_default=True, type=click.IntRange(0), help="How many to begin with.")
@click.option("--replica", default=0, show_default=True, type=click.IntRange(0), help="Which copy.")
@with_client
def command(client: Client, uid: str, follow: bool, lines: int, replica: int) -> None:
    """Show what a model's engine wrote, over all its starts."""
    for line in client.logs(uid, lines=lines, replica=replica, follow=follow):
        click.echo(line)
