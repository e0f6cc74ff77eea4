"""Large requests, which pass on while they come: the names that are looked for in them, and what may go wrong."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import struct
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from both_ends import STREAM, WHOLE, Wire, ends
from harness import StartGateway, events_in

from engines.base import Endpoint
from gateway import metrics
from gateway.api.affinity import key_of
from gateway.api.beginning import Fields, as_whole
from gateway.api.exchange import RESTARTED_MIDWAY
from gateway.connections import Connection, Connections, UpstreamLost
from gateway.door.protocol import FIRST_LOOK_BYTES, UPLOAD_BYTES

__all__ = ["ends"]

PAD = b"y" * 3_000_000
LARGE = b'{"model":"mock","stream":false,"prompt":"%b","n":1}' % PAD
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
PART = 100_000


# --- names


def value_of(rng: random.Random, depth: int = 0) -> Any:
    texts = "", "a", '"', "\\", '\\"', "\\\\", "{", '"model":', "],}", "\u00e9\n", "x" * 50, "y" * 300 + '"', '"\\"' * 9
    kinds: list[Any] = [rng.choice(texts), rng.randrange(-9, 99), 1.5e9, True, None]
    if depth < 4:
        kinds += [[value_of(rng, depth + 1) for _ in range(rng.randrange(4))]] * 2
        kinds += [{rng.choice(texts): value_of(rng, depth + 1) for _ in range(rng.randrange(4))}] * 2
    return rng.choice(kinds)


@pytest.mark.parametrize("seed", range(300))
def test_the_names_of_an_object_are_found_in_whatever_parts_it_comes(seed: int) -> None:
    rng = random.Random(seed)
    names = ["model", 'a"b', "\u00e9", "\\", "stream", "x y", "{", "n" * 50]
    rng.shuffle(names)
    said = {name: value_of(rng) for name in names}
    layout: Any = rng.choice(({}, {"separators": (",", ":")}, {"indent": 2}, {"ensure_ascii": False}))
    data = json.dumps(said, **layout).encode()
    fields, found, at = Fields(), [], 0
    while at < len(data):
        size = rng.choice((1, 2, 7, 1000))
        found += fields.feed(data[at : at + size])
        at += size
        if (whole := as_whole(data[:at], fields)) is not None:
            known = json.loads(whole)
            assert list(known) == [name.decode() for name in found]
            assert list(known.values())[:-1] == [said[name] for name in known][:-1]
            assert not list(known.values())[-1]
    assert found == [name.encode() for name in said]
    assert fields.size == len(data)


@pytest.mark.parametrize("cut", [9_000, 100_000])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "mock", "prompt": "p" * 200_000}),
        ("/v1/chat/completions", {"model": "mock", "messages": [{"role": "user", "content": "p" * 200_000}]}),
        (
            "/v1/chat/completions",
            {
                "model": "mock",
                "messages": [
                    {"role": "system", "content": "\u00e9]," * 200},
                    {"role": "user", "content": [{"type": "text", "text": "p" * 200_000}]},
                    {"role": "assistant", "content": "p"},
                ],
            },
        ),
        (
            "/v1/chat/completions",
            {"model": "mock", "messages": [{"role": "user", "content": "p" * 2000}], "tools": ["t" * 200_000]},
        ),
    ],
)
async def test_a_large_conversation_is_drawn_to_the_replica_of_its_earlier_turns(
    ends: SimpleNamespace, path: str, body: Any, cut: int
) -> None:
    inference = ends.client._door.inferences[path.encode()]
    data = json.dumps(body, ensure_ascii=False).encode()
    fields = Fields()
    fields.feed(data[:cut])
    asked = inference.asked_by_beginning([], data[:cut], fields)
    whole = inference.asked([], data)
    key = key_of([], whole.head, reads_opening=True)
    assert key is not None
    assert key_of([], asked.head, reads_opening=True) == key
    assert asked.body + data[cut:] == whole.body


def test_of_a_name_that_is_long_or_no_text_nothing_is_kept() -> None:
    fields = Fields()
    fields.feed(b'{"')
    for _ in range(1000):
        fields.feed(b"n" * 1000)
    assert sum(len(one) for one in vars(fields).values() if isinstance(one, bytes)) < 10_000
    assert len(fields.feed(b'":1,"\\ud800":2,"\\x":3,"model":"')) == 4


# --- with both ends in hand


@pytest.fixture
def fresh(ends: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The connections that are made; `refuses` has them fail."""
    made = SimpleNamespace(engines=[], wires=[], refuses=False)

    async def connect(connections: Connections) -> Connection:
        if made.refuses:
            raise UpstreamLost("nobody is there")
        engine, wire = Connection(connections), Wire()
        engine.connection_made(wire)  # type: ignore[arg-type]
        made.engines.append(engine)
        made.wires.append(wire)
        return engine

    monkeypatch.setattr(Connections, "connect", connect)
    return made


