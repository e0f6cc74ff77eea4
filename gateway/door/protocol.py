"""A client's connection: uvicorn's own, but that easy requests take the short way.

A request is easy if nothing of it needs more than a look: it is for a model that is there, may be asked now, and is
asked as others are. What is not easy is told to uvicorn as if we had not been there, and the plain route answers.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.api.auth import Guard
from gateway.api.beginning import Fields
from gateway.api.exchange import SAYS_NO_MORE, Asked, Headers, Lost
from gateway.api.inference import Inference
from gateway.api.trace import id_of, new_id, write_line
from gateway.api.ways import WAYS, Way
from gateway.config import Settings
from gateway.crowd import Crowd
from gateway.door.splice import Splice, passed_on
from gateway.door.upload import ENDLESS, Upload
from gateway.door.watched import Sweeper, WatchedProtocol
from gateway.errors import HostlerError, RequestRefused
from gateway.fleet import Fleet
from gateway.known_head import KnownHead, around_length, is_worth_learning

logger = logging.getLogger("hostler.door")

HELD_LIMIT_BYTES = 64 * 1024
PARTS_LIMIT = 10_000  # of a body: each costs more than the few bytes that it may have

UPLOAD_BYTES = 2**20  # a body that is larger is passed on while it comes
FIRST_LOOK_BYTES, LAST_LOOK_BYTES = 8 * 1024, 512 * 1024  # of it, to know what is asked of whom
NEVER = sys.maxsize
GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"

# Headers that are looked at. What to do about some of them, or about one that stands twice, the plain route knows.
TELLING = frozenset(
    b"authorization connection content-encoding content-length expect host origin upgrade x-api-key "
    b"x-request-id".split()
)


class Door(Sweeper):
    """What all connections share."""

    def __init__(self, fleet: Fleet, crowd: Crowd) -> None:
        super().__init__(fleet)
        self.crowd = crowd
        self.guard = Guard(_nowhere, fleet.in_effect)
        self.inferences = {way.path.encode(): Inference(fleet, way) for way in WAYS if is_easy(way)}
        self._default_headers: list[tuple[bytes, bytes]] = []
        self._default_head = b""

    def still_knows(self, known: KnownRequest, size: int) -> bool:
        """Whether a request of so many bytes is as easy as the one before."""
        settings = self.fleet.settings
        return known.settings is settings and size <= settings.max_body_bytes and self.crowd.is_open()

    def default_head(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """Those lines, which change once a second."""
        if headers is not self._default_headers:
            self._default_headers = headers
            self._default_head = b"".join(b"%b: %b\r\n" % header for header in headers)
        return self._default_head


def is_easy(way: Way) -> bool:
    """Whether requests for it may be: replies that are made anew in a thread are not."""
    return way.method == "POST" and way.rewrite is None and way.events is None


class KnownRequest(KnownHead):
    """The head of an easy request, who answers it, and under which settings."""

    __slots__ = ("_own_names", "_passed_on", "inference", "settings", "url")

    def __init__(
        self, before: bytes, behind: bytes, url: bytes, headers: Headers, inference: Inference, settings: Settings
    ) -> None:
        super().__init__(before, behind, headers)
        self.url, self.inference, self.settings = url, inference, settings
        self._own_names: frozenset[bytes] | None = None
        self._passed_on = b""

    def passed_on(self, own_names: frozenset[bytes]) -> bytes:
        """As `passed_on` of its headers."""
        if own_names != self._own_names:
            self._own_names, self._passed_on = own_names, passed_on(self._headers, own_names)
        return self._passed_on


class DoorProtocol(WatchedProtocol):
    """One connection."""

    # There may be thousands, each with more attributes than Python shares the names of.
    __slots__ = (
        *("_awaits_word", "_begun", "_door", "_held", "_inference", "_keeps_alive", "_known", "_length", "_look_at"),
        *("_parts", "_request_id", "_splice", "_strange", "_upload"),
    )

    def __init__(self, door: Door, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._door = door
        self._splice: Splice | None = None  # what is being answered
        self._inference: Inference | None = None  # of the request that comes in, as long as it is easy
        self._keeps_alive = True
        self._parts: list[bytes] = []
        self._length = 0  # as the head says; 0 if it does not
        self._look_at = NEVER  # with so much of the body there
        self._awaits_word = False  # the client sends no body until it is told to
        self._upload: Upload | None = None  # whose body comes in
        self._request_id = b""
        self._known: KnownRequest | None = None  # the head of an easy request before
        self._strange = -1  # easy requests in a row whose head was not known
        self._begun = b""  # what has come at once with the beginning of a head, until it is parsed
        self._held = b""  # of a request with a known head whose body has not come, and which nobody has parsed

    # --- what the loop tells

    def data_received(self, data: bytes) -> None:
        if self._known is not None and not self._is_coming:
            if self._is_known(self._known, data):
                return
            data, self._held = self._held + data, b""
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        if not self._is_coming:
            self._begun = data
        super().data_received(data)
        self._begun = b""

    def _parse_held(self) -> None:
        if self._held:
            data, self._held = self._held, b""
            self._parse(data)

    def shutdown(self) -> None:
        self._parse_held()
        if self._inference is not None:  # what has begun to come is answered, if only with a refusal
            self._pass_on_what_has_come()
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        splice, self._splice = self._splice, None
        if splice is not None:
            splice.client_left()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._splice is not None:
            self._splice.client_paused(is_paused=True)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._splice is not None:
            self._splice.client_paused(is_paused=False)

    def end_if_quiet(self, now: float) -> None:
        self._parse_held()
        super().end_if_quiet(now)

    def is_between_requests(self) -> bool:
        return super().is_between_requests() and not self._held

    # --- what the parser tells

    def on_message_begin(self) -> None:
        self._request_begins()
        self.url = b""
        self.headers = []
        self._inference = None

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:  # as for uvicorn
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._has_head = True
        inference = self._door.inferences.get(self.url)
        if inference is not None and self._is_easy(inference):
            self._inference = inference
            if self._awaits_word:
                self.transport.write(GO_ON)
            self._keeps_alive = self.parser.should_keep_alive()
            self._learn(inference)
            self._parts = []
            if self._length:
                self._look_at = FIRST_LOOK_BYTES if self._length > UPLOAD_BYTES else NEVER
            else:  # who sends chunks does not say how many
                self._look_at = UPLOAD_BYTES
        else:
            self._pass_on(self.url, self.headers)

    def on_body(self, body: bytes) -> None:
        if self._inference is None:
            if self._upload is None:
                super().on_body(body)
            else:
                self._size += len(body)
                self._upload.more(body)
                if self._size > (limit_bytes := self._door.fleet.settings.max_body_bytes) and self._upload:
                    self._upload.refuse_size(limit_bytes)
            return
        self._parts.append(body)
        self._size += len(body)
        if self._size >= self._look_at and self._passes_on(self._inference):
            return
        if self._size > self._door.fleet.settings.max_body_bytes or len(self._parts) > PARTS_LIMIT:
            self._pass_on_what_has_come()

    def on_message_complete(self) -> None:
        self._is_coming = False
        self._begun = b""
        inference = self._inference
        if inference is None:
            if self._upload is None:
                super().on_message_complete()
            elif self._upload.response_complete:  # before the request was whole
                self._idle_since = time.monotonic()
            else:
                self._upload.ends()
            self._upload = None
            return
        self._inference = None
        parts, self._parts = self._parts, []
        self._answer(inference, parts[0] if len(parts) == 1 else b"".join(parts))

    def _answer(self, inference: Inference, body: bytes, known: KnownRequest | None = None) -> None:
        if not self._begins(inference, inference.asked, (body,), Splice, body, known):
            self._replay(self.url, self.headers, [body], is_whole=True, keeps_alive=self._keeps_alive)

    # --- what needs no parser

    def _is_known(self, known: KnownRequest, data: bytes) -> bool:
        """Whether the request has the head of one before, and is dealt with, or held until its body is there."""
        held = self._held
        if held:
            data = held + data
        rest = known.rest(data)
        if rest < 0 or self.cycle is not None or not self._door.still_knows(known, len(data) + rest):
            return False
        if rest and (held or rest > HELD_LIMIT_BYTES):
            return False
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        if rest:
            self._held = data
            return True
        self._held = b""
        self._strange = 0
        self._idle_since = self._last_look = None
        self.url, self.headers = known.url, known.headers()
        self._request_id, self._keeps_alive = b"", True
        self._answer(known.inference, data[known.body_at :], known)
        return True

    def _learn(self, inference: Inference) -> None:
        begun, self._begun, self._known = self._begun, b"", None
        self._strange += 1
        is_usual = self._keeps_alive and not (self._request_id or self._awaits_word)
        if is_usual and is_worth_learning(self._strange) and (head := around_length(begun, self.headers)):
            self._known = KnownRequest(*head, self.url, self.headers, inference, self._door.fleet.settings)

    # --- what is easy

    def _is_easy(self, inference: Inference) -> bool:
        """Whether the head leaves it so, and no other request is before it."""
        try:
            return self._is_head_easy(inference)
        except Exception:
            logger.exception("A fault of the gateway: %s is left to the plain route", inference.way.path)
            return False

    def _is_head_easy(self, inference: Inference) -> bool:
        door, parser = self._door, self.parser
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        if not door.crowd.is_open():
            return False
        if parser.get_method() != b"POST" or parser.get_http_version() != "1.1" or parser.should_upgrade():
            return False
        authorization = b""
        host: bytes | None = None
        self._request_id, self._length, has_other_key = b"", 0, False
        self._awaits_word = False
        for name, value in self.headers:
            if name not in TELLING:
                continue
            if name == b"content-length":
                self._length = int(value)
                if self._length > door.fleet.settings.max_body_bytes:
                    return False
            elif name == b"host" and host is None:
                host = value
            elif name == b"authorization" and not authorization:
                authorization = value
            elif name == b"x-request-id":
                self._request_id = id_of(self.headers)
            elif name == b"x-api-key":
                has_other_key = True
            elif name == b"expect" and value.lower() == b"100-continue":
                self._awaits_word = True
            elif name == b"connection" and value.lower() in SAYS_NO_MORE:
                continue
            else:
                return False
        if not has_other_key and door.guard.knows(host or b"", authorization):
            return True
        return self._may_pass(inference)

    def _may_pass(self, inference: Inference) -> bool:
        try:
            self._door.guard.check(inference.way.path, self.headers)
        except RequestRefused:
            return False
        return True

    def _passes_on(self, inference: Inference) -> bool:
        """Whether a replica gets the request while it comes."""
        begun = b"".join(self._parts)
        self._parts = [begun]
        self._look_at = 2 * self._size if self._size < LAST_LOOK_BYTES else NEVER
        rest = self._length - self._size if self._length else ENDLESS
        if rest <= 0:  # it is all there
            return False
        fields = Fields()
        fields.feed(begun)
        make = partial(Upload, fields=fields, rest=rest)

        def asked(headers: Headers) -> Asked | None:
            found = inference.asked_by_beginning(headers, begun, fields)
            return found if found is None or self._length or found.terms.takes_chunks else None

        return self._begins(inference, asked, (), make, begun)

    def _begins(
        self,
        inference: Inference,
        ask: Callable[..., Asked | None],
        of_body: tuple[Any, ...],
        make: Callable[..., Splice],
        sent: bytes,
        known: KnownRequest | None = None,
    ) -> bool:
        """Whether a replica has got the request."""
        door = self._door
        if door.fleet.next_door is not None:
            return False
        try:
            asked = ask(self.headers, *of_body)
            if asked is None:
                return False
            splice = make(door.fleet, inference.way, asked, self.headers, self._request_id or new_id(), self, sent)
            deployment = asked.terms.deployment
            replica = deployment.at_hand(None, splice.key())
            if replica is None or replica.upstream is None or replica.upstream.is_elsewhere:
                return False
            upstream, replica = replica.upstream, deployment.take(replica)
        except HostlerError:
            return False
        except Exception:
            logger.exception("A fault of the gateway: %s is left to the plain route", inference.way.path)
            return False
        splice.keep_alive, splice.known = self._keeps_alive, known
        self._splice = self.cycle = splice  # type: ignore[assignment]
        if isinstance(splice, Upload):
            self._inference, self._parts, self._upload = None, [], splice
        splice.begin(replica, upstream)
        return True

    # --- what a splice tells

    def default_head(self) -> bytes:
        """What every reply's head begins with, below its status."""
        return self._door.default_head(self.server_state.default_headers)

    def spliced(self, splice: Splice, outcome: int, seconds: float) -> None:
        """It is over: the next request may be answered."""
        has_left = self._splice is not splice  # an engine may say 499, too
        self._splice = None
        if self.cycle is splice:  # type: ignore[comparison-overlap]
            self.cycle = None  # type: ignore[assignment]
        if self._door.fleet.settings.access_log:
            write_line("POST", splice.way.path, splice.replica, outcome, seconds, splice.request_id)
        if has_left:
            return
        if not splice.keep_alive:
            self.transport.close()
        if self.pipeline or self.flow.read_paused:
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        if not self._is_coming:
            self._idle_since = time.monotonic()

    def replay(self, splice: Splice, lost: Lost | None) -> None:
        """Have the plain route answer after all."""
        self._splice = None
        if self._upload is splice:
            self._upload = None
        self._replay(
            splice.way.path.encode(),
            splice.headers,
            [splice.sent],
            is_whole=not splice.rest,
            keeps_alive=splice.keep_alive,
            lost=lost,
        )

    # --- how uvicorn learns of what is not easy

    def _pass_on(self, url: bytes, headers: Headers, lost: Lost | None = None, *, was_told: bool = False) -> None:
        HttpToolsProtocol.on_message_begin(self)
        self.url = url
        self.headers += headers
        self.expect_100_continue = not was_told and any(
            name == b"expect" and value.lower() == b"100-continue" for name, value in headers
        )
        if lost is not None:
            self.scope["lost"] = lost  # type: ignore[typeddict-unknown-key]
        HttpToolsProtocol.on_headers_complete(self)

    def _pass_on_what_has_come(self) -> None:
        """Of a request that was held back: the rest of it is uvicorn's."""
        parts, self._parts, self._inference = self._parts, [], None
        self._replay(self.url, self.headers, parts, is_whole=False, keeps_alive=self._keeps_alive)

    def _replay(
        self,
        url: bytes,
        headers: Headers,
        parts: list[bytes],
        *,
        is_whole: bool,
        keeps_alive: bool,
        lost: Lost | None = None,
    ) -> None:
        """Tell uvicorn of a request that was held back; another may have begun behind it since."""
        now = self.url, self.headers, self.scope, self.expect_100_continue, self.parser, self.cycle
        self.parser, self.cycle = cast(Any, _Said(keeps_alive)), None  # type: ignore[assignment]
        self._pass_on(url, headers, lost, was_told=True)
        for part in parts:
            HttpToolsProtocol.on_body(self, part)
        if is_whole:
            HttpToolsProtocol.on_message_complete(self)
        self.url, self.headers, self.scope, self.expect_100_continue, self.parser, cycle = now
        if cycle is not None and not cycle.response_complete:
            self.cycle = cycle


class _Said:
    """What the parser has said of a head, for uvicorn to ask it later."""

    def __init__(self, keeps_alive: bool) -> None:
        self._keeps_alive = keeps_alive

    def get_http_version(self) -> str:
        return "1.1"

    def get_method(self) -> bytes:
        return b"POST"

    def should_keep_alive(self) -> bool:
        return self._keeps_alive

    def should_upgrade(self) -> bool:
        return False


def protocol_of(door: Door) -> Callable[..., DoorProtocol]:
    """What uvicorn makes of each connection."""

    def make(**of_uvicorn: Any) -> DoorProtocol:
        return DoorProtocol(door, **of_uvicorn)

    return make


async def _nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    """Where a Guard leads that is only asked."""
