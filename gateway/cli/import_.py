"""hostler import"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from gateway.cli.options import as_json_option, print_json, print_table, with_client
from gateway.cli.register import read
from gateway.client import Client, ClientError

# The folders of registrations, and the model type of each.
FOLDERS = {
    "llm": "LLM",
    "embedding": "embedding",
    "rerank": "rerank",
    "image": "image",
    "audio": "audio",
    "video": "video",
    "flexible": "flexible",
}


@click.group("import")
def command() -> None:
    """Take over the registrations of another server."""


@command.command("xinference")
@click.argument("folder", required=False, metavar="[DIR]", type=click.Path(path_type=Path))
@as_json_option
@with_client
def xinference(client: Client, folder: Path | None, as_json: bool) -> None:
    """Register the models that Xinference keeps in DIR: its home, else $XINFERENCE_HOME or ~/.xinference.

    Reads DIR/model/v2/TYPE/*.json and changes nothing there.
    """
    home = folder or Path(os.environ.get("XINFERENCE_HOME") or "~/.xinference").expanduser()
    files = list(_files(home))
    if not files:
        raise click.ClickException(f"There is no registration in {home}: no file {home}/model/v2/TYPE/NAME.json.")
    report = [_take_over(client, model_type, file) for model_type, file in files]
    n_lost = sum(not one["is_registered"] for one in report)
    if as_json:
        print_json(report)
    else:
        print_table(
            dict.fromkeys(("TYPE", "FILE", "TAKEN OVER", "REMARK"), "left"),
            [
                [str(one["model_type"]), file.name, "yes" if one["is_registered"] else "no", str(one["remark"])]
                for one, (_, file) in zip(report, files, strict=True)
            ],
        )
        click.echo(f"{len(report) - n_lost} taken over, {n_lost} not.")
    sys.exit(n_lost > 0)


def _files(home: Path) -> Iterator[tuple[str, Path]]:
    """Every registration with its type; `home` may also be the folder of the types itself."""
    below = home / "model" / "v2"
    for folder in sorted((below if below.is_dir() else home).glob("*")):
        if model_type := FOLDERS.get(folder.name.lower()):
            yield from ((model_type, file) for file in sorted(folder.glob("*.json")))


def _take_over(client: Client, model_type: str, file: Path) -> dict[str, object]:
    report: dict[str, object] = {"model_type": model_type, "file": str(file)}
    try:
        remark = client.register(read(file), model_type, persist=True)
    except ClientError as exc:
        if exc.status is None:  # there is nobody to ask for the others either
            raise
        return report | {"is_registered": False, "remark": exc.message}
    except click.ClickException as exc:
        return report | {"is_registered": False, "remark": exc.message}
    return report | {"is_registered": True, "remark": remark}
