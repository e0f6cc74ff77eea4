"""While another gateway takes over: requests that come to the old one wait, and are answered by the new one."""

from __future__ import annotations

import asyncio
from functools import partial
from urllib.parse import quote

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.body import read_body
from gateway.api.exchange import end_to_end, in_utf8
from gateway.api.ways import WAYS, WEBUI_WAYS
from gateway.connections import UpstreamLost
from gateway.errors import HandedOver, HostlerError, ModelFailed, ShuttingDown, answer
from gateway.fleet import Fleet
from gateway.replica import State
from gateway.upstream import Upstream

# What belongs to one connection; the name by which the client calls and its key belong to the request.
OF_THE_CONNECTION = frozenset(
    b"connection content-length expect keep-alive te trailer transfer-encoding upgrade".split()
)
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
RELAYED = frozenset(way.path for way in (*WAYS, *WEBUI_WAYS))  # by `is_answered_next_door`
ASK_PAUSE_S = 0.3
CLOSE = (b"connection", b"close")  # so that the client's next request goes to the new gateway itself


class NextDoor:
    """Passes on to the app, or to the gateway that has taken over. Plain ASGI, outermost."""

    def __init__(self, app: ASGIApp, fleet: Fleet) -> None:
        self._app = app
        self._fleet = fleet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, one way or the other."""
        fleet = self._fleet
        if fleet.next_door is not None and scope["type"] == "http":
            async with fleet.relaying() as door:
                if door is not None:
                    try:
                        body = await read_body(scope, receive, fleet.settings.max_body_bytes)
                    except HostlerError as exc:
                        await answer(exc)(scope, receive, send)
                    else:
                        await _relay_unless_left(door, scope, body, receive, send)
                    return
        if scope["type"] == "http" and scope["method"] not in SAFE and scope["path"] not in RELAYED:
            await self._app(scope, partial(self._receive_here, receive), send)
        else:
            await self._app(scope, receive, send)

    async def _receive_here(self, receive: Receive) -> Message:
        """What is asked for is done here, unless it was only known once the other gateway had taken over.

        Raises:
            HandedOver: it was; done here, it would be lost.
        """
        message = await receive()
        if self._fleet.next_door is not None and message["type"] == "http.request" and not message.get("more_body"):
            async with self._fleet.relaying() as door:
                if door is not None:
                    raise HandedOver("The gateway was restarted before the whole request had come. Send it again.")
        return message


async def is_answered_next_door(fleet: Fleet, scope: Scope, body: bytes, receive: Receive, send: Send) -> bool:
    """Have a request answered there that began to come before the other gateway was asked to take over, if it has."""
    async with fleet.relaying() as door:
        if door is None:
            return False
        await _relay_unless_left(door, scope, body, receive, send)
        return True


async def _relay_unless_left(door: Upstream, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    relaying = asyncio.ensure_future(_relay(door, scope, body, send))
    leaving = asyncio.ensure_future(_until_left(receive))
    try:
        await asyncio.wait((relaying, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        relaying.cancel()  # which does nothing if it is done
        await asyncio.gather(relaying, leaving, return_exceptions=True)
    if not relaying.cancelled():
        relaying.result()  # a fault of ours is told as any other


async def _relay(door: Upstream, scope: Scope, body: bytes, send: Send) -> None:
    has_begun = False
    try:
        reply = await door.send(scope["method"], path_of(scope), headers_of(scope), body)
        try:
            headers = [header for header in end_to_end(reply.headers) if header[0] not in OF_THE_CONNECTION]
            headers += [header for header in reply.headers if header[0] == b"content-length"]
            if "request_id" in scope:  # ours is told already
                headers = [header for header in headers if header[0] != b"x-request-id"]
            await send({"type": "http.response.start", "status": reply.status, "headers": [*headers, CLOSE]})
            has_begun = True
            while chunk := await reply.read():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            reply.close()
    except UpstreamLost:
        if not has_begun:  # else the connection ends, and the client sees that the answer is not whole
            await answer(ShuttingDown("The gateway is restarting. Try again."))(scope, _no_receive, send)


async def _until_left(receive: Receive) -> None:
    """The server's `send` says nothing when a client has left, so somebody must listen."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _no_receive() -> dict[str, str]:
    return {"type": "http.disconnect"}


async def until_ready_next_door(fleet: Fleet, scope: Scope, uid: str) -> None:
    """Go on waiting for a launch there; by the client's key, as we have none of our own.

    Raises:
        ModelFailed: it does not start there.
        ShuttingDown: nobody answers.
    """
    state = None
    async with fleet.relaying() as door:
        while door is not None and state != State.READY:
            state = await _state_of(door, scope, uid)
            if state == State.FAILED:
                raise ModelFailed(f"{uid} does not start; `hostler ps` says why. The launch is kept.")
            if state is None:
                break
            await asyncio.sleep(ASK_PAUSE_S)
    if state != State.READY:
        raise ShuttingDown(f"The gateway was restarted meanwhile. The launch of {uid} goes on.")


async def _state_of(door: Upstream, scope: Scope, uid: str) -> str | None:
    try:
        reply = await door.send("GET", f"/v1/models/{quote(uid, safe='/')}", headers_of(scope))
        try:
            parts = []
            while part := await reply.read():
                parts.append(part)
        finally:
            reply.close()
    except UpstreamLost:
        return None
    return str(msgspec.json.decode(b"".join(parts))["status"]) if reply.status == 200 else None


def path_of(scope: Scope) -> str:
    """What was asked for, as it was written."""
    query: bytes = scope["query_string"]
    path: bytes = scope["raw_path"]
    return (path + (b"?" + query if query else b"")).decode("latin-1")


def headers_of(scope: Scope) -> list[tuple[str, str]]:
    """The request's headers, but those of the connection."""
    return [
        (name.decode(), in_utf8(value).decode())
        for name, value in end_to_end(scope["headers"])
        if name not in OF_THE_CONNECTION
    ]
