"""Clients that come at once, and of which most leave at random; and what they leave behind, which is to be nothing.

The clients are a process of their own: beside what other tests have left in theirs, their sockets would not be read.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import struct
import sys
import time
from collections import Counter
from socket import SO_LINGER, SOL_SOCKET
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from harness import Gateway

STAYING_TOKENS = 4
LEAVING_TOKENS = 200  # more than anybody waits for
SETTLE_LIMIT_S = 20.0
STREAM_LIMIT_S = 120.0  # of one that comes and stays


class Visit(NamedTuple):
    """What one client does with its stream."""

    leaves_after_s: float | None = None  # before anything has come, most likely
    leaves_after_events: int | None = None
    is_reset: bool = False

    @property
    def stays(self) -> bool:
        return self.leaves_after_s is None and self.leaves_after_events is None


class Seen(NamedTuple):
    """Of all of them."""

    whole: int
    left: int
    seconds: float
    settled_s: float  # after the last one


def visit(rng: random.Random) -> Visit:
    is_reset = rng.random() < 0.5
    match rng.randrange(8):
        case 0:
            return Visit()
        case 1 | 2 | 3:
            return Visit(leaves_after_s=rng.choice((0.0, 0.05, 0.5, 2.0)), is_reset=is_reset)
        case _:
            return Visit(leaves_after_events=rng.randrange(1, 6), is_reset=is_reset)


async def come_and_leave(gateway: Gateway, uid: str, count: int, seed: int = 1) -> Seen:
    """So many streams at once.

    Afterwards nothing may be in flight at the gateway, each of them counted once, and no more files open than before,
    at the gateway and at its engine.
    """
    pids = gateway.process.pid, (await gateway.until(uid, in_flight=0))["pid"]
    before, files = await counted(gateway, uid), [open_files(pid) for pid in pids]
    began = time.monotonic()
    visits = visits_of(count, seed)
    ends = await ends_of(gateway.address, uid, count, seed)
    ended = time.monotonic()
    await gateway.until(uid, in_flight=0, limit_s=SETTLE_LIMIT_S)
    settled_s = time.monotonic() - ended
    assert ends["whole"] == sum(one.stays for one in visits), ends
    assert ends["whole"] + ends["left"] == count, ends
    assert await counted(gateway, uid) - before == count
    async with asyncio.timeout(SETTLE_LIMIT_S):
        while any(open_files(pid) > was for pid, was in zip(pids, files, strict=True)):
            await asyncio.sleep(0.1)
    return Seen(ends["whole"], ends["left"], ended - began, settled_s)


def visits_of(count: int, seed: int) -> list[Visit]:
    return [visit(random.Random(f"{seed}-{number}")) for number in range(count)]


async def ends_of(address: str, uid: str, count: int, seed: int) -> Counter[str]:
    """How the visits ended, which are done by a process of their own."""
    argv = [sys.executable, __file__, address, uid, str(count), str(seed)]
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    told, _ = await process.communicate()
    assert process.returncode == 0
    return Counter(json.loads(told))


async def come(address: str, uid: str, one: Visit) -> str:
    """How it ended: "whole", "left", or what was wrong."""
    tokens = STAYING_TOKENS if one.stays else LEAVING_TOKENS
    fields = {"model": uid, "prompt": "Once upon a time", "stream": True, "max_tokens": tokens, "ignore_eos": True}
    body = json.dumps(fields).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
    try:
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        try:
            async with asyncio.timeout(STREAM_LIMIT_S if one.leaves_after_s is None else one.leaves_after_s):
                return await read(reader, one.leaves_after_events)
        except TimeoutError:
            if one.leaves_after_s is not None:
                return "left"
            return f"no end: {one}, {reader!r}, {writer.get_extra_info('socket')!r}"
    finally:
        if one.is_reset:
            writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        writer.close()


async def read(reader: asyncio.StreamReader, events: int | None) -> str:
    """All of a stream, or so much of it."""
    status = await reader.readline()
    if b" 200 " not in status:
        return f"{status!r} {await reader.read(2000)!r}"
    seen = 0
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            return "whole"
        seen += line.startswith(b"data:")
        if events is not None and seen >= events:
            return "left"
    return "broken"


async def counted(gateway: Gateway, uid: str) -> float:
    """Requests to it that have ended."""
    lines = (await gateway.get("/metrics")).body.decode().splitlines()
    mine = [line for line in lines if line.startswith("hostler_requests_total{") and f'model="{uid}"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in mine)


def open_files(pid: int) -> int:
    """Of another process of ours."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def environment_of(pid: int) -> dict[str, str]:
    """As it was when it began."""
    with open(f"/proc/{pid}/environ", "rb") as file:
        pairs = [line.decode().partition("=") for line in file.read().split(b"\0") if line]
    return {name: value for name, _, value in pairs}


async def main(address: str, uid: str, count: str, seed: str) -> None:
    ends = await asyncio.gather(*(come(address, uid, one) for one in visits_of(int(count), int(seed))))
    print(json.dumps(Counter(ends)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
