"""THE MAP: every route, the middleware, and the table of errors."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.auth import Guard
from gateway.api.autostart import Autostart
from gateway.api.cached import CachedFiles
from gateway.api.check import Check
from gateway.api.cluster import Cluster
from gateway.api.config import Config
from gateway.api.events import EventStream, QueueFacts
from gateway.api.history import History
from gateway.api.inference import Inference
from gateway.api.models import Models
from gateway.api.next_door import NextDoor
from gateway.api.registrations import Registrations
from gateway.api.reload import Reloads
from gateway.api.requests import Requests
from gateway.api.system import System
from gateway.api.trace import HEADER, Trace
from gateway.api.ways import WAYS, WEBUI_WAYS
from gateway.api.webui import WebUi
from gateway.config import Settings
from gateway.errors import BadRequest, HostlerError, NotFound, NotImplementedYet, answer
from gateway.fleet import Fleet

# What restarts parts of a cluster: there is one process here.
RELAUNCHES = (
    "/v1/api/relaunch",
    "/v1/api-relaunches",
    "/v1/api-relaunches/{operation}",
    "/v1/supervisor/relaunch",
    "/v1/supervisor-relaunches",
    "/v1/supervisor-relaunches/{operation}",
    "/v1/workers/{address}/relaunch",
    "/v1/worker-relaunches",
    "/v1/worker-relaunches/{operation}",
)

# Pages that this machine itself serves; see Guard for the others.
LOOPBACK_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


class CrossOrigin:
    """CORS for the requests that have an origin; the others take no detour."""

    def __init__(self, app: ASGIApp, settings: Callable[[], Settings]) -> None:
        """`settings` gives those in effect."""
        self._app = app
        self._settings = settings
        self._cors: CORSMiddleware | None = None
        self._origins: tuple[str, ...] = ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, one way or the other."""
        has_origin = scope["type"] == "http" and any(name == b"origin" for name, _ in scope["headers"])
        await (self._of(self._settings().allowed_origins) if has_origin else self._app)(scope, receive, send)

    def _of(self, origins: tuple[str, ...]) -> CORSMiddleware:
        if self._cors is None or origins != self._origins:
            self._origins = origins
            self._cors = CORSMiddleware(
                self._app,
                allow_origins=origins,
                allow_origin_regex=LOOPBACK_ORIGIN,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=[HEADER.decode(), "x-hostler-notes"],
            )
        return self._cors


