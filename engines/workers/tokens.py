"""Routes over a model's tokenizer, and the figures of a batcher: what workers for embeddings and ranking share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from engines.workers.batching import Batcher
from engines.workers.encoder import Encoder
from engines.workers.server import Refused, flag, read_json

GAUGES: dict[str, Callable[[Batcher[Any]], int]] = {
    "worker:inputs_waiting": lambda batcher: batcher.waiting_inputs,
    "worker:tokens_waiting": lambda batcher: batcher.waiting_tokens,
    "worker:batches_total": lambda batcher: batcher.batches,
    "worker:inputs_total": lambda batcher: batcher.inputs,
    "worker:tokens_total": lambda batcher: batcher.tokens,
    "worker:padded_tokens_total": lambda batcher: batcher.padded_tokens,
}


def gauges(batcher: Batcher[Any]) -> str:
    """What waits and what was done, as Prometheus reads it."""
    return "".join(f"{name} {value_of(batcher)}\n" for name, value_of in GAUGES.items())


def token_routes(encoder: Encoder) -> list[BaseRoute]:
    """`/tokenize`, `/detokenize` and `/v1/convert_ids_to_tokens`."""

    def tokenizer() -> Any:
        if encoder.tokenizer is None:
            raise Refused("This model has no tokenizer.")
        return encoder.tokenizer

    async def tokenize(request: Request) -> Response:
        body = await read_json(request)
        text = next((body[name] for name in ("content", "prompt", "input") if body.get(name) is not None), None)
        if not isinstance(text, str):
            raise Refused("`content` is the text to split into tokens.", param="content")
        special = flag(body.get("add_special_tokens"), "add_special_tokens", default=True)
        tokenizer()
        found = await asyncio.to_thread(encoder.ids, text, add_special_tokens=special)
        return JSONResponse({"tokens": found, "count": len(found), "max_model_len": encoder.max_tokens})

    async def detokenize(request: Request) -> Response:
        body = await read_json(request)
        ids = _ids(body.get("tokens"), "tokens", tokenizer())
        text = tokenizer().decode(ids)
        return JSONResponse({"content": text, "prompt": text})

    async def convert(request: Request) -> Response:
        given = (await read_json(request)).get("input")
        if isinstance(given, list) and given and all(isinstance(one, list) for one in given):
            return JSONResponse([tokenizer().convert_ids_to_tokens(_ids(one, "input", tokenizer())) for one in given])
        return JSONResponse(tokenizer().convert_ids_to_tokens(_ids(given, "input", tokenizer())))

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/v1/convert_ids_to_tokens", convert, methods=["POST"]),
    ]


def _ids(given: Any, name: str, tokenizer: Any) -> list[int]:
    """Token ids, also written as text, as the keys of sparse embeddings are. Raises Refused otherwise."""
    try:
        ids = [int(one) for one in given]
    except (TypeError, ValueError) as exc:
        raise Refused(f"`{name}` is a list of token ids.", param=name) from exc
    size = len(tokenizer)
    for one in ids:
        if not 0 <= one < size:
            raise Refused(
                f"The token id {one} is not one of this model, which has ids from 0 to {size - 1}.", param=name
            )
    return ids
