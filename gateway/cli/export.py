"""hostler export"""

from __future__ import annotations

import click

from gateway.cli.options import print_json, with_client
from gateway.client import Client


@click.command("export")
@click.option("--format", "form", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
@click.option("--with-secrets", is_flag=True, help="Write secrets too, which only a gateway with keys gives away.")
@with_client
def command(client: Client, form: str, with_secrets: bool) -> None:
    """Write all that is served, by the settings file or by the API, as one settings file: for `serve -c` and `apply`.

    Secrets are written as ${NAME} unless --with-secrets says otherwise; what is left out is told.
    """
    answer = client.export(with_secrets=with_secrets)
    if form == "json":
        print_json(answer["settings"])
    else:
        import yaml

        click.echo(yaml.safe_dump(answer["settings"], sort_keys=False), nl=False)
    for note in answer["notes"]:
        click.echo(note, err=True)
