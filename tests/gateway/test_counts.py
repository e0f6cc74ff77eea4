"""What a request costs, in counts that are the same on every machine: connections, reads, system calls. No times."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import asks
import doors
import native
import pytest
from doors import HOST, KEY, Running, Setting

REQUESTS = 5000
CONNECTIONS = 16
PROBES = 4  # connections that the gateway may open to look whether its engine is well
DOORS = doors.doors_of(doors.ROOT) or ["plain"]
# system calls of the gateway for a request at 64 connections, and pieces that it and its reply may come in, by door
SYSCALLS = {"auto": 6.0, "plain": 12.0}
PIECES = {"auto": 1.05, "plain": 2.05}

# A line of strace's table: time, seconds, microseconds a call, calls, perhaps errors, name. Threads that wait for each
# other (futex) do so as the machine has it.
CALLS = re.compile(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) +(?:\d+ +)?(?!futex|total)(\w+)$", re.MULTILINE)

pytestmark = pytest.mark.skipif(not shutil.which(native.COMPILER), reason="the mock engine is C: install a compiler")


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> native.Tools:
    return native.build(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module", params=DOORS)
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def running(door: str, tools: native.Tools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    setting = Setting(tools, 0, "", engine_core=None, door_core=None, folder=tmp_path_factory.mktemp("doors"))
    more = {"door": door} if doors.doors_of(doors.ROOT) else {}
    with doors.hostler(**more)(setting) as running:
        yield running


@pytest.fixture(params=["mock-tcp", "mock-unix"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load(tools: native.Tools, running: Running, ask: asks.Ask, folder: Path, connections: int, requests: int) -> dict:
    file = asks.write(folder / "request", ask.request(f"{HOST}:{running.port}", KEY))
    arguments = ["--port", str(running.port), "--request", file, "--needle", ask.needle]
    arguments += ["--events", str(ask.events), "--exact"] if ask.events is not None else []
    return native.load(tools, [*arguments, "--connections", str(connections), "--requests", str(requests)])


def test_connections_to_the_engine_are_kept(running: Running, model: str, tools: native.Tools, tmp_path: Path) -> None:
    before = doors.counted(running, model)
    load(tools, running, asks.chat(model), tmp_path, CONNECTIONS, REQUESTS)
    after = doors.counted(running, model)
    assert after["requests"] - before["requests"] >= REQUESTS
    assert after["accepted"] - before["accepted"] <= CONNECTIONS + PROBES


def test_every_request_is_in_the_metrics(running: Running, model: str, tools: native.Tools, tmp_path: Path) -> None:
    def total() -> float:
        text = doors.ask(running.port, "/metrics", KEY)[1].decode()
        lines = [line for line in text.splitlines() if line.startswith("hostler_requests_total{")]
        return sum(float(line.split()[-1]) for line in lines if f'model="{model}"' in line and '"200"' in line)

    before = total()
    load(tools, running, asks.chat(model), tmp_path, CONNECTIONS, 500)
    load(tools, running, asks.stream(model, events=3, pace_ms=1), tmp_path, CONNECTIONS, 200)
    assert total() - before == 700


def test_connections_of_streams_are_kept_too(running: Running, model: str, tools: native.Tools, tmp_path: Path) -> None:
    before = doors.counted(running, model)
    load(tools, running, asks.stream(model, events=5, pace_ms=1), tmp_path, CONNECTIONS, REQUESTS // 20)
    after = doors.counted(running, model)
    assert after["accepted"] - before["accepted"] <= CONNECTIONS + PROBES
    assert after["broken_off"] == before["broken_off"]


def test_512_clients_at_once_are_all_let_in(running: Running, model: str, tools: native.Tools, tmp_path: Path) -> None:
    """A short backlog drops some, whom it costs a second; a connection each to the engine is the most."""
    before = doors.counted(running, model)
    counted = load(tools, running, asks.stream(model, events=20, pace_ms=20), tmp_path, 512, 512)
    after = doors.counted(running, model)
    assert counted["events"] == 512 * 20
    assert after["accepted"] - before["accepted"] <= 512 + PROBES


def test_requests_and_replies_come_in_one_piece(
    running: Running, door: str, model: str, tools: native.Tools, tmp_path: Path
) -> None:
    requests = 300
    load(tools, running, asks.chat(model), tmp_path, 1, 10)
    before = doors.counted(running, model)
    counted = load(tools, running, asks.chat(model), tmp_path, 1, requests)
    after = doors.counted(running, model)
    looks = after["requests"] - before["requests"] - requests  # of the gateway, and ours
    assert (after["reads"] - before["reads"] - looks) / requests <= PIECES[door]
    assert counted["reads"] / requests <= PIECES[door]


@pytest.mark.skipif(not shutil.which("strace"), reason="counted by strace, which is not on PATH")
def test_system_calls_of_a_request(
    running: Running, door: str, model: str, tools: native.Tools, tmp_path: Path
) -> None:
    load(tools, running, asks.chat(model), tmp_path, 64, REQUESTS)
    table = tmp_path / "calls"
    strace = subprocess.Popen(["strace", "-c", "-f", "-p", str(running.pid), "-o", table], stderr=subprocess.PIPE)
    assert strace.stderr is not None
    if b"attached" not in (line := strace.stderr.readline()):
        strace.kill()
        pytest.skip(f"strace may not look at the gateway here: {line.decode()}")
    try:
        load(tools, running, asks.chat(model), tmp_path, 64, REQUESTS)
    finally:
        strace.terminate()
        strace.wait(20)
    calls = {name: int(number) for number, name in CALLS.findall(table.read_text())}
    assert calls["read"] > REQUESTS, "strace saw nothing"
    assert sum(calls.values()) / REQUESTS <= SYSCALLS[door], table.read_text()
