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
from both_ends import BODY, HEAD, REPLY, STREAM, WHOLE, ends
from harness import StartGateway
from uvicorn.protocols.http import httptools_impl

from gateway import metrics, passed_on, server
from gateway.config import Settings
from gateway.door import contract, protocol, watched
from gateway.errors import BadRequest

__all__ = ["ends"]


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


@pytest.mark.parametrize("body", [BODY, b"{"])
async def test_who_asks_whether_to_go_on_is_told_to_once(ends: SimpleNamespace, body: bytes) -> None:
    head = HEAD.replace(b"localhost", b"localhost\r\nexpect: 100-continue").replace(
        b"%d" % len(BODY), b"%d" % len(body)
    )
    ends.client.data_received(head)
    assert ends.to_client.taken() == b"HTTP/1.1 100 Continue\r\n\r\n"
    ends.client.data_received(body)
    if body == BODY:
        assert b"expect" not in ends.to_engine.taken()
        ends.engine.data_received(REPLY)
    else:  # what is left to the plain route
        await ends.client.cycle.receive()
    assert ends.to_client.taken().count(b"HTTP/1.1 ") == (body == BODY)
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


async def test_what_connection_lists_is_for_the_next_server_alone(ends: SimpleNamespace) -> None:
    ends.client.data_received(HEAD.replace(b"localhost", b"localhost\r\nconnection: Keep-Alive") + BODY)
    assert b"onnection" not in ends.to_engine.taken()
    odd = b"\r\ncontent-length: 2\r\nX-Hop: 1\r\nx-stays: 1\r\nConnection: x-hop , keep-alive"
    ends.engine.data_received(REPLY.replace(b"\r\ncontent-length: 2", odd))
    told = ends.to_client.taken()
    assert b"x-stays: 1" in told
    assert b"x-hop" not in told
    ends.client.data_received(HEAD.replace(b"localhost", b"localhost\r\nconnection: x-hop\r\nx-hop: 1") + BODY)
    assert not ends.to_engine.taken()  # it is for the plain way
    await asyncio.gather(*ends.client.tasks, return_exceptions=True)


async def test_headers_that_are_no_ascii_go_on_as_by_the_plain_way(ends: SimpleNamespace) -> None:
    texts = b"localhost\r\nx-one: caf\xe9\r\nx-two: caf\xc3\xa9\r\nx-three: \xff \xc3"
    ends.client.data_received(HEAD.replace(b"localhost", texts) + BODY)
    sent = ends.to_engine.taken()
    assert b"x-one: caf\xc3\xa9\r\nx-two: caf\xc3\xa9\r\nx-three: \xc3\xbf \xc3\x83\r\n" in sent
    assert sent.endswith(BODY)


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
    ends.client.end_if_quiet(now + 60 + watched.STALL_LIMIT_S + 1)
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
    client.data_received(HEAD.replace(b"localhost", b"localhost\r\ncontent-encoding: identity") + BODY[:1])
    assert not passed_on.is_between_requests(client)
    client.data_received(BODY[1:])
    assert client.cycle is not None
    assert not passed_on.is_between_requests(client)
    client.cycle.response_complete = True
    assert passed_on.is_between_requests(client)
    await asyncio.gather(*client.tasks, return_exceptions=True)


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


# Where a fault of ours may be, and the reply that it meets.
FAULTS = [
    ("gateway.door.protocol.DoorProtocol._is_head_easy", WHOLE),
    ("gateway.door.protocol.Splice", WHOLE),
    ("gateway.deployment.Deployment.take", WHOLE),
    ("gateway.connections.Connections.take", WHOLE),
    ("gateway.connections.Connection.ask", WHOLE),
    ("gateway.door.splice.Splice.begins", WHOLE),
    ("gateway.door.splice.Splice.returned", WHOLE),
    ("gateway.door.splice.Splice._start", WHOLE),
    ("gateway.door.splice.Splice.heard", WHOLE),
    ("gateway.door.splice.Splice.streamed", STREAM),
    ("gateway.door.splice.Splice.refusal", b"HTTP/1.1 400 No\r\ncontent-length: 2\r\n\r\n{}"),
    ("gateway.door.splice.Splice._lose", b"no HTTP"),
    ("gateway.door.splice.Splice.count", WHOLE),
    ("gateway.door.protocol.DoorProtocol.spliced", WHOLE),
]


@pytest.mark.parametrize(("place", "reply"), FAULTS)
async def test_a_fault_of_ours_leaves_nobody_without_an_answer_and_nothing_in_use(
    ends: SimpleNamespace,
    place: str,
    reply: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fault(*of_it: Any, **named: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as faulty:
        faulty.setattr(place, fault)
        ends.client.data_received(HEAD + BODY)
        if not ends.client.tasks:
            ends.engine.data_received(reply)
    assert "A fault of the gateway" in caplog.text
    assert ends.replica.in_flight == 0
    assert ends.connections.asking == 0
    sent = ends.to_client.taken()
    if ends.client.tasks:  # the plain route answers
        assert not sent
        assert ends.client.cycle.scope["path"] == "/v1/completions"
        assert ends.client.cycle.body == BODY
    else:  # it was known to be whole
        assert sent.endswith(reply.partition(b"\r\n\r\n")[2])
        assert ends.to_client.end == "closed"
    await asyncio.gather(*ends.client.tasks, return_exceptions=True)


async def test_a_fault_in_the_middle_of_an_answer_ends_the_connection_and_is_counted(
    ends: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends.client.data_received(HEAD + BODY)
    ends.engine.data_received(STREAM[:130])
    assert b"data: {" in ends.to_client.taken()
    with monkeypatch.context() as faulty:
        faulty.setattr("gateway.door.splice.Splice.streamed", lambda *of_it: 1 / 0)
        ends.engine.data_received(STREAM[130:])
    assert ends.to_client.end == "closed"
    assert ends.to_engine.end is not None or ends.connections.idle == [ends.engine]
    assert (ends.replica.in_flight, ends.replica.served, ends.connections.asking) == (0, 0, 0)


async def test_a_fault_as_the_client_leaves_leaves_nothing_in_use(
    ends: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends.client.data_received(HEAD + BODY)
    monkeypatch.setattr("gateway.door.splice.Splice.count", lambda *of_it: 1 / 0)
    ends.client.connection_lost(None)
    assert ends.to_engine.end == "aborted"
    assert ends.replica.in_flight == 0
    assert ends.client not in ends.client.connections


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
