"""What users launched and how, as the console's forms remember it: a small file, bounded, written atomically."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec

from gateway.store import write_durably

logger = logging.getLogger("hostler.history")

ENTRIES_LIMIT = 200
ENTRY_LIMIT_BYTES = 64 * 1024


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A launch as a form was filled in; `data` is the form's own."""

    model_name: str
    model_uid: str = ""
    data: dict[str, Any] = {}


class LaunchHistory:
    """The newest launches, one for each name and uid. It has one writer, the API."""

    def __init__(self, path: Path) -> None:
        """A file that cannot be read is reported, and written anew by the next change."""
        self._path = path
        self._entries: list[Entry] = []
        try:
            self._entries = msgspec.json.decode(path.read_bytes(), type=list[Entry])
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError) as exc:
            logger.error("The launch history in %s cannot be read and begins anew: %s", path, exc)

    def entries(self) -> list[Entry]:
        """The newest first."""
        return self._entries

    def add(self, entry: Entry) -> None:
        """Remember it, in place of an older one of its name and uid.

        Raises:
            ValueError: it is too large.
            OSError: it could not be written; nothing was changed.
        """
        size_bytes = len(msgspec.json.encode(entry))
        if size_bytes > ENTRY_LIMIT_BYTES:
            raise ValueError(f"It has {size_bytes} bytes; {ENTRY_LIMIT_BYTES} are the most.")
        others = [
            one for one in self._entries if (one.model_name, one.model_uid) != (entry.model_name, entry.model_uid)
        ]
        self._write([entry, *others][:ENTRIES_LIMIT])

    def remove(self, model_name: str, model_uid: str | None = None) -> bool:
        """Forget those of a name, or the one of a uid; whether there was any.

        Raises:
            OSError: it could not be written; nothing was changed.
        """
        rest = [
            one
            for one in self._entries
            if one.model_name != model_name or (model_uid is not None and one.model_uid != model_uid)
        ]
        if len(rest) == len(self._entries):
            return False
        self._write(rest)
        return True

    def _write(self, entries: list[Entry]) -> None:
        write_durably(self._path, msgspec.json.encode(entries))
        self._entries = entries
