"""Which program runs an engine: a binary that is named or found, or a worker of ours under some Python."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engines.base import EngineSettings


def find_binary(name: str, configured: str | None) -> str | None:
    """The program's absolute path, or None if it is not there or not executable."""
    return shutil.which(configured or name)


def absolute_program(program: str | None) -> str | None:
    """A path as it is meant where the settings are read; children run in a folder of their own. Names stay."""
    if program is None or "/" not in program:
        return program
    return os.path.abspath(os.path.expanduser(program))


def module_argv(module: str) -> tuple[str, ...]:
    """How to start a module of ours under our own Python. -P keeps the working folder off the import path."""
    return (sys.executable, "-P", "-m", module)


def worker_argv(name: str, python: str | None = None) -> tuple[str, ...]:
    """How to start a worker of ours, under another Python if one is given; see `engines/workers/__main__.py`."""
    return (python or sys.executable, "-P", str(Path(__file__).with_name("workers") / "__main__.py"), name)


def has_package(name: str) -> bool:
    """Whether our own Python could import the package, without importing it."""
    return importlib.util.find_spec(name) is not None


def child_environment(added: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: ours, without our own settings and keys, and with `added`.

    PYTHONDONTWRITEBYTECODE would make a torch engine compile itself at every start: minutes.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HOSTLER_") and name != "PYTHONDONTWRITEBYTECODE"
    }
    return kept | dict(added)


def find_python(name: str, modules: Sequence[str], settings: EngineSettings, environments: Path | None) -> str | None:
    """The Python that runs an engine: the site's own, else ours if it has all the modules; None if there is none."""
    if settings.python:
        return shutil.which(settings.python)
    return sys.executable if all(has_package(module) for module in modules) else None
