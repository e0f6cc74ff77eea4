"""Streams of tokens, many at once, from several processes: time to first token, gaps between tokens, throughput.

    python bench/gpu/streams.py '{"host": "127.0.0.1", "port": 9997, "model": "m", "streams": 8, ...}'

Run so it is one of the processes; `measure` starts them and puts together what they say. A client has to be faster
than what it measures: it looks for the ends of events in what arrives and decodes none of them.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import sys
import time
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httptools
import psutil
import uvloop

WARM_UP_S = 0.5
BEGIN_S = 0.8  # for the processes to start
GRACE_S = 20.0
STREAMS_EACH = 32  # of one process
TOKENS = 96
DATA, TOKEN, DONE, WRONG = b"data: ", b'"choices":[{', b"[DONE]", b'data: {"error"'


@dataclass(frozen=True)
class Way:
    """Where streams are asked for: a Unix socket, or a port of loopback."""

    name: str
    socket: str | None = None
    port: int = 0
    key: str = "none"


class Stream(asyncio.Protocol):
    """One connection that asks for its next stream when the last one is whole."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.parser = httptools.HttpResponseParser(self)
        self.begun = self.last = 0
        self.rest = b""
        self.is_done = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        asyncio.get_running_loop().call_later(random.random() * WARM_UP_S / 2, self.ask)

    def ask(self) -> None:
        if self.load.is_over or self.transport.is_closing():
            return
        self.last, self.rest, self.is_done, self.tokens = 0, b"", False, 0
        self.begun = time.monotonic_ns()
        self.transport.write(self.load.next_request())

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.load.fail(f"the connection was closed ({error or 'cleanly'})")

    def on_body(self, data: bytes) -> None:
        now, load = time.monotonic_ns(), self.load
        if self.parser.get_status_code() != 200:
            load.fail(f"status {self.parser.get_status_code()}: {data[:300]!r}")
            return
        *events, self.rest = (self.rest + data).split(b"\n\n")
        for event in events:
            if TOKEN in event and event.startswith(DATA):
                if not self.last:
                    if load.is_open:
                        load.first.append(now - self.begun)
                elif load.is_open:
                    load.tokens += 1
                    if self.tokens:  # the first event says the role, and comes with the first token
                        load.gaps.append(now - self.last)
                    self.tokens += 1
                else:
                    self.tokens += 1
                self.last = now
            elif event == DATA + DONE:
                self.is_done = True
            elif event.startswith(WRONG):
                load.fail(f"an error within a stream: {event[:300]!r}")

    def on_message_complete(self) -> None:
        if not self.is_done:
            self.load.fail(f"a stream without its end: {self.rest[:200]!r}")
        elif self.load.is_open:
            self.load.whole += 1
            self.load.events_of_whole += self.tokens
        self.ask()


class Load:
    """What is counted while the window is open; nanoseconds."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.first, self.gaps = array("q"), array("q")
        self.tokens = self.whole = self.events_of_whole = self.asked = 0
        self.is_open = self.is_over = False
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def next_request(self) -> bytes:
        self.asked += 1
        text = f"{self.order['seed']} {self.asked}. Which side of the roundhouse do the locomotives leave from in the "
        body = {
            "model": self.order["model"],
            "messages": [{"role": "user", "content": text + "morning, and who opens the door for them?"}],
            "max_tokens": self.order["tokens"],
            "temperature": 0.8,
            "stream": True,
            **self.order["more"],
        }
        content = json.dumps(body, separators=(",", ":")).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        lines += [f"Authorization: Bearer {self.order['key']}", f"Content-Length: {len(content)}", "", ""]
        return "\r\n".join(lines).encode() + content

    def fail(self, sentence: str) -> None:
        if not self.is_over and not self.failed.done():
            self.failed.set_exception(RuntimeError(sentence))

    async def run(self) -> dict[str, Any]:
        loop, order = asyncio.get_running_loop(), self.order
        await self.sleep_until(order["open_at"] - WARM_UP_S)
        for _ in range(order["streams"]):
            if order["socket"]:
                await loop.create_unix_connection(lambda: Stream(self), order["socket"])
            else:
                await loop.create_connection(lambda: Stream(self), "127.0.0.1", order["port"])
        await self.sleep_until(order["open_at"])
        self.is_open = True
        await self.sleep_until(order["close_at"])
        self.is_open, self.is_over = False, True
        return {
            "tokens": self.tokens,
            "whole": self.whole,
            "events_of_whole": self.events_of_whole,
            "first": _packed(self.first),
            "gaps": _packed(self.gaps),
        }

    async def sleep_until(self, at: float) -> None:
        """No longer than until something is wrong."""
        done, _ = await asyncio.wait([self.failed], timeout=max(0.0, at - time.monotonic()))
        for failed in done:
            failed.result()


def _packed(numbers: array[int]) -> str:
    return base64.b64encode(zlib.compress(numbers.tobytes(), 1)).decode()


def _unpacked(text: str) -> array[int]:
    numbers = array("q")
    numbers.frombytes(zlib.decompress(base64.b64decode(text)))
    return numbers


async def measure(
    way: Way, model: str, streams: int, seconds: float, *, pid: int | None = None, more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One window; `pid` is the gateway's, whose processor time is counted.

    `more` goes with each request; without it streams have the same number of tokens.

    Raises:
        RuntimeError: a reply was wrong.
    """
    count = max(1, min((os.cpu_count() or 2) - 4, -(-streams // STREAMS_EACH)))
    shares = [streams // count + (number < streams % count) for number in range(count)]
    open_at = time.monotonic() + BEGIN_S + WARM_UP_S
    close_at = open_at + seconds
    order = {
        "socket": way.socket,
        "port": way.port,
        "key": way.key,
        "model": model,
        "tokens": TOKENS,
        "open_at": open_at,
        "close_at": close_at,
        "more": {"ignore_eos": True} if more is None else more,
    }
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, str(Path(__file__)), json.dumps(order | {"streams": share, "seed": number})),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        for number, share in enumerate(shares)
    ]
    try:
        saying = asyncio.gather(*(process.communicate() for process in processes))
        await asyncio.sleep(open_at - time.monotonic())
        before = _cpu_s(pid)
        await asyncio.sleep(close_at - time.monotonic())
        cpu_s = _cpu_s(pid) - before
        said = await asyncio.wait_for(saying, GRACE_S)
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
    for process, (_, errors) in zip(processes, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"{way.name}, {streams} streams: {errors.decode(errors='replace').strip()[-600:]}")
    found = [json.loads(out) for out, _ in said]
    whole, events = (sum(one[name] for one in found) for name in ("whole", "events_of_whole"))
    # An engine that is faster than its listener puts several tokens into one event.
    each = TOKENS * whole / events if more is None and events else 1.0
    tokens = round(sum(one["tokens"] for one in found) * each)
    return {
        "first_ms": [value / 1e6 for one in found for value in _unpacked(one["first"])],
        "gaps_ms": [value / 1e6 for one in found for value in _unpacked(one["gaps"])],
        "tokens": tokens,
        "tokens_per_event": each,
        "whole": whole,
        "tokens_per_s": tokens / seconds,
        "cpu_s": cpu_s,
        "cpu_us_per_token": cpu_s * 1e6 / tokens if tokens else None,
        "processes": count,
    }


def _cpu_s(pid: int | None) -> float:
    if pid is None:
        return 0.0
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])

    async def main() -> None:
        print(json.dumps(await Load(given).run()))

    uvloop.run(main())
