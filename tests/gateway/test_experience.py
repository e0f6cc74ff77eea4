"""What earlier runs told of a launch, and that it outlives the gateway."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import Gateway, StartGateway, until
from llms import a_launch

from engines.base import RAM
from gateway import experience
from gateway.devices import Seen, look_here
from gateway.experience import Experience, fingerprint
from gateway.footprint import Footprint, footprint, forget_peaks
from gateway.gpus import Gpu, GpuProcess

GB = 10**9


def a_look(took: Callable[[], float]) -> Callable[[Collection[int]], Seen]:
    """Each leader has a child; both together hold so many gigabytes of RAM, the child as many of two GPUs together."""

    def look(leaders: Collection[int]) -> Seen:
        size = round(took() * GB)
        gpus = tuple(
            Gpu(
                index=index,
                uuid=f"U{index}",
                name="a",
                total_bytes=80 * GB,
                used_bytes=size,
                processes=tuple(GpuProcess(pid=leader + 1, used_bytes=size // 2) for leader in leaders),
            )
            for index in range(2)
        )
        return Seen(
            gpus=gpus,
            families={pid: leader for leader in leaders for pid in (leader, leader + 1)},
            footprints={leader: Footprint(own_bytes=size, peak_bytes=size) for leader in leaders},
        )

    return look


PID = 2**30  # of nobody


@pytest.mark.parametrize("on_gpu", [False, True])
async def test_the_most_that_a_life_took_is_remembered(on_gpu: bool, tmp_path: Path) -> None:
    path = tmp_path / "experience.json"
    known, launch, took = Experience(path), a_launch(), 3.0
    running = asyncio.create_task(known.run(a_look(lambda: took), sample_s=0.01))
    with known.watch(launch, PID, on_gpu=on_gpu):
        await until(lambda: known.peak_bytes(launch, on_gpu=on_gpu) == 3 * GB)
        took = 5.0
        await until(lambda: known.peak_bytes(launch, on_gpu=on_gpu) == 5 * GB)
        took = 4.0
        # it is written while it runs, so that a crash of the gateway loses nothing
        await until(lambda: Experience(path).peak_bytes(launch, on_gpu=on_gpu) == 5 * GB)
    assert known.peak_bytes(launch, on_gpu=on_gpu) == 5 * GB
    assert known.peak_bytes(launch, on_gpu=not on_gpu) is None
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    again = Experience(path)
    assert again.peak_bytes(launch, on_gpu=on_gpu) == 5 * GB
    assert again.peak_bytes(a_launch({"n_ctx": 9})) is None


async def test_an_odd_life_is_not_for_ever(tmp_path: Path) -> None:
    known, launch = Experience(tmp_path / "x.json"), a_launch()
    peaks = []
    for took in (9.0, 2.0, 2.0, 2.0, 2.0, 2.0):
        running = asyncio.create_task(known.run(a_look(lambda took=took: took), sample_s=0.01))  # type: ignore[misc]
        with known.watch(launch, PID):
            await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        peaks.append((known.peak_bytes(launch) or 0) // GB)
    assert peaks == [9, 9, 9, 9, 9, 2]


LOADS_AND_SERVES = """
def hold(size):
    held = bytearray(size)
    held[::4096] = b"x" * len(held[::4096])
    return held

