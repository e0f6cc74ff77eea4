"""The hot path: a request's bytes go to a replica, the reply's bytes come back as they are.

We read the head of the body (which model, streamed or not); what else is touched is told in `ways.py`. Deciding
(which replica, may it be tried again) is kept apart from moving bytes: see `exchange.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.types import Receive, Scope, Send

from gateway import metrics
from gateway.api import alias, usage
from gateway.api.beginning import Fields, as_whole, with_last_value
from gateway.api.body import read_body
from gateway.api.exchange import (
    ENGINE_ERROR_LIMIT_BYTES,
    HOPS_HEADER,
    NOT_RETURNED,
    RESTARTED_MIDWAY,
    SSE_HEADERS,
    Asked,
    Exchange,
    Headers,
    Lost,
    Terms,
    end_to_end,
    in_utf8,
    with_length,
)
from gateway.api.heads import FormHead, Head, is_form, read_form_head, read_head, read_query_head
from gateway.api.next_door import headers_of, is_answered_next_door, path_of
from gateway.api.ways import Way, as_it_is, with_adapter, with_defaults
from gateway.connections import UpstreamLost
from gateway.deployment import Deployment
from gateway.errors import (
    BadReply,
    BadRequest,
    CannotKeep,
    HandedOver,
    HostlerError,
    ModelLoading,
    ShuttingDown,
    answer,
    body_of,
    envelope,
)
from gateway.fleet import Fleet
from gateway.outlook import retry_after_s
from gateway.queue import Ticket
from gateway.replica import Replica
from gateway.upstream import Reply

logger = logging.getLogger("hostler.inference")

ATTEMPTS = 2
PUT_BEFORE = (as_it_is, with_defaults)  # what is changed stands before the rest of the body, or is told by the head


class Inference:
    """One public path, as an ASGI app."""

    def __init__(self, fleet: Fleet, way: Way, choose: Callable[[Any], str] | None = None) -> None:
        """`choose` finds the model of a head that names it in a way of its own."""
        self._fleet = fleet
        self.way = way
        self._choose = choose
        self._decoder = msgspec.json.Decoder(way.head)
        self._terms: dict[str, Terms] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, find the model, relay."""
        body = await read_body(scope, receive, self._fleet.settings.max_body_bytes)
        if self._fleet.next_door and await is_answered_next_door(self._fleet, scope, body, receive, send):
            return
        asked = self.asked(scope["headers"], body, scope["query_string"])
        await Relay(self._fleet, self.way, asked, scope, send, body).run(receive)

    def asked(self, headers: Headers, body: bytes, query: bytes = b"") -> Asked:
        """What the client wants of whom.

        Raises:
            HostlerError: it cannot be had; nothing has been begun.
        """
        way = self.way
        head = self._read_head(headers, body, query)
        uid = self._choose(head) if self._choose else head.model or self._model_for(way.abilities)
        deployment = self._fleet.find(uid)
        terms = self._terms.get(uid)
        if terms is None or not terms.are_of(deployment):
            self._terms = {uid: terms for uid, terms in self._terms.items() if not terms.deployment.is_closed}
            terms = self._terms[uid] = Terms(way, deployment)
        try:
            if not isinstance(head, FormHead):
                body = way.adapt(body, head, deployment.defaults)
                if head.lora_name:
                    body = self._with_adapter(body, head.lora_name, deployment)
            if terms.back:
                body = _named(body, head, headers, terms.served_name)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:  # what its head has not shown
            raise BadRequest(f"The request body is not valid JSON: {exc}.") from exc
        hides_usage = terms.asks_for_usage and _may_ask_for_usage(head, deployment.defaults)
        if hides_usage:
            body = usage.asked_for(body)
        return Asked(terms, head, body, hides_usage)

    def asked_by_beginning(self, headers: Headers, begun: bytes, fields: Fields) -> Asked | None:
        """As `asked` of a body of which only this has come; None if more is to be known of it.

        Raises:
            HostlerError: as `asked`, or it tells too little so far.
        """
        way = self.way
        if way.takes != "json" or way.adapt not in PUT_BEFORE:
            return None
        small = as_whole(begun, fields)
        if small is None:
            return None
        asked = self.asked(headers, small)
        own = small[small.index(b"{") + 1 :]
        if asked.terms.is_asked_late or not asked.body.endswith(own):
            return None
        before = asked.body[: len(asked.body) - len(own)]
        head = with_last_value(asked.head, begun, fields)
        return asked._replace(head=head, body=before + begun[begun.index(b"{") + 1 :])

    def _with_adapter(self, body: bytes, lora_name: str, deployment: Deployment) -> bytes:
        try:
            return with_adapter(body, deployment.engine.with_adapter(deployment.launch, lora_name))
        except ValueError as exc:
            raise BadRequest(str(exc), param="lora_name") from exc

    def _read_head(self, headers: Headers, body: bytes, query: bytes) -> Head | FormHead:
        way = self.way
        if way.takes == "query":
            return read_query_head(query)
        if way.takes != "json":
            content_type = _content_type(headers)
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
        raise BadRequest(f"The request has no `model`, which {self.way.path} needs.", param="model")


