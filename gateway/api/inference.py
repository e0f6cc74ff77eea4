"""The hot path: a request's bytes go to a replica, the reply's bytes come back as they are.

We read the head of the body (which model, streamed or not); what else is touched is told in `ways.py`. Deciding
(which replica, may it be tried again) is kept apart from moving bytes.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from gateway import metrics
from gateway.api import alias
from gateway.api.affinity import key_of
from gateway.api.body import read_body
from gateway.api.heads import FormHead, Head, is_form, read_form_head, read_head, read_query_head
from gateway.api.next_door import headers_of, is_answered_next_door, path_of
from gateway.api.ways import Way, check_served, replaced, with_adapter
from gateway.deployment import Deployment
from gateway.errors import (
    SOURCE_HEADER,
    BadReply,
    BadRequest,
    CannotKeep,
    EngineDied,
    ErrorBody,
    HandedOver,
    HostlerError,
    ModelLoading,
    NoMoreFiles,
    ShuttingDown,
    answer,
    body_of,
    envelope,
)
from gateway.fleet import Fleet
from gateway.outlook import retry_after_s
from gateway.queue import Key, Ticket
from gateway.replica import Replica
from gateway.upstream import CannotAsk, Reply, UpstreamLost

logger = logging.getLogger("hostler.inference")

# Headers that belong to one connection or one door, and end there; a reply that is packed could not be changed.
NOT_FORWARDED = frozenset(
    b"accept-encoding authorization connection content-length cookie expect host keep-alive proxy-authorization "
    b"proxy-connection te trailer transfer-encoding upgrade x-api-key x-hostler-hops x-request-id".split()
)
HOPS_HEADER = "x-hostler-hops"  # through how many gateways a request has come: a remote model may lead back to us
HOP_LIMIT = 5
NOT_RETURNED = frozenset(
    b"access-control-allow-credentials access-control-allow-headers access-control-allow-methods "
    b"access-control-allow-origin connection date keep-alive server set-cookie trailer transfer-encoding upgrade "
    b"x-request-id".split()
)
SSE = b"text/event-stream"
SSE_HEADERS = [(b"content-type", SSE), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
# What servers say to a path that they do not have.
NO_ROUTE = re.compile(r"(40[45]:? *)?((file|page|path|route) )?(not found|method not allowed)\.?$|\s*<", re.IGNORECASE)
ATTEMPTS = 2
ENGINE_ERROR_LIMIT_BYTES = 64 * 1024
EVENT_LIMIT_BYTES = 2**20
LARGE_EVENT_LIMIT_BYTES = 2**28  # of events that are changed, which carry pictures


class Inference:
    """One public path, as an ASGI app."""

    def __init__(self, fleet: Fleet, way: Way, choose: Callable[[Any], str] | None = None) -> None:
        """`choose` finds the model of a head that names it in a way of its own."""
        self._fleet = fleet
        self._way = way
        self._choose = choose
        self._decoder = msgspec.json.Decoder(way.head)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, find the model, relay."""
        way = self._way
        asked = body = await read_body(scope, receive, self._fleet.settings.max_body_bytes)
        if self._fleet.next_door and await is_answered_next_door(self._fleet, scope, body, receive, send):
            return
        head = self._read_head(scope, body)
        uid = self._choose(head) if self._choose else head.model or self._model_for(way.abilities)
        deployment = self._fleet.find(uid)
        check_served(way, deployment.launch.uid, deployment.launch.artifact.family.model_type)
        if not isinstance(head, FormHead):
            body = way.adapt(body, head, deployment.defaults)
            if head.lora_name:
                body = self._with_adapter(body, head.lora_name, deployment)
        if deployment.served_name != deployment.launch.uid:
            body = _named(body, head, scope, deployment.served_name)
        await Exchange(self._fleet, deployment, way, head, scope, send, body, asked).run(receive)

    def _with_adapter(self, body: bytes, lora_name: str, deployment: Deployment) -> bytes:
        try:
            return with_adapter(body, deployment.engine.with_adapter(deployment.launch, lora_name))
        except ValueError as exc:
            raise BadRequest(str(exc), param="lora_name") from exc

    def _read_head(self, scope: Scope, body: bytes) -> Head | FormHead:
        way = self._way
        if way.takes == "query":
            return read_query_head(scope["query_string"])
        if way.takes != "json":
            content_type = _content_type(scope)
            if is_form(content_type):
                return read_form_head(content_type, body)
            if way.takes == "form":
                raise BadRequest(f"{way.path} takes a multipart form (content-type multipart/form-data).")
        head: Head = read_head(self._decoder, body, way.path)
        return head

    def _model_for(self, abilities: Sequence[str]) -> str:
        """The first model that can do one of these, for a request that names none."""
        for deployment in self._fleet.deployments():
            if set(abilities) & set(deployment.launch.artifact.family.abilities):
                return deployment.launch.uid
        raise BadRequest(f"The request has no `model`, which {self._way.path} needs.", param="model")


