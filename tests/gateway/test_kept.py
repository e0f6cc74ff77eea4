"""An engine is a block: leaving it in any way ends all of it, however it was started."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from engines.base import Command, Endpoint, Placement
from gateway.home import only_one_in
from gateway.keeper import LOG_LIMIT_BYTES, marked
from gateway.kept import EngineProcess
from gateway.nodes.local import open_node
from gateway.process import CannotStart, Exit, memory_bytes, tail

LIMIT_S = 20.0

# A leader with a child of its own; both pids are in the file `pids` once they run.
FAMILY = "sleep 600 & echo $$ $! > pids.new; mv pids.new pids; wait"
FAMILY_OF_A_DEAF_LEADER = "trap '' TERM; sleep 600 & echo $$ $! > pids.new; mv pids.new pids; while :; do wait; done"
DEAF_CHILD = "(trap '' TERM; exec sleep 600) & echo $$ $! > pids.new; mv pids.new pids; wait"


@contextlib.asynccontextmanager
async def engine_process(
    argv: list[str], env: dict[str, str], log: Path, *, folder: Path, grace_s: float = 10.0
) -> AsyncIterator[EngineProcess]:
    """A program as a gateway runs it, that works in the folder; the data folder is below it."""
    home = folder / "home" / log.stem
    with only_one_in(home):
        async with open_node(home, orphan_timeout_s=60) as node:
            command = Command(argv=tuple(argv), env=env, grace_s=grace_s, folder=str(folder))
            life, placement = node.run_folder.new(), Placement()
            async with node.run(
                command, log, folder=life, endpoint=Endpoint(), uid="m", index=0, placement=placement, engine="test"
            ) as process:
                assert isinstance(process, EngineProcess)
                yield process
            assert not life.exists()


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and is not yet reaped does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.01)


async def pids_in(folder: Path) -> list[int]:
    await until((folder / "pids").exists)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


async def run_shell(script: str, folder: Path) -> tuple[Exit, EngineProcess]:
    """Run a script to its end."""
    async with engine_process(["sh", "-c", script], {}, folder / "a.log", folder=folder) as process:
        return await asyncio.wait_for(process.wait(), LIMIT_S), process


# --- how the group ends


async def test_returning_ends_the_group(tmp_path: Path) -> None:
    async with engine_process(["sh", "-c", FAMILY], {}, tmp_path / "a.log", folder=tmp_path, grace_s=0.5):
        pids = await pids_in(tmp_path)
        assert all(map(is_alive, pids))
    assert not any(map(is_alive, pids))


async def fail_inside(folder: Path) -> None:
    async with engine_process(["sh", "-c", FAMILY], {}, folder / "a.log", folder=folder, grace_s=0.5):
        await pids_in(folder)
        raise ZeroDivisionError


async def test_an_error_ends_the_group(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        await fail_inside(tmp_path)
    assert not any(map(is_alive, await pids_in(tmp_path)))


async def hold(script: str, folder: Path, grace_s: float, running: asyncio.Event | None = None) -> None:
    async with engine_process(["sh", "-c", script], {}, folder / "a.log", folder=folder, grace_s=grace_s):
        if running:
            running.set()
        await asyncio.Event().wait()


async def test_a_cancel_ends_the_group(tmp_path: Path) -> None:
    task = asyncio.create_task(hold(FAMILY, tmp_path, grace_s=0.5))
    pids = await pids_in(tmp_path)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, LIMIT_S)
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize("times", [2, 3])
async def test_a_second_cancel_ends_the_grace_and_the_group(times: int, tmp_path: Path) -> None:
    running = asyncio.Event()  # a cancel before that leaves no grace
    task = asyncio.create_task(hold(FAMILY_OF_A_DEAF_LEADER, tmp_path, 300, running))
    pids = await pids_in(tmp_path)
    await running.wait()
    task.cancel()
    await asyncio.sleep(0.1)
    assert is_alive(pids[0])  # the grace lasts
    for _ in range(times - 1):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, LIMIT_S)
    await until(lambda: not any(map(is_alive, pids)))


async def test_a_cancel_at_any_moment_of_the_start_leaves_nothing(tmp_path: Path) -> None:
    def left() -> list[int]:
        return [pid for pid in marked(str(tmp_path)) if is_alive(pid)]

    for turns in range(8):
        task = asyncio.create_task(hold("sleep 600", tmp_path, grace_s=0.5))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, LIMIT_S)
    try:
        await until(lambda: not left(), limit_s=3)
    finally:
        for pid in left():
            os.kill(pid, signal.SIGKILL)


async def test_who_ignores_term_is_killed_after_the_grace(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    argv = ["sh", "-c", FAMILY_OF_A_DEAF_LEADER]
    async with engine_process(argv, {}, log, folder=tmp_path, grace_s=0.2) as process:
        pids = await pids_in(tmp_path)
    assert not any(map(is_alive, pids))
    assert await process.wait() == Exit(signal=9)


async def test_a_deaf_grandchild_is_killed_after_the_grace(tmp_path: Path) -> None:
    async with engine_process(["sh", "-c", DEAF_CHILD], {}, tmp_path / "a.log", folder=tmp_path, grace_s=0.2):
        pids = await pids_in(tmp_path)
    await until(lambda: not any(map(is_alive, pids)))


async def test_a_grandchild_that_outlives_its_leader_is_ended(tmp_path: Path) -> None:
    script = "sleep 600 & echo $! > pids.new; mv pids.new pids"
    async with engine_process(["sh", "-c", script], {}, tmp_path / "a.log", folder=tmp_path, grace_s=0.5) as process:
        assert await asyncio.wait_for(process.wait(), LIMIT_S) == Exit(code=0)
        (orphan,) = await pids_in(tmp_path)
        await until(lambda: not is_alive(orphan), limit_s=5)  # by the keeper, whatever we do


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives the children of the dead to a keeper")
@pytest.mark.parametrize("ending", ["left", "died"])
async def test_a_grandchild_that_has_left_its_group_its_folder_and_its_environment_is_ended(
    ending: str, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    script = f"cd /; setsid env -i sleep 600 & echo $! > {pids}.new; mv {pids}.new {pids}; wait"
    async with engine_process(["sh", "-c", script], {}, tmp_path / "a.log", folder=tmp_path, grace_s=2) as process:
        (grandchild,) = await pids_in(tmp_path)
        await until(lambda: psutil.Process(grandchild).environ() == {})
        if ending == "died":
            os.kill(process.pid, signal.SIGKILL)
            assert await asyncio.wait_for(process.wait(), LIMIT_S) == Exit(signal=9)
            await until(lambda: not is_alive(grandchild), limit_s=5)
    assert not is_alive(grandchild)


async def test_the_grace_may_be_cut_short_before_the_end(tmp_path: Path) -> None:
    argv = ["sh", "-c", FAMILY_OF_A_DEAF_LEADER]
    async with asyncio.timeout(LIMIT_S):
        async with engine_process(argv, {}, tmp_path / "a.log", folder=tmp_path, grace_s=300) as process:
            pids = await pids_in(tmp_path)
            process.grace_s = 0.1
    await until(lambda: not any(map(is_alive, pids)))


async def test_who_heeds_term_may_tidy_up(tmp_path: Path) -> None:
    script = "trap 'sleep 0.2; echo tidy > tidied; exit 5' TERM; echo > pids; while :; do sleep 0.02; done"
    async with engine_process(["sh", "-c", script], {}, tmp_path / "a.log", folder=tmp_path, grace_s=60) as process:
        await until((tmp_path / "pids").exists)
    assert (tmp_path / "tidied").read_text() == "tidy\n"
    assert await process.wait() == Exit(code=5)


async def test_a_dead_grandchild_does_not_use_up_the_grace(tmp_path: Path) -> None:
    script = "sleep 600 & echo started; exec sleep 601"
    async with engine_process(["sh", "-c", script], {}, tmp_path / "a.log", folder=tmp_path, grace_s=20) as process:
        await until(process.log_tail)
        started = time.monotonic()
    assert time.monotonic() - started < 10


async def test_a_keeper_that_is_stopped_does_not_keep_an_engine_from_its_end(tmp_path: Path) -> None:
    argv = ["sh", "-c", FAMILY]
    async with engine_process(argv, {}, tmp_path / "a.log", folder=tmp_path, grace_s=0.5) as process:
        pids = await pids_in(tmp_path)
        os.kill(psutil.Process(process.pid).ppid(), signal.SIGSTOP)
    assert not any(map(is_alive, pids))


# --- how it ended


@pytest.mark.parametrize(
    ("script", "exit_", "text"),
    [
        ("exit 0", Exit(code=0), "exit code 0"),
        ("exit 7", Exit(code=7), "exit code 7"),
        ("kill -KILL $$", Exit(signal=9), "signal 9 (SIGKILL)"),
        ("kill -SEGV $$", Exit(signal=11), "signal 11 (SIGSEGV)"),
    ],
)
async def test_the_end_is_told(script: str, exit_: Exit, text: str, tmp_path: Path) -> None:
    ended, _ = await run_shell(script, tmp_path)
    assert ended == exit_
    assert str(ended) == text


async def test_the_end_is_told_where_the_system_does_not_say_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    ended, process = await run_shell("sleep 0.3; exit 7", tmp_path)
    assert ended == Exit(code=7)
    assert not is_alive(process.pid)


async def test_a_signal_without_a_name_can_be_told(tmp_path: Path) -> None:
    ended, _ = await run_shell("kill -40 $$", tmp_path)
    assert ended == Exit(signal=40)
    assert str(ended).startswith("signal 40")


@pytest.mark.parametrize("mode", [None, 0o644], ids=["missing", "not executable"])
async def test_a_program_that_cannot_be_started_is_an_error_at_once(mode: int | None, tmp_path: Path) -> None:
    program = tmp_path / "program"
    if mode is not None:
        program.write_text("#!/bin/sh\n")
        program.chmod(mode)
    with pytest.raises(CannotStart, match=r"program|Permission|No such"):
        async with engine_process([str(program)], {}, tmp_path / "a.log", folder=tmp_path):
            raise AssertionError("it runs")


async def test_the_end_of_one_process_leaves_another_alone(tmp_path: Path) -> None:
    async with engine_process(["sleep", "600"], {}, tmp_path / "a.log", folder=tmp_path) as other:
        async with engine_process(["sleep", "600"], {}, tmp_path / "b.log", folder=tmp_path) as process:
            pass
        assert not is_alive(process.pid)
        assert is_alive(other.pid)


# --- what it runs in


async def test_it_runs_in_a_session_and_folder_of_its_own_marked_and_without_our_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTLER_API_KEYS", "sk-secret")
    code = (
        "import os, sys, json; json.dump({'sid': os.getsid(0), 'pid': os.getpid(), 'cwd': os.getcwd(), "
        "'env': dict(os.environ), 'stdin': sys.stdin.read()}, open('seen', 'w'))"
    )
    argv = [sys.executable, "-c", code]
    async with engine_process(argv, {"ADDED": "1"}, tmp_path / "a.log", folder=tmp_path) as process:
        assert await asyncio.wait_for(process.wait(), LIMIT_S) == Exit(code=0)
    seen = json.loads((tmp_path / "seen").read_text())
    assert seen["sid"] == seen["pid"] == process.pid
    assert (seen["cwd"], seen["stdin"]) == (str(tmp_path), "")
    assert (seen["env"]["ADDED"], seen["env"]["HOSTLER_RUN"]) == ("1", str(process.folder))
    assert "HOSTLER_API_KEYS" not in seen["env"]


async def test_its_memory_counts_that_of_its_children(tmp_path: Path) -> None:
    async with engine_process(["sh", "-c", FAMILY], {}, tmp_path / "a.log", folder=tmp_path, grace_s=0.5) as process:
        leader, child = await pids_in(tmp_path)
        together = memory_bytes(process.pid)
        alone = memory_bytes(child)
    assert leader == process.pid
    assert together is not None
    assert alone is not None
    assert together > alone > 0


def test_a_process_that_is_gone_has_no_memory() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait(timeout=LIMIT_S)
    assert memory_bytes(gone.pid) is None


# --- its log


async def test_both_of_its_streams_are_the_log(tmp_path: Path) -> None:
    _, process = await run_shell("echo out; echo err >&2", tmp_path)
    assert process.log_tail() == ("out", "err")


async def test_its_tail_has_nothing_of_an_earlier_process(tmp_path: Path) -> None:
    _, first = await run_shell("echo first", tmp_path)
    assert first.log_tail() == ("first",)
    _, silent = await run_shell("true", tmp_path)
    assert silent.log_tail() == ()
    _, second = await run_shell("echo second", tmp_path)
    assert second.log_tail() == ("second",)
    lines = (tmp_path / "a.log").read_text().splitlines()
    assert [line for line in lines if not line.startswith("---")] == ["first", "second"]


async def test_each_start_is_headed_by_its_command(tmp_path: Path) -> None:
    await run_shell("true", tmp_path)
    (line,) = (tmp_path / "a.log").read_text().splitlines()
    assert line.startswith("--- 2")
    assert line.endswith(" sh -c true")


async def test_the_folder_of_the_log_is_made(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "org%2Fa" / "0.log"
    async with engine_process(["echo", "hello"], {}, log, folder=tmp_path) as process:
        await asyncio.wait_for(process.wait(), LIMIT_S)
    assert tail(log, 1) == ("hello",)


@pytest.mark.parametrize("times", [1, 2])
async def test_a_full_log_is_put_aside_and_two_are_kept_while_the_process_goes_on(times: int, tmp_path: Path) -> None:
    log, old = tmp_path / "logs" / "0.log", tmp_path / "logs" / "0.old.log"
    log.parent.mkdir()
    for turn in range(times):
        with log.open("ab") as file:
            file.write(f"turn {turn}\n".encode())
            file.truncate(LOG_LIMIT_BYTES + 1)
        script = f"while :; do echo line of {turn}; sleep 0.02; done"
        async with engine_process(["sh", "-c", script], {}, log, folder=tmp_path, grace_s=0.5) as process:
            await until(lambda: log.stat().st_size < LOG_LIMIT_BYTES)
            await until(lambda turn=turn, process=process: process.log_tail(1) == (f"line of {turn}",))
    assert sorted(log.parent.iterdir()) == [log, old]
    assert f"turn {times - 1}\n".encode() in old.read_bytes()
    assert b"\0" not in log.read_bytes()


async def test_a_log_that_is_not_full_is_added_to(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("earlier\n")
    await run_shell("echo later", tmp_path)
    assert tail(tmp_path / "a.log", 3)[0::2] == ("earlier", "later")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.log", "home"]


@pytest.mark.parametrize(
    ("text", "lines", "expected"),
    [
        (b"", 3, ()),
        (b"a\nb\nc\n", 2, ("b", "c")),
        (b"a\nb\nc", 2, ("b", "c")),
        (b"a\nb\n", 5, ("a", "b")),
        (b"a\nb\n", 0, ()),
        ("für\n模型\n".encode(), 1, ("模型",)),
        (b"\xff\xfe\n", 1, ("\ufffd\ufffd",)),
        (b"x\n" * 100_000, 3, ("x", "x", "x")),
    ],
)
def test_the_tail_of_a_log(text: bytes, lines: int, expected: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "0.log").write_bytes(text)
    assert tail(tmp_path / "0.log", lines) == expected


def test_the_tail_of_a_log_is_of_whole_lines_however_long(tmp_path: Path) -> None:
    lines = [f"{number}:" + "x" * 3000 for number in range(10)]
    (tmp_path / "0.log").write_text("\n".join(lines) + "\n")
    assert tail(tmp_path / "0.log", 3) == tuple(lines[-3:])


def test_a_log_that_there_is_not_has_no_tail(tmp_path: Path) -> None:
    assert tail(tmp_path / "0.log", 3) == ()
