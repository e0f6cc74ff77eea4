"""What has been fetched before: one small marker file for each source, written last. Imports no hub.

<cache>/fetched/<digest>.json   the marker: where the files are and how long each is; its time is that of the last use
<cache>/locks/<digest>.lock     held by whoever fetches that source, or removes it; it says which source that is
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from registry.hubs.base import Fetched
from registry.hubs.local import find
from registry.schema import NO_FILES, Source

TRY_INTERVAL_S = 0.1
TRIES_PER_CALL = 50

DIGEST = re.compile(r"[0-9a-f]{32}")


class Marker(msgspec.Struct, frozen=True, kw_only=True):
    """A completed fetch: the path to load, and the bytes of each file by its absolute path."""

    source: Source
    path: str
    files: dict[str, int]


_markers = msgspec.json.Decoder(Marker)
_locks = msgspec.json.Decoder(Source)
_sources = msgspec.json.Encoder(order="deterministic")


def digest(source: Source) -> str:
    """A name for this source, the same in every process."""
    return hashlib.sha256(_sources.encode(source)).hexdigest()[:32]


def find_cached(source: Source, cache: Path, *, is_use: bool = True) -> Path | None:
    """The path of a source's files if they are on this machine, whole; None if they have to be fetched.

    A source without a revision counts as here once any revision of it has been fetched. For hub `local` this
    is the path itself, if it exists. Never raises, touches no network.

    Args:
        is_use: remember that the files were used now. Say False where it is only shown whether they are here.
    """
    if source.model_hub == NO_FILES:
        return Path()
    if source.model_hub == "local":
        found = find(source)
        return found.path if found else None
    path = marker_path(digest(source), cache)
    marker = read_marker(path)
    if marker is None or marker.source != source or not is_whole(marker):
        return None
    if is_use:
        with contextlib.suppress(OSError):  # a cache that others keep for us, read-only
            os.utime(path)
    return Path(marker.path)


def read_marker(path: Path) -> Marker | None:
    """That marker, or None if there is none or it is damaged."""
    try:
        return _markers.decode(path.read_bytes())
    except (OSError, ValueError):
        return None


def is_whole(marker: Marker) -> bool:
    """Whether each of its files is there, in its full length."""
    try:
        return all(os.stat(name).st_size == size for name, size in marker.files.items())
    except (OSError, ValueError):
        return False


def record(source: Source, cache: Path, fetched: Fetched) -> None:
    """Write the marker that says that these files are whole."""
    marker = Marker(
        source=source,
        path=str(fetched.path),
        files={str(path): path.stat().st_size for path in fetched.files},
    )
    path = marker_path(digest(source), cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    with partial.open("wb") as file:
        file.write(msgspec.json.encode(marker))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def locked(source: Source, cache: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the source's lock; while someone else holds it, wait and call `on_wait` every few seconds.

    The wait has no limit of its own: it lasts as long as a download may, and whoever holds the lock may fail.
    The kernel drops the lock when the process ends, however it ends.
    """
    with _lock_file(source, cache) as file:
        waits = 0
        while not _try_lock(file):
            if waits % TRIES_PER_CALL == 0:
                on_wait()
            waits += 1
            time.sleep(TRY_INTERVAL_S)
        _sign(file, source)
        yield


@contextmanager
def locked_now(source: Source, cache: Path) -> Iterator[bool]:
    """Hold the source's lock if nobody else does: the block is told whether it does."""
    with _lock_file(source, cache) as file:
        is_ours = _try_lock(file)
        if is_ours:
            _sign(file, source)
        yield is_ours


def known_locks(cache: Path) -> list[tuple[Source, bool]]:
    """Every source that was ever fetched or removed here, and whether someone is at it now."""
    known = []
    for path in sorted((cache / "locks").glob("*.lock")):
        try:
            known.append((_locks.decode(path.read_bytes()), is_locked(path)))
        except (OSError, ValueError):
            continue
    return known


def lock_path(name: str, cache: Path) -> Path:
    """The file of the lock of the source with that digest."""
    return cache / "locks" / f"{name}.lock"


def is_locked(path: Path) -> bool:
    """Whether someone holds the lock of that file now."""
    try:
        with path.open("rb") as file:
            return not _try_lock(file)
    except FileNotFoundError:
        return False


def marker_path(name: str, cache: Path) -> Path:
    """The file of the marker of the source with that digest."""
    return cache / "fetched" / f"{name}.json"


def _lock_file(source: Source, cache: Path) -> IO[bytes]:
    path = lock_path(digest(source), cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")


def _sign(file: IO[bytes], source: Source) -> None:
    file.truncate(0)
    file.write(_sources.encode(source))
    file.flush()


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
