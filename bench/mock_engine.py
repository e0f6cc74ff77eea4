#!/usr/bin/env python3
"""A stand-in for `llama-server` that is far faster than anything in front of it.

Knows the few flags, routes and replies that the bench needs; every reply is built beforehand. What a request
wants is in its body, under names that a gateway passes through untouched: `stream`, `max_tokens` (events of
a stream), `pace_ms` (between two events), `reply_bytes` (size of a reply that is not streamed).

An event carries the time of its sending (CLOCK_MONOTONIC, ns) so that the client, on the same machine, can
tell how long it was under way.
"""

import asyncio
import functools
import itertools
import os
import re
import signal
import sys
import time

import httptools
import uvloop

LIFETIME_S = 3600.0  # nobody leaves one of these behind for longer
TIME_DIGITS = 16

STREAM = re.compile(rb'"stream"\s*:\s*true').search
USAGE = re.compile(rb'"include_usage"\s*:\s*true').search
MAX_TOKENS = re.compile(rb'"max_tokens"\s*:\s*(\d+)').search
PACE_MS = re.compile(rb'"pace_ms"\s*:\s*(\d+)').search
REPLY_BYTES = re.compile(rb'"reply_bytes"\s*:\s*(\d+)').search

JSON_HEAD = (
    b"HTTP/1.1 %d %b\r\nServer: llama.cpp\r\nContent-Type: application/json; charset=utf-8\r\n"
    b"Content-Length: %d\r\n\r\n"
)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
REPLY_START = (
    b'{"id":"chatcmpl-0","object":"chat.completion","created":1700000000,"model":"mock","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"'
)
REPLY_END = b'"},"finish_reason":"stop"}],"usage":{"prompt_tokens":64,"completion_tokens":64,"total_tokens":128}}'
EVENT_START = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1700000000,"model":"mock",'
    b'"choices":[{"index":0,"delta":{"content":"tok '
)
EVENT_END = b'"},"finish_reason":null}]}\n\n'
USAGE_EVENT = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1700000000,"model":"mock",'
    b'"choices":[],"usage":{"prompt_tokens":64,"completion_tokens":64,"total_tokens":128}}\n\n'
)
DONE_EVENT = b"data: [DONE]\n\n"
EVENT_BYTES = len(EVENT_START) + TIME_DIGITS + len(EVENT_END)


def reply_body(size: int) -> bytes:
    """A chat completion of exactly so many bytes."""
    return REPLY_START + b"a" * (size - len(REPLY_START) - len(REPLY_END)) + REPLY_END


def stream_bytes(events: int) -> int:
    """What the body of a stream comes to, without the framing of chunks."""
    return events * EVENT_BYTES + len(DONE_EVENT)


def as_reply(status: int, reason: bytes, body: bytes) -> bytes:
    return JSON_HEAD % (status, reason, len(body)) + body


def as_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@functools.lru_cache
def reply_of(size: int) -> bytes:
    return as_reply(200, b"OK", reply_body(size))


CHUNK_START = b"%x\r\n" % EVENT_BYTES + EVENT_START
CHUNK_END = EVENT_END + b"\r\n"
STREAM_END = as_chunk(DONE_EVENT) + b"0\r\n\r\n"
USAGE_CHUNK = as_chunk(USAGE_EVENT)
HEALTHY = as_reply(200, b"OK", b'{"status":"ok"}')
MODELS = as_reply(200, b"OK", b'{"object":"list","data":[{"id":"mock","object":"model","created":0}]}')
REFUSED = as_reply(
    401, b"Unauthorized", b'{"error":{"message":"Invalid API Key","type":"authentication_error","code":401}}'
)
UNKNOWN = as_reply(404, b"Not Found", b'{"error":{"message":"File Not Found","type":"not_found_error","code":404}}')


class MockProtocol(asyncio.Protocol):
    def __init__(self, key: bytes) -> None:
        self.bearer = b"Bearer " + key if key else b""
        self.call_later = asyncio.get_running_loop().call_later
        self.parser = httptools.HttpRequestParser(self)
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.write = transport.write

    def connection_lost(self, error: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def on_message_begin(self) -> None:
        self.has_key = not self.bearer
        self.parts: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(name) == 13 and name.lower() == b"authorization":
            self.has_key = value == self.bearer or self.has_key

    def on_body(self, data: bytes) -> None:
        self.parts.append(data)

    def on_message_complete(self) -> None:
        url = self.url
        if url == b"/health":
            self.write(HEALTHY)
        elif not self.has_key:
            self.write(REFUSED)
        elif url == b"/v1/chat/completions":
            self.complete(b"".join(self.parts))
        elif url == b"/v1/models":
            self.write(MODELS)
        else:
            self.write(UNKNOWN)

    def complete(self, body: bytes) -> None:
        if STREAM(body) is None:
            size = REPLY_BYTES(body)
            self.write(reply_of(int(size[1]) if size else 480))
            return
        count, pace = MAX_TOKENS(body), PACE_MS(body)
        self.left = int(count[1]) if count else 50
        self.pace_s = int(pace[1]) / 1000 if pace else 0.005
        self.end = USAGE_CHUNK + STREAM_END if USAGE(body) else STREAM_END
        self.write(STREAM_HEAD)
        self.next_event()

    def next_event(self) -> None:
        self.left -= 1
        event = b"%b%016d%b" % (CHUNK_START, time.monotonic_ns(), CHUNK_END)
        if self.left > 0:
            self.write(event)
            self.timer = self.call_later(self.pace_s, self.next_event)
        else:
            self.write(event + self.end)
            self.timer = None


def read_flags(argv: list[str]) -> dict[str, str]:
    """Every `--flag value`; what the mock does not know does no harm."""
    return {flag: value for flag, value in itertools.pairwise(argv) if flag.startswith("-")}


async def serve(flags: dict[str, str]) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.call_later(LIFETIME_S, stopping.set)
    key = flags.get("--api-key") or os.environ.get("LLAMA_API_KEY", "")
    if not key and "--api-key-file" in flags:
        with open(flags["--api-key-file"]) as file:
            key = file.readline().strip()
    host = flags.get("--host", "127.0.0.1")
    if host.endswith(".sock"):
        if os.path.exists(host):
            os.unlink(host)
        await loop.create_unix_server(lambda: MockProtocol(key.encode()), host, backlog=2048)
        address = f"unix:{host}"
    else:
        port = int(flags.get("--port", 8080))
        server = await loop.create_server(lambda: MockProtocol(key.encode()), host, port, backlog=2048)
        address = f"http://{host}:{server.sockets[0].getsockname()[1]}"
    print(f"main: server is listening on {address}", file=sys.stderr, flush=True)
    await stopping.wait()


if __name__ == "__main__":
    if "--version" in sys.argv:
        sys.exit("version: 0 (mock)")
    uvloop.run(serve(read_flags(sys.argv[1:])))
