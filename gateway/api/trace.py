"""Every request gets an id, which is echoed, forwarded and logged. Plain ASGI, outermost."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.config import Settings
from gateway.errors import HostlerError, answer

logger = logging.getLogger("hostler.access")

HEADER = b"x-request-id"
NOTHING_SENT = 499  # in the log: the client left before an answer
ACCEPTED = re.compile(rb"[\x21-\x7e]{1,128}")


class Trace:
    """Names the request, and writes its line in the access log."""

    def __init__(self, app: ASGIApp, settings: Callable[[], Settings]) -> None:
        """`settings` gives those in effect."""
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with `request_id` (bytes) in the scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = id_of(scope["headers"])
        scope["request_id"] = request_id
        status = NOTHING_SENT
        started = time.perf_counter()

        async def send_traced(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (HEADER, request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_traced)
        except Exception:
            logger.exception("%s %s failed, id=%s", scope["method"], _path(scope), request_id.decode())
            if status != NOTHING_SENT:
                raise
            message = "The gateway failed; its log has the details under this request's id."
            await answer(HostlerError(message))(scope, receive, send_traced)
        finally:
            if self._settings().access_log:
                seconds = time.perf_counter() - started
                served_by = scope.get("served_by", "-")
                write_line(scope["method"], _path(scope), served_by, scope.get("outcome", status), seconds, request_id)


def write_line(method: str, path: str, served_by: object, status: int, seconds: float, request_id: bytes) -> None:
    """A request's line in the access log."""
    logger.info("%s %s %s %s %.0f ms id=%s", method, path, served_by, status, 1000 * seconds, request_id.decode())


def _path(scope: Scope) -> str:
    """Still encoded, so that nobody writes lines of his own into the log."""
    path: bytes = scope["raw_path"]
    return path.decode("latin-1")


def id_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The request's id: the client's own, if it has a fit one."""
    for name, value in headers:
        if name == HEADER and ACCEPTED.fullmatch(value):
            return bytes(value)
    return uuid.uuid4().hex.encode()
