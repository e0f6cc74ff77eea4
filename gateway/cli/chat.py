"""hostler chat"""

from __future__ import annotations

import sys
from typing import Any

import click

from gateway.cli.options import model_uid_option, uid_of, with_client
from gateway.client import Client, ClientError


@click.command("chat")
@click.argument("uid", required=False)
@model_uid_option
@click.option("--system", metavar="TEXT", help="What the model is told first.")
@click.option("--max-tokens", type=click.IntRange(1), help="The longest answer.")
@click.option("--stream", type=bool, default=True, show_default=True, help="Print the answer as it comes.")
@click.option("--temperature", type=click.FloatRange(0), help="0: always the likeliest word.")
@with_client
def command(
    client: Client,
    uid: str | None,
    model_uid: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    stream: bool,
) -> None:
    """Talk with a model. Ctrl-C ends the answer; Ctrl-D, or Ctrl-C at the prompt, ends the program."""
    model = uid_of(uid, model_uid)
    given = {"max_tokens": max_tokens, "temperature": temperature}
    options = {name: value for name, value in given.items() if value is not None}
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    has_failed = False
    while (prompt := ask()) is not None:
        if not prompt.strip():
            continue
        messages.append({"role": "user", "content": prompt})
        answer = print_answer(client, "/v1/chat/completions", {"model": model, "messages": messages} | options, stream)
        has_failed = answer is None
        if answer is None:
            messages.pop()  # it was never answered
        else:
            messages.append({"role": "assistant", "content": answer})
    sys.exit(has_failed)  # so that a pipe learns of it


def ask() -> str | None:
    """A line that the user types; None at the end."""
    try:
        return input(">>> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        click.echo()
        return None


def print_answer(client: Client, path: str, body: dict[str, Any], is_streamed: bool = True) -> str | None:
    """Print the answer, as it comes or whole. What came of it, even if it was cut short; None if it failed."""
    parts: list[str] = []
    try:
        for answer in client.events(path, body | {"stream": True}) if is_streamed else [client.post(path, body, None)]:
            if isinstance(answer, str):  # a comment: the model is loading
                click.echo(click.style(answer, dim=True), err=True)
                continue
            for choice in answer.get("choices", ()):
                said = choice.get("delta") or choice.get("message") or {}
                text = choice.get("text") or said.get("content") or ""
                parts.append(text)
                click.echo(text, nl=False)
    except KeyboardInterrupt:
        click.echo(click.style(" [stopped]", dim=True), nl=False)
    except ClientError as exc:
        if parts:
            click.echo()
        click.echo(f"{exc}", err=True)
        return None
    click.echo()
    return "".join(parts)
