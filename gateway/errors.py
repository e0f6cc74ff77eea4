"""Our exceptions as one tree, and the one place where an error becomes an answer.

HostlerError
  SettingsError         the settings are wrong, or do not go together; the program does not start
  RequestRefused        what the client sent cannot be done: 4xx
    BadRequest            400: the body or a parameter is wrong
    BadKey                401: no API key, or a wrong one
    Forbidden             403: a page of another site is calling
    StrangeHost           403: the gateway is called by a name that it does not have
    NotFound              404: no such route or thing
    Busy                  409: a change of the same thing is under way
    ModelNotFound         404: no such model
    BodyTooLarge          413: more bytes than `max_body_bytes`
    UnsupportedBody       415: compressed
    HeadTooLarge          431: its headers have no end
    InUse                 400: what is to be removed is being used
    TooManyRequests       429: more at once than the model's request_limits or its queue allow
    LaunchCancelled       499: somebody cancelled the launch while its client waited
  CannotServe           the request is fine, but cannot be answered now: 5xx
    ModelLoading          503: still loading when the client's patience ended; worth a retry
    ModelFailed           503: it does not start; the text says why
    ModelCoolingDown      503: it has failed, and is tried again when Retry-After is over
    ModelStopped          503: somebody stopped it while the request waited or was answered
    CannotKeep            503: a launch cannot be written to the data folder
    SendAgain             503: the next time it can be answered
    ShuttingDown          503: the gateway is ending
    NoMoreFiles           503: the system lets the gateway open no more connections
      HandedOver            503: another gateway has taken over while the request waited
    CannotRestart         503: no other gateway takes over; this one goes on
    NotImplementedYet     501: a route that is known, and has nothing behind it here
    EngineDied            502: the engine went away while it answered
    BadReply              502: the engine answered what cannot be understood
"""

from __future__ import annotations

from typing import ClassVar

import msgspec
from starlette.responses import Response


class HostlerError(Exception):
    """Anything that we say about a failure ourselves; the text is written for the user."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal_error"
    code: ClassVar[str | None] = None
    retry_after_s: int | None = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        """`retry_after_s` says when to ask again, where more is known than of the kind of error."""
        super().__init__(message)
        self.message = message
        self.param = param
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class SettingsError(HostlerError):
    """The settings are wrong, or do not go together."""


class RequestRefused(HostlerError):
    """What the client sent cannot be done."""

    status = 400
    kind = "invalid_request_error"


class BadRequest(RequestRefused):
    """The body or a parameter is wrong."""


class BadKey(RequestRefused):
    """There is no API key with the request, or a wrong one."""

    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class Forbidden(RequestRefused):
    """A web page of another site is calling, and there is no key to tell friend from foe."""

    status = 403
    kind = "permission_error"
    code = "origin_not_allowed"


class StrangeHost(Forbidden):
    """The gateway is called by a name that it does not have, and there is no key to tell friend from foe."""

    code = "host_not_allowed"


class NotFound(RequestRefused):
    """There is no such route or thing."""

    status = 404
    kind = "not_found_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """No model of that name is served here."""

    kind = "invalid_request_error"
    code = "model_not_found"


class Busy(RequestRefused):
    """A change of the same thing is under way."""

    status = 409
    code = "busy"
    retry_after_s = 5


class BodyTooLarge(RequestRefused):
    """The request's body is larger than the setting `max_body_bytes`."""

    status = 413
    code = "body_too_large"


class UnsupportedBody(RequestRefused):
    """The request's body is compressed."""

    status = 415
    code = "unsupported_body"


class HeadTooLarge(RequestRefused):
    """The request's headers are larger than any that make sense."""

    status = 431
    code = "head_too_large"


class InUse(RequestRefused):
    """What is to be removed is being used."""

    code = "in_use"


class TooManyRequests(RequestRefused):
    """More requests at once than the model's `request_limits` or the queue allow."""

    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry_after_s = 1


class LaunchCancelled(RequestRefused):
    """Somebody cancelled the launch while its client waited for it."""

    status = 499
    code = "launch_cancelled"


class CannotServe(HostlerError):
    """The request is fine, but it cannot be answered now."""

    status = 503
    kind = "server_error"


class ModelLoading(CannotServe):
    """The model was still loading when the time to wait for it ended."""

    code = "model_loading"
    retry_after_s = 10


class ModelFailed(CannotServe):
    """The model does not start; the text says why and what to do."""

    code = "model_failed"


class ModelCoolingDown(CannotServe):
    """The model has failed, and is tried again only when the time to come back is over; the text says why."""

    code = "model_cooling_down"


class ModelStopped(CannotServe):
    """Somebody stopped the model while the request waited for it or was answered by it."""

    code = "model_stopped"
    retry_after_s = 1


class CannotKeep(CannotServe):
    """What was asked for cannot be written to the data folder, so it was not done."""

    code = "cannot_keep"


class SendAgain(CannotServe):
    """The request was on its way to the engine already when it turned out that it has to be changed."""

    code = "send_again"
    retry_after_s = 0


class NoMoreFiles(CannotServe):
    """The system lets the gateway open no more files or connections now."""

    code = "no_more_files"
    retry_after_s = 5


class NotImplementedYet(CannotServe):
    """The route is known, and has nothing behind it here."""

    status = 501
    code = "not_implemented"


class ShuttingDown(CannotServe):
    """The gateway is ending, and its models with it."""

    code = "shutting_down"
    retry_after_s = 10


class HandedOver(ShuttingDown):
    """Another gateway has taken over while the request waited; where it can be asked again there, it is."""


class CannotRestart(CannotServe):
    """No other gateway takes over, so this one goes on."""

    code = "cannot_restart"


class EngineDied(CannotServe):
    """The engine went away while it answered."""

    status = 502
    code = "engine_died"


class BadReply(CannotServe):
    """The engine answered what cannot be understood."""

    status = 502
    code = "bad_reply"


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's error object; `source` says who made it, gateway or engine."""

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None
    source: str = "gateway"


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """An error on the wire; `detail` is where Xinference's clients look."""

    error: ErrorBody
    detail: str


SOURCE_HEADER = "x-hostler-error-source"
encode = msgspec.json.encode


def envelope(error: ErrorBody) -> bytes:
    """An error as JSON bytes."""
    return encode(Envelope(error=error, detail=error.message))


def body_of(exc: HostlerError) -> ErrorBody:
    """One of our exceptions as OpenAI's error object."""
    return ErrorBody(message=exc.message, type=exc.kind, param=exc.param, code=exc.code)


def answer(exc: HostlerError) -> Response:
    """One of our exceptions as a whole answer."""
    headers = {SOURCE_HEADER: "gateway"}
    if exc.retry_after_s is not None:
        headers["retry-after"] = str(exc.retry_after_s)
    if isinstance(exc, BadKey):
        headers["www-authenticate"] = "Bearer"
    return Response(envelope(body_of(exc)), exc.status, headers, "application/json")
