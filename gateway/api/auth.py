"""Who may call: the one check of keys and origins, as plain ASGI."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.addresses import host_of, is_loopback
from gateway.config import Settings
from gateway.errors import BadKey, Forbidden, RequestRefused, answer

# What answers without a key: probes, and the question whether there is one.
PUBLIC_PATHS = frozenset({"/", "/health", "/ready", "/v1/cluster/auth"})
PUBLIC_FILES = "/v1/files/"  # whose names nobody can guess


class Guard:
    """Lets a request through to the app, or answers 401 or 403."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._digests = tuple(_digest(key.encode()) for key in settings.api_keys)
        self._origins = frozenset(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then pass on."""
        if scope["type"] == "http":
            try:
                self.check(scope["path"], scope["headers"])
            except RequestRefused as exc:
                await answer(exc)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def check(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises BadKey or Forbidden if the request may not pass."""
        if path in PUBLIC_PATHS or path.startswith(PUBLIC_FILES):
            return
        key = origin = None
        for name, value in headers:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                key = value[7:].strip()
            elif name == b"x-api-key" and key is None:
                key = value
            elif name == b"origin":
                origin = value.decode("latin-1")
        if self._digests:
            self._check_key(key)
        elif origin is not None:
            self._check_origin(origin)

    def _check_key(self, key: bytes | None) -> None:
        if key is None:
            raise BadKey("This gateway needs an API key: send it as `Authorization: Bearer KEY`.")
        digest = _digest(key)
        # All are compared, so that the time says nothing of which one was near.
        if not sum([hmac.compare_digest(digest, known) for known in self._digests]):
            raise BadKey("Could not validate credentials: the API key is not one of this gateway's.")

    def _check_origin(self, origin: str) -> None:
        """Without a key, any page in the user's browser could call us; only local ones may."""
        if {origin, "*"} & self._origins or is_loopback(host_of(origin)):
            return
        raise Forbidden(
            f"A web page of {origin} may not call this gateway. Add it to `allowed_origins`, or set `api_keys`."
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
