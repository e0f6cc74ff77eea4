"""Who waits is served in turn: no place is lost, none is given twice, and every wait has an end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.base import Launch
from engines.llama_cpp import LlamaCpp
from gateway.api.affinity import SESSION_BUSIER_BY, key_of
from gateway.api.heads import ChatHead
from gateway.config import Settings
from gateway.deployment import Deployment
from gateway.errors import HostlerError, ModelFailed
from gateway.pace import Pace
from gateway.queue import Key, Queue, Ticket
from gateway.replica import Failure, Replica, State
from registry.resolve import Artifact
from registry.schema import LLMFamily, ModelSpec, Source

SPEC = ModelSpec(model_format="ggufv2", model_hub="local", model_id="m.gguf")
ARTIFACT = Artifact(
    family=LLMFamily(model_name="fake", model_specs=(SPEC,)),
    spec=SPEC,
    source=Source(model_hub="local", model_id="m.gguf"),
)


class Copy:
    """A replica without a process: it lives as one does, and is ready, gone or failed when the test says so."""

    rest_s = 0.0  # of its back-off
    retry_s: float | None = None
    waits_for: str | None = None
    placement = None
    is_wanted = True
    dozes = False

    def __init__(self, launch: Launch, index: int, changed: Callable[[], None]) -> None:
        self.launch = launch
        self.index = index
        self.name = f"{launch.uid}-rep{index}"
        self.state = State.STOPPED
        self.state_since = self.last_used = time.monotonic()
        self.in_flight = self.served = self.starts = self.failures_in_row = 0
        self.failure: Failure | None = None
        self.progress = None
        self.waits_for = None
        self.load_s = 0.0
        self.pace = Pace()
        self._changed = changed

    def rehearse_in_s(self, now: float) -> None:
        """It never sleeps."""

    def enter(self, state: State) -> None:
        self.state = state
        self.failure = Failure(reason="it broke", advice="Mend it.", at=0) if state is State.FAILED else self.failure
        self._changed()

    async def run(self) -> None:
        self.enter(State.WAITING)
        try:
            await asyncio.Event().wait()
        finally:
            self.enter(State.STOPPED)

    def retry(self) -> None:
        if self.state is State.FAILED:
            self.enter(State.WAITING)

    def hurry(self) -> None:
        pass

    def begin_anew(self) -> None:
        pass


class World:
    """A deployment whose replicas are such copies, and what its requests have seen."""

    def __init__(self, replicas: int = 1, site_limit: int = 1000, **fields: Any) -> None:
        launch = Launch(uid="fake", artifact=ARTIFACT, engine="llama.cpp", replica=replicas, **fields)
        settings = Settings(drain_timeout_s=600, queue_limit=site_limit)
        self.deployment = Deployment(launch, LlamaCpp(), settings=lambda: settings)
        for _ in range(replicas):
            self.add()
        self.run = asyncio.create_task(self.deployment.run())
        self.line: list[Ticket[Replica]] = []  # those that wait, in the order in which they are to be served
        self.waiters: dict[Ticket[Replica], asyncio.Task[None]] = {}
        self.holding: list[Replica] = []
        self.refused: list[HostlerError] = []
        self.removing: list[asyncio.Task[None]] = []

    @property
    def copies(self) -> list[Copy]:
        return cast("list[Copy]", list(self.deployment.replicas))

    def add(self) -> None:
        taken = {copy.index for copy in self.deployment.replicas}
        index = next(index for index in range(len(taken) + 1) if index not in taken)
        self.deployment.add(cast(Replica, Copy(self.deployment.launch, index, self.deployment.notify)))

    def arrive(self, *, is_again: bool = False) -> None:
        try:
            if (replica := self.deployment.acquire_now()) is not None:
                assert not self.line, "a newcomer has overtaken those who wait"
                self.holding.append(replica)
                return
            ticket = self.deployment.enter(is_again=is_again)
        except HostlerError as exc:
            self.refused.append(exc)
            return
        self.line.insert(0 if is_again else len(self.line), ticket)
        self.waiters[ticket] = asyncio.create_task(self._wait(ticket))
        self.waiters[ticket].add_done_callback(lambda _: self._leave(ticket))

    async def _wait(self, ticket: Ticket[Replica]) -> None:
        try:
            replica = await ticket.wait()
            assert replica is not None
            self.holding.append(replica)
        except HostlerError as exc:
            self.refused.append(exc)

    def _leave(self, ticket: Ticket[Replica]) -> None:
        self.deployment.leave(ticket)
        self.deployment.leave(ticket)  # twice is harmless
        if ticket in self.line:  # it left by itself
            self.line.remove(ticket)

    def release(self, number: int) -> None:
        if self.holding:
            self.deployment.release(self.holding.pop(number % len(self.holding)), was_served=True)

    def cancel(self, number: int) -> None:
        tasks = [task for task in self.waiters.values() if not task.done()]
        if tasks:
            tasks[number % len(tasks)].cancel()

    def enter(self, number: int, state: State) -> None:
        living = [copy for copy in self.copies if copy.state in (State.WAITING, State.READY, State.BACKOFF)]
        if living:
            living[number % len(living)].enter(state)

    def remove(self, number: int) -> None:
        staying = self.deployment.staying
        if len(staying) > 1:
            self.removing.append(asyncio.create_task(self.deployment.remove(staying[number % len(staying)])))

    def close(self) -> None:
        self.removing.append(asyncio.create_task(self.deployment.close(force=True)))

    def check(self) -> None:
        """What holds at every moment."""
        limit = self.deployment.launch.request_limits
        assert limit is None or all(copy.in_flight <= limit for copy in self.copies)
        ended = [ticket.has_ended for ticket in self.line]
        assert ended == sorted(ended, reverse=True), "somebody was served before those who came earlier"
        self.line = [ticket for ticket in self.line if not ticket.has_ended]
        assert len(self.line) == self.deployment.waiting
        for number, ticket in enumerate(self.line, 1):
            assert self.deployment.number_of(ticket) == number
        if self.line:
            assert self.deployment.is_held or self.deployment.pick() is None, "there is room, and somebody waits"
            assert not self.deployment.is_closed
            assert self.deployment.state is State.STOPPING or not self.deployment.has_failed

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        self.check()
        assert sum(copy.in_flight for copy in self.copies) <= len(self.holding)
        for copy in self.copies:
            assert copy.in_flight == self.holding.count(cast(Replica, copy))

    async def end(self) -> None:
        """Nothing is left over, whatever has happened."""
        self.close()
        await self.settle()
        assert not self.line
        assert all(task.done() for task in self.waiters.values())
        held = set(self.holding) | set(self.deployment.replicas)
        while self.holding:
            self.release(0)
        assert [copy.in_flight for copy in held] == [0] * len(held)
        for task in (*self.removing, self.run):
            task.cancel()
        ends = await asyncio.gather(*self.removing, *self.waiters.values(), self.run, return_exceptions=True)
        assert not [end for end in ends if isinstance(end, Exception)]


NUMBERS = st.integers(0, 20)
STEPS = st.one_of(
    st.tuples(st.just("arrive")),
    st.tuples(st.just("arrive")),
    st.tuples(st.just("arrive")),
    st.tuples(st.just("arrive_again")),
    st.tuples(st.just("turn")),
    st.tuples(st.just("turn")),
    st.tuples(st.just("settle")),
    st.tuples(st.just("release"), NUMBERS),
    st.tuples(st.just("release"), NUMBERS),
    st.tuples(st.just("cancel"), NUMBERS),
    st.tuples(st.just("enter"), NUMBERS, st.sampled_from([State.READY, State.READY, State.BACKOFF, State.FAILED])),
    st.tuples(st.just("hold"), st.booleans()),
    st.tuples(st.just("add")),
    st.tuples(st.just("remove"), NUMBERS),
    st.tuples(st.just("start")),
    st.tuples(st.just("stop"), st.booleans()),
    st.tuples(st.just("close")),
)


async def play(world: World, steps: list[tuple[Any, ...]], *, is_loaded: bool) -> None:
    if is_loaded:
        world.deployment.start()
        await world.settle()
        for copy in world.copies:
            copy.enter(State.READY)
    for name, *arguments in steps:
        match name:
            case "turn":
                await asyncio.sleep(0)
            case "settle":
                await world.settle()
            case "arrive_again":
                world.arrive(is_again=True)
            case "hold":
                world.deployment.hold(world.deployment.replicas if arguments[0] else ())
            case "start":
                world.deployment.start()
            case "stop":
                world.deployment.stop(force=arguments[0])
                world.check()
                assert not world.line, "somebody waits for what was stopped"
            case _:
                getattr(world, name)(*arguments)
        world.check()
    await world.end()


@settings(max_examples=600, deadline=None)
@given(
    steps=st.lists(STEPS, min_size=5, max_size=80),
    replicas=st.integers(1, 3),
    request_limits=st.sampled_from([None, 1, 1, 2]),
    queue_limit=st.sampled_from([None, 0, 2, 50, 50]),
    is_loaded=st.booleans(),
)
def test_no_place_is_lost_or_given_twice_and_every_wait_ends(
    steps: list[tuple[Any, ...]], replicas: int, request_limits: int | None, queue_limit: int | None, is_loaded: bool
) -> None:
    async def scenario() -> None:
        world = World(replicas, request_limits=request_limits, queue_limit=queue_limit)
        await play(world, steps, is_loaded=is_loaded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gateway.queue.COUNTING_S", 0)  # numbers are those of the moment
        asyncio.run(scenario())


# --- the queue alone


async def test_a_long_queue_costs_each_step_the_same() -> None:
    async def seconds_for(waiting: int) -> float:
        queue: Queue[int] = Queue()
        for _ in range(waiting):
            queue.join()
        places = iter(range(waiting))
        given = iter([True, False] * 2000)
        started = time.perf_counter()
        for _ in range(2000):
            queue.serve(lambda ticket: next(places) if next(given) else None)
        return time.perf_counter() - started

    few, many = min([await seconds_for(2500) for _ in range(3)]), min([await seconds_for(100_000) for _ in range(3)])
    assert many < 5 * few


async def test_numbers_of_a_very_long_queue_are_counted_now_and_then() -> None:
    queue: Queue[int] = Queue()
    tickets = [queue.join() for _ in range(20_000)]
    assert queue.number_of(tickets[-1]) == 20_000
    started = time.perf_counter()
    for ticket in tickets[:2000]:
        queue.leave(ticket)
        queue.number_of(tickets[-1])
    assert time.perf_counter() - started < 2  # counting each time would take 40 million steps
    await asyncio.sleep(0.3)
    assert queue.number_of(tickets[-1]) == 18_000


async def test_an_end_refuses_each_with_an_exception_of_its_own() -> None:
    queue: Queue[int] = Queue()
    tickets = [queue.join() for _ in range(3)]
    queue.end(ModelFailed("it broke"))
    ends = await asyncio.gather(*(ticket.wait() for ticket in tickets), return_exceptions=True)
    assert [str(end) for end in ends] == ["it broke"] * 3
    assert len({id(end) for end in ends}) == 3
    assert (len(queue), queue.since) == (0, None)


async def test_who_had_its_turn_goes_first_and_makes_nobody_seem_newer() -> None:
    queue: Queue[int] = Queue()
    old = queue.join()
    again = queue.join(is_first=True)
    assert (queue.number_of(again), queue.number_of(old), queue.since) == (1, 2, old.since)


# --- which copy


async def loaded(replicas: int) -> World:
    world = World(replicas)
    world.deployment.start()
    await world.settle()
    for copy in world.copies:
        copy.enter(State.READY)
    return world


def homes(world: World, keys: range) -> dict[int, int]:
    found = {key: world.deployment.pick(key=Key(key)) for key in keys}
    return {key: replica.index for key, replica in found.items() if replica}


KEYS = range(1, 3001)


async def test_a_copy_that_comes_or_goes_moves_only_its_share() -> None:
    world = await loaded(4)
    before = homes(world, KEYS)
    shares = [list(before.values()).count(index) / len(KEYS) for index in range(4)]
    assert min(shares) > 0.2
    assert max(shares) < 0.3
    world.add()
    await world.settle()
    world.copies[4].enter(State.READY)
    after = homes(world, KEYS)
    moved = [key for key in KEYS if after[key] != before[key]]
    assert {after[key] for key in moved} == {4}
    assert 0.15 < len(moved) / len(KEYS) < 0.25
    world.copies[2].enter(State.BACKOFF)
    assert [key for key, home in homes(world, KEYS).items() if home != after[key]] == [
        key for key, home in after.items() if home == 2
    ]
    await world.end()


async def test_what_belongs_together_spills_over_once_its_copy_is_much_busier() -> None:
    world = await loaded(3)
    taken = [world.deployment.acquire_now(key=Key(7, SESSION_BUSIER_BY)) for _ in range(15)]
    world.holding += [replica for replica in taken if replica]
    (home,) = {replica.index for replica in taken[: SESSION_BUSIER_BY + 1] if replica}
    counts = sorted(copy.in_flight for copy in world.copies)
    assert sum(counts) == 15
    assert counts[-1] - counts[0] <= SESSION_BUSIER_BY + 1
    assert max(world.copies, key=lambda copy: copy.in_flight).index == home
    await world.end()


async def test_the_lost_copy_is_avoided_whatever_belongs_there() -> None:
    world = await loaded(2)
    for key in range(1, 50):
        home = world.deployment.pick(key=Key(key, 1))
        assert world.deployment.pick(avoid=home, key=Key(key, 1)) is not home
    await world.end()


def key_of_chat(*messages: tuple[str, str], **headers: str) -> Key | None:
    raw = [msgspec.Raw(msgspec.json.encode({"role": role, "content": text})) for role, text in messages]
    given = [(name.encode(), value.encode()) for name, value in headers.items()]
    return key_of(given, ChatHead(model="m", messages=raw), reads_opening=True)


def test_a_key_is_of_the_opening_and_stays_as_the_conversation_grows() -> None:
    opening = ("system", "s" * 10_000), ("user", "hello")
    grown = (*opening, ("assistant", "hi"), ("user", "more"))
    assert key_of_chat(*opening) == key_of_chat(*grown) is not None
    assert key_of_chat(*opening) != key_of_chat(opening[0], ("user", "other"))
    asked = ("user", "q" * 2000)
    assert key_of_chat(asked) == key_of_chat(asked, ("assistant", "hi"), ("user", "more")) is not None
    assert key_of_chat(("user", "short")) is None  # nothing that would be worth it
    assert key_of_chat(*opening, x_session_id="a") == key_of_chat(("user", "other"), x_session_id="a")
    assert key_of([], ChatHead(model="m", messages=[msgspec.Raw(b"3" * 2000)]), reads_opening=True)  # no message at all
    assert key_of([], ChatHead(model="m", messages=[]), reads_opening=False) is None


def test_a_key_of_a_huge_conversation_is_cheap() -> None:
    messages = [("user", "x" * 5_000_000)] + [("assistant", "y")] * 10_000
    raw = [msgspec.Raw(msgspec.json.encode({"role": role, "content": text})) for role, text in messages]
    head = ChatHead(model="m", messages=raw)
    started = time.perf_counter()
    key_of([], head, reads_opening=True)
    assert time.perf_counter() - started < 0.1
