"""Catalogues of a site that lie behind a URL: fetched, checked, and kept for when nobody answers."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from registry.catalogue import read
from registry.decode import DecodeError
from registry.hubs.choose import is_offline

logger = logging.getLogger("hostler.catalogue")

LIMIT_S = 20.0
LIMIT_BYTES = 32 * 2**20
SCHEMES = ("https://", "http://")


def is_url(name: str) -> bool:
    """Whether a catalogue is named by its URL rather than by a file."""
    return name.lower().startswith(SCHEMES)


def catalogue_file(url: str, folder: Path, *, must_fetch: bool = False) -> Path:
    """The file that has the catalogue of a URL, fetched now, or a kept one if that cannot be had.

    Args:
        folder: where copies are kept.
        must_fetch: a kept one is not good enough.
    Raises:
        DecodeError: it cannot be had, or is wrong, and there is no copy; what is kept is not touched.
    """
    copy = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.json"
    try:
        if is_offline(os.environ):
            raise DecodeError(f"The catalogue {url} was not asked for, as HOSTLER_OFFLINE is set.")
        _keep(_fetch(url), copy, url)
    except DecodeError as exc:
        if must_fetch or not copy.exists():
            raise
        logger.warning("%s The copy of its last fetch is used.", exc)
    return copy


def catalogue_files(names: Iterable[str], folder: Path, *, must_fetch: bool = False) -> list[Path]:
    """The files of a site's catalogues, each named by a path or a URL.

    Raises:
        DecodeError: as `catalogue_file`.
    """
    return [
        catalogue_file(name, folder, must_fetch=must_fetch) if is_url(name) else Path(name).expanduser().absolute()
        for name in names
    ]


def _fetch(url: str) -> bytes:
    opener = urllib.request.OpenerDirector()  # build_opener would follow a redirect to ftp: too
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    try:
        with opener.open(url, timeout=LIMIT_S) as response:
            content = _read(response, url)
    except urllib.error.HTTPError as exc:
        with exc:
            raise DecodeError(f"The catalogue {url} cannot be had: {exc.code} {exc.reason}.") from exc
    except (OSError, HTTPException, ValueError) as exc:
        raise DecodeError(f"The catalogue {url} cannot be had: {getattr(exc, 'reason', exc)}.") from exc
    return content


def _read(response: HTTPResponse, url: str) -> bytes:
    """The whole body, if it is not too large and comes in time."""
    ends_at = time.monotonic() + LIMIT_S
    content = bytearray()
    while chunk := response.read1(65536):
        content += chunk
        if len(content) > LIMIT_BYTES:
            raise DecodeError(f"The catalogue {url} is larger than {LIMIT_BYTES} bytes.")
        if time.monotonic() > ends_at:
            raise DecodeError(f"The catalogue {url} did not come within {LIMIT_S:g} s.")
    if response.length:
        raise DecodeError(f"The catalogue {url} broke off before its end.")
    return bytes(content)


def _keep(content: bytes, copy: Path, url: str) -> None:
    """In place of the copy, once it has shown itself to be a catalogue."""
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=copy.stem, suffix=".partial", dir=copy.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            read(Path(partial))
            os.replace(partial, copy)
        except DecodeError as exc:
            raise DecodeError(str(exc).replace(partial, url)) from exc
        finally:
            Path(partial).unlink(missing_ok=True)
    except OSError as exc:
        raise DecodeError(f"The catalogue {url} cannot be kept in {copy.parent}: {exc.strerror}.") from exc
