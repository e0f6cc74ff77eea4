"""hostler login"""

from __future__ import annotations

import os

import click

from gateway.calls import endpoint_of
from gateway.cli.options import as_json_option, tell, token_file
from gateway.client import ENDPOINT_VARIABLE, Client


@click.command("login")
@click.option("-e", "--endpoint", metavar="URL", help=f"The gateway's address; else ${ENDPOINT_VARIABLE}.")
@click.option("--username", help="Asked for if not given.")
@click.option("--password", help="Asked for if not given, which keeps it out of the shell's history.")
@as_json_option
def command(endpoint: str | None, username: str | None, password: str | None, as_json: bool) -> None:
    """Keep a token for a gateway that needs one; later verbs send it."""
    address = endpoint_of(endpoint)
    client = Client(address)
    if not client.needs_key():
        tell(f"{address} needs no login.", {"endpoint": address, "token_file": None}, as_json)
        return
    username = username or click.prompt("Username", err=True)
    password = password or click.prompt("Password", hide_input=True, err=True)
    token = client.login(username, password)
    file = token_file(address)
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as kept:
            os.fchmod(kept.fileno(), 0o600)  # it may have been there
            kept.write(token)
    except OSError as exc:
        raise click.ClickException(f"The token cannot be kept in {file}: {exc.strerror}") from exc
    tell(f"Logged in at {address}; the token is in {file}.", {"endpoint": address, "token_file": str(file)}, as_json)
