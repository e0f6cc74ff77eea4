"""The last line against orphans: a small process that outlives the gateway just long enough to end its children.

The gateway holds the other end of our standard input. When it ends in whatever way, SIGKILL included, we
read the end of file and end every process that carries the gateway's mark: its run folder, as a variable of
the environment or as the working folder. Both are inherited, so grandchildren are found that left their
process group; and a program that writes its title over its environment still has its working folder.

Run as `python -P -m gateway.watchdog RUN_FOLDER`. Knows nothing of engines.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

MARK_VARIABLE = "HOSTLER_RUN"
GRACE_S = 5.0
LIMIT_S = 20.0


def main() -> None:
    """Wait for the gateway's end, then clean up after it."""
    folder = sys.argv[1]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    end_all(folder)
    shutil.rmtree(folder, ignore_errors=True)


def end_all(folder: str) -> None:
    """TERM, a grace, KILL, until no process carries the mark, or the limit ends."""
    started = time.monotonic()
    while (age := time.monotonic() - started) < LIMIT_S and (pids := marked(folder)):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGTERM if age < GRACE_S else signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.2)


def marked(folder: str) -> list[int]:
    """The pids of all processes but ours that carry the mark."""
    if not Path("/proc/self/environ").exists():
        return _marked_without_proc(folder)
    variable = f"{MARK_VARIABLE}={folder}".encode()
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            in_folder = os.readlink(process / "cwd").removesuffix(" (deleted)") == folder
            if in_folder or variable in (process / "environ").read_bytes().split(b"\0"):
                pids.append(int(process.name))
        except OSError:
            continue  # it ended, or belongs to another user
    return pids


def _marked_without_proc(folder: str) -> list[int]:
    import psutil

    pids = []
    for process in psutil.process_iter(["pid", "environ", "cwd"]):
        environment = process.info["environ"] or {}
        if process.pid != os.getpid() and folder in (environment.get(MARK_VARIABLE), process.info["cwd"]):
            pids.append(process.pid)
    return pids


if __name__ == "__main__":
    main()
