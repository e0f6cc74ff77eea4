"""The program that fetches one source: `python -P -m registry.hubs.fetch '{"source": ..., "cache": "/dir"}'`.

It prints one JSON object a line on stdout and nothing else; what libraries say goes to stderr:

    {"stage": "waiting"}                      another process is fetching the same source
    {"stage": "finding"}
    {"stage": "downloading", "done_bytes": 1, "total_bytes": 2, "file": "name", "rate_bytes_s": 3, "eta_s": 0.3}
    {"stage": "checking", ...}                as downloading: what is here already is compared with the hub's hash
    {"stage": "extracting", ...}              as downloading
    {"path": "/abs"}                          the end, exit code 0
    {"files": {"name": 1}}                    the end, exit code 0, of an order with "only_list": true: nothing is
                                              fetched, and the bytes of each file that would be are told
    {"error": "sentence", "permanent": true}  the end, exit code 1

total_bytes, rate_bytes_s and eta_s are null while they are unknown. With "offline": true no hub is asked: only what
is here is used. It may be killed at any time: what is not whole is never taken for whole.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import NoReturn, cast

import msgspec

from registry.decode import DecodeError, decode, did_you_mean
from registry.hubs import HUBS
from registry.hubs.base import Hub, HubError, Report
from registry.hubs.cache import find_cached, locked, record
from registry.hubs.choose import is_offline
from registry.schema import Source

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LASTING_ERRNOS = (errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The one argument of this program."""

    source: Source
    cache: str
    offline: bool = False
    only_list: bool = False


class Ended(BaseException):
    """A signal asks this program to end; not an Exception, so that no library takes it for a failure."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def main(argv: Sequence[str]) -> int:
    """Run the program with these arguments and return its exit code."""
    for number in ENDING_SIGNALS:
        signal.signal(number, _end)
    with _private_stdout() as stdout:

        def emit(message: dict[str, object]) -> None:
            stdout.write(msgspec.json.encode(message) + b"\n")

        try:
            request = _request(argv)
            if request.only_list:
                emit({"files": list_files(request)})
            else:
                emit({"path": str(fetch(request, Report(emit)))})
        except HubError as exc:
            emit({"error": str(exc), "permanent": exc.permanent})
        except BrokenPipeError:
            return 1  # nobody reads us any more
        except OSError as exc:
            emit({"error": _os_sentence(exc), "permanent": exc.errno in LASTING_ERRNOS})
        except Exception as exc:  # the edge of the program: whoever runs it reads the last line
            traceback.print_exc()
            emit({"error": f"The fetch failed: {type(exc).__name__}: {exc}", "permanent": False})
        else:
            return 0
        return 1


def fetch(request: Request, report: Report) -> Path:
    """The path of the source's files, fetched now unless they are here.

    Raises:
        HubError: with a sentence for the user.
        OSError: the cache folder cannot be used.
    """
    source, cache = request.source, Path(request.cache)
    _check_known(source)
    if source.model_hub == "local":
        return _hub(source).fetch(source, cache, report).path
    if path := find_cached(source, cache):
        return path
    if request.offline or is_offline(os.environ):
        _go_offline(source)
    with locked(source, cache, lambda: report.stage("waiting")):
        if path := find_cached(source, cache):
            return path
        report.stage("finding")
        fetched = _hub(source).fetch(source, cache, report)
        record(source, cache, fetched)
        return fetched.path


def list_files(request: Request) -> dict[str, int]:
    """The files that `fetch` would get, and the bytes of each, as the hub tells.

    Raises:
        HubError: with a sentence for the user.
    """
    _check_known(request.source)
    if request.source.model_hub != "local" and (request.offline or is_offline(os.environ)):
        _go_offline(request.source)
    return _hub(request.source).list_files(request.source)


def _check_known(source: Source) -> None:
    if source.model_hub not in HUBS:
        hint = did_you_mean(source.model_hub, HUBS, what="Known hubs")
        raise HubError(f"There is no hub {source.model_hub!r}. {hint}", permanent=True)


def _hub(source: Source) -> Hub:
    return cast(Hub, importlib.import_module(HUBS[source.model_hub]))


def _go_offline(source: Source) -> None:
    """Only huggingface_hub tells of files in its cache that others put there whether they are whole."""
    if source.model_hub != "huggingface":
        raise HubError(
            f"{source.model_id} of hub {source.model_hub} is not in the cache, and offline mode forbids to download "
            "it. Unset HOSTLER_OFFLINE and HF_HUB_OFFLINE, or launch it once on a machine with network and copy "
            "its files here for a model_path.",
            permanent=True,
        )
    os.environ["HF_HUB_OFFLINE"] = "1"


def _request(argv: Sequence[str]) -> Request:
    try:
        (text,) = argv
        request = decode(msgspec.json.decode(text), Request)
    except (ValueError, DecodeError) as exc:
        raise HubError(
            f'Give one argument, {{"source": {{...}}, "cache": "/dir"}}, as JSON: {exc}.', permanent=True
        ) from exc
    if not Path(request.cache).is_absolute():
        raise HubError(f"The cache folder {request.cache!r} is not an absolute path.", permanent=True)
    return request


def _private_stdout() -> FileIO:
    """The real stdout for us alone; from now on everything else that prints goes to stderr."""
    sys.stdout.flush()
    stdout = FileIO(os.dup(1), "wb")
    os.dup2(2, 1)
    return stdout


def _os_sentence(exc: OSError) -> str:
    where = f" ({exc.filename})" if exc.filename else ""
    return f"The files could not be written{where}: {exc.strerror or exc}. Check the disk and try again."


def _end(signal_number: int, frame: FrameType | None) -> NoReturn:
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a second one would cut the tidying short
    raise Ended(signal_number)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except Ended as ended:
        code = 128 + ended.signal_number
    sys.stderr.flush()
    # Not sys.exit: a library's threads may still be downloading, and an orderly end would wait for them.
    os._exit(code)
