"""One request and its reply: all that is decided of them. Moves no bytes; who does, builds on it.

Two do: the plain route in `inference.py`, which answers everything, and the splice of `gateway/door`, which answers
what is easy. So each rule of what engines are sent and clients are told stands here once.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from gateway import metrics
from gateway.api import alias, usage
from gateway.api.affinity import key_of
from gateway.api.heads import FormHead, Head
from gateway.api.ways import Way, check_served, replaced
from gateway.connections import CannotAsk, NoHttp, UpstreamLost
from gateway.deployment import Deployment
from gateway.errors import SOURCE_HEADER, BadRequest, EngineDied, ErrorBody, NoMoreFiles, envelope
from gateway.fleet import Fleet
from gateway.queue import Key
from gateway.replica import Replica

logger = logging.getLogger("hostler.inference")

Headers = list[tuple[bytes, bytes]]

# Headers that belong to one connection or one door, and end there; a reply that is packed could not be changed.
NOT_FORWARDED = frozenset(
    b"accept-encoding authorization connection content-length cookie expect host keep-alive proxy-authorization "
    b"proxy-connection te trailer transfer-encoding upgrade x-api-key x-hostler-hops x-request-id".split()
)
HOPS_HEADER = b"x-hostler-hops"  # through how many gateways a request has come: a remote model may lead back to us
HOP_LIMIT = 5
NOT_RETURNED = frozenset(
    b"access-control-allow-credentials access-control-allow-headers access-control-allow-methods "
    b"access-control-allow-origin connection date keep-alive proxy-connection server set-cookie te trailer "
    b"transfer-encoding upgrade x-request-id".split()
)
SAYS_NO_MORE = frozenset((b"keep-alive", b"close"))  # what nearly every `Connection` says, which lists no header
SSE = b"text/event-stream"
SSE_HEADERS = [(b"content-type", SSE), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
# What servers say to a path that they do not have.
NO_ROUTE = re.compile(r"(40[45]:? *)?((file|page|path|route) )?(not found|method not allowed)\.?$|\s*<", re.IGNORECASE)
RESTARTED_MIDWAY = "The gateway was restarted before the answer was complete. Try again."
BODILESS = (204, 304)
ENGINE_ERROR_LIMIT_BYTES = 64 * 1024
EVENT_LIMIT_BYTES = 2**20
LARGE_EVENT_LIMIT_BYTES = 2**28  # of events that are changed, which carry pictures


class Terms:
    """What is the same for all requests to a model on one way, as long as its launch is: read once."""

    def __init__(self, way: Way, deployment: Deployment) -> None:
        """
        Raises:
            BadRequest: models of its type answer no such request.
        """
        launch, engine = deployment.launch, deployment.engine
        check_served(way, launch.uid, launch.artifact.family.model_type)
        self.deployment, self.launch, self.engine = deployment, launch, engine
        self.served_name = deployment.served_name
        self.back = None if self.served_name == launch.uid else alias.Back(self.served_name, launch.uid)
        self.words = engine.chat_words if way.is_chat else ()
        path = way.upstream or way.path
        self.upstream_path = engine.routes.get(path, path)  # where the engine answers
        self.tally = metrics.tally_of(launch.uid)
        self.asks_for_usage = engine.asks_for_usage and way.tells_usage
        self.takes_chunks = engine.takes_chunks
        self.changes_json = bool(way.rewrite or way.opening or self.words or self.back)
        self.is_read_whole = bool(way.rewrite or self.words or self.back)  # a reply that differs is needed as a whole

        # What a request may say that changes it, which is to be known before any of it is sent on.
        names = "model", "enable_thinking", "lora_name", *deployment.defaults
        self.asked_by = frozenset(name.encode() for name in names)
        self.is_asked_late = False  # a client has said it behind what is large

    def are_of(self, deployment: Deployment) -> bool:
        """Whether they still hold."""
        return self.deployment is deployment and self.launch is deployment.launch and self.engine is deployment.engine


class Asked(NamedTuple):
    """What a client wants, understood: of which model, and the body that its engine gets."""

    terms: Terms
    head: Head | FormHead
    body: bytes
    hides_usage: bool = False  # the stream tells how many tokens it took, which the client has not asked for


class Lost(NamedTuple):
    """A request that has lost its replica before a byte of the answer, for whoever goes on with it."""

    deployment: Deployment
    replica: Replica
    life: int
    why: UpstreamLost
    started: float


class Exchange:
    """One request and its reply."""

    # A stream is held for long, and there may be thousands.
    __slots__ = (
        *("_first", "_last", "_last_but_one", "_last_but_two", "body", "deployment", "events", "first_at", "fleet"),
        *("has_left", "head", "headers", "hides_usage", "is_sse", "marks_seen", "phase", "replica_name", "request_id"),
        *("started", "status", "stops", "terms", "way"),
    )
    scheme = "http"
    queued_s = 0.0  # how long it has waited for a replica

    def __init__(self, fleet: Fleet, way: Way, asked: Asked, headers: Headers, request_id: bytes) -> None:
        """`headers` are the client's, with names in small letters."""
        self.head: Any
        self.terms, self.head, self.body, self.hides_usage = asked
        self.deployment = self.terms.deployment
        self.stops = self.deployment.stops
        self.fleet = fleet
        self.way = way
        self.headers = headers
        self.request_id = request_id
        self.started = time.perf_counter()
        self.status = 0  # once the head of the reply is on its way
        self.is_sse = False  # the reply's head says so
        self.has_left = False  # the client has, before the end
        self.phase = "queued"  # then "waiting" for the engine's first byte, then "answering"
        self.replica_name = ""  # of the replica that answers
        self.events: Events | None = None  # of a stream, once it has begun
        self.first_at = 0.0  # when the engine's first bytes came
        self.marks_seen = 0  # of tokens, in a stream
        self._first = self._last_but_two = self._last_but_one = self._last = b""  # chunks of the reply's body

    @property
    def uid(self) -> str:
        """Of the model."""
        return self.terms.launch.uid

    @property
    def public_url(self) -> str:
        """How the client reaches us."""
        host = next((value for name, value in self.headers if name == b"host"), b"localhost")
        return f"{self.scheme}://{host.decode('latin-1')}"

    # --- what the engine gets

    def key(self) -> Key | None:
        """What the request is found again by, where there are several to choose from."""
        if len(self.deployment.replicas) < 2:
            return None
        return key_of(self.headers, self.head, reads_opening=self.deployment.engine.keeps_prefixes)

    def forwarded(self) -> Headers:
        """The client's headers as far as they go on, and the request's id."""
        headers = [header for header in end_to_end(self.headers) if header[0] not in NOT_FORWARDED]
        headers.append((b"x-request-id", self.request_id))
        return headers

    def hops(self) -> int:
        """Through how many gateways the request has come, us among them.

        Raises:
            BadRequest: so many that it goes in a circle.
        """
        came = next((value for name, value in self.headers if name == HOPS_HEADER), b"0")
        hops = 1 + (int(came) if came.isdigit() else 0)
        if hops > HOP_LIMIT:
            raise BadRequest(
                f"The request has come through {HOP_LIMIT} gateways, so it goes in a circle: the `base_url` of "
                f"{self.uid!r} leads back here. Correct it, or the model's name there (`model`).",
                param="model",
            )
        return hops

    # --- what the client gets

    def returned(self, status: int, headers: Headers, replica: Replica) -> Headers:
        """The head of an engine's reply as the client gets it; `is_sse` is known by now."""
        kept = [header for header in end_to_end(headers) if header[0] not in NOT_RETURNED]
        kept.append((b"x-hostler-replica", b"%d" % replica.index))
        if self.queued_s:
            kept.append((b"x-hostler-queue-ms", b"%d" % (1000 * self.queued_s)))
        if self.is_sse:
            kept = [header for header in kept if header[0] != b"content-length"]  # events may change on their way
            kept += [header for header in SSE_HEADERS if header[0] not in {name for name, _ in kept}]
        elif status in BODILESS:
            kept = [header for header in kept if header[0] != b"content-length"]
        return kept

    def begins(self) -> None:
        """The first bytes of the engine's reply have come."""
        self.first_at = time.perf_counter()
        self.terms.tally.first_bytes.add(self.first_at - self.started)

    def heard(self, chunk: bytes) -> None:
        """Some of the reply's body; what is a stream `streamed` hears."""
        if not chunk:  # an end that comes by itself, or half an event
            return
        if not self._first:
            self._first = chunk[: usage.END_BYTES]
        if self.is_sse:  # each is made of whole events
            self._last_but_two, self._last_but_one, self._last = self._last_but_one, self._last, chunk
        else:
            self._last = (chunk if len(chunk) >= usage.END_BYTES else self._last + chunk)[-usage.END_BYTES :]

    def changes_json(self, headers: Headers) -> bool:
        """Whether a reply of that head, which is no stream, differs for clients."""
        return self.terms.changes_json and _is_json(headers)

    def renamed(self, data: bytes) -> bytes:
        """The reply, or some of it, in the words and names of clients."""
        terms = self.terms
        if terms.words:
            data = replaced(data, terms.words)
        return terms.back.put(data) if terms.back else data

    def opened(self, chunk: bytes, headers: Headers) -> bytes:
        """The first bytes of a JSON reply with what we say in it; `headers` get the new length."""
        if not self.way.opening or chunk[:2] in (b"", b"{", b"{}") or chunk[:1] != b"{":
            return chunk
        opening = self.way.opening(self)
        for index, (name, value) in enumerate(headers):
            if name == b"content-length":
                headers[index] = name, b"%d" % (int(value) + len(opening))
        return b"{" + opening + chunk[1:]

    def streamed(self, chunk: bytes) -> bytes:
        """What may go on of a stream: whole events, as a break must not leave half of one, in the words of clients."""
        events = self.events
        if events is None:
            events = self.events = Events(LARGE_EVENT_LIMIT_BYTES if self.way.events else EVENT_LIMIT_BYTES)
        chunk = events.whole(chunk)
        self.heard(chunk)
        way = self.way
        if way.token_mark:
            self.marks_seen += chunk.count(way.token_mark)
        if self.hides_usage:
            chunk = usage.without(chunk)
        if way.chunk:
            chunk = way.chunk(chunk)
        return self.renamed(chunk) if self.terms.changes_json else chunk

    @property
    def held(self) -> bytes:
        """What a stream has left that is no whole event."""
        return bytes(self.events.held) if self.events else b""

    def refusal(self, status: int, headers: Headers, text: bytes) -> tuple[int, Headers, bytes]:
        """An engine's error as the client gets it, in the envelope that clients know."""
        error = _engine_error(status, text[:ENGINE_ERROR_LIMIT_BYTES])
        if status in (404, 405) and NO_ROUTE.match(error.message):
            engine = self.deployment.engine.name
            said = f"The engine of {self.uid!r}, {engine}, has no {self.way.path}. Launch the model on one that has."
            error = msgspec.structs.replace(error, message=said)
        refusals = self.deployment.engine.refusals.items()
        if sentence := next((said for begin, said in refusals if error.message.startswith(begin)), None):
            error = ErrorBody(message=f"{self.uid!r} {sentence}", type="invalid_request_error", source="engine")
            status = 400
        elif status > 599:  # none that HTTP has
            status = 502
        payload = envelope(error)
        told = [(b"content-type", b"application/json"), (SOURCE_HEADER.encode(), b"engine")]
        told += [header for header in end_to_end(headers) if header[0] == b"retry-after"]
        return status, [*told, (b"content-length", b"%d" % len(payload))], payload

    def as_event(self, payload: bytes) -> bytes:
        """An error's envelope where a stream has begun, and its end."""
        return self.way.error_event + b"data: " + payload + b"\n\n" + self.way.done

    # --- how it ends

    async def raise_loss(self, replica: Replica, life: int, exc: UpstreamLost, *, is_last: bool) -> None:
        """The replica was lost: returns if the request may be sent again, to another or the next life.

        Raises:
            EngineDied, ModelStopped, ShuttingDown, NoMoreFiles: it may not; the text says why.
        """
        if isinstance(exc, CannotAsk):
            raise NoMoreFiles(
                f"The gateway can open no connection to the engine now: {exc}. Come back in a moment; more at once "
                "need a higher limit of open files where the gateway starts (`ulimit -n`)."
            ) from exc
        await replica.confirm()
        self.deployment.check_still_wanted(self.stops)
        is_begun = self.phase == "answering" or isinstance(exc, NoHttp)
        if is_last or is_begun or self._has_nobody_but(replica, life):
            raise EngineDied(self._death(replica, exc)) from exc
        logger.warning("%s died before it answered; the request is sent again", replica)
        metrics.RETRIES.labels(self.uid).inc()

    def _has_nobody_but(self, replica: Replica, life: int) -> bool:
        """Whether the replica lives on in the same life and is alone: what it has dropped, it would drop again."""
        return self.deployment.ready() == [replica] and replica.starts == life

    def _death(self, replica: Replica, exc: UpstreamLost) -> str:
        failure = replica.failure
        started_at = time.time() - (time.perf_counter() - self.started)
        why = f"{failure.reason}. {failure.advice}" if failure and failure.at >= started_at else f"{exc}."
        return f"The engine of {self.uid!r} went away while it answered: {why}"

    def count(self, outcome: int) -> float:
        """It has ended so, 499 if the client left first, which an engine may say, too; after how many seconds."""
        now = time.perf_counter()
        seconds = now - self.started
        if self._last:
            self._count_tokens(now)
        if self.has_left:
            metrics.CANCELLED.labels(self.uid, self.phase).inc()
        self.terms.tally.count(self.way.path, outcome, seconds)
        return seconds

    def _count_tokens(self, now: float) -> None:
        tally = self.terms.tally
        end = usage.end_of(self._last_but_two, self._last_but_one, self._last) if self.is_sse else self._last
        prompt_tokens, completion_tokens, reason = usage.read(self._first, end)
        if completion_tokens is None:
            empty = self.way.token_mark + b'"'  # as streams begin and end
            completion_tokens = self.marks_seen and max(0, self.marks_seen - usage.count_in(empty, self._first, end))
        if self.is_sse and completion_tokens > 1:
            tally.between_tokens.add((now - self.first_at) / (completion_tokens - 1))
        tally.prompt_tokens += prompt_tokens or 0
        tally.completion_tokens += completion_tokens
        if reason:
            tally.reasons[reason] = tally.reasons.get(reason, 0) + 1


def end_to_end(headers: Headers) -> Headers:
    """Without those that are for the next server alone, as `Connection` says of them."""
    listed = [value for name, value in headers if name == b"connection" and value.lower() not in SAYS_NO_MORE]
    if not listed:
        return headers
    names = {name.strip().lower() for name in b",".join(listed).split(b",")}
    return [header for header in headers if header[0] not in names]


def in_utf8(value: bytes) -> bytes:
    """A header's value as both ways send it on: as it is, or, where it is no UTF-8, told in it."""
    if value.isascii():
        return value
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()
    return value


def with_length(headers: Headers, size: int) -> None:
    """Say how long a body is now."""
    headers[:] = [header for header in headers if header[0] != b"content-length"]
    headers.append((b"content-length", b"%d" % size))


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
