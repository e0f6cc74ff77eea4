"""Requests that take long: each has an id, tells how far it is, and can be aborted."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from engines.workers.server import Cancelled, Refused, Turns, number, read_json, unless_client_leaves

REMEMBERED = 1000  # ended requests whose progress can still be asked for
BLOCK_LIMIT_S = 3600.0

T = TypeVar("T")


class Job:
    """One request, from its arrival on. `progress` goes from 0 to 1."""

    def __init__(self, request_id: str, kind: str = "") -> None:
        self.id, self.kind = request_id, kind
        self.progress = 0.0
        self.cancel = threading.Event()
        self.aborted = asyncio.Event()
        self.has_ended = False

    def step(self, done: int, total: int, share: float = 1.0, begin: float = 0.0) -> None:
        """So many of the steps are done, of a part that is `share` of the whole and begins at `begin`.

        Raises:
            Cancelled: nobody wants the rest.
        """
        if self.cancel.is_set():
            raise Cancelled
        self.progress = max(self.progress, begin + share * min(1.0, done / max(total, 1)))


class Jobs:
    """Does one at a time, in the order in which they come."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._blocked: dict[str, float] = {}  # ids that were aborted before they came, and until when

    def begin(self, request_id: str | None, kind: str = "") -> Job:
        """A job of that id, or of one made up.

        Raises:
            Refused: the id is that of a request that has not ended yet.
            Cancelled: somebody has aborted it already.
        """
        request_id = request_id or uuid.uuid4().hex
        known = self._jobs.pop(request_id, None)
        if known and not known.has_ended:
            self._jobs[request_id] = known
            raise Refused(f"`request_id` {request_id!r} is that of a request under way.", param="request_id")
        job = self._jobs[request_id] = Job(request_id, kind)
        if self._blocked.pop(request_id, 0.0) > time.monotonic():
            job.has_ended = True
            raise Cancelled
        return job

    async def run(self, request: Request, job: Job, work: Callable[[Job], T]) -> T:
        """What the work gives, when its turn has come; in a thread.

        Raises:
            Cancelled: the client has left, or the job was aborted.
        """
        try:
            result = await unless_client_leaves(request, self._unless_aborted(job, work))
            job.progress = 1.0
            return result
        finally:
            job.has_ended = True
            self._forget()

    async def _unless_aborted(self, job: Job, work: Callable[[Job], T]) -> T:
        turn: Coroutine[Any, Any, T] = self._turns.run(lambda cancel: work(job), job.cancel)
        task = asyncio.ensure_future(turn)
        aborted = asyncio.ensure_future(job.aborted.wait())
        try:
            await asyncio.wait((task, aborted), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Cancelled
        finally:
            for one in (task, aborted):
                one.cancel()
            await asyncio.gather(task, aborted, return_exceptions=True)

    def abort(self, job: Job) -> None:
        """Stop it at its next step, or before its turn."""
        job.cancel.set()
        job.aborted.set()

    def under_way(self, kind: str | None = None) -> list[Job]:
        """Those that have not ended, oldest first; all or of one kind."""
        return [job for job in self._jobs.values() if not job.has_ended and kind in (None, job.kind)]

    def _forget(self) -> None:
        ended = [job for job in self._jobs.values() if job.has_ended]
        for job in ended[: max(0, len(ended) - REMEMBERED)]:
            del self._jobs[job.id]

    def routes(self) -> list[BaseRoute]:
        """Progress and abort, for the gateway."""
        return [
            Route("/requests/{request_id:path}/progress", self._progress),
            Route("/requests/{request_id:path}/abort", self._abort, methods=["POST"]),
        ]

    async def _progress(self, request: Request) -> Response:
        job = self._jobs.get(request.path_params["request_id"])
        if job is None:
            raise Refused("There is no such request here.", status=404)
        return JSONResponse({"progress": job.progress, "has_ended": job.has_ended})

    async def _abort(self, request: Request) -> Response:
        """Also one that comes within `block_duration` seconds, as it may be on its way."""
        request_id = request.path_params["request_id"]
        fields = await read_json(request) if await request.body() else {}
        block_s = number(fields.get("block_duration") or 0, "block_duration", float, least=0, most=BLOCK_LIMIT_S)
        now = time.monotonic()
        self._blocked = {one: until for one, until in self._blocked.items() if until > now}
        job = self._jobs.get(request_id)
        if job is None or job.has_ended:
            if block_s:
                self._blocked[request_id] = now + block_s
            return JSONResponse({"msg": "NOT_FOUND"})
        self.abort(job)
        return JSONResponse({"msg": "DONE"})
