"""Embedding models and rerankers on sentence-transformers, through the gateway: real models, real clients.

What the library itself says of the same inputs is computed once, by its own code in a process of its own.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import pytest_asyncio
from harness import Answer, Gateway
from openai import AsyncOpenAI
from xinference_client import RESTfulClient

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

LOAD_LIMIT_S = 240  # most of it imports torch
OPTIONS = {"n_threads": 1}
TEXTS = ["A cat sits on the mat.", "Katzen schlafen gern. 猫が眠る", "word " * 1000, "", "hello world"]
QUERY = "the capital of France"
DOCUMENTS = ["Bananas are yellow and sweet.", "Paris is the capital city of France.", "Bread is baked in an oven."]
INSTRUCTION = "Find the passage that names the city"

# Prints the vectors and scores that the library gives; the last are Qwen3-Reranker's, as its authors compute them.
REFERENCE = """
import json, sys
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer
minilm, reranker, judge, texts, query, documents, instruction = (json.loads(word) for word in sys.argv[1:])
model = SentenceTransformer(minilm, device="cpu")
vectors = model.encode(texts, batch_size=1, normalize_embeddings=True).tolist()
prompted = model.encode(texts[:1], prompt="query: ", normalize_embeddings=True).tolist()
scores = CrossEncoder(reranker, device="cpu").predict([(query, one) for one in documents]).tolist()
tokenizer = AutoTokenizer.from_pretrained(judge)
network = AutoModelForCausalLM.from_pretrained(judge, dtype=torch.float32).eval()
begin = ("<|im_start|>system\\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\\n<|im_start|>user\\n')
end = "<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n"
judged = []
for one in documents:
    text = f"{begin}<Instruct>: {instruction}\\n<Query>: {query}\\n<Document>: {one}{end}"
    with torch.no_grad():
        logits = network(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, -1]
    words = [tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes")]
    judged.append(float(torch.softmax(logits[words], 0)[1]))
print(json.dumps({"vectors": vectors, "prompted": prompted, "scores": scores, "judged": judged}))
"""


@pytest.fixture(scope="module")
def reference(torch_python: str, minilm: Path, tiny_reranker: Path, smollm2_hf: Path) -> dict[str, Any]:
    words = [str(minilm), str(tiny_reranker), str(smollm2_hf), TEXTS, QUERY, DOCUMENTS, INSTRUCTION]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    argv = [torch_python, "-c", REFERENCE, *map(json.dumps, words)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LOAD_LIMIT_S, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def settings(torch_python: str, models: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"engines": {"sentence_transformers": {"python": torch_python}}, "models": models} | more


def a_model(folder: Path, model_type: str, **fields: Any) -> dict[str, Any]:
    return {"model_path": str(folder), "model_type": model_type, "options": OPTIONS} | fields


@pytest.fixture(scope="module")
def with_sparse_head(torch_python: str, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM with a second head as BGE-M3 has one, which gives each word the weight 0.5."""
    folder = shutil.copytree(minilm, tmp_path_factory.mktemp("sparse") / "m")
    code = "import sys, torch; torch.save({'weight': torch.zeros(1, 384), 'bias': torch.full((1,), 0.5)}, sys.argv[1])"
    subprocess.run([torch_python, "-c", code, str(folder / "sparse_linear.pt")], check=True, timeout=LOAD_LIMIT_S)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(
    torch_python: str,
    with_sparse_head: Path,
    minilm: Path,
    tiny_reranker: Path,
    smollm2_hf: Path,
    tiny_clip: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Gateway]:
    prompts = {"prompts": {"mine": "query: "}, "default_prompt_name": "mine", "normalize_embeddings": False}
    models = {
        "minilm": a_model(minilm, "embedding", preload=True),
        "prompted": a_model(minilm, "embedding", options=OPTIONS | prompts),
        "sparse": a_model(with_sparse_head, "embedding"),
        "reranker": a_model(tiny_reranker, "rerank", preload=True, model_engine="sentence_transformers"),
        "judge": a_model(smollm2_hf, "rerank", model_name="smollm2-reranker"),
        "clip": a_model(tiny_clip, "embedding"),
        "not-a-judge": a_model(smollm2_hf, "rerank"),
    }
    home = tmp_path_factory.mktemp("home")
    gateway = await Gateway.start(home, settings(torch_python, models, restart_limit=2))
    for uid in ("minilm", "reranker"):
        await gateway.until(uid, state="ready", limit_s=LOAD_LIMIT_S)
    yield gateway
    assert await gateway.end() == 0


@pytest.fixture
def client(gateway: Gateway) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=gateway.address + "/v1", api_key="none", max_retries=0, timeout=120)


async def embed(gateway: Gateway, given: Any, model: str = "minilm", **fields: Any) -> Answer:
    return await gateway.post("/v1/embeddings", {"model": model, "input": given} | fields)


def vectors_of(answer: Answer) -> list[list[float]]:
    assert answer.status == 200, answer.body
    assert [one["index"] for one in answer.json["data"]] == list(range(len(answer.json["data"])))
    return [one["embedding"] for one in answer.json["data"]]


def cosine(one: list[float], other: list[float]) -> float:
    def dot(left: list[float], right: list[float]) -> float:
        return sum(a * b for a, b in zip(left, right, strict=True))

    return dot(one, other) / (dot(one, one) * dot(other, other)) ** 0.5


# --- embeddings


async def test_vectors_are_those_of_the_library(gateway: Gateway, reference: dict[str, Any]) -> None:
    vectors = vectors_of(await embed(gateway, TEXTS))
    for mine, theirs in zip(vectors, reference["vectors"], strict=True):
        assert cosine(mine, theirs) > 0.9999
        assert cosine(mine, mine) == pytest.approx(1)
        assert sum(number * number for number in mine) == pytest.approx(1, abs=1e-5)


async def test_one_text_token_ids_and_objects_embed_alike(gateway: Gateway) -> None:
    ids = (await gateway.post("/tokenize", {"model": "minilm", "content": "hello world"})).json["tokens"]
    assert len(ids) == 4
    (by_text,) = vectors_of(await embed(gateway, "hello world"))
    for given in (["hello world"], ids, [ids], {"text": "hello world"}, [{"text": "hello world"}]):
        assert cosine(vectors_of(await embed(gateway, given))[0], by_text) > 0.9999


async def test_base64_is_little_endian_float32_of_the_same_numbers(gateway: Gateway) -> None:
    plain = vectors_of(await embed(gateway, ["a", "b"], encoding_format="float"))
    packed = [base64.b64decode(one) for one in vectors_of(await embed(gateway, ["a", "b"], encoding_format="base64"))]
    for numbers, data in zip(plain, packed, strict=True):
        assert list(struct.unpack("<384f", data)) == pytest.approx(numbers, abs=1e-6)


async def test_the_openai_sdk_reads_both_encodings_and_true_usage(client: AsyncOpenAI) -> None:
    found = await client.embeddings.create(model="minilm", input=["hello world", "hello"])  # it asks for base64
    plain = await client.embeddings.create(model="minilm", input=["hello world", "hello"], encoding_format="float")
    assert found.data[1].embedding == pytest.approx(plain.data[1].embedding, abs=1e-6)
    assert (found.usage.prompt_tokens, found.usage.total_tokens) == (4 + 3, 4 + 3)


async def test_fewer_dimensions_are_the_first_ones_at_length_one(gateway: Gateway) -> None:
    (whole,) = vectors_of(await embed(gateway, "hello"))
    (part,) = vectors_of(await embed(gateway, "hello", dimensions=16))
    assert len(part) == 16
    assert cosine(part, whole[:16]) > 0.9999
    assert sum(number * number for number in part) == pytest.approx(1, abs=1e-5)


async def test_long_texts_are_cut_at_the_models_limit_or_the_requests(gateway: Gateway) -> None:
    async def tokens(**fields: Any) -> int:
        return (await embed(gateway, "word " * 8000, **fields)).json["usage"]["prompt_tokens"]

    assert await tokens() == 256
    assert await tokens(truncate_prompt_tokens=10) == 10
    assert await tokens(truncate_prompt_tokens=-1) == 256
    refused = await embed(gateway, ["short", "word " * 8000], truncate=False)
    assert refused.status == 400
    assert "Input 1 has" in refused.error["message"]
    assert "reads 256" in refused.error["message"]


async def test_prompts_go_before_texts(gateway: Gateway, reference: dict[str, Any]) -> None:
    theirs = reference["prompted"][0]
    for fields in ({"prompt": "query: "}, {"instruction": "query: "}):
        assert cosine(vectors_of(await embed(gateway, TEXTS[0], **fields))[0], theirs) > 0.9999
    assert cosine(vectors_of(await embed(gateway, TEXTS[0]))[0], theirs) < 0.999
    # The launch's own prompt, by default.
    assert cosine(vectors_of(await embed(gateway, TEXTS[0], model="prompted"))[0], theirs) > 0.9999
    assert cosine(vectors_of(await embed(gateway, TEXTS[0], prompt_name="query"))[0], theirs) < 0.999


async def test_a_second_head_weighs_the_words_and_their_ids_become_tokens(gateway: Gateway) -> None:
    answer = await embed(gateway, ["hello world hello", "world"], model="sparse", return_sparse=True)
    first, second = vectors_of(answer)
    assert first == {"7592": 0.5, "2088": 0.5}
    assert second == {"2088": 0.5}
    assert len(vectors_of(await embed(gateway, "hello", model="sparse"))[0]) == 384
    body = {"model": "sparse", "input": list(first)}
    assert (await gateway.post("/v1/convert_ids_to_tokens", body)).json == ["hello", "world"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": []}, "it may not be empty"),
        ({"input": [[]]}, "Input 0 is an empty list"),
        ({"input": ["x", None]}, "Input 1 is null"),
        ({"input": [1, "x"]}, "Input 0 is 1"),
        ({"input": [30522]}, "The token id 30522 is not one of this model"),
        ({"input": {"image": "https://example.com/cat.png"}}, "embeds text, not an image"),
        ({"input": {"words": "x"}}, "`text`, `image` or both, not ['words']"),
        ({"input": "x", "dimensions": 385}, "have 384"),
        ({"input": "x", "dimensions": "many"}, "`dimensions` is a whole number"),
        ({"input": "x", "encoding_format": "int8"}, "float or base64"),
        ({"input": "x", "prompt_name": "unknown"}, "It has: document, query."),
        ({"input": "x", "return_sparse": True}, "it has no sparse head"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "leaves nothing"),
    ],
)
async def test_what_cannot_be_done_is_said(fields: dict[str, Any], said: str, gateway: Gateway) -> None:
    answer = await embed(gateway, None, **fields)
    assert answer.status == 400
    assert said in answer.error["message"]


