"""The short way for easy requests: what it relies on, what it may not lose, and that it is taken at all."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from harness import StartGateway
from uvicorn.protocols.http import httptools_impl
from uvicorn.server import ServerState

from engines.base import EngineSettings, Launch
from engines.llama_cpp import LlamaCpp
from gateway import metrics, passed_on, server
from gateway.config import Settings
from gateway.connections import Connection, Connections
from gateway.crowd import Crowd
from gateway.deployment import Deployment
from gateway.door import contract, protocol
from gateway.door.protocol import Door, DoorProtocol
from gateway.errors import BadRequest
from gateway.pace import Pace
from gateway.replica import State
from registry.resolve import Artifact
from registry.schema import LLMFamily, ModelSpec, Source

BODY = b'{"model":"mock","prompt":"x"}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(BODY)
REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


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
    """A client's connection and an engine's, in hand, with all of ours between them."""
    spec = ModelSpec(model_format="ggufv2", model_hub="local", model_id="/m")
    source = Source(model_hub="local", model_id="/m")
    artifact = Artifact(family=LLMFamily(model_name="mock", model_specs=(spec,)), spec=spec, source=source)
    launch = Launch(uid="mock", artifact=artifact, engine="llama.cpp")
    settings = Settings(home=str(tmp_path), access_log=False)
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
        in_effect=lambda: settings,
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


async def test_an_easy_request_needs_no_task_and_leaves_the_connection_for_the_next(ends: SimpleNamespace) -> None:
    for _ in range(3):
        ends.client.data_received(HEAD + BODY)
        assert ends.replica.in_flight == 1
        assert ends.to_engine.taken().endswith(BODY)
        ends.engine.data_received(REPLY)
        assert ends.to_client.taken().endswith(b"\r\n\r\n{}")
        assert ends.replica.in_flight == 0
        assert ends.connections.idle == [ends.engine]  # trap: afterwards the parser says that it is to be closed
    assert not ends.client.tasks
    assert ends.replica.served == 3


async def test_an_engine_that_answers_before_it_has_the_whole_request_is_asked_the_next_on_a_new_connection(
    ends: SimpleNamespace,
) -> None:
    ends.client.data_received(HEAD + BODY)
    ends.to_engine.unsent = 1
    ends.engine.data_received(REPLY)
    assert ends.to_client.taken().endswith(b"{}")
    assert ends.to_engine.end == "aborted"
    assert not ends.connections.idle


async def test_a_client_that_leaves_has_the_engine_stop_at_once(ends: SimpleNamespace) -> None:
    ends.client.data_received(HEAD + BODY)
    ends.client.connection_lost(None)
    assert ends.to_engine.end == "aborted"
    assert ends.replica.in_flight == 0


async def test_who_reads_slowly_slows_the_engine(ends: SimpleNamespace) -> None:
    ends.client.data_received(HEAD + BODY)
    ends.engine.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n123")
    ends.client.pause_writing()
    assert ends.to_engine.is_read_paused
    ends.client.resume_writing()
    assert not ends.to_engine.is_read_paused


async def test_a_pipelined_request_waits_for_the_one_before_it(ends: SimpleNamespace) -> None:
    ends.client.data_received(HEAD + BODY + HEAD + BODY)
    assert ends.to_engine.taken().count(b"POST") == 1
    assert len(ends.client.pipeline) == 1
    assert ends.to_client.is_read_paused
    ends.engine.data_received(REPLY)
    assert not ends.client.pipeline  # it is with the plain route now
    await asyncio.gather(*ends.client.tasks, return_exceptions=True)


async def test_a_shutdown_lets_the_answer_end_and_then_closes(ends: SimpleNamespace) -> None:
    ends.client.data_received(HEAD + BODY)
    ends.client.shutdown()
    assert ends.to_client.end is None
    ends.engine.data_received(REPLY)
    assert b"connection: close\r\n" in ends.to_client.taken()
    assert ends.to_client.end == "closed"


async def test_what_an_engine_calls_499_ends_as_any_other_reply(ends: SimpleNamespace) -> None:
    ends.client.data_received(HEAD.replace(b"localhost", b"localhost\r\nconnection: close") + BODY)
    ends.engine.data_received(REPLY.replace(b"200 OK", b"499 Gone"))
    assert ends.to_client.taken().startswith(b"HTTP/1.1 499")
    assert ends.to_client.end == "closed"


async def test_a_status_that_http_does_not_have_is_told_as_a_fault_of_the_engine_and_not_asked_again(
    ends: SimpleNamespace,
) -> None:
    ends.client.data_received(HEAD + BODY)
    ends.engine.data_received(REPLY.replace(b"200 OK", b"600 Odd"))
    assert ends.to_client.taken().startswith(b"HTTP/1.1 502")
    assert ends.to_engine.taken().count(b"POST") == 1
    assert not ends.client.tasks


async def test_a_key_that_is_no_text_is_told_as_bad_json(ends: SimpleNamespace) -> None:
    inference = ends.client._door.inferences[b"/v1/completions"]
    with pytest.raises(BadRequest, match="not valid JSON"):
        inference.asked([], b'{"model":"mock","prompt":"x","enable_thinking":true,"\xff":1}')


async def test_who_sends_half_a_request_before_an_answer_is_not_taken_for_idle_behind_it(
    ends: SimpleNamespace,
) -> None:
    ends.client.data_received(HEAD + BODY + HEAD[:20])
    ends.engine.data_received(REPLY)
    ends.client.data_received(HEAD[20:] + BODY)
    ends.client.end_if_quiet(time.monotonic() + 1000)
    assert ends.to_client.end is None
    ends.engine.data_received(REPLY)
    ends.client.end_if_quiet(time.monotonic() + 1000)
    assert ends.to_client.end == "closed"


async def test_a_host_that_is_named_twice_is_for_the_plain_way(ends: SimpleNamespace) -> None:
    ends.client.data_received(HEAD + BODY)
    ends.engine.data_received(REPLY)  # the name is known from now on
    ends.to_engine.taken()
    ends.client.data_received(HEAD.replace(b"host:", b"host:\r\nhost:") + BODY)
    assert not ends.to_engine.taken()
    await asyncio.gather(*ends.client.tasks, return_exceptions=True)


async def test_a_head_without_end_is_refused(ends: SimpleNamespace) -> None:
    piece = b"x-a: %b\r\n" % (b"a" * 60_000)
    ends.client.data_received(HEAD[:-2])
    for _ in range(3):
        ends.client.data_received(piece)
        assert ends.to_client.end is None
    ends.client.data_received(piece)
    assert b"head_too_large" in ends.to_client.taken()
    assert ends.to_client.end == "closed"


async def test_a_head_without_end_breaks_off_the_answer_before_it(ends: SimpleNamespace) -> None:
    ends.client.data_received(HEAD + BODY + HEAD[:-2])
    for _ in range(4):
        ends.client.data_received(b"a" * 60_000)
    assert not ends.to_client.taken()
    assert ends.to_client.end == "closed"


async def test_a_body_in_countless_pieces_is_left_to_the_plain_way(
    ends: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "PARTS_LIMIT", 10)
    head = HEAD.replace(b"content-length: %d" % len(BODY), b"transfer-encoding: chunked")
    ends.client.data_received(head + b"1\r\nx\r\n" * 11)
    assert bytes(ends.client.cycle.body) == b"x" * 11
    assert not ends.client._parts
    ends.client.data_received(b"1\r\nx\r\n0\r\n\r\n")
    assert not ends.client.cycle.more_body
    assert not ends.to_engine.taken()
    await asyncio.gather(*ends.client.tasks, return_exceptions=True)


async def test_a_shutdown_lets_a_request_that_has_begun_to_come_be_answered(ends: SimpleNamespace) -> None:
    ends.client.data_received(HEAD + BODY[:5])
    ends.client.shutdown()
    assert ends.to_client.end is None
    assert not ends.client.cycle.keep_alive
    ends.client.data_received(BODY[5:])
    assert bytes(ends.client.cycle.body) == BODY
    assert not ends.client.cycle.more_body
    await asyncio.gather(*ends.client.tasks, return_exceptions=True)


async def test_connections_that_are_kept_for_nothing_or_do_not_come_on_are_closed(ends: SimpleNamespace) -> None:
    now = time.monotonic()
    ends.client.end_if_quiet(now + 1)
    assert ends.to_client.end is None
    ends.client.data_received(HEAD[:20])
    for after_s in (2, 50):
        ends.client.end_if_quiet(now + after_s)
    assert ends.to_client.end is None
    ends.client.data_received(HEAD[20:])
    for after_s in (60, 119):
        ends.client.end_if_quiet(now + after_s)
    assert ends.to_client.end is None  # more has come in between
    ends.client.end_if_quiet(now + 60 + protocol.STALL_LIMIT_S + 1)
    assert ends.to_client.end == "closed"


# --- what it relies on


async def test_a_connection_is_passed_on_only_while_nothing_of_a_request_was_read_or_is_to_be_answered(
    ends: SimpleNamespace,
) -> None:
    client = ends.client
    assert passed_on.is_between_requests(client)
    for part in (HEAD[:1], HEAD[1:-1], HEAD[-1:] + BODY[:1], BODY[1:]):  # the last: it is asked, and not answered
        client.data_received(part)
        assert not passed_on.is_between_requests(client)
    ends.engine.data_received(REPLY[:-1])
    assert not passed_on.is_between_requests(client)
    ends.engine.data_received(REPLY[-1:])
    assert passed_on.is_between_requests(client)
    client.data_received(HEAD + BODY + b"P")  # half a request behind a whole one
    ends.engine.data_received(REPLY)
    assert not passed_on.is_between_requests(client)


async def test_what_is_the_plain_routes_keeps_its_connection_until_it_is_answered(ends: SimpleNamespace) -> None:
    client = ends.client
    client.data_received(HEAD.replace(b"localhost", b"localhost\r\nexpect: 100-continue") + BODY[:1])
    assert not passed_on.is_between_requests(client)
    client.data_received(BODY[1:])
    assert client.cycle is not None
    assert not passed_on.is_between_requests(client)
    client.cycle.response_complete = True
    assert passed_on.is_between_requests(client)
    await asyncio.gather(*client.tasks, return_exceptions=True)


STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b'28\r\ndata: {"choices":[{"text":"a","x":0}]}\n\n\r\n'
    b'3e\r\ndata: {"choices":[{"text":"b","finish_reason":"length"}]}   \n\n\r\n'
    b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
)


TOLD = b'{"choices":[{"text":"ab","finish_reason":"length"}],"usage":{"prompt_tokens":1,"completion_tokens":2}}'
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(TOLD), TOLD)


@pytest.mark.parametrize("reply", [STREAM, WHOLE])
@pytest.mark.parametrize("size", [1, 7, 50, 1000])
async def test_tokens_are_counted_whatever_pieces_a_reply_comes_in(
    ends: SimpleNamespace, reply: bytes, size: int
) -> None:
    tally = metrics.tally_of("mock")
    before = tally.completion_tokens, tally.reasons.get("length", 0)
    ends.client.data_received(HEAD + BODY)
    for begin in range(0, len(reply), size):
        ends.engine.data_received(reply[begin : begin + size])
    assert ends.replica.in_flight == 0
    assert (tally.completion_tokens, tally.reasons.get("length", 0)) == (before[0] + 2, before[1] + 1)


def test_uvicorn_is_as_the_short_way_needs_it() -> None:
    assert contract.breach() is None


@pytest.fixture
def other_uvicorn(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    class WithoutPipeline(httptools_impl.HttpToolsProtocol):
        def on_response_complete(self) -> None:
            pass

        def on_headers_complete(self, more: int = 0) -> None:
            pass

    if request.param == "version":
        monkeypatch.setattr(contract, "version", lambda name: "1.0")
    else:
        monkeypatch.setattr(httptools_impl, "HttpToolsProtocol", WithoutPipeline)


@pytest.mark.parametrize("other_uvicorn", ["version", "methods"], indirect=True)
def test_with_another_uvicorn_the_plain_way_serves_and_a_warning_says_so(
    other_uvicorn: None, caplog: pytest.LogCaptureFixture
) -> None:
    config = uvicorn.Config(lambda: None)
    http = config.http
    assert server._open_door(config, SimpleNamespace(settings=Settings(door="auto")), None) is None  # type: ignore[arg-type]
    assert config.http == http
    assert "take the plain way" in caplog.text


# --- on real sockets


async def test_a_crowd_that_comes_at_once_finds_the_door_open(start_gateway: StartGateway) -> None:
    if int(Path("/proc/sys/net/core/somaxconn").read_text()) < 1024:
        pytest.skip("the system lets nobody wait in a longer line")
    gateway = await start_gateway()
    port = int(gateway.address.rpartition(":")[2])
    gateway.process.send_signal(signal.SIGSTOP)
    clients = [socket.socket() for _ in range(600)]
    try:
        for client in clients:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        await asyncio.sleep(0.3)
        states = [client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] for client in clients]
        assert states.count(1) == 600  # established
    finally:
        gateway.process.send_signal(signal.SIGCONT)
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()


async def test_lines_of_the_access_log_are_all_there_in_order(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    ids = [f"id-{number}" for number in range(40)]
    for request_id in ids:
        body = {"model": "fake", "prompt": "x"}
        await gateway.post("/v1/completions", body, headers={"x-request-id": request_id})
    await gateway.end()
    lines = [line for line in gateway.log.read_text().splitlines() if "hostler.access" in line]
    assert [line.rpartition("id=")[2] for line in lines] == ids
    assert all(" INFO " in line and "POST /v1/completions fake/0 200" in line for line in lines)
