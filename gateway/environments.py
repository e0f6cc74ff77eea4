"""Builds the Python environments that `engines.environments` describes, lists and removes them.

An environment is built in a folder of its own, which nobody looks at before the stamp beside it, written last and by
a rename, names it. So a build that was killed is never taken for whole; the next one clears it away. A lock that the
system drops with its process makes several builds of one environment one.

<environments>/locks/<fingerprint>.lock   held by whoever builds or removes it
<environments>/<fingerprint>/build.log    what the last build said
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import fcntl
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Literal

import msgspec

from engines.environments import (
    STAMP,
    Environment,
    Stamp,
    child_environment,
    find_built,
    installed_in,
    module_argv,
    python_of,
    read_stamp,
    site_folders,
)
from engines.requirements import is_satisfied
from gateway.config import Settings
from gateway.process import Exit, start, tail
from registry.hubs.choose import TRUE

OFFLINE_VARIABLES = ("HOSTLER_OFFLINE", "XINFERENCE_VIRTUAL_ENV_OFFLINE_INSTALL")
FOLDER_NAME = re.compile(r"[0-9a-f]{16}")
GRACE_S = 2.0  # for an installer to tidy up
LOCK_PAUSE_S = 0.2
REPORT_PAUSE_S = 0.5
TAIL_LINES = 12
CONFIG_LIMIT_S = 30.0
# What both installers say when it is the network or the disk that fails, which another try may find mended.
MAY_PASS = re.compile(
    r"Retrying|[Cc]onnection|timed out|Temporary failure|No space left|error sending request|Failed to (fetch|download)"
)
# Lines of an installer that say what it is at; its warnings are for the log.
STEP = re.compile(r"\s*(Collecting|Downloading|Processing|Using cached|Building|Installing|Resolved|Prepared) ")

Builder = Literal["auto", "pip", "uv"]
Report = Callable[[str], None]


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """How a site builds environments.

    Args:
        builder: auto is uv where it is found, else pip.
        offline: ask no index, take all from `wheel_folders` and the environment's own `find_links`.
    """

    builder: Builder = "auto"
    offline: bool = False
    wheel_folders: tuple[Path, ...] = ()


def recipe_of(settings: Settings) -> Recipe:
    """How the site builds environments."""
    return Recipe(
        builder=settings.environment_builder,
        offline=is_offline_build(os.environ),
        wheel_folders=settings.wheel_paths,
    )


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """An environment as it is on disk. `users` are (engine, model), model being None for the engine itself."""

    fingerprint: str
    path: Path
    users: tuple[tuple[str, str | None], ...] = ()
    packages: tuple[str, ...] = ()
    python: str | None = None
    python_version: str | None = None
    base: str | None = None
    size_bytes: int = 0
    is_whole: bool = False
    is_building: bool = False
    last_used: float | None = None

    @property
    def kind(self) -> str:
        """Whether it is an engine's, a model's, or nobody knows any more."""
        if not self.users:
            return "unknown"
        return "engine" if any(model is None for _, model in self.users) else "model"

    @property
    def name(self) -> str:
        """For people."""
        names = [engine if model is None else f"model {model}" for engine, model in self.users]
        return ", ".join(dict.fromkeys(names)) or "-"


_users = msgspec.json.Decoder(tuple[str, str | None])


class CannotBuild(Exception):
    """An environment could not be built; `permanent` if trying again cannot help."""

    def __init__(self, message: str, *, permanent: bool) -> None:
        super().__init__(message)
        self.permanent = permanent


class EnvironmentInUse(Exception):
    """An environment cannot be removed now; the text says why."""


def is_offline_build(environ: Mapping[str, str]) -> bool:
    """Whether no index is to be asked."""
    return any(environ.get(name, "").lower() in TRUE for name in OFFLINE_VARIABLES)


# --- building


async def prepare(environment: Environment, folder: Path, *, recipe: Recipe, run_folder: Path, report: Report) -> str:
    """The path of the environment's Python, after building it if it is not there. A cancel ends that at once.

    Args:
        folder: where environments are kept.
        run_folder: the gateway's, by which the watchdog knows our children.
        report: called with a sentence for each step.
    Raises:
        CannotBuild: with the installer's last lines.
        CannotStart: the installer cannot be started.
        OSError: the folder cannot be written.
    """
    if (python := _ready(environment, folder)) is not None:
        return python
    async with _locked(environment, folder, lambda: report(f"waiting for a build of {environment.name}")):
        place = folder / environment.folder_name
        if (python := find_built(environment, folder)) is None:
            python = await _build(environment, place, recipe, run_folder, report)
        _add_user(environment, place)
        return python


def mark_used(python: str, folder: Path) -> None:
    """Remember that a Python was used now, if it is of one of these environments."""
    path = Path(python)
    if folder in path.parents:
        with contextlib.suppress(OSError):
            os.utime(folder / path.relative_to(folder).parts[0] / STAMP)


def _ready(environment: Environment, folder: Path) -> str | None:
    python = find_built(environment, folder)
    stamp = read_stamp(folder / environment.folder_name)
    if python is None or stamp is None or _user(environment) not in stamp.users:
        return None
    mark_used(python, folder)
    return python


def _user(environment: Environment) -> tuple[str, str | None]:
    return environment.engine, environment.model


async def _build(environment: Environment, place: Path, recipe: Recipe, run_folder: Path, report: Report) -> str:
    """Build and stamp; the lock is held."""
    base = environment.python or sys.executable
    if not os.access(base, os.X_OK):
        raise CannotBuild(
            f"The environment of {environment.name} cannot be built: its base {base} is gone. Launch the model again, "
            "so that it is planned with what is here.",
            permanent=True,
        )
    await asyncio.to_thread(_clear, place)
    place.mkdir(parents=True, exist_ok=True)
    build = place / f"build-{secrets.token_hex(4)}"
    log = place / "build.log"
    python = build / "bin" / "python"
    try:
        with log.open("wb") as output:
            run = _Runner(environment, output, log, run_folder)
            report(f"making an environment for {environment.name}")
            await run((base, "-I", "-m", "venv", "--without-pip", str(build)), {}, report=lambda _: None)
            if environment.inherit_packages:
                _let_see(build, site_folders(environment.python))
            await _install(environment, str(python), place, recipe, run, report)
        size_bytes = await asyncio.to_thread(_size_of, build)
        stamp = Stamp(
            environment=environment,
            users=(_user(environment),),
            build=build.name,
            python_version=_full_version(build),
            size_bytes=size_bytes,
        )
        _write_stamp(stamp, place)
    except BaseException:
        await asyncio.to_thread(shutil.rmtree, build, ignore_errors=True)
        raise
    return str(python)


class _Runner:
    """Runs the steps of one build, with their output in its log."""

    def __init__(self, environment: Environment, output: IO[bytes], log: Path, run_folder: Path) -> None:
        self._name = environment.name
        self._output = output
        self._log = log
        self._run_folder = run_folder

    async def __call__(self, argv: Sequence[str], env: Mapping[str, str], *, report: Report) -> None:
        """Run a step to its end; `report` gets its last line from time to time.

        Raises:
            CannotBuild: it failed.
        """
        self._output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(argv)}\n".encode())
        self._output.flush()
        begin = self._output.tell()
        process = await start(
            argv, env, folder=self._run_folder, grace_s=GRACE_S, stdout=self._output, stderr=self._output
        )
        try:
            ended = asyncio.ensure_future(process.wait())
            while not (await asyncio.wait((ended,), timeout=REPORT_PAUSE_S))[0]:
                if steps := [line for line in tail(self._log, TAIL_LINES, start=begin) if STEP.match(line)]:
                    report(_short(steps[-1]))
        finally:
            await process.end()
            exit = await ended
        if exit != Exit(code=0):
            raise self._failure(exit, begin)
        self._output.seek(0, os.SEEK_END)

    def _failure(self, exit: Exit, begin: int) -> CannotBuild:
        lines = tuple(line for line in tail(self._log, TAIL_LINES, start=begin) if line.strip())
        everything = self._log.read_bytes()[begin:].decode(errors="replace")
        return CannotBuild(
            f"The environment of {self._name} cannot be built: the installer ended with {exit}. Its last lines: "
            f"{' | '.join(lines[-4:]) or 'none'}. The whole log is {self._log}",
            permanent=exit.signal is None and not MAY_PASS.search(everything),
        )


def _let_see(build: Path, folders: Sequence[Path]) -> None:
    """Have an environment import from further folders, after its own."""
    [own] = build.glob("lib/python3.*/site-packages")
    lines = "".join(f"import site; site.addsitedir({str(folder)!r})\n" for folder in folders)
    (own / "hostler_base.pth").write_text(lines, encoding="utf-8")


async def _install(
    environment: Environment, python: str, place: Path, recipe: Recipe, run: _Runner, report: Report
) -> None:
    """Put the packages into the environment that is there, empty."""
    number = len(environment.packages)
    what = f"installing {number} package{'s' * (number != 1)} for {environment.name}"
    said = report_each(lambda line: report(f"{what}: {line}"))
    report(what)
    pip = await asyncio.to_thread(_pip_config)
    uv = find_uv() if recipe.builder != "pip" else None
    if uv is None and recipe.builder == "uv":
        raise CannotBuild(
            "`environment_builder` is uv, and there is no uv on PATH. Install it, or set it to pip.", permanent=True
        )
    if uv is None:
        argv, env = pip_argv(environment, python, recipe, pip)
        await run(argv, env, report=said)
        return
    flags = uv_flags(environment, recipe, pip)
    packages = environment.packages
    if environment.inherit_packages and environment.skip_installed:
        # uv does not see what the base has. So it resolves first, with a liking for just these versions, and then
        # installs what differs.
        installed = await asyncio.to_thread(installed_in, environment.python)
        wanted, resolved = place / "wanted.txt", place / "resolved.txt"
        wanted.write_text("".join(f"{one}\n" for one in packages), encoding="utf-8")
        resolved.write_text("".join(f"{name}=={version}\n" for name, version in installed.items()), encoding="utf-8")
        outputs = ("--output-file", str(resolved), "--no-header", "--no-annotate", "--quiet")
        await run((uv, "pip", "compile", "--python", python, *outputs, *flags, str(wanted)), {}, report=said)
        packages = to_install(resolved.read_text(encoding="utf-8"), installed)
        flags = [*flags, "--no-deps"]
    if packages:
        await run(
            (uv, "pip", "install", "--python", python, "--compile-bytecode", *flags, "--", *packages), {}, report=said
        )


def report_each(report: Report) -> Report:
    """Reports what differs from what was said before."""
    last = ""

    def said(step: str) -> None:
        nonlocal last
        if step != last:
            last = step
            report(step)

    return said


def to_install(resolved: str, installed: Mapping[str, str]) -> tuple[str, ...]:
    """Pure: of the lines of a resolution, those that the base does not have in just that version."""
    lines = [line.strip() for line in resolved.splitlines()]
    return tuple(line for line in lines if line and line[0] not in "#-" and not is_satisfied(line, installed))


def find_uv() -> str | None:
    """uv on PATH, or beside our own Python."""
    return shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))


def pip_argv(
    environment: Environment, python: str, recipe: Recipe, config: Mapping[str, str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Pure: what pip is to do. It reads its own configuration, unless it is not to inherit it.

    Args:
        config: pip's configuration. What in it says how to reach any index at all is kept in any case.
    """
    flags = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off", *_flags(environment, recipe)]
    env = {"PIP_USER": "0"}  # a site's `user = true` is not meant for environments
    if not environment.skip_installed:
        flags.append("--ignore-installed")
    if not environment.inherit_pip_config:
        env["PIP_CONFIG_FILE"] = os.devnull
        flags = ["--isolated", *flags, *_transport(config)]
    return (*module_argv("pip"), "--python", python, "install", *flags, "--", *environment.packages), env


