"""A request that another gateway answers, as this one hands over: what becomes of faults and of clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.api.next_door import is_answered_next_door
from gateway.connections import UpstreamLost

SCOPE = {"type": "http", "method": "GET", "raw_path": b"/v1/models", "query_string": b"", "headers": []}


class Door:
    """Another gateway, to which nothing gets through."""

    def __init__(self, why: Exception | None) -> None:
        self.why = why
        self.is_left = False

    async def send(self, *request: object) -> None:
        try:
            await asyncio.sleep(0 if self.why else 60)
        except asyncio.CancelledError:
            self.is_left = True
            raise
        if self.why:
            raise self.why


async def ask(door: Door, *, leaves: bool = False) -> list[dict[str, Any]]:
    """What the client is told."""
    told: list[dict[str, Any]] = []

    @contextlib.asynccontextmanager
    async def relaying() -> AsyncIterator[Door]:
        yield door

    async def receive() -> dict[str, str]:
        await asyncio.sleep(0 if leaves else 60)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        told.append(message)

    fleet = SimpleNamespace(relaying=relaying)
    assert await is_answered_next_door(cast(Any, fleet), dict(SCOPE), b"", cast(Any, receive), cast(Any, send))
    return told


async def test_a_fault_of_ours_is_not_passed_over() -> None:
    with pytest.raises(ZeroDivisionError):
        await ask(Door(ZeroDivisionError()))


async def test_a_gateway_that_is_gone_is_told() -> None:
    assert (await ask(Door(UpstreamLost("gone"))))[0]["status"] == 503


async def test_whoever_leaves_is_waited_for_no_longer() -> None:
    door = Door(None)
    assert await asyncio.wait_for(ask(door, leaves=True), 5) == []
    assert door.is_left
