"""What a state machine did, as a schedule: one JSON line for each rule that was called, so that it can be done again.

A machine whose rules are made by `rule` and `initialize` of this file keeps what it does in its `schedule`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hypothesis
import msgspec
from hypothesis import stateful

EXAMPLES_FOR_ONE = 12  # hypothesis leaves rules out of most of its examples, and much in one is like in the one before


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a rule."""

    rule: str
    arguments: dict[str, Any] = {}


Schedule = tuple[Step, ...]


class Broken(Exception):
    """Something did not hold as the machine went through the schedule."""

    def __init__(self, schedule: Schedule, fault: BaseException) -> None:
        super().__init__(str(fault))
        self.schedule = schedule


def rule(**strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis' `rule`, whose calls are written down."""
    return lambda function: stateful.rule(**strategies)(_written_down(function))


def initialize(**strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis' `initialize`, whose calls are written down."""
    return lambda function: stateful.initialize(**strategies)(_written_down(function))


def _written_down(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def called(machine: Any, **arguments: Any) -> None:
        # A copy, as the rule may change what it is given.
        step = msgspec.json.decode(msgspec.json.encode(Step(rule=function.__name__, arguments=arguments)), type=Step)
        machine.__dict__.setdefault("schedule", []).append(step)
        function(machine, **arguments)

    return called


def generate(machine: type[stateful.RuleBasedStateMachine], seed: int, steps: int) -> Schedule:
    """A schedule that the machine went through, and all held: of some examples the one with the most rules.

    Raises:
        Broken: in one of them it did not.
    """
    found: list[Schedule] = []

    class Recorded(machine):  # type: ignore[misc, valid-type]
        def teardown(self) -> None:
            found.append(tuple(self.__dict__.get("schedule", ())))
            super().teardown()

    settings = hypothesis.settings(
        max_examples=EXAMPLES_FOR_ONE,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    try:
        hypothesis.seed(seed)(stateful.get_state_machine_test(Recorded, settings=settings))()
    except AssertionError as fault:
        raise Broken(found[-1], fault) from fault
    return max(found, key=lambda schedule: len({step.rule for step in schedule}))


def write(schedule: Iterable[Step], path: Path) -> None:
    """As JSON lines."""
    path.write_bytes(b"".join(msgspec.json.encode(step) + b"\n" for step in schedule))


def read(path: Path) -> Schedule:
    """As `write` wrote it."""
    return tuple(msgspec.json.decode(line, type=Step) for line in path.read_bytes().splitlines())
