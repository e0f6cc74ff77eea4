"""Models that are served elsewhere: by a peer, which is a gateway of its own here, or by something that fails."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from harness import Gateway, StartGateway
from openai import AsyncOpenAI
from xinference_client import RESTfulClient

KEY = "the-peers-own-key"


def remote(base_url: str, **options: Any) -> dict[str, Any]:
    return {"model_engine": "remote", "options": {"base_url": base_url} | options}


# --- a real peer


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def peers(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Gateway, Gateway]]:
    """The one that has the model, and the one that knows of it."""
    options = {"n_threads": 1, "context_length": 1024, "embedding": True, "pooling": "mean"}
    model = {"model_path": str(smollm2_gguf), "options": options}
    far = await Gateway.start(tmp_path_factory.mktemp("far"), {"models": {"smol": model}, "api_keys": [KEY]})
    here = {"mine": remote(far.address, api_key="${FAR_KEY}", model="smol")}
    near = await Gateway.start(tmp_path_factory.mktemp("near"), {"models": here}, {"FAR_KEY": KEY})
    yield far, near
    assert await near.end() == 0
    assert await far.end() == 0


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
async def test_the_openai_sdk_knows_it_by_our_name(peers: tuple[Gateway, Gateway]) -> None:
    _, near = peers
    async with AsyncOpenAI(base_url=near.address + "/v1", api_key="none", max_retries=0, timeout=120) as client:
        whole = await client.completions.create(
            model="mine", prompt="The capital of France is", max_tokens=3, temperature=0
        )
        assert (whole.choices[0].text[:6], whole.model) == (" Paris", "mine")
        stream = await client.chat.completions.create(
            model="mine", messages=[{"role": "user", "content": "hi"}], max_tokens=4, stream=True
        )
        assert {chunk.model async for chunk in stream} == {"mine"}
        embedded = await client.embeddings.create(model="mine", input=["a", "b"])
        assert (len(embedded.data), embedded.model) == (2, "mine")
    metrics = (await near.get("/metrics")).body.decode()
    counted = [line for line in metrics.splitlines() if line.startswith("hostler_requests_total")]
    assert any('model="mine"' in line and "/v1/embeddings" in line and line.endswith(" 1.0") for line in counted)


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
async def test_xinferences_client_talks_to_it(peers: tuple[Gateway, Gateway]) -> None:
    def talk() -> Any:
        client = RESTfulClient(peers[1].address)
        assert client.list_models()["mine"]["model_engine"] == "remote"
        return client.get_model("mine").generate("The capital of France is", {"max_tokens": 3, "temperature": 0})

    assert (await asyncio.to_thread(talk))["choices"][0]["text"].strip().startswith("Paris")


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
async def test_no_process_of_ours_runs_for_it_and_its_key_is_nowhere_to_be_read(
    peers: tuple[Gateway, Gateway],
) -> None:
    _, near = peers
    assert (await near.complete("mine", max_tokens=1)).status == 200
    replica = await near.until("mine", state="ready")
    assert (replica["pid"], replica["memory_bytes"]) == (None, None)
    assert replica["address"].endswith("/v1")
    for path in ("/v1/models", "/v1/models/mine", "/v1/replicas", "/v1/models/instances", "/v1/models/mine/events"):
        assert KEY not in (await near.get(path)).body.decode()
    assert KEY not in near.log.read_text()


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
async def test_a_client_that_leaves_stops_the_peers_work(peers: tuple[Gateway, Gateway]) -> None:
    far, near = peers
    body = {"model": "mine", "prompt": "x", "stream": True, "max_tokens": 900, "ignore_eos": True}
    async with near.session.post(near.address + "/v1/completions", json=body) as response:
        await response.content.readline()
    auth = {"Authorization": f"Bearer {KEY}"}
    async with asyncio.timeout(20):
        while (await far.get("/v1/replicas", headers=auth)).json[0]["in_flight"]:
            await asyncio.sleep(0.05)


# --- what can go wrong


async def test_a_wrong_key_is_told_with_the_address(start_gateway: StartGateway, tmp_path: Path) -> None:
    far = await start_gateway(fake={}, api_keys=[KEY], home=tmp_path / "far")
    near = await start_gateway(models={"mine": remote(far.address, api_key="wrong")}, home=tmp_path / "near")
    answer = await near.complete("mine")
    assert answer.status == 503
    assert f"GET {far.address}/v1/models: it answered 401" in answer.error["message"]
    assert "api_key" in answer.error["message"]
    assert "wrong" not in answer.error["message"]


async def test_nobody_there_is_told_with_the_address(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(models={"mine": remote("http://127.0.0.1:9")}, restart_limit=1)
    answer = await gateway.complete("mine")
    assert answer.status == 503
    assert "GET http://127.0.0.1:9/v1/models: Cannot connect to host" in answer.error["message"]
    assert "tried again every 30 s" in answer.error["message"]


async def test_a_peer_that_goes_away_is_noticed_and_found_again(start_gateway: StartGateway) -> None:
    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": []})

    async def complete(request: web.Request) -> web.Response:
        return web.json_response({"model": (await request.json())["model"], "choices": [{"text": "hi"}]})

    server = await served({"/v1/models": models, "/v1/completions": complete})
    model = remote(server.address, probe_interval_s=0.2, model="theirs")
    gateway = await start_gateway(models={"mine": model}, probe_failures=2)
    answer = await gateway.complete("mine")
    assert (answer.status, answer.json["model"]) == (200, "mine")
    await server.stop()
    during = await gateway.complete("mine")
    assert during.status in (502, 503)
    async with asyncio.timeout(20):
        while (await gateway.until("mine"))["state"] == "ready":
            await asyncio.sleep(0.05)
    failure = (await gateway.until("mine"))["failure"]
    assert "has not answered its health check" in failure["reason"] or "is not served there" in failure["reason"]
    again = await served({"/v1/models": models, "/v1/completions": complete}, port=server.port)
    assert (await gateway.complete("mine")).status == 200
    await again.stop()


async def test_an_answer_that_stops_coming_is_lost_after_timeout_s_and_not_asked_for_twice(
    start_gateway: StartGateway,
) -> None:
    asked: list[str] = []

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": []})

    async def never(request: web.Request) -> web.Response:
        asked.append(request.path)
        await asyncio.sleep(60)
        return web.Response()

    server = await served({"/v1/models": models, "/v1/completions": never})
    gateway = await start_gateway(models={"mine": remote(server.address, timeout_s=1)})
    answer = await gateway.complete("mine")
    assert (answer.status, answer.error["code"]) == (502, "engine_died")
    assert len(asked) == 1
    await server.stop()


async def test_a_request_that_goes_in_a_circle_ends(start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    body = {"model_uid": "mine", "model_engine": "remote", "base_url": gateway.address}
    assert (await gateway.post("/v1/models", body)).status == 200
    answer = await gateway.complete("mine")
    assert answer.status == 400
    assert "the `base_url` of 'mine' leads back here" in answer.error["message"]
    assert gateway.log.read_text().count("POST /v1/completions") < 10


async def test_own_headers_go_along_and_the_clients_key_does_not(start_gateway: StartGateway) -> None:
    seen: list[Any] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(dict(request.headers) | {"path": request.path})
        return web.json_response({"data": []})

    server = await served({"/x/openai/models": answer, "/x/openai/embeddings": answer})
    model = remote(f"{server.address}/x/openai", headers={"api-key": "k"}) | {"model_type": "embedding"}
    gateway = await start_gateway(models={"mine": model}, api_keys=["door"])
    body = {"model": "mine", "input": "x"}
    done = await gateway.post("/v1/embeddings", body, headers={"Authorization": "Bearer door"})
    assert done.status == 200
    assert {one["path"] for one in seen} == {"/x/openai/models", "/x/openai/embeddings"}
    assert {one["api-key"] for one in seen} == {"k"}
    assert not any("Authorization" in one for one in seen)
    await server.stop()


async def test_own_headers_take_the_place_of_the_clients(start_gateway: StartGateway) -> None:
    seen: list[list[str]] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.getall("Api-Key"))
        return web.json_response({"choices": []})

    server = await served({"/v1/models": answer, "/v1/completions": answer})
    gateway = await start_gateway(models={"mine": remote(server.address, headers={"api-key": "ours"})})
    done = await gateway.post("/v1/completions", {"model": "mine", "prompt": "x"}, headers={"api-key": "theirs"})
    assert done.status == 200
    assert seen == [["ours"], ["ours"]]
    await server.stop()


async def test_a_peer_that_packs_its_replies_where_it_may_gets_no_chance_to(start_gateway: StartGateway) -> None:
    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": []})

    async def rank(request: web.Request) -> web.Response:
        results = [{"index": index, "relevance_score": index / 10} for index in range(2)]
        reply = web.json_response({"model": "theirs", "results": results})
        reply.enable_compression()  # if the request says so
        return reply

    server = await served({"/v1/models": models, "/v1/rerank": rank})
    model = remote(server.address, model="theirs") | {"model_type": "rerank"}
    gateway = await start_gateway(models={"mine": model})
    body = {"model": "mine", "query": "q", "documents": ["a", "b"], "top_n": 1}
    answer = await gateway.post("/v1/rerank", body, headers={"accept-encoding": "gzip"})
    assert answer.json["model"] == "mine"
    assert [result["index"] for result in answer.json["results"]] == [1]
    await server.stop()


async def test_a_form_gets_the_name_that_is_known_there(start_gateway: StartGateway) -> None:
    heard: list[Any] = []

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": []})

    async def transcribe(request: web.Request) -> web.Response:
        form = await request.post()
        heard.append((form["model"], form["file"].file.read(), form["language"]))
        return web.json_response({"text": "hello"})

    server = await served({"/v1/models": models, "/v1/audio/transcriptions": transcribe})
    model = remote(server.address, model="whisper-1") | {"model_type": "audio"}
    gateway = await start_gateway(models={"mine": model})
    async with AsyncOpenAI(base_url=gateway.address + "/v1", api_key="none", max_retries=0) as client:
        said = await client.audio.transcriptions.create(
            model="mine", file=("a.wav", b"RIFF\r\n--not a boundary\r\n"), language="en"
        )
    assert said.text == "hello"
    assert heard == [("whisper-1", b"RIFF\r\n--not a boundary\r\n", "en")]
    await server.stop()


async def test_a_launch_over_the_api_keeps_its_key_in_a_private_file(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    far = await start_gateway(fake={}, api_keys=[KEY], home=tmp_path / "far")
    near = await start_gateway(home=tmp_path / "near")
    body = {"model_uid": "mine", "model_engine": "remote", "base_url": far.address, "api_key": KEY, "model": "fake"}
    assert (await near.post("/v1/models", body)).status == 200
    assert (await near.complete("mine")).json["model"] == "mine"
    for path in ("/v1/models/mine/reload/config", "/v1/autostart/models"):
        shown = (await near.get(path)).body.decode()
        assert "api_key" in shown
        assert KEY not in shown
    (file,) = (near.home / "launches").glob("*.json")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text())["options"]["api_key"] == KEY
    await near.end(signal.SIGKILL)
    again = await start_gateway(home=tmp_path / "near")
    assert (await again.complete("mine")).status == 200


async def test_certificates_are_verified(start_gateway: StartGateway, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    argv += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(argv, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"choices": [], "model": "mine"})

    server = await served({"/v1/models": answer, "/v1/completions": answer}, tls=tls)
    model = remote(server.address.replace("127.0.0.1", "localhost"))
    stranger = await start_gateway(models={"mine": model}, restart_limit=1, home=tmp_path / "stranger")
    refused = await stranger.complete("mine")
    assert refused.status == 503
    assert "certificate verify failed" in refused.error["message"].lower()
    friend = await start_gateway(
        models={"mine": model}, home=tmp_path / "friend", env={"SSL_CERT_FILE": str(certificate)}
    )
    assert (await friend.complete("mine")).status == 200
    await server.stop()


class Served:
    """A server on loopback."""

    def __init__(self, runner: web.AppRunner, scheme: str) -> None:
        self._runner = runner
        self.port = runner.addresses[0][1]
        self.address = f"{scheme}://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        await self._runner.cleanup()


async def served(routes: dict[str, Any], *, port: int = 0, tls: ssl.SSLContext | None = None) -> Served:
    app = web.Application()
    for path, handler in routes.items():
        app.router.add_route("*", path, handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
    return Served(runner, "https" if tls else "http")
