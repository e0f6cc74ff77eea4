"""Every request gets an id, which is echoed, forwarded and logged. Plain ASGI, outermost."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("hostler.access")

HEADER = b"x-request-id"
ACCEPTED = re.compile(rb"[\x21-\x7e]{1,128}")


class Trace:
    """Names the request, and writes its line in the access log."""

    def __init__(self, app: ASGIApp, is_logging: bool) -> None:
        self._app = app
        self._is_logging = is_logging

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with `request_id` (bytes) in the scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _sent_id(scope) or uuid.uuid4().hex.encode()
        scope["request_id"] = request_id
        status = 499  # nothing was answered: the client left
        started = time.perf_counter()

        async def send_traced(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (HEADER, request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_traced)
        finally:
            if self._is_logging:
                logger.info(
                    "%s %s %s %s %.0f ms id=%s",
                    scope["method"],
                    scope["raw_path"].decode("latin-1"),  # still encoded: nobody writes lines of his own here
                    scope.get("served_by", "-"),
                    scope.get("outcome", status),
                    1000 * (time.perf_counter() - started),
                    request_id.decode(),
                )


def _sent_id(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == HEADER and ACCEPTED.fullmatch(value):
            return bytes(value)
    return None
