"""LangChain's classes for Xinference, and those for OpenAI, unchanged, against a running gateway and real models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from harness import Gateway
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from langchain_xinference import ChatXinference, Xinference, XinferenceEmbeddings
from launched import EMBEDDING, LLM

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    # langchain-xinference awaits its callbacks nowhere.
    pytest.mark.filterwarnings("ignore:coroutine 'AsyncCallbackManager:RuntimeWarning"),
]

PROMPT = "The capital of France is"
FEW = {"max_tokens": 6, "temperature": 0}
UNTIL_STOPPED = {"generate_config": FEW | {"max_tokens": 20}}


@pytest_asyncio.fixture(loop_scope="module")
async def made() -> AsyncIterator[list[Any]]:
    """Objects with a client of Xinference each; they are closed where they were made: in a running loop."""
    objects: list[Any] = []
    yield objects
    for one in objects:
        await one.async_client.close()


@pytest_asyncio.fixture(loop_scope="module")
async def llm(gateway: Gateway, made: list[Any]) -> Xinference:
    made.append(Xinference(server_url=gateway.address, model_uid=LLM, **FEW))
    return made[-1]


@pytest_asyncio.fixture(loop_scope="module")
async def chat(gateway: Gateway, made: list[Any]) -> ChatXinference:
    made.append(ChatXinference(server_url=gateway.address, model_uid=LLM, **FEW))
    return made[-1]


@pytest_asyncio.fixture(loop_scope="module")
async def embeddings(gateway: Gateway, made: list[Any]) -> XinferenceEmbeddings:
    made.append(XinferenceEmbeddings(server_url=gateway.address, model_uid=EMBEDDING))
    return made[-1]


async def test_a_completion_is_whole_or_streamed_or_stopped(llm: Xinference) -> None:
    whole = await asyncio.to_thread(llm.invoke, PROMPT)
    assert whole.startswith(" Paris")
    pieces = await asyncio.to_thread(lambda: list(llm.stream(PROMPT)))
    assert (pieces[0], "".join(pieces)) == (" Paris", whole)
    stopped = await asyncio.to_thread(llm.invoke, PROMPT, stop=["."], **UNTIL_STOPPED)
    assert stopped == " Paris"


async def test_a_completion_without_a_thread(llm: Xinference) -> None:
    whole = await llm.ainvoke(PROMPT)
    assert whole.startswith(" Paris")
    assert "".join([piece async for piece in llm.astream(PROMPT)]) == whole
    assert await llm.abatch([PROMPT, PROMPT]) == [whole, whole]


async def test_a_chat_answers(chat: ChatXinference) -> None:
    messages = [("system", "Be brief."), ("human", "Say hello.")]
    answer = await asyncio.to_thread(chat.invoke, messages)
    assert answer.content
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert (await chat.ainvoke(messages)).content == answer.content


async def test_a_chat_is_streamed(chat: ChatXinference) -> None:
    pieces = await asyncio.to_thread(lambda: [piece.content for piece in chat.stream("Say hello.")])
    assert len(pieces) > 2
    assert "".join(pieces) == (await chat.ainvoke("Say hello.")).content


async def test_embeddings(embeddings: XinferenceEmbeddings) -> None:
    cat, dog = await asyncio.to_thread(embeddings.embed_documents, ["a cat", "a dog"])
    assert len(cat) == len(dog) == 576
    assert cat != dog
    assert await asyncio.to_thread(embeddings.embed_query, "a cat") == pytest.approx(cat, abs=1e-3)
    assert await embeddings.aembed_query("a dog") == pytest.approx(dog, abs=1e-3)


async def test_the_classes_for_openai_answer_too(gateway: Gateway) -> None:
    address = {"base_url": f"{gateway.address}/v1", "api_key": "none"}
    llm = OpenAI(model=LLM, **address, **FEW)
    whole = await llm.ainvoke(PROMPT)
    pieces = [piece async for piece in llm.astream(PROMPT)]
    assert (pieces[0], "".join(pieces)) == (" Paris", whole)
    chat = ChatOpenAI(model=LLM, **address, **FEW)
    answer = await chat.ainvoke("Say hello.")
    assert answer.usage_metadata["output_tokens"] <= 6
    assert "".join([piece.content async for piece in chat.astream("Say hello.")]) == answer.content
    # Without this flag texts are sent as tokens of OpenAI's own models.
    embeddings = OpenAIEmbeddings(model=EMBEDDING, check_embedding_ctx_length=False, **address)
    assert [len(vector) for vector in await embeddings.aembed_documents(["a cat", "a dog"])] == [576, 576]