held = hold(200_000_000)  # while it loads
held = hold(60_000_000)
print("up", flush=True)
input()
also = hold(80_000_000)  # for a request, given back at once
del also
print("served", flush=True)
input()
"""


@pytest.mark.parametrize("can_forget", [True, False])
async def test_what_only_loading_took_is_not_asked_for_again_but_what_a_request_took_is(
    can_forget: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not can_forget:
        monkeypatch.setattr(experience, "forget_peaks", lambda pids: False)
    known, launch = Experience(), a_launch()
    look = partial(look_here, lambda **_: [])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LOADS_AND_SERVES), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout
    assert await process.stdout.readline() == b"up\n"
    running = asyncio.create_task(known.run(look, sample_s=1000))  # one look: as soon as it is ready
    with known.watch(launch, process.pid):
        await until(lambda: known.peak_bytes(launch))
        assert 60_000_000 < (known.peak_bytes(launch) or 0) < 90_000_000
        process.stdin.write(b"\n")
        assert await process.stdout.readline() == b"served\n"
    took = known.peak_bytes(launch) or 0
    assert (140_000_000 < took < 170_000_000) if can_forget else (60_000_000 < took < 90_000_000)
    assert ("for a moment only is not seen" in caplog.text) is not can_forget
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    process.stdin.write(b"\n")
    await process.wait()


async def test_a_process_that_has_ended_keeps_no_other_from_being_measured() -> None:
    ended = await asyncio.create_subprocess_exec("true")
    await ended.wait()
    assert forget_peaks([ended.pid, os.getpid()])


@pytest.mark.engine
async def test_the_second_launch_of_a_real_engine_asks_for_what_the_first_one_took(
    tmp_path: Path, smollm2_gguf: Path
) -> None:
    model = {"model_path": str(smollm2_gguf), "options": {"n_threads": 1, "context_length": 1024}}
    gateway = await Gateway.start(tmp_path / "home", {"models": {"fake": model}})
    try:
        asked, held = [], []
        for _ in range(2):
            assert (await gateway.complete(max_tokens=4)).status == 200
            (life,) = (gateway.home / "run").glob("*/life.json")
            asked.append(json.loads(life.read_text())["placement"]["memory"][RAM])
            pid = (await gateway.until(state="ready"))["pid"]
            await until(lambda: (gateway.home / "experience.json").exists(), limit_s=30)
            held.append(footprint([pid]).total_bytes)
            assert (await gateway.post("/v1/models/fake/stop")).status == 200
            await gateway.until(state="stopped")
        assert asked[0] != asked[1]
        assert held[0] <= asked[1] < 1.1 * held[1]
    finally:
        await gateway.end()


async def test_a_look_that_fails_is_told_and_the_next_one_counts(caplog: pytest.LogCaptureFixture) -> None:
    known, launch, looks = Experience(), a_launch(), 0

    def look(leaders: Collection[int]) -> Seen:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise RuntimeError("the driver is gone")
        return a_look(lambda: 2.0)(leaders)

    running = asyncio.create_task(known.run(look, sample_s=0.01))
    with known.watch(launch, PID):
        await until(lambda: known.peak_bytes(launch) == 2 * GB)
    assert "the driver is gone" in caplog.text
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_the_time_to_load_is_smoothed_and_kept(tmp_path: Path) -> None:
    path, launch = tmp_path / "x.json", a_launch()
    known = Experience(path)
    assert known.load_s(launch) is None
    known.note_load(launch, 8.0)
    known.note_load(launch, 4.0)
    assert known.load_s(launch) == 6.0
    assert known.load_s(launch, on_gpu=True) == 6.0  # better than nothing
    known.note_load(launch, 1.0, on_gpu=True)
    assert known.load_s(launch, on_gpu=True) == 1.0
    known.flush()
    assert Experience(path).load_s(launch) == 6.0


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"uid": "other"}, True),
        ({"options": {"chat_template": "x"}}, True),
        ({"options": {"n_ctx": 2048}}, False),
        ({"engine": "y"}, False),
        ({"n_gpu": 2}, False),
        ({"replica": 4, "idle_timeout_s": 5.0}, True),
    ],
)
def test_launches_that_take_the_same_share_what_is_known(changes: dict[str, Any], same: bool) -> None:
    options = changes.pop("options", {})
    assert (fingerprint(a_launch()) == fingerprint(a_launch(options, **changes))) is same


def test_it_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experience, "LAUNCHES", 3)
    known = Experience(tmp_path / "x.json")
    for number in (0, 1, 2, 0, 3):
        known.note_load(a_launch({"n": number}), 1.0)
    assert [known.load_s(a_launch({"n": number})) for number in range(4)] == [1.0, None, 1.0, 1.0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": {"name": 1}}', '{"a": {"name": "x", "ram_peaks": "y"}}'])
def test_a_damaged_file_is_put_aside_and_told(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "experience.json"
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        known = Experience(path)
    assert "is learnt anew" in caplog.text
    assert (tmp_path / "experience.damaged").read_text() == content
    known.note_load(a_launch(), 2.0)
    known.flush()
    assert Experience(path).load_s(a_launch()) == 2.0


def test_a_disk_that_takes_nothing_is_told_and_no_reason_to_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = Experience(tmp_path / "nowhere" / "x.json")
    known.note_load(a_launch(), 2.0)
    known.flush()
    assert "cannot be remembered" in caplog.text
    assert known.load_s(a_launch()) == 2.0


async def test_a_real_life_is_learnt_and_corrects_the_next_estimate(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True})
    replica = await gateway.until(state="ready")
    file = gateway.home / "experience.json"
    await until(lambda: file.exists() and "ram_peaks" in file.read_text())
    [record] = json.loads(file.read_text()).values()
    assert 5_000_000 < record["ram_peaks"][0] < 200_000_000
    assert 0 < record["ram_load_s"] < 20
    assert replica["memory_bytes"] <= record["ram_peaks"][0] * 1.5
