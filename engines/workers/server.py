"""The frame of our workers: arguments, one listener, key check, errors in OpenAI's shape, work that can be cancelled.

A worker is a module with a `main()` that calls `serve(load)`. Importing it costs the standard library, starlette and
uvicorn; what a worker's model needs is imported by its `load`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import json
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

KEY_VARIABLE = "WORKER_API_KEY"
OPTIONS_VARIABLE = "WORKER_OPTIONS"
OPEN_PATHS = ("/health",)
SHUTDOWN_LIMIT_S = 5
BACKLOG = 1024
SSE = "text/event-stream"
# How torch, ctranslate2 and onnxruntime say it.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "Failed to allocate memory", "std::bad_alloc")
GPU_FAILED = "CUDA error"  # as torch says it
TELL_S = 0.5  # for those whose requests it has ended, to read so
FAILURE_LIMIT = 1000  # characters

T = TypeVar("T")


class Refused(Exception):
    """The request cannot be done; the text says what is wrong and what to do."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


class Cancelled(Exception):
    """The client has left, or somebody has aborted the request: the work was stopped."""


class Order:
    """What the worker was started for: the model's files, its uid, and the options of its launch."""

    def __init__(self, model: str, uid: str, options: dict[str, Any]) -> None:
        self.model, self.uid, self.options = model, uid, options


Load = Callable[[Order], list[BaseRoute]]


def serve(load: Load) -> None:
    """Load the model, then serve its routes until SIGTERM. Exit code 1: it cannot be loaded, and the log says why."""
    arguments = _arguments()
    order = Order(arguments.model, arguments.uid, json.loads(os.environ.get(OPTIONS_VARIABLE) or "{}"))
    started = time.monotonic()
    try:
        routes = load(order)
    except Refused as exc:
        sys.exit(_one_line(exc.message))
    except Exception as exc:  # whatever the libraries raise: it ends the process either way
        sys.exit(_one_line(f"{order.model} cannot be loaded: {type(exc).__name__}: {exc}"))
    print(f"loaded in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    if arguments.host.endswith(".sock"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(arguments.host)  # one that a killed worker has left
        where: dict[str, Any] = {"uds": arguments.host}
    else:
        where = {"host": arguments.host, "port": arguments.port}
    uvicorn.run(
        create_app(routes, os.environ.get(KEY_VARIABLE, "")),
        **where,
        log_level="warning",
        access_log=False,
        lifespan="off",
        backlog=BACKLOG,
        timeout_graceful_shutdown=SHUTDOWN_LIMIT_S,
    )
    os._exit(0)  # threads in native code may not want to end


def create_app(routes: Iterable[BaseRoute], key: str) -> ASGIApp:
    """The routes and /health as an app that answers whoever has the key."""
    app = Starlette(
        routes=[Route("/health", _health), *routes],
        exception_handlers={HTTPException: _no_route} | dict.fromkeys((Refused, Cancelled, Exception), _failure),
    )
    return _Guard(app, key)


def _one_line(text: str) -> str:
    """What users read of a failure is a log's last lines; libraries' errors may have many."""
    line = " ".join(text.split())
    return line if len(line) <= FAILURE_LIMIT else f"{line[:FAILURE_LIMIT]}..."


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True, help="file or folder of the model")
    parser.add_argument("--uid", required=True, help="what clients send as `model`")
    parser.add_argument("--host", default="127.0.0.1", help="address, or a path that ends in .sock")
    parser.add_argument("--port", type=int, default=0)
    return parser.parse_args()


