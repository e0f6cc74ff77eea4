"""hostler ps"""

from __future__ import annotations

import textwrap
import time
from typing import Any

import click

from gateway.amounts import megabytes
from gateway.cli.options import as_json_option, print_json, print_table, seconds, with_client
from gateway.client import Client

REASON_SHOWN = 120  # the whole is in --json and in the log


@click.command("ps")
@as_json_option
@with_client
def command(client: Client, as_json: bool) -> None:
    """Show every replica: state, process, memory, requests, idle time, last failure."""
    replicas = client.replicas()
    if as_json:
        print_json(replicas)
        return
    right = ("PID", "MEMORY", "IN FLIGHT", "WAITING", "IDLE")
    print_table(
        {"UID": "left", "STATE": "left", "FOR": "right"} | dict.fromkeys(right, "right") | {"LAST FAILURE": "left"},
        [
            [
                replica["uid"] + (f"/{replica['replica']}" if replica["replica"] else ""),
                replica["progress"] or replica["state"] + (f" ({replica['tier']})" if replica.get("tier") else ""),
                seconds(replica["state_s"]),
                str(replica["pid"] or "-"),
                megabytes(replica["memory_bytes"]),
                str(replica["in_flight"]),
                str(replica["waiting"]),
                seconds(replica["idle_s"]),
                _failure(replica["failure"], replica["degraded"]),
            ]
            for replica in replicas
        ],
    )


def _failure(failure: dict[str, Any] | None, degraded: str | None) -> str:
    if failure is None:
        return "-"
    reason = textwrap.shorten(failure["reason"], REASON_SHOWN, placeholder=" ...")
    ago = f"{failure['cause']}: {reason}, {seconds(time.time() - failure['at'])} ago"
    return f"{ago}; now with {degraded}" if degraded else ago
