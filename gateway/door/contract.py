"""What the door relies on in uvicorn, which is not its public API: looked at before the door is used.

What is not as it was makes the plain route answer everything, and a line in the log say so.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

FIRST, BEFORE = "0.40", "1"  # as in pyproject.toml
PROTOCOL = "uvicorn.protocols.http.httptools_impl"

# Method -> its parameters, and the names that its code must and may use of `self`: others would mean a way that we do
# not know of.
METHODS = {
    "connection_made": ("self", "transport"),
    "connection_lost": ("self", "exc"),
    "data_received": ("self", "data"),
    "on_message_begin": ("self",),
    "on_url": ("self", "url"),
    "on_header": ("self", "name", "value"),
    "on_headers_complete": ("self",),
    "on_body": ("self", "body"),
    "on_message_complete": ("self",),
    "on_response_complete": ("self",),
    "_start_asgi_task": ("self", "cycle", "app"),
    "shutdown": ("self",),
    "pause_writing": ("self",),
    "resume_writing": ("self",),
}
# What their code must speak of.
ATTRIBUTES = frozenset(
    [
        "connections",
        "cycle",
        "expect_100_continue",
        "flow",
        "headers",
        "message_event",
        "more_body",
        "parser",
        "pipeline",
        "response_complete",
        "scope",
        "server_state",
        "tasks",
        "total_requests",
        "transport",
        "url",
        "disconnected",
        "keep_alive",
    ]
)
# All that is asked of the parser while a head is passed on: a stand-in answers it when that is done later.
ASKED_OF_PARSER = frozenset(("feed_data", "get_http_version", "get_method", "should_keep_alive", "should_upgrade"))


def breach() -> str | None:
    """What is not as the door needs it; None if all is."""
    return next(_breaches(), None)


def _breaches() -> Iterator[str]:
    try:
        found = version("uvicorn")
        module = importlib.import_module(PROTOCOL)
    except (ImportError, PackageNotFoundError) as exc:
        yield f"uvicorn's httptools protocol is not there: {exc}"
        return
    if not _numbers(FIRST) <= _numbers(found) < _numbers(BEFORE):
        yield f"uvicorn is {found}, and the door knows those from {FIRST} on and before {BEFORE}"
    protocol = getattr(module, "HttpToolsProtocol", None)
    if protocol is None or not isinstance(getattr(module, "STATUS_LINE", None), dict):
        yield f"{PROTOCOL} has no HttpToolsProtocol or no STATUS_LINE"
        return
    spoken: set[str] = set()
    for name, parameters in METHODS.items():
        method = getattr(protocol, name, None)
        if method is None or tuple(inspect.signature(method).parameters) != parameters:
            yield f"uvicorn's HttpToolsProtocol has no {name}({', '.join(parameters)})"
            return
        spoken.update(method.__code__.co_names)
    cycle = getattr(module, "RequestResponseCycle", None)
    if cycle is None or "waiting_for_100_continue" not in cycle.receive.__code__.co_names:
        yield "uvicorn's RequestResponseCycle no longer knows waiting_for_100_continue"
    if missing := ATTRIBUTES - spoken:
        yield f"uvicorn's HttpToolsProtocol no longer speaks of {', '.join(sorted(missing))}"
    if missing := ASKED_OF_PARSER - spoken:
        yield f"uvicorn's HttpToolsProtocol no longer asks its parser for {', '.join(sorted(missing))}"


def _numbers(release: str) -> tuple[int, ...]:
    """Enough to compare with, and `packaging` takes a megabyte."""
    return tuple(map(int, re.findall(r"\d+", release)[:2]))