class _Guard:
    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}".encode() if key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._expected and scope["path"] not in OPEN_PATHS:
            sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(sent, self._expected):
                await error("The worker's key is missing or wrong.", status=401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


# --- answers


def error(message: str, *, status: int, param: str | None = None, code: str | None = None) -> Response:
    """An error as OpenAI's clients know it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _no_route(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    return error(f"{request.method} {request.url.path}: {exc.detail}.", status=exc.status_code)


async def _failure(request: Request, exc: Exception) -> Response:
    return failure(exc)


def failure(exc: BaseException) -> Response:
    """What is told of a request that has ended so, whole or in the last event of a stream.

    A GPU that has failed fails for good: the process ends once that is told, so that a fresh one is started.
    """
    if isinstance(exc, Refused):
        return error(exc.message, status=exc.status, param=exc.param, code=exc.code)
    if isinstance(exc, Cancelled):
        return error("The request was cancelled.", status=409, code="cancelled")
    if is_out_of_memory(exc):
        return error(
            f"There was not enough memory for this request{_reason(exc)}. Send a smaller one, or give the model more "
            "memory.",
            status=503,
            code="out_of_memory",
        )
    if GPU_FAILED in str(exc):
        print(f"The GPU has failed, so the worker ends: {exc}", file=sys.stderr, flush=True)
        asyncio.get_running_loop().call_later(TELL_S, os._exit, 1)
    return error(f"The model failed: {type(exc).__name__}: {exc}", status=500)


def stream_failure(exc: BaseException) -> Response:
    """The same for a stream, whose last event holds its body; the log tells it too, as nothing else would."""
    if not isinstance(exc, Refused | Cancelled):
        print(f"a stream failed: {type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
    return failure(exc)


def _reason(exc: BaseException) -> str:
    return f": {text.rstrip('.')}" if (text := str(exc)) else ""


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether it is Python's, or a library's by its name or its text."""
    return (
        isinstance(exc, MemoryError)
        or type(exc).__name__ == "OutOfMemoryError"
        or any(words in str(exc) for words in OUT_OF_MEMORY)
    )


# --- requests


async def read_json(request: Request) -> dict[str, Any]:
    """The body as an object. Raises Refused if it is none."""
    try:
        data = json.loads(await request.body())
    except (ValueError, UnicodeDecodeError, RecursionError) as exc:
        raise Refused(f"The request body is not valid JSON: {exc}.") from exc
    except ClientDisconnect as exc:
        raise Cancelled from exc
    if not isinstance(data, dict):
        raise Refused("The request body is not a JSON object.")
    return data


async def unless_client_leaves(request: Request, work: Awaitable[T]) -> T:
    """What the work gives; it is cancelled at once if the client leaves. Read the body before.

    Raises:
        Cancelled: the client has left.
    """
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watcher = asyncio.ensure_future(watch())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class Turns:
    """Runs jobs one after the other in a thread, in the order in which they come; for models that do one at a time.

    A job is a function of a `threading.Event`, which it looks at between its steps and raises Cancelled when it is
    set. A job that is cancelled before its turn never runs.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self.waiting = 0

    async def run(self, job: Callable[[threading.Event], T], cancel: threading.Event | None = None) -> T:
        """The job's result, once it is done. To cancel the task sets the event, and waits for the job to notice."""
        cancel = cancel or threading.Event()
        self.waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self.waiting -= 1
        try:
            if cancel.is_set():
                raise Cancelled
            running = asyncio.ensure_future(asyncio.to_thread(job, cancel))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                cancel.set()
                await asyncio.gather(running, return_exceptions=True)  # the model is not free before
                raise
        finally:
            self._turn.release()

    async def stream(
        self, job: Callable[[threading.Event, Callable[[bytes], None]], None]
    ) -> AsyncGenerator[bytes, None]:
        """What the job puts out piece by piece, by calling its second argument; it may be at most two pieces ahead."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[bytes | None] = asyncio.Queue(2)
        cancel = threading.Event()

        def put(piece: bytes) -> None:
            if cancel.is_set():
                raise Cancelled
            asyncio.run_coroutine_threadsafe(pieces.put(piece), loop).result()

        async def produce() -> None:
            try:
                await self.run(lambda event: job(event, put), cancel)
            finally:
                if not cancel.is_set():
                    await pieces.put(None)

        producer = asyncio.ensure_future(produce())
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await producer
        finally:
            cancel.set()
            while not producer.done():  # it may wait for room
                with contextlib.suppress(asyncio.QueueEmpty):
                    pieces.get_nowait()
                await asyncio.wait((producer,), timeout=0.05)
            if not producer.cancelled():
                producer.exception()


async def streamed(request: Request, pieces: AsyncGenerator[bytes, None], media_type: str) -> Response:
    """The pieces as they come. A failure before the first has its own status; a later one is an event, if these are.

    Raises:
        Cancelled: the client has left before the first.
    """
    first = await unless_client_leaves(request, anext(pieces))

    async def body() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(pieces):
            yield first
            try:
                async for piece in pieces:
                    yield piece
            except Exception as exc:
                if media_type != SSE or isinstance(exc, Cancelled):
                    raise  # the body breaks off, which says it
                yield b"data: " + bytes(stream_failure(exc).body) + b"\n\n"

    return StreamingResponse(body(), media_type=media_type)


# --- how workers read requests


def flag(value: Any, name: str, *, default: bool = False) -> bool:
    """A boolean, also one written as text. Raises Refused otherwise."""
    if value is None:
        return default
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "1", "yes", "on"):
        return True
    if str(value).lower() in ("false", "0", "no", "off", ""):
        return False
    raise Refused(f"`{name}` is true or false, not {value!r}.", param=name)


def number(value: Any, name: str, kind: type[int] | type[float], *, least: float, most: float) -> Any:
    """A number, also one written as text, within bounds. Raises Refused otherwise."""
    try:
        if isinstance(value, bool):
            raise ValueError
        found = kind(value)
        if kind is int and isinstance(value, float) and found != value:
            raise ValueError
    except (TypeError, ValueError, OverflowError) as exc:
        what = "a whole number" if kind is int else "a number"
        raise Refused(f"`{name}` is {what}, not {value!r}.", param=name) from exc
    if not least <= found <= most:
        raise Refused(f"`{name}` is {found}; it may be from {least} to {most}.", param=name)
    return found


def more_options(value: Any) -> dict[str, Any]:
    """`kwargs` as Xinference's clients send them: a JSON text of an object. Raises Refused otherwise."""
    if value in (None, ""):
        return {}
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as exc:
        raise Refused(f"`kwargs` is not valid JSON: {exc}.", param="kwargs") from exc
    if not isinstance(found, dict):
        raise Refused("`kwargs` is a JSON object, written as text.", param="kwargs")
    return found
