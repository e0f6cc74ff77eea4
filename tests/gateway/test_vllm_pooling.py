"""vLLM's pooling models on the CPU behind the gateway: an embedding model and a reranker, both real."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from harness import Answer, Gateway
from openai import AsyncOpenAI

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

OPTIONS = {"n_threads": 1, "cpu_kv_cache_gib": 1, "dtype": "float32", "max_num_seqs": 4}
START_LIMIT_S = 400
TEXTS = ["A cat sleeps.", "A kitten naps.", "Shares fell in London."]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(
    vllm_python: str, minilm: Path, tiny_reranker: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    model = {
        "model_engine": "vLLM",
        "options": OPTIONS,
        "start_timeout_s": START_LIMIT_S,
        "load_timeout_s": START_LIMIT_S,
    }
    settings = {
        "engines": {"vLLM": {"python": vllm_python}},
        "models": {
            "vectors": model | {"model_type": "embedding", "model_path": str(minilm)},
            "judge": model | {"model_type": "rerank", "model_path": str(tiny_reranker)},
        },
    }
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), settings)
    yield gateway
    assert await gateway.end() == 0


async def ask(gateway: Gateway, path: str, **body: Any) -> Answer:
    return await gateway.post(path, body, timeout=aiohttp.ClientTimeout(START_LIMIT_S))


async def test_like_sentences_have_like_vectors(gateway: Gateway) -> None:
    client = AsyncOpenAI(base_url=gateway.address + "/v1", api_key="none", max_retries=0, timeout=START_LIMIT_S)
    answer = await client.embeddings.create(model="vectors", input=TEXTS)
    cat, kitten, shares = (one.embedding for one in answer.data)
    assert len(cat) == 384

    def likeness(one: list[float], other: list[float]) -> float:
        return sum(a * b for a, b in zip(one, other, strict=True))

    assert likeness(cat, kitten) > 0.4 > likeness(cat, shares)
    plain = (await ask(gateway, "/v1/embeddings", model="vectors", input=TEXTS[0])).json
    assert plain["data"][0]["embedding"] == pytest.approx(cat, abs=1e-3)
    assert plain["model_replica"] == "vectors-rep0"
    refused = await ask(gateway, "/v1/chat/completions", model="vectors", messages=[])
    assert (refused.status, "of type embedding" in refused.error["message"]) == (400, True)


async def test_a_cross_encoder_puts_the_answer_first(gateway: Gateway) -> None:
    documents = ["Bananas are yellow.", "Paris is the capital city of France.", "Berlin is a city."]
    answer = await ask(
        gateway,
        "/v1/rerank",
        model="judge",
        query="the capital of France",
        documents=documents,
        return_documents="true",
    )
    assert answer.status == 200, answer.body
    results = answer.json["results"]
    assert results[0] == {
        "index": 1,
        "relevance_score": results[0]["relevance_score"],
        "document": {"text": documents[1]},
    }
    scores = [one["relevance_score"] for one in results]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[1]
