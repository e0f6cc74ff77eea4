"""The launches on disk: one JSON file per uid, written atomically and durably."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from engines.base import Launch
from gateway.launch import file_name

logger = logging.getLogger("hostler.store")


class _Change(msgspec.Struct, frozen=True, kw_only=True):
    """A change of several launches, by uid; what is to be kept lies beside its place already."""

    kept: tuple[str, ...]
    forgotten: tuple[str, ...]


class Store:
    """A folder of launches. It has one writer, the Fleet."""

    def __init__(self, folder: Path) -> None:
        """Ends a change that was cut off. Raises OSError if the folder cannot be made or written."""
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._under_way = folder / ".change"
        if self._under_way.exists():
            self._end_change()

    def change(self, kept: Sequence[Launch], forgotten: Sequence[str]) -> None:
        """Keep and forget several: all of it, even if we are killed in the midst, or nothing.

        Raises:
            OSError: it could not be written; what was there before still is.
        """
        if len(kept) == 1 and not forgotten:
            self.write(kept[0])
        elif kept or forgotten:
            self._change(kept, forgotten)

    def _change(self, kept: Sequence[Launch], forgotten: Sequence[str]) -> None:
        for launch in kept:
            _write_beside(self._path(launch.uid), _content(launch))
        change = _Change(kept=tuple(launch.uid for launch in kept), forgotten=tuple(forgotten))
        write_durably(self._under_way, msgspec.json.encode(change))
        self._carry_out(change)

    def _end_change(self) -> None:
        try:
            change = msgspec.json.decode(self._under_way.read_bytes(), type=_Change)
        except msgspec.MsgspecError as exc:
            aside = self._under_way.replace(self.folder / ".change.damaged")
            logger.error(
                "Some launches may be those of before the last `hostler apply`, so apply the file again: the note of "
                "what was to be kept, %s, cannot be read: %s",
                aside,
                exc,
            )
            return
        self._carry_out(change)

    def _carry_out(self, change: _Change) -> None:
        """May be done again from its begin: what was moved already is passed over."""
        for path in map(self._path, change.kept):
            if (beside := _beside(path)).exists():
                beside.replace(path)
        for uid in change.forgotten:
            self._path(uid).unlink(missing_ok=True)
        _sync(self.folder)
        self._under_way.unlink()
        _sync(self.folder)

    def write(self, launch: Launch) -> None:
        """Keep the launch; once this returns, it survives a crash of the machine.

        Raises:
            OSError: it could not be written; what was there before still is.
        """
        write_durably(self._path(launch.uid), _content(launch))

    def delete(self, uid: str) -> None:
        """Forget the launch; nothing happens if there is none."""
        self._path(uid).unlink(missing_ok=True)
        _sync(self.folder)

    def read_all(self) -> Iterator[Launch]:
        """Every launch that can be read; a damaged file is reported and left where it is."""
        for path in sorted(self.folder.glob("*.json")):
            try:
                yield msgspec.json.decode(path.read_bytes(), type=Launch)
            except (OSError, msgspec.MsgspecError) as exc:
                logger.error("The launch in %s cannot be read and is skipped: %s", path, exc)

    def _path(self, uid: str) -> Path:
        return self.folder / f"{file_name(uid)}.json"


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that only its owner reads; once this returns, it survives a crash of the machine.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    _write_beside(path, content).replace(path)
    _sync(path.parent)


def _content(launch: Launch) -> bytes:
    return msgspec.json.format(msgspec.json.encode(launch))


def _beside(path: Path) -> Path:
    return path.with_suffix(".partial")


def _write_beside(path: Path, content: bytes) -> Path:
    partial = _beside(path)
    try:
        with open(partial, "wb", opener=_private) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)  # on a full disk, of all places, nothing is to be left behind
        raise
    return partial


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    """Launches may hold tokens of hubs in their `envs`."""
    return os.open(path, flags, 0o600)
