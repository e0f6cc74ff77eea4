"""hostler register"""

from __future__ import annotations

from pathlib import Path

import click

from gateway.cli.options import as_json_option, model_type_option, print_json, with_client
from gateway.client import Client


@click.command("register")
@click.argument("path", required=False, metavar="FILE", type=click.Path(path_type=Path))
@model_type_option
@click.option("-f", "--file", type=click.Path(path_type=Path), help="The model's JSON; may stand alone too.")
@click.option("-w", "--worker-ip", help="The machine that has the files.")
@click.option("-p", "--persist", is_flag=True, help="Keep it over restarts of the gateway.")
@as_json_option
@with_client
def command(
    client: Client,
    path: Path | None,
    model_type: str,
    file: Path | None,
    worker_ip: str | None,
    persist: bool,
    as_json: bool,
) -> None:
    """Add a model of your own, so that it can be launched by its name."""
    if (path is None) == (file is None):
        raise click.UsageError("Give one file with the model's JSON, such as `--file model.json`.")
    notes = client.register(read(file or path or Path()), model_type, persist=persist, worker_ip=worker_ip)
    if as_json:
        print_json({"notes": notes})
        return
    kept = "" if persist else " until the gateway ends; --persist keeps it"
    click.echo(f"It is registered{kept}.")
    if notes:
        click.echo(notes)


def read(file: Path) -> str:
    """The file's text, as it is: the gateway judges it."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise click.ClickException(f"{file} cannot be read: {exc}") from exc
