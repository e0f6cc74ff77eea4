"""What is on disk of the engines that run: one folder for each life of an engine, so that another gateway finds it.

A folder holds `life.json`, which the gateway writes before anything starts; what the engine's keeper writes
(`started.json`, `ended.json`); whether it sleeps, which the gateway writes before and after it changes that
(`slumber.json`); the engine's socket and files; and `held`, which every gateway that uses the engine has
locked. Only its owner may read it, as the key of the engine is in it.
"""

from __future__ import annotations

import enum
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import signal
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from engines.base import Command, Endpoint, Placement, Tier
from gateway.keeper import ENDED, ORPHANS, STARTED, started_of
from gateway.store import write_durably

logger = logging.getLogger("hostler.lives")

SOCKET_PATH_LIMIT = 100  # bytes; the system's own limit is 104 to 108
SOCKET = "e.sock"
LIFE, READY, SLUMBER, HELD = "life.json", "ready", "slumber.json", "held"
NAME_BYTES = 4


class Safer(msgspec.Struct, frozen=True, kw_only=True):
    """What is run needs less memory than the wish: the launch's options for it, and how that is told.

    `wish` is the fingerprint of the whole wish, at the same place.
    """

    wish: str
    options: dict[str, Any]
    degraded: str


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """One life of an engine: whose it is, where it listens, what is run, what it was given, and how it could sleep.

    `started_at` is a time of the epoch. `safer` is None if the whole wish is run.
    """

    uid: str
    index: int
    endpoint: Endpoint
    placement: Placement
    fingerprint: str
    argv: tuple[str, ...]
    grace_s: float
    log: str
    log_start: int
    started_at: float
    safer: Safer | None = None
    tiers: tuple[Tier, ...] = ()

    def tier(self, name: str) -> Tier | None:
        """That of the name; None if it has none."""
        return next((tier for tier in self.tiers if tier.name == name), None)


class Stage(enum.StrEnum):
    """Whether an engine sleeps, as far as that is known for sure."""

    AWAKE = "awake"
    ASLEEP = "asleep"
    UNSURE = "unsure"  # it was about to fall asleep, or to wake


class Slumber(msgspec.Struct, frozen=True, kw_only=True):
    """Whether an engine sleeps, in which tier, and what it has taken of the machine's memory for that.

    `proof` is what it answered to the tier's before it slept.
    """

    stage: Stage = Stage.AWAKE
    tier: str = ""
    host_bytes: int = 0
    proof: str | None = None


class Started(msgspec.Struct, frozen=True):
    """The two processes of a life, each as its pid and what `started_of` says of it."""

    keeper: tuple[int, str]
    engine: tuple[int, str]


class Ended(msgspec.Struct, frozen=True):
    """How the engine ended, and when."""

    at: float
    code: int | None = None
    signal: int | None = None


class Found(msgspec.Struct, frozen=True):
    """A life that another gateway began: its engine runs, and so does its keeper."""

    folder: Path
    life: Life
    started: Started
    slumber: Slumber = Slumber()

    @property
    def is_asleep(self) -> bool:
        """Whether its engine was left asleep, for sure."""
        return self.slumber.stage is Stage.ASLEEP


class ForeignFolder(Exception):
    """The folder of all lives is not ours alone; the text says why, and what to do."""


class RunFolder:
    """The folder of all lives of one data folder."""

    def __init__(self, home: Path, *, orphan_timeout_s: float) -> None:
        """Raises ForeignFolder, or OSError if it cannot be made or written."""
        home = home.resolve()  # as the system tells the working folders of processes
        self.lock = lock_path(home)
        self.path = _private_folder(_path_for(home))
        self.keep_for(orphan_timeout_s)

    def keep_for(self, orphan_timeout_s: float) -> None:
        """How long engines, also those that run, outlive their gateway. Raises OSError: it cannot be written."""
        self.orphan_timeout_s = orphan_timeout_s
        write_durably(self.path / ORPHANS, str(orphan_timeout_s).encode())

    def new(self) -> Path:
        """A folder for one more life, not made yet."""
        return self.path / secrets.token_hex(NAME_BYTES)

    def folders(self) -> list[Path]:
        """Those of all lives, also of the ended ones that nobody has removed."""
        return sorted(folder for folder in self.path.iterdir() if folder.is_dir() and not folder.is_symlink())


def lock_path(home: Path) -> Path:
    """The file that says, by its lock, that a gateway uses the data folder."""
    return home / "gateway.lock"


def begin(folder: Path, life: Life) -> None:
    """Write the life down. Raises OSError."""
    write_durably(folder / LIFE, msgspec.json.encode(life))


def read(folder: Path) -> Found | str:
    """The life in a folder, if its engine and its keeper run; else a word about what there is."""
    try:
        life = msgspec.json.decode((folder / LIFE).read_bytes(), type=Life)
        started = msgspec.json.decode((folder / STARTED).read_bytes(), type=Started)
    except FileNotFoundError:
        return "it was never started, or was being ended"
    except (OSError, msgspec.MsgspecError) as exc:
        return f"its files cannot be read: {exc}"
    if ended := ended_of(folder):
        return f"it ended with {f'exit code {ended.code}' if ended.signal is None else f'signal {ended.signal}'}"
    for what, process in (("keeper", started.keeper), ("engine", started.engine)):
        if not is_running(process):
            return f"its {what} (process {process[0]}) is gone"
    return Found(folder, life, started, slumber_of(folder))


