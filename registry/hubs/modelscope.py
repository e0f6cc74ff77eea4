"""Hub `modelscope`: repositories of ModelScope, fetched by its own library into our cache.

modelscope_hub (which `modelscope` brings along) reads MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN, MODELSCOPE_HOME
and its limits itself. It goes on with what it has of a file and checks each file's hash before it gives it its name.

A branch there moves, so a folder is named for what the hub listed, and a file is taken into it only with the
hash listed. A file that is here already, of an earlier revision or in the library's own cache, is linked, not fetched.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from registry.hubs.base import Fetched, HubError, Report, choose_files
from registry.hubs.download import (
    adopt,
    check_names,
    check_room,
    has_hash,
    is_whole,
    library,
    naming,
    owner_and_name,
    partial_folder,
    size_of,
    watch,
)
from registry.hubs.places import modelscope_cache
from registry.schema import Source

os.environ.setdefault("TQDM_DISABLE", "1")

with library("modelscope", "modelscope-hub"):
    import requests
    from modelscope_hub import HubApi
    from modelscope_hub import errors as theirs

DEFAULT_REVISION = "master"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A file as the hub lists it."""

    path: str
    size: int
    sha256: str | None


def list_files(source: Source) -> dict[str, int]:
    """The files that `fetch` would get, and the bytes of each.

    Raises:
        HubError: the library is missing; no such repository, revision or file, no access, or no network.
    """
    owner_and_name(source)
    with _translated(source):
        sizes = {path: entry.size for path, entry in _list(_api(source), source).items()}
    return {name: sizes[name] for name in choose_files(source, sizes)}


def fetch(source: Source, cache: Path, report: Report) -> Fetched:
    """Get a repository's files that match `source.files`, or those that an engine could need.

    Raises:
        HubError: the library is missing; no such repository, revision or file, no access, no network, or no room.
    """
    owner, name = owner_and_name(source)
    with _translated(source):
        api = _api(source)
        entries = _list(api, source)
    chosen = choose_files(source, {path: entry.size for path, entry in entries.items()})
    check_names(chosen, source)
    folder = cache / "modelscope" / owner / name / _revision(entries)
    partial = partial_folder(source, cache)
    for path in chosen:
        if not is_whole(folder / path, entries[path].size):
            _link_if_here(entries[path], partial, _elsewhere(owner, name, path, folder), report)
    missing = [p for p in chosen if not any(is_whole(place / p, entries[p].size) for place in (folder, partial))]
    begun_bytes = sum(_begun_bytes(partial / path) for path in missing)
    total_bytes = sum(entries[path].size for path in missing)
    check_room(cache, max(0, total_bytes - begun_bytes), source.model_id, advice="move the data folder")
    if missing:
        _download(api, source, [entries[path] for path in missing], partial, report)
    files = adopt(partial, folder, chosen)
    shutil.rmtree(partial, ignore_errors=True)
    return Fetched(path=files[0] if source.files else folder, files=files)


def _api(source: Source) -> Any:
    api = HubApi()
    return HubApi(endpoint=api.resolve_endpoint_for_read(source.model_id, repo_type="model"))


def _list(api: Any, source: Source) -> dict[str, Entry]:
    listed = api.list_repo_files(source.model_id, "model", revision=source.model_revision or DEFAULT_REVISION)
    entries = [Entry(path=f.path, size=f.size or 0, sha256=f.sha256 or None) for f in listed if f.type != "tree"]
    return {entry.path: entry for entry in entries}


def _revision(entries: dict[str, Entry]) -> str:
    """A name for exactly these contents."""
    content = sorted(msgspec.structs.astuple(entry) for entry in entries.values())
    return hashlib.sha256(msgspec.json.encode(content)).hexdigest()[:40]


def _elsewhere(owner: str, name: str, path: str, folder: Path) -> Iterator[Path]:
    """Where a file of that path may be on this machine already."""
    library_cache = modelscope_cache(os.environ)
    old_name = name.replace(".", "___")
    yield from folder.parent.glob(f"*/{glob.escape(path)}")
    yield from (library_cache / "models" / f"{owner}--{name}" / "snapshots").glob(f"*/{glob.escape(path)}")
    yield library_cache / "models" / owner / old_name / path
    yield library_cache / "hub" / "models" / owner / old_name / path


