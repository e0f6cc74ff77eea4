"""hostler cache"""

from __future__ import annotations

import click

from gateway.cli.cached import command as list_command
from gateway.cli.cached import show
from gateway.cli.options import megabytes, with_client
from gateway.cli.remove_cache import remove
from gateway.client import Client, ClientError


@click.group("cache")
def command() -> None:
    """List, remove or prune downloaded models."""


command.add_command(list_command, "list")


@command.command("remove")
@click.argument("version")
@click.option("--check", "-y", is_flag=True, help="Do not ask.")
@with_client
def remove_one(client: Client, version: str, check: bool) -> None:
    """Delete the files of one, by its version as the list shows it."""
    remove(client, version, None, should_ask=not check)


@command.command("prune")
@click.option("--check", "-y", is_flag=True, help="Do not ask.")
@with_client
def prune(client: Client, check: bool) -> None:
    """Delete the files of all that no model of `hostler list` is made of, and what broken downloads have left."""
    left = client.remove_leftovers()
    if left:
        click.echo(f"{megabytes(left)} of broken downloads are free.")
    in_use = {model.get("model_name") for model in client.list_models()}
    idle = [one for one in client.cached_models() if one["model_name"] not in in_use]
    if not idle:
        click.echo("Every downloaded model is in use.")
        return
    show(idle, as_json=False)
    total = megabytes(sum(one.get("size_bytes") or 0 for one in idle))
    if not check and not click.confirm(f"Delete these, {total}?", default=False):
        click.echo("Nothing was deleted.")
        return
    n_kept = 0
    for version in dict.fromkeys(one["model_version"] for one in idle):
        try:
            if client.remove_cached(version):
                continue
            reason = "it could not be deleted"
        except ClientError as exc:
            reason = exc.message
        click.echo(f"{version} stays: {reason}", err=True)
        n_kept += 1
    if n_kept:
        raise click.ClickException(f"{n_kept} could not be deleted.")
    click.echo(f"{total} are free.")
