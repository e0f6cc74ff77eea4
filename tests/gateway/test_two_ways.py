"""The short way in and the plain one, by the same requests: the same answers, the same for the engine, the same counts.

Requests, engines and connections are made up at random, misbehaviour included. More cases than in every run:

    HOSTLER_FUZZ_CASES=5000 HOSTLER_FUZZ_SEED=7 python -m pytest tests/gateway/test_two_ways.py -k random
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from socket import SHUT_WR, SO_LINGER, SOL_SOCKET
from typing import Any, NamedTuple

import httptools
from harness import Gateway, StartGateway

ENGINE = Path(__file__).parents[1] / "scripted_engine.py"
CASES = int(os.environ.get("HOSTLER_FUZZ_CASES", "100"))
SEED = int(os.environ.get("HOSTLER_FUZZ_SEED", "1"))
KEY = "a-key"
LIMIT_BYTES = 2_000_000
UPLOAD_BYTES = 1_200_000  # passed on while it comes, if the head stands before what is large
LEFT_S = 10.0  # until all is quiet behind a case
QUIET_S = 8.0  # a connection that says nothing for so long is a fault
# Each in the same engine; what the second one says by its own name is read as a whole, as clients are told ours.
MODELS = {"fake": "fake", "named": "theirs"}
OF_THE_MOMENT = {"date", "x-request-id", "x-hostler-queue-ms"}
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/messages", "/v1/responses", "/tokenize")
COUNTED = re.compile(
    r"^hostler_(requests_total|requests_cancelled_total|request_retries_total|finish_reasons_total|.*_tokens_total"
    r"|.*_seconds_count)\b"
)
HEAD = re.compile(r"HTTP/1\.[01] [2-5]\d\d .*?\r\n\r\n", re.DOTALL)
OF_TOKENS = re.compile("token|finish")


class LeftOver(Exception):
    """A request has not come to its end, though its client and its script have; the text says what is known."""


class Told(int):
    """Until so many replies are there."""


Sent = tuple[bytes | float | Told, ...]


class Case(NamedTuple):
    """What a client does on one connection."""

    sent: Sent  # what it sends, and pauses
    leaves: str | None  # "close" or "reset", once `reads` replies have begun
    reads: int
    asked: int  # how many replies there should be at most
    scripts: tuple[Any, ...]


# --- what engines say


def reply(rng: random.Random, path: str, *, is_last: bool = False) -> list[Any]:
    """A script."""
    made = rng.choices(REPLIES, [weight for _, weight in WEIGHED])[0]
    if made is talkative and not is_last:  # what it says too much, the next request may take for its reply, or not
        made = whole
    return made(rng, path)


def head(rng: random.Random, status: int, *lines: str, version: str = "HTTP/1.1") -> str:
    more = [
        "Server: odd",
        "Date: Thu, 01 Jan 1970 00:00:00 GMT",
        "Set-Cookie: a=b",
        "X-One: 1",
        "x-one: 2",
        "X-Text: caf\xe9 \t x",
        "x-empty:",
        "Keep-Alive: timeout=5",
        "x-request-id: theirs",
        "access-control-allow-origin: *",
        "Cache-Control: max-age=1",
        "Retry-After: 7",
        "Trailer: x",
        "Connection: x-hop, Keep-Alive\r\nX-Hop: 1",
        "X-Text: caf\xc3\xa9",
    ]
    chosen = [*lines, *rng.sample(more, rng.choice((0, 0, 1, 3)))]
    rng.shuffle(chosen)
    return (
        f"{version} {status} {rng.choice(('OK', 'Whatever it is', ''))}\r\n"
        + "".join(f"{one}\r\n" for one in chosen)
        + "\r\n"
    )


def cut(rng: random.Random, data: str, most: int = 4) -> list[Any]:
    """In parts, with pauses here and there."""
    if not rng.randrange(3):
        return [data]
    places = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(rng.randrange(most)))})
    steps: list[Any] = []
    for begin, end in itertools.pairwise(places):
        steps += [data[begin:end], rng.choice((0, 0.001, 0.004))]
    return steps


def text_of(rng: random.Random, path: str) -> str:
    said: Any = {
        "id": "x",
        "model": rng.choice((*MODELS.values(), "fake")),
        "choices": [{"delta": {}}],
        "text": "caf\u00e9" * rng.choice((1, 9, 9000)),
    }
    if rng.randrange(2):
        said |= {"finish_reason": rng.choice(("stop", "odd")), "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    data = json.dumps(said, separators=rng.choice(((",", ":"), (", ", ": "))))
    return rng.choice((data, data, data, data, "{}", "{", "", "[1]", " " + data, "no json"))


def chunks(rng: random.Random, text: str, *, is_ended: bool = True) -> str:
    places = sorted({0, len(text), *(rng.randrange(len(text) + 1) for _ in range(rng.randrange(5)))})
    parts = [text[begin:end] for begin, end in itertools.pairwise(places)]
    mark = rng.choice(("", "", ";a=b"))
    said = "".join(f"{len(part):x}{mark}\r\n{part}\r\n" for part in parts)
    return said + (f"0\r\n{rng.choice(TRAILERS)}\r\n" if is_ended else "")


TRAILERS = ("", "", "", "x-trailer: 1\r\n", "Retry-After: 9\r\nSet-Cookie: t=1\r\n", "x-trailer: caf\xe9\r\n")
JSON = ("Content-Type: application/json", "content-type: application/json; charset=utf-8", "Content-Type: text/plain")


def whole(rng: random.Random, path: str) -> list[Any]:
    text = text_of(rng, path)
    more = rng.choice(((), (), (), ("Connection: close",), ("Connection: keep-alive",), ("content-encoding: gzip",)))
    script = cut(rng, head(rng, 200, rng.choice(JSON), f"Content-Length: {len(text)}", *more) + text)
    return [*script, *(["close"] if more == ("Connection: close",) else [])]


def chunked(rng: random.Random, path: str) -> list[Any]:
    return cut(rng, head(rng, 200, rng.choice(JSON), "Transfer-Encoding: chunked") + chunks(rng, text_of(rng, path)))


def until_close(rng: random.Random, path: str) -> list[Any]:
    version = rng.choice(("HTTP/1.0", "HTTP/1.1"))
    more = rng.choice(((), ("Connection: close",)))
    return [*cut(rng, head(rng, 200, rng.choice(JSON), *more, version=version) + text_of(rng, path)), "close"]


def old(rng: random.Random, path: str) -> list[Any]:
    text = text_of(rng, path)
    return [
        *cut(rng, head(rng, 200, rng.choice(JSON), f"Content-Length: {len(text)}", version="HTTP/1.0") + text),
        "close",
    ]


def events(rng: random.Random) -> str:
    end = rng.choice(("\n\n", "\n\n", "\r\n\r\n"))
    named = '{"model": "theirs","choices":[{"delta":{"content":"t"}}]}'
    one = named, named.replace("theirs", "fake"), '{"choices":[{"delta":{}}]}', "x" * 5000
    said = [f"data: {rng.choice(one)}{end}" for _ in range(rng.randrange(12))]
    if not rng.randrange(3):
        usage = '{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
        said.append(f"data: {usage}{end}")
    return "".join([*said, rng.choice((f"data: [DONE]{end}", "", "data: half"))])


SSE = (
    "Content-Type: text/event-stream",
    "content-type: text/event-stream; charset=utf-8",
    "Content-Type: Text/Event-Stream",
)


def stream(rng: random.Random, path: str) -> list[Any]:
    return cut(rng, head(rng, 200, rng.choice(SSE), "Transfer-Encoding: chunked") + chunks(rng, events(rng)), 12)


def measured_stream(rng: random.Random, path: str) -> list[Any]:
    text = events(rng)
    return cut(rng, head(rng, 200, rng.choice(SSE), f"Content-Length: {len(text)}") + text, 12)


def stream_until_close(rng: random.Random, path: str) -> list[Any]:
    return [*cut(rng, head(rng, 200, rng.choice(SSE), "Connection: close") + events(rng), 12), "close"]


def broken_stream(rng: random.Random, path: str) -> list[Any]:
    text = chunks(rng, events(rng) + "data: {}\n\n", is_ended=False)
    if rng.randrange(2):
        text = text[: rng.randrange(len(text))] or text
    text = head(rng, 200, rng.choice(SSE), "Transfer-Encoding: chunked") + text
    return [*cut(rng, text, 8), 0.02, rng.choice(("close", "reset"))]


def broken_whole(rng: random.Random, path: str) -> list[Any]:
    text = text_of(rng, path) + "x" * 50
    text = head(rng, 200, rng.choice(JSON), f"Content-Length: {len(text)}") + text[: rng.randrange(1, len(text))]
    return [*cut(rng, text), 0.02, rng.choice(("close", "reset"))]


def broken_head(rng: random.Random, path: str) -> list[Any]:
    text = head(rng, 200, rng.choice(JSON), "Content-Length: 9")
    return [text[: rng.randrange(len(text) + 1)], 0.02, rng.choice(("close", "reset"))]


def dropped(rng: random.Random, path: str) -> list[Any]:
    return [rng.choice((0, 0.01)), rng.choice(("close", "reset"))]


def bodiless(rng: random.Random, path: str) -> list[Any]:
    status = rng.choice((204, 204, 304, 200, 205))
    more = ["Content-Length: 0"] if status in (200, 205) else rng.choice(([], ["Content-Length: 5"]))
    return [head(rng, status, *more)]


def interim(rng: random.Random, path: str) -> list[Any]:
    before = [f"HTTP/1.1 {rng.choice((100, 102, 103))} Wait\r\nlink: </x>\r\n\r\n" for _ in range(rng.randrange(1, 3))]
    return [*before, rng.choice((0, 0.01)), *reply(rng, path)]


def refused(rng: random.Random, path: str) -> list[Any]:
    status = rng.choice((400, 401, 404, 405, 413, 422, 429, 499, 500, 502, 503, 599, 600, 999))
    said = rng.choice(
        (
            json.dumps({"error": {"message": "no", "type": "t", "code": 400, "param": "p"}}),
            json.dumps({"detail": "Not Found"}),
            "404 page not found",
            "",
            "e" * 70_000,
            "e" * 300_000,
        )
    )
    if rng.randrange(4):
        return cut(rng, head(rng, status, rng.choice(JSON), f"Content-Length: {len(said)}") + said)
    if rng.randrange(2):
        return cut(rng, head(rng, status, "Transfer-Encoding: chunked") + chunks(rng, said))
    text = head(rng, status, f"Content-Length: {len(said) + 9}") + said
    return [*cut(rng, text), 0.02, "close"]


def garbage(rng: random.Random, path: str) -> list[Any]:
    said = ("no HTTP at all\r\n\r\n", "HTTP/1.1 abc\r\n\r\n", "\x16\x03\x01", "HTTP/1.1 200 OK\r\nno colon\r\n\r\n")
    return [rng.choice(said), 0.02, "close"]


def doubtful(rng: random.Random, path: str) -> list[Any]:
    lengths = ("Content-Length: abc",), ("Content-Length: 3", "Content-Length: 4"), ("Content-Length: -1",)
    return [head(rng, 200, rng.choice(JSON), *rng.choice(lengths)) + "abcd", 0.02, "close"]


def talkative(rng: random.Random, path: str) -> list[Any]:
    """It says more than its reply. No second reply: the plain way's client would wait for the end of that one."""
    top = head(rng, 200, rng.choice(JSON), "Content-Length: 2")
    return [top + "{}", 0.3, rng.choice(("x", "xyz\r\n\r\n"))]  # later, also for who is slow


