"""A small client of our own HTTP API, for the command line. Standard library only, so that it starts fast."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import quote, urlencode

from gateway.addresses import host_of, is_loopback

KEY_VARIABLE = "HOSTLER_API_KEY"  # what we send; a gateway that sees it at its start accepts it
ENDPOINT_VARIABLE = "HOSTLER_ENDPOINT"
DEFAULT_ENDPOINT = "http://127.0.0.1:9997"
LIMIT_S = 30.0


class ClientError(Exception):
    """The gateway refused or cannot be reached; the text is for the user."""


class Client:
    """Talks to one gateway.

    Args:
        endpoint: its address; else HOSTLER_ENDPOINT, else the default address.
        api_key: else HOSTLER_API_KEY.
    """

    def __init__(self, endpoint: str | None = None, api_key: str | None = None) -> None:
        self.endpoint = (endpoint or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT).rstrip("/")
        self._api_key = api_key or os.environ.get(KEY_VARIABLE)
        host = host_of(self.endpoint)
        if not host or not self.endpoint.startswith(("http://", "https://")):
            raise ClientError(f"{self.endpoint!r} is no address of a gateway: give one such as {DEFAULT_ENDPOINT}.")
        # A proxy that is set for the world must not get between us and this machine.
        proxies: dict[str, str] | None = {} if is_loopback(host) else None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))

    def get(self, path: str, **query: Any) -> Any:
        """GET, decoded from JSON."""
        with closing(self._open("GET", path, query)) as response:
            return json.load(response)

    def post(self, path: str, body: Any = None, limit_s: float | None = LIMIT_S, **query: Any) -> Any:
        """POST a body as JSON, decoded from JSON."""
        with closing(self._open("POST", path, query, body, limit_s)) as response:
            return json.load(response)

    def text_lines(self, path: str, **query: Any) -> Iterator[str]:
        """GET text, line by line as it comes, for as long as it comes."""
        with closing(self._open("GET", path, query, limit_s=None)) as response:
            for line in response:
                yield line.decode(errors="replace").rstrip("\r\n")

    def events(self, path: str, body: Any) -> Iterator[Any]:
        """POST and read the answer's events: decoded from JSON, or a comment's text.

        Raises:
            ClientError: the stream holds an error, or broke off before its end.
        """
        with closing(self._open("POST", path, {}, body, limit_s=None)) as response:
            for raw in response:
                line = raw.decode(errors="replace").strip()
                if line.startswith(":"):
                    yield line[1:].strip()
                if not line.startswith("data:"):
                    continue
                if (data := line[5:].strip()) == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ClientError(event["error"]["message"])
                yield event
        raise ClientError("The answer broke off before its end.")

    def _open(
        self, method: str, path: str, query: dict[str, Any], body: Any = None, limit_s: float | None = LIMIT_S
    ) -> http.client.HTTPResponse:
        url = self.endpoint + path + (f"?{urlencode(query)}" if query else "")
        request = urllib.request.Request(url, method=method)  # noqa: S310 (the user's own endpoint)
        if self._api_key:
            request.add_header("Authorization", f"Bearer {self._api_key}")
        if method == "POST":
            request.data = json.dumps(body).encode() if body is not None else b""
            request.add_header("Content-Type", "application/json")
        try:
            response: http.client.HTTPResponse = self._opener.open(request, timeout=limit_s)
        except urllib.error.HTTPError as exc:
            raise ClientError(_refusal(exc)) from exc
        except (OSError, ValueError, http.client.HTTPException) as exc:
            reason = getattr(exc, "reason", exc)
            raise ClientError(
                f"There is no gateway at {self.endpoint} ({reason}). Start one with `hostler serve`, or say where it "
                f"is with --endpoint or {ENDPOINT_VARIABLE}."
            ) from exc
        return response


def model_path(uid: str, rest: str = "") -> str:
    """The path of a model, or of something below it."""
    return f"/v1/models/{quote(uid)}{rest}"


def _refusal(exc: urllib.error.HTTPError) -> str:
    try:
        message = str(json.load(exc)["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"{exc.code} {exc.reason}"
    if exc.code == 401:
        return f"{message} Give it with --api-key or {KEY_VARIABLE}."
    return message
