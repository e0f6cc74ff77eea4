"""What our HTTP API is asked, and what its answers say: what both clients share. It opens no connection."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlencode

from gateway.addresses import host_of

KEY_VARIABLE = "HOSTLER_API_KEY"  # what we send; a gateway that sees it at its start accepts it
ENDPOINT_VARIABLE = "HOSTLER_ENDPOINT"
ENDPOINT_VARIABLES = (ENDPOINT_VARIABLE, "XINFERENCE_ENDPOINT")  # the first that is set
DEFAULT_ENDPOINT = "http://127.0.0.1:9997"
LIMIT_S = 30.0
CHECK_LIMIT_S = 90.0
DRAIN_TIMEOUT_S = 300.0
PROGRESS_PAUSE_S = 0.5
NOTES_HEADER = "x-hostler-notes"

# What an instance's status says of its launch.
LOADED = frozenset({"READY"})
LOST = frozenset({"ERROR", "TERMINATING", "TERMINATED"})

Json = dict[str, Any]
T = TypeVar("T")


class ClientError(Exception):
    """The gateway refused, or cannot be reached.

    Attributes:
        message: for the user.
        status: of HTTP; None if no whole answer came.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class Call(NamedTuple):
    """One request: `path` is quoted already; the answer has to begin within `limit_s`, if that is given."""

    method: str
    path: str
    query: Mapping[str, Any] = {}
    body: Any = None
    limit_s: float | None = LIMIT_S

    @property
    def target(self) -> str:
        """Path and query. What is None is left out; booleans are written small."""
        query = {
            name: str(value).lower() if isinstance(value, bool) else value
            for name, value in self.query.items()
            if value is not None
        }
        return self.path + (f"?{urlencode(query)}" if query else "")

    @property
    def content(self) -> bytes | None:
        """The body as it is sent."""
        if self.body is None:
            return b"" if self.method == "POST" else None
        return json.dumps(self.body).encode()


class Step(NamedTuple):
    """How far a launch is; `progress` from 0 to 1."""

    progress: float
    stage: str
    download_files: list[Any] = []
    replicas: list[Json] = []
    is_ready: bool = False


# --- models


def model_path(uid: str, rest: str = "") -> str:
    """The path of a model, or of something below it."""
    return f"/v1/models/{quote(uid)}{rest}"


def launch(wait: bool, wish: Mapping[str, Any]) -> Call:
    """Serve a model. What is None is left out, but for n_gpu, where it means the CPU."""
    body = {key: value for key, value in wish.items() if value is not None or key == "n_gpu"}
    return Call("POST", "/v1/models", {"wait_ready": wait}, body, limit_s=None if wait else LIMIT_S)


def check(wish: Mapping[str, Any]) -> Call:
    """What that launch would take. A hub may be asked for its files, which takes a while."""
    return Call("POST", "/v1/models/check", {}, launch(False, wish).body, limit_s=CHECK_LIMIT_S)


def instances(model_name: str | None = None, model_uid: str | None = None) -> Call:
    """Launches and how they are."""
    return Call("GET", "/v1/models/instances", {"model_name": model_name, "model_uid": model_uid})


def add_replicas(uid: str, count: int, wait: bool) -> Call:
    """More copies of a model."""
    path = model_path(uid, "/replicas")
    return Call("POST", path, {"wait_ready": wait}, {"replica": count}, limit_s=None if wait else LIMIT_S)


def replicas_of(answer: Json) -> list[Json]:
    """The copies that were added: the answer has one, or a list of them."""
    return read(answer, list, "replicas") if "replicas" in answer else [answer]


def reload(uid: str, changes: Mapping[str, Any], drain_timeout_s: float) -> Call:
    """Change options of a model that is served."""
    body = {"model_config": dict(changes), "drain_timeout": drain_timeout_s}
    return Call("POST", model_path(uid, "/reload"), body=body)


def apply(settings: Mapping[str, Any] | None, dry_run: bool) -> Call:
    """Take up settings: of a file, or those that the gateway was started with."""
    body: dict[str, Any] = {"dry_run": dry_run} | ({} if settings is None else {"settings": dict(settings)})
    return Call("POST", "/v1/config/apply", {}, body, limit_s=CHECK_LIMIT_S)


def logs(uid: str, lines: int, replica: int, follow: bool) -> Call:
    """What an engine wrote."""
    query = {"lines": lines, "replica": replica, "follow": follow}
    return Call("GET", model_path(uid, "/logs"), query, limit_s=None if follow else LIMIT_S)


def watch(uid: str | None, follow: bool) -> Call:
    """What happens to models."""
    return Call("GET", "/v1/events", {"model_uid": uid, "follow": follow}, limit_s=None if follow else LIMIT_S)


def happening_of(line: bytes) -> Json | None:
    """What a line of the stream of events tells, if it tells anything."""
    return decoded(line[6:]) if line.startswith(b"data: ") else None


