"""What the hubs that download share: room on the disk, a library at work in a thread, a place for what is not whole.

<cache>/<hub>/<owner>/<name>/<revision>/...   whole files, by their path in the repository
<cache>/<hub>/.partial-<digest>/              one source's fetch: at work, or to go on with
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from registry.hubs.base import REPORT_INTERVAL_S, HubError, Report, readable
from registry.hubs.cache import digest
from registry.schema import Source

SPARE_BYTES = 64 * 2**20
CHUNK_BYTES = 2**20

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

T = TypeVar("T")


@contextlib.contextmanager
def library(hub: str, package: str) -> Iterator[None]:
    """Import a hub's library inside: what is missing becomes a sentence."""
    try:
        yield
    except ImportError as exc:
        raise HubError(
            f"Hub {hub} needs its library beside {sys.executable}: pip install {package} ({exc}).", permanent=True
        ) from exc


def owner_and_name(source: Source, *, default_owner: str | None = None) -> tuple[str, str]:
    """The two parts of a repository's name, safe to be folders."""
    owner, slash, name = source.model_id.partition("/")
    if not slash and default_owner:
        owner, name = default_owner, owner
    if not (_PART.fullmatch(owner) and _PART.fullmatch(name)):
        raise HubError(f"{source.model_id!r} is not the name of a repository, such as owner/name.", permanent=True)
    return owner, name


def check_names(names: Sequence[str], source: Source) -> None:
    """Refuse files that would be written outside of their folder."""
    for name in names:
        if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise HubError(
                f"Repository {source.model_id} is refused: its file {name!r} would be written outside of its folder.",
                permanent=True,
            )


def check_room(folder: Path, needed_bytes: int, what: str, *, advice: str) -> None:
    """Refuse to begin what the disk cannot hold; `folder` need not exist yet.

    Raises:
        HubError: with `advice` on what else to do than to free some space.
    """
    if not needed_bytes:
        return
    while not folder.exists():
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes + SPARE_BYTES:
        raise HubError(
            f"The disk is too small for {what}: it takes {readable(needed_bytes + SPARE_BYTES)} and "
            f"{readable(free_bytes)} are free at {folder}. Free some space, or {advice}.",
            permanent=True,
        )


def watch(work: Callable[[], T], tell: Callable[[], None]) -> T:
    """Run `work` in a thread and call `tell` meanwhile, and once more at its end; what `work` returns or raises."""
    result: list[T] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            result.append(work())
        except Exception as exc:  # the edge of the thread: raised again below
            failure.append(exc)

    # A daemon, so that the end of the program need not wait for the network.
    thread = threading.Thread(target=run, name="download", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(REPORT_INTERVAL_S)
        tell()
    if failure:
        raise failure[0]
    return result[0]


def naming(names: Sequence[str]) -> str:
    """What the progress calls these files: the one, or how many."""
    return names[0].rpartition("/")[2] if len(names) == 1 else f"{len(names)} files"


def partial_folder(source: Source, cache: Path) -> Path:
    """Where this source's fetch is at work; made if it is not there. The caller holds the source's lock."""
    folder = cache / source.model_hub / f".partial-{digest(source)}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_whole(path: Path, size_bytes: int | None) -> bool:
    """Whether there is such a file, of that size if it is known."""
    try:
        return path.is_file() and (size_bytes is None or path.stat().st_size == size_bytes)
    except OSError:
        return False


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder; they may come and go meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
    return total


def sha256_of(path: Path, tell: Callable[[int], None]) -> str:
    """The hash of a file, in hexadecimal; `tell` hears how many bytes have been read."""
    actual = hashlib.sha256()
    done_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            actual.update(chunk)
            done_bytes += len(chunk)
            tell(done_bytes)
    return actual.hexdigest()


def has_hash(path: Path, sha256: str, size_bytes: int, report: Report) -> bool:
    """Whether the file is what the hub says it is; reported, as it takes minutes for large ones."""
    actual = sha256_of(path, lambda done: report.bytes("checking", done, size_bytes, path.name))
    return actual == sha256.lower()


def move_into_place(file: Path, target: Path) -> None:
    """Make a whole file appear at its place, to stay there whatever happens."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file.replace(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def adopt(partial: Path, folder: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """Move whole files from `partial` to `folder`, unless they are there; their places."""
    for name in names:
        if (file := partial / name).is_file():
            with file.open("rb") as written:
                os.fsync(written.fileno())
            move_into_place(file, folder / name)
    return tuple(folder / name for name in names)