class Exchange:
    """One request and its reply."""

    def __init__(
        self,
        fleet: Fleet,
        deployment: Deployment,
        way: Way,
        head: Head | FormHead,
        scope: Scope,
        send: Send,
        body: bytes,
        asked: bytes,
    ) -> None:
        """`body` is what the engine gets; `asked` is what the client sent."""
        self.fleet = fleet
        self.deployment = deployment
        self.way = way
        self.head: Any = head
        self.scope = scope
        self.send = send
        self.body = body
        self.asked = asked
        uid = deployment.launch.uid
        self.back = alias.Back(deployment.served_name, uid) if deployment.served_name != uid else None
        self.is_stream = bool(head.stream) and way.streams
        self.started = time.perf_counter()
        self.started_at = time.time()
        self.words = deployment.engine.chat_words if way.is_chat else ()
        self.stops = deployment.stops
        self.status = 0  # once the head of the reply is on its way
        self.queued_s = 0.0  # how long it has waited for a replica
        self.is_sse = False  # the reply's head says so
        self.phase = "queued"  # then "waiting" for the engine's first byte, then "answering"
        self.is_finished = False
        self.replica_name = ""  # of the replica that answers

    @property
    def public_url(self) -> str:
        """How the client reaches us."""
        host = next((value for name, value in self.scope["headers"] if name == b"host"), b"localhost")
        return f"{self.scope['scheme']}://{host.decode('latin-1')}"

    async def run(self, receive: Receive) -> None:
        """Answer, or stop at once when the client leaves; either way count it."""
        uid = self.deployment.launch.uid
        try:
            if await _unless_client_leaves(self._answer(), receive, self):
                outcome = self.status
            else:
                outcome = 499
                metrics.CANCELLED.labels(uid, self.phase).inc()
        except asyncio.CancelledError:
            outcome = 499
            raise
        self.scope["outcome"] = outcome
        metrics.REQUESTS.labels(uid, self.way.path, outcome).inc()
        metrics.REQUEST_SECONDS.labels(uid).observe(time.perf_counter() - self.started)

    async def _answer(self) -> None:
        try:
            try:
                await self._relay_from_a_replica()
            except HandedOver:
                await self._relay_from_next_door()
        except HostlerError as exc:
            if not self.status:
                self.status = exc.status
                self.is_finished = True
                await answer(exc)(self.scope, _no_receive, self.send)
            elif self.is_sse:
                await self._end_stream_with(exc)
            else:  # a body that was promised cannot be completed: the connection must end, and does on return
                logger.warning("%s: the reply broke off: %s", self.deployment.launch.uid, exc)
                self.status = exc.status

    async def _relay_from_a_replica(self) -> None:
        """Try a replica, and once more if it dies before a byte of its reply."""
        lost: Replica | None = None
        for attempt in range(1, ATTEMPTS + 1):
            replica = await self._acquire(avoid=lost)
            life = replica.starts
            was_served = False
            try:
                reply, chunk = await self._ask(replica)
                try:
                    await self._relay(reply, chunk, replica)
                    was_served = reply.status < 500
                finally:
                    reply.close()
                return
            except CannotAsk as exc:
                raise NoMoreFiles(
                    f"The gateway can open no connection to the engine now: {exc}. Come back in a moment; more at once "
                    "need a higher limit of open files where the gateway starts (`ulimit -n`)."
                ) from exc
            except UpstreamLost as exc:
                await replica.confirm()
                self.deployment.check_still_wanted(self.stops)
                if attempt == ATTEMPTS or self.phase == "answering" or self._has_nobody_but(replica, life):
                    raise EngineDied(self._death(replica, exc)) from exc
                logger.warning("%s died before it answered; the request is sent again", replica)
                metrics.RETRIES.labels(self.deployment.launch.uid).inc()
                lost = replica
            finally:
                self.deployment.release(replica, was_served=was_served)

    async def _relay_from_next_door(self) -> None:
        """Another gateway has taken over while the request waited: it answers, as it would have without us."""
        async with self.fleet.relaying() as door:
            if door is None or self.phase == "answering":
                raise ShuttingDown("The gateway was restarted before the answer was complete. Try again.")
            try:
                reply = await door.send(self.way.method, path_of(self.scope), headers_of(self.scope), self.asked)
                try:
                    await self._pass_on(reply, await reply.read())
                finally:
                    reply.close()
            except UpstreamLost as exc:
                raise ShuttingDown("The gateway is restarting. Try again.") from exc

    async def _pass_on(self, reply: Reply, chunk: bytes) -> None:
        """What a gateway answers, which needs no change, but where comments have promised a stream."""
        if self.status and reply.status >= 400:
            await self._relay_error(reply, chunk)
            return
        if self.status and not reply.is_sse:
            await self._relay_as_event(reply, chunk)
            return
        self.is_sse |= reply.is_sse
        if not self.status:
            await self._start(reply.status, [header for header in reply.headers if header[0] not in NOT_RETURNED])
        self.phase = "answering"
        while chunk:
            await self._send_body(chunk)
            chunk = await reply.read()
        await self._finish(b"")

    def _has_nobody_but(self, replica: Replica, life: int) -> bool:
        """Whether the replica lives on in the same life and is alone: what it has dropped, it would drop again."""
        return self.deployment.ready() == [replica] and replica.starts == life

    def _death(self, replica: Replica, exc: UpstreamLost) -> str:
        failure = replica.failure
        why = f"{failure.reason}. {failure.advice}" if failure and failure.at >= self.started_at else f"{exc}."
        return f"The engine of {self.deployment.launch.uid!r} went away while it answered: {why}"

    async def _acquire(self, avoid: Replica | None) -> Replica:
        """A replica that is ready; a stream that waits gets comments, others wait up to load_timeout_s."""
        self.phase = "queued"
        deployment = self.deployment
        key = self._key() if len(deployment.replicas) > 1 else None
        if (replica := deployment.acquire_now(avoid, key)) is not None:
            return replica
        waited_since = time.perf_counter()
        ticket = deployment.enter(avoid, key, is_again=avoid is not None)
        try:
            if self.is_stream:
                return await self._wait_with_comments(ticket)
            limit_s = deployment.launch.load_timeout_s
            if (replica := await ticket.wait(limit_s)) is not None:
                return replica
            raise ModelLoading(
                f"{deployment.progress_text(deployment.number_of(ticket))}. It was not ready within load_timeout_s "
                f"({limit_s:g} s); the load goes on, so try again later, or send a streamed request, which waits for "
                "longer.",
                retry_after_s=retry_after_s(deployment, ModelLoading.retry_after_s or 0),
            )
        finally:
            deployment.leave(ticket)
            waited_s = time.perf_counter() - waited_since
            self.queued_s += waited_s
            metrics.QUEUE_SECONDS.labels(deployment.launch.uid).observe(waited_s)

    def _key(self) -> Key | None:
        return key_of(self.scope["headers"], self.head, reads_opening=self.deployment.engine.keeps_prefixes)

    async def _wait_with_comments(self, ticket: Ticket[Replica]) -> Replica:
        """As long as the model is coming; how long that may take is for its own clocks to say."""
        deployment = self.deployment
        while (replica := await ticket.wait(self.fleet.settings.keepalive_interval_s)) is None:
            if not self.status:
                self.is_sse = True
                await self._start(200, SSE_HEADERS)
            text = deployment.progress_text(deployment.number_of(ticket))
            await self._send_body(f": {' '.join(text.split())}\n\n".encode())
        return replica

    async def _ask(self, replica: Replica) -> tuple[Reply, bytes]:
        """Send the request; the head of the reply and the first bytes of its body."""
        upstream = replica.upstream
        if upstream is None:
            raise UpstreamLost("it was stopped")
        self.phase = "waiting"
        self.scope["served_by"] = replica
        self.replica_name = replica.name
        path = self.way.upstream or self.way.path
        path = self.deployment.engine.routes.get(path, path)
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in self.scope["headers"]
            if name not in NOT_FORWARDED
        ]
        headers.append(("x-request-id", self.scope["request_id"].decode("latin-1")))
        if upstream.is_elsewhere:
            headers.append((HOPS_HEADER, str(self._hops())))
        reply = await upstream.send(self.way.method, path, headers, self.body)
        try:
            chunk = await reply.read()
        except BaseException:
            reply.close()
            raise
        metrics.FIRST_BYTE_SECONDS.labels(self.deployment.launch.uid).observe(time.perf_counter() - self.started)
        return reply, chunk

    def _hops(self) -> int:
        """Through how many gateways the request has come, us among them.

        Raises:
            BadRequest: so many that it goes in a circle.
        """
        came = next((value for name, value in self.scope["headers"] if name == HOPS_HEADER.encode()), b"0")
        hops = 1 + (int(came) if came.isdigit() else 0)
        if hops > HOP_LIMIT:
            raise BadRequest(
                f"The request has come through {HOP_LIMIT} gateways, so it goes in a circle: the `base_url` of "
                f"{self.deployment.launch.uid!r} leads back here. Correct it, or the model's name there (`model`).",
                param="model",
            )
        return hops

    async def _relay(self, reply: Reply, chunk: bytes, replica: Replica) -> None:
        """Pass the reply on as it comes."""
        if reply.status >= 400:
            await self._relay_error(reply, chunk)
            return
        if self.status and not reply.is_sse:
            await self._relay_as_event(reply, chunk)
            return
        self.is_sse |= reply.is_sse
        headers = [header for header in reply.headers if header[0] not in NOT_RETURNED]
        headers.append((b"x-hostler-replica", str(replica.index).encode()))
        if self.queued_s:
            headers.append((b"x-hostler-queue-ms", b"%d" % (1000 * self.queued_s)))
        if self.is_sse:
            headers += [header for header in SSE_HEADERS if header[0] not in {name for name, _ in headers}]
        elif _is_json(headers) and (self.way.rewrite or self.way.opening or self.words or self.back):
            chunk = await self._changed(reply, chunk, headers)
        if not self.status:
            await self._start(reply.status, headers)
        self.phase = "answering"
        # A break must not leave half an event.
        events = Events(LARGE_EVENT_LIMIT_BYTES if self.way.events else EVENT_LIMIT_BYTES)
        while chunk:
            if self.is_sse:
                chunk = events.whole(chunk)
                if self.way.chunk:
                    chunk = self.way.chunk(chunk)
                chunk = replaced(chunk, self.words)
                if self.back:
                    chunk = self.back.put(chunk)
                if chunk and self.way.events:
                    chunk = await asyncio.to_thread(self._rewritten, self.way.events, chunk)
            if chunk:
                await self._send_body(chunk)
            chunk = await reply.read()
        await self._finish(bytes(events.held))

    async def _changed(self, reply: Reply, chunk: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The first bytes of a JSON reply that differs for clients; `headers` say its new length."""
        length = next((int(value) for name, value in headers if name == b"content-length"), None)
        headers[:] = [header for header in headers if header[0] != b"content-length"]
        if self.way.rewrite or self.words or self.back:
            whole = bytearray(chunk)
            while chunk := await reply.read():
                whole += chunk
            chunk = replaced(bytes(whole), self.words)
            if self.back:
                chunk = self.back.put(chunk)
            if self.way.rewrite:
                chunk = await asyncio.to_thread(self._rewritten, self.way.rewrite, chunk)
            length = len(chunk)
        if self.way.opening and chunk[:2] not in (b"", b"{", b"{}") and chunk[:1] == b"{":
            opening = self.way.opening(self)
            chunk = b"{" + opening + chunk[1:]
            length = None if length is None else length + len(opening)
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        return chunk

    def _rewritten(self, rewrite: Callable[[bytes, Exchange], bytes], reply: bytes) -> bytes:
        try:
            return rewrite(reply, self)
        except (msgspec.MsgspecError, KeyError, TypeError, ValueError, IndexError) as exc:
            uid = self.deployment.launch.uid
            raise BadReply(f"The engine of {uid!r} answered what is no {self.way.path} reply: {exc!r}") from exc
        except OSError as exc:
            raise CannotKeep(f"The reply's files cannot be written: {exc}. Mend the data folder.") from exc

    async def _relay_as_event(self, reply: Reply, chunk: bytes) -> None:
        """A whole answer where comments have promised a stream, as from an engine that does not stream."""
        self.phase = "answering"
        parts = [chunk]
        while chunk := await reply.read():
            parts.append(chunk)
        whole = b"".join(parts)
        lines = (self.back.put(whole) if self.back else whole).splitlines()
        await self._finish(b"".join(b"data: " + line + b"\n" for line in lines) + b"\n" + self.way.done)

    async def _relay_error(self, reply: Reply, chunk: bytes) -> None:
        """An engine's error, in the envelope that clients know."""
        text = chunk
        while chunk and len(text) < ENGINE_ERROR_LIMIT_BYTES:
            chunk = await reply.read()
            text += chunk
        error = _engine_error(reply.status, text)
        if reply.status in (404, 405) and NO_ROUTE.match(error.message):
            uid, engine = self.deployment.launch.uid, self.deployment.engine.name
            said = f"The engine of {uid!r}, {engine}, has no {self.way.path}. Launch the model on one that has."
            error = msgspec.structs.replace(error, message=said)
        status = reply.status
        refusals = self.deployment.engine.refusals.items()
        if sentence := next((said for begin, said in refusals if error.message.startswith(begin)), None):
            said = f"{self.deployment.launch.uid!r} {sentence}"
            error = ErrorBody(message=said, type="invalid_request_error", source="engine")
            status = 400
        if self.status:  # comments were sent, so the error can only be an event
            await self._finish(self._error_event(error))
            return
        headers = [(b"content-type", b"application/json"), (SOURCE_HEADER.encode(), b"engine")]
        headers += [header for header in reply.headers if header[0] == b"retry-after"]
        payload = envelope(error)
        await self._start(status, [*headers, (b"content-length", str(len(payload)).encode())])
        await self._finish(payload)

    async def _end_stream_with(self, exc: HostlerError) -> None:
        self.status = exc.status
        await self._finish(self._error_event(body_of(exc)))

    def _error_event(self, error: ErrorBody) -> bytes:
        return self.way.error_event + b"data: " + envelope(error) + b"\n\n" + self.way.done

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_body(self, chunk: bytes) -> None:
        await self.send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _finish(self, chunk: bytes) -> None:
        self.is_finished = True
        await self.send({"type": "http.response.body", "body": chunk, "more_body": False})


async def _unless_client_leaves(work: Awaitable[None], receive: Receive, exchange: Exchange) -> bool:
    """Do the work, but stop it at once if the client leaves; whether it was done.

    The server's `send` says nothing when a client has left, so somebody must listen.
    """
    task = asyncio.current_task()
    assert task is not None
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await receive())["type"] != "http.disconnect":
            pass
        if not exchange.is_finished:
            has_left = True
            task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        await work
    except asyncio.CancelledError:
        if not has_left:
            raise
        task.uncancel()
        return False
    finally:
        watcher.cancel()
    return True


