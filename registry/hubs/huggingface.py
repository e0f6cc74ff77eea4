"""Hub `huggingface`: repositories of the Hugging Face Hub, in that library's own cache.

huggingface_hub reads its settings itself: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and the others.
"""

from __future__ import annotations

import contextlib
import glob
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from registry.hubs.base import Fetched, HubError, Report, choose_files
from registry.hubs.download import check_room, naming, watch
from registry.hubs.places import remove_stale_blobs, repository_folder
from registry.schema import Source

LIST_TIMEOUT_S = 30

# The library changes its HTTP library between releases; the base of its own error is the root of that one's.
HTTP_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError)


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """What a repository holds: its commit (None if only the cache was asked) and each file's bytes."""

    commit: str | None
    sizes: dict[str, int]


def list_files(source: Source) -> dict[str, int]:
    """The files that `fetch` would get, and the bytes of each.

    Raises:
        HubError: no such repository, revision or file, no access, or no network.
    """
    with _translated(source):
        listing = _list(source)
    return {name: listing.sizes[name] for name in choose_files(source, listing.sizes)}


def fetch(source: Source, cache: Path, report: Report) -> Fetched:
    """Get a repository's files that match `source.files`, or those that an engine could need.

    Raises:
        HubError: no such repository, revision or file, no access, no network, or no room.
    """
    with _translated(source):
        listing = _list(source)
    chosen = choose_files(source, listing.sizes)
    missing = _missing(source, listing, chosen)
    check_room(
        Path(constants.HF_HUB_CACHE).expanduser(),
        sum(listing.sizes[name] for name in missing),
        source.model_id,
        advice="set HF_HOME to a larger disk",
    )
    folder = _download(source, listing, chosen, missing, report)
    files = tuple(folder / name for name in chosen)
    return Fetched(path=files[0] if source.files else folder, files=files)


def _list(source: Source) -> Listing:
    try:
        info = HfApi().model_info(
            source.model_id, revision=source.model_revision, files_metadata=True, timeout=LIST_TIMEOUT_S
        )
    except OfflineModeIsEnabled:
        return _list_cached(source)
    except HfHubHTTPError as exc:
        if exc.response.status_code < 500:
            raise
        return _list_cached(source, exc)
    except HTTP_ERRORS as exc:
        return _list_cached(source, exc)
    return Listing(commit=info.sha, sizes={f.rfilename: f.size or 0 for f in info.siblings or ()})


def _list_cached(source: Source, cause: Exception | None = None) -> Listing:
    """What the library's cache knows of the repository, for when the hub cannot be asked."""
    try:
        tree = get_cached_repo_tree(source.model_id, revision=source.model_revision)
        return Listing(commit=None, sizes={file.path: file.size for file in tree})
    except CachedRepoTreeNotFoundError:
        pass
    try:
        folder = Path(snapshot_download(source.model_id, revision=source.model_revision, local_files_only=True))
    except LocalEntryNotFoundError:
        if cause is not None:
            raise cause from None
        raise
    paths = (path for path in folder.rglob("*") if path.is_file())
    return Listing(commit=None, sizes={path.relative_to(folder).as_posix(): path.stat().st_size for path in paths})


def _missing(source: Source, listing: Listing, chosen: list[str]) -> list[str]:
    if listing.commit is None:
        return []
    return [
        name
        for name in chosen
        if not isinstance(
            try_to_load_from_cache(source.model_id, name, revision=listing.commit),
            str,
        )
    ]


# -- the download