async def test_256_embeddings_at_once_all_complete_and_are_each_clients_own(gateway: Gateway) -> None:
    texts = [f"Number {number} is " + "very " * (number % 40) + "good." for number in range(256)]
    answers = await asyncio.gather(*(embed(gateway, text) for text in texts))
    at_once = [vectors_of(answer)[0] for answer in answers]
    together = vectors_of(await embed(gateway, texts))
    assert min(map(cosine, at_once, together)) > 0.9999


async def test_a_client_that_leaves_takes_its_inputs_out_of_the_queue(gateway: Gateway) -> None:
    leaving = asyncio.create_task(embed(gateway, ["word " * 300] * 5000))
    async with worker_of(gateway, "minilm") as ask:
        await until_figures(ask, lambda figures: figures["worker:inputs_waiting"] > 0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        figures = await until_figures(ask, lambda figures: figures["worker:inputs_waiting"] == 0)
        done = figures["worker:inputs_total"]
        assert vectors_of(await embed(gateway, "hello"))
        assert (await ask())["worker:inputs_total"] - done < 50
    await gateway.until("minilm", in_flight=0)


async def test_a_worker_killed_in_mid_request_is_not_noticed_by_the_client(gateway: Gateway) -> None:
    pid = (await gateway.until("minilm", state="ready"))["pid"]
    asking = asyncio.create_task(embed(gateway, ["word " * 300] * 100))
    await gateway.until("minilm", in_flight=1)
    os.kill(pid, signal.SIGKILL)
    assert len(vectors_of(await asking)) == 100
    assert (await gateway.until("minilm", state="ready"))["pid"] != pid


async def test_pictures_and_texts_are_embedded_beside_one_another(gateway: Gateway) -> None:
    red, blue = ({"image": f"data:image/png;base64,{a_picture(colour)}"} for colour in (b"\xff\0\0", b"\0\0\xff"))
    vectors = vectors_of(await embed(gateway, ["hello", red, blue, {"image": a_picture(b"\xff\0\0")}], model="clip"))
    assert cosine(vectors[1], vectors[3]) == pytest.approx(1)
    assert max(cosine(vectors[1], vectors[2]), cosine(vectors[0], vectors[1])) < 0.9999
    assert vectors[0] == pytest.approx(vectors_of(await embed(gateway, "hello", model="clip"))[0], abs=1e-6)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("no picture", "`image` is a file, or base64 of one"),
        ("https://example.com/cat.png", "nothing is fetched here"),
        (7, "`image` is a picture as base64 text"),
        ("huge", "has 8192x8193 pixels; make it smaller"),
    ],
)
async def test_a_picture_that_cannot_be_read_is_told(image: Any, said: str, gateway: Gateway) -> None:
    given = a_picture(b"\0\0\0", 8192, 8193) if image == "huge" else image
    answer = await embed(gateway, ["hello", {"image": given}], model="clip")
    assert (answer.status, said in answer.error["message"]) == (400, True), answer.body


