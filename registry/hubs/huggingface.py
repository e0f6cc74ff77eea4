"""Hub `huggingface`: repositories of the Hugging Face Hub, in that library's own cache.

huggingface_hub reads its settings itself: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and the others.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import threading
import time
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

from registry.hubs.base import (
    REPORT_INTERVAL_S,
    Fetched,
    HubError,
    Report,
    choose_or_explain,
    readable,
)
from registry.hubs.cache import is_locked
from registry.schema import Source

SPARE_BYTES = 64 * 2**20
STALE_AFTER_S = 60
LIST_TIMEOUT_S = 30

# What no engine of ours reads: other frameworks, exports, training state, pictures.
NEVER = re.compile(
    r"(^|/)(\.git\w*|onnx|openvino|coreml|original|runs|checkpoint-\d+|logs|flax|tf)/"
    r"|\.(onnx|onnx_data|h5|msgpack|tflite|ot|mlmodel|mlpackage|pb|npz|gguf|pdf|png|jpe?g|gif|webp|mp4|zip)$"
    r"|(^|/)(\.gitattributes|optimizer\.(pt|bin)|scheduler\.(pt|bin)|training_args\.bin|rng_state[^/]*\.pth)$",
    re.IGNORECASE,
)
SAFETENSORS = re.compile(r"\.safetensors$", re.IGNORECASE)
PICKLES = re.compile(r"\.(bin|pth|pt|ckpt)(\.index\.json)?$", re.IGNORECASE)
CONSOLIDATED = re.compile(r"^consolidated[^/]*\.safetensors$", re.IGNORECASE)

# The library changes its HTTP library between releases; the base of its own error is the root of that one's.
HTTP_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError)


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """What a repository holds: its commit (None if only the cache was asked) and each file's bytes."""

    commit: str | None
    sizes: dict[str, int]


def fetch(source: Source, cache: Path, report: Report) -> Fetched:
    """Get a repository's files that match `source.files`, or those that an engine could need.

    Raises:
        HubError: no such repository, revision or file, no access, no network, or no room.
    """
    with _translated(source):
        listing = _list(source)
    where = f"repository {source.model_id}"
    chosen = (
        choose_or_explain(listing.sizes, source.files, where)
        if source.files
        else what_engines_need(listing.sizes, where)
    )
    missing = _missing(source, listing, chosen)
    _check_room(source, sum(listing.sizes[name] for name in missing))
    folder = _download(source, listing, chosen, missing, report)
    files = tuple(folder / name for name in chosen)
    return Fetched(path=files[0] if source.files else folder, files=files)


def what_engines_need(sizes: dict[str, int], where: str) -> list[str]:
    """All of a repository but what no engine reads; safetensors go before pickles of the same weights.

    Raises:
        HubError: nothing is left.
    """
    chosen = sorted(name for name in sizes if not NEVER.search(name))
    safe_folders = {_folder(name) for name in chosen if SAFETENSORS.search(name)}
    chosen = [n for n in chosen if not (PICKLES.search(n) and _folder(n) in safe_folders)]
    # Some publishers put the same weights there twice: for everyone, and for their own library.
    if any(SAFETENSORS.search(n) and not CONSOLIDATED.search(n) for n in chosen):
        chosen = [n for n in chosen if not CONSOLIDATED.search(n)]
    if not chosen:
        ggufs = sorted(name for name in sizes if name.lower().endswith(".gguf"))
        hint = "Say which GGUF file by a quantization or a model_file." if ggufs else "Check model_id."
        raise HubError(f"No file in {where} is of use to an engine. {hint}", permanent=True)
    return chosen


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


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


def _check_room(source: Source, needed_bytes: int) -> None:
    folder = Path(constants.HF_HUB_CACHE).expanduser()
    while not folder.exists():
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes and free_bytes < needed_bytes + SPARE_BYTES:
        needed = readable(needed_bytes + SPARE_BYTES)
        raise HubError(
            f"The disk is too small for {source.model_id}: it takes {needed} and "
            f"{readable(free_bytes)} are free at {folder}. Free some space, or set HF_HOME to a larger disk.",
            permanent=True,
        )


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
    _remove_stale(source)
    progress = _Progress()
    result: list[str | Exception] = []

    def work() -> None:
        try:
            result.append(
                snapshot_download(
                    source.model_id,
                    revision=source.model_revision,
                    allow_patterns=[glob.escape(name) for name in chosen],
                    tqdm_class=progress.bar_class(),
                    local_files_only=listing.commit is None,
                )
            )
        except Exception as exc:  # the edge of the thread: raised again below
            result.append(exc)

    # A daemon, so that the end of the program need not wait for the network.
    thread = threading.Thread(target=work, name="download", daemon=True)
    thread.start()
    total_bytes = sum(listing.sizes[name] for name in missing)
    file = missing[0].rpartition("/")[2] if len(missing) == 1 else f"{len(missing)} files"
    try:
        while thread.is_alive():
            thread.join(REPORT_INTERVAL_S)
            if missing:
                report.bytes("downloading", min(progress.done_bytes, total_bytes), total_bytes, file)
    except BaseException:
        _remove_own_partials()
        raise
    with _translated(source):
        (outcome,) = result
        if isinstance(outcome, Exception):
            raise outcome
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


def _blobs(source: Source) -> Path:
    name = "--".join(["models", *source.model_id.split("/")])
    return Path(constants.HF_HUB_CACHE).expanduser() / name / "blobs"


def _remove_stale(source: Source) -> None:
    """Delete what killed downloads left: the library never goes on with a partial file of another process.

    A download at work holds the lock of its blob; where locks do not work, it shows by its writing.
    """
    blobs = _blobs(source)
    locks = blobs.parent.parent / ".locks" / blobs.parent.name
    for partial in blobs.glob("*.incomplete"):
        with contextlib.suppress(OSError):
            is_quiet = time.time() - partial.stat().st_mtime > STALE_AFTER_S
            if is_quiet and not is_locked(locks / f"{partial.name.partition('.')[0]}.lock"):
                partial.unlink()


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
                f"Revision {revision} of {repo} is not whole in the cache {constants.HF_HUB_CACHE}, "
                "and HF_HUB_OFFLINE forbids to download it. Unset it, or copy the files there.",
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
