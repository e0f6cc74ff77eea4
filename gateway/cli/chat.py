"""hostler chat"""

from __future__ import annotations

import sys
from typing import Any

import click

from gateway.cli.options import with_client
from gateway.client import Client, ClientError


@click.command("chat")
@click.argument("uid")
@click.option("--system", metavar="TEXT", help="What the model is told first.")
@click.option("--max-tokens", type=click.IntRange(1), help="The longest answer.")
@click.option("--temperature", type=click.FloatRange(0), help="0: always the likeliest word.")
@with_client
def command(client: Client, uid: str, system: str | None, max_tokens: int | None, temperature: float | None) -> None:
    """Talk with a model. Ctrl-C ends the answer; Ctrl-D, or Ctrl-C at the prompt, ends the program."""
    given = {"max_tokens": max_tokens, "temperature": temperature}
    options = {name: value for name, value in given.items() if value is not None}
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    has_failed = False
    while (prompt := _ask()) is not None:
        if not prompt.strip():
            continue
        messages.append({"role": "user", "content": prompt})
        answer = _stream(client, {"model": uid, "messages": messages, "stream": True} | options)
        has_failed = answer is None
        if answer is None:
            messages.pop()  # it was never answered
        else:
            messages.append({"role": "assistant", "content": answer})
    sys.exit(has_failed)  # so that a pipe learns of it


def _ask() -> str | None:
    try:
        return input(">>> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        click.echo()
        return None


def _stream(client: Client, body: dict[str, Any]) -> str | None:
    """Print the answer as it comes. What came of it, even if it was cut short; None if it failed."""
    parts: list[str] = []
    try:
        for event in client.events("/v1/chat/completions", body):
            if isinstance(event, str):  # a comment: the model is loading
                click.echo(click.style(event, dim=True), err=True)
                continue
            for choice in event.get("choices", ()):
                text = choice.get("delta", {}).get("content") or ""
                parts.append(text)
                click.echo(text, nl=False)
    except KeyboardInterrupt:
        click.echo(click.style(" [stopped]", dim=True), nl=False)
    except ClientError as exc:
        click.echo(f"{exc}", err=True)
        return None
    click.echo()
    return "".join(parts)