class _Progress:
    """How many bytes all bars of one download have seen; written by its threads, read by ours."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.done_bytes = 0

    def add(self, count: float | None) -> None:
        with self._lock:
            self.done_bytes += int(count or 0)

    def bar_class(self) -> type[Any]:
        """A progress bar for huggingface_hub that counts instead of drawing."""
        progress = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                # Of the two bars of bytes the other one counts what the network moved, compressed.
                name = str(kwargs.get("name"))
                self._is_counted = kwargs.get("unit") == "B" and not name.endswith(".transfer")
                super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> bool | None:
                if self._is_counted:
                    progress.add(n)
                return None

        return Bar


def _download(source: Source, listing: Listing, chosen: list[str], missing: list[str], report: Report) -> Path:
    """Run the library's download in a thread and report meanwhile; the snapshot's folder."""
    # The library never goes on with a partial file of another process.
    remove_stale_blobs(_repository(source))
    progress = _Progress()

    def work() -> str:
        return snapshot_download(
            source.model_id,
            revision=source.model_revision,
            allow_patterns=[glob.escape(name) for name in chosen],
            tqdm_class=progress.bar_class(),
            local_files_only=listing.commit is None,
        )

    total_bytes = sum(listing.sizes[name] for name in missing)

    def tell() -> None:
        if missing:
            report.bytes("downloading", min(progress.done_bytes, total_bytes), total_bytes, naming(missing))

    try:
        with _translated(source):
            outcome = watch(work, tell)
    except HubError:
        raise
    except BaseException:
        _remove_own_partials()
        raise
    folder = Path(outcome)
    for name in chosen:
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != listing.sizes[name]:
            raise HubError(
                f"File {name} of {source.model_id} is not whole: {size} of {listing.sizes[name]} bytes. "
                "Try again; if that does not help, delete it from the Hugging Face cache.",
                permanent=False,
            )
    return folder


def _repository(source: Source) -> Path:
    return repository_folder(Path(constants.HF_HUB_CACHE).expanduser(), source.model_id)


def _remove_own_partials() -> None:
    """Delete the partial files that this process has open; others may be at work in the same folder."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        return
    for descriptor in descriptors.iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(descriptor)
            if target.endswith(".incomplete"):
                os.unlink(target)


# -- errors


@contextlib.contextmanager
def _translated(source: Source) -> Iterator[None]:
    """Give the library's errors as ours."""
    repo, revision = source.model_id, source.model_revision or constants.DEFAULT_REVISION
    try:
        yield
    except HFValidationError as exc:
        raise HubError(f"{repo!r} is not the name of a repository, such as owner/name.", permanent=True) from exc
    except GatedRepoError as exc:
        raise HubError(
            f"Repository {repo} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then set HF_TOKEN "
            "to a token of that account.",
            permanent=True,
        ) from exc
    except RepositoryNotFoundError as exc:
        raise HubError(
            f"There is no repository {repo} at {constants.ENDPOINT}, or it is private. Check its name; for a "
            "private one set HF_TOKEN.",
            permanent=True,
        ) from exc
    except RevisionNotFoundError as exc:
        raise HubError(f"Repository {repo} has no revision {revision!r}.", permanent=True) from exc
    except DisabledRepoError as exc:
        raise HubError(f"Repository {repo} has been disabled at {constants.ENDPOINT}.", permanent=True) from exc
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as exc:
        if constants.is_offline_mode():
            raise HubError(
                f"Revision {revision} of {repo} is not whole in the cache {constants.HF_HUB_CACHE}, and offline mode "
                "forbids to download it. Unset HOSTLER_OFFLINE and HF_HUB_OFFLINE, or copy the files there.",
                permanent=True,
            ) from exc
        raise _unreachable(exc) from exc
    except HfHubHTTPError as exc:
        code = exc.response.status_code
        if code in (401, 403):
            raise HubError(
                f"{constants.ENDPOINT} refuses access to {repo} (HTTP {code}). Check HF_TOKEN.",
                permanent=True,
            ) from exc
        raise HubError(
            f"{constants.ENDPOINT} answered HTTP {code} for {repo}. Try again later.", permanent=False
        ) from exc
    except HTTP_ERRORS as exc:
        if isinstance(exc, OSError) and exc.filename:
            raise  # the disk, not the network
        raise _unreachable(exc) from exc


def _unreachable(exc: Exception) -> HubError:
    reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
    return HubError(
        f"{constants.ENDPOINT} could not be reached: {reason}. Check the network; HF_ENDPOINT names another endpoint.",
        permanent=False,
    )
