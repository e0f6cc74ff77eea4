"""Files that replies point to: kept for a while under names that nobody can guess."""

from __future__ import annotations

import re
import secrets
import time
from pathlib import Path

KEPT_S = 3600.0
SWEEP_S = 60.0
NAME = re.compile(r"[\w-]{20,40}\.\w{2,4}")
# How a file begins -> its ending and its media type.
KINDS: tuple[tuple[bytes, int, str, str], ...] = (
    (b"\x89PNG", 0, "png", "image/png"),
    (b"\xff\xd8\xff", 0, "jpg", "image/jpeg"),
    (b"WEBP", 8, "webp", "image/webp"),
    (b"GIF8", 0, "gif", "image/gif"),
    (b"ftyp", 4, "mp4", "video/mp4"),
)
UNKNOWN = ("bin", "application/octet-stream")
MEDIA_TYPES = {ending: media_type for _, _, ending, media_type in KINDS} | dict([UNKNOWN])


class Files:
    """A folder of such files. `keep` may be called from any thread."""

    def __init__(self, folder: Path, kept_s: float = KEPT_S) -> None:
        self._folder = folder
        self._kept_s = kept_s
        self._swept = 0.0

    def keep(self, content: bytes) -> str:
        """Keep the content; the name under which `find` has it until it expires.

        Raises:
            OSError: the folder cannot be written.
        """
        ending = next((e for begin, at, e, _ in KINDS if content[at : at + len(begin)] == begin), UNKNOWN[0])
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep()
        name = f"{secrets.token_urlsafe(18)}.{ending}"
        partial = self._folder / f".{name}"
        partial.write_bytes(content)
        partial.replace(self._folder / name)
        return name

    def find(self, name: str) -> Path | None:
        """The file, unless there is none or its time is over."""
        path = self._folder / name
        if not NAME.fullmatch(name):
            return None
        try:
            return path if time.time() - path.stat().st_mtime < self._kept_s else None
        except OSError:
            return None

    def _sweep(self) -> None:
        """Delete what has expired, of earlier gateways too."""
        now = time.time()
        if now - self._swept < SWEEP_S:
            return
        self._swept = now
        for path in self._folder.iterdir():
            try:
                if now - path.stat().st_mtime > self._kept_s:
                    path.unlink(missing_ok=True)
            except OSError:
                continue
