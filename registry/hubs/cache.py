"""What has been fetched before: one small marker file for each source, written last. Imports no hub.

<cache>/fetched/<digest>.json   the marker: where the files are and how long each is
<cache>/locks/<digest>.lock     held by whoever fetches that source
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from registry.hubs.base import Fetched
from registry.hubs.local import find
from registry.schema import Source

TRY_INTERVAL_S = 0.1
TRIES_PER_CALL = 50


class Marker(msgspec.Struct, frozen=True, kw_only=True):
    """A completed fetch: the path to load, and the bytes of each file by its absolute path."""

    source: Source
    path: str
    files: dict[str, int]


_markers = msgspec.json.Decoder(Marker)
_sources = msgspec.json.Encoder(order="deterministic")


def digest(source: Source) -> str:
    """A name for this source, the same in every process."""
    return hashlib.sha256(_sources.encode(source)).hexdigest()[:32]


def find_cached(source: Source, cache: Path) -> Path | None:
    """The path of a source's files if they are on this machine, whole; None if they have to be fetched.

    A source without a revision counts as here once any revision of it has been fetched. For hub `local` this
    is the path itself, if it exists. Never raises, touches no network.
    """
    if source.model_hub == "local":
        found = find(source)
        return found.path if found else None
    try:
        marker = _markers.decode(_marker_path(source, cache).read_bytes())
        is_whole = all(os.stat(name).st_size == size for name, size in marker.files.items())
    except (OSError, ValueError):
        return None
    return Path(marker.path) if is_whole and marker.source == source else None


def record(source: Source, cache: Path, fetched: Fetched) -> None:
    """Write the marker that says that these files are whole."""
    marker = Marker(
        source=source,
        path=str(fetched.path),
        files={str(path): path.stat().st_size for path in fetched.files},
    )
    path = _marker_path(source, cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    with partial.open("wb") as file:
        file.write(msgspec.json.encode(marker))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def locked(name: str, cache: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of that name; while someone else holds it, wait and call `on_wait` every few seconds.

    The wait has no limit of its own: it lasts as long as a download may, and whoever holds the lock may fail.
    The kernel drops the lock when the process ends, however it ends.
    """
    path = lock_path(name, cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        waits = 0
        while not _try_lock(file):
            if waits % TRIES_PER_CALL == 0:
                on_wait()
            waits += 1
            time.sleep(TRY_INTERVAL_S)
        yield


def lock_path(name: str, cache: Path) -> Path:
    """The file of the lock of that name."""
    return cache / "locks" / f"{name}.lock"


def is_locked(path: Path) -> bool:
    """Whether someone holds the lock of that file now."""
    try:
        with path.open("rb") as file:
            return not _try_lock(file)
    except FileNotFoundError:
        return False


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _marker_path(source: Source, cache: Path) -> Path:
    return cache / "fetched" / f"{digest(source)}.json"
