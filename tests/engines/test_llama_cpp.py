"""llama.cpp: from a launch to the argv and environment of `llama-server` or of our worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import packaging
import pytest

from engines.base import Endpoint as EngineEndpoint
from engines.base import EngineSettings, Launch, Needs, Placement
from engines.environments import worker_argv
from engines.llama_cpp import LlamaCpp, LlamaCppOptions
from engines.workers.llama_cpp import _force, _parser
from registry.decode import DecodeError
from registry.memory import Cache
from registry.resolve import Artifact
from registry.schema import LLMFamily, ModelSpec, Source

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
}


def an_artifact(context_length: int = 2048, ability: tuple[str, ...] = ("chat",), format: str = "ggufv2") -> Artifact:
    spec = ModelSpec(model_format=format, quantization="Q4_K_M", model_hub="local", model_id=str(MODEL))
    family = LLMFamily(model_name="qwen", model_specs=(spec,), context_length=context_length, model_ability=ability)
    return Artifact(family=family, spec=spec, source=Source(model_hub="local", model_id=str(MODEL)))


def a_launch(options: dict[str, Any] | None = None, artifact: Artifact | None = None, **fields: Any) -> Launch:
    fields = {"uid": "qwen"} | fields
    return Launch(artifact=artifact or an_artifact(), engine="llama.cpp", options=options or {}, **fields)


def a_program(path: Path) -> str:
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
        ("LLM", "embedding"),
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
        ({"n_gpu_layers": 0}, {"--n-gpu-layers": "0"}),
        ({"flash_attn": "off"}, {"--flash-attn": "off"}),
        ({"cache_type_k": "q8_0", "cache_type_v": "q4_0"}, {"--cache-type-k": "q8_0", "--cache-type-v": "q4_0"}),
        ({"cache_ram_mib": 0}, {"--cache-ram": "0"}),
        ({"chat_template": "chatml"}, {"--chat-template": "chatml"}),
        ({"reasoning_format": "none"}, {"--reasoning-format": "none"}),
        ({"embedding": True, "pooling": "cls"}, {"--embedding": None, "--pooling": "cls"}),
        ({"warmup": False}, {"--no-warmup": None}),
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
        "n_gpu_layers": -1,
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
    }


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
    params = SimpleNamespace(n_keep=0, mlock=False, rope_freq_base=0.0, name="", model=object())
    _force(params, ["--n-keep", "-1", "--mlock", "--rope-freq-base", "2.5", "--name", "x"])
    assert (params.n_keep, params.mlock, params.rope_freq_base, params.name) == (-1, True, 2.5, "x")
    for words, said in (
        (["--nope", "1"], "no parameter that --nope"),
        (["--model", "/x"], "no parameter that --model"),
        (["--n-keep", "many"], "cannot be 'many'"),
        (["--mlock", "maybe"], "cannot be 'maybe'"),
    ):
        with pytest.raises(ValueError, match=said):
            _force(params, words)
