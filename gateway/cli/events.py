"""hostler events"""

from __future__ import annotations

import json
import time

import click

from gateway.calls import Json
from gateway.cli.options import as_json_option, seconds, with_client
from gateway.client import Client


@click.command("events")
@click.argument("uid", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@as_json_option
@with_client
def command(client: Client, uid: str | None, follow: bool, as_json: bool) -> None:
    """Show what has happened to models, or to the one of that UID; with --follow what happens now."""
    for event in client.watch(uid, follow=follow):
        click.echo(json.dumps(event, ensure_ascii=False) if as_json else line_of(event))


def line_of(event: Json) -> str:
    """An event for people."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.get("time", time.time())))
    match event["type"]:
        case "state":
            before = f"{event['from']} -> " if event.get("from") else ""
            text = f"replica {event['replica']}: {before}{event['to']}"
        case "queue":
            oldest = f", the first for {seconds(event['oldest_wait_s'])}" if event.get("oldest_wait_s") else ""
            text = f"{event['in_flight']} answered now, {event['waiting']} waiting{oldest}"
        case "info" | "progress":
            text = event["text"]
        case other:
            text = f"{other}: {event['text']}"
    return f"{clock}  {event.get('model_uid') or '-'}  {text}"
