"""Schedules that the yard's model went through in virtual time, done again with a real gateway and real processes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import replayed
from hypothesis.stateful import RuleBasedStateMachine
from schedules import Schedule, generate, read, write

HERE = Path(__file__).parent
KEPT = sorted((HERE / "schedules").glob("*.jsonl"))  # as `tests/replayed.py generate` makes them


@pytest.fixture(scope="module")
def yard() -> ModuleType:
    spec = importlib.util.spec_from_file_location("yard_model", HERE / "test_yard_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rules_of(machine: type[RuleBasedStateMachine]) -> Iterator[tuple[str, set[str]]]:
    for rule in machine.setup_state().rules:
        yield rule.function.__name__, set(rule.arguments)


def test_each_rule_of_the_model_can_be_replayed(yard: ModuleType) -> None:
    for name, arguments in rules_of(yard.Yard):
        known = set(getattr(replayed.Replay, name).__annotations__) - {"return"}
        assert known == arguments, name


def test_a_schedule_is_written_down_and_read_as_it_was(yard: ModuleType, tmp_path: Path) -> None:
    schedule = generate(yard.Yard, seed=1, steps=10)
    assert schedule[0].rule == "begin"
    assert len(schedule) == 10
    write(schedule, tmp_path / "s.jsonl")
    assert read(tmp_path / "s.jsonl") == schedule == generate(yard.Yard, seed=1, steps=10)


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
async def test_what_holds_in_the_model_holds_with_processes(file: Path, tmp_path: Path) -> None:
    schedule: Schedule = read(file)
    outcome = await replayed.replay(schedule, tmp_path)
    assert outcome.faults == []
    assert outcome.requests.get("answered")
    assert outcome.starts
    assert outcome.looks
