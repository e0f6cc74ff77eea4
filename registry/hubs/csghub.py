"""Hub `csghub`: repositories of OpenCSG's hub or of a CSGHub of one's own, fetched by its library into our cache.

XINFERENCE_CSG_ENDPOINT (else CSGHUB_DOMAIN) names the hub, XINFERENCE_CSG_TOKEN (else CSGHUB_TOKEN) the account.
The library keeps whole files of an earlier try but begins each other one anew, and checks no hash: we do.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

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
from registry.schema import Source

with library("csghub", "csghub-sdk"):
    import requests
    from pycsghub.constants import DEFAULT_CSG_GROUP, DEFAULT_REVISION
    from pycsghub.errors import FileDownloadError
    from pycsghub.snapshot_download import snapshot_download
    from pycsghub.utils import get_endpoint, model_info

LIST_TIMEOUT_S = 30


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A file as the hub lists it; not every CSGHub tells sizes and hashes."""

    path: str
    size: int | None
    sha256: str | None


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """What a repository holds at a commit."""

    commit: str
    entries: dict[str, Entry]


def list_files(source: Source) -> dict[str, int]:
    """The files that `fetch` would get, and the bytes of each; 0 where the hub does not tell.

    Raises:
        HubError: the library is missing; no such repository, revision or file, no access, or no network.
    """
    owner, name = owner_and_name(source, default_owner=DEFAULT_CSG_GROUP)
    with _translated(source):
        sizes = {path: entry.size or 0 for path, entry in _list(f"{owner}/{name}", source).entries.items()}
    return {name: sizes[name] for name in choose_files(source, sizes)}


def fetch(source: Source, cache: Path, report: Report) -> Fetched:
    """Get a repository's files that match `source.files`, or those that an engine could need.

    Raises:
        HubError: the library is missing; no such repository, revision or file, no access, no network, or no room.
    """
    owner, name = owner_and_name(source, default_owner=DEFAULT_CSG_GROUP)
    with _translated(source):
        listing = _list(f"{owner}/{name}", source)
    entries = listing.entries
    chosen = choose_files(source, {path: entry.size or 0 for path, entry in entries.items()})
    check_names([*chosen, listing.commit], source)
    folder = cache / "csghub" / owner / name / listing.commit
    partial = partial_folder(source, cache) / listing.commit
    # Without a size, only what a finished fetch has moved into place is known to be whole.
    missing = [path for path in chosen if not is_whole(folder / path, entries[path].size)]
    sizes = [entries[path].size for path in missing]
    have_bytes = size_of(partial)
    known_bytes = sum(size or 0 for size in sizes)
    check_room(cache, max(0, known_bytes - have_bytes), source.model_id, advice="move the data folder")
    if missing:
        total_bytes = None if None in sizes else known_bytes
        _download(f"{owner}/{name}", source, listing.commit, missing, total_bytes, partial, report)
    for path in missing:
        _check(entries[path], partial / "files" / path, source, report)
    files = adopt(partial / "files", folder, chosen)
    shutil.rmtree(partial.parent, ignore_errors=True)
    return Fetched(path=files[0] if source.files else folder, files=files)


def _list(repository: str, source: Source) -> Listing:
    info = model_info(
        repository,
        revision=source.model_revision or DEFAULT_REVISION,
        files_metadata=True,
        timeout=LIST_TIMEOUT_S,
        token=_token(),
        endpoint=_endpoint(),
    )
    entries = [
        Entry(path=file.rfilename, size=file.size, sha256=file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or ()
    ]
    return Listing(commit=info.sha or DEFAULT_REVISION, entries={entry.path: entry for entry in entries})


def _download(
    repository: str,
    source: Source,
    commit: str,
    missing: list[str],
    total_bytes: int | None,
    partial: Path,
    report: Report,
) -> None:
    work_folder = partial / "work"
    shutil.rmtree(work_folder / "temp", ignore_errors=True)  # what a killed fetch left; the library never looks at it

    def work() -> None:
        snapshot_download(
            repository,
            revision=commit,
            cache_dir=work_folder,
            local_dir=partial / "files",
            allow_patterns=[glob.escape(path) for path in missing],
            endpoint=_endpoint(),
            token=_token(),
            quiet=True,
        )

    def tell() -> None:
        done_bytes = size_of(partial / "files") + size_of(work_folder / "temp")
        if total_bytes is not None:
            done_bytes = min(done_bytes, total_bytes)
        report.bytes("downloading", done_bytes, total_bytes, naming(missing))

    tell()
    with _translated(source):
        watch(work, tell)


def _check(entry: Entry, path: Path, source: Source, report: Report) -> None:
    why = None
    if not is_whole(path, entry.size):
        why = "did not arrive whole"
    elif entry.sha256 and not has_hash(path, entry.sha256, path.stat().st_size, report):
        why = "does not have the hash that the hub gives for it"
    if why:
        path.unlink(missing_ok=True)
        raise HubError(f"File {entry.path} of {source.model_id} {why}. Try again.", permanent=False)


def _endpoint() -> str:
    return str(get_endpoint(endpoint=os.environ.get("XINFERENCE_CSG_ENDPOINT") or None))


def _token() -> str | None:
    return os.environ.get("XINFERENCE_CSG_TOKEN") or os.environ.get("CSGHUB_TOKEN") or None


# -- errors


@contextlib.contextmanager
def _translated(source: Source) -> Iterator[None]:
    """Give the library's errors as ours."""
    try:
        yield
    except requests.HTTPError as exc:
        code = exc.response.status_code if exc.response is not None else 0
        if code in (401, 403):
            raise HubError(
                f"{_endpoint()} refuses access to {source.model_id} (HTTP {code}). Check XINFERENCE_CSG_TOKEN.",
                permanent=True,
            ) from exc
        if code == 404:
            raise HubError(
                f"There is no repository {source.model_id} with revision "
                f"{source.model_revision or DEFAULT_REVISION!r} at {_endpoint()}, or it is private. Check its name; "
                "for a private one set XINFERENCE_CSG_TOKEN.",
                permanent=True,
            ) from exc
        raise HubError(
            f"{_endpoint()} answered HTTP {code} for {source.model_id}. Try again later.", permanent=False
        ) from exc
    except requests.exceptions.JSONDecodeError as exc:
        raise HubError(
            f"{_endpoint()} does not answer as a CSGHub does. Check XINFERENCE_CSG_ENDPOINT.", permanent=True
        ) from exc
    except (requests.RequestException, FileDownloadError) as exc:
        raise _unreachable(exc) from exc
    except Exception as exc:
        if type(exc).__module__.startswith("urllib3"):  # its retries end with an error of the layer below
            raise _unreachable(exc) from exc
        raise


def _unreachable(exc: Exception) -> HubError:
    reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip(".")
    return HubError(
        f"{_endpoint()} could not be reached: {reason}. Check the network; XINFERENCE_CSG_ENDPOINT names another "
        "endpoint.",
        permanent=False,
    )
