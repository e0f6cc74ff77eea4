"""Who waits is served in turn: no place is lost, none is given twice, and every wait has an end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.base import Launch
from engines.llama_cpp import LlamaCpp
from gateway.config import Settings
from gateway.deployment import Deployment
from gateway.errors import HostlerError
from gateway.queue import Ticket
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
        self._changed = changed

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
                (world.deployment.is_held,) = arguments
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
