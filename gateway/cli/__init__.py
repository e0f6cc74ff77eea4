"""The command line. Each verb is a module of its own and is imported only when it is used."""

from __future__ import annotations

import importlib
import keyword
import sys

import click

VERBS = {
    "serve": "Serve models until Ctrl-C.",
    "restart": "Restart the gateway: its engines run on, and no request is lost.",
    "launch": "Serve a model from now on.",
    "terminate": "Stop a launched model and forget it.",
    "scale": "Have more or fewer copies of a launched model.",
    "reload": "Change options of a model that is served.",
    "apply": "Serve what a settings file says; touch only what is other than before.",
    "export": "Write all that is served as one settings file.",
    "list": "List the models that can be asked for.",
    "ps": "Show what runs: state, process, memory, requests, failures.",
    "start": "Load a model now.",
    "stop": "Unload a model; its next request loads it again.",
    "sleep": "Have a model sleep: it keeps little memory, and is back soon.",
    "wake": "Have a model be ready again that sleeps.",
    "logs": "Show what a model's engine wrote.",
    "events": "Show what happens to models, as it happens.",
    "chat": "Talk with a model.",
    "generate": "Have a model complete prompts.",
    "embedding": "Turn texts into vectors.",
    "rerank": "Order texts by how well they answer a query.",
    "check": "Say whether a launch would work, and what it would take.",
    "plan": "Say what models of a settings file would run where.",
    "register": "Add a model of your own.",
    "validate": "Say what is wrong with a model's JSON, and what could run it.",
    "unregister": "Forget a model of your own.",
    "registrations": "List the models that can be launched, built-in and your own.",
    "schema": "Print the JSON Schema of a model type's registrations.",
    "import": "Take over the registrations of another server.",
    "engine": "Show which engines run a model, and in which formats.",
    "engines": "Install, list, upgrade or remove the Python environments of engines.",
    "vllm-models": "List the models that vLLM runs.",
    "cal-model-mem": "Estimate the GPU memory that a model needs.",
    "cached": "List the downloaded models.",
    "remove-cache": "Delete a downloaded model.",
    "cache": "List, remove or prune downloaded models.",
    "login": "Keep a token for a gateway that needs one.",
    "alias": "Write a program that knows these verbs by another name.",
    "config": "Check a settings file, or print its JSON Schema.",
    "doctor": "Say what this machine can run, and why not the rest.",
}


def module_of(verb: str) -> str:
    """The module that has the verb's command; no word of Python can name one."""
    name = verb.replace("-", "_")
    return f"gateway.cli.{name}_" if keyword.iskeyword(name) else f"gateway.cli.{name}"


class Verbs(click.Group):
    """A group that knows its verbs by name and loads them late."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return [*VERBS]  # `list` is a verb here

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command in the verb's module."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(module_of(cmd_name))
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table, without loading any verb."""
        with formatter.section("Verbs"):
            formatter.write_dl([*VERBS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """A verb that is not there gets the nearest that is."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            from registry.decode import did_you_mean, nearest

            known = did_you_mean(args[0], VERBS) if nearest(args[0], VERBS) else "`hostler --help` shows them all."
            ctx.fail(f"There is no verb {args[0]!r}. {known}")
        return super().resolve_command(ctx, args)


def spelt_with_dashes(name: str) -> str:
    """An option's name, which may be written with underscores too."""
    return name.replace("_", "-")


SPELLING = {"help_option_names": ["-h", "--help"], "token_normalize_func": spelt_with_dashes}


@click.command(cls=Verbs, context_settings=SPELLING)
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