def create_app(fleet: Fleet) -> Starlette:
    """The door in front of a fleet, as an ASGI app."""
    system, cluster, models = System(fleet), Cluster(fleet), Models(fleet)
    registrations, cached = Registrations(fleet), CachedFiles(fleet)
    autostart, history, reloads = Autostart(fleet), History(fleet), Reloads(fleet)
    requests, webui, config = Requests(fleet), WebUi(fleet), Config(fleet)
    routes = [
        Route("/", system.root),
        Route("/health", system.health),
        Route("/ready", system.ready),
        Route("/metrics", system.metrics),
        Route("/v1/cluster/auth", system.auth),
        Route("/v1/restart", system.restart, methods=["POST"]),
        Route("/v1/events", EventStream(fleet), methods=["GET"]),
        #
        *[Route(way.path, Inference(fleet, way), methods=[way.method]) for way in WAYS],
        Route("/v1/files/{name}", system.file),
        *[Route(way.path, Inference(fleet, way, webui.choose), methods=["POST"]) for way in WEBUI_WAYS],
        Route("/sdapi/v1/options", webui.options),
        Route("/sdapi/v1/options", webui.set_options, methods=["POST"]),
        Route("/sdapi/v1/sd-models", webui.models),
        Route("/sdapi/v1/samplers", webui.samplers),
        Route("/sdapi/v1/progress", webui.progress),
        Route("/sdapi/v1/interrupt", webui.interrupt, methods=["POST"]),
        #
        Route("/status", cluster.status),
        Route("/token", cluster.login, methods=["POST"]),
        Route("/v1/address", cluster.address),
        Route("/v1/supervisor", cluster.supervisor),
        Route("/v1/workers", cluster.workers),
        Route("/v1/cluster/info", cluster.info),
        Route("/v1/cluster/version", cluster.version),
        Route("/v1/cluster/devices", cluster.devices),
        Route("/v1/cluster/ui_config", cluster.ui_config),
        Route("/v1/clusters", cluster.abort, methods=["DELETE"]),
        #
        Route("/v1/model_registrations/{model_type}", registrations.list_all),
        Route("/v1/model_registrations/{model_type}", registrations.register, methods=["POST"]),
        Route("/v1/model_registrations/{model_type}/{model_name}", registrations.get),
        Route("/v1/model_registrations/{model_type}/{model_name}", registrations.unregister, methods=["DELETE"]),
        Route("/v1/engines/{model_type}/{model_name}", registrations.engines),
        Route("/v1/engines/{model_name}", registrations.engines),
        Route("/v1/cache/models", cached.list_all),
        Route("/v1/cache/models", cached.remove, methods=["DELETE"]),
        Route("/v1/cache/models/files", cached.files),
        Route("/v1/cache/leftovers", cached.remove_leftovers, methods=["DELETE"]),
        Route("/v1/virtualenvs", cached.list_virtualenvs),
        Route("/v1/virtualenvs", cached.remove_virtualenv, methods=["DELETE"]),
        #
        Route("/v1/config", config.get),
        Route("/v1/config/apply", config.apply, methods=["POST"]),
        Route("/v1/config/export", config.export),
        #
        Route("/v1/launch_history", history.list_all),
        Route("/v1/launch_history", history.add, methods=["POST"]),
        Route("/v1/launch_history/{model_name}", history.remove, methods=["DELETE"]),
        Route("/v1/launch_history/{model_name}/{model_uid:path}", history.remove, methods=["DELETE"]),
        Route("/v1/autostart/models", autostart.get),
        Route("/v1/autostart/models", autostart.upsert, methods=["POST"]),
        Route("/v1/autostart/models/summary", autostart.summary),
        Route("/v1/autostart/models/{uid:path}", autostart.remove, methods=["DELETE"]),
        #
        Route("/v1/replicas", models.list_replicas),
        Route("/v1/models", models.list_models),
        Route("/v1/models", models.launch, methods=["POST"]),
        Route("/v1/models/check", Check(fleet).check, methods=["POST"]),
        # Fixed words go before uids, which may not be any of them.
        Route("/v1/models/families", registrations.families),
        Route("/v1/models/prompts", registrations.prompts),
        Route("/v1/models/vllm-supported", registrations.vllm_supported),
        Route("/v1/models/update_type", registrations.update_type, methods=["POST"]),
        Route("/v1/models/llm/auto-register", registrations.draft, methods=["POST"]),
        Route("/v1/models/instances", models.instances),
        Route("/v1/models/instance", models.launch_version, methods=["POST"]),
        Route("/v1/models/{model_type}/{model_name}/versions", registrations.versions),
        Route("/v1/models/{uid:path}/start", models.start, methods=["POST"]),
        Route("/v1/models/{uid:path}/stop", models.stop, methods=["POST"]),
        Route("/v1/models/{uid:path}/sleep", models.sleep, methods=["POST"]),
        Route("/v1/models/{uid:path}/wake", models.wake, methods=["POST"]),
        Route("/v1/models/{uid:path}/logs", models.logs),
        Route("/v1/models/{uid:path}/progress", models.progress),
        Route("/v1/models/{uid:path}/requests/{request_id}/abort", requests.abort, methods=["POST"]),
        Route("/v1/requests/{request_id}/progress", requests.progress),
        Route("/v1/models/{uid:path}/cancel", models.cancel, methods=["POST"]),
        Route("/v1/models/{uid:path}/events", models.events),
        Route("/v1/models/{uid:path}/queue", QueueFacts(fleet).get),
        Route("/v1/models/{uid:path}/replicas", models.model_replicas),
        Route("/v1/models/{uid:path}/replicas", models.add_replicas, methods=["POST"]),
        Route("/v1/models/{uid:path}/replicas/{replica:int}", models.remove_replica, methods=["DELETE"]),
        Route("/v1/models/{uid:path}/reload", reloads.status),
        Route("/v1/models/{uid:path}/reload", reloads.start, methods=["POST"]),
        Route("/v1/models/{uid:path}/reload/config", reloads.config),
        Route("/v1/models/{uid:path}", models.get_model),
        Route("/v1/models/{uid:path}", models.terminate, methods=["DELETE"]),
    ]
    routes += [Route(path, _is_one_process, methods=["GET", "POST"]) for path in RELAUNCHES]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(NextDoor, fleet=fleet),
            Middleware(Trace, settings=fleet.in_effect),
            Middleware(CrossOrigin, settings=fleet.in_effect),
            Middleware(Guard, settings=fleet.in_effect),
        ],
        exception_handlers={HostlerError: _ours, HTTPException: _starlettes},
    )


async def _ours(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HostlerError)
    return answer(exc)


async def _starlettes(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    what = f"{request.method} {request.url.path}"
    if exc.status_code == 404:
        return answer(NotFound(f"There is no {what} here."))
    refusal = answer(BadRequest(f"{what}: {exc.detail}."))
    refusal.status_code = exc.status_code
    refusal.headers.update(exc.headers or {})
    return refusal


async def _is_one_process(request: Request) -> Response:
    raise NotImplementedYet(
        "This gateway is one process: `POST /v1/restart`, or `hostler restart`, restarts it and leaves its engines "
        "running; `POST /v1/models/{uid}/reload` restarts the replicas of one."
    )