def _content_type(scope: Scope) -> bytes:
    return next((value for name, value in scope["headers"] if name == b"content-type"), b"")


def _named(body: bytes, head: Head | FormHead, scope: Scope, name: str) -> bytes:
    """The request with the name by which the engine knows the model."""
    if isinstance(head, FormHead):
        return alias.in_form(body, _content_type(scope), name)
    return alias.in_json(body, name)


def _is_json(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    kind = next((value for name, value in headers if name == b"content-type"), b"")
    return kind.startswith(b"application/json") and not any(name == b"content-encoding" for name, _ in headers)


class Events:
    """Server-sent events out of chunks: gives what is whole, holds the beginning of the next."""

    def __init__(self, limit_bytes: int = EVENT_LIMIT_BYTES) -> None:
        self.held = bytearray()
        self._limit_bytes = limit_bytes

    def whole(self, chunk: bytes) -> bytes:
        """All events that are whole with this chunk; one that grows too large is passed on in parts."""
        if not self.held and chunk.endswith((b"\n\n", b"\r\n\r\n")):
            return chunk
        searched = max(0, len(self.held) - 3)  # the end of an event may lie across two chunks
        self.held += chunk
        end = max(_end_after(self.held, mark, searched) for mark in (b"\n\n", b"\r\n\r\n"))
        if not end and len(self.held) > self._limit_bytes:
            end = len(self.held)
        events = bytes(self.held[:end])
        del self.held[:end]
        return events


def _end_after(data: bytearray, mark: bytes, begin: int) -> int:
    found = data.rfind(mark, begin)
    return found + len(mark) if found >= 0 else 0


def _engine_error(status: int, text: bytes) -> ErrorBody:
    """What an engine says of a failure, in whichever shape it says it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    try:
        said = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = None
    error = said.get("error", said) if isinstance(said, dict) else None
    if not isinstance(error, dict):
        message = error if isinstance(error, str) else text.decode(errors="replace").strip()
        return ErrorBody(message=message or f"The engine answered {status}.", type=kind, source="engine")
    message = error.get("message") or error.get("detail") or text.decode(errors="replace")
    code = error.get("code")
    return ErrorBody(
        message=str(message),
        type=str(error.get("type") or kind),
        param=error["param"] if isinstance(error.get("param"), str) else None,
        code=code if isinstance(code, str | int) else None,
        source="engine",
    )


async def _no_receive() -> dict[str, str]:
    return {"type": "http.disconnect"}