async def begin(ends: SimpleNamespace, body: bytes = LARGE, size: int = PART) -> bytes:
    """Send the head and so much of the body; what is left."""
    ends.client.data_received(HEAD % len(body) + body[:size])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return body[size:]


async def test_a_large_request_passes_on_while_it_comes_by_a_fresh_connection(
    ends: SimpleNamespace, fresh: SimpleNamespace
) -> None:
    left = await begin(ends)
    sent = fresh.wires[0].taken()
    assert b"content-length: %d\r\n" % len(LARGE) in sent
    body = sent.partition(b"\r\n\r\n")[2]
    assert len(body) == PART
    splice = ends.client._splice
    assert (splice.sent, splice.body, splice.head) == (b"", b"", None)  # the engine has it
    while left:
        ends.client.data_received(left[:PART])
        body += (part := fresh.wires[0].taken())
        assert part == left[:PART]
        left = left[PART:]
    assert body == LARGE
    assert ends.to_engine.sent == b""
    fresh.engines[0].data_received(WHOLE)
    assert ends.to_client.taken().endswith(WHOLE.partition(b"\r\n\r\n")[2])
    assert (ends.replica.in_flight, ends.replica.served) == (0, 1)
    assert ends.connections.idle == [ends.engine]  # one more for each would be many
    assert fresh.wires[0].end == "closed"


async def test_an_engine_that_takes_it_slowly_slows_the_client(ends: SimpleNamespace, fresh: SimpleNamespace) -> None:
    ends.client.data_received(HEAD % len(LARGE) + LARGE[:PART])
    assert ends.to_client.is_read_paused  # until there is a connection
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not ends.to_client.is_read_paused
    fresh.engines[0].pause_writing()
    assert ends.to_client.is_read_paused
    fresh.engines[0].resume_writing()
    assert not ends.to_client.is_read_paused


async def test_what_is_changed_for_the_engine_as_a_whole_is_read_whole(
    ends: SimpleNamespace, fresh: SimpleNamespace
) -> None:
    body = b'{"model":"mock","content":"%b","prompt":"x"}' % PAD
    head = (HEAD % len(body)).replace(b"/v1/completions", b"/tokenize")
    ends.client.data_received(head + body[:PART])
    await asyncio.sleep(0)
    ends.client.data_received(body[PART:])
    assert not fresh.engines
    assert ends.to_engine.sent


async def test_an_answer_before_the_request_has_gone_out_leaves_a_connection_that_nobody_waits_behind(
    ends: SimpleNamespace, fresh: SimpleNamespace
) -> None:
    ends.connections.idle.clear()
    ends.client.data_received(await begin(ends))
    fresh.wires[0].unsent = 1
    fresh.engines[0].data_received(WHOLE)
    assert ends.to_client.taken().startswith(b"HTTP/1.1 200")
    assert fresh.wires[0].end == "aborted"
    assert not ends.connections.idle


async def test_whoever_has_sent_it_all_is_listened_to(ends: SimpleNamespace, fresh: SimpleNamespace) -> None:
    ends.client.data_received(await begin(ends))
    fresh.engines[0].pause_writing()
    assert not ends.to_client.is_read_paused


async def test_what_comes_before_there_is_a_connection_goes_out_by_it(
    ends: SimpleNamespace, fresh: SimpleNamespace
) -> None:
    ends.client.data_received(HEAD % len(LARGE) + LARGE[:PART])
    ends.client.data_received(LARGE[PART:])
    await asyncio.sleep(0)
    assert fresh.wires[0].taken().partition(b"\r\n\r\n")[2] == LARGE
    fresh.engines[0].data_received(WHOLE)
    assert ends.to_client.taken().startswith(b"HTTP/1.1 200")


