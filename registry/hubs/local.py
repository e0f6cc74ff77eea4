"""Hub `local`: files that are on this machine already. Nothing is copied."""

from __future__ import annotations

from pathlib import Path

from registry.decode import did_you_mean
from registry.hubs.base import Fetched, HubError, Report, choose, choose_or_explain, what_engines_need
from registry.schema import Source


def find(source: Source) -> Fetched | None:
    """The source's path if it exists: the path itself, or the first file in that folder that matches."""
    path = Path(source.model_id)
    try:
        if not path.exists():
            return None
        if not source.files or path.is_file():
            return Fetched(path=path, files=(path,) if path.is_file() else ())
        matching = choose(sizes_in(path), source.files)
    except OSError:
        return None
    return Fetched(path=path / matching[0], files=tuple(path / name for name in matching)) if matching else None


def list_files(source: Source) -> dict[str, int]:
    """The files of the source, and the bytes of each; of a whole folder those that an engine could need.

    Raises:
        HubError: there is no such file or folder, or nothing in it matches.
    """
    fetched = find(source)
    if fetched is None or fetched.files:
        found = fetched or fetch(source, Path(), Report(lambda _: None))
        return {path.name: path.stat().st_size for path in found.files}
    sizes = sizes_in(fetched.path)
    return {name: sizes[name] for name in what_engines_need(sizes, f"folder {fetched.path}")}


def fetch(source: Source, cache: Path, report: Report) -> Fetched:
    """Find the source's path.

    Raises:
        HubError: there is no such file or folder, or nothing in it matches; both permanent.
    """
    if found := find(source):
        return found
    path = Path(source.model_id)
    try:
        if path.is_dir():
            choose_or_explain(sizes_in(path), source.files, f"folder {path}")
        parent = path.parent
        hint = (
            did_you_mean(path.name, (p.name for p in parent.iterdir()), what="That folder has")
            if parent.is_dir()
            else f"There is no folder {parent} either."
        )
    except OSError as exc:
        raise HubError(f"{path} cannot be read: {exc.strerror or exc}.", permanent=True) from exc
    raise HubError(f"There is no file or folder {path}. {hint}", permanent=True)


def sizes_in(folder: Path) -> dict[str, int]:
    """The bytes of each file in a folder and in those in it, by its path there."""
    # Two levels hold every layout we know of; a whole home folder would take minutes to walk.
    paths = (path for pattern in ("*", "*/*") for path in folder.glob(pattern))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths if path.is_file()}