def late(rng: random.Random, path: str) -> list[Any]:
    text = events(rng) + "data: {}\n\n"
    begun = head(rng, 200, rng.choice(SSE), "Transfer-Encoding: chunked") + chunks(rng, text, is_ended=False)
    return [*([begun] if rng.randrange(2) else []), 30]


def large(rng: random.Random, path: str) -> list[Any]:
    text = '{"a":"' + "y" * 1_500_000 + '"}'
    return [head(rng, 200, JSON[0], f"Content-Length: {len(text)}") + text]


WEIGHED: tuple[tuple[Callable[[random.Random, str], list[Any]], int], ...] = (
    (whole, 8),
    (chunked, 4),
    (stream, 8),
    (measured_stream, 1),
    (until_close, 2),
    (old, 1),
    (stream_until_close, 1),
    (broken_stream, 4),
    (broken_whole, 2),
    (broken_head, 1),
    (dropped, 2),
    (bodiless, 1),
    (interim, 1),
    (refused, 3),
    (garbage, 1),
    (doubtful, 1),
    (talkative, 1),
    (large, 1),
)
REPLIES = [one for one, _ in WEIGHED]


# --- what clients say


def request(
    rng: random.Random, script: list[Any], path: str, *, is_last: bool, is_usual: bool = False, model: str = ""
) -> bytes:
    fields: dict[str, Any] = {
        "model": model or rng.choice((*MODELS, "fake")),
        "prompt": "x",
        "messages": [{"role": "user", "content": "x"}],
        "input": "x",
        "script": script,
    }
    method, version, more = "POST", "HTTP/1.1", [f"Authorization: Bearer {KEY}"]
    body = json.dumps(fields)
    odd = 99 if is_usual else rng.randrange(40)
    if odd in (2, 3, 17) and not is_last:  # what follows would meet a connection that is being closed
        odd = 99
    match odd:
        case 0:
            path += "?a=b"
        case 1:
            method = rng.choice(("GET", "PUT", "OPTIONS"))
        case 2:
            version = "HTTP/1.0"
        case 3:
            more.append("Connection: close")
        case 4:
            more.append("Expect: 100-continue")
        case 5:
            more.append(rng.choice(("Origin: http://localhost:3000", "Origin: http://evil.example")))
        case 6:
            more.append(rng.choice(("x-request-id: mine-7", "X-Request-Id: with blank", "x-session-id: s")))
        case 7:
            more[0] = rng.choice(("Authorization: Bearer wrong", "Authorization: Basic x", "x-api-key: wrong", "a: b"))
        case 8:
            more[0] = f"x-api-key: {KEY}"
        case 9:
            more.append(rng.choice(("content-encoding: gzip", "Content-Encoding: identity")))
        case 10:
            body = json.dumps(fields | {"model": rng.choice(("fakee", "", 5, "m" * 300))})
        case 11:
            odd_key = '{"model":"named","prompt":"x","messages":[],"input":"x","\xff":1}'
            body = rng.choice(
                ("", "{", "[]", "null", '{"model":"fake"}', "\xff\xfe", '{"model":"fake","stream":0}', odd_key)
            )
        case 12:
            body = json.dumps(fields | {"enable_thinking": True, "pad": "p" * rng.choice((10, 70_000))})
        case 13:
            body = json.dumps(fields | {"pad": "p" * (LIMIT_BYTES + 10)})
        case 14:
            body = json.dumps(fields | {"lora_name": "none"})
        case 15:
            more += [
                "X-Many: 1",
                "x-many: 2",
                "Cookie: a=b",
                "Accept-Encoding: gzip",
                "TE: trailers",
            ]
        case 16:
            path = rng.choice(("/v1/%63ompletions", "/v1/completions/", "//v1/completions", "http://h/rerank"))
        case 17:
            more.append("Upgrade: h2c")
        case 18:
            body = json.dumps(fields | {"stream": True})
        case 19:
            more.append("Host: second.example")
        case 25:
            more += [rng.choice(("Connection: X-Hop, keep-alive", "Connection: ,x-hop\r\nConnection: te")), "X-Hop: 1"]
        case 26:
            more.append(rng.choice(("X-Text: caf\xe9", "X-Text: caf\xc3\xa9", "X-Text: \xff \xc3", "cookie: \x80")))
        case 20 | 21 | 22 | 23 | 24 if HEAD.search("".join(step for step in script if isinstance(step, str))):
            # else it may be sent twice by one way, as only what is at hand can be
            large = {"pad": 'p\\"' * (UPLOAD_BYTES // 5)}
            few = {name: fields[name] for name in ("model", "script")}
            behind = {"input": "\u00e9", "messages": [{"model": "x", "a": ['"', "\\"]}], "prompt": "lora_name"}
            body = json.dumps(few | fields | large if odd < 24 else large | fields)
            if odd in (22, 23):
                body = json.dumps(few | {"prompt": "x", "messages": [], "input": ""} | large | behind)
    data = body.encode("latin-1", "replace")
    lines = [f"{method} {path} {version}", "Host: localhost", "Content-Type: application/json", *more]
    rng.shuffle(lines[1:])
    top = "\r\n".join(lines).encode("latin-1")
    if is_usual or rng.randrange(6) or version == "HTTP/1.0":
        return top + b"\r\nContent-Length: %d\r\n\r\n" % len(data) + data
    places = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(rng.randrange(4)))})
    parts = [data[begin:end] for begin, end in itertools.pairwise(places)]
    sent = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    trailer = rng.choice((b"", b"", b"x-trailer: 1\r\n", b"authorization: no\r\nhost: evil\r\nx-one: caf\xe9\r\n"))
    return top + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + sent + b"0\r\n" + trailer + b"\r\n"


