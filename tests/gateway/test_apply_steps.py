"""The difference between what is served and what is wished for, without a gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from engines.base import Launch
from gateway.apply import AT_ONCE, COPIES, DECIDING, TOLD, Effect, Way, effective, setting_steps, starts_alike, steps
from gateway.config import Settings
from gateway.store import Store
from registry.resolve import Artifact, Selection
from registry.schema import LLMFamily, ModelSpec, Source


def a_launch(uid: str = "m", quantization: str = "q4_0", **fields: Any) -> Launch:
    spec = ModelSpec(model_format="ggufv2", quantization=quantization, model_id="org/a")
    family = LLMFamily(model_name="a", model_specs=(spec,))
    artifact = Artifact(family=family, spec=spec, source=Source(model_hub="huggingface", model_id="org/a"))
    return Launch(uid=uid, artifact=artifact, **({"engine": "llama.cpp"} | fields))


def test_every_field_of_a_launch_has_its_place_once() -> None:
    assert sorted((*AT_ONCE, *COPIES, *DECIDING, *TOLD, "uid")) == sorted(Launch.__struct_fields__)


@pytest.mark.parametrize(
    ("fields", "way", "named"),
    [
        ({}, Way.UNTOUCHED, ()),
        ({"request_limits": 3}, Way.AT_ONCE, ("request_limits",)),
        ({"pinned": True, "priority": 2, "group": "g"}, Way.AT_ONCE, ("pinned", "priority", "group")),
        ({"preload": True, "idle_timeout_s": 5.0}, Way.AT_ONCE, ("preload", "idle_timeout_s")),
        ({"replica": 3, "load_timeout_s": 9.0}, Way.SCALED, ("load_timeout_s", "replica")),
        ({"options": {"a": 1, "b": None}}, Way.RENEWED, ("options.b",)),
        ({"options": {}}, Way.RENEWED, ("options.a",)),
        ({"envs": {"X": "1"}, "replica": 2, "pinned": True}, Way.RENEWED, ("pinned", "replica", "envs.X")),
        ({"n_gpu": 1}, Way.RENEWED, ("n_gpu",)),
        ({"memory_bytes": 7}, Way.RENEWED, ("memory_bytes",)),
        ({"quantization": "q8_0"}, Way.RENEWED, ("artifact",)),
        ({"engine": "vLLM", "options": {}}, Way.REPLACED, ("engine", "options.a")),
        ({"is_applied": True, "selection": Selection(model_name="x")}, Way.UNTOUCHED, ()),
    ],
)
def test_what_a_change_of_fields_takes(fields: dict[str, Any], way: Way, named: tuple[str, ...]) -> None:
    now, wished = a_launch(options={"a": 1}), a_launch(**({"options": {"a": 1}} | fields))
    (step,) = steps({"m": now}, {"m": wished})
    assert (step.way, step.fields, step.before, step.after) == (way, named, now, wished)
    assert starts_alike(now, wished) is (way in (Way.UNTOUCHED, Way.AT_ONCE, Way.SCALED))


def test_removals_come_first_and_what_stays_comes_last() -> None:
    now = {uid: a_launch(uid) for uid in ("kept", "out", "other")}
    wished = {uid: a_launch(uid) for uid in ("in", "kept")} | {"other": a_launch("other", pinned=True)}
    found = [(step.uid, step.way) for step in steps(now, wished)]
    assert found == [("out", Way.REMOVED), ("other", Way.AT_ONCE), ("in", Way.ADDED), ("kept", Way.UNTOUCHED)]


def test_a_model_whose_engine_has_other_settings_starts_anew() -> None:
    (step,) = steps({"m": a_launch()}, {"m": a_launch()}, {"m"})
    assert (step.way, step.fields) == (Way.RENEWED, ("settings of the engine",))


def test_settings_that_need_a_restart_are_named_and_not_half_applied() -> None:
    now = Settings(port=1)
    wished = Settings(port=2, home="/x", cache="/y", access_log=False, orphan_timeout_s=5)
    assert {step.name: step.effect for step in setting_steps(now, wished)} == {
        "port": Effect.AT_NEXT_START,
        "home": Effect.AT_NEXT_START,
        "cache": Effect.AT_RESTART,
        "access_log": Effect.AT_ONCE,
        "orphan_timeout_s": Effect.AT_ONCE,
    }
    assert effective(now, wished) == msgspec.structs.replace(wished, port=1, home=now.home, cache=now.cache)


# --- on disk, all or none


def kept(store: Store) -> dict[str, int]:
    return {launch.uid: launch.replica for launch in store.read_all()}


def test_several_launches_are_kept_and_forgotten_together(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.change([a_launch("a"), a_launch("b"), a_launch("c/d")], [])
    store.change([a_launch("b", replica=2)], ["a", "never-was"])
    assert kept(store) == {"b": 2, "c/d": 1}
    assert kept(Store(tmp_path)) == kept(store)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "c%2Fd.json"]


@pytest.mark.parametrize("cut", range(40))
def test_a_change_that_is_cut_off_anywhere_is_all_or_nothing(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every system call by which a change reaches the disk fails once, as if we had been killed there."""
    store = Store(tmp_path)
    before = {"a": 1, "b": 1, "gone": 1}
    after = {"a": 2, "b": 2, "new": 1}
    store.change([a_launch(uid) for uid in before], [])
    calls = 0

    class Killed(BaseException):
        pass

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > cut:
                raise Killed
            return real(*arguments, **named)

        return call

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", counted(__import__("os").fsync))
        for name in ("replace", "unlink"):
            patched.setattr(Path, name, counted(getattr(Path, name)))
        try:
            store.change([a_launch("a", replica=2), a_launch("b", replica=2), a_launch("new")], ["gone"])
        except Killed:
            assert cut < 39
        else:
            assert kept(store) == after
    found = kept(Store(tmp_path))
    assert found in (before, after)
    assert not (tmp_path / ".change").exists()
