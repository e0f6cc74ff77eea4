"""A small client of our own HTTP API. Standard library only, so that it starts fast."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, TypeVar

from gateway import calls
from gateway.addresses import host_of, is_loopback
from gateway.calls import (
    DEFAULT_ENDPOINT,
    ENDPOINT_VARIABLE,
    KEY_VARIABLE,
    LIMIT_S,
    PROGRESS_PAUSE_S,
    Call,
    ClientError,
    Json,
    Step,
    model_path,
)

__all__ = ["DEFAULT_ENDPOINT", "ENDPOINT_VARIABLE", "KEY_VARIABLE", "Client", "ClientError", "Step", "model_path"]

T = TypeVar("T")


class Client:
    """Talks to one gateway. Every method raises ClientError if it is refused or nobody answers.

    Args:
        endpoint: its address; else HOSTLER_ENDPOINT, XINFERENCE_ENDPOINT, or the default address.
        api_key: else HOSTLER_API_KEY.
    """

    def __init__(self, endpoint: str | None = None, api_key: str | None = None) -> None:
        self.endpoint = calls.endpoint_of(endpoint)
        self._headers = calls.headers_of(api_key)
        # A proxy that is set for the world must not get between us and this machine.
        proxies: dict[str, str] | None = {} if is_loopback(host_of(self.endpoint)) else None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))

    # --- models

    def health(self) -> Json:
        """Whether the gateway is well."""
        return self._read(Call("GET", "/health"), dict)

    def list_models(self) -> list[Json]:
        """The models that can be asked for."""
        return self._read(Call("GET", "/v1/models"), list, "data")

    def get_model(self, uid: str) -> Json:
        """One of them."""
        return self._read(Call("GET", model_path(uid)), dict)

    def launch(
        self, model_name: str | None = None, *, model_uid: str | None = None, wait: bool = True, **wish: Any
    ) -> str:
        """Serve a model from now on; its uid.

        Args:
            model_name: a family of the catalogue or a registration.
            model_uid: how clients will name it; else the family's name.
            wait: until it is ready; else see `launch_progress`.
            wish: model_engine, model_size_in_billions, quantization, model_path, ... and options of the engine.
        """
        named = {"model_name": model_name, "model_uid": model_uid}
        return self._read(calls.launch(wait, named | wish), str, "model_uid")

    def check(self, model_name: str | None = None, *, model_uid: str | None = None, **wish: Any) -> Json:
        """What a launch of the same arguments would take and whether it fits; nothing is launched or downloaded."""
        return self._read(calls.check({"model_name": model_name, "model_uid": model_uid} | wish), dict)

    def launch_progress(self, uid: str, pause_s: float = PROGRESS_PAUSE_S) -> Iterator[Step]:
        """How far a launch is, again and again until it is ready.

        Raises:
            ClientError: the launch failed or was cancelled; the text says why.
        """
        while True:
            found = self.instances(model_uid=uid)
            step = calls.step(uid, found, self.progress(uid))
            yield step
            if step.is_ready:
                return
            time.sleep(pause_s)

    def instances(self, model_name: str | None = None, model_uid: str | None = None) -> list[Json]:
        """Launches and how they are."""
        return self._read(calls.instances(model_name, model_uid), list)

    def progress(self, uid: str) -> Json:
        """How far a launch is: progress, stage, download_files, replicas."""
        return self._read(Call("GET", model_path(uid, "/progress")), dict)

    def cancel(self, uid: str) -> None:
        """End a launch that is not ready yet."""
        self._json(Call("POST", model_path(uid, "/cancel")))

    def terminate(self, uid: str) -> None:
        """Stop a launched model and forget it."""
        self._json(Call("DELETE", model_path(uid), limit_s=None))

    def add_replicas(self, uid: str, count: int = 1, *, wait: bool = True) -> list[Json]:
        """More copies of a model, of which each has a `replica_id`; waits until they are ready if it is loaded."""
        return calls.replicas_of(self._json(calls.add_replicas(uid, count, wait)))

    def remove_replica(self, uid: str, replica_id: int) -> int:
        """End one copy after its requests in flight; how many remain. The last one's end is the model's."""
        call = Call("DELETE", model_path(uid, f"/replicas/{replica_id}"), limit_s=None)
        return self._read(call, int, "remaining_replicas")

    def replicas_of(self, uid: str) -> list[Json]:
        """The copies of one model."""
        return self._read(Call("GET", model_path(uid, "/replicas")), list)

    def reload(self, uid: str, *, drain_timeout_s: float = calls.DRAIN_TIMEOUT_S, **changes: Any) -> Json:
        """Change options of a model that is served, None taking one away; its copies start anew one after the other.

        Returns:
            how far it is; see `reload_status`.
        """
        return self._read(calls.reload(uid, changes, drain_timeout_s), dict)

    def reload_status(self, uid: str) -> Json:
        """How far the last reload is: its `status` is reloading, ready or error, and `error` says why."""
        return self._read(Call("GET", model_path(uid, "/reload")), dict)

    def config(self) -> Json:
        """Which settings file the gateway was started with, and what came of reading it again."""
        return self._read(Call("GET", "/v1/config"), dict)

    def apply(self, settings: Mapping[str, Any] | None = None, *, dry_run: bool = False) -> Json:
        """Serve the models of a settings file, whose data is given with nothing left in it to refer to.

        Args:
            settings: None stands for the gateway's own, which are read again.
            dry_run: only say what would be done.
        Returns:
            `models` and `settings`, and what becomes of each.
        """
        return self._read(calls.apply(settings, dry_run), dict)

    def export(self, *, with_secrets: bool = False) -> Json:
        """All that is served as the `settings` of a file, and `notes` for people."""
        call = Call("GET", "/v1/config/export", {"with_secrets": with_secrets}, limit_s=calls.CHECK_LIMIT_S)
        return self._read(call, dict)

    def start(self, uid: str) -> Json:
        """Load a model now; one that has failed is tried again."""
        return self._read(Call("POST", model_path(uid, "/start")), dict)

    def stop(self, uid: str, *, force: bool = False) -> Json:
        """Unload a model, after the requests in flight unless forced; its next request loads it again."""
        return self._read(Call("POST", model_path(uid, "/stop"), {"force": force}, limit_s=None), dict)

    def sleep(self, uid: str) -> Json:
        """Have a model sleep, if it answers nobody; its next request wakes it."""
        return self._read(Call("POST", model_path(uid, "/sleep"), limit_s=None), dict)

    def wake(self, uid: str) -> Json:
        """Have a model be ready again; answers once it is."""
        return self._read(Call("POST", model_path(uid, "/wake"), limit_s=None), dict)

    def logs(self, uid: str, *, lines: int = 100, replica: int = 0, follow: bool = False) -> Iterator[str]:
        """The last lines that a model's engine wrote, and with `follow` those that come."""
        return (
            line.decode(errors="replace").rstrip("\r\n")
            for line in self._lines(calls.logs(uid, lines, replica, follow))
        )

    def watch(self, uid: str | None = None, *, follow: bool = True) -> Iterator[Json]:
        """What happens to models, of one or of all: type, model_uid, time, and what else it is about.

        Args:
            follow: as it happens, until the gateway ends; else what is kept of what has happened.
        """
        call = calls.watch(uid, follow)
        if not follow:
            yield from self._read(call, list)
            return
        for line in self._lines(call):
            if (happening := calls.happening_of(line)) is not None:
                yield happening

    def replicas(self) -> list[Json]:
        """Every replica: state, process, memory, requests, last failure."""
        return self._read(Call("GET", "/v1/replicas"), list)

    # --- registrations, engines, cache

    def register(
        self,
        model: str | Mapping[str, Any],
        model_type: str = "LLM",
        *,
        persist: bool = False,
        worker_ip: str | None = None,
    ) -> str:
        """Add a family, as an object or its JSON text.

        Returns:
            what the gateway read otherwise than it was written, in sentences for people; mostly none.
        """
        _, notes = self._exchange(calls.register(model, model_type, persist, worker_ip))
        return notes

    def unregister(self, name: str, model_type: str = "LLM") -> None:
        """Forget a family that was registered; what runs of it stays up."""
        self._json(Call("DELETE", calls.registrations_path(model_type, name)))

    def registrations(self, model_type: str = "LLM", *, detailed: bool = False) -> list[Json]:
        """All families of a type, the built-in ones too."""
        return self._read(Call("GET", calls.registrations_path(model_type), {"detailed": detailed}), list)

    def get_registration(self, name: str, model_type: str = "LLM") -> Json:
        """One family, whole."""
        return self._read(Call("GET", calls.registrations_path(model_type, name)), dict)

    def engines(self, name: str, model_type: str = "LLM") -> Json | None:
        """For each engine the formats in which it runs a family, or why it cannot; None: no such family."""
        found = self._json(calls.engines(name, model_type))
        return None if found is None else calls.read(found, dict)

    def cached_models(self, model_name: str | None = None, worker_ip: str | None = None) -> list[Json]:
        """Files of models that are here."""
        return self._read(calls.cached("GET", model_name=model_name, worker_ip=worker_ip), list, "list")

    def cached_files(self, model_version: str, worker_ip: str | None = None) -> list[str]:
        """What `remove_cached` would delete."""
        return self._read(
            calls.cached("GET", "/files", model_version=model_version, worker_ip=worker_ip), list, "paths"
        )

    def remove_cached(self, model_version: str, worker_ip: str | None = None) -> bool:
        """Delete the files of a model; whether they are gone."""
        return self._read(calls.cached("DELETE", model_version=model_version, worker_ip=worker_ip), bool, "result")

    def remove_leftovers(self) -> int:
        """Delete what downloads that are no more have left half-done; the bytes that are free now."""
        answer = self._json(Call("DELETE", "/v1/cache/leftovers", limit_s=None))
        return int(answer["freed_bytes"])

    def vllm_models(self) -> Json:
        """The families that vLLM runs, by what they can do."""
        return self._read(Call("GET", "/v1/models/vllm-supported"), dict)

    def needs_key(self) -> bool:
        """Whether the gateway asks for a key."""
        return self._read(Call("GET", "/v1/cluster/auth"), bool, "auth")

    def login(self, username: str, password: str) -> str:
        """A token that serves as the key of another client."""
        return self._read(Call("POST", "/token", {}, {"username": username, "password": password}), str, "access_token")

    # --- inference: `limit_s` is how long the answer may take; None: as long as it takes

    def chat(
        self, model: str, messages: Sequence[Mapping[str, Any]], *, limit_s: float | None = None, **options: Any
    ) -> Json:
        """A chat completion."""
        body = {"model": model, "messages": messages} | options
        return self._read(calls.infer("/v1/chat/completions", limit_s, body), dict)

    def chat_stream(self, model: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> Iterator[Json]:
        """A chat completion, chunk by chunk."""
        return self._chunks("/v1/chat/completions", {"model": model, "messages": messages, "stream": True} | options)

    def complete(self, model: str, prompt: str, *, limit_s: float | None = None, **options: Any) -> Json:
        """A completion."""
        return self._read(calls.infer("/v1/completions", limit_s, {"model": model, "prompt": prompt} | options), dict)

    def complete_stream(self, model: str, prompt: str, **options: Any) -> Iterator[Json]:
        """A completion, chunk by chunk."""
        return self._chunks("/v1/completions", {"model": model, "prompt": prompt, "stream": True} | options)

    def embed(self, model: str, input: str | Sequence[str], *, limit_s: float | None = None, **options: Any) -> Json:
        """Vectors of one or several texts."""
        return self._read(calls.infer("/v1/embeddings", limit_s, {"model": model, "input": input} | options), dict)

    def rerank(
        self, model: str, query: str, documents: Sequence[str], *, limit_s: float | None = None, **options: Any
    ) -> Json:
        """The documents by how well they answer the query, the best first."""
        body = {"model": model, "query": query, "documents": documents} | options
        return self._read(calls.infer("/v1/rerank", limit_s, body), dict)

    # --- anything else of the API

    def get(self, path: str, **query: Any) -> Any:
        """GET, decoded from JSON."""
        return self._json(Call("GET", path, query))

    def post(self, path: str, body: Any = None, limit_s: float | None = LIMIT_S, **query: Any) -> Any:
        """POST a body as JSON, decoded from JSON."""
        return self._json(Call("POST", path, query, body, limit_s))

    def events(self, path: str, body: Any) -> Iterator[Any]:
        """POST and read the answer's events: decoded from JSON, or a comment's text.

        Raises:
            ClientError: the stream holds an error, or broke off before its end.
        """
        for line in self._lines(Call("POST", path, {}, body, limit_s=None)):
            event = calls.event_of(line)
            if event is calls.End:
                return
            if event is not None:
                yield event
        raise calls.broken_off()

    # --- how it is sent

    def _chunks(self, path: str, body: Mapping[str, Any]) -> Iterator[Json]:
        whole = calls.infer(path, None, body).body
        return (event for event in self.events(path, whole) if not isinstance(event, str))

    def _read(self, call: Call, kind: type[T], field: str | None = None) -> T:
        return calls.read(self._json(call), kind, field)

    def _json(self, call: Call) -> Any:
        content, _ = self._exchange(call)
        return calls.decoded(content)

    def _exchange(self, call: Call) -> tuple[bytes, str]:
        """The answer's body, and the notes beside it."""
        with self._translated(call), closing(self._open(call)) as response:
            return response.read(), calls.notes_of(response.headers.get(calls.NOTES_HEADER))

    def _lines(self, call: Call) -> Iterator[bytes]:
        with self._translated(call), closing(self._open(call)) as response:
            yield from response

    def _open(self, call: Call) -> http.client.HTTPResponse:
        url = self.endpoint + call.target
        request = urllib.request.Request(url, call.content, self._headers, method=call.method)  # noqa: S310 (the user's own endpoint)
        response: http.client.HTTPResponse = self._opener.open(request, timeout=call.limit_s)
        return response

    @contextmanager
    def _translated(self, call: Call) -> Iterator[None]:
        """Turns errors of the library into ours."""
        try:
            yield
        except urllib.error.HTTPError as exc:
            with closing(exc):
                raise calls.refusal(exc.code, str(exc.reason), _rest(exc)) from exc
        except (http.client.IncompleteRead, ConnectionResetError) as exc:
            raise calls.broken_off() from exc
        except TimeoutError as exc:
            raise calls.too_late(self.endpoint, call.limit_s) from exc
        except (OSError, ValueError, http.client.HTTPException) as exc:
            raise calls.unreachable(self.endpoint, getattr(exc, "reason", exc)) from exc


def _rest(exc: urllib.error.HTTPError) -> bytes:
    try:
        return exc.read()
    except (OSError, http.client.HTTPException):
        return b""
