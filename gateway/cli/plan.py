"""hostler plan"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import click

from gateway.amounts import megabytes
from gateway.cli.options import as_json_option, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from engines.base import Engine, Launch
    from gateway.config import Settings
    from gateway.devices import SimulatedMachine
    from gateway.placement import Device
    from gateway.plan import Row
    from gateway.sizing import Sizing
    from gateway.yard import Rules
    from registry.schema import Source


@click.command("plan")
@click.argument("file", type=click.Path())
@click.option("--machine", "machine_file", type=click.Path(), help="A file that describes another machine's devices.")
@click.option("--gpus", metavar="TEXT", help="Or GPUs in a word: 8x80GiB, or 2x24GiB,1x80GiB.")
@as_json_option
def command(file: str, machine_file: str | None, gpus: str | None, as_json: bool) -> None:
    """Say what each model of a settings file would be run by, and where: on which devices, with how much memory.

    Starts nothing and asks no gateway; what runs here already counts as held by others. On another machine all engines
    count as installed. Exits with 1 if a model would have no room, whatever else was unloaded.
    """
    from gateway.errors import SettingsError
    from gateway.plan import draw_up

    if machine_file and gpus:
        raise click.UsageError("Say --machine or --gpus, not both.")
    try:
        wanted, devices, rules = _prepare(file, _machine(machine_file, gpus))
    except SettingsError as exc:
        if as_json:
            print_json({"file": file, "error": str(exc)})
        click.echo(str(exc), err=True)
        sys.exit(1)
    rows = draw_up(wanted, devices, rules)
    if as_json:
        print_json({"file": file, "error": None} | _data(rows, devices))
    else:
        _show(rows, devices)
    sys.exit(1 if any(row.status == "refused" for row in rows) else 0)


def _machine(machine_file: str | None, gpus: str | None) -> SimulatedMachine | None:
    """The made-up one; None: this."""
    from pathlib import Path

    from gateway.config import parse
    from gateway.devices import SimulatedMachine, machine_of
    from gateway.errors import SettingsError
    from registry.decode import DecodeError, decode

    try:
        if machine_file:
            return decode(parse(Path(machine_file)), SimulatedMachine, "$")
        return machine_of(gpus) if gpus else None
    except (DecodeError, ValueError) as exc:
        raise SettingsError(f"{machine_file or '--gpus'}: {exc}") from exc


def _prepare(
    file: str, machine: SimulatedMachine | None
) -> tuple[list[tuple[Launch, Sizing]], Sequence[Device], Rules]:
    """What is wanted, with what it takes, the devices, and the rules."""
    from functools import partial

    import engines
    from gateway.config import load
    from gateway.devices import Observer, limits_of, look_here
    from gateway.dispatch import rules_of
    from gateway.experience import Experience
    from gateway.fleet import available_engines, open_registry, plan_declared
    from gateway.gpus import list_gpus
    from gateway.sizing import bytes_beside, size_up
    from registry import weights

    settings = load(file, {})
    known = available_engines(settings)
    if machine is not None:
        known = tuple(map(_as_installed, known))
    registry = open_registry(settings)
    launches = plan_declared(settings, registry, known)
    look = machine.look if machine else partial(look_here, list_gpus)
    observer = Observer(look)
    devices = asyncio.run(observer.observe((), limits_of(settings)))
    if observer.silence:
        raise click.ClickException(f"{observer.silence}. Mend that, or describe the machine (--machine, --gpus).")
    experience = Experience(settings.home_path / "experience.json")
    has_gpus = any(device.gpu for device in devices)

    def size(launch: Launch) -> Sizing:
        path, *added = (_files_here(source, settings) for source in launch.artifact.sources)
        facts = weights.read(path) if path else None
        family = registry.find(launch.artifact.family.model_name, launch.artifact.family.model_type)
        needs = engines.find(launch.engine, known).needs(launch)
        specs = family.specs if family else ()
        beside = bytes_beside(launch, path, tuple(filter(None, added)))
        return size_up(launch, needs, None, facts, [], experience, has_gpus=has_gpus, specs=specs, beside_bytes=beside)

    return [(launch, size(launch)) for launch in launches], devices, rules_of(settings, devices)


def _as_installed(engine: Engine) -> Engine:
    """The same engine, as if its programs were here."""
    import msgspec

    class Installed(type(engine), frozen=True, kw_only=True):  # type: ignore[misc, call-arg]
        def installed(self) -> None:
            return None

    made: Engine = Installed(**msgspec.structs.asdict(engine))
    return made


def _files_here(source: Source, settings: Settings) -> Path | None:
    from registry.hubs import find_cached, local
    from registry.schema import NO_FILES

    if source.model_hub == NO_FILES:
        return None
    if source.model_hub == "local":
        found = local.find(source)
        return found.path if found else None
    return find_cached(source, settings.cache_path, is_use=False)


def _data(rows: Sequence[Row], devices: Sequence[Device]) -> dict[str, Any]:
    import msgspec

    from gateway.plan import free_after

    left = free_after(rows, devices)
    told = [
        {
            "key": device.key,
            "name": device.name,
            "total_bytes": device.total_bytes,
            "foreign_bytes": device.foreign_bytes,
            "headroom_bytes": device.headroom_bytes,
            "free_bytes": left[device.key],
            "holders": device.holders,
        }
        for device in devices
    ]
    return {"models": msgspec.to_builtins(rows), "devices": told}


def _show(rows: Sequence[Row], devices: Sequence[Device]) -> None:
    from gateway.plan import free_after

    columns = {"MODEL": "left", "COPY": "right", "ENGINE": "left", "LOADED": "left", "WHERE": "left"}
    print_table(
        columns | {"MEMORY": "right", "FROM": "left"},
        [
            [
                row.model,
                str(row.replica),
                row.engine,
                "at start" if row.preload else "on demand",
                _where(row),
                megabytes(row.memory_bytes or None),
                row.basis.partition(",")[0],
            ]
            for row in rows
        ],
    )
    click.echo()
    left = free_after(rows, devices)
    print_table(
        {"DEVICE": "left", "TOTAL": "right", "OTHERS": "right", "LEFT": "right", "HELD BY": "left"},
        [
            [
                device.name,
                megabytes(device.total_bytes),
                megabytes(device.foreign_bytes),
                megabytes(max(0, left[device.key])),
                ", ".join(device.holders) or "-",
            ]
            for device in devices
        ],
    )
    for row in rows:
        if row.text:
            click.echo(f"\n{row.model}/{row.replica} ({row.status}): {row.text}")


def _where(row: Row) -> str:
    if row.status == "refused":
        return "nowhere"
    names = ", ".join(row.devices).replace(", GPU", ",") or "as it chooses"
    return f"{names}, in turn" if row.status == "in turn" else names
