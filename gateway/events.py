"""What happens to models: the newest of each, and all of it as one numbered stream for those who listen."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Iterator

import msgspec

EVENTS_PER_MODEL = 100
MODELS_WITH_EVENTS = 1000
HAPPENINGS_KEPT = 2000
BEHIND_LIMIT = 500  # who has so many to read yet is too slow


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a model; `event_ts` in seconds since the epoch."""

    event_type: str
    event_ts: int
    event_content: str


class Happening(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename={"before": "from", "after": "to"}
):
    """One line of the stream. `time` in seconds since the epoch; `model_uid` is empty for what is of no model.

    `type` is info, warning or error, with a `text`; state, of a `replica` that went from one to another; or, only
    for those who listen, progress and queue, which tell how it is now.
    """

    type: str
    model_uid: str
    time: float
    number: int = 0  # none: it is told once, and not kept
    text: str = ""
    replica: int | None = None
    before: str | None = None
    after: str | None = None
    percent: float | None = None
    left_s: float | None = None
    waiting: int | None = None
    in_flight: int | None = None
    oldest_wait_s: float | None = None


class Listener:
    """What one has yet to read. It is told once that it is too slow, and then nothing more."""

    def __init__(self, uid: str | None) -> None:
        """`uid` is the model that it wants to hear of; None: all."""
        self.uid = uid
        self.is_behind = False
        self._unread: list[Happening] = []
        self._has_more = asyncio.Event()

    def tell(self, happening: Happening) -> None:
        """Never waits: who does not read in time loses its turn."""
        if self.is_behind or self.uid not in (None, happening.model_uid):
            return
        self._unread.append(happening)
        if len(self._unread) > BEHIND_LIMIT:
            self.is_behind = True
            self._unread = []
        self._has_more.set()

    def read(self) -> list[Happening]:
        """All that there is, oldest first."""
        unread, self._unread = self._unread, []
        self._has_more.clear()
        return unread

    async def wait(self, limit_s: float) -> None:
        """Until there is more, or the limit."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._has_more.wait()


class EventLog:
    """The newest events of each uid, also of those that are gone, and the newest of all; bounded in each."""

    def __init__(self) -> None:
        self.life = secrets.token_hex(4)  # numbers of another life of the gateway mean nothing here
        self._events: dict[str, deque[Event]] = {}
        self._kept: deque[Happening] = deque(maxlen=HAPPENINGS_KEPT)
        self._number = 0
        self._listeners: set[Listener] = set()

    def add(self, uid: str, event_type: str, content: str) -> None:
        """One of INFO, WARNING, ERROR, and what happened."""
        events = self._events.pop(uid, None) or deque(maxlen=EVENTS_PER_MODEL)
        self._events[uid] = events  # the last to be spoken of is the last to be forgotten
        events.append(Event(event_type=event_type, event_ts=int(time.time()), event_content=content))
        if len(self._events) > MODELS_WITH_EVENTS:
            del self._events[next(iter(self._events))]
        self._tell(Happening(type=event_type.lower(), model_uid=uid, time=time.time(), text=content))

    def moved(self, uid: str, replica: int, before: str, after: str) -> None:
        """A replica's state has changed."""
        self._tell(
            Happening(type="state", model_uid=uid, time=time.time(), replica=replica, before=before, after=after)
        )

    def of(self, uid: str) -> list[Event]:
        """Oldest first."""
        return list(self._events.get(uid, ()))

    def after(self, number: int, uid: str | None = None) -> list[Happening]:
        """What is kept of all that came after that number, oldest first; of one model, or of all."""
        return [one for one in self._kept if one.number > number and uid in (None, one.model_uid)]

    def has_all_after(self, life: str, number: int) -> bool:
        """Whether nothing is forgotten that came after it."""
        first = self._kept[0].number if self._kept else self._number + 1
        return life == self.life and first - 1 <= number <= self._number

    @contextlib.contextmanager
    def listening(self, uid: str | None) -> Iterator[Listener]:
        """Hear all that happens during the block."""
        listener = Listener(uid)
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def _tell(self, happening: Happening) -> None:
        self._number += 1
        happening = msgspec.structs.replace(happening, number=self._number)
        self._kept.append(happening)
        for listener in self._listeners:
            listener.tell(happening)
