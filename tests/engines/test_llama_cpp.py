"""llama.cpp: from a launch to the argv and environment of `llama-server` or of our worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import packaging
import pytest

from engines.base import Endpoint as EngineEndpoint
from engines.base import EngineSettings, Launch, Needs, Placement
from engines.environments import worker_argv
from engines.llama_cpp import LlamaCpp, LlamaCppOptions
from engines.workers.llama_cpp import _force, _params, _parser
from registry.decode import DecodeError
from registry.memory import Cache
from registry.resolve import Artifact
from registry.schema import EmbeddingFamily, LLMFamily, ModelSpec, RerankFamily, Source

MODEL = Path("/models/q4.gguf")
SOCKET = EngineEndpoint(socket="/run/a.sock", api_key="the-secret-key")
PORT = EngineEndpoint(port=4321, api_key="the-secret-key")
ANYWHERE = Placement()

# Every option of the Struct, each with a value that differs from its default.
ALL_OPTIONS = {
    "context_length": 1000,
    "n_ctx": 9000,
    "n_parallel": 3,
    "n_threads": 5,
    "n_threads_batch": 6,
    "n_batch": 512,
    "n_ubatch": 256,
    "n_gpu_layers": -1,
    "flash_attn": "on",
    "cache_type_k": "q8_0",
    "cache_type_v": "f16",
    "cache_ram_mib": -1,
    "chat_template": "chatml",
    "enable_thinking": False,
    "reasoning_content": True,
    "reasoning_format": "deepseek-legacy",
    "embedding": True,
    "pooling": "mean",
    "warmup": False,
    "lora_list": [{"lora_name": "a", "local_path": "/l/a.gguf"}, {"lora_name": "b", "local_path": "/l/b.gguf"}],
    "model_draft": "/models/draft.gguf",
    "draft_n_max": 8,
    "draft_n_min": 2,
    "draft_p_min": 0.5,
    "draft_n_gpu_layers": 0,
    "sleep_idle_seconds": 60,
    "slots": False,
    "slot_save_path": "/slots",
    "slot_prompt_similarity": 0.25,
    "n_threads_http": 7,
    "n_predict": 100,
    "n_keep": 11,
    "n_cache_reuse": 12,
    "ctx_shift": True,
    "swa_full": True,
    "kv_unified": True,
    "no_kv_offload": True,
    "mmproj_use_gpu": False,
    "use_mmap": False,
    "use_mlock": True,
    "check_tensors": True,
    "main_gpu": 1,
    "split_mode": "row",
    "tensor_split": [0.5, 1.5],
    "numa": "isolate",
    "rope_scaling_type": "yarn",
    "rope_freq_base": 1e4,
    "rope_freq_scale": 0.5,
    "yarn_orig_ctx": 4096,
    "yarn_ext_factor": 0.25,
    "yarn_attn_factor": 0.75,
    "yarn_beta_fast": 30.0,
    "yarn_beta_slow": 2.0,
}


def an_artifact(context_length: int = 2048, ability: tuple[str, ...] = ("chat",), format: str = "ggufv2") -> Artifact:
    spec = ModelSpec(model_format=format, quantization="Q4_K_M", model_hub="local", model_id=str(MODEL))
    family = LLMFamily(model_name="qwen", model_specs=(spec,), context_length=context_length, model_ability=ability)
    return Artifact(family=family, spec=spec, source=Source(model_hub="local", model_id=str(MODEL)))


def a_launch(options: dict[str, Any] | None = None, artifact: Artifact | None = None, **fields: Any) -> Launch:
    fields = {"uid": "qwen"} | fields
    return Launch(artifact=artifact or an_artifact(), engine="llama.cpp", options=options or {}, **fields)


def a_program(path: Path) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def binary(tmp_path: Path) -> LlamaCpp:
    """The engine by a llama-server binary."""
    return LlamaCpp(settings=EngineSettings(binary=a_program(tmp_path / "my-llama-server")))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> LlamaCpp:
    """The engine by our worker, on a machine without llama-server."""
    monkeypatch.setenv("PATH", "/nowhere")
    return LlamaCpp()


def flags_of(argv: tuple[str, ...]) -> dict[str, str | None]:
    """flag -> its value, or None for a switch."""
    flags: dict[str, str | None] = {}
    last = ""
    for word in argv:
        if word.startswith("--"):
            flags[last := word] = None
        elif last:
            flags[last] = word
            last = ""
    return flags


# --- the contract


def test_it_is_an_engine() -> None:
    assert (LlamaCpp().name, LlamaCpp().model_types, LlamaCpp().unix_socket) == (
        "llama.cpp",
        ("LLM", "embedding", "rerank"),
        True,
    )


def test_a_sites_settings_make_another_engine_and_leave_this_one_as_it_is() -> None:
    engine = LlamaCpp()
    assert engine.configured(EngineSettings(binary="/x")).settings.binary == "/x"
    assert engine.settings.binary is None


def test_it_accepts_gguf_files() -> None:
    assert LlamaCpp().accepts(an_artifact(format="ggufv2")) is None


@pytest.mark.parametrize("format", ["pytorch", "awq", "gptq", "mlx"])
def test_it_says_why_it_does_not_accept_another_format(format: str) -> None:
    reason = LlamaCpp().accepts(an_artifact(format=format))
    assert reason == f"llama.cpp loads GGUF files (model_format ggufv2), not {format}"


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, Needs()),
        ({"n_gpu": 0}, Needs(n_gpu=0)),
        ({"n_gpu": 2}, Needs(n_gpu=2)),
        ({"gpu_idx": (1, 3)}, Needs(gpu_idx=(1, 3))),
    ],
)
def test_it_needs_what_the_launch_says(fields: dict[str, Any], needs: Needs) -> None:
    found = LlamaCpp().needs(a_launch(**fields))
    assert (found.gpu_idx, found.n_gpu) == (needs.gpu_idx, needs.n_gpu)


@pytest.mark.parametrize(
    ("options", "fields", "n_gpu", "can_spread"),
    [
        ({}, {}, None, True),
        ({"n_gpu_layers": 0}, {}, 0, True),
        ({"n_gpu_layers": 0}, {"n_gpu": 1}, 1, True),  # the launch's word goes first
        ({"n_gpu_layers": 20}, {}, None, True),
        ({"tensor_split": [3, 1, 1]}, {}, 3, True),
        ({"split_mode": "none"}, {}, None, False),
    ],
)
def test_its_options_say_where_it_computes(
    options: dict[str, Any], fields: dict[str, Any], n_gpu: int | None, can_spread: bool
) -> None:
    found = LlamaCpp().needs(a_launch(options, **fields))
    assert (found.n_gpu, found.can_spread) == (n_gpu, can_spread)


def test_a_build_that_links_no_gpu_library_asks_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.llama_cpp.find_binary", lambda *_: None)
    monkeypatch.setattr("engines.llama_cpp.package_folder", lambda *_: tmp_path)
    (tmp_path / "a.abi3.so").write_bytes(b"\0libc.so.6\0")
    monkeypatch.setattr("engines.vllm.GPU_DEVICES", ("null",))
    assert LlamaCpp().needs(a_launch()).n_gpu == 0
    (tmp_path / "b.abi3.so").write_bytes(b"\0libc.so.6\0libcuda.so.1\0")
    assert LlamaCpp().needs(a_launch()).n_gpu is None
    monkeypatch.setattr("engines.vllm.GPU_DEVICES", ("no-such-device",))
    (tmp_path / "b.abi3.so").unlink()
    assert LlamaCpp().needs(a_launch()).n_gpu is None


def test_a_copy_that_got_no_gpu_offloads_nothing(binary: LlamaCpp) -> None:
    command = binary.command(a_launch({"n_gpu_layers": 99}), MODEL, Placement(gpu_uuids=()), SOCKET, None)
    assert command.argv[command.argv.index("--n-gpu-layers") + 1] == "0"


@pytest.mark.parametrize(
    ("options", "cache"),
    [
        ({}, Cache(tokens=4096, sequences=4)),
        ({"context_length": 1000, "n_parallel": 2}, Cache(tokens=1000, sequences=2)),
        ({"n_ctx": 8192, "n_parallel": 2}, Cache(tokens=4096, sequences=2)),
        (
            {"cache_type_k": "q8_0", "cache_type_v": "q4_0"},
            Cache(tokens=4096, sequences=4, key_bits=8.5, value_bits=4.5),
        ),
    ],
)
def test_its_cache_is_shared_by_the_slots(options: dict[str, Any], cache: Cache) -> None:
    assert LlamaCpp().needs(a_launch(options=options)).cache == cache


# --- whether it can run


def test_a_configured_binary_is_installed(binary: LlamaCpp) -> None:
    assert binary.installed() is None


@pytest.mark.parametrize("mode", [None, 0o644], ids=["missing", "not executable"])
def test_a_configured_binary_that_cannot_run_is_named_with_its_setting(mode: int | None, tmp_path: Path) -> None:
    path = tmp_path / "llama-server"
    if mode is not None:
        path.write_text("")
        path.chmod(mode)
    reason = LlamaCpp(settings=EngineSettings(binary=str(path))).installed()
    assert reason == f"`engines.llama.cpp.binary` names {str(path)!r}, which is not an executable file"


def test_a_binary_on_the_path_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = a_program(tmp_path / "llama-server")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert LlamaCpp().installed() is None
    assert LlamaCpp().command(a_launch(), MODEL, ANYWHERE, SOCKET, None).argv[0] == program


def test_without_a_binary_and_a_package_it_says_what_to_install(tmp_path: Path) -> None:
    code = "from engines.llama_cpp import LlamaCpp; print(LlamaCpp().installed())"
    # No site-packages: an interpreter that has our code and nothing else but what that imports.
    path = tmp_path / "only"
    path.mkdir()
    root = Path(__file__).parents[2]
    libraries = (Path(msgspec.__file__).parent, Path(packaging.__file__).parent)
    for package in (root / "engines", root / "registry", *libraries):
        (path / package.name).symlink_to(package)
    env = {"PATH": "/nowhere", "PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == ("there is no `llama-server` on PATH and no xllamacpp package: pip install xllamacpp\n"), (
        done.stderr
    )


def test_a_configured_binary_that_has_gone_is_not_replaced_by_another_program(tmp_path: Path) -> None:
    engine = LlamaCpp(settings=EngineSettings(binary=str(tmp_path / "gone")))
    assert engine.command(a_launch(), MODEL, ANYWHERE, SOCKET, None).argv[0] == str(tmp_path / "gone")


# --- the command


def test_the_whole_command_by_a_binary(binary: LlamaCpp) -> None:
    launch = a_launch({"n_threads": 2, "n_parallel": 2}, envs={"GGML_X": "1"})
    command = binary.command(launch, MODEL, ANYWHERE, SOCKET, None)
    assert command.argv == (
        binary.settings.binary,
        *("--model", "/models/q4.gguf", "--alias", "qwen", "--host", "/run/a.sock", "--port", "0"),
        *("--ctx-size", "8192", "--parallel", "2", "--threads", "2", "--threads-batch", "2", "--cache-ram", "1024"),
        *("--metrics", "--jinja"),
    )
    assert command.env == {"LLAMA_API_KEY": "the-secret-key", "GGML_X": "1"}
    assert command.ready_path == "/health"


def test_the_worker_gets_the_same_flags_under_our_python(binary: LlamaCpp, worker: LlamaCpp) -> None:
    by_binary = binary.command(a_launch(ALL_OPTIONS), MODEL, ANYWHERE, SOCKET)
    by_worker = worker.command(a_launch(ALL_OPTIONS), MODEL, ANYWHERE, SOCKET)
    assert by_worker.argv[:4] == worker_argv("llama_cpp")
    assert by_worker.argv[4:] == by_binary.argv[1:]
    assert by_worker.env == by_binary.env


def test_the_key_is_in_the_environment_and_never_in_the_argv(binary: LlamaCpp, worker: LlamaCpp) -> None:
    for engine in (binary, worker):
        command = engine.command(a_launch(ALL_OPTIONS), MODEL, ANYWHERE, PORT, None)
        assert not [word for word in command.argv if "the-secret-key" in word]
        assert command.env["LLAMA_API_KEY"] == "the-secret-key"


@pytest.mark.parametrize(
    ("endpoint", "host", "port"), [(SOCKET, "/run/a.sock", "0"), (PORT, "127.0.0.1", "4321")], ids=["socket", "port"]
)
def test_it_listens_where_it_is_told(endpoint: EngineEndpoint, host: str, port: str, binary: LlamaCpp) -> None:
    flags = flags_of(binary.command(a_launch(), MODEL, ANYWHERE, endpoint, None).argv)
    assert (flags["--host"], flags["--port"]) == (host, port)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"context_length": 1000}, {"--ctx-size": "4000", "--parallel": "4"}),
        ({"context_length": 1000, "n_parallel": 1}, {"--ctx-size": "1000", "--parallel": "1"}),
        ({"n_ctx": 9000, "context_length": 1000}, {"--ctx-size": "9000"}),
        ({"n_threads": 3}, {"--threads": "3", "--threads-batch": "3"}),
        ({"n_threads": 3, "n_threads_batch": 7}, {"--threads": "3", "--threads-batch": "7"}),
        ({"n_batch": 64, "n_ubatch": 32}, {"--batch-size": "64", "--ubatch-size": "32"}),
        ({"n_gpu_layers": 12}, {"--n-gpu-layers": "12"}),
        ({"n_gpu_layers": "12"}, {"--n-gpu-layers": "12"}),
        ({"n_gpu_layers": "auto"}, {"--n-gpu-layers": "999"}),
        ({"n_gpu_layers": -1}, {"--n-gpu-layers": "999"}),
        ({"draft_n_gpu_layers": -1}, {"--n-gpu-layers-draft": "999"}),
        ({"n_gpu_layers": 0}, {"--n-gpu-layers": "0"}),
        ({"flash_attn": "off"}, {"--flash-attn": "off"}),
        ({"cache_type_k": "q8_0", "cache_type_v": "q4_0"}, {"--cache-type-k": "q8_0", "--cache-type-v": "q4_0"}),
        ({"cache_ram_mib": 0}, {"--cache-ram": "0"}),
        ({"chat_template": "chatml"}, {"--chat-template": "chatml"}),
        ({"reasoning_format": "none"}, {"--reasoning-format": "none"}),
        ({"embedding": True, "pooling": "cls"}, {"--embedding": None, "--pooling": "cls"}),
        ({"warmup": False}, {"--no-warmup": None}),
        ({"model_draft": "/d.gguf", "draft_n_max": 4}, {"--model-draft": "/d.gguf", "--draft-max": "4"}),
        ({"sleep_idle_seconds": 9}, {"--sleep-idle-seconds": "9"}),
        ({"slots": False, "slot_save_path": "/s"}, {"--no-slots": None, "--slot-save-path": "/s"}),
        ({"kv_unified": True}, {"--kv-unified": None, "--no-kv-unified": "missing"}),
        ({"kv_unified": False}, {"--no-kv-unified": None, "--kv-unified": "missing"}),
        ({"use_mmap": True}, {"--no-mmap": "missing"}),
        ({"tensor_split": [1, 3]}, {"--tensor-split": "1.0,3.0"}),
        ({"rope_scaling_type": "yarn"}, {"--rope-scaling": "yarn"}),
    ],
    ids=str,
)
def test_an_option_becomes_its_flag(options: dict[str, Any], expected: dict[str, str | None], binary: LlamaCpp) -> None:
    flags = flags_of(binary.command(a_launch(options), MODEL, ANYWHERE, SOCKET, None).argv)
    assert {flag: flags.get(flag, "missing") for flag in expected} == expected


def test_options_that_are_not_given_are_left_to_the_engine(binary: LlamaCpp) -> None:
    flags = flags_of(binary.command(a_launch(), MODEL, ANYWHERE, SOCKET, None).argv)
    assert not {"--n-gpu-layers", "--flash-attn", "--batch-size", "--pooling", "--embedding", "--no-warmup"} & set(
        flags
    )
    assert int(flags["--threads"] or 0) >= 1


@pytest.mark.parametrize("of_the_model", [512, 131072])
def test_a_request_gets_a_sane_context_whatever_the_model_could_do(of_the_model: int, binary: LlamaCpp) -> None:
    launch = a_launch({"n_parallel": 2}, an_artifact(context_length=of_the_model))
    assert flags_of(binary.command(launch, MODEL, ANYWHERE, SOCKET, None).argv)["--ctx-size"] == "8192"


@pytest.mark.parametrize(("option", "is_on"), [(None, True), (True, True), (False, False)])
def test_a_model_that_can_embed_does_unless_told_otherwise(option: bool | None, is_on: bool, binary: LlamaCpp) -> None:
    options = {} if option is None else {"embedding": option}
    argv = binary.command(a_launch(options, an_artifact(ability=("embed",))), MODEL, ANYWHERE, SOCKET, None).argv
    assert ("--embedding" in argv) == is_on


@pytest.mark.parametrize(
    ("options", "fields", "may_split", "gpu_layers"),
    [
        ({}, {}, False, None),
        ({"n_gpu_layers": "auto"}, {}, True, None),
        ({"n_gpu_layers": -1}, {}, True, None),
        ({"n_gpu_layers": 20}, {}, False, 20),
        ({"n_gpu_layers": 20}, {"cpu_fallback": True}, False, 20),
        ({}, {"cpu_fallback": True}, True, None),
    ],
)
def test_layers_go_to_the_cpu_only_where_the_launch_asks_for_it(
    options: dict[str, Any], fields: dict[str, Any], may_split: bool, gpu_layers: int | None
) -> None:
    needs = LlamaCpp().needs(a_launch(options, **fields))
    assert (needs.can_split, needs.may_split, needs.gpu_layers) == (True, may_split, gpu_layers)


def test_the_layers_that_have_room_are_told(binary: LlamaCpp) -> None:
    placement = Placement(gpu_uuids=("U0",), gpu_layers=7)
    argv = binary.command(a_launch({"n_gpu_layers": "auto"}), MODEL, placement, SOCKET, None).argv
    assert argv[argv.index("--n-gpu-layers") + 1] == "7"


@pytest.mark.parametrize("options", [{}, {"n_gpu_layers": "auto"}, {"n_gpu_layers": -1}], ids=str)
def test_what_was_given_room_for_all_layers_is_told_so(
    options: dict[str, Any], binary: LlamaCpp, python_server: LlamaCpp
) -> None:
    placement = Placement(gpu_uuids=("U0",))
    assert flags_of(binary.command(a_launch(options), MODEL, placement, SOCKET, None).argv)["--n-gpu-layers"] == "999"
    argv = python_server.command(a_launch(options), MODEL, placement, PORT, None).argv
    assert flags_of(argv)["--n_gpu_layers"] == "999"


@pytest.mark.parametrize("options", [{}, {"n_gpu_layers": 99}], ids=str)
def test_without_gpus_no_layer_goes_to_one(options: dict[str, Any], binary: LlamaCpp) -> None:
    command = binary.command(a_launch(options, n_gpu=0), MODEL, Placement(gpu_uuids=()), SOCKET, None)
    assert flags_of(command.argv)["--n-gpu-layers"] == "0"
    assert command.env["CUDA_VISIBLE_DEVICES"] == ""


def test_it_sees_the_gpus_of_its_placement_by_uuid(binary: LlamaCpp) -> None:
    command = binary.command(a_launch(), MODEL, Placement(gpu_uuids=("GPU-b", "GPU-a")), SOCKET, None)
    assert command.env["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-a"


def test_a_launchs_own_environment_goes_before_ours(binary: LlamaCpp) -> None:
    launch = a_launch(envs={"CUDA_VISIBLE_DEVICES": "7"})
    assert (
        binary.command(launch, MODEL, Placement(gpu_uuids=("GPU-a",)), SOCKET, None).env["CUDA_VISIBLE_DEVICES"] == "7"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_paralel": 2}, ["'n_paralel'", "`options`", "'n_parallel'"]),
        ({"n_parallel": 0}, ["`options.n_parallel`", ">= 1"]),
        ({"flash_attn": "maybe"}, ["`options.flash_attn`", "maybe"]),
        ({"n_ctx": "big"}, ["`options.n_ctx`", "Expected `int"]),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_by_its_name(options: dict[str, Any], words: list[str], binary: LlamaCpp) -> None:
    with pytest.raises(DecodeError) as caught:
        binary.command(a_launch(options), MODEL, ANYWHERE, SOCKET, None)
    assert [word for word in words if word not in str(caught.value)] == []


# --- the worker


def test_the_list_of_all_options_here_is_complete() -> None:
    assert set(ALL_OPTIONS) == set(LlamaCppOptions.__struct_encode_fields__)
    defaults = LlamaCppOptions()
    assert [name for name, value in ALL_OPTIONS.items() if getattr(defaults, name) == value] == []


def test_the_workers_parser_takes_every_flag_that_the_engine_can_emit(worker: LlamaCpp) -> None:
    argv = worker.command(a_launch(ALL_OPTIONS), MODEL, ANYWHERE, PORT, None).argv[4:]
    arguments = vars(_parser().parse_args(argv))
    assert arguments == {
        "model": "/models/q4.gguf",
        "alias": "qwen",
        "host": "127.0.0.1",
        "port": 4321,
        "ctx_size": 9000,
        "parallel": 3,
        "threads": 5,
        "threads_batch": 6,
        "batch_size": 512,
        "ubatch_size": 256,
        "n_gpu_layers": 999,
        "flash_attn": "on",
        "cache_type_k": "q8_0",
        "cache_type_v": "f16",
        "cache_ram": -1,
        "chat_template": "chatml",
        "mmproj": None,
        "chat_template_kwargs": '{"enable_thinking": false}',
        "reasoning_format": "deepseek-legacy",
        "pooling": "mean",
        "metrics": True,
        "jinja": True,
        "embedding": True,
        "no_warmup": True,
        "lora": ["/l/a.gguf", "/l/b.gguf"],
        "lora_init_without_apply": True,
        "model_draft": "/models/draft.gguf",
        "draft_max": 8,
        "draft_min": 2,
        "draft_p_min": 0.5,
        "n_gpu_layers_draft": 0,
        "sleep_idle_seconds": 60,
        "no_slots": True,
        "slot_save_path": "/slots/",
        "slot_prompt_similarity": 0.25,
        "threads_http": 7,
        "n_predict": 100,
        "keep": 11,
        "cache_reuse": 12,
        "context_shift": True,
        "no_context_shift": False,
        "swa_full": True,
        "kv_unified": True,
        "no_kv_unified": False,
        "no_kv_offload": True,
        "no_mmproj_offload": True,
        "no_mmap": True,
        "mlock": True,
        "check_tensors": True,
        "main_gpu": 1,
        "split_mode": "row",
        "tensor_split": [0.5, 1.5],
        "numa": "isolate",
        "rope_scaling": "yarn",
        "rope_freq_base": 10000.0,
        "rope_freq_scale": 0.5,
        "yarn_orig_ctx": 4096,
        "yarn_ext_factor": 0.25,
        "yarn_attn_factor": 0.75,
        "yarn_beta_fast": 30.0,
        "yarn_beta_slow": 2.0,
    }


def test_the_workers_parameters_are_what_the_flags_say(worker: LlamaCpp) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    argv = worker.command(a_launch(ALL_OPTIONS), MODEL, ANYWHERE, PORT, None).argv[4:]
    params = _params(xllamacpp, _parser().parse_args(argv))
    draft = params.speculative.draft
    assert (draft.mparams.path, draft.n_max, draft.n_min, draft.p_min) == ("/models/draft.gguf", 8, 2, 0.5)
    assert [(one.path, one.scale) for one in params.lora_adapters] == [("/l/a.gguf", 1.0), ("/l/b.gguf", 1.0)]
    assert params.lora_init_without_apply
    assert (params.sleep_idle_seconds, params.endpoint_slots, params.slot_save_path) == (60, False, "/slots/")
    assert (params.kv_unified, params.no_kv_offload, params.mmproj_use_gpu) == (True, True, False)
    assert params.tensor_split[:3] == [0.5, 1.5, 0.0]
    assert params.rope_scaling_type == xllamacpp.llama_rope_scaling_type.LLAMA_ROPE_SCALING_TYPE_YARN
    assert (params.n_predict, params.n_keep, params.yarn_orig_ctx) == (100, 11, 4096)


# --- adapters


def test_an_adapter_is_asked_for_by_its_number() -> None:
    launch = a_launch({"lora_list": ALL_OPTIONS["lora_list"]})
    assert LlamaCpp().with_adapter(launch, "b") == {"lora": [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]}
    assert LlamaCpp().defaults(launch) == {"lora": [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}]}


@pytest.mark.parametrize(
    ("options", "hint"),
    [({}, "It was launched without any."), ({"lora_list": ALL_OPTIONS["lora_list"]}, "It has a, b.")],
)
def test_an_adapter_that_it_has_not_is_refused_with_those_that_it_has(options: dict[str, Any], hint: str) -> None:
    with pytest.raises(ValueError, match=f"'qwen' has no LoRA adapter 'c'. {hint}"):
        LlamaCpp().with_adapter(a_launch(options), "c")


# --- llama-cpp-python's server


@pytest.fixture
def python_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LlamaCpp:
    """The engine on a machine that has llama-cpp-python and nothing else of llama.cpp."""
    python = Path(a_program(tmp_path / "bin" / "python"))
    (tmp_path / "lib" / "python3.11" / "site-packages" / "llama_cpp").mkdir(parents=True)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("engines.llama_cpp.has_package", lambda name: False)
    return LlamaCpp(settings=EngineSettings(python=str(python)))


def test_llama_cpp_pythons_server_serves_where_it_is_all_there_is(python_server: LlamaCpp) -> None:
    assert python_server.installed() is None
    assert not python_server.listens_on_socket(a_launch())
    options = {"n_threads": 2, "context_length": 1000, "use_mmap": False}
    command = python_server.command(a_launch(options, n_gpu=0), MODEL, Placement(gpu_uuids=()), PORT, None)
    assert command.argv == (
        *(python_server.settings.python, "-P", "-m", "llama_cpp.server"),
        *("--model", "/models/q4.gguf", "--model_alias", "qwen", "--host", "127.0.0.1", "--port", "4321"),
        *("--n_ctx", "1000", "--interrupt_requests", "false"),
        *("--n_threads", "2", "--use_mmap", "false", "--n_gpu_layers", "0"),
    )
    assert command.env == {"API_KEY": "the-secret-key", "CUDA_VISIBLE_DEVICES": ""}
    assert command.ready_path == "/v1/models"


def test_llama_cpp_pythons_server_refuses_what_it_has_not(python_server: LlamaCpp) -> None:
    with pytest.raises(DecodeError, match="llama-cpp-python's server has no 'cache_type_k'"):
        python_server.command(a_launch({"cache_type_k": "q8_0"}), MODEL, ANYWHERE, PORT, None)


def test_the_worker_takes_a_chat_template_that_begins_with_dashes(worker: LlamaCpp) -> None:
    template = "--- {{ messages }}"
    argv = worker.command(a_launch({"chat_template": template}), MODEL, ANYWHERE, SOCKET, None).argv[4:]
    assert _parser().parse_args(argv).chat_template == template


def run_worker(*flags: str, folder: Path) -> subprocess.CompletedProcess[str]:
    argv = [*worker_argv("llama_cpp"), *flags]
    env = {name: value for name, value in os.environ.items() if name != "LLAMA_API_KEY"}
    return subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def test_the_worker_tells_its_flags(tmp_path: Path) -> None:
    done = run_worker("--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--ctx-size" in done.stdout


def test_the_worker_refuses_a_flag_that_it_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")  # which is asked, as options may be forced on it
    done = run_worker("--model", "m.gguf", "--ctx-siz", "3", folder=tmp_path)
    assert done.returncode == 2
    assert "--ctx-siz" in done.stderr


def test_the_worker_exits_with_1_and_says_so_when_the_model_cannot_be_loaded(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    model = tmp_path / "broken.gguf"
    model.write_bytes(b"no model at all")
    done = run_worker("--model", str(model), "--host", str(tmp_path / "a.sock"), "--no-warmup", folder=tmp_path)
    assert done.returncode == 1
    assert "llama.cpp cannot start" in done.stderr


# --- options that are not known here


def test_forced_options_are_flags_after_ours(binary: LlamaCpp) -> None:
    forced = {
        "mlock": True,
        "no_mmap": False,
        "rope_scaling": "yarn",
        "x": None,
        "tensor-split": [3, 1.5],
        "o": {"a": 1},
    }
    argv = binary.command(a_launch({"n_threads": 1}, forced_options=forced), MODEL, ANYWHERE, SOCKET).argv
    flags = ("--mlock", "--rope-scaling", "yarn", "--tensor-split", "3", "--tensor-split", "1.5", "--o", '{"a":1}')
    assert argv[-len(flags) :] == flags


def test_the_worker_sets_forced_fields_of_the_engines_parameters() -> None:
    params = pytest.importorskip("xllamacpp").CommonParams()
    _force(params, ["--n-keep", "-1", "--check-tensors", "--rope-freq-base", "2.5", "--logits-file", "x"])
    assert (params.n_keep, params.check_tensors, params.rope_freq_base, params.logits_file) == (-1, True, 2.5, "x")
    for words, said in (
        (["--nope", "1"], "no parameter that --nope"),
        (["--model", "/x"], "no parameter that --model"),
        (["--n-keep", "many"], "cannot be 'many'"),
        (["--check-tensors", "maybe"], "cannot be 'maybe'"),
    ):
        with pytest.raises(ValueError, match=said):
            _force(params, words)


def a_vector_artifact(kind: type[EmbeddingFamily] | type[RerankFamily], max_tokens: int | None) -> Artifact:
    spec = ModelSpec(model_format="ggufv2", quantization="Q4_K_M", model_hub="local", model_id=str(MODEL))
    family = kind(model_name="v", model_specs=(spec,), max_tokens=max_tokens)
    return Artifact(family=family, spec=spec, source=Source(model_hub="local", model_id=str(MODEL)))


@pytest.mark.parametrize(
    ("kind", "max_tokens", "options", "expected"),
    [
        (EmbeddingFamily, 512, {}, {"--embedding": None, "--ctx-size": "2048", "--ubatch-size": "512"}),
        (EmbeddingFamily, 32768, {}, {"--ctx-size": "16384", "--batch-size": "4096", "--ubatch-size": "4096"}),
        (RerankFamily, None, {}, {"--embedding": None, "--pooling": "rank", "--ubatch-size": "4096"}),
        (RerankFamily, 512, {"context_length": 1024}, {"--ctx-size": "4096", "--ubatch-size": "1024"}),
        (RerankFamily, 512, {"n_batch": 64}, {"--pooling": "rank", "--batch-size": "64", "--ubatch-size": "64"}),
    ],
)
def test_a_model_that_embeds_or_ranks_reads_each_input_in_one_batch(
    kind: Any, max_tokens: int | None, options: dict[str, Any], expected: dict[str, str | None], binary: LlamaCpp
) -> None:
    launch = a_launch(options, a_vector_artifact(kind, max_tokens))
    assert expected.items() <= flags_of(binary.command(launch, MODEL, ANYWHERE, SOCKET).argv).items()


def test_an_embedding_model_is_not_made_to_rank(binary: LlamaCpp) -> None:
    launch = a_launch({}, a_vector_artifact(EmbeddingFamily, 512))
    assert "--pooling" not in binary.command(launch, MODEL, ANYWHERE, SOCKET).argv