def _link_if_here(entry: Entry, partial: Path, candidates: Iterator[Path], report: Report) -> None:
    if entry.sha256 is None or is_whole(partial / entry.path, entry.size):
        return
    for candidate in candidates:
        if is_whole(candidate, entry.size) and has_hash(candidate, entry.sha256, entry.size, report):
            target = partial / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another disk: it is fetched
                os.link(candidate.resolve(), target)
            return


# -- the download


def _begun_bytes(target: Path) -> int:
    """The bytes of a file that an earlier fetch has begun: one partial file, or one for each of its ranges."""
    begun = [target.with_name(f"{target.name}.incomplete"), *target.parent.glob(f"{glob.escape(target.name)}_*_*")]
    sizes = 0
    for path in begun:
        with contextlib.suppress(OSError):
            sizes += path.stat().st_size
    return sizes


def _download(api: Any, source: Source, entries: list[Entry], partial: Path, report: Report) -> None:
    total_bytes = sum(entry.size for entry in entries)
    file = naming([entry.path for entry in entries])
    whole_bytes = size_of(partial) - sum(_begun_bytes(partial / entry.path) for entry in entries)

    def work() -> None:
        api.download_repo(
            source.model_id,
            "model",
            revision=source.model_revision or DEFAULT_REVISION,
            local_dir=partial,
            file_list=[{"Path": e.path, "Size": e.size, "Sha256": e.sha256, "Type": "blob"} for e in entries],
        )

    def tell() -> None:
        # The folder, not the library's callbacks: they do not tell what it had before from what arrives.
        done_bytes = size_of(partial) - whole_bytes
        report.bytes("downloading", max(0, min(done_bytes, total_bytes)), total_bytes, file)

    tell()
    with _translated(source):
        watch(work, tell)
    for entry in entries:
        if not is_whole(partial / entry.path, entry.size):
            raise HubError(f"File {entry.path} of {source.model_id} did not arrive whole. Try again.", permanent=False)


# -- errors


@contextlib.contextmanager
def _translated(source: Source) -> Iterator[None]:
    """Give the library's errors as ours."""
    try:
        yield
    except theirs.FileDownloadError as exc:
        with _translated(source):
            raise next(iter(exc.failed_files.values()), exc.__cause__ or theirs.HubError(str(exc))) from exc
    except theirs.NotExistError as exc:
        revision = f" with revision {source.model_revision!r}" if source.model_revision else ""
        raise HubError(
            f"There is no repository {source.model_id}{revision} at ModelScope, or it is private. Check its name; "
            "for a private one set MODELSCOPE_API_TOKEN.",
            permanent=True,
        ) from exc
    except (theirs.AuthenticationError, theirs.PermissionDeniedError) as exc:
        raise HubError(
            f"ModelScope refuses access to {source.model_id} ({_first_line(exc)}). Check MODELSCOPE_API_TOKEN.",
            permanent=True,
        ) from exc
    except theirs.FileIntegrityError as exc:
        raise HubError(
            f"A file of {source.model_id} is not what ModelScope lists ({_first_line(exc)}). Try again.",
            permanent=False,
        ) from exc
    except (theirs.NetworkError, requests.RequestException) as exc:
        raise HubError(
            f"ModelScope could not be reached: {_first_line(exc)}. Check the network; MODELSCOPE_ENDPOINT names "
            "another endpoint.",
            permanent=False,
        ) from exc
    except theirs.InvalidParameter as exc:
        raise HubError(f"ModelScope refuses {source.model_id}: {_first_line(exc)}.", permanent=True) from exc
    except theirs.HubError as exc:
        raise HubError(
            f"ModelScope is in trouble with {source.model_id}: {_first_line(exc)}. Try again later.", permanent=False
        ) from exc


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip(".")