def step(uid: str, found: list[Json], progress: Json) -> Step:
    """How far a launch is, from its instances and its progress.

    Raises:
        ClientError: it has failed, or is no more.
    """
    instance = next((one for one in found if one["model_uid"] == uid), None)
    if instance is None:
        raise ClientError(f"{uid} is gone: its launch failed, was cancelled, or was terminated.")
    if instance["status"] in LOST:
        said = [one["error_message"] for one in instance.get("replica_statuses") or () if one.get("error_message")]
        raise ClientError(f"{uid} was not launched: {said[0] if said else instance['status']}")
    details = (progress.get("download_files") or [], progress.get("replicas") or [])
    if instance["status"] in LOADED:
        return Step(1.0, "completed", *details, is_ready=True)
    return Step(float(progress.get("progress") or 0), progress.get("stage") or "loading", *details)


# --- registrations, engines, cache


def registrations_path(model_type: str, name: str | None = None) -> str:
    """The path of a type's registrations, or of one."""
    return f"/v1/model_registrations/{quote(model_type, safe='')}" + (f"/{quote(name, safe='')}" if name else "")


def register(model: str | Mapping[str, Any], model_type: str, persist: bool, worker_ip: str | None) -> Call:
    """Add a family; `model` is an object or its JSON text."""
    text = model if isinstance(model, str) else json.dumps(model)
    return Call("POST", registrations_path(model_type), {}, {"model": text, "worker_ip": worker_ip, "persist": persist})


def engines(name: str, model_type: str) -> Call:
    """Which engines run a family, and in which formats."""
    return Call("GET", f"/v1/engines/{quote(model_type, safe='')}/{quote(name, safe='')}")


def cached(method: str, rest: str = "", **query: Any) -> Call:
    """Files of models that are here."""
    return Call(method, f"/v1/cache/models{rest}", query)


# --- inference


def infer(path: str, limit_s: float | None, body: Mapping[str, Any]) -> Call:
    """Ask a model; options that are None are left out."""
    return Call("POST", path, {}, {key: value for key, value in body.items() if value is not None}, limit_s)


# --- answers


class End:
    """The end of a stream that ended as it should."""


def event_of(raw: bytes) -> Any:
    """A line of a stream of events: an object, a comment's text, End, or None if there is nothing in it.

    Raises:
        ClientError: it holds an error.
    """
    line = raw.decode(errors="replace").strip()
    if line.startswith(":"):
        return line[1:].strip()
    if not line.startswith("data:"):
        return None
    if (data := line[5:].strip()) == "[DONE]":
        return End
    event = decoded(data)
    if isinstance(event, dict) and (error := event.get("error")):
        raise ClientError(str(error.get("message", error)) if isinstance(error, dict) else str(error))
    return event


def broken_off() -> ClientError:
    """A stream ended too early."""
    return ClientError("The answer broke off before its end.")


def decoded(text: str | bytes) -> Any:
    """JSON, decoded. Raises ClientError if it is none."""
    try:
        return json.loads(text)
    except ValueError as exc:
        raise ClientError(f"The answer is no JSON: {exc}. Is this the address of a gateway?") from exc


def read(answer: Any, kind: type[T], field: str | None = None) -> T:
    """The answer, or a field of it, if it is of that kind. Raises ClientError if not."""
    if field is not None:
        answer = answer.get(field) if isinstance(answer, dict) else None
    if not isinstance(answer, kind):
        raise ClientError("The answer is not that of a gateway. Is this the address of one?")
    return answer


def notes_of(header: str | None) -> str:
    """Sentences that come beside an answer, in the header that has them."""
    return unquote(header or "")


def refusal(status: int, reason: str, content: bytes) -> ClientError:
    """What an answer that is no success says."""
    try:
        body = json.loads(content)
        error = body.get("error")
        message = str(error["message"] if isinstance(error, dict) else body["detail"])
    except (ValueError, KeyError, TypeError, AttributeError):
        message = f"{status} {reason}"
    if status == 401:
        message += f" Give it with --api-key or {KEY_VARIABLE}."
    return ClientError(message, status)


def unreachable(endpoint: str, reason: object) -> ClientError:
    """Nobody answers there."""
    return ClientError(
        f"There is no gateway at {endpoint} ({reason}). Start one with `hostler serve`, or say where it "
        f"is with --endpoint or {ENDPOINT_VARIABLE}."
    )


def too_late(endpoint: str, limit_s: float | None) -> ClientError:
    """No answer came in time."""
    within = f" within {limit_s:g} s" if limit_s else ""
    return ClientError(f"The gateway at {endpoint} did not answer{within}.")


# --- whom to ask


def endpoint_of(given: str | None) -> str:
    """The gateway's address: what is given, else the environment's, else the default.

    Raises:
        ClientError: it is no address.
    """
    named = (os.environ.get(name) for name in ENDPOINT_VARIABLES)
    endpoint = (given or next(filter(None, named), None) or DEFAULT_ENDPOINT).rstrip("/")
    if not host_of(endpoint) or not endpoint.startswith(("http://", "https://")):
        raise ClientError(f"{endpoint!r} is no address of a gateway: give one such as {DEFAULT_ENDPOINT}.")
    return endpoint


def headers_of(api_key: str | None) -> dict[str, str]:
    """What goes with every request; the key is the given one, else the environment's."""
    key = api_key or os.environ.get(KEY_VARIABLE)
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
