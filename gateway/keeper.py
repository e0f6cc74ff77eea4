"""Keeps one engine: starts it, holds its log and its end, and outlives the gateway, for a while.

One process for each life of an engine, in a session of its own, run by its path as `python -I -S keeper.py` with the
standard library alone, so that it costs a few megabytes. On its standard input it reads what to run (see `Order`), on
its standard output it says in one line whether that runs; then both are closed, and what it knows it writes into the
folder of the life: `started.json`, `ended.json`. The gateway may die and another one may read them.

It listens to two signals: SIGTERM asks the engine to end, SIGUSR1 ends it now. It also ends it if no gateway has held
the lock of the data folder for the orphan timeout, or if somebody has removed the folder of the life. Once the engine
has ended, whatever it left behind is ended too: its descendants, which are given to us when their parents die, and who
carries its mark. Should we be killed, the system kills the engine (Linux alone), and the gateway its rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import time

TYPE_CHECKING = False  # `typing` would cost a megabyte
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

MARK_VARIABLE = "HOSTLER_RUN"  # of engines: the folder of their life; of our other children: that of the gateway
STARTED, ENDED = "started.json", "ended.json"
ORPHANS = "orphan_timeout_s"  # in the folder of all lives
END_NOW = signal.SIGUSR1
TICK_S = 1.0
REST_PAUSE_S = 0.05
REST_LIMIT_S = 20.0  # who cannot be killed for so long is left to the system
LOG_LIMIT_BYTES = 16 * 2**20
LOG_TICKS = 30
COPY_BYTES = 2**20
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
CANNOT_RUN = 127


def _boot() -> str:
    """Which start of the machine this is; empty where the system does not tell, and has no /proc."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


BOOT = _boot()

# Order, as JSON: {"argv", "env", "cwd", "folder", "lock", "log", "grace_s", "orphan_timeout_s"}


def main() -> None:
    """Keep one engine from its start to its end."""
    os.setsid()
    os.closerange(3, 4096)
    os.chdir("/")
    order = json.loads(sys.stdin.buffer.read())  # a gateway that dies meanwhile has ordered nothing
    heard = {signal.SIGCHLD, signal.SIGTERM, END_NOW, signal.SIGALRM}
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    for number in heard:
        signal.signal(number, lambda *_: None)  # where a signal that is ignored by default is dropped while blocked
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    engine = start(order, heard)
    keeper = Keeper(order, engine)
    signal.setitimer(signal.ITIMER_REAL, TICK_S / 100, TICK_S)
    while not keeper.has_ended:
        keeper.hear(signal.sigwait(heard))
    keeper.end_rest()


