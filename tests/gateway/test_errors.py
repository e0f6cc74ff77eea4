"""One place where an error becomes an answer, in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.errors import (
    BadKey,
    BadReply,
    BadRequest,
    BodyTooLarge,
    Busy,
    CannotKeep,
    CannotRestart,
    CannotServe,
    EngineDied,
    ErrorBody,
    Forbidden,
    HandedOver,
    HostlerError,
    InUse,
    LaunchCancelled,
    ModelCoolingDown,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    ModelStopped,
    NoMoreFiles,
    NotFound,
    NotImplementedYet,
    RequestRefused,
    SendAgain,
    SettingsError,
    ShuttingDown,
    StrangeHost,
    TooManyRequests,
    UnsupportedBody,
    answer,
    body_of,
    envelope,
)

# the error, its status, type and code
TABLE: list[tuple[type[HostlerError], int, str, str | None]] = [
    (HostlerError, 500, "internal_error", None),
    (SettingsError, 500, "internal_error", None),
    (RequestRefused, 400, "invalid_request_error", None),
    (BadRequest, 400, "invalid_request_error", None),
    (BadKey, 401, "authentication_error", "invalid_api_key"),
    (Forbidden, 403, "permission_error", "origin_not_allowed"),
    (StrangeHost, 403, "permission_error", "host_not_allowed"),
    (Busy, 409, "invalid_request_error", "busy"),
    (NotFound, 404, "not_found_error", "not_found"),
    (ModelNotFound, 404, "invalid_request_error", "model_not_found"),
    (BodyTooLarge, 413, "invalid_request_error", "body_too_large"),
    (CannotServe, 503, "server_error", None),
    (ModelLoading, 503, "server_error", "model_loading"),
    (ModelStopped, 503, "server_error", "model_stopped"),
    (CannotKeep, 503, "server_error", "cannot_keep"),
    (UnsupportedBody, 415, "invalid_request_error", "unsupported_body"),
    (InUse, 400, "invalid_request_error", "in_use"),
    (TooManyRequests, 429, "rate_limit_error", "rate_limit_exceeded"),
    (LaunchCancelled, 499, "invalid_request_error", "launch_cancelled"),
    (NotImplementedYet, 501, "server_error", "not_implemented"),
    (ModelCoolingDown, 503, "server_error", "model_cooling_down"),
    (NoMoreFiles, 503, "server_error", "no_more_files"),
    (ModelFailed, 503, "server_error", "model_failed"),
    (SendAgain, 503, "server_error", "send_again"),
    (ShuttingDown, 503, "server_error", "shutting_down"),
    (HandedOver, 503, "server_error", "shutting_down"),
    (CannotRestart, 503, "server_error", "cannot_restart"),
    (EngineDied, 502, "server_error", "engine_died"),
    (BadReply, 502, "server_error", "bad_reply"),
]
RETRY = {Busy, HandedOver, ModelLoading, ModelStopped, NoMoreFiles, SendAgain, ShuttingDown, TooManyRequests}


def all_kinds(kind: type[HostlerError] = HostlerError) -> set[type[HostlerError]]:
    return {kind}.union(*(all_kinds(below) for below in kind.__subclasses__()))


def test_the_table_here_is_complete() -> None:
    ours = {kind for kind in all_kinds() if kind.__module__ == "gateway.errors"}
    assert {kind for kind, *_ in TABLE} == ours


@pytest.mark.parametrize(("kind", "status", "type_", "code"), TABLE)
def test_an_error_becomes_an_envelope(kind: type[HostlerError], status: int, type_: str, code: str | None) -> None:
    response = answer(kind("What happened, and what to do.", param="model"))
    assert response.status_code == status
    assert json.loads(response.body) == {
        "error": {
            "message": "What happened, and what to do.",
            "type": type_,
            "param": "model",
            "code": code,
            "source": "gateway",
        },
        "detail": "What happened, and what to do.",
    }


@pytest.mark.parametrize("kind", [kind for kind, *_ in TABLE])
def test_an_answer_says_that_it_is_json_and_who_made_it(kind: type[HostlerError]) -> None:
    headers = answer(kind("x")).headers
    assert headers["content-type"] == "application/json"
    assert headers["x-hostler-error-source"] == "gateway"


@pytest.mark.parametrize("kind", [kind for kind, *_ in TABLE])
def test_an_answer_says_when_to_try_again_only_if_that_can_help(kind: type[HostlerError]) -> None:
    assert ("retry-after" in answer(kind("x")).headers) == (kind in RETRY)


@pytest.mark.parametrize("kind", [kind for kind, *_ in TABLE])
def test_an_answer_asks_for_a_key_only_if_that_is_what_lacks(kind: type[HostlerError]) -> None:
    assert answer(kind("x")).headers.get("www-authenticate") == ("Bearer" if kind is BadKey else None)


def test_an_error_without_a_parameter_says_null() -> None:
    assert json.loads(answer(BadRequest("x")).body)["error"]["param"] is None


def test_the_text_of_an_error_is_its_message() -> None:
    error = BadRequest("Say `model`.", param="model")
    assert (str(error), error.message, error.param) == ("Say `model`.", "Say `model`.", "model")


@pytest.mark.parametrize("text", ['quote " and \\ and\nnew line', "模型 «x»", "\x00\x1f"])
def test_any_text_can_be_told(text: str) -> None:
    assert json.loads(answer(BadRequest(text)).body)["error"]["message"] == text


def test_an_envelope_may_be_an_engines() -> None:
    said: dict[str, Any] = json.loads(envelope(ErrorBody(message="m", type="t", code=400, source="engine")))
    assert said["error"] == {"message": "m", "type": "t", "param": None, "code": 400, "source": "engine"}


def test_the_body_of_an_error_is_the_gateways() -> None:
    assert body_of(EngineDied("m")) == ErrorBody(message="m", type="server_error", code="engine_died")
