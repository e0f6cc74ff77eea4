"""What earlier runs told of a launch: the most memory it took, and how long it took to load. One file, one writer.

Memory of the machine is what was resident while the engine was ready: its own, and pages of files that it maps, such as
weights, which count once for a copy. The system measures the peak of that (VmHWM), without what only loading took:
files that are read once, and buffers that are given back. Of GPUs it is what the driver tells at each look.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from engines.base import Launch
from gateway.devices import Look, Seen
from gateway.footprint import footprint, forget_peaks
from gateway.store import write_durably

logger = logging.getLogger("hostler.experience")

LAUNCHES = 1000  # remembered; those of longest ago are forgotten
LIVES = 5  # of each, so that an odd one is not for ever
SAMPLE_S = 10.0
PAUSE_S = 1.0
# Options that change what is answered, and nothing of what is held.
IMMATERIAL = frozenset(
    {
        *("chat_template", "enable_thinking", "reasoning_content", "reasoning_parser", "tool_call_parser"),
        *("enable_auto_tool_choice", "stop", "seed", "temperature", "top_p", "voice", "voice_aliases", "api_key"),
    }
)


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is known of one kind of launch: bytes at most and seconds until ready of its latest lives, on GPUs and not.

    `at` is in seconds since the epoch. `wakes_s` is how long it took to wake, by the tier in which it slept;
    `unfit_tiers` are those out of which it came back answering garbage.
    """

    name: str
    at: float = 0.0
    ram_peaks: list[int] = []
    gpu_peaks: list[int] = []
    ram_load_s: float | None = None
    gpu_load_s: float | None = None
    wakes_s: dict[str, float] = {}
    unfit_tiers: list[str] = []

    def peaks(self, *, on_gpu: bool) -> list[int]:
        """Of lives there, oldest first."""
        return self.gpu_peaks if on_gpu else self.ram_peaks


class Life(msgspec.Struct, kw_only=True):
    """A ready engine that is being watched, with the pids of its processes as last seen."""

    record: Record
    on_gpu: bool
    peak_bytes: int = 0
    pids: tuple[int, ...] = ()
    tells_peak: bool = True  # of what lies between two looks

    def see(self, took_bytes: int) -> bool:
        """Remember it if it is the most; whether it is much more than before."""
        grew = took_bytes > self.peak_bytes * 1.01
        self.peak_bytes = max(self.peak_bytes, took_bytes)
        return grew


def fingerprint(launch: Launch) -> str:
    """What two launches share that take the same."""
    artifact = launch.artifact
    options = {name: value for name, value in launch.options.items() if name not in IMMATERIAL}
    what = (
        *(artifact.family.model_name, artifact.spec.model_format, artifact.spec.model_size_in_billions),
        *(artifact.spec.quantization, artifact.source, artifact.projector),
        *(launch.engine, options, launch.forced_options, launch.n_gpu, len(launch.gpu_idx or ())),
    )
    return hashlib.sha256(msgspec.json.encode(what, order="deterministic")).hexdigest()[:24]


