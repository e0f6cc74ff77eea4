"""hostler cached"""

from __future__ import annotations

from typing import Any

import click

from gateway.amounts import megabytes
from gateway.cli.options import as_json_option, print_json, print_table, text, with_client
from gateway.client import Client

# title -> key
COLUMNS = {
    "MODEL": "model_name",
    "FORMAT": "model_format",
    "SIZE": "model_size_in_billions",
    "QUANTIZATION": "quantization",
    "VERSION": "model_version",
    "PATH": "path",
    "MACHINE": "actor_ip_address",
}


@click.command("cached")
@click.option("-n", "--model-name", help="Only this one.")
@click.option("--worker-ip", help="Only on this machine.")
@as_json_option
@with_client
def command(client: Client, model_name: str | None, worker_ip: str | None, as_json: bool) -> None:
    """List the downloaded models."""
    show(client.cached_models(model_name, worker_ip), as_json)


def show(found: list[dict[str, Any]], as_json: bool) -> None:
    """As a table or as JSON."""
    if as_json:
        print_json(found)
        return
    print_table(
        dict.fromkeys(COLUMNS, "left") | {"ON DISK": "right"},
        [[*(text(one.get(key)) for key in COLUMNS.values()), megabytes(one.get("size_bytes"))] for one in found],
    )
