"""The last line against orphans: a small process that outlives the gateway just long enough to end its children.

The gateway holds the other end of our standard input. When it ends in whatever way, SIGKILL included, we
read the end of file and end every process that carries the gateway's mark: its folder for the time being. Engines
carry another one, as they have keepers.

Run as `python -P -m gateway.watchdog FOLDER`. Knows nothing of engines.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time

from gateway.keeper import marked

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


if __name__ == "__main__":
    main()
