"""hostler remove-cache"""

from __future__ import annotations

import click

from gateway.cli.options import with_client
from gateway.client import Client


@click.command("remove-cache")
@click.option("-n", "--model-version", required=True, help="As `hostler cached` shows it.")
@click.option("--worker-ip", help="Only on this machine.")
@click.option("--check", "-y", is_flag=True, help="Do not ask.")
@with_client
def command(client: Client, model_version: str, worker_ip: str | None, check: bool) -> None:
    """Delete the files of a downloaded model."""
    remove(client, model_version, worker_ip, should_ask=not check)


def remove(client: Client, model_version: str, worker_ip: str | None, *, should_ask: bool) -> None:
    """Show what goes, ask, and delete."""
    paths = client.cached_files(model_version, worker_ip)
    if not paths:
        raise click.ClickException(f"There is no file of {model_version} here; `hostler cached` shows what there is.")
    for path in paths:
        click.echo(path)
    if should_ask and not click.confirm("Delete these files?", default=False):
        click.echo("Nothing was deleted.")
        return
    if not client.remove_cached(model_version, worker_ip):
        raise click.ClickException(f"{model_version} could not be deleted.")
    click.echo(f"{model_version} is deleted.")
