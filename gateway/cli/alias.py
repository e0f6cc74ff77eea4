"""hostler alias"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from gateway.cli.options import as_json_option, tell

MARK = "# Written by `hostler alias xinference`"
PROGRAMS = ("xinference", "xinference-local")

# Options of a local server, and ours; those that map to nothing are passed over, with their value.
SERVER_OPTIONS = {
    "-H": "--host",
    "--host": "--host",
    "-p": "--port",
    "--port": "--port",
    "--log-level": "--log-level",
    "--metrics-exporter-host": None,
    "-MH": None,
    "--metrics-exporter-port": None,
    "-mp": None,
    "--auth-config": None,
}


@click.group("alias")
def command() -> None:
    """Write a program that knows these verbs by another name."""


@command.command("xinference")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where to; else beside `hostler`.")
@as_json_option
def xinference(folder: Path | None, as_json: bool) -> None:
    """Write the programs `xinference` and `xinference-local`, so that scripts written for them run.

    A file of that name that somebody else wrote is left alone.
    """
    where = folder or Path(sys.executable).parent
    files = [where / name for name in PROGRAMS]
    for file in files:
        if is_foreign(file):
            raise click.ClickException(f"{file} is there and is not ours: it is left alone. Choose another --dir.")
    try:
        where.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.write_text(script(file.name))
            file.chmod(0o755)
    except OSError as exc:
        raise click.ClickException(f"{where} cannot be written to: {exc.strerror}") from exc
    names = [str(file) for file in files]
    tell("\n".join(names), {"files": names}, as_json)


def is_foreign(file: Path) -> bool:
    """Whether somebody else wrote it."""
    if file.is_symlink():
        return True
    try:
        return MARK.encode() not in file.read_bytes()[:1000]
    except FileNotFoundError:
        return False
    except OSError:
        return True


def script(name: str) -> str:
    """The program of that name."""
    call = shlex.join([sys.executable, "-P", "-m", "gateway.cli.alias", name])
    return f'#!/bin/sh\n{MARK}: {name}, served by Hostler.\nexec {call} "$@"\n'


def translate(program: str, arguments: list[str]) -> list[str]:
    """The words of `hostler` for those of another program."""
    if program == "xinference" and arguments[:1] in (["--help"], ["-h"], ["--version"], ["-v"]):
        return ["--version"] if arguments[0] in ("--version", "-v") else ["--help"]
    is_verb = program == "xinference" and arguments and not arguments[0].startswith("-")
    return arguments if is_verb else ["serve", *_server_options(arguments)]


def _server_options(arguments: list[str]) -> list[str]:
    found: list[str] = []
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name not in SERVER_OPTIONS:
            found.append(name + equals + value)
            continue
        if not equals and rest:
            value = rest.pop(0)
        ours = SERVER_OPTIONS[name]
        if ours is None:
            click.echo(f"{name} means nothing here and is passed over.", err=True)
            continue
        found += [ours, value.lower() if ours == "--log-level" else value]
    return found


def main() -> None:
    """What the written programs run: `python -m gateway.cli.alias PROGRAM ARGUMENTS...`"""
    from gateway.cli import main as hostler

    program, *arguments = sys.argv[1:]
    sys.argv = ["hostler", *translate(program, arguments)]
    hostler()


if __name__ == "__main__":
    main()
