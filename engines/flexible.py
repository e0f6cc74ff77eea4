"""flexible: whatever a launcher of Xinference's kind makes, by our worker `engines/workers/flexible.py`.

A launcher is a function `launcher(model_uid, model_spec, **launcher_args)`, named by its dotted name, that returns an
object with `load()` and `infer(*args, **kwargs)`. It is code that runs here, so a site names those that may.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

from engines.base import Command, Endpoint, Engine, Launch, Needs, Placement, worker_command
from engines.environments import find_python
from registry.resolve import Artifact
from registry.schema import FlexibleFamily, encode_family

XINFERENCE = "xinference.model.flexible.launchers."
# Launchers that the worker has itself, under Xinference's names for them -> the modules that they need.
BUILTIN: dict[str, tuple[str, ...]] = {XINFERENCE + "transformers": ("transformers", "torch")}
# What Xinference ships besides; it runs where its package is installed and a site allows it.
OTHERS = tuple(XINFERENCE + name for name in ("modelscope", "yolo", "image_process"))


class FlexibleOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Whatever the launcher takes; `launcher_args` of the family go before."""


class Flexible(Engine, frozen=True, kw_only=True):
    """Models that bring the name of their launcher."""

    name = "flexible"
    model_types = ("flexible",)
    options = FlexibleOptions

    def installed(self) -> str | None:
        """What a launcher needs shows when it runs."""
        if find_python(self.name, (), self.settings, self.environments) is None:
            return f"`engines.flexible.python` names {self.settings.python!r}, which is not an executable file"
        return None

    def accepts(self, artifact: Artifact) -> str | None:
        """Only launchers that are allowed."""
        family = artifact.family
        assert isinstance(family, FlexibleFamily)
        if not family.launcher:
            return "it names no launcher: register it as a flexible model with `launcher`"
        if family.launcher in (*BUILTIN, *self.settings.launchers):
            return None
        if family.launcher in OTHERS:
            return (
                f"the launcher {family.launcher} is not built in. Where the package xinference is installed, name it "
                "in the setting `flexible_launchers`; else write a launcher of your own"
            )
        return (
            f"the launcher {family.launcher!r} is not allowed. It is code that would run on this machine: if you trust "
            "it, add its exact name to the setting `flexible_launchers`"
        )

    def needs(self, launch: Launch) -> Needs:
        """What the launch says; a launcher's code may do as it likes."""
        return Needs(gpu_idx=launch.gpu_idx, n_gpu=launch.n_gpu, chooses=True)

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """The worker, with the family as its launcher reads it."""
        family = launch.artifact.family
        assert isinstance(family, FlexibleFamily)
        program = python or self._python(family.launcher)
        spec = encode_family(family)
        spec["model_uri"] = str(model_path) if launch.artifact.has_files else None
        args: dict[str, Any] = msgspec.json.decode(family.launcher_args) if family.launcher_args else {}
        options = {
            "launcher": family.launcher,
            "allowed": [*BUILTIN, *self.settings.launchers],
            "args": launch.options | args,
            "spec": spec,
        }
        return worker_command("flexible", program, launch, model_path, placement, endpoint, options)

    def _python(self, launcher: str) -> str:
        """The Python that has what the launcher needs, as far as that is known; else ours, which says what it lacks."""
        name = "transformers" if launcher in BUILTIN else self.name
        return find_python(name, BUILTIN.get(launcher, ()), self.settings, self.environments) or sys.executable