class Experience:
    """Read once, kept in memory, written some seconds after a change. `run` samples what is watched, and writes."""

    def __init__(self, path: Path | None = None) -> None:
        """
        Args:
            path: of the file; None: nothing is known and nothing kept.
        """
        self._path = path
        self._records: dict[str, Record] = _read(path) if path else {}
        self._lives: dict[int, Life] = {}
        self._is_changed = False
        self._is_peak_told = False  # that some are not seen
        self._hurry = asyncio.Event()

    def peak_bytes(self, launch: Launch, *, on_gpu: bool = False) -> int | None:
        """The most that one copy took in its latest lives: of all its GPUs, or of the machine's memory."""
        record = self._records.get(fingerprint(launch))
        if record is None:
            return None
        living = (life.peak_bytes for life in self._lives.values() if life.record is record and life.on_gpu is on_gpu)
        return max((*record.peaks(on_gpu=on_gpu), *living), default=0) or None

    def load_s(self, launch: Launch, *, on_gpu: bool = False) -> float | None:
        """How long it takes from an engine's start until it is ready; elsewhere too, if only that is known."""
        record = self._records.get(fingerprint(launch))
        if record is None:
            return None
        here, elsewhere = (record.gpu_load_s, record.ram_load_s) if on_gpu else (record.ram_load_s, record.gpu_load_s)
        return here if here is not None else elsewhere

    def note_load(self, launch: Launch, load_s: float, *, on_gpu: bool = False) -> None:
        """It became ready so long after its engine's start. Later times count as much as all before together."""
        record = self._record(launch)
        smoothed = _smoothed(record.gpu_load_s if on_gpu else record.ram_load_s, load_s)
        if on_gpu:
            record.gpu_load_s = smoothed
        else:
            record.ram_load_s = smoothed
        self._is_changed = True

    def wake_s(self, launch: Launch, tier: str) -> float | None:
        """How long it takes to wake from that tier."""
        record = self._records.get(fingerprint(launch))
        return None if record is None else record.wakes_s.get(tier)

    def note_wake(self, launch: Launch, tier: str, wake_s: float) -> None:
        """It woke in so long."""
        wakes_s = self._record(launch).wakes_s
        wakes_s[tier] = _smoothed(wakes_s.get(tier), wake_s)
        self._is_changed = True

    def is_unfit(self, launch: Launch, tier: str) -> bool:
        """Whether it never sleeps in that tier."""
        record = self._records.get(fingerprint(launch))
        return record is not None and tier in record.unfit_tiers

    def note_unfit(self, launch: Launch, tier: str) -> None:
        """It came back from that tier otherwise than it was."""
        record = self._record(launch)
        if tier not in record.unfit_tiers:
            record.unfit_tiers = [*record.unfit_tiers, tier]
        self._is_changed = True

    @contextlib.contextmanager
    def watch(self, launch: Launch, pid: int | None, *, on_gpu: bool = False) -> Iterator[None]:
        """While a ready engine lives: see what it takes, now and then, and remember the most of it.

        Args:
            pid: the leader of its processes; None if there are none here.
        """
        if pid is None:
            yield
            return
        life = self._lives[pid] = Life(record=self._record(launch), on_gpu=on_gpu)
        self._hurry.set()
        try:
            yield
        finally:
            if not on_gpu and life.tells_peak:
                life.see(footprint(life.pids).peak_bytes)
            self._lives.pop(pid, None)
            if life.peak_bytes:
                life.record.peaks(on_gpu=on_gpu).append(life.peak_bytes)
                del life.record.peaks(on_gpu=on_gpu)[:-LIVES]
                self._is_changed = True

    async def run(self, look: Look, *, sample_s: float = SAMPLE_S) -> None:
        """Until cancelled: look at what is watched, and write what has changed.

        Args:
            look: called in a thread, with the leaders of processes.
        """
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(sample_s):
                        await self._hurry.wait()
                self._hurry.clear()
                try:
                    if self._lives:
                        await self._sample(await asyncio.to_thread(look, set(self._lives)))
                    if content := self._changes():
                        await asyncio.to_thread(self._write, content)
                except OSError as exc:
                    logger.warning("What engines take could not be seen: %s", exc)
                except Exception:  # nobody's service hangs on it
                    logger.exception("What engines take could not be seen")
                await asyncio.sleep(min(PAUSE_S, sample_s))  # many that become ready at once are seen at once
        finally:
            self.flush()

    def flush(self) -> None:
        """Write what has changed, now."""
        if content := self._changes():
            self._write(content)

    def _record(self, launch: Launch) -> Record:
        """That of the launch, the newest of all from now on."""
        key = fingerprint(launch)
        record = self._records.pop(key, None) or Record(name=launch.artifact.family.model_name)
        self._records[key] = record
        record.at = round(time.time(), 3)
        while len(self._records) > LAUNCHES:
            del self._records[next(iter(self._records))]
        return record

    async def _sample(self, seen: Seen) -> None:
        for pid, life in [*self._lives.items()]:
            known, life.pids = life.pids, tuple(member for member, leader in seen.families.items() if leader == pid)
            if life.on_gpu:
                holding = (one for gpu in seen.gpus for one in gpu.processes if seen.families.get(one.pid) == pid)
                took = sum(one.used_bytes or 0 for one in holding)
            elif has := seen.footprints.get(pid):
                new = set(life.pids).difference(known)
                took = has.peak_bytes if life.tells_peak and not new else has.total_bytes
                if new and life.tells_peak and not await asyncio.to_thread(forget_peaks, new):
                    life.tells_peak = False
                    self._tell_of_peaks(life.record.name)
            else:
                took = 0
            self._is_changed |= life.see(took)

    def _tell_of_peaks(self, name: str) -> None:
        if not self._is_peak_told:
            self._is_peak_told = True
            logger.warning(
                "What %s takes of the machine's memory for a moment only is not seen, as the system does not measure "
                "its peak anew (/proc/PID/clear_refs): it is known as of a look every %g s. Set `memory` of the launch "
                "if it takes more. This is told once.",
                *(name, SAMPLE_S),
            )

    def _changes(self) -> bytes | None:
        """What is to be written, lives that still go on with the rest; None if nothing has changed."""
        if self._path is None or not self._is_changed:
            return None
        self._is_changed = False
        return msgspec.json.encode({key: self._with_lives(record) for key, record in self._records.items()})

    def _with_lives(self, record: Record) -> Record:
        """As it would be if all lives ended now."""
        living = [life for life in self._lives.values() if life.record is record and life.peak_bytes]
        if not living:
            return record
        return msgspec.structs.replace(
            record,
            ram_peaks=[*record.ram_peaks, *(life.peak_bytes for life in living if not life.on_gpu)][-LIVES:],
            gpu_peaks=[*record.gpu_peaks, *(life.peak_bytes for life in living if life.on_gpu)][-LIVES:],
        )

    def _write(self, content: bytes) -> None:
        assert self._path is not None
        try:
            write_durably(self._path, content)
        except OSError as exc:
            logger.warning("What launches take cannot be remembered in %s: %s", self._path, exc.strerror)


def _smoothed(before: float | None, seconds: float) -> float:
    return round(seconds if before is None else (before + seconds) / 2, 3)


def _read(path: Path) -> dict[str, Record]:
    """What is remembered; a damaged file is put aside."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Record])
    except FileNotFoundError:
        return {}
    except OSError as exc:
        logger.warning("What launches take cannot be read from %s: %s", path, exc.strerror)
        return {}
    except msgspec.MsgspecError as exc:
        aside = path.with_suffix(".damaged")
        logger.warning("What launches take cannot be read from %s and is learnt anew: %s. See %s", path, exc, aside)
        with contextlib.suppress(OSError):
            path.replace(aside)
        return {}
