"""Requests that wait for a place, first come, first served. It knows neither models nor processes.

A place is counted by whoever hands it over, at that moment. If the waiter has left in between, it gets the place back
from `leave` and gives it to the next: none is lost, and none is handed over twice.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

PlaceT = TypeVar("PlaceT")

COUNTING_S = 1e-5  # counting the queue anew may take so long for each that waits, at most once in a hundred times that


class Key(NamedTuple):
    """By what requests that belong together are found, and how much busier than another their place may be."""

    number: int
    busier_by: int = 0


class Ticket(Generic[PlaceT]):
    """One that waits. `wait` as often as need be, then `leave` the queue, however it ended."""

    __slots__ = ("_end", "avoid", "key", "number", "place", "since")

    def __init__(self, avoid: PlaceT | None, key: Key | None, since: float, number: int) -> None:
        self.avoid = avoid  # the place that it wants only if there is no other
        self.key = key
        self.since = since
        self.number = number  # in the queue, as it was last counted; 1 is next
        self.place: PlaceT | None = None  # what it was handed, until it is taken
        self._end: asyncio.Future[PlaceT] = asyncio.get_running_loop().create_future()

    @property
    def has_ended(self) -> bool:
        """Whether it waits no longer."""
        return self._end.done()

    async def wait(self, limit_s: float | None = None) -> PlaceT | None:
        """The place, taken; None if the limit came first, and the ticket keeps its number.

        Raises:
            what the queue was ended with.
        """
        await asyncio.wait((self._end,), timeout=limit_s)
        if not self._end.done():
            return None
        place, self.place = self._end.result(), None
        return place

    def _hand(self, place: PlaceT) -> None:
        self.place = place
        self._end.set_result(place)

    def _refuse(self, why: Exception) -> None:
        self._end.set_exception(why)
        self._end.exception()  # told or not, it is no loss: its waiter may just be leaving


class Queue(Generic[PlaceT]):
    """Tickets in their order. Each step costs the same, however many wait."""

    def __init__(self) -> None:
        # No plain dict: looking for its first key passes over all those that were taken from its front.
        self.tickets: OrderedDict[Ticket[PlaceT], None] = OrderedDict()
        self._counted_at = 0.0
        self._is_counted = True

    def __len__(self) -> int:
        return len(self.tickets)

    @property
    def since(self) -> float | None:
        """Since when the first has waited, of a monotonic clock; None if nobody waits."""
        return next(iter(self.tickets)).since if self.tickets else None

    def join(self, avoid: PlaceT | None = None, key: Key | None = None, *, is_first: bool = False) -> Ticket[PlaceT]:
        """A ticket at the end; or before all others, and as old as they are, for one that had its turn and lost it."""
        now = time.monotonic()
        since = min(now, self.since or now) if is_first else now
        ticket = Ticket(avoid, key, since, 1 if is_first else len(self.tickets) + 1)
        self.tickets[ticket] = None
        if is_first:
            self.tickets.move_to_end(ticket, last=False)
            self._is_counted = False
        return ticket

    def serve(self, give: Callable[[Ticket[PlaceT]], PlaceT | None]) -> None:
        """Hand over what `give` has counted for the first, until it has nothing more."""
        while self.tickets:
            ticket = next(iter(self.tickets))
            if (place := give(ticket)) is None:
                return
            del self.tickets[ticket]
            self._is_counted = False
            ticket._hand(place)

    def end(self, why: Exception) -> None:
        """Refuse all; each gets a copy, as an exception collects the ways on which it was raised."""
        tickets, self.tickets = self.tickets, OrderedDict()
        for ticket in tickets:
            ticket._refuse(copy.copy(why))

    def leave(self, ticket: Ticket[PlaceT]) -> PlaceT | None:
        """Take a ticket out, if it is still in; what it was handed and has not taken, which is then the caller's."""
        if self.tickets.pop(ticket, self) is None:
            self._is_counted = False
        place, ticket.place = ticket.place, None
        return place

    def number_of(self, ticket: Ticket[PlaceT]) -> int:
        """Which number it has; where very many wait, as it was a moment ago."""
        now = time.monotonic()
        if not self._is_counted and now - self._counted_at >= len(self.tickets) * COUNTING_S:
            for number, one in enumerate(self.tickets, 1):
                one.number = number
            self._counted_at, self._is_counted = now, True
        return ticket.number