def _transport(config: Mapping[str, str]) -> list[str]:
    return [text for name in ("cert", "proxy") if name in config for text in (f"--{name}", config[name])]


def uv_flags(environment: Environment, recipe: Recipe, pip: Mapping[str, str]) -> list[str]:
    """Pure: how uv is to look for packages.

    Args:
        pip: pip's configuration, which uv does not read.
    """
    flags = ["--no-progress", "--color", "never", "--no-python-downloads", *_flags(environment, recipe)]
    if "cert" in pip:
        flags += ["--cert", pip["cert"]]
    if environment.inherit_pip_config:
        for name, flag in UV_FLAGS.items():
            flags += [text for value in pip.get(name, "").split() for text in (flag, value)]
    # pip searches all indexes and takes the best; so that both build the same, uv does so too unless told otherwise.
    return [*flags, "--index-strategy", environment.index_strategy or "unsafe-best-match"]


# pip's settings, as uv's flags.
UV_FLAGS = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
    "constraint": "--constraints",
}


def _flags(environment: Environment, recipe: Recipe) -> list[str]:
    """The flags that pip and uv share."""
    flags = []
    if environment.index_url:
        flags += ["--index-url", environment.index_url]
    folders = [str(folder) for folder in recipe.wheel_folders if folder.is_dir()]
    for flag, values in (
        ("--extra-index-url", environment.extra_index_url),
        ("--find-links", (*environment.find_links, *folders)),
        ("--trusted-host", environment.trusted_host),
    ):
        flags += [text for value in values for text in (flag, value)]
    switches = {
        "--no-build-isolation": environment.no_build_isolation,
        "--no-deps": environment.without_dependencies,
        "--no-index": recipe.offline,
    }
    return flags + [flag for flag, is_on in switches.items() if is_on]


