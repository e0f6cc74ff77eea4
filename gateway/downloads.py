"""Fetches an artifact's files by a child process, so that a cancel ends it at once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from engines.environments import module_argv
from gateway.amounts import megabytes
from gateway.process import start
from registry import hubs
from registry.hubs.choose import is_offline
from registry.schema import Source

GRACE_S = 1.0  # for it to tidy up


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the child: how far it is, or how it ended."""

    stage: str = ""
    done_bytes: int = 0
    total_bytes: int | None = None
    file: str | None = None
    rate_bytes_s: float | None = None
    eta_s: float | None = None
    path: str | None = None
    files: dict[str, int] | None = None
    error: str | None = None
    permanent: bool = False

    def __str__(self) -> str:
        if not self.total_bytes:
            return self.stage
        percent = 100 * self.done_bytes / self.total_bytes
        left = f", {self.eta_s:.0f} s left" if self.eta_s else ""
        return f"{self.stage} {percent:.0f} % of {megabytes(self.total_bytes)}{left}"


class DownloadFailed(Exception):
    """The files could not be had; `permanent` if trying again cannot help."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


_decode_line = msgspec.json.Decoder(Progress).decode


async def fetch(
    source: Source,
    cache: Path,
    *,
    folder: Path,
    stall_s: float,
    report: Callable[[Progress], None],
) -> Path:
    """The path of the source's files in the cache, after fetching what is missing.

    Args:
        folder: the gateway's run folder, by which the watchdog knows our children.
        stall_s: give up when nothing moves for so long.
        report: called with each step of the progress.
    Raises:
        DownloadFailed: with the hub's sentence.
        CannotStart: the child cannot be started.
    """
    if (path := hubs.find_cached(source, cache)) is not None:
        return path
    last = await _order(source, cache, folder=folder, stall_s=stall_s, report=report)
    return Path(last.path or "")


async def fetch_all(
    sources: Sequence[Source],
    cache: Path,
    *,
    folder: Path,
    stall_s: float,
    report: Callable[[Progress], None],
) -> list[Path]:
    """As `fetch`, of each; the progress is that of all of them together.

    Where several are missing, the later ones are asked for first what they hold: so the total is known from the
    begin, and what cannot be had is told before what takes hours is fetched.
    """
    missing = [source for source in dict.fromkeys(sources) if hubs.find_cached(source, cache, is_use=False) is None]
    total_bytes = dict.fromkeys(missing, 0)
    for source in missing[1:]:
        report(Progress(stage="finding"))
        listed = await list_files(source, cache, folder=folder, limit_s=stall_s)
        total_bytes[source] = sum(listed.values())
    paths: dict[Source, Path] = {}
    done_bytes = 0
    for source in dict.fromkeys(sources):

        def report_sum(progress: Progress, source: Source = source, before: int = done_bytes) -> None:
            if progress.stage == "downloading" and progress.total_bytes is not None:
                total_bytes[source] = progress.total_bytes
            report(_sum(progress, before, before + sum(total_bytes[one] for one in missing if one not in paths)))

        paths[source] = await fetch(source, cache, folder=folder, stall_s=stall_s, report=report_sum)
        done_bytes += total_bytes.get(source, 0)
    return [paths[source] for source in sources]


def _sum(progress: Progress, before_bytes: int, total_bytes: int) -> Progress:
    """One source's progress as a part of the whole, of which so much was done before it."""
    if progress.stage != "downloading" or progress.total_bytes is None:
        return progress
    done_bytes = before_bytes + progress.done_bytes
    eta_s = progress.eta_s
    if progress.rate_bytes_s:
        eta_s = round((total_bytes - done_bytes) / progress.rate_bytes_s, 1)
    return msgspec.structs.replace(progress, done_bytes=done_bytes, total_bytes=total_bytes, eta_s=eta_s)


async def list_files(source: Source, cache: Path, *, folder: Path, limit_s: float) -> dict[str, int]:
    """What `fetch` would get from a hub, and the bytes of each file; 0 where the hub does not tell. Fetches nothing.

    Args:
        folder: as of `fetch`.
        limit_s: give up after so long.
    Raises:
        DownloadFailed: with the hub's sentence.
        CannotStart: the child cannot be started.
    """
    last = await _order(source, cache, folder=folder, stall_s=limit_s, report=lambda _: None, only_list=True)
    return last.files or {}


async def _order(
    source: Source,
    cache: Path,
    *,
    folder: Path,
    stall_s: float,
    report: Callable[[Progress], None],
    only_list: bool = False,
) -> Progress:
    """The last line of a child that did what it was to do."""
    words = {"source": source, "cache": str(cache), "offline": is_offline(os.environ), "only_list": only_list}
    process = await start(
        (*module_argv("registry.hubs.fetch"), msgspec.json.encode(words).decode()),
        {},
        folder=folder,
        grace_s=GRACE_S,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    chatter = asyncio.ensure_future(_last_lines(process.stderr))
    last = Progress()
    try:
        while line := await asyncio.wait_for(process.stdout.readline(), stall_s):
            last = _decode_line(line)
            if last.files is None:
                report(last)
        ended = await process.wait()
    except TimeoutError as exc:
        raise DownloadFailed(f"nothing arrived from hub {source.model_hub} for {stall_s:.0f} s") from exc
    finally:
        await process.end()
        heard = await chatter
    if last.path or last.files is not None:
        return last
    said = last.error or f"the download ended with {ended}: {' | '.join(heard)}"
    raise DownloadFailed(said, permanent=last.permanent)


async def _last_lines(stream: asyncio.StreamReader, keep: int = 5) -> list[str]:
    """Read to the end, so that the child never blocks; what it said last."""
    lines: list[str] = []
    while chunk := await stream.read(65536):
        lines = (lines + chunk.decode(errors="replace").splitlines())[-keep:]
    return lines
