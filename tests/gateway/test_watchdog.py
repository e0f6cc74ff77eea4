"""The last line against orphans: after SIGKILL on the gateway none of its short-lived children is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway.keeper import MARK_VARIABLE, marked
from gateway.watchdog import end_all

FAKE_ENGINE = Path(__file__).parents[1] / "fake_engine.py"
LIMIT_S = 15.0

# What a gateway does, and no more: opens its folder, starts the programs of its argument, tells, waits.
PARENT = """
import asyncio, json, sys
from pathlib import Path
import psutil
from gateway.nodes.local import open_scratch
from gateway.process import start

async def main():
    scratch, commands, has_end = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == "end"
    async with open_scratch() as folder:
        children = []
        for number, (argv, env) in enumerate(commands):
            argv = [word.replace("FOLDER", str(folder)) for word in argv]
            log = (scratch / f"{number}.log").open("ab")
            children.append(await start(argv, env, folder=folder, grace_s=0.5, stdout=log, stderr=log))
        while len(list(scratch.glob("*.ready"))) < len(commands):
            await asyncio.sleep(0.02)
        pids = [child.pid for child in psutil.Process().children(recursive=True)]
        print(json.dumps({"folder": str(folder), "pids": pids}), flush=True)
        if not has_end:
            await asyncio.Event().wait()
        for child in children:
            await child.end()

asyncio.run(main())
"""


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and is not yet reaped does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Parent:
    """A running PARENT; `pids` are those of its watchdog and of all that it started."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, pids: list[int]) -> None:
        self.process, self.folder, self.pids = process, folder, pids

    def watchdog(self) -> int:
        (pid,) = [pid for pid in self.pids if "gateway.watchdog" in psutil.Process(pid).cmdline()]
        return pid

    def alive(self) -> list[int]:
        return [pid for pid in self.pids if is_alive(pid)]


@contextmanager
def parent(scratch: Path, *commands: tuple[list[str], dict[str, str]], then: str = "wait") -> Iterator[Parent]:
    """Each command makes a file *.ready in the scratch folder once it is up."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # fake engines ask `env` for Python
    argv = [sys.executable, "-P", "-c", PARENT, str(scratch), json.dumps(commands), then]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=os.environ | {"PATH": path})
    pids: list[int] = []
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        pids = told["pids"]
        yield Parent(process, Path(told["folder"]), pids)
    finally:
        process.kill()
        process.communicate(timeout=10)
        with suppress(AssertionError):  # the watchdog tidies up
            until(lambda: not any(map(is_alive, pids)))
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGKILL)


def a_fake_engine(scratch: Path, **behaviour: Any) -> tuple[list[str], dict[str, str]]:
    """A fake engine with two grandchildren, one of them deaf to SIGTERM."""
    behaviour |= {"grandchild": True, "grandchild_file": str(scratch / "fake.ready")}
    argv = [str(FAKE_ENGINE), "--model", "m.gguf", "--host", "FOLDER/a.sock"]
    return argv, {"FAKE_ENGINE": json.dumps(behaviour)}


def a_shell(script: str, scratch: Path) -> tuple[list[str], dict[str, str]]:
    return ["sh", "-c", f": > {scratch}/shell.ready; {script}"], {}  # no `touch`, which might still be seen


# --- after a gateway that was killed


def test_nothing_is_left_not_even_the_deaf_their_children_and_the_folder(tmp_path: Path) -> None:
    with parent(tmp_path, a_fake_engine(tmp_path, ignore_term=True)) as kept:
        assert len(kept.alive()) == 4  # the watchdog, the engine, and its two children
        assert kept.folder.is_dir()
        kept.process.kill()
        until(lambda: not kept.alive() and not kept.folder.exists())


def test_a_process_that_has_overwritten_its_environment_is_found_by_its_folder(tmp_path: Path) -> None:
    code = f"import os; open('{tmp_path}/a.ready', 'w'); os.execve('/bin/sleep', ['sleep', '600'], {{}})"
    with parent(tmp_path, ([sys.executable, "-c", code], {})) as kept:
        (engine,) = set(kept.pids) - {kept.watchdog()}
        until(lambda: psutil.Process(engine).environ() == {})
        kept.process.kill()
        until(lambda: not kept.alive() and not kept.folder.exists())


@pytest.mark.skipif(sys.platform != "linux", reason="setsid is a program of Linux")
def test_a_process_that_left_its_group_and_folder_is_found_by_its_environment(tmp_path: Path) -> None:
    script = "cd /; setsid sleep 600 & wait"
    with parent(tmp_path, a_shell(script, tmp_path)) as kept:
        kept.process.kill()
        until(lambda: not kept.alive() and not kept.folder.exists())


def test_another_gateways_processes_are_left_alone(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    with (
        parent(one, a_shell("exec sleep 600", one)) as killed,
        parent(other, a_shell("exec sleep 600", other)) as kept,
    ):
        killed.process.kill()
        until(lambda: not killed.alive() and not killed.folder.exists())
        assert kept.alive() == kept.pids
        assert kept.folder.is_dir()


# --- while there is a gateway


def test_the_watchdog_outlives_the_signals_of_a_terminal_and_a_shutdown(tmp_path: Path) -> None:
    with parent(tmp_path, a_shell("exec sleep 600", tmp_path)) as kept:
        watchdog = kept.watchdog()
        until(lambda: _ignores(watchdog, signal.SIGTERM))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(watchdog, number)
        kept.process.kill()
        until(lambda: not kept.alive() and not kept.folder.exists())


def _ignores(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigIgn")]
    return bool(int(mask, 16) & 1 << (number - 1))


def test_a_gateway_that_ends_by_itself_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    with parent(tmp_path, a_fake_engine(tmp_path), then="end") as kept:
        assert kept.process.wait(timeout=30) == 0
        assert not kept.folder.exists()
        until(lambda: not kept.alive())


def test_the_watchdog_is_in_a_session_of_its_own_and_has_none_of_our_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTLER_API_KEYS", "sk-secret")
    with parent(tmp_path) as kept:
        watchdog = kept.watchdog()
        assert os.getsid(watchdog) == watchdog
        assert "HOSTLER_API_KEYS" not in psutil.Process(watchdog).environ()


# --- its parts


def test_marked_are_the_processes_with_the_folder_as_variable_or_as_their_own(tmp_path: Path) -> None:
    mark = {MARK_VARIABLE: str(tmp_path)}
    processes = [
        subprocess.Popen(["sleep", "600"], env=mark),
        subprocess.Popen(["sleep", "600"], cwd=tmp_path),
        subprocess.Popen(["sleep", "600"], env={MARK_VARIABLE: f"{tmp_path}x"}),
        subprocess.Popen(["sleep", "600"], env={"OTHER": str(tmp_path)}),
    ]
    try:
        assert sorted(marked(str(tmp_path))) == sorted(process.pid for process in processes[:2])
        end_all(str(tmp_path))
        assert [process.poll() for process in processes] == [-signal.SIGTERM, -signal.SIGTERM, None, None]
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=10)


def test_where_nothing_is_marked_there_is_nothing_to_end(tmp_path: Path) -> None:
    assert marked(str(tmp_path)) == []
    end_all(str(tmp_path))
