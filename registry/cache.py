"""What of the hubs is on this machine: lists it, and makes room. Knows markers and folders; asks no hub.

A removal deletes the marker first: whatever ends it, the rest is never taken for whole, and `prune` takes it away.
Files that another marker names stay. A running engine keeps what it has opened; whether one runs, the caller knows.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from registry.hubs.base import HubError
from registry.hubs.cache import (
    DIGEST,
    Marker,
    digest,
    is_locked,
    is_whole,
    known_locks,
    lock_path,
    locked_now,
    marker_path,
    read_marker,
)
from registry.hubs.places import huggingface_cache, openmind_cache, repository_folder, stale_blobs
from registry.schema import Source

# Hubs whose files are in our cache, and hubs whose files are in their library's own.
OURS = ("csghub", "modelscope", "pypi")
LIBRARIES = {"huggingface": huggingface_cache, "openmind_hub": openmind_cache}


class Cached(msgspec.Struct, frozen=True, kw_only=True):
    """A source whose files are here, whole."""

    digest: str
    source: Source
    path: Path
    size_bytes: int
    last_used: float  # seconds since 1970
    files: tuple[Path, ...]


def list_cached(cache: Path) -> list[Cached]:
    """Every source whose files are here, whole; the last used first. Sources may share files."""
    found = []
    for path, marker in _markers(cache):
        with contextlib.suppress(OSError):
            if is_whole(marker):
                found.append(
                    Cached(
                        digest=path.stem,
                        source=marker.source,
                        path=Path(marker.path),
                        size_bytes=sum(marker.files.values()),
                        last_used=path.stat().st_mtime,
                        files=tuple(Path(name) for name in marker.files),
                    )
                )
    return sorted(found, key=lambda cached: (-cached.last_used, cached.digest))


def remove(cache: Path, source: Source | str) -> int:
    """Delete a source's files, but those that other sources share; the bytes freed, 0 if it was not here.

    Args:
        source: the source, or its digest as `list_cached` gives it.
    Raises:
        HubError: it is being fetched now; not permanent.
    """
    name = source if isinstance(source, str) else digest(source)
    marker = read_marker(marker_path(name, cache)) if DIGEST.fullmatch(name) else None
    if marker is None:
        return 0
    with locked_now(marker.source, cache) as is_ours:
        if not is_ours or _is_at_work_on(marker.source, cache):
            raise HubError(
                f"{marker.source.model_id} of hub {marker.source.model_hub} is being fetched now: wait for it, or "
                "cancel that launch.",
                permanent=False,
            )
        path = marker_path(name, cache)
        path.unlink(missing_ok=True)
        _sync(path.parent)
        named = {real for _, other in _markers(cache) for real in _reals(other)}
        return sum(_delete(Path(file), named, cache) for file in marker.files)


def prune(
    cache: Path,
    *,
    keep: Callable[[Cached], bool] | None = None,
    older_than_s: float | None = None,
    max_bytes: int | None = None,
    now: float | None = None,
) -> list[Cached]:
    """Make room: what is half-fetched and forgotten always goes; the sources removed are returned.

    Args:
        keep: what must stay. Given alone, all else goes.
        older_than_s: what was not used for so long goes.
        max_bytes: what was used longest ago goes until the rest takes no more than this.
        now: the time, in seconds since 1970; None asks the clock.
    """
    removed = []
    for cached in _chosen(list_cached(cache), keep, older_than_s, max_bytes, time.time() if now is None else now):
        with contextlib.suppress(HubError):  # someone is at it: then it is in use
            remove(cache, cached.digest)
            removed.append(cached)
    remove_leftovers(cache)
    return removed


def remove_leftovers(cache: Path) -> int:
    """Delete what ended fetches and removals left; the bytes freed. What someone is at stays."""
    return _remove_partials(cache) + _remove_orphans(cache) + _remove_stale_blobs(cache)


# -- choosing


def _chosen(
    cached: list[Cached],
    keep: Callable[[Cached], bool] | None,
    older_than_s: float | None,
    max_bytes: int | None,
    now: float,
) -> list[Cached]:
    """Pure: which of these (the last used first) go."""
    free_to_go = [c for c in cached if keep is None or not keep(c)]
    if older_than_s is None and max_bytes is None:
        return free_to_go if keep else []
    going = [c for c in free_to_go if older_than_s is not None and now - c.last_used > older_than_s]
    if max_bytes is not None:
        staying = [c for c in cached if c not in going]
        for candidate in reversed(free_to_go):
            if _distinct_bytes(staying) <= max_bytes:
                break
            if candidate in staying:
                staying.remove(candidate)
                going.append(candidate)
    return going


def _distinct_bytes(cached: Iterable[Cached]) -> int:
    sizes: dict[tuple[int, int], int] = {}
    for path in {path for c in cached for path in c.files}:
        with contextlib.suppress(OSError):
            stat = path.stat()
            sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())


# -- reading


def _markers(cache: Path) -> Iterator[tuple[Path, Marker]]:
    for path in sorted((cache / "fetched").glob("*.json")):
        if marker := read_marker(path):
            yield path, marker


def _reals(marker: Marker) -> Iterator[Path]:
    """Each file, and the file that it is a link to."""
    for name in marker.files:
        yield Path(name)
        yield Path(name).resolve()


def _is_at_work_on(source: Source, cache: Path) -> bool:
    """Whether another source of the same repository is being fetched: it may count on files of this one."""
    return any(
        is_at_work and other != source and (other.model_hub, other.model_id) == (source.model_hub, source.model_id)
        for other, is_at_work in known_locks(cache)
    )


# -- deleting


def _delete(path: Path, named: set[Path], cache: Path) -> int:
    """Delete a file, and what it is a link to unless others need that; the bytes freed."""
    if path in named:
        return 0
    real = path.resolve()
    is_link = path.is_symlink()
    freed_bytes = 0 if is_link else _unlink(path)
    if is_link:
        _unlink(path)
        repository = real.parent.parent
        if real not in named and not _has_link(repository / "snapshots", real):
            freed_bytes = _unlink(real)
        _remove_empty(path.parent, stop=repository)
        _remove_empty(real.parent, stop=repository)
        if real.parent.name == "blobs" and not real.parent.exists() and not (repository / "snapshots").exists():
            shutil.rmtree(repository, ignore_errors=True)  # only names of revisions are left
    else:
        _remove_empty(path.parent, stop=cache)
    return freed_bytes


def _unlink(path: Path) -> int:
    """The bytes that this gives back: none if the file has another name."""
    try:
        stat = path.lstat()
        path.unlink()
    except OSError:
        return 0
    return stat.st_size if stat.st_nlink == 1 and not path.is_symlink() else 0


def _has_link(snapshots: Path, real: Path) -> bool:
    return any(path.is_symlink() and path.resolve() == real for path in snapshots.rglob("*"))


def _remove_empty(folder: Path, *, stop: Path) -> None:
    """Delete this folder and those above it while they are empty, but not `stop`."""
    while folder != stop and stop in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def _remove_partials(cache: Path) -> int:
    freed_bytes = 0
    for hub in OURS:
        for partial in (cache / hub).glob(".partial-*"):
            owner = partial.name.split("-")[1]
            if not is_locked(lock_path(owner, cache)):
                freed_bytes += _sizes(partial)
                shutil.rmtree(partial, ignore_errors=True)
    return freed_bytes


def _remove_orphans(cache: Path) -> int:
    """Delete whole files that no marker names: of a fetch that ended just before its marker, or a removal.

    The order is what makes it safe: a fetch that put a file there before we looked either holds its lock still,
    or has written its marker.
    """
    files = [
        path
        for hub in OURS
        for path in (cache / hub).rglob("*")
        if path.is_file() and not any(part.startswith(".partial-") for part in path.relative_to(cache).parts)
    ]
    if any(is_at_work for _, is_at_work in known_locks(cache)):
        return 0
    named = {Path(name) for _, marker in _markers(cache) for name in marker.files}
    return sum(_delete(path, named, cache) for path in files if path not in named)


def _remove_stale_blobs(cache: Path) -> int:
    """Delete the partial files of our own killed fetches in the libraries' caches."""
    freed_bytes = 0
    for source, is_at_work in known_locks(cache):
        if source.model_hub in LIBRARIES and not is_at_work:
            repository = repository_folder(LIBRARIES[source.model_hub](os.environ), source.model_id)
            freed_bytes += sum(_unlink(path) for path in stale_blobs(repository))
    return freed_bytes


def _sizes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and path.lstat().st_nlink == 1)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
