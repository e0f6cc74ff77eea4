"""A small HTTP server that answers as the documented API does, for clients; it runs no model."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

LAUNCHED = {"model_uid": "m", "model_name": "m", "replica": 1, "replica_statuses": []}

READY = [{**LAUNCHED, "status": "READY"}]
LOADING = [{**LAUNCHED, "status": "CREATING"}]

# method and path -> what is answered; a list of the class Turns is answered item by item, the last one again.
ANSWERS: dict[tuple[str, str], Any] = {
    ("GET", "/v1/cluster/auth"): {"auth": True},
    ("POST", "/token"): {"access_token": "a-token", "refresh_token": "r", "token_type": "bearer"},
    ("GET", "/v1/models"): {
        "object": "list",
        "data": [
            {
                "id": "e",
                "object": "model",
                "created": 0,
                "owned_by": "xinference",
                "model_type": "embedding",
                "model_name": "bge-m3",
                "dimensions": 1024,
                "max_tokens": 8192,
                "model_ability": ["embed"],
                "replica": 1,
            }
        ],
    },
    ("POST", "/v1/models"): {"model_uid": "m"},
    ("GET", "/v1/models/instances"): READY,
    ("GET", "/v1/models/m/progress"): {"progress": 1.0, "stage": "completed", "download_files": [], "replicas": []},
    ("POST", "/v1/models/m/cancel"): None,
    ("DELETE", "/v1/models/m"): None,
    ("GET", "/v1/replicas"): [],
    ("POST", "/v1/model_registrations/LLM"): None,
    ("DELETE", "/v1/model_registrations/LLM/mine"): None,
    ("GET", "/v1/model_registrations/LLM/mine"): {"model_name": "mine", "model_ability": ["generate"]},
    ("GET", "/v1/model_registrations/LLM"): [
        {"model_name": "mine", "is_builtin": False, "model_lang": ["en", "zh"], "model_ability": ["generate"]},
        {"model_name": "qwen3", "is_builtin": True, "model_lang": ["en"], "model_ability": ["chat"]},
    ],
    ("GET", "/v1/engines/LLM/qwen3"): {
        "llama.cpp": [
            {
                "model_name": "qwen3",
                "model_format": "ggufv2",
                "model_size_in_billions": "0_6",
                "quantizations": ["Q4_K_M", "Q8_0"],
            },
            {
                "model_name": "qwen3",
                "model_format": "ggufv2",
                "model_size_in_billions": 8,
                "quantizations": ["Q4_K_M"],
            },
        ],
        "vLLM": "vLLM is not installed",
    },
    ("GET", "/v1/engines/LLM/nothing"): None,
    ("GET", "/v1/cache/models"): {
        "list": [
            {
                "model_name": "qwen3",
                "model_type": "LLM",
                "model_size_in_billions": 8,
                "model_format": "ggufv2",
                "quantization": "Q4_K_M",
                "model_version": "qwen3--8b--ggufv2--Q4_K_M",
                "path": "/cache/qwen3",
                "actor_ip_address": "127.0.0.1",
                "size_bytes": 5_000_000_000,
            }
        ]
    },
    ("GET", "/v1/cache/models/files"): {"model_version": "v", "worker_ip": None, "paths": ["/cache/qwen3/a.gguf"]},
    ("DELETE", "/v1/cache/models"): {"result": True},
    ("DELETE", "/v1/cache/leftovers"): {"freed_bytes": 0},
    ("GET", "/v1/models/vllm-supported"): {"chat": ["qwen3"], "generate": ["opt"]},
    ("POST", "/v1/rerank"): {
        "id": "1",
        "results": [
            {"index": 1, "relevance_score": 0.9, "document": None},
            {"index": 0, "relevance_score": 0.1, "document": None},
        ],
        "meta": {"tokens": None},
    },
    ("POST", "/v1/embeddings"): {
        "object": "list",
        "model": "e",
        "model_replica": "e-rep0",
        "data": [{"index": 0, "object": "embedding", "embedding": [0.1, 0.2, 0.3, 0.4, 0.5]}],
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    },
}


class Turns(list[Any]):
    """Answers, one after the other."""


class Refusal:
    """An answer that is no success."""

    def __init__(self, status: int, detail: str) -> None:
        self.status, self.detail = status, detail


class Raw:
    """An answer that is sent as it is, piece by piece."""

    def __init__(self, *pieces: bytes, content_type: str = "text/event-stream", **headers: str) -> None:
        self.pieces = pieces
        self.headers = {"Content-Type": content_type} | {name.replace("_", "-"): text for name, text in headers.items()}


class StandIn:
    """The server; `asked` holds every request, `answers` may be changed."""

    def __init__(self) -> None:
        self.answers = dict(ANSWERS)
        self.asked: list[dict[str, Any]] = []
        self.address = ""

    async def __aenter__(self) -> StandIn:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._runner.cleanup()

    def requests(self, method: str, path: str) -> list[dict[str, Any]]:
        """What was asked so far, by method and path as sent."""
        return [one for one in self.asked if (one["method"], one["path"]) == (method, path)]

    def body(self, method: str, path: str) -> Any:
        """The body of the only such request."""
        (one,) = self.requests(method, path)
        return one["body"]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        content = await request.read()
        path = request.raw_path.partition("?")[0]
        self.asked.append(
            {
                "method": request.method,
                "path": path,
                "query": dict(request.query),
                "body": json.loads(content) if content else None,
                "key": request.headers.get("Authorization"),
            }
        )
        answer = self.answers.get((request.method, path), Refusal(404, f"There is no {path} here."))
        if isinstance(answer, Turns):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if isinstance(answer, Refusal):
            return web.json_response({"detail": answer.detail}, status=answer.status)
        if not isinstance(answer, Raw):
            return web.json_response(answer)
        response = web.StreamResponse(headers=answer.headers)
        await response.prepare(request)
        for piece in answer.pieces:
            await response.write(piece)
            await asyncio.sleep(0.01)
        return response
