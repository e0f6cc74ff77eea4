"""Hub `openmind_hub`: repositories of Modelers, in that library's own cache, as it writes nowhere else below a home.

openmind_hub reads OPENMIND_HUB_ENDPOINT and XDG_CACHE_HOME itself; OPENMIND_HUB_TOKEN names the account. It goes on
with what it has of a file, checks each file's hash and keeps it by commit.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from registry.hubs.base import Fetched, HubError, Report, choose_files
from registry.hubs.download import check_names, check_room, is_whole, library, naming, owner_and_name, size_of, watch
from registry.hubs.places import openmind_cache, repository_folder
from registry.schema import Source

os.environ.setdefault("OM_HUB_DISABLE_PROGRESS_BARS", "1")

with library("openmind_hub", "openmind_hub"):
    import requests
    from openmind_hub import (
        GatedRepoError,
        OmApi,
        OMValidationError,
        RepoFile,
        RepositoryNotFoundError,
        snapshot_download,
    )

DEFAULT_REVISION = "main"


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """What a repository holds at a commit: each file's bytes."""

    commit: str
    sizes: dict[str, int]


def list_files(source: Source) -> dict[str, int]:
    """The files that `fetch` would get, and the bytes of each.

    Raises:
        HubError: the library is missing; no such repository, revision or file, no access, or no network.
    """
    owner_and_name(source)
    with _translated(source):
        sizes = _list(source).sizes
    return {name: sizes[name] for name in choose_files(source, sizes)}


def fetch(source: Source, cache: Path, report: Report) -> Fetched:
    """Get a repository's files that match `source.files`, or those that an engine could need.

    Raises:
        HubError: the library is missing; no such repository, revision or file, no access, no network, or no room.
    """
    owner_and_name(source)
    with _translated(source):
        listing = _list(source)
    chosen = choose_files(source, listing.sizes)
    check_names([*chosen, listing.commit], source)
    library_cache = openmind_cache(os.environ)
    repository = repository_folder(library_cache, source.model_id)
    folder = repository / "snapshots" / listing.commit
    missing = [name for name in chosen if not is_whole(folder / name, listing.sizes[name])]
    total_bytes = sum(listing.sizes[name] for name in missing)
    check_room(library_cache, total_bytes, source.model_id, advice="set XDG_CACHE_HOME to a larger disk")
    if missing:
        _download(source, missing, total_bytes, repository / "blobs", report)
    for name in chosen:
        if not is_whole(folder / name, listing.sizes[name]):
            raise HubError(f"File {name} of {source.model_id} did not arrive whole. Try again.", permanent=False)
    files = tuple(folder / name for name in chosen)
    return Fetched(path=files[0] if source.files else folder, files=files)


def _list(source: Source) -> Listing:
    api = OmApi(token=_token())
    revision = source.model_revision or DEFAULT_REVISION
    commit = api.get_repo_last_commit(source.model_id, revision=revision, token=_token()).oid
    tree = api.list_repo_tree(source.model_id, recursive=True, revision=revision, token=_token())
    return Listing(commit=commit, sizes={file.path: file.size for file in tree if isinstance(file, RepoFile)})


def _download(source: Source, missing: list[str], total_bytes: int, blobs: Path, report: Report) -> None:
    before_bytes = size_of(blobs) - sum(path.stat().st_size for path in blobs.glob("*.incomplete"))

    def work() -> None:
        snapshot_download(
            source.model_id,
            revision=source.model_revision or DEFAULT_REVISION,
            allow_patterns=[glob.escape(name) for name in missing],
            token=_token(),
        )

    def tell() -> None:
        done_bytes = max(0, min(size_of(blobs) - before_bytes, total_bytes))
        report.bytes("downloading", done_bytes, total_bytes, naming(missing))

    tell()
    with _translated(source):
        watch(work, tell)


def _token() -> str | None:
    return os.environ.get("OPENMIND_HUB_TOKEN") or None


# -- errors


@contextlib.contextmanager
def _translated(source: Source) -> Iterator[None]:
    """Give the library's errors as ours."""
    try:
        yield
    except RuntimeError as exc:
        if exc.__cause__ is None:
            raise
        with _translated(source):
            raise exc.__cause__ from None  # ten tries ended with this
    except requests.HTTPError as exc:
        code = exc.response.status_code if exc.response is not None else 0
        if code in (401, 403) or isinstance(exc, GatedRepoError):
            raise HubError(
                f"Modelers refuses access to {source.model_id} (HTTP {code}). Check OPENMIND_HUB_TOKEN.",
                permanent=True,
            ) from exc
        if code == 404 or isinstance(exc, RepositoryNotFoundError):
            raise HubError(
                f"There is no repository {source.model_id} with revision "
                f"{source.model_revision or DEFAULT_REVISION!r} at Modelers, or it is private. Check its name; for a "
                "private one set OPENMIND_HUB_TOKEN.",
                permanent=True,
            ) from exc
        raise HubError(
            f"Modelers answered HTTP {code} for {source.model_id}. Try again later.", permanent=False
        ) from exc
    except requests.RequestException as exc:
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip(".")
        raise HubError(
            f"Modelers could not be reached: {reason}. Check the network; OPENMIND_HUB_ENDPOINT names another "
            "endpoint.",
            permanent=False,
        ) from exc
    except OMValidationError as exc:
        raise HubError(f"The library of Modelers refuses {source.model_id}: {exc}.", permanent=True) from exc
    except (KeyError, ValueError) as exc:  # an answer that it does not understand, or a file with another hash
        raise HubError(f"{source.model_id} could not be had of Modelers: {exc}. Try again.", permanent=False) from exc
