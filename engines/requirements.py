"""The packages that a model asks for, as Xinference's JSON writes them, turned into plain requirements. Pure.

numpy<2                                   any requirement, a URL, or a wheel's path
#system_torch#                            the version that the engine's Python has
#vllm_dependencies#                       what that engine needs, where it is the one that runs
... ; #engine# == "vllm"                  only for that engine (or `#model_engine#`)
... ; cuda_version < "13.0"               only where CUDA is so; where there is none, no such comparison holds
... ; sys_platform == "linux"             any standard marker
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

SYSTEM = re.compile(r"#system_([A-Za-z0-9._-]+)#")
DEPENDENCIES = re.compile(r"#([A-Za-z0-9._-]+)_dependencies#")
ENGINE_TERM = re.compile(r"""#(?:model_)?engine#\s*(==|!=)\s*(?:"([^"]*)"|'([^']*)')""")
CUDA_TERM = re.compile(r"""\bcuda_version\s*(~=|==|!=|<=|>=|<|>)\s*(?:"([^"]*)"|'([^']*)')""")
SEPARATORS = re.compile(r"[-_.]+")
FIELDS = re.compile(r"\s*;\s*")
HOLDS, FAILS = 'python_version >= "0"', 'python_version < "0"'  # in the words of markers


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the Python that an environment is built on.

    Args:
        python: its path; None is the gateway's own.
        installed: the versions of its distributions, by canonical name.
        cuda_version: as the driver says, such as "12.8"; None without a GPU.
    """

    python: str | None = None
    python_version: str = ""
    installed: Mapping[str, str] = {}
    cuda_version: str | None = None


def same_name(name: str) -> str:
    """An engine's or distribution's name as it is compared: case aside, with `-` for `_` and `.`."""
    return SEPARATORS.sub("-", name).lower()


def resolve(
    entries: Iterable[str], engine: str, facts: Facts, dependencies: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    """What is to be installed for this engine: markers evaluated, `#...#` replaced, one entry for a distribution.

    Args:
        entries: least important first: of two for one distribution the later is taken.
        dependencies: what an engine needs beside what is there, by its `same_name`.
    Raises:
        ValueError: an entry is wrong or cannot be had; the text names it.
    """
    chosen: dict[str, str] = {}
    for entry in entries:
        for requirement in _resolve_one(entry, same_name(engine), facts, dependencies):
            chosen.pop(key := _distribution(requirement), None)
            chosen[key] = requirement
    return tuple(chosen.values())


def engines_named(entries: Iterable[str]) -> set[str]:
    """The engines, by `same_name`, that markers or `#..._dependencies#` say these packages are for."""
    named = set()
    for entry in entries:
        what, marker = _split(entry)
        named |= {same_name(double or single) for op, double, single in ENGINE_TERM.findall(marker) if op == "=="}
        if match := DEPENDENCIES.fullmatch(what):
            named.add(same_name(match[1]))
    return named


def is_satisfied(requirement: str, installed: Mapping[str, str]) -> bool:
    """Whether what is installed does for a requirement; never for URLs and paths."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        parsed = Requirement(requirement)
    except InvalidRequirement:
        return False
    version = installed.get(same_name(parsed.name))
    return version is not None and not parsed.url and parsed.specifier.contains(version, prereleases=True)


def _resolve_one(entry: str, engine: str, facts: Facts, dependencies: Mapping[str, Sequence[str]]) -> Sequence[str]:
    from packaging.requirements import InvalidRequirement, Requirement

    what, marker = _split(entry)
    if what.startswith("-") or not what or not what.isprintable():
        raise ValueError(f"{entry!r} is no package. Options of pip have fields of their own beside `packages`.")
    if marker and not _holds(entry, marker, engine, facts):
        return ()
    if match := SYSTEM.fullmatch(what):
        return (_system(entry, match[1], engine, facts, dependencies),)
    if match := DEPENDENCIES.fullmatch(what):
        return dependencies.get(engine, ()) if same_name(match[1]) == engine else ()
    if what.startswith("#"):
        raise ValueError(f"{entry!r} is not understood: there are #system_NAME# and #ENGINE_dependencies#.")
    if not _is_place(what):
        try:
            Requirement(what)
        except InvalidRequirement as exc:
            raise ValueError(f"{entry!r} is no requirement: {str(exc).splitlines()[0]}.") from exc
    return (what,)


def _split(entry: str) -> tuple[str, str]:
    """What is wanted, and its marker. In a URL a semicolon needs a space before it."""
    text = entry.strip()
    pattern = re.compile(r"\s+;\s*") if "://" in text else FIELDS
    what, *marker = pattern.split(text, maxsplit=1)
    return what, marker[0] if marker else ""


def _holds(entry: str, marker: str, engine: str, facts: Facts) -> bool:
    from packaging.markers import InvalidMarker, Marker
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    def engine_term(match: re.Match[str]) -> str:
        is_same = same_name(match[2] or match[3] or "") == engine
        return HOLDS if is_same == (match[1] == "==") else FAILS

    def cuda_term(match: re.Match[str]) -> str:
        if facts.cuda_version is None:
            return FAILS
        return HOLDS if SpecifierSet(match[1] + (match[2] or match[3] or "")).contains(facts.cuda_version) else FAILS

    try:
        standard = Marker(CUDA_TERM.sub(cuda_term, ENGINE_TERM.sub(engine_term, marker)))
    except (InvalidMarker, InvalidSpecifier) as exc:
        raise ValueError(f"The marker of {entry!r} is not understood: {str(exc).splitlines()[0]}.") from exc
    version = facts.python_version
    own = {"python_version": ".".join(version.split(".")[:2]), "python_full_version": version} if version else {}
    return standard.evaluate(own)


def _system(entry: str, name: str, engine: str, facts: Facts, dependencies: Mapping[str, Sequence[str]]) -> str:
    """That distribution as the base has it, or else as the engine's own packages pin it."""
    if version := facts.installed.get(same_name(name)):
        return f"{name}=={version}"
    for requirement in dependencies.get(engine, ()):
        if _distribution(requirement) == same_name(name):
            return requirement
    base = facts.python or "the gateway's Python"
    raise ValueError(f"{entry!r} asks for the {name} of {base}, which has none. Name a version instead.")


def _is_place(what: str) -> bool:
    return "://" in what.split(" @ ")[0] or what.startswith(("/", "./", "~")) or what.endswith(".whl")


def _distribution(requirement: str) -> str:
    from packaging.requirements import Requirement
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    if not _is_place(requirement):
        return same_name(Requirement(requirement).name)
    try:
        return parse_wheel_filename(requirement.split("#")[0].rsplit("/", 1)[-1])[0]
    except InvalidWheelFilename:
        return requirement
