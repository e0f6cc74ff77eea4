"""What a Python has installed, read off its files: nothing of it is imported or run."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path

LOOK = (
    "import importlib.util as u, sys; s = u.find_spec(sys.argv[1]); print(s.submodule_search_locations[0] if s else '')"
)
LOOK_LIMIT_S = 20

_found: dict[tuple[str, str], Path] = {}


def package_folder(python: str, name: str) -> Path | None:
    """Where the package of that name is that this Python would import; None if there is none."""
    known = _found.get((python, name))
    if known is None or not known.is_dir():
        known = _look(python, name)
        if known is None:
            _found.pop((python, name), None)
        else:
            _found[python, name] = known
    return known


def _look(python: str, name: str) -> Path | None:
    if python == sys.executable:
        spec = importlib.util.find_spec(name)
        return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    program = shutil.which(python)
    if program is None:
        return None
    for folder in Path(program).absolute().parent.parent.glob(f"lib/python3*/site-packages/{name}"):
        return folder
    try:
        done = subprocess.run([program, "-P", "-c", LOOK, name], capture_output=True, text=True, timeout=LOOK_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = done.stdout.strip()
    return Path(found) if found and Path(found).is_dir() else None


def distributions(folder: Path, *names: str) -> list[str]:
    """The distributions of these names that are installed beside a package, as `name-version`."""
    infos = (info.name.removesuffix(".dist-info") for info in folder.parent.glob("*.dist-info"))
    return [info for info in infos if info.partition("-")[0].replace("_", "-") in names]


@cache
def annotated_fields(
    folder: Path, patterns: tuple[str, ...], classes: frozenset[str] | None = None
) -> Mapping[str, str]:
    """Field -> its annotation, of the classes in a package's files, which are parsed and not run.

    Args:
        patterns: of the files, below the folder.
        classes: their names; None for all.
    """
    found: dict[str, str] = {}
    tops = (top for path in _files(folder, patterns) for top in _parsed(path))
    for top in tops:
        if isinstance(top, ast.ClassDef) and (classes is None or top.name in classes):
            for one in top.body:
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and one.target.id[0] != "_":
                    found[one.target.id] = ast.unparse(one.annotation)
    return found


@cache
def mentions(folder: Path, file: str, word: str) -> bool:
    """Whether a package's file has the word."""
    try:
        return word in (folder / file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


@cache
def literal_keys(folder: Path, pattern: str) -> frozenset[str]:
    """All texts that are keys of literal dicts in a package's files."""
    return frozenset(
        key.value
        for path in _files(folder, (pattern,))
        for top in _parsed(path)
        for node in ast.walk(top)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    )


def _files(folder: Path, patterns: Iterable[str]) -> Collection[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _parsed(path: Path) -> list[ast.stmt]:
    try:
        return ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return []
