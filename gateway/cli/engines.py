"""hostler engines"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from gateway.amounts import megabytes
from gateway.cli.options import as_json_option, check_answered, print_json, print_table, seconds, text

if TYPE_CHECKING:
    from engines.environments import Environment
    from gateway.config import Settings
    from gateway.environments import Listed

COLUMNS = {
    "NAME": "left",
    "VERSION": "left",
    "PYTHON": "left",
    "SIZE": "right",
    "USED": "right",
    "STATE": "left",
    "FOLDER": "left",
}


@click.group("engines")
def command() -> None:
    """Install, list, upgrade or remove the Python environments of engines, in the data folder of this machine.

    Each engine has the versions that this release was tried with. Others may be installed beside them.
    """


def with_settings(verb: Callable[..., None]) -> Callable[..., None]:
    """Gives the verb the settings as its first argument, and the option that says where they are."""
    import functools

    @click.option("-c", "--config", "file", type=click.Path(), help="A settings file, for its folders and builder.")
    @functools.wraps(verb)
    def wrapped(file: str | None, **given: Any) -> None:
        from gateway.config import load
        from gateway.errors import SettingsError

        try:
            verb(load(file, {}), **given)
        except SettingsError as exc:
            raise click.ClickException(str(exc)) from exc

    return wrapped


@command.command("list")
@as_json_option
@with_settings
def list_all(settings: Settings, as_json: bool) -> None:
    """Show the environments that are here, of engines and of models."""
    from engines.environments import PINS, engine_environment, find_built, library_version
    from gateway.environments import list_environments

    found = list_environments(settings.environments_path)
    if as_json:
        print_json([_plain(listed) for listed in found])
        return
    if found:
        print_table(COLUMNS, [row for listed in found for row in _rows(listed)])
    folder = settings.environments_path
    missing = [
        f"{name} {library_version(pins)}"
        for name, pins in PINS.items()
        if not find_built(engine_environment(name), folder)
    ]
    if missing:
        click.echo(f"Can be installed: {', '.join(missing)}.")


@command.command("install")
@click.argument("name")
@click.option("--version", help="Of the engine's library; else the one that this release was tried with.")
@click.option("--find-links", multiple=True, type=click.Path(), metavar="FOLDER", help="Wheels; may be repeated.")
@click.option("--offline", is_flag=True, help="Ask no package index: all is in folders of wheels.")
@as_json_option
@with_settings
def install(
    settings: Settings, name: str, version: str | None, find_links: tuple[str, ...], offline: bool, as_json: bool
) -> None:
    """Build an engine's environment, unless it is there."""
    environment = _wanted(name, version)
    python = _build(settings, environment, find_links, offline)
    if as_json:
        print_json({"name": environment.name, "fingerprint": environment.folder_name, "python": python})
    else:
        click.echo(f"{environment.name} is installed: {python}")


@command.command("upgrade")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--offline", is_flag=True, help="Ask no package index: all is in folders of wheels.")
@as_json_option
@with_settings
def upgrade(settings: Settings, names: tuple[str, ...], offline: bool, as_json: bool) -> None:
    """Bring engines to the versions of this release, and remove their older ones; all that are here if none is named.

    A version that the settings name stays.
    """
    from engines.environments import PINS
    from engines.requirements import same_name
    from gateway.environments import list_environments

    folder = settings.environments_path
    here = {engine for listed in list_environments(folder) for engine, model in listed.users if model is None}
    chosen = [same_name(name) for name in names] or [name for name in PINS if name in here]
    if not chosen and not as_json:
        click.echo("No engine is installed; see `hostler engines list`.")
    upgraded = []
    for name in chosen:
        environment = _wanted(name, None)
        python = _build(settings, environment, (), offline)
        removed = []
        if not as_json:
            click.echo(f"{name} is up to date: {python}")
        kept = {same_name(engine): of_site.version for engine, of_site in settings.engines.items()}
        for listed in list_environments(folder):
            is_older = (name, None) in listed.users and listed.fingerprint != environment.folder_name
            if is_older and (kept.get(name) is None or _version(name, listed) != kept[name]):
                try:
                    removed.append(_remove(name, listed, folder, as_json))
                except click.ClickException as exc:
                    click.echo(f"{listed.fingerprint} stays: {exc.message}", err=True)
        upgraded.append({"name": name, "fingerprint": environment.folder_name, "python": python, "removed": removed})
    if as_json:
        print_json(upgraded)


