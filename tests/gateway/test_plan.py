"""`hostler plan`: what would run where, on a machine that need not be there."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from grammar import assert_sentences
from hypothesis import given
from hypothesis import strategies as st
from llms import a_launch
from model_files import F32, gguf

from engines.base import Launch, Needs, Placement, Tier
from engines.vllm import sleep_levels
from gateway.cli import hostler
from gateway.devices import Limits, SimulatedGpu, SimulatedMachine, SimulatedProcess, devices_of
from gateway.placement import NoRoom, place
from gateway.plan import draw_up, free_after
from gateway.sizing import Sizing
from gateway.yard import Rules

EIGHT = Path(__file__).parents[2] / "configs" / "eight-gpus"
GIB = 2**30


def run(tmp_path: Path, *words: str) -> Any:
    return CliRunner().invoke(hostler, ["plan", *words], env={"HOSTLER_HOME": str(tmp_path / "home")})


def rows_of(done: Any) -> dict[str, dict[str, Any]]:
    return {f"{row['model']}/{row['replica']}": row for row in json.loads(done.output)["models"]}


def test_a_driver_that_hangs_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr("gateway.gpus.list_gpus", lambda **_: over.wait(30))
    monkeypatch.setattr("gateway.gpus.LIMIT_S", 0.1)
    file = tmp_path / "settings.yaml"
    file.write_text("models: {}")
    done = run(tmp_path, str(file))
    over.set()
    assert done.exit_code == 1
    assert "NVML does not answer" in done.output


def test_twelve_models_on_eight_gpus_one_of_them_held_by_somebody_else(tmp_path: Path) -> None:
    done = run(tmp_path, str(EIGHT / "models.yaml"), "--machine", str(EIGHT / "machine.yaml"), "--json")
    assert done.exit_code == 1, done.output  # two are refused
    rows = rows_of(done)
    assert {name: (row["status"], row["devices"]) for name, row in rows.items()} == {
        "assistant/0": ("placed", ["GPU 1", "GPU 2"]),
        "assistant/1": ("placed", ["GPU 3", "GPU 4"]),
        "coder/0": ("placed", ["GPU 10"]),
        "chat/0": ("placed", ["GPU 5"]),
        "small/0": ("placed", ["GPU 0"]),
        "sliced/0": ("placed", ["GPU 8"]),
        "thinker/0": ("placed", ["GPU 6"]),
        "mixture/0": ("placed", ["GPU 5"]),
        "half/0": ("in turn", ["GPU 5"]),
        "beside/0": ("refused", []),
        "llama/0": ("in turn", ["GPU 6"]),
        "on-cpu/0": ("placed", ["the machine's memory"]),
        "giant/0": ("refused", []),
    }
    text = "When it is asked for, {} is unloaded, as there is no room beside what is idle."
    assert rows["half/0"]["text"] == text.format("chat")
    assert rows["llama/0"]["text"] == text.format("thinker")
    assert rows["half/0"]["memory"] == {"GPU-5": 40 * GIB}
    beside = rows["beside/0"]["text"]
    assert "GPU 0 has 19,327 MB of 85,899 MB free: 65,498 MB are held by others (process 1, train.py" in beside
    assert "Take another spec of the family: 4B, 1_7B or 0_6B." in beside
    assert "on each of 7 GPUs" in rows["giant/0"]["text"]
    devices = {device["name"]: device for device in json.loads(done.output)["devices"]}
    given: dict[str, int] = {}
    for row in rows.values():
        if row["status"] == "placed":
            for key, size in row["memory"].items():
                given[key] = given.get(key, 0) + size
    for device in devices.values():
        rest = device["total_bytes"] - device["foreign_bytes"] - device["headroom_bytes"] - given.get(device["key"], 0)
        assert device["free_bytes"] == rest >= 0


def test_the_table_is_for_people(tmp_path: Path) -> None:
    done = run(tmp_path, str(EIGHT / "models.yaml"), "--machine", str(EIGHT / "machine.yaml"))
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert lines[0].split()[:5] == ["MODEL", "COPY", "ENGINE", "LOADED", "WHERE"]
    assert any(line.startswith("half") and "GPU 5, in turn" in line for line in lines)
    assert any(line.startswith("beside/0 (refused): it needs about ") for line in lines)
    assert any("process 1, train.py (65,498 MB)" in line for line in lines)


def a_file(tmp_path: Path, **models: dict[str, Any]) -> str:
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps({"models": models}))
    return str(path)


def a_plan(tmp_path: Path, models: dict[str, Any], **settings: Any) -> dict[str, tuple[str, str]]:
    """Status and text of each copy, of models of the same size on a GPU for many."""
    path = tmp_path / "settings.yaml"
    models = {uid: QWEN | {"model_size_in_billions": 7} | fields for uid, fields in models.items()}
    path.write_text(json.dumps(settings | {"models": models}))
    done = run(tmp_path, str(path), "--gpus", "1x80GiB", "--json")
    assert done.output[0] == "{", done.output
    return {name: (row["status"], row["text"]) for name, row in rows_of(done).items()}


def test_how_many_may_be_loaded_at_once_counts_as_it_does_when_they_run(tmp_path: Path) -> None:
    models: dict[str, Any] = {"kept": {"pinned": True}, "one": {}, "two": {}, "more": {"replica": 2}}
    assert a_plan(tmp_path, models, max_loaded=2) == {
        "kept/0": ("placed", ""),
        "one/0": ("placed", ""),
        "two/0": ("in turn", "When it is asked for, one is unloaded, as max_loaded 2 is reached."),
        "more/0": ("in turn", "When it is asked for, one is unloaded, as max_loaded 2 is reached."),
        "more/1": (
            "in turn",
            "It waits until one is unloaded: there is no room for another copy: max_loaded 2 is reached.",
        ),
    }
    assert a_plan(tmp_path, models, max_loaded=1) == {
        name: (
            ("placed", "")
            if name == "kept/0"
            else ("refused", "max_loaded 1 is reached, and kept is pinned. Unpin kept.")
        )
        for name in ("kept/0", "one/0", "two/0", "more/0", "more/1")
    }


def test_who_can_sleep_falls_asleep_rather_than_it_is_unloaded() -> None:
    def tiers_of(launch: Launch, placement: Placement, needs: Needs) -> list[Tier]:
        return [Tier(name="disk", sleep=(), wake=(), residual_bytes=1)] if launch.uid == "sleepy" else []

    wanted = [
        (a_launch(uid=uid), Sizing(needs=Needs(memory_bytes=size), basis="drawn"))
        for uid, size in (("sleepy", 60), ("other", 30), ("new", 50), ("large", 100))
    ]
    devices = devices_of(SimulatedMachine(gpus=(SimulatedGpu(total=100),)).look(()), (), Limits(gpu_headroom=0))
    rows = {row.model: (row.status, row.text) for row in draw_up(wanted, devices, tiers_of=tiers_of)}
    why = "as there is no room beside what is idle."
    assert rows == {
        "sleepy": ("placed", ""),
        "other": ("placed", ""),
        "new": ("in turn", f"When it is asked for, sleepy falls asleep (tier disk), {why}"),
        "large": ("in turn", f"When it is asked for, sleepy and other are unloaded, {why}"),
    }


def test_groups_count_as_they_do_when_they_run(tmp_path: Path) -> None:
    models = {"a": {"group": "few"}, "b": {"group": "few"}, "c": {}, "alone": {"group": "lonely"}}
    groups = {"few": {"max_loaded": 1}, "lonely": {"exclusive": True}}
    assert a_plan(tmp_path, models, groups=groups) == {
        "a/0": ("placed", ""),
        "b/0": ("in turn", "When it is asked for, a is unloaded, as the group few has its 1 loaded."),
        "c/0": ("placed", ""),
        "alone/0": ("in turn", "When it is asked for, a and c are unloaded, as the group lonely is loaded alone."),
    }
    models["c"] = {"pinned": True}
    status, text = a_plan(tmp_path, models, groups=groups)["alone/0"]
    assert (status, text) == ("refused", "the group lonely is loaded alone, and c is pinned. Unpin c.")


def test_who_makes_room_is_the_one_of_least_priority(tmp_path: Path) -> None:
    models: dict[str, Any] = {"high": {"priority": 2}, "low": {"priority": -1}, "last": {"priority": -1}}
    plan = a_plan(tmp_path, models, max_loaded=2)
    assert plan["last/0"][1] == "When it is asked for, low is unloaded, as max_loaded 2 is reached."


QWEN = {"model_name": "qwen2.5-instruct", "model_format": "ggufv2", "quantization": "q8_0"}


def test_gpus_in_a_word_and_what_is_preloaded_first(tmp_path: Path) -> None:
    file = a_file(
        tmp_path,
        late=QWEN | {"model_size_in_billions": 7},
        early=QWEN | {"model_size_in_billions": 7, "preload": True},
        first=QWEN | {"model_size_in_billions": 7, "preload": True, "priority": 1},
        allowed=QWEN | {"model_size_in_billions": 7, "cpu_fallback": True, "preload": True, "priority": -1},
        asked=QWEN | {"model_size_in_billions": 7, "cpu_fallback": True},
    )
    done = run(tmp_path, file, "--gpus", "1x24GiB", "--json")
    rows = rows_of(done)
    assert [*rows] == ["first/0", "early/0", "allowed/0", "late/0", "asked/0"]
    assert [row["status"] for row in rows.values()] == ["placed", "placed", "placed", "in turn", "in turn"]
    assert rows["allowed/0"]["devices"] == ["GPU 0", "the machine's memory"]
    assert "of its layers on GPUs, and the others on the CPU" in rows["allowed/0"]["text"]
    assert done.exit_code == 0


def test_this_machine_and_files_that_are_here(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.embedding_length": 32,
        "llama.context_length": 8192,
        "llama.attention.head_count": 4,
    }
    model = tmp_path / "tiny-f32.gguf"
    model.write_bytes(gguf(metadata, {"a": ([1000], F32)}, data=4000))
    file = a_file(
        tmp_path, tiny={"model_path": str(model), "n_gpu": 0}, said={"model_path": str(model), "memory": "2GB"}
    )
    done = run(tmp_path, file, "--json")
    rows = rows_of(done)
    assert rows["tiny/0"]["status"] == "placed"
    assert rows["tiny/0"]["basis"].startswith("weights from the headers of its files")
    assert (rows["said/0"]["memory_bytes"], rows["said/0"]["basis"]) == (2 * 10**9, "as the launch says (memory)")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpus", "8xlarge"], "is no size"),
        (["--machine", "nowhere.yaml"], "cannot be read"),
        (["--machine", "bad.yaml"], "Unknown key 'cards'"),
    ],
)
def test_what_is_no_machine_is_told(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("cards: 3")
    done = run(tmp_path, a_file(tmp_path), *words)
    assert done.exit_code == 1
    assert told in done.output
    assert run(tmp_path, a_file(tmp_path), "--gpus", "1x1GB", "--machine", "x").exit_code == 2


@pytest.mark.parametrize(
    ("sleep_bytes", "tier", "text"),
    [
        (40 * GIB, "ram", "a falls asleep (tier ram)"),
        (10 * GIB, "disk", "a falls asleep (tier disk)"),
        (0, "disk", "a falls asleep (tier disk)"),
        (None, None, "a is unloaded"),  # it cannot sleep
    ],
)
def test_who_would_sleep_is_told_and_in_which_tier(sleep_bytes: int | None, tier: str | None, text: str) -> None:
    devices = devices_of(SimulatedMachine(gpus=(SimulatedGpu(total="80GiB"),), ram="100GiB").look(()), (), Limits())
    sizing = Sizing(needs=Needs(memory_bytes=60 * GIB, weight_bytes=30 * GIB), basis="drawn")

    def tiers(launch: Launch, placement: Placement, needs: Needs) -> tuple[Tier, ...]:
        assert needs.weight_bytes == 30 * GIB
        return sleep_levels(launch, needs.weight_bytes, GIB, reloads=True) if sleep_bytes is not None else ()

    wanted = [(a_launch(uid=uid), sizing) for uid in ("a", "b")]
    a, b = draw_up(wanted, devices, Rules(sleep_bytes=sleep_bytes or 0), tiers)
    assert (a.status, a.sleeps_in) == ("placed", ("ram", "disk") if tier else ())
    assert (b.status, b.asleep_for_it) == ("in turn", {"a/0": tier} if tier else {})
    assert b.text == f"When it is asked for, {text}, as there is no room beside what is idle."


def test_who_can_sleep_is_told_of_a_settings_file(tmp_path: Path) -> None:
    sleepy = {
        "model_name": "qwen2.5-instruct",
        "model_format": "pytorch",
        "quantization": "none",
        "model_engine": "vLLM",
        "options": {"enable_sleep_mode": True, "gpu_memory_utilization": 0.6},
    }
    models: dict[str, Any] = {"first": sleepy, "second": sleepy}
    status, text = a_plan(tmp_path, models, sleep_memory="50GiB")["second/0"]
    assert (status, text) == (
        "in turn",
        "When it is asked for, first falls asleep (tier ram), as there is no room beside what is idle.",
    )
    done = run(tmp_path, str(tmp_path / "settings.yaml"), "--gpus", "1x80GiB")
    assert done.output.splitlines()[0].split()[4:7] == ["WHERE", "SLEEPS", "IN"]
    [line] = [line for line in done.output.splitlines() if line.startswith("first ")]
    assert line.split()[5:8] == ["GPU", "0", "ram"]


# --- whatever is wished of whatever machine


@st.composite
def wishes(draw: st.DrawFn) -> tuple[Launch, Sizing]:
    fields = {
        "uid": f"m{draw(st.integers(0, 10**9))}",
        "replica": draw(st.integers(1, 3)),
        "preload": draw(st.booleans()),
        "pinned": draw(st.booleans()),
        "priority": draw(st.integers(-2, 2)),
        "cpu_fallback": draw(st.booleans()),
        "n_gpu": draw(st.sampled_from([None, None, 0, 1, 2])),
    }
    needs = Needs(n_gpu=fields["n_gpu"], memory_bytes=draw(st.integers(1, 120)), can_spread=draw(st.booleans()))
    return a_launch(**fields), Sizing(needs=needs, basis="drawn")


@given(
    st.lists(wishes(), max_size=8, unique_by=lambda wish: wish[0].uid),
    st.lists(st.integers(1, 100), max_size=4),
    st.integers(0, 200),
)
def test_what_is_planned_fits_at_once_and_what_is_refused_never_would(
    wanted: list[tuple[Launch, Sizing]], gpus: list[int], ram: int
) -> None:
    totals = [SimulatedGpu(total=total, processes=(SimulatedProcess(name="x", used=total // 3),)) for total in gpus]
    seen = SimulatedMachine(gpus=tuple(totals), ram=ram + 1).look(())
    devices = devices_of(seen, (), Limits(gpu_headroom=2))
    rows = draw_up(wanted, devices)
    assert len(rows) == sum(launch.replica for launch, _ in wanted)
    order = [(not row.preload, -row.priority) for row in rows]
    assert order == sorted(order)
    for key, left in free_after(rows, devices).items():
        device = next(device for device in devices if device.key == key)
        given = sum(row.memory.get(key, 0) for row in rows if row.status == "placed")
        assert left == device.free({}) - given
        assert left >= 0 or not given
    by_uid = {launch.uid: (launch, sizing) for launch, sizing in wanted}
    is_any_pinned = any(launch.pinned for launch, _ in wanted)
    for row in rows:
        launch, sizing = by_uid[row.model]
        alone = place(sizing.needs, devices, {}, cpu_fallback=launch.cpu_fallback)
        if isinstance(alone, NoRoom):
            assert row.status == "refused"
        elif launch.replica == 1 and not is_any_pinned:
            assert row.status != "refused"
        assert bool(row.text) or row.status == "placed"
        if row.text:
            assert_sentences(row.text)
