"""`hostler check` and `hostler validate`: what a launch or a registration would come to, before it is made."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from harness import Gateway, StartGateway
from model_files import F32, gguf, llama_folder
from stand_in import StandIn

from engines.base import RAM, Launch, Needs, Placement
from gateway.cli import hostler
from gateway.gpus import Gpu, GpuProcess
from gateway.placement import Device
from gateway.room import Holder, find_room, observe_gpus, verdict
from registry.memory import Cache
from registry.resolve import Artifact
from registry.schema import LLMFamily, ModelSpec, Source

GB = 10**9
LLAMA = {
    "general.architecture": "llama",
    "general.file_type": 0,
    "llama.block_count": 2,
    "llama.embedding_length": 32,
    "llama.context_length": 8192,
    "llama.attention.head_count": 4,
}
PER_TOKEN = 2 * (32 + 32) * 2  # two layers, keys and values, of two bytes

# However many engines there are.
THE_ONLY_ONE = re.compile(r"the only (engine there is|one that can run this here)\.")


def a_model(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny-f32.gguf"
    path.write_bytes(gguf(LLAMA | changes, {"a": ([1000], F32)}, data=4000))
    return path


@pytest.fixture
async def hub() -> AsyncIterator[StandIn]:
    async with StandIn() as server:
        yield server


async def checked(gateway: Gateway, **wish: Any) -> dict[str, Any]:
    answer = await gateway.post("/v1/models/check", wish)
    assert answer.status == 200, answer.body
    return answer.json


# --- check, of a running gateway


async def test_a_launch_of_files_that_are_here_is_told_whole(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    path = a_model(tmp_path)
    report = await checked(gateway, model_name="tiny", model_path=str(path), device="cpu")
    assert (report["can_launch"], report["fits"], report["problems"]) == (True, True, [])
    assert report["verdict"].startswith("It fits. It takes about ")
    assert (report["model_name"], report["model_type"], report["model_engine"]) == ("tiny", "LLM", "llama.cpp")
    assert (report["spec"]["model_format"], report["spec_reason"]) == ("ggufv2", "the launch names its files.")
    assert [name for name, why_not in report["engines"].items() if why_not is None] == ["llama.cpp"]
    assert THE_ONLY_ONE.search(report["engine_reason"])
    size = path.stat().st_size
    assert report["files"]["files"] == {path.name: size}
    assert (report["files"]["are_here"], report["files"]["total_bytes"]) == (True, size)
    memory = report["memory"]
    assert (memory["weights_bytes"], memory["sequences"], memory["tokens"]) == (4000, 4, 4096)
    assert memory["kv_cache_bytes"] == 4 * 4096 * PER_TOKEN
    assert memory["basis"].startswith("weights from the headers of its files, and the cache from them too")
    assert report["facts"]["context_length"] == 8192
    assert report["where"] == "the machine's memory"
    assert 0 < report["ram"]["free_bytes"] < report["ram"]["total_bytes"]


async def test_nothing_is_launched_or_kept(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await checked(gateway, model_uid="tiny", model_name="tiny", model_path=str(a_model(tmp_path)))
    assert (await gateway.get("/v1/models")).json["data"] == []
    assert list((gateway.home / "launches").glob("*")) == []
    assert (await gateway.get("/v1/models/tiny/events")).json == []


async def test_what_does_not_fit_comes_with_what_would(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    wish = {"model_name": "tiny", "model_path": str(a_model(tmp_path)), "device": "cpu", "n_parallel": 1}
    report = await checked(gateway, **wish, context_length=10**12)
    assert (report["can_launch"], report["fits"]) == (True, False)
    assert report["verdict"].startswith("It does not fit. It takes about 256,")
    assert report["advice"][0].startswith("A smaller context: up to ")
    fitting = int(report["advice"][0].split()[5])
    # Memory comes and goes meanwhile, so not to the last token.
    assert (await checked(gateway, **wish, context_length=fitting // 2))["fits"] is True
    assert any("made for 8192" in one for one in report["contradictions"])


async def test_options_change_what_the_cache_takes(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    wish = {"model_name": "tiny", "model_path": str(a_model(tmp_path)), "context_length": 1000, "n_parallel": 2}
    sizes = [
        (await checked(gateway, **wish, **options))["memory"]["kv_cache_bytes"]
        for options in ({}, {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}, {"n_ctx": 400})
    ]
    assert sizes == [2 * 1000 * PER_TOKEN, 2 * 1000 * PER_TOKEN * 8.5 / 16, 400 * PER_TOKEN]


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"model_name": "qwen3x"}, "No model is named 'qwen3x'. Did you mean 'qwen3'"),
        ({"model_name": "bge-m3", "model_type": "embedding", "model_format": "pytorch"}, "llama.cpp loads GGUF files"),
        ({"model_name": "tiny", "model_path": "/nowhere/x.gguf"}, "/nowhere/x.gguf File or directory does not exist"),
        ({"model_name": "qwen3", "model_engine": "vLLMs"}, "There is no engine 'vLLMs'"),
        ({"model_name": "qwen3", "no_such_option": 1}, "Unknown key 'no_such_option'"),
        ({"model_name": "x", "model_uid": "fake"}, "Model is already in the model list, uid: fake"),
    ],
)
async def test_what_cannot_be_launched_is_told(wish: dict[str, Any], words: str, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    report = await checked(gateway, **wish)
    assert (report["can_launch"], report["fits"]) == (False, None)
    assert words in report["problems"][0]
    assert report["verdict"] == f"It cannot be launched: {report['problems'][0]}"
    assert report["ram"]["total_bytes"] > 0


async def test_gpus_that_are_not_there_are_in_the_way(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    report = await checked(gateway, model_name="tiny", model_path=str(a_model(tmp_path)), gpu_idx=[77])
    assert report["can_launch"] is False
    assert "it asks for GPU 77" in report["problems"][0]


async def test_a_body_that_is_no_launch_is_refused(start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    assert (await gateway.post("/v1/models/check", b"[")).status == 400
    assert (await gateway.post("/v1/models/check", {})).status == 400
    assert (await gateway.post("/v1/models/check", {"model_name": "x", "replica": 0})).status == 400


async def test_a_hub_that_cannot_be_asked_is_said_and_the_rest_told(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway(env={"HOSTLER_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")})
    report = await checked(gateway, model_name="qwen2.5-instruct", model_size_in_billions="0_5", replica=2)
    assert report["can_launch"] is True
    assert report["unknown"][0].startswith("Which files would be fetched: ")
    assert (report["files"]["are_here"], report["files"]["files"]) == (False, None)
    assert report["files"]["free_bytes"] > 0
    assert report["memory"]["replicas"] == 2
    assert "0.5 billion parameters and the format, an estimate" in report["memory"]["basis"]
    assert report["spec_reason"].endswith("the first that an engine runs here.")
    refused = next(one for one in report["passed_over"] if one.startswith("pytorch"))
    assert "llama.cpp loads GGUF files (model_format ggufv2), not pytorch" in refused


async def test_a_hub_tells_what_would_be_fetched(start_gateway: StartGateway, tmp_path: Path, hub: StandIn) -> None:
    siblings = [{"rfilename": "a-Q4_0.gguf", "size": 3 * GB}, {"rfilename": "a-Q8_0.gguf", "size": 6 * GB}]
    hub.answers["GET", "/api/models/org/a"] = {"id": "org/a", "sha": "c" * 40, "siblings": siblings}
    gateway = await start_gateway(env={"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf")})
    wish = {"model_name": "m", "model_hub": "huggingface", "model_id": "org/a", "model_file": "*Q8_0.gguf"}
    report = await checked(gateway, **wish)
    assert report["files"]["files"] == {"a-Q8_0.gguf": 6 * GB}
    assert report["memory"]["weights_bytes"] == 6 * GB
    assert "the sizes that the hub tells" in report["memory"]["basis"]
    assert not list((tmp_path / "hf").rglob("*.gguf"))
    report = await checked(gateway, **(wish | {"model_file": "*Q2_K.gguf"}))
    assert "No file in repository org/a matches '*Q2_K.gguf'" in report["unknown"][0]


async def test_who_holds_memory_is_named(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True})
    replica = await gateway.until(state="ready")
    report = await checked(gateway, model_name="tiny", model_path=str(a_model(tmp_path)))
    (holder,) = report["ram"]["holders"]
    assert (holder["model"], holder["pid"]) == ("fake-rep0", replica["pid"])
    assert holder["used_bytes"] > 0


async def test_a_launch_says_which_engine_was_chosen_and_why(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    path = str(a_model(tmp_path))
    for uid, named in (("chosen", {}), ("named", {"model_engine": "llama.cpp"})):
        body = {"model_uid": uid, "model_name": uid, "model_path": path} | named
        assert (await gateway.post("/v1/models?wait_ready=false", body)).json == {"model_uid": uid}
    told = [one["event_content"] for one in (await gateway.get("/v1/models/chosen/events")).json]
    assert told[0] == "Launch model"
    assert told[1].startswith("llama.cpp was chosen: ")
    assert THE_ONLY_ONE.search(told[1])
    told = [one["event_content"] for one in (await gateway.get("/v1/models/named/events")).json]
    assert not any("was chosen" in one for one in told)


# --- check, as its users type it


async def test_the_verb_takes_what_launch_takes(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    path = str(a_model(tmp_path))

    def run(*words: str) -> Any:
        return CliRunner().invoke(hostler, ["check", *words, "--endpoint", gateway.address])

    done = await asyncio.to_thread(run, "tiny", "--model-path", path, "--n-gpu", "none", "--n_ctx", "1000")
    assert done.exit_code == 0, done.output
    assert re.search(rf"engine  llama.cpp: .*{THE_ONLY_ONE.pattern}", done.output)
    assert "4 x 250 tokens" in done.output
    assert done.output.splitlines()[-1].startswith("It fits. ")
    done = await asyncio.to_thread(
        run, "-n", "tiny", "-mp", path, "--n-gpu", "none", "--context_length", "9" * 12, "--json"
    )
    assert (done.exit_code, json.loads(done.output)["fits"]) == (1, False)
    done = await asyncio.to_thread(run, "no-such-model")
    assert (done.exit_code, "In the way" in done.output) == (1, True)
    assert (await asyncio.to_thread(run)).exit_code == 2
    assert (await asyncio.to_thread(run, "tiny", "another")).exit_code == 2


# --- rooms


def a_gpu(index: int, free_gb: int, *processes: GpuProcess, total_gb: int = 80) -> Device:
    used = (total_gb - free_gb) * GB
    gpu = Gpu(index=index, uuid=f"U{index}", name="a", total_bytes=total_gb * GB, used_bytes=used, processes=processes)
    return Device(key=gpu.uuid, total_bytes=gpu.total_bytes, foreign_bytes=gpu.used_bytes, gpu=gpu)


def an_llm_launch(**fields: Any) -> Launch:
    spec = ModelSpec(model_format="ggufv2", quantization="q4_0", model_hub="local", model_id="/m.gguf")
    family = LLMFamily(model_name="m", model_specs=(), model_ability=("chat",))
    artifact = Artifact(family=family, spec=spec, source=Source(model_hub="local", model_id="/m.gguf"))
    return Launch(uid="m", artifact=artifact, engine="llama.cpp", **fields)


THE_RAM = Device(key=RAM, total_bytes=64 * GB, foreign_bytes=32 * GB)


@pytest.mark.parametrize(
    ("gpus", "wish", "needed_gb", "fits"),
    [
        ([], {}, 32, True),
        ([], {}, 33, False),
        ([], {"replica": 2}, 16, True),
        ([], {"replica": 2}, 17, False),
        ([a_gpu(0, 40)], {}, 40, True),
        ([a_gpu(0, 40)], {}, 41, False),
        ([a_gpu(0, 40), a_gpu(1, 10)], {"n_gpu": 2}, 20, True),
        ([a_gpu(0, 40), a_gpu(1, 10)], {"n_gpu": 2}, 21, False),  # evenly, so the fuller one decides
        ([a_gpu(0, 40)], {"replica": 2}, 20, True),
        ([a_gpu(0, 40)], {"replica": 2}, 21, False),
        ([a_gpu(0, 40), a_gpu(1, 40)], {"replica": 2}, 40, True),
        ([a_gpu(0, 40), a_gpu(1, 40)], {}, 80, True),  # layer by layer
        ([a_gpu(0, 0, total_gb=0)], {}, 1, None),  # a device that does not tell
        ([a_gpu(0, 40)], {}, 0, None),
        ([a_gpu(0, 10)], {"cpu_fallback": True}, 32, True),
    ],
)
def test_what_fits(gpus: list[Device], wish: dict[str, Any], needed_gb: int, fits: bool | None) -> None:
    launch = an_llm_launch(**wish)
    needs = Needs(n_gpu=launch.n_gpu, memory_bytes=needed_gb * GB, can_spread=True)
    room = find_room(launch, needs, [*gpus, THE_RAM], ())
    assert room.fits is fits
    assert (room.refusal is None) == (fits is not False)


def test_what_is_loaded_already_has_its_room() -> None:
    launch, needs = an_llm_launch(), Needs(memory_bytes=20 * GB)
    loaded = [Placement(memory={"U0": 15 * GB})]
    assert find_room(launch, needs, [a_gpu(0, 35), THE_RAM], loaded).fits
    room = find_room(launch, needs, [a_gpu(0, 34), THE_RAM], loaded)
    assert (room.fits, room.name, room.free_bytes) == (False, "GPU 0", 19 * GB)
    said = verdict([], room, needs, 1)
    assert said == "It does not fit beside what is loaded now. It takes about 20,000 MB, and GPU 0 has 19,000 MB free."


def test_a_context_that_may_be_shorter_is_told() -> None:
    launch = an_llm_launch()
    needs = Needs(memory_bytes=90 * GB, cache=Cache(tokens=2**17), shorter={2**16: 50 * GB, 2**15: 30 * GB})
    told = [
        verdict([], find_room(launch, needs, [a_gpu(0, free_gb), THE_RAM], ()), needs, 1) for free_gb in (95, 50, 20)
    ]
    assert told == [
        "It fits. It takes about 90,000 MB, and GPU 0 has 95,000 MB free.",
        "It fits, with a context of 65,536 tokens, as the model's own has no room. "
        "It takes about 50,000 MB, and GPU 0 has 50,000 MB free.",
        "It does not fit. It takes about 30,000 MB, and GPU 0 has 20,000 MB free.",
    ]


def test_gpus_are_told_with_their_processes_by_name() -> None:
    mine, other = GpuProcess(pid=os.getpid(), used_bytes=30 * GB), GpuProcess(pid=2**30, used_bytes=None)
    devices = [a_gpu(0, 40, mine, other), a_gpu(1, 70), THE_RAM]
    room = find_room(an_llm_launch(gpu_idx=(0,)), Needs(gpu_idx=(0,), memory_bytes=GB), devices, ())
    first, second = observe_gpus(devices, {os.getpgid(0): "big-rep0"}, room)
    assert (first.is_wanted, first.free_bytes, second.is_wanted) == (True, 40 * GB, False)
    assert (first.holders[0].model, first.holders[0].used_bytes) == ("big-rep0", 30 * GB)
    assert first.holders[1] == Holder(pid=2**30, used_bytes=None)


# --- validate


def validate(*words: str) -> Any:
    return CliRunner().invoke(hostler, ["validate", *words], env={"HOSTLER_HOME": "/nowhere-at-all"})


def an_llm(**changes: Any) -> dict[str, Any]:
    spec = {"model_format": "ggufv2", "model_size_in_billions": 1, "quantization": "Q8_0", "model_id": "org/a"}
    family = {"model_name": "mine", "model_lang": ["en"], "model_ability": ["chat"], "model_family": "other"}
    return family | {"model_specs": [spec]} | changes


def written(folder: Path, data: Any) -> str:
    path = folder / "model.json"
    path.write_text(json.dumps(data))
    return str(path)


def test_a_right_file_can_be_registered_and_is_told_whole(tmp_path: Path) -> None:
    path = a_model(tmp_path, **{"tokenizer.chat_template": "{{ messages }}"})
    spec = {"model_format": "ggufv2", "model_size_in_billions": "0_0", "quantization": "F32", "model_uri": str(path)}
    done = validate(written(tmp_path, an_llm(model_specs=[spec], version=1)), "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert (told["can_be_registered"], told["errors"], told["model_type"]) == (True, [], "LLM")
    assert "version 1 was read as version 2." in told["notes"]
    assert told["defaulted"]["context_length"] == 2048
    (inspected,) = told["specs"]
    assert (inspected["path"], inspected["contradictions"]) == (str(path), [])
    assert "context length: 8192" in inspected["inferred"]
    assert told["engines"]["llama.cpp"] == ["could run ggufv2 F32"]


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    wrong = an_llm(
        model_ability=["chat", "visoin"],
        context_length="long",
        model_specs=[
            {"model_format": "ggufv2", "model_size_in_billions": "seven", "model_uri": "/nowhere/x.gguf"},
            {"model_format": "gguv2"},
        ],
    )
    done = validate(written(tmp_path, wrong))
    assert done.exit_code == 1
    for words in (
        "Expected `int`, got `str` - at `$.context_length`",
        "Unknown ability 'visoin' - at `$.model_ability[1]`. Did you mean 'vision'",
        "got 'seven' - at `$.model_specs[0].model_size_in_billions`",
        "model_specs[0]: Invalid model URI /nowhere/x.gguf",
        "Required key 'model_size_in_billions' is missing - at `$.model_specs[1]`",
        "Unknown model_format 'gguv2' - at `$.model_specs[1].model_format`",
    ):
        assert done.output.count(words) == 1
    assert done.output.splitlines()[-1].endswith("model.json cannot be registered.")


def test_files_are_looked_into_even_if_the_rest_is_wrong(tmp_path: Path) -> None:
    spec = {"model_format": "pytorch", "model_size_in_billions": 1, "model_uri": str(a_model(tmp_path))}
    done = validate(written(tmp_path, an_llm(context_length="long", model_specs=[spec])), "--json")
    assert done.exit_code == 1
    (inspected,) = json.loads(done.output)["specs"]
    assert inspected["contradictions"][0] == (
        "model_format says pytorch, and the files are gguf. Give model_format ggufv2, or other files."
    )
    assert "context length: 8192" in inspected["inferred"]


def test_contradictions_with_the_files_are_told(tmp_path: Path) -> None:
    gguf_file, folder = a_model(tmp_path), llama_folder(tmp_path / "folder")
    specs = [
        {"model_format": "ggufv2", "model_size_in_billions": 7, "quantization": "Q4_K_M", "model_uri": str(gguf_file)},
        {"model_format": "gptq", "model_size_in_billions": 7, "quantization": "Int4", "model_uri": str(folder)},
    ]
    done = validate(written(tmp_path, an_llm(context_length=32768, model_specs=specs)), "--json")
    of_gguf, of_folder = (" ".join(spec["contradictions"]) for spec in json.loads(done.output)["specs"])
    assert "quantization says Q4_K_M, and the file is F32." in of_gguf
    assert "model_size_in_billions says 7, and the files have 1e-06 billion parameters." in of_gguf
    assert "context_length says 32768, and the model was made for 8192" in of_gguf
    assert "neither the files nor the registration have a chat template" in of_gguf
    assert "model_format says gptq, and config.json names no quantization." in of_folder
    assert "made for 1024" in of_folder


def test_an_embedding_is_compared_with_its_folder(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m", model_type="bert", max_position_embeddings=512)
    flat = {"model_name": "e", "dimensions": 384, "max_tokens": 1024, "language": ["en"], "model_uri": str(folder)}
    told = json.loads(validate(written(tmp_path, flat), "--json").output)
    assert told["model_type"] == "embedding"
    (spec,) = told["specs"]
    assert spec["contradictions"] == [
        "dimensions says 384, and the files say 64.",
        "max_tokens says 1024, and the model reads 512 at most.",
    ]
    assert "llama.cpp loads GGUF files (model_format ggufv2), not pytorch" in told["engines"]["llama.cpp"][0]


@pytest.mark.parametrize(
    ("data", "model_type"),
    [
        (an_llm(), "LLM"),
        ({"model_name": "e", "dimensions": 4, "max_tokens": 9, "language": ["en"], "model_id": "a/b"}, "embedding"),
        ({"model_name": "r", "language": ["en"], "model_id": "a/b", "type": "normal"}, "rerank"),
        ({"model_name": "a", "model_family": "whisper", "multilingual": True, "model_id": "a/b"}, "audio"),
        ({"model_name": "i", "model_family": "stable_diffusion", "model_ability": ["text2image"]}, "image"),
        ({"model_name": "f", "launcher": "a.b"}, "flexible"),
    ],
)
def test_the_type_is_told_from_the_file(data: dict[str, Any], model_type: str, tmp_path: Path) -> None:
    assert json.loads(validate(written(tmp_path, data), "--json").output)["model_type"] == model_type


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "This is not JSON"), ("[]", "Expected an object"), ('{"model_name": "x"}', "say which with -t")],
)
def test_what_is_no_registration_is_told(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    done = validate(str(path))
    assert (done.exit_code, words in done.output) == (1, True)
    assert validate(str(path), "-t", "LLMs").exit_code == 1
    assert "Did you mean 'LLM'" in validate(str(path), "-t", "LLMs").output


def test_a_name_of_the_catalogue_is_taken(tmp_path: Path) -> None:
    done = validate(written(tmp_path, an_llm(model_name="qwen3")))
    assert (done.exit_code, "conflicts with existing model qwen3" in done.output) == (1, True)


def test_what_a_built_in_model_lends_is_told(tmp_path: Path) -> None:
    done = validate(written(tmp_path, an_llm(model_family="qwen2.5-instruct")))
    assert done.exit_code == 0
    assert "lent by the built-in model that it names, qwen2.5-instruct." in done.output


# --- what it says, and what the engine then takes


@pytest.mark.engine
async def test_a_real_engine_takes_what_was_said(start_gateway: StartGateway, smollm2_gguf: Path) -> None:
    gateway = await start_gateway(engines={})
    said, taken = {}, {}
    for uid, tokens in (("small", 1024), ("large", 8192)):
        wish = {"model_name": uid, "model_path": str(smollm2_gguf), "device": "cpu", "context_length": tokens}
        wish |= {"n_parallel": 1, "n_threads": 1, "warmup": False}
        said[uid] = (await checked(gateway, **wish))["memory"]
        assert (await gateway.post("/v1/models", wish)).status == 200
        taken[uid] = (await gateway.until(uid, state="ready"))["memory_bytes"]
    grown = said["large"]["kv_cache_bytes"] - said["small"]["kv_cache_bytes"]
    assert grown == 7168 * 30 * 3 * 64 * 2 * 2
    assert taken["large"] - taken["small"] == pytest.approx(grown, rel=0.1)
    assert taken["large"] < said["large"]["total_bytes"]