def a_picture(colour: bytes, width: int = 40, height: int = 30) -> str:
    """A PNG of one colour, as base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress((b"\0" + colour * width) * height, 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return base64.b64encode(file).decode()


# --- ranking


async def rerank(gateway: Gateway, model: str = "reranker", **fields: Any) -> Answer:
    return await gateway.post("/v1/rerank", {"model": model, "query": QUERY, "documents": DOCUMENTS} | fields)


async def test_a_cross_encoder_ranks_paris_first_with_the_librarys_scores(
    gateway: Gateway, reference: dict[str, Any]
) -> None:
    answer = await rerank(gateway, return_documents=True)
    results = answer.json["results"]
    assert results[0]["document"] == {"text": DOCUMENTS[1]}
    scores = {result["index"]: result["relevance_score"] for result in results}
    assert [scores[index] for index in range(3)] == pytest.approx(reference["scores"], abs=1e-4)
    assert answer.json["usage"]["prompt_tokens"] == answer.json["usage"]["total_tokens"] > 20


async def test_a_language_model_judges_as_qwens_reranker_does(gateway: Gateway, reference: dict[str, Any]) -> None:
    results = (await rerank(gateway, model="judge", instruction=INSTRUCTION)).json["results"]
    scores = {result["index"]: result["relevance_score"] for result in results}
    assert [scores[index] for index in range(3)] == pytest.approx(reference["judged"], abs=0.01)
    others = (await rerank(gateway, model="judge")).json["results"]
    assert {result["index"]: result["relevance_score"] for result in others} != scores


async def test_300_documents_are_scored_as_each_alone(gateway: Gateway) -> None:
    documents = [document + " Indeed." * (number % 30) for number in range(100) for document in DOCUMENTS]
    results = (await rerank(gateway, documents=documents)).json["results"]
    assert len(results) == 300
    assert "Paris" in documents[results[0]["index"]]
    alone = (await rerank(gateway, documents=[documents[results[7]["index"]]])).json["results"]
    assert alone[0]["relevance_score"] == pytest.approx(results[7]["relevance_score"], abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"documents": []}, "`documents` is empty"),
        ({"documents": ["x", 5]}, "`documents[1]` is a text"),
        ({"documents": [{"image": "x"}]}, "`documents[0]` is a text"),
        ({"query": None}, "`query` is a text"),
        ({"instruction": 5}, "`instruction` is a text"),
    ],
)
async def test_what_cannot_be_ranked_is_said(fields: dict[str, Any], said: str, gateway: Gateway) -> None:
    answer = await rerank(gateway, **fields)
    assert answer.status == 400
    assert said in answer.error["message"]


async def test_pairs_are_scored_in_vllms_form(gateway: Gateway, reference: dict[str, Any]) -> None:
    answer = await gateway.post("/v1/score", {"model": "reranker", "text_1": QUERY, "text_2": DOCUMENTS})
    assert [one["score"] for one in answer.json["data"]] == pytest.approx(reference["scores"], abs=1e-4)


# --- xinference's client


async def call(function: Any, *arguments: Any, **named: Any) -> Any:
    return await asyncio.to_thread(function, *arguments, **named)


async def test_xinferences_client_embeds_and_ranks(gateway: Gateway) -> None:
    client = await call(RESTfulClient, gateway.address)
    embedder = await call(client.get_model, "minilm")
    found = await call(embedder.create_embedding, ["hello world", "x"], dimensions=8)
    assert found["model_replica"] == "minilm-rep0"
    assert [len(one["embedding"]) for one in found["data"]] == [8, 8]
    assert await call(embedder.convert_ids_to_tokens, [7592, 2088]) == ["hello", "world"]
    assert await call(embedder.convert_ids_to_tokens, [[7592], [2088]]) == [["hello"], ["world"]]
    ranker = await call(client.get_model, "reranker")
    ranked = await call(ranker.rerank, DOCUMENTS, QUERY, top_n=1, return_documents=True, return_len=True)
    assert [result["document"]["text"] for result in ranked["results"]] == [DOCUMENTS[1]]
    assert ranked["meta"]["tokens"]["input_tokens"] > 20
    engines = await call(client.query_engine_by_model_name, "bge-m3", model_type="embedding")
    assert "sentence-transformers" in engines


# --- what cannot be loaded


async def test_a_language_model_is_not_taken_for_a_reranker(gateway: Gateway) -> None:
    answer = await rerank(gateway, model="not-a-judge")
    assert answer.status == 503
    assert "nothing says that it was trained to rank" in answer.error["message"]
    assert "model_type LLM" in answer.error["message"]


def why_not(python: str, worker: str, folder: Path, **options: Any) -> str:
    """What a worker says that cannot load its model."""
    main = Path(__file__).parents[2] / "engines" / "workers" / "__main__.py"
    argv = [python, "-P", str(main), worker, "--model", str(folder), "--uid", "m", "--host", str(folder / "x.sock")]
    env = os.environ | {"WORKER_OPTIONS": json.dumps(OPTIONS | options), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LOAD_LIMIT_S, env=env)
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("worker", "kind", "said"),
    [
        ("reranking", "minilm", "it is an embedding model. Launch it with model_type embedding."),
        ("embedding", "tiny_reranker", "Launch it with model_type rerank."),
        ("embedding", "smollm2_hf", "a language model without the modules.json"),
    ],
)
async def test_a_folder_of_another_kind_is_told(
    worker: str, kind: str, said: str, torch_python: str, request: pytest.FixtureRequest
) -> None:
    assert said in why_not(torch_python, worker, request.getfixturevalue(kind))


async def test_damaged_weights_and_settings_are_told(torch_python: str, minilm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(minilm, tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "damaged or not whole: fetch them again" in why_not(torch_python, "embedding", folder)
    (folder / "config.json").write_text('{"architectures": [')
    assert "config.json is damaged" in why_not(torch_python, "embedding", folder)
    assert "neither config.json nor modules.json" in why_not(torch_python, "embedding", tmp_path)


async def test_weights_of_another_model_are_told_and_not_made_up(
    torch_python: str, minilm: Path, tiny_reranker: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_reranker, tmp_path / "m")
    shutil.copy(minilm / "model.safetensors", folder)
    said = why_not(torch_python, "reranking", folder)
    assert "are not those of a BertForSequenceClassification" in said
    assert "classifier" in said


async def test_more_tokens_than_the_model_has_positions_are_refused(torch_python: str, minilm: Path) -> None:
    assert "the model has 512 positions" in why_not(torch_python, "embedding", minilm, max_tokens=1024)


# --- the worker itself


@contextlib.asynccontextmanager
async def worker_of(gateway: Gateway, uid: str) -> AsyncIterator[Any]:
    """Asks a replica's worker for its figures."""
    replica = await gateway.until(uid, state="ready")
    key = psutil.Process(replica["pid"]).environ()["WORKER_API_KEY"]
    connector = aiohttp.UnixConnector(replica["address"].removeprefix("unix:"))
    async with aiohttp.ClientSession(connector=connector, headers={"authorization": f"Bearer {key}"}) as session:

        async def ask() -> dict[str, int]:
            async with session.get("http://x/metrics") as answer:
                lines = (await answer.text()).splitlines()
            return {name: int(value) for name, value in (line.split() for line in lines)}

        yield ask


async def until_figures(ask: Any, condition: Any) -> dict[str, int]:
    async with asyncio.timeout(30):
        while not condition(figures := await ask()):
            await asyncio.sleep(0.05)
        return figures
