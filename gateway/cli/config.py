"""hostler config"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from gateway.cli.options import as_json_option, print_json

if TYPE_CHECKING:
    from engines.base import Launch


@click.group("config")
def command() -> None:
    """Check a settings file, or print its JSON Schema."""


@command.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of the settings, for editors."""
    from gateway.config import Settings
    from registry.decode import schema

    print_json(schema(Settings))


@command.command("check")
@click.argument("file", type=click.Path())
@as_json_option
def check(file: str, as_json: bool) -> None:
    """Say whether a settings file is right, and what each of its models would be run by. Starts nothing."""
    from gateway.config import load
    from gateway.errors import SettingsError
    from gateway.fleet import available_engines, open_registry, plan_declared

    try:
        settings = load(file, {})
        launches = plan_declared(settings, open_registry(settings), available_engines(settings))
    except SettingsError as exc:
        if as_json:
            print_json({"file": file, "error": str(exc)})
        click.echo(str(exc), err=True)
        sys.exit(1)
    if as_json:
        print_json({"file": file, "error": None, "models": {launch.uid: _facts(launch) for launch in launches}})
        return
    for launch in launches:
        artifact = launch.artifact
        what, files = f"{artifact.family.model_name} ({artifact.spec.model_format})", ""
        if artifact.has_files:
            files = f", from {artifact.source.model_hub}:{artifact.source.model_id}"
            for addition in artifact.additions:
                files += f", with {addition} from {addition.source.model_hub}:{addition.source.model_id}"
        click.echo(f"{launch.uid}: {what} by {launch.engine}{files}")
    click.echo(f"{file} is right: {len(launches)} model{'s' * (len(launches) != 1)}.")


def _facts(launch: Launch) -> dict[str, Any]:
    artifact = launch.artifact
    return {
        "model_name": artifact.family.model_name,
        "model_format": artifact.spec.model_format,
        "quantization": artifact.spec.quantization,
        "model_engine": launch.engine,
        "model_hub": artifact.source.model_hub,
        "model_id": artifact.source.model_id,
        "replica": launch.replica,
    }
