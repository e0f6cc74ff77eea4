"""hostler remove-cache"""

from __future__ import annotations

import click

from gateway.cli.options import as_json_option, check_answered, tell, with_client
from gateway.client import Client


@click.command("remove-cache")
@click.option("-n", "--model-version", required=True, help="As `hostler cached` shows it.")
@click.option("--worker-ip", help="Only on this machine.")
@click.option("--check", "-y", is_flag=True, help="Do not ask.")
@as_json_option
@with_client
def command(client: Client, model_version: str, worker_ip: str | None, check: bool, as_json: bool) -> None:
    """Delete the files of a downloaded model."""
    remove(client, model_version, worker_ip, should_ask=not check, as_json=as_json)


def remove(client: Client, model_version: str, worker_ip: str | None, *, should_ask: bool, as_json: bool) -> None:
    """Show what goes, ask, and delete."""
    check_answered(as_json, not should_ask)
    paths = client.cached_files(model_version, worker_ip)
    if not paths:
        raise click.ClickException(f"There is no file of {model_version} here; `hostler cached` shows what there is.")
    if not as_json:
        click.echo("\n".join(paths))
    if should_ask and not click.confirm("Delete these files?", default=False):
        click.echo("Nothing was deleted.")
        return
    if not client.remove_cached(model_version, worker_ip):
        raise click.ClickException(f"{model_version} could not be deleted.")
    tell(f"{model_version} is deleted.", {"model_version": model_version, "paths": paths}, as_json)