def case_of(rng: random.Random) -> Case:
    if not rng.randrange(5):
        return alike(rng)
    count = rng.choice((1, 1, 1, 2, 3))
    paths = [rng.choice(PATHS) for _ in range(count)]
    leaves = rng.choice((None, None, None, None, "close", "reset"))
    scripts = [reply(rng, path, is_last=number == count) for number, path in enumerate(paths, 1)]
    reads = 0
    if leaves:  # at a moment that both ways know: the engine says nothing, or has said no end
        count, paths, scripts = 1, paths[:1], [late(rng, paths[0])]
        reads = rng.choice((0, 1)) if len(scripts[0]) > 1 else 0
    ends = [False] * (count - 1) + [True]
    data = [request(rng, *one, is_last=is_last) for *one, is_last in zip(scripts, paths, ends, strict=True)]
    if leaves and not rng.randrange(4):  # in the middle of its own request
        data, reads = [data[0][: rng.randrange(len(data[0]))]], 0
    sent: list[bytes | float] = []
    if rng.randrange(3):
        stream = b"".join(data)
        places = sorted({0, len(stream), *(rng.randrange(len(stream) + 1) for _ in range(rng.randrange(4)))})
        for begin, end in itertools.pairwise(places):
            sent += [stream[begin:end], rng.choice((0, 0.001, 0.005))]
    else:
        for one in data:
            sent += [one, rng.choice((0.0, 0.02))]
    return Case(tuple(sent), leaves, reads, count, tuple(scripts))