async def test_what_is_all_there_at_once_goes_out_as_any_other(ends: SimpleNamespace, fresh: SimpleNamespace) -> None:
    ends.client.data_received(HEAD % len(LARGE) + LARGE)
    assert ends.to_engine.taken().endswith(LARGE)
    assert not fresh.engines


async def test_an_engine_that_takes_even_the_beginning_slowly_slows_the_client(
    ends: SimpleNamespace, fresh: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wire, "writelines", lambda wire, parts: fresh.engines[0].pause_writing())
    await begin(ends)
    assert ends.to_client.is_read_paused
    fresh.engines[0].resume_writing()
    assert not ends.to_client.is_read_paused


async def test_whoever_leaves_in_the_middle_has_asked_nothing(ends: SimpleNamespace, fresh: SimpleNamespace) -> None:
    await begin(ends)
    tally = ends.client._splice.terms.tally
    answered = sum(tally.answered.values())
    ends.client.connection_lost(None)
    assert sum(tally.answered.values()) == answered
    assert fresh.wires[0].end == "aborted"
    assert ends.replica.in_flight == ends.connections.asking == 0


async def test_an_answer_before_the_end_of_the_request_ends_the_engines_connection_alone(
    ends: SimpleNamespace, fresh: SimpleNamespace
) -> None:
    left = await begin(ends)
    fresh.engines[0].pause_writing()
    fresh.engines[0].data_received(b"HTTP/1.1 413 No\r\ncontent-length: 2\r\n\r\n{}")
    assert ends.to_client.taken().startswith(b"HTTP/1.1 413")
    assert fresh.wires[0].end == "aborted"
    assert not ends.to_client.is_read_paused
    assert not ends.client.is_between_requests()
    ends.client.data_received(left)  # nobody needs it
    assert ends.client.is_between_requests()
    ends.client.data_received(HEAD % 29 + b'{"model":"mock","prompt":"x"}')
    assert ends.to_engine.taken().endswith(b"}")
    ends.engine.data_received(WHOLE)
    assert ends.to_client.taken().startswith(b"HTTP/1.1 200")


