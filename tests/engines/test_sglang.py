"""SGLang: from a launch to the argv and files of its server. It does not run on a CPU: this is read off its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llms import FOLDER, a_family, a_launch, a_package, a_python, an_artifact, an_embedding, flags_of

from engines.base import Endpoint, EngineSettings, Placement
from engines.sglang import NOT_FLAGS, Sglang, SglangOptions
from registry.decode import DecodeError

PORT = Endpoint(port=4321, api_key="the-secret-key")
ANYWHERE = Placement()
OWN_FLAGS = sorted({*SglangOptions.__struct_fields__} - NOT_FLAGS - {"ep_size"})
SOURCE = {
    "srt/arg_groups/fields/model.py": "class Model:\n" + "".join(f"    {name}: int = 0\n" for name in OWN_FLAGS),
    "srt/arg_groups/fields/serving.py": "class Serving:\n    api_key: str = ''\n    watchdog_timeout: float = 1\n",
    "srt/function_call/function_call_parser.py": 'class P:\n    M = {"qwen25": Qwen, "llama3": Llama}',
    "srt/parser/reasoning_parser.py": 'class R:\n    M = {"qwen3": Qwen, "deepseek-r1": R1}',
}


@pytest.fixture
def engine(tmp_path: Path) -> Sglang:
    python = a_python(tmp_path)
    a_package(python, "sglang", "sglang-0.5.23", SOURCE)
    return Sglang(settings=EngineSettings(python=str(python)))


def flags(engine: Sglang, options: dict[str, Any] | None = None, placement: Placement = ANYWHERE, **more: Any) -> Any:
    return flags_of(engine.command(a_launch(options, **more), FOLDER, placement, PORT, None).argv)


def test_where_no_sglang_is_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Sglang) -> None:
    assert "sglang" in str(Sglang(environments=tmp_path).installed())
    monkeypatch.setattr("engines.vllm.GPU_DEVICES", ("no-such-device",))
    assert engine.installed() == "SGLang needs a GPU, and there is none here"
    monkeypatch.setattr("engines.vllm.GPU_DEVICES", ("null",))
    assert engine.installed() is None


@pytest.mark.parametrize("model_format", ["pytorch", "gptq", "awq", "fp8", "bnb"])
def test_it_accepts_pytorchs_formats(model_format: str) -> None:
    assert Sglang().accepts(an_artifact(model_format=model_format)) is None


@pytest.mark.parametrize("model_format", ["ggufv2", "mlx"])
def test_it_says_why_it_does_not_accept_another(model_format: str) -> None:
    reason = Sglang().accepts(an_artifact(model_format=model_format))
    assert reason == f"SGLang loads pytorch, gptq, awq, fp8, fp4, bnb, not {model_format}"


def test_the_whole_command(engine: Sglang) -> None:
    launch = a_launch({"context_length": 2048, "mem_fraction_static": 0.5}, envs={"X": "1"})
    command = engine.command(launch, FOLDER, Placement(gpu_uuids=("GPU-a", "GPU-b")), PORT, None)
    assert command.argv == (
        *(engine.settings.python, "-P", "-m", "sglang.launch_server", "--config", "sglang-4321.yaml"),
        *("--model-path", "/models/qwen", "--served-model-name", "mine", "--host", "127.0.0.1", "--port", "4321"),
        *("--context-length", "2048", "--mem-fraction-static", "0.5", "--enable-metrics", "--tp-size", "2"),
    )
    assert command.env == {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b", "X": "1"}
    assert {name: json.loads(text) for name, text in command.files.items()} == {
        "sglang-4321.yaml": {"api-key": "the-secret-key"}
    }
    assert not engine.unix_socket


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_model_len": 99}, {"--context-length": "99"}),
        ({"tensor-parallel-size": 2}, {"--tp-size": "2"}),
        ({"gpu_memory_utilization": 0.4}, {"--mem-fraction-static": "0.4"}),
        ({"disable_radix_cache": True}, {"--disable-radix-cache": True}),
        ({"disable_radix_cache": False}, {"--disable-radix-cache": None}),
        ({"json_model_override_args": {"a": 1}}, {"--json-model-override-args": '{"a": 1}'}),
        ({"watchdog-timeout": 9}, {"--watchdog-timeout": "9"}),
        ({"extra_args": {"new_one": True}}, {"--new-one": True}),
        ({"lora_list": [{"lora_name": "a", "local_path": "/l/a"}]}, {"--lora-paths": "a=/l/a"}),
    ],
    ids=str,
)
def test_an_option_becomes_its_flag(options: dict[str, Any], expected: dict[str, Any], engine: Sglang) -> None:
    found = flags(engine, options)
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"contxt_length": 2}, ["'contxt_length'", "'context_length'"]),
        ({"api_key": "x"}, ["'api_key'", "for the gateway to say"]),
        ({"ep_size": 2}, ["no 'ep_size'", "Leave it out"]),
        ({"mem_fraction_static": 2}, ["`options.mem_fraction_static`"]),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_by_its_name(options: dict[str, Any], words: list[str], engine: Sglang) -> None:
    with pytest.raises(DecodeError) as caught:
        engine.read_options(options)
    assert [word for word in words if word not in str(caught.value)] == []


def test_what_the_family_says_reaches_it(engine: Sglang) -> None:
    family = a_family(
        tool_parser="qwen",
        reasoning_start_tag="<think>",
        reasoning_end_tag="</think>",
        chat_template="{{ messages }}",
        stop=("<end>",),
        stop_token_ids=(2,),
    )
    launch = a_launch({"enable_thinking": False}, family)
    command = engine.command(launch, FOLDER, ANYWHERE, PORT, None)
    found = flags_of(command.argv)
    assert (found["--tool-call-parser"], found["--reasoning-parser"]) == ("qwen25", "deepseek-r1")
    assert command.files[found["--chat-template"]] == "{{ messages }}"
    assert engine.defaults(launch) == {
        "stop": ["<end>"],
        "stop_token_ids": [2],
        "chat_template_kwargs": {"enable_thinking": False, "thinking": False},
    }


def test_a_parser_that_the_version_lacks_is_left_out(engine: Sglang) -> None:
    assert "--tool-call-parser" not in flags(engine, family=a_family(tool_parser="kimi-k3"))


def test_embeddings_and_adapters(engine: Sglang) -> None:
    assert flags(engine, family=an_embedding())["--is-embedding"] is True
    launch = a_launch({"lora_list": [{"lora_name": "a", "local_path": "/l/a"}]})
    assert engine.with_adapter(launch, "a") == {"lora_path": "a"}


@pytest.mark.parametrize(
    ("options", "fields", "n_gpu", "share"),
    [
        ({}, {}, None, 0.88),
        ({"mem_fraction_static": 0.5}, {}, None, 0.5),
        ({"tp_size": 2}, {}, 2, 0.88),
        ({"tp_size": 2, "pp_size": 2}, {}, 4, 0.88),
        ({"tp_size": 2}, {"gpu_idx": (0, 1)}, None, 0.88),
        ({}, {"n_gpu": 1}, 1, 0.88),
    ],
)
def test_it_asks_for_a_share_of_each_gpu(
    options: dict[str, Any], fields: dict[str, Any], n_gpu: int | None, share: float, engine: Sglang
) -> None:
    needs = engine.needs(a_launch(options, **fields))
    assert (needs.n_gpu, needs.gpu_share, needs.is_elastic, needs.can_spread) == (n_gpu, share, True, True)
