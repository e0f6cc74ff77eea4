"""LlamaIndex's embeddings for Xinference, unchanged, against a running gateway and a real model.

Its language model for Xinference is left out: it calls `chat(prompt=, chat_history=)`, which no client of Xinference
takes any more, and asks for the package `xinference` itself.
"""

from __future__ import annotations

import asyncio

import pytest
from harness import Gateway
from launched import EMBEDDING
from llama_index.core import Document, VectorStoreIndex
from llama_index.embeddings.xinference import XinferenceEmbedding

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture
def embedding(gateway: Gateway) -> XinferenceEmbedding:
    return XinferenceEmbedding(model_uid=EMBEDDING, base_url=gateway.address)


async def test_texts_and_queries_are_embedded(embedding: XinferenceEmbedding) -> None:
    cat, dog = await asyncio.to_thread(embedding.get_text_embedding_batch, ["a cat", "a dog"])
    assert len(cat) == len(dog) == 576
    assert cat != dog
    assert await asyncio.to_thread(embedding.get_query_embedding, "a cat") == pytest.approx(cat, abs=1e-3)


async def test_an_index_finds_the_text_that_was_asked_for(embedding: XinferenceEmbedding) -> None:
    texts = ["The cat sleeps on the sofa.", "Interest rates rose again.", "The train leaves at nine."]

    def ask() -> str:
        index = VectorStoreIndex.from_documents([Document(text=text) for text in texts], embed_model=embedding)
        return index.as_retriever(similarity_top_k=1).retrieve(texts[1])[0].text

    assert await asyncio.to_thread(ask) == texts[1]


async def test_a_model_that_is_not_there_is_told(gateway: Gateway) -> None:
    with pytest.raises(Exception, match="status code 404"):
        await asyncio.to_thread(XinferenceEmbedding(model_uid="nope", base_url=gateway.address).get_text_embedding, "x")
