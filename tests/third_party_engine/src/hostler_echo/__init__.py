"""An engine for Hostler: what it is called, what it takes, and which program serves it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from engines.base import Command, Endpoint, Engine, Launch, NoOptions, Placement
from registry.decode import decode
from registry.resolve import Artifact


class EchoOptions(NoOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launch may say; whatever else it says is refused with the nearest of these names."""

    times: Annotated[int, Meta(ge=1, le=10, description="how often it is said")] = 1


class Echo(Engine, frozen=True, kw_only=True):
    """Says again what it was told."""

    name = "echo"
    model_types = ("LLM",)
    unix_socket = False  # its server listens on a port
    options = EchoOptions

    def installed(self) -> str | None:
        """Why it cannot run here, or None: it brings its server."""
        return None

    def accepts(self, artifact: Artifact) -> str | None:
        """Why it cannot load this, or None."""
        if artifact.spec.model_format != "none":
            return f"echo has no use for model files ({artifact.spec.model_format})"
        return None

    def wants_files(self, options: Mapping[str, Any]) -> bool:
        """A launch needs no files, and has the name of its uid."""
        return False

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """The server of this package, with the uid as its model's name."""
        options = decode(launch.options, EchoOptions, "options", strict=False)
        return Command(
            argv=(
                sys.executable,
                "-P",
                "-m",
                "hostler_echo.server",
                str(endpoint.port),
                launch.uid,
                str(options.times),
            ),
            env={"ECHO_KEY": endpoint.api_key} | launch.envs,
        )


ENGINE = Echo()
