"""GET /v1/events: all that happens to models, as it happens."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.api.wire import json_answer
from gateway.events import Happening, Listener
from gateway.fleet import Fleet
from gateway.outlook import outlook
from gateway.replica import COMING

logger = logging.getLogger("hostler.events")

LOOK_S = 0.5  # between two looks at what changes all the time: queues, downloads
SEND_LIMIT_S = 15.0  # for what is written to go on its way
HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
MISSED = "Some of what happened since then is no longer known; this is how it is now."
TOO_SLOW = "What happens was not read in time, so this ends. Connect again; what is kept comes then."
CLOSING = "The gateway is ending."

encode = msgspec.json.encode


class EventStream:
    """An ASGI app, as it has to know when its client leaves, and must not wait for a slow one."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What is kept and ends, with follow=false; else what comes, until the client leaves."""
        request = Request(scope)
        uid = request.query_params.get("model_uid") or None
        if request.query_params.get("follow", "").lower() in ("0", "false", "no"):
            await json_answer(self._fleet.events.after(0, uid))(scope, receive, send)
            return
        since = request.headers.get("last-event-id") or request.query_params.get("last_event_id") or ""
        with self._fleet.events.listening(uid) as listener:
            telling = asyncio.create_task(self._tell(listener, since, send))
            leaving = asyncio.create_task(_until_left(receive))
            try:
                await asyncio.wait((telling, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (telling, leaving):
                    task.cancel()
                ends = await asyncio.gather(telling, leaving, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _tell(self, listener: Listener, since: str, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        chunk = b"".join(self._beginning(listener.uid, since))
        look = Look(self._fleet, listener.uid)
        looked_at = sent_at = time.monotonic()
        is_last = False
        while not is_last:
            chunk += b"".join(map(self._event, listener.read()))
            if (now := time.monotonic()) - looked_at >= LOOK_S:
                looked_at = now
                chunk += b"".join(map(self._event, look.changes()))
            if listener.is_behind:
                chunk, is_last = chunk + _last("dropped", TOO_SLOW), True
            elif self._fleet.is_closing:
                chunk, is_last = chunk + _last("end", CLOSING), True
            elif not chunk and now - sent_at >= self._fleet.settings.keepalive_interval_s:
                chunk = b": nothing new\n\n"
            if chunk:
                try:
                    async with asyncio.timeout(SEND_LIMIT_S):
                        await send({"type": "http.response.body", "body": chunk, "more_body": not is_last})
                except TimeoutError:
                    logger.warning("a listener of /v1/events did not read for %g s and is dropped", SEND_LIMIT_S)
                    return
                chunk, sent_at = b"", time.monotonic()
            if not is_last:
                await listener.wait(LOOK_S)

    def _beginning(self, uid: str | None, since: str) -> Iterator[bytes]:
        """What came since, if all of it is known; else how things are."""
        life, _, number = since.rpartition("-")
        log = self._fleet.events
        if number.isdecimal() and log.has_all_after(life, int(number)):
            yield from map(self._event, log.after(int(number), uid))
            return
        if since:
            yield _last("missed", MISSED)
        for deployment in self._fleet.deployments():
            if uid in (None, deployment.launch.uid):
                for replica in deployment.replicas:
                    yield self._event(
                        Happening(
                            type="state",
                            model_uid=deployment.launch.uid,
                            time=time.time(),
                            replica=replica.index,
                            after=str(replica.state),
                        )
                    )

    def _event(self, happening: Happening) -> bytes:
        number = b"id: %s-%d\n" % (self._fleet.events.life.encode(), happening.number) if happening.number else b""
        return number + b"event: %s\ndata: %s\n\n" % (happening.type.encode(), encode(happening))


class Look:
    """What of queues and loads is other than at the last look."""

    def __init__(self, fleet: Fleet, uid: str | None) -> None:
        self._fleet = fleet
        self._uid = uid
        self._queues: dict[str, tuple[int, int]] = {}
        self._stages: dict[str, tuple[str, int | None]] = {}

    def changes(self) -> Iterable[Happening]:
        """Of each model one of a kind, at the most."""
        now = time.monotonic()
        queues, self._queues = self._queues, {}
        stages, self._stages = self._stages, {}
        for deployment in self._fleet.deployments():
            uid = deployment.launch.uid
            if self._uid not in (None, uid):
                continue
            queue = self._queues[uid] = (deployment.waiting, deployment.in_flight)
            if queue != queues.get(uid, (0, 0)):
                since = deployment.waiting_since
                yield Happening(
                    type="queue",
                    model_uid=uid,
                    time=time.time(),
                    waiting=queue[0],
                    in_flight=queue[1],
                    oldest_wait_s=None if since is None else round(now - since, 3),
                )
            if deployment.state not in COMING:
                continue
            told = outlook(deployment)
            percent = None if told.percent is None else int(told.percent)
            stage = self._stages[uid] = (told.stage, percent)
            if stage != stages.get(uid):
                yield Happening(
                    type="progress",
                    model_uid=uid,
                    time=time.time(),
                    text=str(told),
                    percent=percent,
                    left_s=None if told.left_s is None else round(told.left_s, 1),
                )


class QueueFacts:
    """GET /v1/models/{uid}/queue: who waits for a model, and for how long yet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def get(self, request: Request) -> Response:
        """As operators and waiting clients see it; wakes no model."""
        deployment = self._fleet.find(request.path_params["uid"])
        launch, told, since = deployment.launch, outlook(deployment), deployment.waiting_since
        return json_answer(
            {
                "model_uid": launch.uid,
                "state": told.state,
                "stage": told.stage,
                "percent": told.percent,
                "left_s": told.left_s,
                "waiting": deployment.waiting,
                "oldest_wait_s": None if since is None else time.monotonic() - since,
                "in_flight": deployment.in_flight,
                "is_held": deployment.is_held,
                "queue_limit": deployment.queue_limit,
                "request_limits": launch.request_limits,
                "text": deployment.progress_text(),
            }
        )


def _last(kind: str, text: str) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), encode({"type": kind, "text": text}))


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
