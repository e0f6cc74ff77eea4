"""GGUF files that embed or rank, launched without an engine's name: llama.cpp is chosen, and made to do it.

SmolLM2 was trained for neither, so nothing is asserted of what its vectors and scores say.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from harness import Gateway

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

OPTIONS = {"n_threads": 1, "context_length": 1024, "n_parallel": 2}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    model = {"model_path": str(smollm2_gguf), "options": OPTIONS}
    pooled = {"options": OPTIONS | {"pooling": "mean"}}  # which files of embedding models say themselves
    models = {"ranks": model | {"model_type": "rerank"}, "embeds": model | pooled | {"model_type": "embedding"}}
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), {"models": models})
    yield gateway
    assert await gateway.end() == 0


async def test_documents_are_scored_each(gateway: Gateway) -> None:
    body = {"model": "ranks", "query": "the capital of France", "documents": ["Paris", "bananas", "Paris"]}
    answer = await gateway.post("/v1/rerank", body)
    assert answer.status == 200, answer.body
    assert sorted(result["index"] for result in answer.json["results"]) == [0, 1, 2]
    replica = await gateway.until("ranks", state="ready")
    assert replica["engine"] == "llama.cpp"


async def test_an_input_longer_than_the_engines_own_batch_is_embedded_whole(gateway: Gateway) -> None:
    answer = await gateway.post("/v1/embeddings", {"model": "embeds", "input": "word " * 700})
    assert answer.status == 200, answer.body
    assert answer.json["usage"]["prompt_tokens"] > 700
    assert len(answer.json["data"][0]["embedding"]) == 576
