"""Every request gets an id, which is echoed, forwarded and logged. Plain ASGI, outermost."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.config import Settings
from gateway.errors import HostlerError, answer

logger = logging.getLogger("hostler.access")

HEADER = b"x-request-id"
IDS_DRAWN = 256  # at once, as asking the system for each would cost more than all else about it
MARK = "\0"  # stands for a line until it is known how logging would have it
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
    if logger.isEnabledFor(logging.INFO):
        _lines.add(f"{method} {path} {served_by} {status} {1000 * seconds:.0f} ms id={request_id.decode()}")


class _Lines:
    """Lines that are written together once the loop has seen to all that has come: that costs a fraction."""

    def __init__(self) -> None:
        self._waiting: list[str] = []

    def add(self, line: str) -> None:
        """Have it written in a moment."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.flush)
        self._waiting.append(line)

    def flush(self) -> None:
        """Write what waits, each line as logging would have it."""
        lines, self._waiting = self._waiting, []
        record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, MARK, (), None)
        for handler in _handlers():
            if not isinstance(handler, logging.StreamHandler) or handler.filters:
                for line in lines:
                    handler.handle(logger.makeRecord(logger.name, logging.INFO, __file__, 0, "%s", (line,), None))
                continue
            before, _, behind = handler.format(record).partition(MARK)
            text = "".join([f"{before}{line}{behind}{handler.terminator}" for line in lines])
            handler.acquire()
            try:
                handler.stream.write(text)
                handler.flush()
            except Exception:
                handler.handleError(record)
            finally:
                handler.release()


_lines = _Lines()


def _handlers() -> Iterator[logging.Handler]:
    """Those that a record of ours would reach."""
    at: logging.Logger | None = logger
    while at is not None:
        yield from (handler for handler in at.handlers if handler.level <= logging.INFO)
        at = at.parent if at.propagate else None


def _path(scope: Scope) -> str:
    """Still encoded, so that nobody writes lines of his own into the log."""
    path: bytes = scope["raw_path"]
    return path.decode("latin-1")


def id_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The request's id: the client's own, if it has a fit one."""
    for name, value in headers:
        if name == HEADER and ACCEPTED.fullmatch(value):
            return bytes(value)
    return new_id()


def new_id() -> bytes:
    """One that no other request has."""
    if not _ids:
        text = os.urandom(16 * IDS_DRAWN).hex().encode()
        _ids.extend(text[begin : begin + 32] for begin in range(0, len(text), 32))
    return _ids.pop()


_ids: list[bytes] = []
