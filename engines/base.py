"""The contract between the gateway and every engine: plain data in, a Command out.

An engine is a description of an inference server that can be started; it holds no state of what runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import msgspec
from msgspec import Meta

from registry.resolve import Artifact

START_TIMEOUT_S = 600.0
LOAD_TIMEOUT_S = 300.0


class Launch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The desired state of one uid. Written to disk before anything is done about it."""

    uid: str
    artifact: Artifact
    engine: str
    replica: int = 1
    gpu_idx: tuple[int, ...] | None = None
    n_gpu: int | None = None
    options: dict[str, Any] = {}
    forced_options: dict[str, Any] = {}
    envs: dict[str, str] = {}
    preload: bool = False
    request_limits: int | None = None
    idle_timeout_s: float | None = None
    start_timeout_s: float = START_TIMEOUT_S
    load_timeout_s: float = LOAD_TIMEOUT_S


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """What one replica asks of the machine.

    `gpu_idx` names the GPUs; else `n_gpu` says how many, 0 being the CPU alone and None whatever is there.
    """

    gpu_idx: tuple[int, ...] | None = None
    n_gpu: int | None = None


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """The GPUs given to one replica, by uuid; None leaves the choice to the engine, () hides them all."""

    gpu_uuids: tuple[str, ...] | None = None


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a replica listens: a Unix socket, or a loopback port; and the key that opens it."""

    socket: str | None = None
    host: str = "127.0.0.1"
    port: int = 0
    api_key: str = ""

    @property
    def address(self) -> str:
        """The endpoint as users read it."""
        return f"unix:{self.socket}" if self.socket else f"http://{self.host}:{self.port}"


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """What to run for one replica.

    `env` is added to the gateway's own environment. `ready_path` answers 200 once requests can be served.
    `grace_s` is the time from SIGTERM to SIGKILL.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = {}
    ready_path: str = "/health"
    grace_s: float = 10.0


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a site says of one engine: the program to run."""

    binary: Annotated[str, Meta(description="the engine's program, by its path or its name on PATH")] | None = None


def takes_flags(engine: Engine) -> bool:
    """Whether it says, by `takes_flags`, that its program gets a launch's `forced_options` as flags."""
    return bool(getattr(engine, "takes_flags", False))


def forced_flags(launch: Launch) -> list[str]:
    """The options that we do not know as flags: `--key value`, or `--key` alone for true; false and null are left out.

    A list repeats the flag, an object is written as JSON.
    """
    flags: list[str] = []
    for key, given in launch.forced_options.items():
        flag = f"--{key.replace('_', '-')}"
        for value in given if isinstance(given, list | tuple) else (given,):
            if value is None or value is False:
                continue
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            flags += [flag] if value is True else [flag, text]
    return flags


@runtime_checkable
class Engine(Protocol):
    """One kind of inference server."""

    @property
    def name(self) -> str:
        """What it is called in launches and settings."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """Which types of family it can serve."""

    @property
    def unix_socket(self) -> bool:
        """Whether it can listen on a Unix socket; else it gets a loopback port."""

    @property
    def options(self) -> type[msgspec.Struct]:
        """The Struct that a launch's options decode to; its fields are the options there are."""

    @property
    def routes(self) -> Mapping[str, str]:
        """Public path -> upstream path, only where they differ."""

    def configured(self, settings: EngineSettings) -> Engine:
        """This engine with a site's settings."""

    def installed(self) -> str | None:
        """Why it cannot run here, or None. Looks, never imports."""

    def accepts(self, artifact: Artifact) -> str | None:
        """Why it cannot load this, or None; users read the sentence."""

    def needs(self, launch: Launch) -> Needs:
        """What one replica asks of the machine."""

    def command(self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint) -> Command:
        """What to run. The uid is passed as served name, so that request bodies go through untouched."""
