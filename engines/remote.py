"""remote: a model that is served elsewhere in OpenAI's language, by a peer or in the cloud. Nothing is run here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from engines.base import Command, Endpoint, Engine, Launch, Needs, Placement
from registry.decode import Secret
from registry.resolve import Artifact

Seconds = Annotated[float, Meta(gt=0)]


class RemoteOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where it is, and how it is asked."""

    base_url: Annotated[str, Meta(description="as OpenAI's clients take it, mostly with /v1 at its end; http or https")]
    api_key: Annotated[Secret | None, Meta(description="sent as bearer token")] = None
    model: Annotated[str, Meta(min_length=1, description="the model's name there, if not the uid")] | None = None
    headers: Annotated[dict[str, Secret], Meta(description="sent with every request")] = {}
    timeout_s: Annotated[Seconds, Meta(description="without a byte for so long, an answer counts as lost")] = 600.0
    ready_path: Annotated[str, Meta(pattern="^/", description="answers 200 if it is up; /v1/... is below base_url")] = (
        "/v1/models"
    )
    probe_interval_s: Annotated[Seconds, Meta(description="between two looks at whether it is up")] = 30.0

    def __post_init__(self) -> None:
        """Raises ValueError for an address that is none."""
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("`base_url` is an address such as https://api.example.com/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("`base_url` is an address and nothing else: a key goes into `api_key` or `headers`")

    @property
    def url(self) -> str:
        """The base URL; of a host alone, that of its OpenAI routes."""
        url = self.base_url.rstrip("/")
        return url if urlsplit(url).path else f"{url}/v1"


class Remote(Engine, frozen=True, kw_only=True):
    """A server that somebody else runs."""

    name = "remote"
    model_types = ("LLM", "embedding", "rerank", "image", "audio", "video", "flexible")
    options = RemoteOptions
    by_name_only = True
    retry_s = 30.0

    def installed(self) -> str | None:
        """There is nothing to install."""
        return None

    def accepts(self, artifact: Artifact) -> str | None:
        """Nobody knows what is there."""
        return None

    def wants_files(self, options: Mapping[str, Any]) -> bool:
        """They are elsewhere."""
        return False

    def served_name(self, launch: Launch) -> str:
        """As the options say, else the uid."""
        return str(launch.options.get("model") or launch.uid)

    def needs(self, launch: Launch) -> Needs:
        """Nothing of this machine."""
        return Needs(n_gpu=0)

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """No program, but where requests go."""
        options: RemoteOptions = self.read_options(launch.options)
        return Command(
            argv=(),
            ready_path=options.ready_path,
            endpoint=Endpoint(
                url=options.url, api_key=options.api_key or "", headers=options.headers, silence_s=options.timeout_s
            ),
            probe_interval_s=options.probe_interval_s,
        )
