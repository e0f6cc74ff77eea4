"""The bench can tell right from wrong: its client refuses what is not whole, and its table says what is missed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asks
import figures
import native
import pytest
from native import Failed

COMPILER = pytest.mark.skipif(not shutil.which(native.COMPILER), reason="the programs are C: install a compiler")


class Engine:
    """A running mock engine, and what asks it."""

    def __init__(self, tools: native.Tools, port: int, folder: Path) -> None:
        self.tools, self.port, self.folder = tools, port, folder

    def load(self, ask: asks.Ask, *arguments: str) -> dict:
        file = asks.write(self.folder / "request", ask.request(f"127.0.0.1:{self.port}", "none"))
        words = ["--port", str(self.port), "--request", file, "--needle", ask.needle, *arguments]
        return native.load(self.tools, words)

    def body(self, ask: asks.Ask) -> bytes:
        return asks.expectation(ask, "127.0.0.1", self.port, "none", None)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("bench")
    tools = native.build(folder)
    with native.mock_engine(tools, folder) as (port, _):
        yield Engine(tools, port, folder)


@COMPILER
def test_what_is_asked_has_the_size_that_it_says(engine: Engine) -> None:
    assert len(asks.chat("mock").body) == len(asks.chat("mock-unix").body) == asks.CHAT_IN
    assert len(engine.body(asks.chat("mock"))) == asks.CHAT_OUT
    assert len(engine.body(asks.large("mock"))) == asks.LARGE_OUT


@COMPILER
def test_right_replies_are_counted(engine: Engine, tmp_path: Path) -> None:
    chat = asks.chat("mock")
    expected = asks.write(tmp_path / "expected", engine.body(chat))
    assert engine.load(chat, "--requests", "500", "--connections", "7", "--expect", expected)["requests"] == 500
    assert engine.load(asks.upload("mock"), "--requests", "2")["requests"] == 2
    counted = engine.load(
        asks.stream("mock", 10, 1), "--requests", "8", "--connections", "4", "--events", "10", "--exact"
    )
    assert counted["events"] == 80


@COMPILER
def test_streams_are_held_to_their_pace(engine: Engine) -> None:
    ask = asks.stream("mock", events=60, pace_ms=10)
    counted = engine.load(
        ask, "--mode", "streams", "--connections", "20", "--seconds", "0.2", "--warm-up", "0.1", "--events", "60"
    )
    assert counted["over"] == counted["begun"] == 20
    assert counted["events"] <= 20 * 100 * 1.5 * counted["seconds"]


@COMPILER
@pytest.mark.parametrize(
    ("ask", "arguments", "sentence"),
    [
        (asks.Ask("/v1/nowhere", b"{}", ""), [], "status 404"),
        (asks.chat("mock"), ["--needle", "bbbb"], "without bbbb"),
        (asks.stream("mock", 9, 1), ["--events", "10"], "9 events of 10"),
        (asks.chat("mock"), ["--events", "10"], "0 events of 10"),
        (
            asks.Ask("/v1/chat/completions", asks.upload("mock").body.replace(b"00000009", b"00000008"), ""),
            [],
            "status 400",
        ),
    ],
)
def test_wrong_replies_end_it_with_a_sentence(
    engine: Engine, ask: asks.Ask, arguments: list[str], sentence: str
) -> None:
    with pytest.raises(Failed, match=sentence):
        engine.load(ask, "--requests", "3", *arguments)


@COMPILER
def test_a_reply_of_other_bytes_ends_it(engine: Engine, tmp_path: Path) -> None:
    body = engine.body(asks.chat("mock"))
    for wrong, sentence in (
        (body[:-1], "from byte 0 on"),
        (body + b" ", "480 bytes, not 481"),
        (b"x" + body[1:], "from byte 0 on"),
    ):
        with pytest.raises(Failed, match=sentence):
            engine.load(asks.chat("mock"), "--requests", "3", "--expect", asks.write(tmp_path / "expected", wrong))


def made_up(cpu_us: float) -> dict:
    """A run in which nginx takes 20 us for a request."""
    facts = dict.fromkeys(("date", "commit", "machine", "kernel", "python", "nginx", "repetitions"), "x")
    facts |= {"seconds": 1.0, "peers": {}, "cores": [0, 1], "load_before": 0.0}
    run = {"repetition": 0, "cell": "c64", "seconds": 1.0, "requests_per_s": 1000.0, "engine_connections": 1}
    run |= {"latency_ms": {"p50": 1.0, "p99": 2.0}, "first_ms": None, "transit_ms": None}
    targets = [{"name": name, "is_ours": name == "hostler", "shares": ""} for name in ("nginx", "hostler")]
    runs = [run | {"target": "nginx", figures.CPU: 20.0}, run | {"target": "hostler", figures.CPU: cpu_us}]
    return {"facts": facts, "targets": targets, "fresh": [], "runs": runs}


@pytest.mark.parametrize(("cpu_us", "said"), [(22.0, "1.1 goal"), (28.0, "1.4 floor"), (40.0, "2 **missed**")])
def test_the_table_says_what_is_met(cpu_us: float, said: str) -> None:
    lines = figures.report(made_up(cpu_us)).splitlines()
    (line,) = [line for line in lines if line.startswith("| CPU per request, 64 connections, x nginx")]
    assert [cell.strip() for cell in line.split("|")][2:5] == ["1.5", "1.2", said]
    (line,) = [line for line in lines if line.startswith("| idle RSS")]
    assert "not measured" in line


@COMPILER
@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is the reference: install it")
def test_the_command_measures_and_tells(tmp_path: Path) -> None:
    words = ["--cells", "c1,s64", "--repetitions", "1", "--seconds", "0.1", "--no-plot", "--out", str(tmp_path)]
    argv = [sys.executable, str(native.BENCH / "overhead.py"), *words, "--json", str(tmp_path / "runs.json")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| added p50, 1 connection, x nginx's" in (tmp_path / "overhead.md").read_text()
    runs = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert {run["cell"] for run in runs} == {"c1", "s64"}
    assert {"direct", "nginx", "nginx, Unix socket", "hostler", "hostler, Unix socket"} <= {
        run["target"] for run in runs
    }
    assert all(run["cpu_s"] > 0 for run in runs if run["target"] != "direct")


def test_every_goal_is_at_least_its_floor() -> None:
    for figure in figures.FIGURES:
        assert (figure.goal <= figure.floor) == figure.is_less_better or figure.goal == figure.floor
