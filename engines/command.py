"""command: any server that speaks OpenAI's language, by its command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engines.base import Command, Endpoint, Engine, Launch, Needs, Placement, visible_gpus
from registry.resolve import Artifact

# How a server is told where to listen; one of them must be said.
PLACES = ("{port}", "{socket}")


class CommandOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The server, and how to tell that it is ready.

    `command` and `env` may hold {port}, {host}, {socket}, {model} (the path of its files), {uid} and {api_key}.
    """

    command: Annotated[
        str | tuple[str, ...], Meta(description="command line, as text or as a list of its words; with {port}")
    ]
    ready_path: Annotated[str, Meta(pattern="^/", description="answers 200 once requests can be served")] | None = None
    served_name: Annotated[str, Meta(min_length=1, description="the model's name there, if not {uid}")] | None = None
    env: Annotated[dict[str, str], Meta(description="environment of the server")] = {}
    working_folder: Annotated[str, Meta(pattern="^[/~]", description="where it is started")] | None = None
    grace_s: Annotated[float, Meta(ge=0, description="from SIGTERM to SIGKILL")] = 10.0

    def __post_init__(self) -> None:
        """Raises ValueError for a command line that cannot work."""
        if not self.words:
            raise ValueError("`command` is empty")
        if not any(place in text for place in PLACES for text in (*self.words, *self.env.values())):
            raise ValueError("`command` says nowhere where to listen: write {port}, or {socket} for a Unix socket")

    @property
    def words(self) -> tuple[str, ...]:
        """The command line, word by word."""
        return tuple(shlex.split(self.command)) if isinstance(self.command, str) else self.command


class ServerCommand(Engine, frozen=True, kw_only=True):
    """What the launch's command line starts."""

    name = "command"
    model_types = ("LLM", "embedding", "rerank", "image", "audio", "video", "flexible")
    options = CommandOptions
    by_name_only = True
    runs_given_programs = True

    def installed(self) -> str | None:
        """Whether the program is there shows when it is started."""
        return None

    def accepts(self, artifact: Artifact) -> str | None:
        """Nobody knows what the server can load."""
        return None

    def wants_files(self, options: Mapping[str, Any]) -> bool:
        """If they are put into the command line."""
        return "{model}" in str(options.get("command")) or "{model}" in str(options.get("env"))

    def listens_on_socket(self, launch: Launch) -> bool:
        """If the command line has a place for one."""
        options: CommandOptions = self.read_options(launch.options)
        return any("{socket}" in text for text in (*options.words, *options.env.values()))

    def served_name(self, launch: Launch) -> str:
        """As the options say, else the uid."""
        return str(launch.options.get("served_name") or launch.uid)

    def needs(self, launch: Launch) -> Needs:
        """What the launch says; its command line may name GPUs too."""
        return Needs(gpu_idx=launch.gpu_idx, n_gpu=launch.n_gpu, chooses=True)

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """The words of the command line with their places filled in; no shell reads them."""
        options: CommandOptions = self.read_options(launch.options)
        places = {
            "{port}": str(endpoint.port),
            "{host}": endpoint.host,
            "{socket}": endpoint.socket or "",
            "{model}": str(model_path),
            "{uid}": launch.uid,
            "{api_key}": endpoint.api_key,
        }
        env = {name: _filled(text, places) for name, text in options.env.items()}
        ready = (options.ready_path,) if options.ready_path else ("/health", "/v1/models")
        return Command(
            argv=tuple(_filled(word, places) for word in options.words),
            env=visible_gpus(placement) | launch.envs | env,
            ready_path=ready[0],
            other_ready_paths=ready[1:],
            grace_s=options.grace_s,
            folder=str(Path(options.working_folder).expanduser()) if options.working_folder else None,
        )


def _filled(text: str, places: Mapping[str, str]) -> str:
    for place, value in places.items():
        text = text.replace(place, value)
    return text