def _pip_config() -> dict[str, str]:
    """pip's settings for `install`, as its own `pip config list` tells them."""
    import subprocess

    argv = (*module_argv("pip"), "config", "list")
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=CONFIG_LIMIT_S, env=child_environment({}), check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return read_pip_config(done.stdout)


def read_pip_config(listing: str) -> dict[str, str]:
    """Pure: of the lines `section.name='value'`, the environment's go before the command's, and these before global."""
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for line in listing.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(f"{section}."):
                with contextlib.suppress(ValueError, SyntaxError):
                    found[name.removeprefix(f"{section}.").replace("_", "-")] = str(ast.literal_eval(value))
    return found


def _short(line: str, limit: int = 100) -> str:
    line = line.strip()
    return line if len(line) <= limit else line[: limit - 3] + "..."


# --- stamps, locks


def _write_stamp(stamp: Stamp, place: Path) -> None:
    partial = place / f"{STAMP}.{secrets.token_hex(4)}"
    with partial.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(stamp)))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(place / STAMP)


def _add_user(environment: Environment, place: Path) -> None:
    stamp = read_stamp(place)
    if stamp is not None and _user(environment) not in stamp.users:
        _write_stamp(msgspec.structs.replace(stamp, users=(*stamp.users, _user(environment))), place)


