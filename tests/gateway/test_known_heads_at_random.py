"""Connections made up at random: who remembers heads says byte for byte what one says that parses each.

More cases than in every run:

    HOSTLER_FUZZ_CASES=50000 HOSTLER_FUZZ_SEED=7 python -m pytest tests/gateway/test_known_heads_at_random.py
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from both_ends import REPLY, STREAM, WHOLE, ends_at

from gateway import metrics, passed_on
from gateway.door.protocol import DoorProtocol
from gateway.door.splice import Splice

CASES = int(os.environ.get("HOSTLER_FUZZ_CASES", "500"))
SEED = int(os.environ.get("HOSTLER_FUZZ_SEED", "1"))
STEPS = 14
ZEROS = re.compile(rb"(\r\ncontent-length: )0+(?=\d)")  # engines may write them; the same number all the same
NEVER = -(10**9)
OWN_ID = re.compile(rb"x-request-id: [0-9a-f]{32}")
LINES = (b"x-content-length: 3", b"x-note: content-length: 9", b"accept: */*", b"Connection: keep-alive", b"x: caf\xe9")
ODD_LINES = (
    *(b"x-request-id: mine", b"Content-Length: 1", b"transfer-encoding: chunked", b"Transfer-Encoding: identity"),
    *(b"connection: close", b"connection: x-hop", b"upgrade: h2c", b"x-api-key: k", b"origin: http://evil.example"),
    *(b" folded", b"x: a\nb: c", b"x: \0", b"content-length : 1", b"host: other", b"x:y\r"),
)
LENGTHS = (b"%d", b"%d ", b"0%d", b"+%d", b"-%d", b" %d", b"%d, %d", b"1%d", b"%d1", b"0x%d", b"00000000000000%d")
BODIES = tuple(
    b'{"model":"mock","messages":[{"role":"user"}],"input":"x","prompt":"%b"}' % (b"p" * size)
    for size in (0, 1, 71, 200, 5_000, 90_000)
)
OTHER_BODIES = (b"", b"{", b"{}", b'{"model":"other"}', BODIES[0] + b"\r\n", b"\r\ncontent-length: 5\r\n\r\n", b"\0")


def head_of(rng: random.Random) -> bytes:
    """With a place for the length."""
    lines = [b"host: localhost", rng.choice((b"content-length", b"Content-Length")) + b": <length>"]
    lines += rng.sample(LINES, rng.choice((0, 0, 1, 2)))
    lines += [b"Expect: 100-continue"] * (not rng.randrange(20))
    rng.shuffle(lines)
    path = rng.choice((b"/v1/completions", b"/v1/chat/completions", b"/v1/embeddings"))
    return b"\r\n".join([b"POST %b HTTP/1.1" % path, *lines, b"", b""])


def request(rng: random.Random, head: bytes) -> bytes:
    """Most are as the last one but for their length."""
    body = rng.choice(BODIES) if rng.randrange(60) else rng.choice(OTHER_BODIES)
    length = b"%d" % len(body)
    match rng.randrange(100):
        case 0:
            length = rng.choice(LENGTHS).replace(b"%d", length)
        case 1:
            head = head.replace(b"\r\n\r\n", b"\r\n" + rng.choice(ODD_LINES) + b"\r\n\r\n")
        case 2:
            head = head.replace(b"HTTP/1.1", rng.choice((b"HTTP/1.0", b"HTTP/1.1 ", b"HTTP/2.0", b"http/1.1")))
        case 3:
            head = rng.choice(
                (head.replace(b"\r\n", b"\n"), head.upper().replace(b"<LENGTH>", b"<length>"), b"\r\n" + head)
            )
        case 4:
            body += rng.choice((b"\r\n", b"\r\n\r\n", b"x", b"\0", head[:20]))
        case 5:
            body += head.replace(b"<length>", length) + body
        case 6:
            head = head.replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n")
        case 7:
            at = rng.randrange(len(head))
            head = head[:at] + bytes([head[at] ^ 0x20]) + head[at + 1 :]
    return head.replace(b"<length>", length) + body


def reply(rng: random.Random) -> bytes:
    """Of these, too, most are alike."""
    said = rng.choice((REPLY, REPLY, REPLY, WHOLE, WHOLE, STREAM))
    match rng.randrange(80):
        case 0:
            said = said.replace(b"200 OK", rng.choice((b"201 Created", b"204 None", b"400 Bad", b"503 Off")))
        case 1:
            said = rng.choice((b"HTTP/1.1 100 Continue", b"HTTP/1.1 103 X\r\ncontent-length: 2")) + b"\r\n\r\n" + said
        case 2:
            said = said.replace(b"\r\n\r\n", b"\r\n" + rng.choice((*LINES, *ODD_LINES)) + b"\r\n\r\n", 1)
        case 3:
            said += rng.choice((said, b"x", b"\r\n"))
        case 4:
            said = said.replace(b"content-length: ", rng.choice((b"content-length: 0", b"content-length: +", b"a: ")))
        case 5:
            said = said.replace(b"application/json", b"text/event-stream")
    return said


def parts_of(rng: random.Random, data: bytes, at: int) -> list[bytes]:
    """As they may be read; `at` is a place that is likelier than others."""
    places = {0, len(data)}
    match rng.randrange(6):
        case 0:
            places |= {rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 4))}
        case 1:
            places.add(min(len(data), max(0, at + rng.choice((-2, -1, 0, 0, 0, 0, 1)))))
    return [data[begin:end] for begin, end in itertools.pairwise(sorted(places)) if begin < end]


def shown(ends: SimpleNamespace) -> dict[str, Any]:
    """All that anybody sees."""
    client, cycle = ends.client, ends.client.cycle
    is_plain = cycle is not None and not isinstance(cycle, Splice)
    return {
        "to client": ZEROS.sub(b"\\1", OWN_ID.sub(b"<id>", ends.to_client.taken())),
        "to engine": OWN_ID.sub(b"<id>", ends.to_engine.taken()),
        "ends": (ends.to_client.end, ends.to_engine.end),
        "paused": (ends.to_client.is_read_paused, ends.to_engine.is_read_paused),
        "in flight": (ends.replica.in_flight, ends.replica.served, ends.connections.asking, len(ends.connections.idle)),
        "plain": (cycle.scope["raw_path"], cycle.scope["headers"], bytes(cycle.body), cycle.more_body)
        if is_plain
        else 0,
        "tasks": (len(client.tasks), len(client.pipeline)),
        "between requests": passed_on.is_between_requests(client),
        "total": client.server_state.total_requests,
    }


def steps_of(rng: random.Random) -> Iterator[tuple[str, Any]]:
    """What comes to pass on a client's connection and an engine's."""
    heads = [head_of(rng)] * 6 + [head_of(rng)]
    clock = time.monotonic()
    for _ in range(STEPS):
        whole = request(rng, rng.choice(heads))
        for part in parts_of(rng, whole, whole.find(b"\r\n\r\n") + 4):
            yield "client", part
            if not rng.randrange(30):
                clock += rng.choice((1, 1, 70))
                yield "sweep", clock
        match rng.randrange(100):
            case 0:
                yield "settings", {"api_keys": ("other",)}
            case 1:
                yield "settings", {"max_body_bytes": rng.choice((50, 100, 200, 300, 5_100))}
            case 2:
                yield "shutdown", None
            case 3:
                yield "paused", None
            case 4:
                yield "left", None
            case 5:
                yield "resumed", None
        said = reply(rng)
        for part in parts_of(rng, said, said.find(b"\r\n\r\n") + 4):
            yield "engine", part


def short(value: object) -> str:
    """Without long runs of the same."""
    return re.sub(r"(.)\1{20,}", r"\1...", str(value))[-4000:]


def take(ends: SimpleNamespace, what: str, value: Any) -> None:
    client, fleet = ends.client, ends.client._door.fleet
    match what:
        case "client":
            client.data_received(value)
        case "engine":
            ends.engine.data_received(value)
        case "sweep":
            client.end_if_quiet(value)
        case "settings":
            fleet.settings = msgspec.structs.replace(fleet.settings, **value)
        case "shutdown":
            client.shutdown()
        case "paused":
            client.pause_writing()
        case "resumed":
            client.resume_writing()
        case "left":
            client.connection_lost(None)


async def test_whoever_remembers_heads_says_what_one_says_that_parses_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[str] = Counter()
    answer, tells_known = DoorProtocol._answer, Splice._tells_known

    def note_answer(self: DoorProtocol, inference: Any, body: bytes, known: Any = None) -> None:
        seen["known request" if known else "parsed request"] += 1
        answer(self, inference, body, known)

    def note_told(self: Splice, *of_reply: Any) -> bool:
        seen["known reply"] += (is_known := tells_known(self, *of_reply))
        return is_known

    monkeypatch.setattr(DoorProtocol, "_answer", note_answer)
    monkeypatch.setattr(Splice, "_tells_known", note_told)
    tally = metrics.tally_of("mock")
    for number in range(CASES):
        rng = random.Random(f"{SEED}-{number}")
        remembers, parses = ends_at(tmp_path), ends_at(tmp_path)
        parses.client._strange = parses.engine._strange = NEVER
        both = remembers, parses
        past = []
        for what, value in steps_of(rng):
            if what == "engine" and (remembers.engine._taker is None or remembers.to_engine.end):
                continue
            if what == "settings" and remembers.client._held:  # it will be asked by those that are new then
                continue
            past.append((what, value))
            counts = []
            for one in both:
                before = tally.prompt_tokens, tally.completion_tokens, tally.durations.total_s > 0
                take(one, what, value)
                counts.append((tally.prompt_tokens - before[0], tally.completion_tokens - before[1]))
            first, second = map(shown, both)
            assert (first, counts[0]) == (second, counts[1]), f"case {number}: {short(past)}"
            seen["held"] += bool(remembers.client._held)
            if what == "left" or remembers.client.tasks or remembers.to_client.end:
                break  # the plain way's, or over
        assert parses.client._known is parses.engine.known is None
        for one in both:
            if what != "left":
                one.client.connection_lost(None)
            for task in (tasks := tuple(one.client.tasks)):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert one.replica.in_flight == 0
    assert min(seen["known request"], seen["known reply"], seen["held"]) > CASES // 2, seen
