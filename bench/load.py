"""The load: one process that asks as fast as it is told to and checks every reply.

    python bench/load.py --url http://127.0.0.1:8000 --kind chat --connections 16 --seconds 2 --pid 1234

Prints one JSON object. A reply with a wrong status, size, number of events or end is an error: the run stops
with exit code 1 and a sentence, because a fast error is not speed.

Kinds: `chat` (360 B in, 480 B out), `large` (2 MiB out), `stream` (50 events, one each 5 ms), and `hold`,
which opens so many slow streams, looks at the memory of --pid and leaves.
"""

import argparse
import asyncio
import json
import sys
import time
from array import array
from urllib.parse import urlsplit

import httptools
import psutil
import uvloop
from mock_engine import DONE_EVENT, EVENT_START, TIME_DIGITS, reply_body, stream_bytes

WARM_UP_S = 0.3
GRACE_S = 15.0
CHAT_BYTES = 480
LARGE_BYTES = 2 * 1024 * 1024
EVENTS = 50
PACE_MS = 5
HOLD_EVENTS = 300
HOLD_PACE_MS = 100
TIME_AT = slice(len(EVENT_START), len(EVENT_START) + TIME_DIGITS)

SYSTEM = "You are a careful assistant. Answer in one short paragraph, and say so when you do not know."
USER = "Which side of the roundhouse do the locomotives leave from in the morning, and who opens the door?"


class Wrong(Exception):
    """A reply is not what it has to be."""


def body_of(kind: str) -> bytes:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    body = {"model": "mock", "messages": messages, "temperature": 0.7}
    more = {
        "chat": {"max_tokens": 64, "stream": False},
        "large": {"reply_bytes": LARGE_BYTES, "stream": False},
        "stream": {"max_tokens": EVENTS, "pace_ms": PACE_MS, "stream": True},
        "hold": {"max_tokens": HOLD_EVENTS, "pace_ms": HOLD_PACE_MS, "stream": True},
    }
    return json.dumps({**body, **more[kind]}, separators=(",", ":")).encode()