def start(order: dict[str, Any], heard: Iterable[int]) -> int:
    """The engine's pid, once its program runs; ends us if it cannot."""
    reads, writes = os.pipe()
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    us = os.getpid()
    try:
        pid = os.fork()
    except OSError as exc:
        say({"errno": exc.errno})
        sys.exit(CANNOT_RUN)
    if pid == 0:
        try:
            os.setsid()
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != us:
                os._exit(CANNOT_RUN)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(order["cwd"])
            for number in (*heard, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)
            os.execvpe(order["argv"][0], order["argv"], order["env"])  # noqa: S606 (no shell is what we want)
        except OSError as exc:
            os.write(writes, str(exc.errno).encode())
        finally:
            os._exit(CANNOT_RUN)
    os.close(writes)
    os.close(log)
    if failed := os.read(reads, 16):
        os.waitpid(pid, 0)
        say({"errno": int(failed)})
        sys.exit(CANNOT_RUN)
    os.close(reads)
    me = os.getpid()
    both = {"keeper": [me, started_of(me)], "engine": [pid, started_of(pid)]}
    try:
        write(order["folder"], STARTED, both)
    except OSError as exc:  # above all: another gateway has found the folder, took it for a leftover, and removed it
        signal_group(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        say({"errno": exc.errno})
        sys.exit(CANNOT_RUN)
    say(both)
    return pid


class Keeper:
    """What we know of the engine that runs."""

    def __init__(self, order: dict[str, Any], engine: int) -> None:
        self.order = order
        self.engine = engine
        self.has_ended = False
        self.is_orphan = False
        self.lock = os.open(order["lock"], os.O_RDONLY | os.O_CREAT, 0o600)
        self.gone_since: float | None = None  # of the gateway
        self.kill_at: float | None = None
        self.ticks = 0

    def hear(self, number: int) -> None:
        """A signal came, or another second is over."""
        if number == signal.SIGTERM:
            signal_group(self.engine, signal.SIGTERM)
        elif number == END_NOW:
            signal_group(self.engine, signal.SIGKILL)
        elif number == signal.SIGALRM:
            self.tick()
        self.reap()

    def tick(self) -> None:
        """Look after the gateway, and from time to time after the log."""
        now = time.monotonic()
        if self.kill_at is not None and now >= self.kill_at:
            signal_group(self.engine, signal.SIGKILL)
        is_forgotten = not os.path.isdir(self.order["folder"])
        if is_free(self.lock) or is_forgotten:
            self.gone_since = now if self.gone_since is None else self.gone_since
            is_over = is_forgotten or now - self.gone_since >= self.orphan_timeout_s()
            if self.kill_at is None and is_over:
                self.is_orphan = True
                self.kill_at = now + self.order["grace_s"]
                signal_group(self.engine, signal.SIGTERM)
        else:
            self.gone_since = None
        if self.ticks % LOG_TICKS == 0:
            keep_small(self.order["log"])
        self.ticks += 1

    def orphan_timeout_s(self) -> float:
        """What the last gateway said; the engine may have been started by an earlier one."""
        try:
            with open(os.path.join(os.path.dirname(self.order["folder"]), ORPHANS)) as file:
                return float(file.read())
        except (OSError, ValueError):
            return float(self.order["orphan_timeout_s"])

    def reap(self) -> None:
        """Write down how the engine ended, if it has; forget the other dead that were given to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.engine:
                code = os.waitstatus_to_exitcode(status)
                how = {"code": code} if code >= 0 else {"signal": -code}
                try:
                    write(self.order["folder"], ENDED, how | {"at": time.time()})
                except OSError as exc:  # the gateway still sees that we and the engine are gone
                    print("How the engine ended cannot be written down:", exc, file=sys.stderr)
                self.has_ended = True

    def end_rest(self) -> None:
        """TERM to what the engine left behind, its grace, KILL; without grace once we are told so."""
        folder = self.order["folder"]
        began = time.monotonic()
        kill_at = began + self.order["grace_s"] if self.kill_at is None else self.kill_at
        told: set[int] = set()
        while (rest := rest_of(self.engine, folder)) and time.monotonic() < began + self.order[
            "grace_s"
        ] + REST_LIMIT_S:
            if END_NOW in signal.sigpending():
                kill_at = 0
            is_over = time.monotonic() >= kill_at
            for pid in rest if is_over else rest - told:
                signal_one(pid, signal.SIGKILL if is_over else signal.SIGTERM)
            told |= rest
            time.sleep(REST_PAUSE_S)
            self.reap()
        if self.is_orphan or self.gone_since is not None:  # else the gateway removes it
            remove(folder)


# --- its parts, some of which the gateway uses too


def started_of(pid: int) -> str:
    """When a process was started, as a text that no other process of that pid has; empty if there is none, or dead.

    Raises OSError if that cannot be told.
    """
    if not BOOT:
        return _started_without_proc(pid)
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if words[0] in (b"Z", b"X") else f"{BOOT} {words[19].decode()}"


def _started_without_proc(pid: int) -> str:
    with os.popen(f"ps -o stat=,lstart= -p {int(pid)}") as answer:  # noqa: S605 (a number)
        state, _, since = answer.read().strip().partition(" ")
    return "" if state.startswith("Z") else since.strip()


def rest_of(engine: int, folder: str) -> set[int]:
    """Who is left of an engine: our descendants, and who carries its mark; the dead do not count.

    Without /proc it is the engine's group, by its number as `kill` takes it.
    """
    if not BOOT:
        return {-engine} if signal_group(engine, 0) else set()
    us, parents = os.getpid(), {}
    for pid in _pids():
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                words = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if words[0] not in (b"Z", b"X"):
            parents[pid] = int(words[1])
    family = {us}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return (family | (set(marked(folder)) & parents.keys())) - {us}


def marked(folder: str) -> list[int]:
    """The pids of all processes but ours that carry the mark, as a variable or as their working folder.

    Both are inherited, so grandchildren are found that left their process group; and a program that writes its title
    over its environment still has its working folder.
    """
    if not BOOT:
        return _marked_without_proc(folder)
    variable = f"{MARK_VARIABLE}={folder}".encode()
    found = []
    for pid in _pids():
        if pid == os.getpid():
            continue
        try:
            in_folder = os.readlink(f"/proc/{pid}/cwd").removesuffix(" (deleted)") == folder
            if not in_folder:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    in_folder = variable in file.read().split(b"\0")
        except OSError:
            continue  # it ended, or belongs to another user
        if in_folder:
            found.append(pid)
    return found


def _marked_without_proc(folder: str) -> list[int]:
    try:
        import psutil
    except ImportError:  # in the keeper itself, which then knows the group alone
        return []
    found = []
    for process in psutil.process_iter(["pid", "environ", "cwd"]):
        environment = process.info["environ"] or {}
        if process.pid != os.getpid() and folder in (environment.get(MARK_VARIABLE), process.info["cwd"]):
            found.append(process.pid)
    return found


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()] if BOOT else []


def signal_group(leader: int, number: int) -> bool:
    """Signal a group; whether there is anybody in it."""
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):  # the latter on macOS, for zombies
        return False
    return True


def signal_one(pid: int, number: int) -> None:
    """Signal a process, if it is still there and ours."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def is_free(lock: int) -> bool:
    """Whether nobody holds the lock just now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(lock, fcntl.LOCK_UN)
    return True


def keep_small(log: str) -> None:
    """Put a full log aside, so that at most two are kept.

    The engine goes on writing to the same file, in append mode, so it is copied and emptied, not renamed.
    """
    try:
        if os.path.getsize(log) <= LOG_LIMIT_BYTES:
            return
        with open(log, "rb") as full, open(os.path.splitext(log)[0] + ".old.log", "wb") as aside:
            while chunk := full.read(COPY_BYTES):
                aside.write(chunk)
        os.truncate(log, 0)
    except OSError:
        return  # it is tried again, and the engine that fills the disk says so itself


def write(folder: str, name: str, fact: dict[str, Any]) -> None:
    """Write down a fact, whole or not at all. Raises OSError."""
    path = os.path.join(folder, name)
    with open(path + ".partial", "w", opener=_private) as file:
        json.dump(fact, file)
    os.replace(path + ".partial", path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def remove(folder: str) -> None:
    """Remove a folder with all that is in it."""
    for place, folders, files in os.walk(folder, topdown=False):
        for name in files:
            _try(os.unlink, os.path.join(place, name))
        for name in folders:
            path = os.path.join(place, name)
            _try(os.unlink if os.path.islink(path) else os.rmdir, path)
    _try(os.rmdir, folder)


def _try(do: Callable[[str], None], path: str) -> None:
    try:
        do(path)
    except OSError:
        return


def say(what: dict[str, Any]) -> None:
    """Answer the gateway, once; one that is gone hears nothing."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(what).encode() + b"\n")
    for descriptor in (0, 1):
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)


def prctl(option: int, value: int) -> None:
    """Linux's prctl; elsewhere there is none, and what it gives is missing."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
