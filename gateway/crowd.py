"""More clients than open files: who is refused, and how they learn of it. Knows nothing of models."""

from __future__ import annotations

import logging
from collections.abc import Sized

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import metrics
from gateway.errors import NoMoreFiles, answer

logger = logging.getLogger("hostler.crowd")

RESERVED_FILES = 256  # for logs, pipes and files
OPEN_TO_ALL = frozenset({"/health", "/ready", "/metrics"})


class Crowd:
    """An ASGI app that refuses requests while more clients are connected than open files suffice for.

    Each may need two: its own connection and one to an engine. What is refused learns when to come back, and its
    connection is closed; who looks after the gateway (`OPEN_TO_ALL`) is let in.
    """

    def __init__(self, app: ASGIApp, connections: Sized, open_files: int) -> None:
        """`connections` are those that are open now."""
        self._app = app
        self._connections = connections
        self.most = max(1, (open_files - min(RESERVED_FILES, open_files // 4)) // 2)
        self._is_crowded = False

    def is_open(self) -> bool:
        """Whether requests are taken, and nothing is to be said of it."""
        return not self._is_crowded and len(self._connections) <= self.most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse."""
        count = len(self._connections)
        if count <= self.most:
            if self._is_crowded:
                self._is_crowded = False
                logger.warning("%d clients are connected; requests are taken again.", count)
            await self._app(scope, receive, send)
        elif scope["type"] != "http" or scope["path"] in OPEN_TO_ALL:
            await self._app(scope, receive, send)
        else:
            await self._refuse(count)(scope, receive, send)

    def _refuse(self, count: int) -> ASGIApp:
        text = (
            f"{count} clients are connected, and the system's limit of open files suffices for {self.most}. Come back "
            "in a moment; for more at once, raise the limit where the gateway starts (`ulimit -n`)."
        )
        if not self._is_crowded:
            self._is_crowded = True
            logger.error("Requests are refused: %s", text)
        metrics.TURNED_AWAY.inc()
        response = answer(NoMoreFiles(text))
        response.headers["connection"] = "close"
        return response
