"""hostler cache"""

from __future__ import annotations

import click

from gateway.amounts import megabytes
from gateway.cli.cached import command as list_command
from gateway.cli.cached import show
from gateway.cli.options import as_json_option, check_answered, print_json, tell, with_client
from gateway.cli.remove_cache import remove
from gateway.client import Client, ClientError


@click.group("cache")
def command() -> None:
    """List, remove or prune downloaded models."""


command.add_command(list_command, "list")


@command.command("remove")
@click.argument("version")
@click.option("--check", "-y", is_flag=True, help="Do not ask.")
@as_json_option
@with_client
def remove_one(client: Client, version: str, check: bool, as_json: bool) -> None:
    """Delete the files of one, by its version as the list shows it."""
    remove(client, version, None, should_ask=not check, as_json=as_json)


@command.command("prune")
@click.option("--check", "-y", is_flag=True, help="Do not ask.")
@as_json_option
@with_client
def prune(client: Client, check: bool, as_json: bool) -> None:
    """Delete the files of all that no model of `hostler list` is made of, and what broken downloads have left."""
    check_answered(as_json, check)
    left = client.remove_leftovers()
    if left and not as_json:
        click.echo(f"{megabytes(left)} of broken downloads are free.")
    in_use = {model.get("model_name") for model in client.list_models()}
    cached = client.cached_models()
    shared = {one["path"] for one in cached if one["model_name"] in in_use}  # several versions may have one file
    idle = [one for one in cached if one["path"] not in shared]
    size_bytes = sum({one["path"]: one.get("size_bytes") or 0 for one in idle}.values())
    total = megabytes(size_bytes)
    report = {"freed_bytes": left + size_bytes, "removed": [], "kept": {}}
    if not idle:
        tell("Every downloaded model is in use.", report, as_json)
        return
    if not as_json:
        show(idle, as_json=False)
    if not check and not click.confirm(f"Delete these, {total}?", default=False):
        click.echo("Nothing was deleted.")
        return
    versions = [*dict.fromkeys(one["model_version"] for one in idle)]
    kept = {version: reason for version in versions if (reason := _why_kept(client, version))}
    for version, reason in kept.items():
        click.echo(f"{version} stays: {reason}", err=True)
    if as_json:
        print_json(report | {"removed": [version for version in versions if version not in kept], "kept": kept})
    if kept:
        raise click.ClickException(f"{len(kept)} could not be deleted.")
    if not as_json:
        click.echo(f"{total} are free.")


def _why_kept(client: Client, version: str) -> str | None:
    """Delete a version; why it stays, or None."""
    try:
        return None if client.remove_cached(version) else "it could not be deleted"
    except ClientError as exc:
        return exc.message
