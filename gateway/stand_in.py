"""Stands in for a gateway that has handed over to another one.

Whoever started the old gateway, a shell, a service manager or a container, knows it by its pid. So the old one becomes
this program, with the standard library alone: it passes signals on to the gateway that has the lock of the data folder,
waits for its end, and ends as it did. A successor's successor is given to us when its parent ends.

Run as `python -I -S stand_in.py LOCK`, by the parent of that gateway.
"""

from __future__ import annotations

import os
import signal
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Stand in until the last successor has ended."""
    lock = sys.argv[1]
    pass_all_on(lock)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    while True:
        ended, status = os.waitpid(-1, 0)  # engines' keepers are among our children, too
        if ended == holder(lock):
            break
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def pass_all_on(lock: str) -> None:
    """From now on, pass on every signal of PASSED_ON."""
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: pass_on(lock, number))


def pass_on(lock: str, number: int) -> None:
    """Signal the gateway that has the data folder."""
    try:
        if pid := holder(lock):
            os.kill(pid, number)
    except ProcessLookupError:
        return  # it has just ended, as we are about to see


def holder(lock: str) -> int:
    """The pid of the gateway that has the data folder; 0 if there is none."""
    try:
        with open(lock) as file:
            return int(file.read().strip() or 0)
    except (OSError, ValueError):
        return 0


if __name__ == "__main__":
    main()