def alike(rng: random.Random) -> Case:
    """Most of its requests have one head, but for the length, and each waits for the reply to the one before."""
    count, path, model = rng.randrange(4, 8), rng.choice(PATHS), rng.choice((*MODELS, "fake"))
    make = rng.choice((whole, whole, chunked, stream))
    scripts = [(reply if not rng.randrange(8) else make)(rng, path) for _ in range(count)]
    sent: list[bytes | float | Told] = []
    for number, script in enumerate(scripts):
        is_last = number == count - 1
        data = request(rng, script, path, is_last=is_last, is_usual=bool(rng.randrange(8)), model=model)
        places = {0, len(data)}
        if not rng.randrange(3):
            places.add(data.find(b"\r\n\r\n") + 4 + rng.choice((-3, 0, 0, 0, 0, 5)))
        for begin, end in itertools.pairwise(sorted(places)):
            sent += [data[begin:end], rng.choice((0.0, 0.001, 0.004))]
        if not rng.randrange(8) and not is_last:
            continue
        sent.append(Told(number + 1))
    return Case(tuple(sent), None, 0, count, tuple(scripts))


# --- what comes of it


class Replies:
    """What a client is told, connection and all."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self.is_whole = True
        self.whole = 0  # so many, without the words to go on
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.is_whole = False
        self.found.append({"headers": [], "body": b"", "whole": False})

    def on_header(self, name: bytes, value: bytes) -> None:
        text = name.decode().lower()
        if text not in OF_THE_MOMENT:
            self.found[-1]["headers"].append((text, value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        self.found[-1]["status"] = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.found[-1]["body"] += body

    def on_message_complete(self) -> None:
        self.is_whole = self.found[-1]["whole"] = True
        self.whole += self.found[-1]["status"] >= 200

    def told(self) -> list[dict[str, Any]]:
        for one in self.found:
            one["headers"].sort()
            if b"is no HTTP" in one["body"]:  # how so is told in the words of two parsers
                one["body"] = re.sub(rb"is no HTTP[^\"]*", b"", one["body"])
                one["headers"] = [header for header in one["headers"] if header[0] != "content-length"]
        return [one for one in self.found if one.get("status", 200) >= 200]


async def play(gateway: Gateway, case: Case, diary: list[tuple[float, str]]) -> dict[str, Any]:
    """Be the client; what it is told."""

    def note(what: str) -> None:
        diary.append((round(time.monotonic() % 1000, 3), what))

    port = int(gateway.address.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    replies, is_open, read = Replies(), True, 0
    sending = asyncio.ensure_future(_send(writer, case.sent, replies))
    sending.add_done_callback(lambda _: note("sent"))
    note(f"port {writer.get_extra_info('sockname')[1]}")
    try:
        if case.leaves and not case.reads:
            await asyncio.wait_for(sending, QUIET_S)
            await asyncio.sleep(0.4)  # until the engine has it, on a busy machine too
        while not (case.leaves and read >= case.reads):
            try:
                if replies.is_whole and len(replies.told()) >= case.asked:
                    await asyncio.wait_for(sending, QUIET_S)
                    break
                data = await asyncio.wait_for(reader.read(2**16), QUIET_S)
            except ConnectionError:
                data = b""
            except TimeoutError:
                note("nothing is said, or taken")
                writer.transport.abort()  # to close it would wait for what the gateway does not read
                return {"replies": replies.told(), "is_open": "it says nothing, or does not take what is sent"}
            note(f"{len(data)} bytes")
            if not data:
                is_open = False
                break
            replies.feed(data)
            read = len(replies.told())  # a reply, not the word to go on
        if case.leaves == "reset":
            writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.close()
        note("closed")
    if case.leaves:
        return {}
    return {"replies": replies.told(), "is_open": is_open}


async def _send(writer: asyncio.StreamWriter, sent: Sent, replies: Replies | None = None) -> None:
    with suppress(ConnectionError):  # who has refused the request need not take all of it
        for step in sent:
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            elif isinstance(step, Told):
                while replies is not None and replies.whole < step:  # who tells them ends this, too
                    await asyncio.sleep(0.001)
            else:
                await asyncio.sleep(step)


async def look(gateway: Gateway) -> dict[str, Any]:
    """What is counted, and what the engine has seen since, once all is quiet."""
    headers = {"authorization": f"Bearer {KEY}"}
    seen: list[dict[str, Any]] = []
    gone = 0
    limit_at = time.monotonic() + LEFT_S
    while True:
        replicas = (await gateway.get("/v1/replicas", headers=headers)).json
        if not any(replica["in_flight"] for replica in replicas):
            break
        if time.monotonic() > limit_at:
            raise LeftOver(await left_over(gateway, replicas))
        await asyncio.sleep(0.01)
    for replica in replicas:
        is_at_work = True
        while is_at_work:
            engine = await ask_engine(replica["address"])
            seen += engine["seen"]
            gone += engine["gone"]
            if is_at_work := engine["at_work"]:
                if time.monotonic() > limit_at:
                    raise LeftOver(await left_over(gateway, replicas))
                await asyncio.sleep(0.01)
    text = (await gateway.get("/metrics", headers=headers)).body.decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if COUNTED.match(line)]
    counts = Counter({name: float(count) for name, _, count in lines})
    return {"counts": counts, "seen": seen, "gone": gone, "starts": [replica["starts"] for replica in replicas]}


async def left_over(gateway: Gateway, replicas: list[dict[str, Any]]) -> str:
    """Who has not seen the end of a request: the gateway, its engine, or the system that holds what nobody reads."""
    counts = {replica["uid"]: replica["in_flight"] for replica in replicas}
    engines = {replica["uid"]: await ask_engine(replica["address"]) for replica in replicas}
    ours = f":{int(gateway.address.rpartition(':')[2]):04X}"
    sockets = [line.split()[1:5] for line in Path("/proc/net/tcp").read_text().splitlines() if ours in line]
    log = gateway.log.read_text()[-2000:]
    return f"{gateway.home.name}: in flight {counts}; engines {engines}; sockets {sockets}; log {log}"


async def ask_engine(address: str) -> dict[str, Any]:
    reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"), limit=2**26)
    writer.write(b"GET /seen HTTP/1.1\r\nhost: x\r\n\r\n")
    top = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", top)
    assert length
    said: dict[str, Any] = json.loads(await reader.readexactly(int(length[1])))
    writer.close()
    return said


async def both(tmp_path: Path, start_gateway: StartGateway) -> tuple[Gateway, Gateway]:
    """Two gateways that differ in nothing but the way."""
    gateways = []
    headers = {"authorization": f"Bearer {KEY}"}
    options = {"command": f"{ENGINE} --host {{socket}}", "served_name": MODELS["named"]}
    named = {"model_engine": "command", "options": options, "model_path": str(tmp_path)}
    for door in ("auto", "plain"):
        gateway = await start_gateway(
            fake={},
            home=tmp_path / door,
            env={"HOSTLER_DOOR": door},
            engines={"llama.cpp": {"binary": str(ENGINE)}},
            models={"named": named},
            api_keys=[KEY],
            max_body_bytes=LIMIT_BYTES,
            log_level="error",
        )
        for model in MODELS:
            await gateway.post(f"/v1/models/{model}/start", headers=headers)
        async with asyncio.timeout(30):
            while True:
                replicas = (await gateway.get("/v1/replicas", headers=headers)).json
                if all(replica["state"] == "ready" for replica in replicas):
                    break
                await asyncio.sleep(0.02)
        gateways.append(gateway)
    return gateways[0], gateways[1]


async def differences(gateways: tuple[Gateway, Gateway], case: Case) -> dict[str, Any]:
    """What the case shows of one and not of the other."""
    before = [await look(gateway) for gateway in gateways]
    diaries: list[list[tuple[float, str]]] = [[], []]
    told = await asyncio.gather(*map(play, gateways, (case, case), diaries))
    found = []
    for gateway, was, one, diary in zip(gateways, before, told, diaries, strict=True):
        try:
            now = await look(gateway)
        except LeftOver as exc:
            raise LeftOver(f"{exc}\nclient {diary}") from exc
        for name, count in was["counts"].items():
            now["counts"][name] -= count
        if case.leaves:  # how much of what came had been read by then is not told
            now["counts"] = Counter({name: one for name, one in now["counts"].items() if not OF_TOKENS.search(name)})
        if not case.leaves:
            del now["gone"]  # it says who was the first to leave
        found.append(one | now)
    return {name: (found[0][name], found[1][name]) for name in found[0] if found[0][name] != found[1][name]}


async def test_random_requests_and_engines_see_no_difference(tmp_path: Path, start_gateway: StartGateway) -> None:
    gateways = await both(tmp_path, start_gateway)
    wrong = []
    for number in range(CASES):
        case = case_of(random.Random(f"{SEED}-{number}"))
        try:
            found = await differences(gateways, case)
            if '"send_again"' in str(found):  # once for a model, of what changes a request and comes too late
                found = await differences(gateways, case)
        except LeftOver as exc:
            raise AssertionError(f"case {number}: {short(case)}\n{short(exc)}") from exc
        if found:
            wrong.append((number, case, found))
            if len(wrong) >= 5:
                break
            await asyncio.gather(*(look(gateway) for gateway in gateways))
    assert not wrong, "\n\n".join(f"case {number}: {short(case)}\n{short(found)}" for number, case, found in wrong)


async def test_whoever_leaves_at_any_moment_leaves_nothing_in_flight(
    tmp_path: Path, start_gateway: StartGateway
) -> None:
    gateways = await both(tmp_path, start_gateway)
    for number, gateway in itertools.product(range(max(8, CASES // 20)), gateways):
        await asyncio.gather(*(come_and_leave(gateway, random.Random(f"{SEED}-{number}-{one}")) for one in range(20)))
        await look(gateway)
        assert "Traceback" not in gateway.log.read_text()


async def come_and_leave(gateway: Gateway, rng: random.Random) -> None:
    """Leave in the middle of whatever is going on."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.address.rpartition(":")[2]), limit=2**24)
    doing = [asyncio.ensure_future(_send(writer, case_of(rng).sent))]
    if rng.randrange(6):  # else it does not even listen
        doing.append(asyncio.ensure_future(reader.read()))
    await asyncio.sleep(rng.choice((0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.4)) * rng.random())
    how = rng.choice(("close", "reset", "half"))
    if how == "half":
        with suppress(OSError):
            writer.get_extra_info("socket").shutdown(SHUT_WR)
        await asyncio.sleep(0.05)
    elif how == "reset":
        writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    for one in doing:
        one.cancel()
    await asyncio.gather(*doing, return_exceptions=True)
    writer.transport.abort()


async def test_no_request_is_sent_twice_as_the_engine_says_more_than_its_reply(
    tmp_path: Path, start_gateway: StartGateway
) -> None:
    said = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    told = []
    for gateway in await both(tmp_path, start_gateway):
        await look(gateway)
        for script in ([said + "no HTTP\r\n\r\n"], ["no HTTP\r\n\r\n"]):
            body = {"model": "fake", "prompt": "x", "script": script}
            answer = await gateway.post("/v1/completions", body, headers={"authorization": f"Bearer {KEY}"})
            told.append(answer.status)
            assert answer.status == 200 or "is no HTTP" in answer.error["message"]
            assert len((await look(gateway))["seen"]) == 1
    assert told == [200, 502] * 2


def short(value: object) -> str:
    """Without long runs of the same."""
    return re.sub(r"(.{1,60}?)\1{20,}", r"\1...", str(value))[:4000]