def request_of(kind: str, host: str, key: str) -> bytes:
    body = body_of(kind)
    lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
    lines += [f"Authorization: Bearer {key}", "User-Agent: load", f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


class Tally:
    """What is counted while the window is open; nanoseconds."""

    def __init__(self) -> None:
        self.is_open = False
        self.requests = 0
        self.events = 0
        self.latency = array("q")
        self.first = array("q")
        self.transit = array("q")


class Client(asyncio.BufferedProtocol):
    """One connection that sends its next request when the reply to the last one is whole."""

    buffer = memoryview(bytearray(256 * 1024))  # one for all: what arrives is parsed before the next read

    def __init__(self, load: "Load") -> None:
        self.load = load
        self.tally = load.tally
        self.parser = httptools.HttpResponseParser(self)
        self.size = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        asyncio.get_running_loop().call_later(self.load.next_delay_s(), self.ask)

    def ask(self) -> None:
        if self.transport.is_closing():
            return
        self.size = 0
        self.started = time.monotonic_ns()
        self.transport.write(self.load.request)

    def get_buffer(self, size_hint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, size: int) -> None:
        try:
            self.parser.feed_data(self.buffer[:size])
        except httptools.HttpParserError as error:
            self.load.fail(f"not HTTP: {error.__context__ or error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.load.fail(f"the connection was closed ({error or 'cleanly'})")

    def on_message_complete(self) -> None:
        status = self.parser.get_status_code()
        if status != 200 or self.size != self.load.expected_bytes:
            self.load.fail(f"status {status} with {self.size} bytes, not 200 with {self.load.expected_bytes}")
        elif not self.parser.should_keep_alive():
            self.load.fail("the reply ends the connection")
        elif self.check():
            if self.tally.is_open:
                self.tally.requests += 1
                self.tally.latency.append(time.monotonic_ns() - self.started)
            if not self.load.is_over:
                self.ask()

    def check(self) -> bool:
        return True


class ReplyClient(Client):
    def on_body(self, data: bytes) -> None:
        if not self.size:
            self.start_is_right = self.load.expected_start.startswith(data[:200])
        self.size += len(data)

    def check(self) -> bool:
        if not self.start_is_right:
            self.load.fail("the body is not what the engine sent")
        return self.start_is_right


class StreamClient(Client):
    def ask(self) -> None:
        self.rest = b""
        self.events = 0
        self.is_done = False
        super().ask()

    def on_body(self, data: bytes) -> None:
        now = time.monotonic_ns()
        tally = self.tally
        if not self.size:
            self.load.begun += 1
            if tally.is_open:
                tally.first.append(now - self.started)
        self.size += len(data)
        *events, self.rest = (self.rest + data).split(b"\n\n")
        for event in events:
            if event.startswith(EVENT_START):
                self.events += 1
                if tally.is_open:
                    tally.events += 1
                    tally.transit.append(now - int(event[TIME_AT]))
            elif event == DONE_EVENT[:-2]:
                self.is_done = True
            else:
                self.load.fail(f"not an event of the engine's: {event[:200]!r}")

    def check(self) -> bool:
        if self.events != self.load.expected_events or not self.is_done or self.rest:
            self.load.fail(f"{self.events} events, done: {self.is_done}, not {self.load.expected_events} and done")
            return False
        return True


CLIENTS = {"chat": ReplyClient, "large": ReplyClient, "stream": StreamClient, "hold": StreamClient}
EXPECTED_EVENTS = {"stream": EVENTS, "hold": HOLD_EVENTS}
EXPECTED_SIZE = {"chat": CHAT_BYTES, "large": LARGE_BYTES}


class Load:
    def __init__(self, url: str, kind: str, key: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname, parts.port
        self.kind = kind
        self.request = request_of(kind, parts.netloc, key)
        self.expected_events = EXPECTED_EVENTS.get(kind, 0)
        self.expected_bytes = EXPECTED_SIZE.get(kind) or stream_bytes(self.expected_events)
        self.expected_start = reply_body(CHAT_BYTES)[:200]
        self.tally = Tally()
        self.asked = 0
        self.begun = 0
        self.is_over = False
        self.failed = asyncio.get_running_loop().create_future()

    def next_delay_s(self) -> float:
        """Streams begin one after the other, not in step: transit then tells of one event, not of a burst."""
        self.asked += 1
        return self.asked % EVENTS * PACE_MS / 1000 if self.kind == "stream" else 0.0

    def fail(self, sentence: str) -> None:
        if not self.is_over and not self.failed.done():
            self.failed.set_exception(Wrong(sentence))

    async def wait(self, seconds: float) -> None:
        """Sleeps, but no longer than until something is wrong."""
        done, _ = await asyncio.wait([self.failed], timeout=seconds)
        for failed in done:
            failed.result()

    async def open(self, connections: int) -> None:
        loop = asyncio.get_running_loop()
        opening = [
            loop.create_connection(lambda: CLIENTS[self.kind](self), self.host, self.port) for _ in range(connections)
        ]
        self.transports = [transport for transport, _ in await asyncio.gather(*opening)]

    def close(self) -> None:
        self.is_over = True
        for transport in getattr(self, "transports", ()):
            transport.abort()
        if not self.failed.done():
            self.failed.cancel()


async def measure(load: Load, connections: int, seconds: float, pid: int | None) -> dict:
    process = psutil.Process(pid) if pid else None
    tally = load.tally
    await load.open(connections)
    await load.wait(WARM_UP_S)
    tally.is_open = True
    start, cpu_start = time.monotonic(), cpu_s(process)
    await load.wait(seconds)
    tally.is_open = False
    elapsed, cpu = time.monotonic() - start, cpu_s(process) - cpu_start
    if not tally.requests:
        raise Wrong(f"no reply was whole within {seconds} s")
    return {
        "requests": tally.requests,
        "events": tally.events,
        "seconds": elapsed,
        "requests_per_s": tally.requests / elapsed,
        "cpu_s": cpu,
        "cpu_us_per_request": cpu * 1e6 / tally.requests,
        "cpu_us_per_event": cpu * 1e6 / tally.events if tally.events else None,
        "latency_ms": quantiles(tally.latency),
        "first_ms": quantiles(tally.first),
        "transit_ms": quantiles(tally.transit),
    }


async def hold(load: Load, connections: int, pid: int) -> dict:
    process = psutil.Process(pid)
    idle = process.memory_info().rss
    await load.open(connections)
    limit = time.monotonic() + GRACE_S
    while load.begun < connections:
        if time.monotonic() > limit:
            raise Wrong(f"only {load.begun} of {connections} streams began within {GRACE_S:.0f} s")
        await load.wait(0.05)
    await load.wait(0.5)
    return {"rss_idle_bytes": idle, "rss_held_bytes": process.memory_info().rss, "streams": connections}


def cpu_s(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return times.user + times.system


def quantiles(values: array) -> dict[str, float] | None:
    """p50 and p99 in milliseconds."""
    if not values:
        return None
    ordered = sorted(values)
    return {"p50": ordered[len(ordered) // 2] / 1e6, "p99": ordered[len(ordered) * 99 // 100] / 1e6}


async def run(options: argparse.Namespace) -> dict:
    load = Load(options.url, options.kind, options.key)
    try:
        if options.kind == "hold":
            return await hold(load, options.connections, options.pid)
        limit = options.seconds + WARM_UP_S + GRACE_S
        return await asyncio.wait_for(measure(load, options.connections, options.seconds, options.pid), limit)
    finally:
        load.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", required=True, help="http://127.0.0.1:PORT")
    parser.add_argument("--kind", choices=[*CLIENTS], default="chat")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--key", default="none", help="sent as bearer")
    parser.add_argument("--pid", type=int, help="whose CPU time or memory is measured")
    options = parser.parse_args()
    if options.kind == "hold" and not options.pid:
        parser.error("--kind hold needs --pid")
    try:
        print(json.dumps(uvloop.run(run(options))))
    except (Wrong, OSError, TimeoutError, psutil.Error) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
