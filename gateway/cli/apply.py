"""hostler apply"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gateway.cli.options import as_json_option, print_json, print_table, text, with_client
from gateway.client import Client

UNTOUCHED = "untouched"
VALUE_WIDTH = 40


@click.command("apply")
@click.argument("file", type=click.Path(), required=False)
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@as_json_option
@with_client
def command(client: Client, file: str | None, dry_run: bool, as_json: bool) -> None:
    """Serve what a settings file says; only models that are other than before are touched.

    Without FILE, or with the file that the gateway was started with, its own settings are read again. Another file's
    models are kept as launches, beside those that are there; the ones that an earlier `apply` brought and that are not
    in this file end. Its ${...} are filled in here, from your environment and your files.
    """
    answer = client.apply(None if file is None else _data_of(file, client), dry_run=dry_run)
    if as_json:
        print_json(answer)
        return
    _show(answer)
    if dry_run:
        click.echo("Nothing was done, as --dry-run says.")


def _data_of(path: str, client: Client) -> dict[str, Any] | None:
    """What the file says; None if it is the gateway's own."""
    from gateway.config import digest_of, parse, resolve
    from gateway.errors import SettingsError

    file = Path(path)
    try:
        data = parse(file)
        if digest_of(file) == client.config()["sha256"]:
            return None
        filled: dict[str, Any] = resolve(data)
    except SettingsError as exc:
        raise click.ClickException(exc.message) from exc
    return filled


def _show(answer: dict[str, Any]) -> None:
    rows = [[step["uid"], step["step"], _fields(step["fields"])] for step in answer["models"]]
    rows += [[f"({step['name']})", f"takes effect {step['takes_effect']}", ""] for step in answer["settings"]]
    if rows:
        print_table(dict.fromkeys(("MODEL", "STEP", "WHAT"), "left"), rows)
    models, touched = len(answer["models"]), sum(step["step"] != UNTOUCHED for step in answer["models"])
    click.echo(f"{touched} of {models} models are touched, {len(answer['settings'])} settings of the site differ.")


def _fields(fields: list[dict[str, Any]]) -> str:
    return ", ".join(map(_field, fields))


def _field(field: dict[str, Any]) -> str:
    if "before" not in field:
        return str(field["name"])
    return f"{field['name']}: {_value(field['before'])} -> {_value(field['after'])}"


def _value(value: Any) -> str:
    said = text(value)
    return said if len(said) <= VALUE_WIDTH else f"{said[:VALUE_WIDTH]}..."
