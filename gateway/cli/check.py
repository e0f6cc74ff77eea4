"""hostler check"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import click

from gateway.amounts import megabytes
from gateway.cli.launch import LaunchCommand, wish_of
from gateway.cli.launch import command as launch
from gateway.cli.options import print_json, print_table, text, with_client
from gateway.client import Client

FILES_SHOWN = 20


class CheckCommand(LaunchCommand):
    """Takes what `launch` takes, and the model's name alone."""

    takes_name = True


@with_client
def check(client: Client, as_json: bool, **options: Any) -> None:
    """Say whether a launch would work, and what it would take: choices, files, memory, GPUs and who holds them.

    Takes the options of `launch`. Nothing is downloaded or started.
    """
    wish = wish_of(options) | click.get_current_context().meta["extras"]
    if not wish.get("model_name") and not wish.get("model_path"):
        raise click.UsageError("Give the model's name, as of `launch`; `hostler registrations` shows them.")
    report = client.check(**wish)
    if as_json:
        print_json(report)
    else:
        show(report)
    sys.exit(0 if report["can_launch"] and report["fits"] is not False else 1)


command = CheckCommand(
    "check",
    callback=check,
    params=launch.params,
    help=check.__doc__,
    options_metavar="NAME [OPTIONS] [--KEY VALUE]...",
)


def show(report: dict[str, Any]) -> None:
    """The report for people."""
    if report["model_engine"]:
        _show_choices(report)
        for files in (report["files"], *report["additions"]):
            _show_files(files)
        _show_memory(report)
    _lines("Engines", [f"{name}: {reason or 'can run it'}" for name, reason in report["engines"].items()])
    _show_devices(report)
    _lines("Not known", report["unknown"])
    _lines("Contradictions", report["contradictions"])
    _lines("In the way", report["problems"])
    _lines("What would make it fit", report["advice"])
    click.secho(report["verdict"], bold=True)


def _show_choices(report: dict[str, Any]) -> None:
    spec = report["spec"]
    facts = [text(spec[key]) for key in ("model_format", "model_size_in_billions", "quantization") if spec[key]]
    click.secho(f"{report['model_name']} ({report['model_type']})", bold=True)
    click.echo(f"  spec    {' '.join(facts)} of {spec['model_hub']}:{spec['model_id']}: {report['spec_reason']}")
    click.echo(f"  engine  {report['model_engine']}: {report['engine_reason']}")
    _lines("Passed over", report["passed_over"])


def _show_files(files: dict[str, Any]) -> None:
    where = f"here, at {files['place']}" if files["are_here"] else f"to be fetched from {files['place']}"
    total = f", {megabytes(files['total_bytes'])}" if files["total_bytes"] else ""
    found = sorted((files["files"] or {}).items(), key=lambda item: -item[1])
    more = [f"and {len(found) - FILES_SHOWN} more"] if len(found) > FILES_SHOWN else []
    room = [f"{megabytes(files['free_bytes'])} are free at {files['folder']}"] if files["free_bytes"] else []
    rows = [f"{name}  {megabytes(size)}" for name, size in found[:FILES_SHOWN]]
    title = f"Files of {files['what']}" if files["what"] else "Files"
    _lines(f"{title}: {where}{total}", [*rows, *more, *room])


def _show_memory(report: dict[str, Any]) -> None:
    memory = report["memory"]
    if memory is None:
        return
    copies = f", of each of {memory['replicas']} copies" if memory["replicas"] > 1 else ""
    click.secho(f"Memory{copies}, in {report['where']}", bold=True)
    parts = ("weights", "kv_cache", "activations", "engine", "total")
    for part in parts:
        note = f"  {memory['sequences']} x {memory['tokens']} tokens" if part == "kv_cache" else ""
        click.echo(f"  {part.replace('_', ' '):12} {megabytes(memory[f'{part}_bytes']):>12}{note}")
    click.echo(f"  {memory['basis']}")


def _show_devices(report: dict[str, Any]) -> None:
    rows = [
        [
            f"GPU {gpu['index']}{' *' if gpu['is_wanted'] else ''}",
            gpu["name"],
            megabytes(gpu["total_bytes"]),
            megabytes(gpu["free_bytes"]),
            _holders(gpu["holders"]),
        ]
        for gpu in report["gpus"]
    ]
    ram = report["ram"]
    rows.append(["RAM", "", megabytes(ram["total_bytes"]), megabytes(ram["free_bytes"]), _holders(ram["holders"])])
    print_table({"DEVICE": "left", "NAME": "left", "TOTAL": "right", "FREE": "right", "HELD BY": "left"}, rows)
    if not report["gpus"]:
        click.echo("NVML sees no NVIDIA GPU: models run on the CPU.")


def _holders(holders: list[dict[str, Any]]) -> str:
    named = [
        f"{one['model'] or one['name'] or 'unknown'} ({one['pid']}): {megabytes(one['used_bytes'])}" for one in holders
    ]
    return ", ".join(named) or "-"


def _lines(title: str, lines: Iterable[str]) -> None:
    lines = list(lines)
    if lines:
        click.secho(title, bold=True)
        for line in lines:
            click.echo(f"  {line}")