@command.command("remove")
@click.argument("name")
@click.option("--version", help="Only this version of it.")
@click.option("--check", "-y", is_flag=True, help="Do not ask.")
@as_json_option
@with_settings
def remove(settings: Settings, name: str, version: str | None, check: bool, as_json: bool) -> None:
    """Delete an engine's environments, or one by its folder as the list shows it."""
    check_answered(as_json, check)
    from engines.requirements import same_name
    from gateway.environments import list_environments

    folder = settings.environments_path
    engine = same_name(name)
    found = [
        listed
        for listed in list_environments(folder)
        if listed.fingerprint == name
        or ((engine, None) in listed.users and version in (None, _version(engine, listed)))
    ]
    if not found:
        raise click.ClickException(f"No environment here is named {name!r}; see `hostler engines list`.")
    if not as_json:
        print_table(COLUMNS, [row for listed in found for row in _rows(listed)])
    if not check and not click.confirm("Delete?", default=False):
        click.echo("Nothing was deleted.")
        return
    removed = [_remove(None if listed.fingerprint == name else engine, listed, folder, as_json) for listed in found]
    if as_json:
        print_json(removed)


def describe(listed: Listed) -> str:
    """An environment in one line."""
    versions = [f"{engine} {version}" for engine, _ in listed.users if (version := _version(engine, listed))]
    return f"{', '.join(versions) or listed.kind}, {megabytes(listed.size_bytes)}, {_state(listed)}: {listed.path}"


# --- what they do


def _wanted(name: str, version: str | None) -> Environment:
    from engines.environments import engine_environment

    try:
        return engine_environment(name, version)
    except ValueError as exc:
        raise click.ClickException(str(exc)) from exc


def _build(settings: Settings, environment: Environment, find_links: tuple[str, ...], offline: bool) -> str:
    import asyncio
    from pathlib import Path

    import msgspec

    from gateway.environments import CannotBuild, prepare, recipe_of
    from gateway.nodes.local import open_scratch
    from gateway.process import CannotStart

    recipe = recipe_of(settings)
    recipe = msgspec.structs.replace(
        recipe,
        offline=recipe.offline or offline,
        wheel_folders=(*recipe.wheel_folders, *(Path(link).absolute() for link in find_links)),
    )

    async def build() -> str:
        async with open_scratch() as folder:
            return await prepare(
                environment,
                settings.environments_path,
                recipe=recipe,
                run_folder=folder,
                report=_Progress(),
            )

    try:
        return asyncio.run(build())
    except (CannotBuild, CannotStart, OSError) as exc:
        raise click.ClickException(str(exc)) from exc
    finally:
        if sys.stderr.isatty():
            click.echo("\r\033[K", err=True, nl=False)


class _Progress:
    """Shows steps: in one line of a terminal, or in lines that are all different."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, step: str) -> None:
        if step == self._last:
            return
        self._last = step
        if sys.stderr.isatty():
            click.echo(f"\r\033[K{step[:100]}", err=True, nl=False)
        else:
            click.echo(step, err=True)


def _remove(engine: str | None, listed: Listed, folder: Any, as_json: bool) -> dict[str, Any]:
    """Delete it, for that engine or for all, and tell people; what programs are told of it."""
    from gateway import environments

    try:
        if engine is None:
            freed = environments.remove(listed.fingerprint, folder)
        else:
            freed = environments.remove_for((engine, None), listed.fingerprint, folder)
    except environments.EnvironmentInUse as exc:
        raise click.ClickException(str(exc)) from exc
    if not as_json and freed:
        click.echo(f"{listed.fingerprint} is deleted: {megabytes(freed)} are free.")
    elif not as_json:
        click.echo(f"{listed.fingerprint} stays for the others that share it.")
    return {"fingerprint": listed.fingerprint, "freed_bytes": freed}


# --- how they look


def _rows(listed: Listed) -> list[list[str]]:
    users: tuple[tuple[str, str | None], ...] = listed.users or (("-", None),)
    used = None if listed.last_used is None else time.time() - listed.last_used
    return [
        [
            engine if model is None else f"model {model} ({engine})",
            text(_version(engine, listed)),
            text(listed.python_version),
            megabytes(listed.size_bytes),
            "-" if used is None else f"{seconds(used)} ago",
            _state(listed),
            listed.fingerprint,
        ]
        for engine, model in users
    ]


def _state(listed: Listed) -> str:
    if listed.is_building:
        return "being built"
    return "whole" if listed.is_whole else "broken"


def _version(engine: str, listed: Listed) -> str | None:
    from engines.environments import version_in

    return version_in(engine, listed.packages)


def _plain(listed: Listed) -> dict[str, Any]:
    return {
        "name": listed.name,
        "kind": listed.kind,
        "users": [{"engine": engine, "model": model} for engine, model in listed.users],
        "versions": {engine: _version(engine, listed) for engine, _ in listed.users},
        "packages": list(listed.packages),
        "python": listed.python,
        "python_version": listed.python_version,
        "size_bytes": listed.size_bytes,
        "state": _state(listed),
        "last_used": listed.last_used,
        "fingerprint": listed.fingerprint,
        "path": str(listed.path),
    }
