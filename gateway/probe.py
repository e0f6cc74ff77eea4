"""Whether an engine is ready, and later whether it still answers. Knows an upstream and what its process uses."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from gateway.connections import CannotAsk, UpstreamLost
from gateway.upstream import Upstream

PAUSE_FIRST_S = 0.02
PAUSE_LIMIT_S = 0.5
READY_LIMIT_S = 3.0
REMOTE_LIMIT_S = 10.0
LEFT_S = 600.0  # for so long an engine may compute on for a client that has left
BUSY_SHARE = 0.05  # of one core; others may want it too, and what hangs uses none


class NotReady(Exception):
    """What is served elsewhere does not answer as it should; the text says how it did."""


async def until_ready(upstream: Upstream, paths: Sequence[str]) -> str:
    """Until one of the paths answers 200; which one. For an engine that is just starting."""
    pause = PAUSE_FIRST_S
    while True:
        with contextlib.suppress(CannotAsk):
            for path in paths:
                if await upstream.probe(path, READY_LIMIT_S) == 200:
                    return path
        await asyncio.sleep(pause)
        pause = min(PAUSE_LIMIT_S, pause * 1.5)


async def ask_once(upstream: Upstream, path: str) -> str:
    """The path, if it answers 200 now. For what is served elsewhere, whose start nobody waits for.

    Raises:
        NotReady: it does not.
    """
    try:
        status = await upstream.probe(path, REMOTE_LIMIT_S)
    except CannotAsk as exc:
        raise NotReady(str(exc)) from exc
    if status != 200:
        raise NotReady(f"GET {upstream.url_of(path)}: {_answer(status, upstream)}")
    return path


async def until_silent(
    upstream: Upstream, path: str, *, interval_s: float, failures: int, cpu_s: Callable[[], float | None]
) -> str:
    """Until the path has not answered so many times in a row; a sentence about it.

    Any byte of a reply counts as life, and so does an engine that computes while requests are on it, or were lately:
    some answer nobody else meanwhile, and do not notice that their client has left.

    Args:
        interval_s: between two looks, and the limit for each answer.
        cpu_s: the processor time that the engine has used so far; None if nobody knows.
    """
    heard, since, misses, status = upstream.heard, time.monotonic(), 0, None
    sent, last_asked = upstream.sent, -math.inf
    while misses < failures:
        await asyncio.sleep(interval_s)
        if upstream.in_flight or upstream.sent != sent:
            sent, last_asked = upstream.sent, time.monotonic()
        if upstream.heard == heard:
            began = time.monotonic()
            before = cpu_s() if began - last_asked < LEFT_S else None
            sent += 1  # our own
            try:
                status = await upstream.probe(path, interval_s)
            except CannotAsk:
                continue
            is_busy = before is not None and _share(before, cpu_s(), time.monotonic() - began) > BUSY_SHARE
            if not is_busy and (status is None or status >= 500):
                heard = upstream.heard
                misses += 1
                continue
        heard, since, misses = upstream.heard, time.monotonic(), 0
    said = "has not answered its health check" if status is None else f"has answered its health check with {status}"
    return f"it {said} for {time.monotonic() - since:.0f} s"


async def read_number(upstream: Upstream, path: str, keys: Sequence[str | int]) -> int | None:
    """A number above 0 in what the path answers, by the keys that lead there; None if there is none."""
    try:
        async with asyncio.timeout(READY_LIMIT_S):
            reply = await upstream.send("GET", path)
            try:
                parts = []
                while part := await reply.read():
                    parts.append(part)
            finally:
                reply.close()
        value: Any = msgspec.json.decode(b"".join(parts)) if reply.status == 200 else None
        for key in keys:
            value = value[key]
    except (CannotAsk, UpstreamLost, TimeoutError, msgspec.MsgspecError, LookupError, TypeError):
        return None
    return value if isinstance(value, int) and value > 0 else None


def _share(before: float, after: float | None, within_s: float) -> float:
    return 0.0 if after is None else (after - before) / max(within_s, 0.001)


def _answer(status: int | None, upstream: Upstream) -> str:
    return f"it answered {status}" if status else upstream.last_loss or f"no answer within {REMOTE_LIMIT_S:g} s"
