"""hostler.AsyncClient: the same methods as the other client, awaited."""

from __future__ import annotations

import asyncio
import inspect
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness import StartGateway
from hostler import AsyncClient, Client, ClientError
from stand_in import LOADING, READY, Raw, StandIn, Turns

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def stand_in() -> AsyncIterator[StandIn]:
    async with StandIn() as server:
        yield server


def parameters(kind: type, name: str) -> list[tuple[str, object]]:
    found = inspect.signature(getattr(kind, name)).parameters
    return [(one.name, one.default) for one in found.values()]


def methods(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_both_clients_have_the_same_methods() -> None:
    assert methods(AsyncClient) - {"aclose"} == methods(Client)
    differing = [name for name in methods(Client) if parameters(Client, name) != parameters(AsyncClient, name)]
    assert differing == []


async def test_the_life_of_a_model(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    file = tmp_path / "tiny-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    async with AsyncClient(gateway.address) as client:
        assert await client.health()
        assert not await client.needs_key()
        assert await client.launch(model_path=str(file), model_uid="org/tiny") == "org/tiny"
        assert (await client.get_model("org/tiny"))["status"] == "ready"
        assert [one["uid"] for one in await client.replicas()] == ["org/tiny"]
        assert (await client.complete("org/tiny", "x", max_tokens=4))["choices"]
        assert (await client.chat("org/tiny", MESSAGES))["choices"][0]["message"]["content"]
        assert [chunk async for chunk in client.chat_stream("org/tiny", MESSAGES)]
        assert [chunk async for chunk in client.complete_stream("org/tiny", "x")]
        assert (await client.stop("org/tiny", force=True))["status"] == "stopped"
        assert (await client.start("org/tiny"))["id"] == "org/tiny"
        assert all(isinstance(line, str) for line in [line async for line in client.logs("org/tiny", lines=5)])
        await client.terminate("org/tiny")
        assert await client.list_models() == []


async def test_many_at_once(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"token_delay_s": 0.02})
    async with AsyncClient(gateway.address) as client:
        answers = await asyncio.gather(*(client.complete("fake", "x") for _ in range(20)))
    assert len(answers) == 20


async def test_a_refusal_has_its_status_and_its_text(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(api_keys=["secret"])
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(ClientError, match="API key") as caught:
            await client.list_models()
    assert caught.value.status == 401
    async with AsyncClient(gateway.address, "secret") as client:
        assert await client.list_models() == []
        with pytest.raises(ClientError, match=r"a b/c\?d#e"):
            await client.get_model("a b/c?d#e")


async def test_nobody_there_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with AsyncClient(f"http://127.0.0.1:{taken.getsockname()[1]}") as client:
            with pytest.raises(ClientError, match="There is no gateway at"):
                await client.health()


async def test_a_stream_that_breaks_off_is_told(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"die_after_tokens": 2})
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(ClientError):
            [chunk async for chunk in client.complete_stream("fake", "x")]


async def test_a_launch_is_followed(stand_in: StandIn) -> None:
    stand_in.answers["GET", "/v1/models/instances"] = Turns([LOADING, READY])
    stand_in.answers["GET", "/v1/models/m/progress"] = {"progress": 0.5, "stage": "loading"}
    async with AsyncClient(stand_in.address) as client:
        uid = await client.launch("m", wait=False)
        steps = [(step.stage, step.is_ready) async for step in client.launch_progress(uid, pause_s=0)]
    assert steps == [("loading", False), ("completed", True)]


async def test_what_is_asked_is_the_same_of_both(stand_in: StandIn) -> None:
    async with AsyncClient(stand_in.address, "key") as client:
        assert await client.register({"model_name": "mine"}, persist=True) == ""
        await client.registrations()
        await client.get_registration("mine")
        await client.unregister("mine")
        await client.engines("qwen3")
        assert await client.engines("nothing") is None
        await client.cached_models()
        await client.cached_files("v w")
        await client.remove_cached("v")
        await client.vllm_models()
        await client.login("u", "p")
        await client.cancel("m")
        await client.terminate("m")
        await client.rerank("r", "q", ["a", "b"])
        await client.embed("e", ["ü"])
    asked, stand_in.asked = stand_in.asked, []

    def use() -> None:
        client = Client(stand_in.address, "key")
        client.register({"model_name": "mine"}, persist=True)
        client.registrations()
        client.get_registration("mine")
        client.unregister("mine")
        client.engines("qwen3")
        client.engines("nothing")
        client.cached_models()
        client.cached_files("v w")
        client.remove_cached("v")
        client.vllm_models()
        client.login("u", "p")
        client.cancel("m")
        client.terminate("m")
        client.rerank("r", "q", ["a", "b"])
        client.embed("e", ["ü"])

    await asyncio.to_thread(use)
    assert asked == stand_in.asked


async def test_long_lines_and_torn_ones_are_read(stand_in: StandIn) -> None:
    text = "x" * 200_000
    line = b'data: {"choices": [{"text": "%s"}]}\r\n\r\n' % text.encode()
    stand_in.answers["POST", "/v1/completions"] = Raw(line[:100_000], line[100_000:], b"data: [DO", b"NE]\r\n\r\n")
    async with AsyncClient(stand_in.address) as client:
        chunks = [chunk async for chunk in client.complete_stream("m", "x")]
    assert chunks == [{"choices": [{"text": text}]}]
