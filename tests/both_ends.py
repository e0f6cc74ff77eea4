"""A client's connection and an engine's, in hand, with all of ours between them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from engines.base import EngineSettings, Launch
from engines.llama_cpp import LlamaCpp
from gateway.config import Settings
from gateway.connections import Connection, Connections
from gateway.crowd import Crowd
from gateway.deployment import Deployment
from gateway.door.protocol import Door, DoorProtocol
from gateway.pace import Pace
from gateway.replica import State
from registry.resolve import Artifact
from registry.schema import LLMFamily, ModelSpec, Source

BODY = b'{"model":"mock","prompt":"x"}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(BODY)
REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b'28\r\ndata: {"choices":[{"text":"a","x":0}]}\n\n\r\n'
    b'3e\r\ndata: {"choices":[{"text":"b","finish_reason":"length"}]}   \n\n\r\n'
    b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
)
TOLD = b'{"choices":[{"text":"ab","finish_reason":"length"}],"usage":{"prompt_tokens":1,"completion_tokens":2}}'
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(TOLD), TOLD)


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.sent = b""
        self.end: str | None = None
        self.is_read_paused = False
        self.unsent = 0

    def write(self, data: bytes) -> None:
        self.sent += data

    def writelines(self, parts: list[bytes]) -> None:
        self.sent += b"".join(parts)

    def close(self) -> None:
        self.end = self.end or "closed"

    def abort(self) -> None:
        self.end = "aborted"

    def is_closing(self) -> bool:
        return self.end is not None

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def pause_reading(self) -> None:
        self.is_read_paused = True

    def resume_reading(self) -> None:
        self.is_read_paused = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def taken(self) -> bytes:
        sent, self.sent = self.sent, b""
        return sent


class FakeReplica(SimpleNamespace):
    """One that is ready."""

    def __hash__(self) -> int:
        return id(self)


@pytest.fixture
async def ends(tmp_path: Path) -> SimpleNamespace:
    """As `ends_at` has them."""
    return ends_at(tmp_path)


def ends_at(home: Path) -> SimpleNamespace:
    """A client's connection and an engine's, in hand, with all of ours between them."""
    spec = ModelSpec(model_format="ggufv2", model_hub="local", model_id="/m")
    source = Source(model_hub="local", model_id="/m")
    artifact = Artifact(family=LLMFamily(model_name="mock", model_specs=(spec,)), spec=spec, source=source)
    launch = Launch(uid="mock", artifact=artifact, engine="llama.cpp")
    settings = Settings(home=str(home), access_log=False)
    deployment = Deployment(launch, LlamaCpp(settings=EngineSettings(binary="x")), settings=lambda: settings)
    connections = Connections(SimpleNamespace(socket="/nowhere", host="", port=0))  # type: ignore[arg-type]
    upstream = SimpleNamespace(
        connections=connections,
        is_elsewhere=False,
        own_names=frozenset(),
        opening=lambda path: f"POST {path} HTTP/1.1\r\nhost: x\r\n".encode(),
    )
    replica = FakeReplica(
        state=State.READY,
        in_flight=0,
        index=0,
        name="mock-0",
        starts=1,
        served=0,
        upstream=upstream,
        last_used=0.0,
        pace=Pace(),
    )
    deployment.replicas = (replica,)
    fleet = SimpleNamespace(
        settings=settings,
        in_effect=lambda: fleet.settings,
        next_door=None,
        find=lambda uid: deployment,
        deployments=lambda: [deployment],
    )
    state = ServerState()
    config = uvicorn.Config(lambda: None, log_config=None, lifespan="off", interface="asgi3", ws="none")
    config.load()
    door = Door(fleet, Crowd(lambda: None, state.connections, 1000))  # type: ignore[arg-type]
    client = DoorProtocol(door, config=config, server_state=state, app_state={}, _loop=asyncio.get_running_loop())
    to_client, to_engine = Wire(), Wire()
    client.connection_made(to_client)  # type: ignore[arg-type]
    engine = Connection(connections)
    engine.connection_made(to_engine)  # type: ignore[arg-type]
    engine._is_kept = True
    engine._give_back()
    return SimpleNamespace(
        client=client, engine=engine, to_client=to_client, to_engine=to_engine, replica=replica, connections=connections
    )