class Relay(Exchange):
    """One request and its reply, over ASGI."""

    def __init__(self, fleet: Fleet, way: Way, asked: Asked, scope: Scope, send: Send, body: bytes) -> None:
        """`body` is what the client sent."""
        super().__init__(fleet, way, asked, scope["headers"], scope["request_id"])
        self.scope = scope
        self.send = send
        self.asked = body
        self.scheme = scope["scheme"]
        self.is_stream = bool(self.head.stream) and way.streams
        self.is_finished = False
        lost: Lost | None = scope.get("lost")
        self.lost = lost if lost and lost.deployment is self.deployment else None
        if self.lost:
            self.started = self.lost.started

    async def run(self, receive: Receive) -> None:
        """Answer, or stop at once when the client leaves; either way count it."""
        outcome, self.has_left = 499, True
        try:
            if await _unless_client_leaves(self._answer(), receive, self):
                outcome, self.has_left = self.status, False
        finally:
            self.scope["outcome"] = outcome
        self.count(outcome)

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
                self.status = exc.status
                await self._finish(self.as_event(envelope(body_of(exc))))
            else:  # a body that was promised cannot be completed: the connection must end, and does on return
                logger.warning("%s: the reply broke off: %s", self.uid, exc)
                self.status = exc.status

    async def _relay_from_a_replica(self) -> None:
        """Try a replica, and once more if it dies before a byte of its reply."""
        avoid: Replica | None = None
        for attempt in range(1, ATTEMPTS + 1):
            lost, self.lost = self.lost, None
            if lost:
                replica, life = self.deployment.take(lost.replica), lost.life
                self._ask_of(replica)
            else:
                replica = await self._acquire(avoid)
                life = replica.starts
            was_served = False
            try:
                if lost:
                    raise lost.why
                reply, chunk = await self._ask(replica)
                try:
                    await self._relay(reply, chunk, replica)
                    was_served = reply.status < 500
                finally:
                    reply.close()
                return
            except UpstreamLost as exc:
                await self.raise_loss(replica, life, exc, is_last=attempt == ATTEMPTS)
                avoid = replica
            finally:
                self.deployment.release(replica, was_served=was_served)

    async def _relay_from_next_door(self) -> None:
        """Another gateway has taken over while the request waited: it answers, as it would have without us."""
        async with self.fleet.relaying() as door:
            if door is None or self.phase == "answering":
                raise ShuttingDown(RESTARTED_MIDWAY)
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
            kept = [header for header in end_to_end(reply.headers) if header[0] not in NOT_RETURNED]
            await self._start(reply.status, kept)
        self.phase = "answering"
        while chunk:
            await self._send_body(chunk)
            chunk = await reply.read()
        await self._finish(b"")

    async def _acquire(self, avoid: Replica | None) -> Replica:
        """A replica that is ready; a stream that waits gets comments, others wait up to load_timeout_s."""
        self.phase = "queued"
        deployment = self.deployment
        key = self.key()
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

    def _ask_of(self, replica: Replica) -> None:
        self.phase = "waiting"
        self.scope["served_by"] = replica
        self.replica_name = replica.name

    async def _ask(self, replica: Replica) -> tuple[Reply, bytes]:
        """Send the request; the head of the reply and the first bytes of its body."""
        upstream = replica.upstream
        if upstream is None:
            raise UpstreamLost("it was stopped")
        self._ask_of(replica)
        headers = self.forwarded()
        if upstream.is_elsewhere:
            headers.append((HOPS_HEADER, b"%d" % self.hops()))
        texts = [(name.decode(), in_utf8(value).decode()) for name, value in headers]
        reply = await upstream.send(self.way.method, self.terms.upstream_path, texts, self.body)
        try:
            chunk = await reply.read()
        except BaseException:
            reply.close()
            raise
        self.begins()
        return reply, chunk

    async def _relay(self, reply: Reply, chunk: bytes, replica: Replica) -> None:
        """Pass the reply on as it comes."""
        if reply.status >= 400:
            await self._relay_error(reply, chunk)
            return
        if self.status and not reply.is_sse:
            await self._relay_as_event(reply, chunk)
            return
        self.is_sse |= reply.is_sse
        headers = self.returned(reply.status, reply.headers, replica)
        if not self.is_sse and self.changes_json(headers):
            chunk = await self._changed(reply, chunk, headers)
        if not self.status:
            await self._start(reply.status, headers)
        self.phase = "answering"
        while chunk:
            if not self.is_sse:
                self.heard(chunk)
            else:
                chunk = self.streamed(chunk)
                if chunk and self.way.events:
                    chunk = await asyncio.to_thread(self._rewritten, self.way.events, chunk)
            if chunk:
                await self._send_body(chunk)
            chunk = await reply.read()
        await self._finish(self.held)

    async def _changed(self, reply: Reply, chunk: bytes, headers: Headers) -> bytes:
        """The first bytes of a JSON reply that differs for clients; `headers` say its new length."""
        if self.terms.is_read_whole:
            whole = bytearray(chunk)
            while chunk := await reply.read():
                whole += chunk
            chunk = self.renamed(bytes(whole))
            if self.way.rewrite:
                chunk = await asyncio.to_thread(self._rewritten, self.way.rewrite, chunk)
            with_length(headers, len(chunk))
        return self.opened(chunk, headers)

    def _rewritten(self, rewrite: Callable[[bytes, Exchange], bytes], reply: bytes) -> bytes:
        try:
            return rewrite(reply, self)
        except (msgspec.MsgspecError, KeyError, TypeError, ValueError, IndexError) as exc:
            raise BadReply(f"The engine of {self.uid!r} answered what is no {self.way.path} reply: {exc!r}") from exc
        except OSError as exc:
            raise CannotKeep(f"The reply's files cannot be written: {exc}. Mend the data folder.") from exc

    async def _relay_as_event(self, reply: Reply, chunk: bytes) -> None:
        """A whole answer where comments have promised a stream, as from an engine that does not stream."""
        self.phase = "answering"
        parts = [chunk]
        while chunk := await reply.read():
            parts.append(chunk)
        whole = b"".join(parts)
        lines = (self.terms.back.put(whole) if self.terms.back else whole).splitlines()
        await self._finish(b"".join(b"data: " + line + b"\n" for line in lines) + b"\n" + self.way.done)

    async def _relay_error(self, reply: Reply, chunk: bytes) -> None:
        """An engine's error."""
        text = chunk
        while chunk and len(text) < ENGINE_ERROR_LIMIT_BYTES:
            chunk = await reply.read()
            text += chunk
        status, headers, payload = self.refusal(reply.status, reply.headers, text)
        if self.status:  # comments were sent, so the error can only be an event
            await self._finish(self.as_event(payload))
            return
        await self._start(status, headers)
        await self._finish(payload)

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_body(self, chunk: bytes) -> None:
        await self.send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _finish(self, chunk: bytes) -> None:
        self.is_finished = True
        await self.send({"type": "http.response.body", "body": chunk, "more_body": False})


async def _unless_client_leaves(work: Awaitable[None], receive: Receive, exchange: Relay) -> bool:
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


def _content_type(headers: Headers) -> bytes:
    return next((value for name, value in headers if name == b"content-type"), b"")


def _may_ask_for_usage(head: Head | FormHead, defaults: Mapping[str, Any]) -> bool:
    """Whether the client wants a stream, and nothing is said of its `stream_options`."""
    if isinstance(head, FormHead) or not head.stream:
        return False
    return head.stream_options is UNSET and "stream_options" not in defaults


def _named(body: bytes, head: Head | FormHead, headers: Headers, name: str) -> bytes:
    """The request with the name by which the engine knows the model."""
    if isinstance(head, FormHead):
        return alias.in_form(body, _content_type(headers), name)
    return alias.in_json(body, name)


async def _no_receive() -> dict[str, str]:
    return {"type": "http.disconnect"}
