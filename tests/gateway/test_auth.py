"""Who may call: keys, public paths and origins, seen as plain ASGI."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from gateway.api.auth import PUBLIC_PATHS, Guard
from gateway.config import Settings
from gateway.errors import StrangeHost
from registry.decode import Secret

KEYS = Settings(api_keys=(Secret("sk-one"), Secret("sk-two"), Secret("schlüssel")))
NO_KEYS = Settings()

Headers = dict[str, str | bytes]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that lets everybody see that they came through."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"through"})


async def nothing_comes() -> Message:
    raise AssertionError("the guard reads no body")


async def call(settings: Settings, headers: Headers | None = None, path: str = "/v1/models") -> list[Message]:
    """All that is sent for one request."""
    pairs = [
        (name.encode(), value if isinstance(value, bytes) else value.encode())
        for name, value in (headers or {}).items()
    ]
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": pairs}
    await Guard(echo, lambda: settings)(scope, nothing_comes, send)
    return sent


async def status(settings: Settings, headers: Headers | None = None, path: str = "/v1/models") -> int:
    return int((await call(settings, headers, path))[0]["status"])


# --- keys


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer sk-one"},
        {"authorization": "Bearer sk-two"},
        {"authorization": "bearer sk-one"},
        {"authorization": "BEARER   sk-one  "},
        {"authorization": "Bearer schlüssel"},
        {"x-api-key": "sk-one"},
        {"x-api-key": "sk-two", "authorization": "Basic c2stb25lOg=="},
        {"authorization": "Bearer sk-one", "x-api-key": "wrong"},
        {"x-api-key": "wrong", "authorization": "Bearer sk-one"},
    ],
    ids=str,
)
async def test_a_right_key_passes(headers: Headers) -> None:
    sent = await call(KEYS, headers)
    assert sent[1]["body"] == b"through"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "sk-one"},
        {"authorization": "Basic c2stb25lOg=="},
        {"authorization": "Bearersk-one"},
        {"cookie": "sk-one"},
    ],
    ids=str,
)
async def test_a_missing_key_is_asked_for(headers: Headers) -> None:
    start, body = await call(KEYS, headers)
    error = json.loads(body["body"])["error"]
    assert (start["status"], error["type"], error["code"]) == (401, "authentication_error", "invalid_api_key")
    assert "Authorization: Bearer KEY" in error["message"]
    assert dict(start["headers"])[b"www-authenticate"] == b"Bearer"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer "},
        {"authorization": "Bearer sk-on"},
        {"authorization": "Bearer sk-onee"},
        {"authorization": "Bearer SK-ONE"},
        {"authorization": "Bearer sk-one,sk-two"},
        {"authorization": b"Bearer \xff\xfe"},
        {"x-api-key": "wrong"},
        {"x-api-key": ""},
        {"authorization": "Bearer wrong", "x-api-key": "sk-one"},
    ],
    ids=str,
)
async def test_a_wrong_key_is_refused_and_not_repeated(headers: Headers) -> None:
    start, body = await call(KEYS, headers)
    message = json.loads(body["body"])["error"]["message"]
    assert start["status"] == 401
    assert "not one of this gateway's" in message
    assert "wrong" not in message
    assert "sk-" not in message


@pytest.mark.parametrize("path", sorted(PUBLIC_PATHS))
@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer wrong"}, {"origin": "https://evil.example"}], ids=str
)
async def test_a_public_path_needs_nothing(path: str, headers: Headers) -> None:
    assert await status(KEYS, headers, path) == 200
    assert await status(NO_KEYS, headers, path) == 200


def test_public_are_the_probes_and_the_question_for_a_key() -> None:
    assert set(PUBLIC_PATHS) == {"/", "/health", "/ready", "/v1/cluster/auth"}


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/chat/completions", "/metrics", "/v1/replicas", "/healthy", "/health/x", "//health", "/nothing"],
)
async def test_every_other_path_needs_a_key(path: str) -> None:
    assert await status(KEYS, {}, path) == 401


async def test_with_a_key_a_page_of_any_site_may_call() -> None:
    headers: Headers = {"authorization": "Bearer sk-one", "origin": "https://app.example"}
    assert await status(KEYS, headers) == 200


# --- origins, where there is no key


async def test_without_keys_and_origin_everybody_passes() -> None:
    assert await status(NO_KEYS) == 200
    assert await status(NO_KEYS, {"authorization": "Bearer whatever"}) == 200


@pytest.mark.parametrize(
    "origin",
    ["http://localhost", "http://localhost:3000", "https://localhost", "http://127.0.0.1:8080", "http://[::1]:3000"],
)
async def test_without_keys_a_page_of_this_machine_may_call(origin: str) -> None:
    assert await status(NO_KEYS, {"origin": origin}) == 200


FOREIGN = [
    "https://evil.example",
    "http://localhost.evil.example",
    "http://127.0.0.1.evil.example",
    "http://localhost@evil.example",
    "http://evil.example:80",
    "null",
    "",
    "localhost",
    "file://",
]


@pytest.mark.parametrize("origin", FOREIGN)
async def test_without_keys_a_page_of_another_site_may_not(origin: str) -> None:
    start, body = await call(NO_KEYS, {"origin": origin})
    error = json.loads(body["body"])["error"]
    assert (start["status"], error["code"]) == (403, "origin_not_allowed")
    assert [word for word in (origin, "allowed_origins", "api_keys") if word not in error["message"]] == []


@pytest.mark.parametrize("origin", ["http://[::1", "http://[", "http://[nonsense]/", b"\xff\xfe"])
async def test_an_origin_that_is_no_address_is_refused(origin: str | bytes) -> None:
    assert await status(NO_KEYS, {"origin": origin}) == 403


@pytest.mark.parametrize(
    ("allowed", "origin", "expected"),
    [
        (("https://app.example",), "https://app.example", 200),
        (("https://a.example", "https://b.example"), "https://b.example", 200),
        (("*",), "https://anything.example", 200),
        (("*",), "null", 200),
        (("https://app.example",), "https://app.example:8443", 403),
        (("https://app.example",), "http://app.example", 403),
        (("https://app.example",), "https://other.example", 403),
        (("https://app.example",), "http://localhost:3000", 200),
    ],
)
async def test_allowed_origins_are_allowed_to_the_letter(allowed: tuple[str, ...], origin: str, expected: int) -> None:
    assert await status(Settings(allowed_origins=allowed), {"origin": origin}) == expected


# --- hosts

ANYWHERE = Settings(host="0.0.0.0")


@pytest.mark.parametrize(
    ("settings", "host", "expected"),
    [
        (NO_KEYS, "127.0.0.1:9997", 200),
        (NO_KEYS, "localhost", 200),
        (NO_KEYS, "LOCALHOST:9997", 200),
        (NO_KEYS, "[::1]:9997", 200),
        (NO_KEYS, "evil.example:9997", 403),
        (NO_KEYS, "127.0.0.1.evil.example", 403),
        (NO_KEYS, "localhost@evil.example", 403),
        (NO_KEYS, "192.168.1.5:9997", 403),
        (NO_KEYS, "", 403),
        (NO_KEYS, "[", 403),
        (NO_KEYS, b"\xff\xfe", 403),
        (Settings(host="box.example"), "box.example:9997", 200),
        (Settings(host="box.example"), "Box.Example", 200),
        (Settings(allowed_hosts=("Models.example",)), "models.example:80", 200),
        (Settings(allowed_hosts=("models.example",)), "other.example", 403),
        (Settings(allowed_hosts=("*",)), "anything.example", 200),
        (ANYWHERE, "192.168.1.5:9997", 200),
        (ANYWHERE, "[fe80::1]:9997", 200),
        (ANYWHERE, "evil.example", 403),
        (Settings(host="::"), "10.0.0.1", 200),
    ],
    ids=str,
)
async def test_without_keys_only_names_of_this_gateway_are_answered(
    settings: Settings, host: str | bytes, expected: int
) -> None:
    sent = await call(settings, {"host": host})
    assert sent[0]["status"] == expected
    if expected == 403:
        error = json.loads(sent[1]["body"])["error"]
        assert error["code"] == "host_not_allowed"
        assert "allowed_hosts" in error["message"]


async def test_every_host_of_a_request_is_looked_at_and_what_passed_says_nothing_of_others() -> None:
    guard = Guard(echo, lambda: NO_KEYS)
    guard.check("/v1/models", [(b"host", b"localhost")])
    for headers in ([(b"host", b"localhost"), (b"host", b"evil.example")], [(b"host", b"evil.example")]):
        with pytest.raises(StrangeHost):
            guard.check("/v1/models", headers)
    guard.check("/v1/models", [])  # HTTP/1.0, and so no browser


@pytest.mark.parametrize("path", PUBLIC_PATHS)
async def test_probes_may_come_by_any_name(path: str) -> None:
    assert await status(NO_KEYS, {"host": "evil.example"}, path) == 200


async def test_with_keys_any_name_will_do() -> None:
    assert await status(KEYS, {"host": "evil.example", "x-api-key": "sk-one"}) == 200
    assert await status(KEYS, {"host": "evil.example"}) == 401


# --- what is no request


@pytest.mark.parametrize("kind", ["lifespan"])
async def test_what_is_no_request_passes(kind: str) -> None:
    seen: list[dict[str, Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope))

    async def send(message: Message) -> None:
        raise AssertionError("nothing is sent")

    await Guard(app, lambda: KEYS)({"type": kind}, nothing_comes, send)
    assert seen == [{"type": kind}]
