"""Who may call: the one check of keys, origins and hosts, as plain ASGI."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.addresses import host_of, is_address, is_any_address, is_loopback
from gateway.config import Settings
from gateway.errors import BadKey, Forbidden, RequestRefused, StrangeHost, answer

# What answers without a key: probes, and the question whether there is one.
PUBLIC_PATHS = frozenset({"/", "/health", "/ready", "/v1/cluster/auth"})
PUBLIC_FILES = "/v1/files/"  # whose names nobody can guess
HOSTS_REMEMBERED = 64
KEYS_REMEMBERED = 64


class Guard:
    """Lets a request through to the app, or answers 401 or 403."""

    def __init__(self, app: ASGIApp, settings: Callable[[], Settings]) -> None:
        """`settings` gives those in effect."""
        self._app = app
        self._settings = settings
        self._read(settings())

    def _read(self, settings: Settings) -> None:
        self._known = settings
        self._digests = tuple(_digest(key.encode()) for key in settings.api_keys)
        self._origins = frozenset(settings.allowed_origins)
        self._names = frozenset(name.lower() for name in (settings.host, *settings.allowed_hosts))
        self._is_on_all = is_any_address(settings.host)
        self._good_hosts: set[bytes] = set()  # headers that have passed already
        self._good_bearers: set[bytes] = set()  # as these; the hash is keyed, so that the time tells nobody of them

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
        if (settings := self._settings()) is not self._known:
            self._read(settings)
        if path in PUBLIC_PATHS or path.startswith(PUBLIC_FILES):
            return
        key = bearer = origin = None
        hosts: list[bytes] = []
        for name, value in headers:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                key, bearer = value[7:].strip(), value
            elif name == b"x-api-key" and key is None:
                key = value
            elif name == b"origin":
                origin = value.decode("latin-1")
            elif name == b"host":
                hosts.append(value)
        if self._digests:
            self._check_key(key)
            if bearer is not None and len(self._good_bearers) < KEYS_REMEMBERED:
                self._good_bearers.add(bearer)
            return
        for host in hosts:
            if host not in self._good_hosts:
                self._check_host(host)
        if origin is not None:
            self._check_origin(origin)

    def knows(self, host: bytes, authorization: bytes) -> bool:
        """Whether `check` has let pass a request with these headers, and none else that it looks at."""
        if self._settings() is not self._known:
            return False
        return authorization in self._good_bearers if self._digests else host in self._good_hosts

    def _check_key(self, key: bytes | None) -> None:
        if key is None:
            raise BadKey("This gateway needs an API key: send it as `Authorization: Bearer KEY`.")
        digest = _digest(key)
        # All are compared, so that the time says nothing of which one was near.
        if not sum([hmac.compare_digest(digest, known) for known in self._digests]):
            raise BadKey("Could not validate credentials: the API key is not one of this gateway's.")

    def _check_host(self, header: bytes) -> None:
        """Without a key, a page whose name is made to point at this machine would count as our own."""
        text = header.decode("latin-1")
        host = host_of(f"//{text}")
        is_ours = is_loopback(host) or (self._is_on_all and is_address(host))
        if not (is_ours or {host, "*"} & self._names):
            raise StrangeHost(
                f"This gateway is not called {text!r}. Add the name to `allowed_hosts`, or set `api_keys`."
            )
        if len(self._good_hosts) < HOSTS_REMEMBERED:
            self._good_hosts.add(header)

    def _check_origin(self, origin: str) -> None:
        """Without a key, any page in the user's browser could call us; only local ones may."""
        if {origin, "*"} & self._origins or is_loopback(host_of(origin)):
            return
        raise Forbidden(
            f"A web page of {origin} may not call this gateway. Add it to `allowed_origins`, or set `api_keys`."
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