async def test_what_cannot_be_connected_is_the_plain_routes_with_all_of_its_body(
    ends: SimpleNamespace, fresh: SimpleNamespace
) -> None:
    fresh.refuses = True
    ends.client.data_received(HEAD % len(LARGE) + LARGE[: PART // 2])
    ends.client.data_received(LARGE[PART // 2 : PART])
    await asyncio.sleep(0)
    assert not ends.to_client.is_read_paused
    assert ends.client.cycle.more_body
    ends.client.data_received(LARGE[PART:])
    assert ends.client.cycle.body == LARGE
    assert not ends.client.cycle.more_body
    assert ends.replica.in_flight == 0
    await asyncio.gather(*ends.client.tasks, return_exceptions=True)


async def test_a_field_that_changes_the_request_and_comes_late_is_asked_for_again_once(
    ends: SimpleNamespace, fresh: SimpleNamespace
) -> None:
    body = LARGE[:-1] + b',"enable_thinking":true}'
    left = await begin(ends, body)
    ends.client.data_received(left)
    told = ends.to_client.taken()
    assert told.startswith(b"HTTP/1.1 503")
    assert b"send_again" in told
    assert b"retry-after: 0" in told
    assert fresh.wires[0].end == "aborted"
    left = await begin(ends, body)  # from now on they are read whole
    ends.client.data_received(left)
    assert len(fresh.engines) == 1
    assert b'"chat_template_kwargs"' in ends.to_engine.taken()
    ends.engine.data_received(WHOLE)
    assert ends.to_client.taken().startswith(b"HTTP/1.1 200")
    assert ends.replica.in_flight == 0


async def test_a_field_that_comes_late_after_the_engine_is_lost_makes_no_second_answer(
    ends: SimpleNamespace, fresh: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_confirmed = asyncio.Event()
    ends.replica.confirm = is_confirmed.wait
    ends.replica.failure = None
    left = await begin(ends, LARGE[:-1] + b',"enable_thinking":true}')
    fresh.engines[0].connection_lost(None)
    await asyncio.sleep(0)
    ends.client.data_received(left)
    is_confirmed.set()
    await asyncio.gather(*ends.client.tasks, return_exceptions=True)
    assert ends.to_client.taken().count(b"HTTP/1.1 ") == 1
    assert (ends.replica.in_flight, ends.replica.served) == (0, 0)


@pytest.mark.parametrize("is_handed_over", [False, True])
@pytest.mark.parametrize("begun", [b"", STREAM[: STREAM.index(b"3e\r\n")]])
async def test_an_engine_that_is_lost_in_the_middle_is_told_once(
    ends: SimpleNamespace, fresh: SimpleNamespace, begun: bytes, is_handed_over: bool
) -> None:
    ends.replica.confirm, ends.replica.failure = partial(asyncio.sleep, 0), None
    left = await begin(ends)
    fresh.engines[0].data_received(begun)
    fresh.engines[0].connection_lost(None)
    ends.client._splice.deployment.is_handed_over = is_handed_over
    await asyncio.gather(*ends.client.tasks)
    told = ends.to_client.taken()
    assert told.count(b"HTTP/1.1 ") == 1
    assert told.startswith(b"HTTP/1.1 200" if begun else b"HTTP/1.1 503" if is_handed_over else b"HTTP/1.1 502")
    assert ((RESTARTED_MIDWAY if is_handed_over else "went away while it answered").encode()) in told
    assert (ends.replica.in_flight, ends.replica.served) == (0, 0)
    ends.client.data_received(left)  # nobody needs it
    assert ends.client.is_between_requests()


async def test_a_field_that_comes_late_changes_nothing_of_an_answer_that_has_begun(
    ends: SimpleNamespace, fresh: SimpleNamespace
) -> None:
    left = await begin(ends, LARGE[:-1] + b',"enable_thinking":true}')
    middle = STREAM.index(b"3e\r\n")
    fresh.engines[0].data_received(STREAM[:middle])
    ends.client.data_received(left)
    fresh.engines[0].data_received(STREAM[middle:])
    told = ends.to_client.taken()
    assert told.count(b"HTTP/1.1 ") == 1
    assert told.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert ends.replica.in_flight == 0


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":"%b","model":"mock"}' % PAD,
        b'{"model":"mock","enable_thinking":true,"prompt":"%b"}' % PAD,
        b'{"model":"mock","prompt":"%b"}' % PAD[: UPLOAD_BYTES - 50],
        b'{"model":5,"prompt":"%b"}' % PAD,
    ],
)
async def test_what_is_not_known_from_the_beginning_is_read_whole(
    ends: SimpleNamespace, fresh: SimpleNamespace, body: bytes
) -> None:
    left = await begin(ends, body)
    ends.client.data_received(left[:-1])
    await asyncio.sleep(0)
    assert not ends.to_engine.sent
    assert not fresh.engines
    ends.client.data_received(body[-1:])
    assert ends.to_engine.sent or ends.client.tasks
    await asyncio.gather(*ends.client.tasks, return_exceptions=True)


@pytest.mark.parametrize("own", [b"", b',"stream_options":{"include_usage":true}'])
async def test_a_streams_tokens_are_asked_for_and_told_to_whom_has_asked(
    ends: SimpleNamespace, fresh: SimpleNamespace, own: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.llama_cpp.LlamaCpp.asks_for_usage", True)
    body = b'{"model":"mock","stream":true,"prompt":"%b"%b}' % (PAD, own)
    left = await begin(ends, body)
    ends.client.data_received(left)
    sent = fresh.wires[0].taken()
    assert b'\r\n\r\n{"stream_options":{"include_usage":true},"model"' in sent
    assert b"content-length: %d\r\n" % len(sent.partition(b"\r\n\r\n")[2]) in sent
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
    top = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n"
    fresh.engines[0].data_received(top % len(usage) + usage)
    assert (usage in ends.to_client.taken()) == bool(own)


@pytest.mark.parametrize("first", [1, FIRST_LOOK_BYTES - 1, FIRST_LOOK_BYTES, 600_000])
async def test_it_passes_on_however_its_beginning_comes(
    ends: SimpleNamespace, fresh: SimpleNamespace, first: int
) -> None:
    left = await begin(ends, size=first)
    ends.client.data_received(left[:PART])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    ends.client.data_received(left[PART:])
    assert fresh.wires[0].taken().endswith(LARGE)


async def test_it_passes_on_though_its_beginning_tells_nothing_yet(
    ends: SimpleNamespace, fresh: SimpleNamespace
) -> None:
    body = b'{"model":"mock",%b"prompt":"%b"}' % (b" " * 2 * FIRST_LOOK_BYTES, PAD)
    left = await begin(ends, body, size=FIRST_LOOK_BYTES + 100)
    assert not fresh.engines
    ends.client.data_received(left[:PART])
    await asyncio.sleep(0)
    ends.client.data_received(left[PART:])
    assert fresh.wires[0].taken().endswith(body)


@pytest.mark.parametrize("place", ["gateway.api.beginning.Fields.feed", "gateway.connections.Connection.more"])
async def test_a_fault_of_ours_in_the_middle_is_answered_and_nothing_stays_in_use(
    ends: SimpleNamespace, fresh: SimpleNamespace, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = await begin(ends)
    monkeypatch.setattr(place, lambda *of_it: 1 / 0)
    ends.client.data_received(left)
    assert ends.to_client.taken().startswith(b"HTTP/1.1 500")
    assert fresh.wires[0].end == "aborted"
    assert ends.replica.in_flight == ends.connections.asking == 0
    assert ends.client.is_between_requests()


async def test_a_client_that_sends_nothing_more_is_not_waited_for_but_an_engine_is(
    ends: SimpleNamespace, fresh: SimpleNamespace
) -> None:
    left = await begin(ends)
    for after_s in (0, 100, 200):
        ends.client.data_received(left[after_s : after_s + 100])
        ends.client.end_if_quiet(after_s)
    fresh.engines[0].pause_writing()
    for after_s in (300, 400, 500):
        ends.client.end_if_quiet(after_s)
    assert ends.to_client.end is None
    fresh.engines[0].resume_writing()
    for after_s in (600, 700):
        ends.client.end_if_quiet(after_s)
    assert ends.to_client.end == "closed"


async def test_a_stream_is_an_answer_too(ends: SimpleNamespace, fresh: SimpleNamespace) -> None:
    left = await begin(ends)
    ends.client.data_received(left)
    fresh.engines[0].data_received(STREAM)
    assert ends.to_client.taken().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert ends.replica.in_flight == 0


CHUNKED_HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(part: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(part), part)


def unchunked(sent: bytes) -> tuple[bytes, bool]:
    """The body so far, and whether it has its end."""
    head, _, rest = sent.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    assert b"content-length" not in head
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        if size == b"0":
            assert rest == b"\r\n"
            return body, True
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body, False


async def begin_in_chunks(ends: SimpleNamespace, body: bytes = LARGE) -> bytes:
    """Send so much that it is known to be large; what is left."""
    ends.client.data_received(CHUNKED_HEAD)
    while not ends.client._upload and body:
        ends.client.data_received(chunk(body[:PART]))
        body = body[PART:]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return body


async def test_a_large_request_in_chunks_passes_on_in_chunks_while_it_comes(
    ends: SimpleNamespace, fresh: SimpleNamespace
) -> None:
    left = await begin_in_chunks(ends)
    assert len(LARGE) - len(left) < UPLOAD_BYTES + PART
    sent = fresh.wires[0].taken()
    while left:
        ends.client.data_received(chunk(left[:PART]))
        sent += (part := fresh.wires[0].taken())
        assert left[:PART] in part
        assert not ends.client._parts
        left = left[PART:]
    assert unchunked(sent) == (LARGE, False)
    ends.client.data_received(b"0\r\nx-trailer: 1\r\n\r\n")
    assert unchunked(sent + fresh.wires[0].taken()) == (LARGE, True)
    fresh.engines[0].data_received(WHOLE)
    assert ends.to_client.taken().endswith(WHOLE.partition(b"\r\n\r\n")[2])
    assert (ends.replica.in_flight, ends.replica.served) == (0, 1)
    assert fresh.wires[0].end == "closed"


async def test_what_was_all_there_before_there_was_a_connection_says_how_long_it_is(
    ends: SimpleNamespace, fresh: SimpleNamespace
) -> None:
    ends.client.data_received(CHUNKED_HEAD + b"".join(map(chunk, (LARGE[:2_000_000], LARGE[2_000_000:]))) + chunk(b""))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    sent = fresh.wires[0].taken()
    assert b"content-length: %d\r\n\r\n" % len(LARGE) in sent
    assert sent.endswith(LARGE)


async def test_a_large_request_in_chunks_has_its_limit_too(ends: SimpleNamespace, fresh: SimpleNamespace) -> None:
    before = metrics.tally_of("mock").answered.copy()
    left = await begin_in_chunks(ends)
    limit_bytes = ends.client._door.fleet.settings.max_body_bytes
    for _ in range((limit_bytes - len(LARGE) + len(left)) // 1_000_000 + 1):
        assert not ends.to_client.sent
        ends.client.data_received(chunk(PAD[:1_000_000]))
        fresh.wires[0].taken()
    told = ends.to_client.taken()
    assert told.startswith(b"HTTP/1.1 413")
    assert b"`max_body_bytes` (%d bytes)" % limit_bytes in told
    assert metrics.tally_of("mock").answered == before  # as on the plain way, which reads it before all else
    assert fresh.wires[0].end == "aborted"
    assert ends.replica.in_flight == ends.connections.asking == 0
    ends.client.data_received(chunk(PAD) + chunk(b""))  # nobody needs it
    assert ends.client.is_between_requests()


async def test_an_answer_before_the_end_of_what_comes_in_chunks(ends: SimpleNamespace, fresh: SimpleNamespace) -> None:
    left = await begin_in_chunks(ends)
    fresh.engines[0].data_received(WHOLE)
    assert ends.to_client.taken().startswith(b"HTTP/1.1 200")
    assert fresh.wires[0].end == "aborted"
    ends.client.data_received(chunk(left) + chunk(b""))
    assert ends.client.is_between_requests()


async def test_chunks_that_an_engine_may_not_take_are_read_whole(
    ends: SimpleNamespace, fresh: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.llama_cpp.LlamaCpp.takes_chunks", False)
    assert not await begin_in_chunks(ends)
    assert not fresh.engines
    ends.client.data_received(chunk(b""))
    assert b"content-length: %d\r\n\r\n" % len(LARGE) in ends.to_engine.taken()


async def test_a_fault_of_ours_at_the_end_of_what_comes_in_chunks(
    ends: SimpleNamespace, fresh: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends.client.data_received(chunk(await begin_in_chunks(ends)))
    monkeypatch.setattr("gateway.connections.Connection.more", lambda *of_it, **named: 1 / 0)
    ends.client.data_received(chunk(b""))
    assert ends.to_client.taken().startswith(b"HTTP/1.1 500")
    assert fresh.wires[0].end == "aborted"
    assert ends.replica.in_flight == ends.connections.asking == 0


async def test_chunks_that_cannot_go_on_are_the_plain_routes(ends: SimpleNamespace, fresh: SimpleNamespace) -> None:
    fresh.refuses = True
    ends.client.data_received(CHUNKED_HEAD + chunk(LARGE[:UPLOAD_BYTES]))
    await asyncio.sleep(0)
    assert not ends.to_client.is_read_paused
    ends.client.data_received(chunk(LARGE[UPLOAD_BYTES:]))
    assert ends.client.cycle.more_body
    ends.client.data_received(chunk(b""))
    assert bytes(ends.client.cycle.body) == LARGE
    assert not ends.client.cycle.more_body
    assert ends.replica.in_flight == 0
    await asyncio.gather(*ends.client.tasks, return_exceptions=True)


# --- on real sockets


class _Taken:
    """What becomes of one request."""

    def __init__(self) -> None:
        self.end: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def took(self, connection: Connection, parts: list[bytes], *, is_whole: bool) -> None:
        if is_whole:
            self.end.set_result(connection.status)

    def lost(self, why: UpstreamLost) -> None:
        self.end.set_exception(why)

    def write_paused(self, *, is_paused: bool) -> None:
        """Nobody sends faster than it is taken."""


def _refuse_in_the_middle(listener: socket.socket, times: int) -> None:
    listener.settimeout(5)
    for _ in range(times):
        accepted, _ = listener.accept()
        with accepted:
            accepted.recv(1000)
            accepted.sendall(b"HTTP/1.1 413 No\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}")


async def test_what_an_engine_says_before_it_closes_in_the_middle_of_a_request_is_heard() -> None:
    times = 20
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = Connections(Endpoint(port=listener.getsockname()[1]))
        engine = asyncio.create_task(asyncio.to_thread(_refuse_in_the_middle, listener, times))
        for _ in range(times):
            connection, taken = await connections.connect(), _Taken()
            connection.ask(taken, HEAD % 10_000_000, b"y" * PART, 10_000_000 - PART)
            for _ in range(99):
                if not taken.end.done():
                    connection.more(b"y" * PART)
                    await asyncio.sleep(0)
            assert await asyncio.wait_for(taken.end, 5) == 413
        await engine
    assert connections.asking == 0


@pytest.mark.both_doors
async def test_a_large_request_is_answered_and_one_over_the_limit_is_not(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    events = tmp_path / "events"
    gateway = await start_gateway(fake={"events_file": str(events)}, max_body_bytes=11_000_000)
    sent = []
    for size in (2_000_000, 10_000_000):
        body = json.dumps({"model": "fake", "stream": False, "prompt": "y" * size}).encode()
        sent.append(len(body))
        assert (await gateway.post("/v1/completions", body)).status == 200
    assert [event["bytes"] for event in events_in(events, "request")] == sent
    assert (await gateway.complete(prompt="y" * 11_000_000)).status == 413
    await gateway.until(in_flight=0)


@pytest.mark.both_doors
async def test_a_client_that_leaves_an_engine_that_takes_nothing_is_noticed(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    await gateway.complete()
    engine = (await gateway.replicas())[0]["pid"]
    os.kill(engine, signal.SIGSTOP)
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", int(gateway.address.rpartition(":")[2]))
        body = b'{"model":"fake","prompt":"' + b"y" * 1_500_000 + b'"}'
        writer.write(HEAD.replace(b"%d", b"%d" % len(body)) + body)
        await gateway.until(in_flight=1, limit_s=5)
        # At once: else its end stands behind what the gateway does not read, where the system tells nobody of it.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await gateway.until(in_flight=0, limit_s=2)
    finally:
        os.kill(engine, signal.SIGCONT)


@pytest.mark.both_doors
async def test_an_engine_that_hangs_is_ended_though_a_client_goes_on_sending(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, probe_interval_s=0.3, probe_failures=2)
    await gateway.complete()
    engine = (await gateway.replicas())[0]["pid"]
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.address.rpartition(":")[2]))
    body = b'{"model":"fake","prompt":"' + b"y" * 1_500_000 + b'"}'
    writer.write(HEAD % len(body) + body[:PART])
    await asyncio.sleep(0.2)
    os.kill(engine, signal.SIGSTOP)
    at = PART
    async with asyncio.timeout(10):
        while (await gateway.replicas())[0]["pid"] == engine:
            writer.write(body[at : at + 1])
            at += 1
            await asyncio.sleep(0.05)
    writer.write(body[at:])
    assert (await reader.readline()).split()[1] in (b"200", b"502")
    writer.close()


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("door", ["auto"], indirect=True)
async def test_a_large_request_takes_about_as_much_memory_as_any(
    start_gateway: StartGateway, tmp_path: Path, *, is_chunked: bool
) -> None:
    events = tmp_path / "events"
    gateway = await start_gateway(fake={"events_file": str(events)}, max_body_bytes=2**27)
    proc = Path(f"/proc/{gateway.process.pid}")

    async def send(size: int) -> None:
        body = b'{"model":"fake","stream":false,"prompt":"' + b"y" * size + b'"}'

        async def parts() -> AsyncIterator[bytes]:
            for begin in range(0, len(body), PART):
                yield body[begin : begin + PART]

        assert (await gateway.request("POST", "/v1/completions", data=parts() if is_chunked else body)).status == 200
        assert events_in(events, "request")[-1]["bytes"] == len(body)

    def peak_kib() -> int:
        return int((proc / "status").read_text().partition("VmHWM:")[2].split()[0])

    await send(2_000_000)
    (proc / "clear_refs").write_text("5")
    before = peak_kib()
    await send(100_000_000)
    assert peak_kib() - before < 12 * 1024
