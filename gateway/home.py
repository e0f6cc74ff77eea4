"""The data folder has one writer: the gateway that holds its lock. Whether it is held says whether a gateway lives."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from gateway.errors import SettingsError
from gateway.lives import lock_path

# Keepers look at the lock each second, for which they hold it for an instant.
TRIES, PAUSE_S = 20, 0.02


@contextlib.contextmanager
def only_one_in(home: Path, lent: int | None = None) -> Iterator[int]:
    """Hold the lock of the data folder; its descriptor, which another gateway may inherit and hold on.

    Args:
        lent: the descriptor of the lock that the gateway before us holds, if it hands over to us.
    Raises:
        SettingsError: another gateway holds it, or it cannot be made.
    """
    with _opened(home, lent) as lock:
        if lent is None:
            _take(lock, home)
            sign(lock.fileno())
        yield lock.fileno()


def sign(lock: int) -> None:
    """Write down that the lock is ours; for one that was lent, once it is."""
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())


def _opened(home: Path, lent: int | None) -> TextIOWrapper:
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if lent is None:
            return lock_path(home).open("a+")
        lock = os.fdopen(lent, "a+")
        if not os.path.samestat(os.fstat(lent), lock_path(home).stat()):
            raise SettingsError(
                f"The gateway that runs has another data folder than {home}. To change `home`, stop and start it."
            )
        return lock
    except OSError as exc:
        raise SettingsError(f"The data folder {home} cannot be used: {exc.strerror}. Choose another `home`.") from exc


def _take(lock: TextIOWrapper, home: Path) -> None:
    for left in reversed(range(TRIES)):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as exc:
            if left:
                time.sleep(PAUSE_S)
                continue
            lock.seek(0)
            raise SettingsError(
                f"Another gateway (pid {lock.read().strip() or 'unknown'}) uses the data folder {home}. Stop it, or "
                "give this one another `home`."
            ) from exc
