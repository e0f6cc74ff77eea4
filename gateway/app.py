"""THE MAP: every route, the middleware, and the table of errors."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.api.auth import Guard
from gateway.api.inference import Inference
from gateway.api.models import Models
from gateway.api.system import System
from gateway.api.trace import HEADER, Trace
from gateway.api.wire import ChatHead, CompletionHead, EmbeddingHead
from gateway.errors import BadRequest, HostlerError, NotFound, answer
from gateway.fleet import Fleet

# Pages that this machine itself serves; see Guard for the others.
LOOPBACK_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


def create_app(fleet: Fleet) -> Starlette:
    """The door in front of a fleet, as an ASGI app."""
    system, models = System(fleet), Models(fleet)
    routes = [
        Route("/", system.root),
        Route("/health", system.health),
        Route("/ready", system.ready),
        Route("/metrics", system.metrics),
        Route("/v1/cluster/auth", system.auth),
        #
        *[
            Route(path, Inference(fleet, path, head), methods=["POST"])
            for path, head in (
                ("/v1/chat/completions", ChatHead),
                ("/v1/completions", CompletionHead),
                ("/v1/embeddings", EmbeddingHead),
            )
        ],
        #
        Route("/v1/replicas", models.list_replicas),
        Route("/v1/models", models.list_models),
        Route("/v1/models", models.launch, methods=["POST"]),
        Route("/v1/models/{uid:path}/start", models.start, methods=["POST"]),
        Route("/v1/models/{uid:path}/stop", models.stop, methods=["POST"]),
        Route("/v1/models/{uid:path}/logs", models.logs),
        Route("/v1/models/{uid:path}", models.get_model),
        Route("/v1/models/{uid:path}", models.terminate, methods=["DELETE"]),
    ]
    settings = fleet.settings
    cross_origin = Middleware(
        CORSMiddleware,
        allow_origins=settings.allowed_origins,
        allow_origin_regex=LOOPBACK_ORIGIN,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=[HEADER.decode()],
    )
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(Trace, is_logging=settings.access_log),
            cross_origin,
            Middleware(Guard, settings=settings),
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
