"""hostler generate"""

from __future__ import annotations

import json
import sys

import click

from gateway.cli.chat import ask, print_answer
from gateway.cli.options import as_json_option, model_uid_option, uid_of, with_client
from gateway.client import Client


@click.command("generate")
@click.argument("uid", required=False)
@model_uid_option
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="The longest answer.")
@click.option("--stream", type=bool, default=True, show_default=True, help="Print the answer as it comes.")
@as_json_option
@with_client
def command(
    client: Client, uid: str | None, model_uid: str | None, max_tokens: int, stream: bool, as_json: bool
) -> None:
    """Have a model complete prompts, one a line. An empty line or Ctrl-D ends the program."""
    model = uid_of(uid, model_uid)
    has_failed = False
    while prompt := ask():
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens}
        if as_json:
            click.echo(json.dumps(client.post("/v1/completions", body, None), ensure_ascii=False))
            continue
        has_failed = print_answer(client, "/v1/completions", body, stream) is None
    sys.exit(has_failed)  # so that a pipe learns of it
