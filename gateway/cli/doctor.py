"""hostler doctor"""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from gateway.amounts import megabytes
from gateway.cli.options import as_json_option, print_json

PACKAGES = (
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "aiohttp",
    "msgspec",
    "huggingface_hub",
    "xllamacpp",
    "pip",
)


@click.command("doctor")
@click.option("-c", "--config", "file", type=click.Path(), help="A settings file, for its engines and folders.")
@as_json_option
def command(file: str | None, as_json: bool) -> None:
    """Say what is installed, which engines can run here and why not the others, GPUs, memory and disk."""
    from gateway.config import load
    from gateway.errors import SettingsError

    try:
        report = _examine(load(file, {}))
    except SettingsError as exc:
        raise click.ClickException(str(exc)) from exc
    if as_json:
        print_json(report)
        return
    for title, facts in report.items():
        click.secho(title, bold=True)
        for name, fact in facts.items():
            click.echo(f"  {name:16} {fact}")


def _examine(settings: Any) -> dict[str, dict[str, str]]:
    import psutil

    from gateway.cli.engines import describe
    from gateway.environments import list_environments
    from gateway.fleet import available_engines
    from gateway.gpus import LIMIT_S, list_gpus
    from gateway.question import NoAnswer, Question

    home = settings.home_path
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    memory = psutil.virtual_memory()
    try:
        gpus = {
            f"GPU {gpu.index}": f"{gpu.name}, {megabytes(gpu.used_bytes)} of {megabytes(gpu.total_bytes)} used"
            for gpu in Question(list_gpus, limit_s=LIMIT_S)()
        }
    except NoAnswer:
        gpus = {"GPUs": f"NVML has not answered for {LIMIT_S:g} s; `nvidia-smi` may show why"}
    return {
        "Hostler": {
            "version": version("hostler"),
            "python": platform.python_version(),
            "data folder": str(home),
        },
        "Packages": {name: _version(name) for name in PACKAGES},
        "Engines": {
            engine.name: f"cannot run: {reason}" if (reason := engine.installed()) else "can run"
            for engine in available_engines(settings)
        },
        "Environments": {
            f"{listed.name}"[:16]: describe(listed) for listed in list_environments(settings.environments_path)
        }
        or {"none": "engines run on Python that is here; see `hostler engines install --help`"},
        "GPUs": gpus or {"none": "NVML sees no NVIDIA GPU: models run on the CPU"},
        "Machine": {
            "CPUs": str(psutil.cpu_count()),
            "memory": f"{megabytes(memory.available)} of {megabytes(memory.total)} free",
            "disk": f"{megabytes(shutil.disk_usage(existing).free)} free at {existing}",
        },
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
