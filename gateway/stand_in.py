"""Stands in for a gateway that has handed over to another one.

Whoever started the old gateway, a shell, a service manager or a container, knows it by its pid. So the old one becomes
this program, with the standard library alone: it passes signals on to the gateway that serves now, waits for its end,
and ends as it did. Run as `python -I -S stand_in.py PID LOCK`, by the parent of that pid.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Stand in until the last successor has ended."""
    pid, lock = int(sys.argv[1]), sys.argv[2]

    def pass_on(number: int, frame: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    if sys.platform == "linux":  # so that a successor's successor is given to us
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    while True:
        ended, status = os.waitpid(-1, 0)  # engines' keepers are among our children, too
        if ended != pid:
            continue
        heir = holder(lock)
        if heir == pid or parent_of(heir) != os.getpid():
            break
        pid = heir
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def holder(lock: str) -> int:
    """The pid of the gateway that has the data folder; 0 if there is none."""
    try:
        with open(lock) as file:
            return int(file.read().strip() or 0)
    except (OSError, ValueError):
        return 0


def parent_of(pid: int) -> int:
    """The parent of a process; 0 if there is none, or the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


if __name__ == "__main__":
    main()
