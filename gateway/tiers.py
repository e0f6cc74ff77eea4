"""What an engine holds awake and asleep, and how it is brought from one to the other. Knows no model and no room."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import msgspec

from engines.base import RAM, Call, Placement, Tier
from gateway.connections import UpstreamLost
from gateway.upstream import Upstream
from gateway.yard import Bed

logger = logging.getLogger("hostler.tiers")

USUAL_WAKE_S = 1.0  # of one that has never slept here
SHOWN = 200  # of an answer that is no success


class NotDone(Exception):
    """The engine did not do what it was asked for; the text says what it did."""


def asleep(awake: Placement, tier: Tier, host_bytes: int = 0) -> Placement:
    """What it holds in that tier.

    Args:
        host_bytes: of the machine's memory that it took for sleeping before, and has kept.
    """
    kept = {device: min(size, tier.residual_bytes) for device, size in awake.memory.items()}
    return _with_host(msgspec.structs.replace(awake, memory=kept), max(host_bytes, tier.host_bytes))


def bed(awake: Placement, tier: Tier, host_bytes: int = 0, wake_s: float | None = None) -> Bed:
    """The tier as the yard knows it.

    Args:
        host_bytes: as of `asleep`.
        wake_s: what it takes to wake, if that is known.
    """
    memory = asleep(awake, tier, host_bytes).memory
    return Bed(
        tier=tier.name, memory=memory, host_bytes=max(host_bytes, tier.host_bytes), wake_s=wake_s or USUAL_WAKE_S
    )


def awake_again(awake: Placement, host_bytes: int) -> Placement:
    """What it holds awake, with what it has kept."""
    return _with_host(awake, host_bytes)


def _with_host(placement: Placement, host_bytes: int) -> Placement:
    if not host_bytes:
        return placement
    memory = dict(placement.memory)
    memory[RAM] = memory.get(RAM, 0) + host_bytes
    return msgspec.structs.replace(placement, memory=memory)


async def carry_out(upstream: Upstream, calls: Sequence[Call], is_asleep: Call | None, *, ends_asleep: bool) -> None:
    """Send all calls, in their order, and see that it then sleeps, or not, as it should.

    Raises:
        NotDone: one of them failed, or was not answered in time, or it says otherwise.
    """
    for call in calls:
        await _expect(upstream, call)
    if is_asleep is not None and (says := await sleeps(upstream, is_asleep)) is not ends_asleep:
        raise NotDone(f"after that, GET {is_asleep.path} tells is_sleeping: {says}")


async def sleeps(upstream: Upstream, is_asleep: Call) -> bool | None:
    """What the engine says; None if it says nothing that can be read."""
    try:
        said = msgspec.json.decode(await _expect(upstream, is_asleep), type=_Says)
    except (NotDone, msgspec.MsgspecError):
        return None
    return said.is_sleeping


async def warm_up(upstream: Upstream, calls: Sequence[Call]) -> None:
    """Ask for what a first request would have to wait for. What it refuses is no failure: it answers, after all.

    Raises:
        NotDone: it fails, or does not answer in time.
    """
    for call in calls:
        status, body = await _send(upstream, call)
        if status >= 500:
            raise NotDone(f"{call.method} {call.path} was answered with {status}: {_shown(body)}")
        if status != 200:
            logger.info("A warm-up was refused: %s %s: %d: %s", call.method, call.path, status, _shown(body))


async def proof_of(upstream: Upstream, call: Call) -> str | None:
    """The text of a completion; None if it is refused, or cannot be read: it proves nothing then.

    Raises:
        NotDone: it does not answer in time.
    """
    status, body = await _send(upstream, call)
    try:
        return msgspec.json.decode(body, type=_Completion).choices[0].text if status == 200 else None
    except (msgspec.MsgspecError, IndexError):
        return None


class _Says(msgspec.Struct):
    is_sleeping: bool


class _Choice(msgspec.Struct):
    text: str


class _Completion(msgspec.Struct):
    choices: list[_Choice]


async def _expect(upstream: Upstream, call: Call) -> bytes:
    status, body = await _send(upstream, call)
    if status != 200:
        raise NotDone(f"{call.method} {call.path} was answered with {status}: {_shown(body)}")
    return body


async def _send(upstream: Upstream, call: Call) -> tuple[int, bytes]:
    headers = [("content-type", "application/json")] if call.body else []
    try:
        async with asyncio.timeout(call.limit_s):
            reply = await upstream.send(call.method, call.path, headers, call.body)
            try:
                parts = []
                while part := await reply.read():
                    parts.append(part)
            finally:
                reply.close()
    except TimeoutError as exc:
        raise NotDone(f"{call.method} {call.path} was not answered within {call.limit_s:g} s") from exc
    except UpstreamLost as exc:
        raise NotDone(f"{call.method} {call.path} was not answered: {exc}") from exc
    return reply.status, b"".join(parts)


def _shown(body: bytes) -> str:
    return body.decode(errors="replace").strip()[:SHOWN] or "nothing more"
