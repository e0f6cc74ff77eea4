"""What the verbs that talk to a gateway have in common."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gateway.calls import ENDPOINT_VARIABLE, KEY_VARIABLE, endpoint_of
from gateway.client import Client

WIDTH_OF_A_PIPE = 240


def with_client(verb: Callable[..., None]) -> Callable[..., None]:
    """Gives the verb a client as its first argument, and the options that say where the gateway is."""

    @click.option("-e", "--endpoint", metavar="URL", help=f"The gateway's address; else ${ENDPOINT_VARIABLE}.")
    @click.option("-ak", "--api-key", metavar="KEY", help=f"Its key; better in ${KEY_VARIABLE}, or see `login`.")
    @functools.wraps(verb)
    def wrapped(endpoint: str | None, api_key: str | None, **given: Any) -> None:
        address = endpoint_of(endpoint)
        verb(Client(address, api_key or os.environ.get(KEY_VARIABLE) or saved_token(address)), **given)

    return wrapped


def token_file(endpoint: str) -> Path:
    """Where `hostler login` keeps a gateway's token."""
    home = Path(os.environ.get("HOSTLER_HOME") or "~/.hostler").expanduser()
    return home / "auth" / hashlib.sha256(endpoint.encode()).hexdigest()


def saved_token(endpoint: str) -> str | None:
    """The token of `hostler login`, if there is one."""
    try:
        return token_file(endpoint).read_text().strip() or None
    except OSError:
        return None


def uid_of(positional: str | None, option: str | None) -> str:
    """The uid, which may be given either way."""
    if positional and option and positional != option:
        raise click.UsageError(f"Two uids are given: {positional!r} and {option!r}.")
    if not (uid := positional or option):
        raise click.UsageError("Missing the model's UID; `hostler list` shows them.")
    return uid


model_uid_option = click.option("--model-uid", "model_uid", metavar="UID", help="The model; may stand alone too.")
model_type_option = click.option(
    "-t", "--model-type", default="LLM", show_default=True, help="LLM, embedding, rerank, image, audio, ..."
)

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(data: Any) -> None:
    """For programs that read us."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def tell(sentence: str, data: Any, as_json: bool) -> None:
    """What was done: the sentence for people, or the data for programs."""
    if as_json:
        print_json(data)
    else:
        click.echo(sentence)


def check_answered(as_json: bool, check: bool) -> None:
    """Programs cannot be asked, so they have to say yes beforehand."""
    if as_json and not check:
        raise click.UsageError("With --json nobody is asked: say --check too, which means yes.")


def print_table(columns: dict[str, str], rows: list[list[str]]) -> None:
    """A table as wide as it needs to be; `columns` maps each title to left or right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title, justify in columns.items():
        table.add_column(title, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else WIDTH_OF_A_PIPE
    Console(markup=False, highlight=False, width=width).print(table)


def text(value: Any) -> str:
    """A cell of a table."""
    if isinstance(value, list | tuple):
        return " ".join(text(item) for item in value)
    return "-" if value is None or value == "" else str(value)


def seconds(time_s: float | None) -> str:
    """A duration for people."""
    if time_s is None:
        return "-"
    if time_s < 60:
        return f"{time_s:.0f} s"
    return f"{time_s / 60:.0f} min" if time_s < 7200 else f"{time_s / 3600:.0f} h"