def _clear(place: Path) -> None:
    """Delete what a place holds: the stamp first, so that the rest is never taken for whole."""
    (place / STAMP).unlink(missing_ok=True)
    for path in [*place.glob("build-*"), *place.glob(f"{STAMP}.*"), place / "wanted.txt", place / "resolved.txt"]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def _locked(environment: Environment, folder: Path, on_wait: Callable[[], None]) -> AsyncIterator[None]:
    """Hold the lock of an environment, after waiting for whoever has it; it says whom the environment is for."""
    with _lock_file(environment.folder_name, folder) as file:
        if not _try_lock(file):
            on_wait()
            while not _try_lock(file):
                await asyncio.sleep(LOCK_PAUSE_S)
        file.truncate(0)
        file.write(msgspec.json.encode(_user(environment)))
        file.flush()
        yield


@contextlib.contextmanager
def _lock_file(name: str, folder: Path) -> Iterator[IO[bytes]]:
    path = folder / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        yield file


def _try_lock(file: IO[bytes], kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --- listing, removing


def list_environments(folder: Path) -> list[Listed]:
    """All that are there, whole or not; engines' first."""
    places = [place for place in sorted(folder.glob("*")) if FOLDER_NAME.fullmatch(place.name) and place.is_dir()]
    found = [listed for place in places if (listed := _look_at(place)) is not None]
    return sorted(found, key=lambda listed: (listed.kind, listed.name, listed.fingerprint))


def remove(name: str, folder: Path) -> int:
    """Delete an environment, by the name of its folder; the bytes freed, 0 if there is none.

    Raises:
        EnvironmentInUse: it is being built, a process runs in it, or another environment is built on it.
    """
    place = folder / name
    if not FOLDER_NAME.fullmatch(name) or not place.is_dir():
        return 0
    with _lock_file(name, folder) as file:
        if not _try_lock(file):
            raise EnvironmentInUse(f"The environment {name} is being built now: wait for it, or cancel that launch.")
        if pids := _running_in(place):
            raise EnvironmentInUse(
                f"The environment {name} is in use by process {', '.join(map(str, pids))}. Stop its model first."
            )
        for other in list_environments(folder):
            if other.base and place in Path(other.base).parents:
                raise EnvironmentInUse(
                    f"The environment {other.fingerprint} of {other.name} is built on {name}. Remove it first."
                )
        size_bytes = _size_of(place)
        _clear(place)
        shutil.rmtree(place, ignore_errors=True)
        return size_bytes


def remove_for(user: tuple[str, str | None], name: str, folder: Path) -> int:
    """Have an environment no longer kept for that (engine, model); the bytes freed, 0 while others want it.

    Raises:
        EnvironmentInUse: as `remove`.
    """
    with _lock_file(name, folder) as file:
        if not _try_lock(file):
            raise EnvironmentInUse(f"The environment {name} is being built now: wait for it, or cancel that launch.")
        stamp = read_stamp(folder / name)
        if stamp is not None and (others := tuple(one for one in stamp.users if one != user)):
            _write_stamp(msgspec.structs.replace(stamp, users=others), folder / name)
            return 0
    return remove(name, folder)


def _look_at(place: Path) -> Listed | None:
    stamp = read_stamp(place)
    with _lock_file(place.name, place.parent) as file:
        is_building = not _try_lock(file, fcntl.LOCK_SH)
    if stamp is None:
        if not is_building and not any(place.glob("build-*")):
            return None  # the log of a build that failed
        return Listed(
            fingerprint=place.name,
            path=place,
            users=_users_in_lock(place),
            size_bytes=_size_of(place),
            is_building=is_building,
        )
    python = python_of(stamp, place)
    return Listed(
        fingerprint=place.name,
        path=place / stamp.build,
        users=stamp.users,
        packages=stamp.environment.packages,
        python=python,
        python_version=stamp.python_version,
        base=stamp.environment.python,
        size_bytes=stamp.size_bytes,
        is_whole=python is not None,
        is_building=is_building,
        last_used=(place / STAMP).stat().st_mtime,
    )


def _users_in_lock(place: Path) -> tuple[tuple[str, str | None], ...]:
    """Whom the last build was for."""
    try:
        return (_users.decode((place.parent / "locks" / f"{place.name}.lock").read_bytes()),)
    except (OSError, msgspec.MsgspecError):
        return ()


def _running_in(place: Path) -> list[int]:
    """The processes whose program is in that folder."""
    import psutil

    inside = f"{place}{os.sep}"
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[0].startswith(inside):
            found.append(process.pid)
    return found


def _size_of(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total


def _full_version(build: Path) -> str:
    text = (build / "pyvenv.cfg").read_text(encoding="utf-8")
    match = re.search(r"^version\s*=\s*(\S+)", text, re.MULTILINE)
    return match[1] if match else ""
