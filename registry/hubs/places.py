"""Where the hubs' libraries keep their files, and what killed downloads left there. Imports no library.

<library's cache>/models--<owner>--<name>/blobs/<hash>              a file's bytes; `.incomplete` until whole
<library's cache>/models--<owner>--<name>/snapshots/<commit>/<path> a link to it
<library's cache>/.locks/models--<owner>--<name>/<hash>.lock        held while it is downloaded
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

from registry.hubs.cache import is_locked

STALE_AFTER_S = 60


def huggingface_cache(environment: Mapping[str, str]) -> Path:
    """The folder of huggingface_hub's files."""
    if folder := environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder).expanduser()
    home = environment.get("HF_HOME") or os.path.join(_user_cache(environment), "huggingface")
    return Path(home).expanduser() / "hub"


def openmind_cache(environment: Mapping[str, str]) -> Path:
    """The folder of openmind_hub's files."""
    return Path(_user_cache(environment)).expanduser() / "openmind" / "hub"


def modelscope_cache(environment: Mapping[str, str]) -> Path:
    """The folder of modelscope's files. They are read from there, never written."""
    home = environment.get("HOME", "~")
    return Path(environment.get("MODELSCOPE_CACHE") or os.path.join(home, ".cache", "modelscope")).expanduser()


def repository_folder(library_cache: Path, model_id: str) -> Path:
    """The folder of one repository in such a cache."""
    return library_cache / "--".join(["models", *model_id.split("/")])


def stale_blobs(repository: Path) -> list[Path]:
    """What killed downloads left in that repository's folder.

    A download at work holds the lock of its blob; where locks do not work, it shows by its writing.
    """
    locks = repository.parent / ".locks" / repository.name
    stale = []
    for partial in (repository / "blobs").glob("*.incomplete"):
        with contextlib.suppress(OSError):
            is_quiet = time.time() - partial.stat().st_mtime > STALE_AFTER_S
            if is_quiet and not is_locked(locks / f"{partial.name.partition('.')[0]}.lock"):
                stale.append(partial)
    return stale


def remove_stale_blobs(repository: Path) -> None:
    """Delete what killed downloads left in that repository's folder."""
    for partial in stale_blobs(repository):
        with contextlib.suppress(OSError):
            partial.unlink()


def _user_cache(environment: Mapping[str, str]) -> str:
    return environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", "~"), ".cache")