def slumber_of(folder: Path) -> Slumber:
    """Whether the engine sleeps, as it was last written down; unsure if that cannot be read."""
    try:
        return msgspec.json.decode((folder / SLUMBER).read_bytes(), type=Slumber)
    except FileNotFoundError:
        return Slumber()
    except (OSError, msgspec.MsgspecError):
        return Slumber(stage=Stage.UNSURE)


def note_slumber(folder: Path, slumber: Slumber) -> None:
    """Write down whether it sleeps. Raises OSError."""
    write_durably(folder / SLUMBER, msgspec.json.encode(slumber))


def ended_of(folder: Path) -> Ended | None:
    """How its engine ended, as its keeper saw it; None if that is not known, or not yet."""
    try:
        return msgspec.json.decode((folder / ENDED).read_bytes(), type=Ended)
    except (OSError, msgspec.MsgspecError):
        return None


def signal_to(process: tuple[int, str], number: int) -> bool:
    """Signal just that process; whether it was there to be signalled."""
    pid, _ = process
    try:
        handle = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
        try:
            if not is_running(process):  # asked after the handle is there, which no other process can get
                return False
            if handle is None:
                os.kill(pid, number)
            else:
                signal.pidfd_send_signal(handle, number)
        finally:
            if handle is not None:
                os.close(handle)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def is_running(process: tuple[int, str]) -> bool:
    """Whether it is still that process, and not another one that got its pid."""
    pid, started = process
    try:
        return bool(started) and started_of(pid) == started
    except OSError:  # too many files are open: nobody is declared dead for that
        return True


def mark_ready(folder: Path) -> None:
    """Remember that the engine was ready once. Raises nothing: it only shortens a later wait."""
    try:
        (folder / READY).touch()
    except OSError as exc:
        logger.warning("%s cannot be written: %s", folder / READY, exc)


def was_ready(folder: Path) -> bool:
    """Whether the engine was ready once."""
    return (folder / READY).exists()


def disown(folder: Path) -> None:
    """Its engine is about to be ended: no gateway is to go on with it."""
    (folder / LIFE).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Forget a life that has ended."""
    shutil.rmtree(folder, ignore_errors=True)


class Hold:
    """Says to other gateways that we use an engine, and tells whether they do. It ends with `release`, or with us."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError."""
        self._file: int | None = os.open(folder / HELD, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def is_shared(self) -> bool:
        """Whether another gateway uses the engine, too."""
        if self._file is None:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fcntl.flock(self._file, fcntl.LOCK_SH)  # a failed change may have lost it
            return True
        fcntl.flock(self._file, fcntl.LOCK_SH)
        return False

    def release(self) -> None:
        """Use it no longer."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def fingerprint(command: Command, engine: str, asked: Sequence[object] = ()) -> str:
    """What is run, as a short text: the same command, of a program, libraries and files that have not changed since.

    Args:
        asked: what was asked of its place, which the command need not show.
    """
    told = (
        engine,
        asked,
        command.argv,
        sorted(command.env.items()),
        sorted(command.files.items()),
        command.folder,
        [_stamp(path) for path in _read_by(command.argv)],
    )
    return hashlib.sha256(msgspec.json.encode(told)).hexdigest()


def _read_by(argv: Sequence[str]) -> Iterator[Path]:
    """The files that a command names, the libraries of its Python, and our workers, if it runs one."""
    for word in argv:
        path = Path(word)
        if path.is_absolute() and path.is_file():
            yield path
            if path.parent.name == "workers":
                yield from sorted(path.parent.glob("*.py"))
    yield from sorted(Path(argv[0]).parent.parent.glob("lib/python3*/site-packages"))


def _stamp(path: Path) -> tuple[str, int, int]:
    facts = path.stat()
    return str(path), facts.st_mtime_ns, facts.st_size


def _path_for(home: Path) -> Path:
    """In the data folder; where sockets in there would have too long a path, in /tmp, under a name made of it."""
    path = home / "run"
    longest = path / ("x" * 2 * NAME_BYTES) / SOCKET
    if len(os.fsencode(longest)) <= SOCKET_PATH_LIMIT:
        return path
    return Path("/tmp").resolve() / f"hostler-{os.getuid()}-{hashlib.sha256(os.fsencode(home)).hexdigest()[:12]}"  # noqa: S108


def _private_folder(path: Path) -> Path:
    """The folder, made if it is not there; it must be ours, a folder indeed, and closed to others."""
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        facts = path.lstat()
        if not stat.S_ISDIR(facts.st_mode):
            why = "is no folder"
        elif facts.st_uid != os.getuid():
            why = f"belongs to user {facts.st_uid}"
        elif facts.st_mode & 0o077:
            why = "is open to others"
        else:
            return path
        raise ForeignFolder(
            f"{path}, where the sockets and keys of engines are kept, {why}. Remove it, or choose another `home`."
        ) from None
    return path
