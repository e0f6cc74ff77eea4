"""What the verbs that talk to a gateway have in common."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import click

from gateway.client import ENDPOINT_VARIABLE, KEY_VARIABLE, Client

WIDTH_OF_A_PIPE = 240


def with_client(verb: Callable[..., None]) -> Callable[..., None]:
    """Gives the verb a client as its first argument, and the options that say where the gateway is."""

    @click.option("-e", "--endpoint", metavar="URL", help=f"The gateway's address; else ${ENDPOINT_VARIABLE}.")
    @click.option("--api-key", metavar="KEY", help=f"Its key; better in ${KEY_VARIABLE}.")
    @functools.wraps(verb)
    def wrapped(endpoint: str | None, api_key: str | None, **given: Any) -> None:
        verb(Client(endpoint, api_key), **given)

    return wrapped


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(data: Any) -> None:
    """For programs that read us."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


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


def megabytes(size: float | None) -> str:
    """Bytes for people."""
    return "-" if size is None else f"{size / 1e6:,.0f} MB"


def seconds(time_s: float | None) -> str:
    """A duration for people."""
    if time_s is None:
        return "-"
    if time_s < 60:
        return f"{time_s:.0f} s"
    return f"{time_s / 60:.0f} min" if time_s < 7200 else f"{time_s / 3600:.0f} h"
