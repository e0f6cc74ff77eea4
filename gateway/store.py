"""The launches on disk: one JSON file per uid, written atomically and durably."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from engines.base import Launch
from gateway.launch import file_name

logger = logging.getLogger("hostler.store")


class Store:
    """A folder of launches. It has one writer, the Fleet."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError if the folder cannot be made."""
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(self, launch: Launch) -> None:
        """Keep the launch; once this returns, it survives a crash of the machine.

        Raises:
            OSError: it could not be written; what was there before still is.
        """
        write_durably(self._path(launch.uid), msgspec.json.format(msgspec.json.encode(launch)))

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
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb", opener=_private) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # on a full disk, of all places, nothing is to be left behind
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    """Launches may hold tokens of hubs in their `envs`."""
    return os.open(path, flags, 0o600)
