"""The command line. Each verb is a module of its own and is imported only when it is used."""

from __future__ import annotations

import importlib
import sys

import click

VERBS = {
    "serve": "Serve models until Ctrl-C.",
    "list": "List the models that can be asked for.",
    "ps": "Show what runs: state, process, memory, requests, failures.",
    "start": "Load a model now.",
    "stop": "Unload a model; its next request loads it again.",
    "logs": "Show what a model's engine wrote.",
    "chat": "Talk with a model.",
    "config": "Check a settings file, or print its JSON Schema.",
    "doctor": "Say what this machine can run, and why not the rest.",
}


class Verbs(click.Group):
    """A group that knows its verbs by name and loads them late."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's module has a command of the same name."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"gateway.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table, without loading any verb."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """A verb that is not there gets the nearest that is."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            from registry.decode import did_you_mean

            ctx.fail(f"There is no verb {args[0]!r}. {did_you_mean(args[0], VERBS, what='Verbs')}")
        return super().resolve_command(ctx, args)


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hostler")
def hostler() -> None:
    """One OpenAI-compatible door in front of every model that this machine can run."""


def main() -> None:
    """The program `hostler`."""
    from gateway.client import ClientError

    try:
        hostler()
    except ClientError as exc:
        click.echo(f"hostler: {exc}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
