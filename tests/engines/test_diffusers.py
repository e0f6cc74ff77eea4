"""diffusers: from a launch to the command line and the options of our workers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engines.base import Endpoint, EngineSettings, Launch, Placement
from engines.diffusers import Diffusers, DiffusersOptions
from engines.environments import worker_argv
from registry.additions import Addition, Role
from registry.decode import DecodeError, decode
from registry.resolve import Artifact
from registry.schema import ImageFamily, ModelFamily, ModelSpec, Source, VideoFamily

MODEL = Path("/models/sd")
SOCKET = Endpoint(socket="/run/a.sock", api_key="the-secret-key")
SPEC: dict[str, Any] = {"model_format": "pytorch", "model_hub": "local", "model_id": str(MODEL)}
ENGINE = Diffusers(settings=EngineSettings(python=sys.executable))


def an_artifact(family: ModelFamily | None = None, **spec: Any) -> Artifact:
    family = family or ImageFamily(model_name="sd")
    return Artifact(family=family, spec=ModelSpec(**SPEC | spec), source=Source(model_hub="local", model_id=str(MODEL)))


def worker_options(options: dict[str, Any], artifact: Artifact | None = None, **launch: Any) -> dict[str, Any]:
    wish = Launch(uid="sd", artifact=artifact or an_artifact(), engine="diffusers", options=options, **launch)
    command = ENGINE.command(wish, MODEL, launch.get("placement") or Placement(), SOCKET)
    found: dict[str, Any] = json.loads(command.env["WORKER_OPTIONS"])
    return found


@pytest.mark.parametrize(("family", "worker"), [(ImageFamily, "image"), (VideoFamily, "video")])
def test_the_models_type_chooses_the_worker(family: Any, worker: str) -> None:
    artifact = an_artifact(family(model_name="sd"))
    launch = Launch(uid="sd", artifact=artifact, engine="diffusers")
    command = ENGINE.command(launch, MODEL, Placement(), SOCKET)
    expected = (*worker_argv(worker, sys.executable), "--model", str(MODEL), "--uid", "sd")
    assert command.argv == (*expected, "--host", "/run/a.sock", "--port", "0")
    assert command.env["WORKER_API_KEY"] == "the-secret-key"
    assert "the-secret-key" not in " ".join(command.argv)
    assert command.env["HF_HUB_OFFLINE"] == "1"


def test_a_launch_that_says_nothing_leaves_all_to_the_worker() -> None:
    assert worker_options({}) == {"max_pixels": 2048 * 2048}


LORA = {"lora_name": "a", "local_path": "/a.safetensors"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"device": "cuda:1"}, {"device": "cuda:1"}),
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float16"}, {"torch_dtype": "float16"}),
        ({"variant": "fp16"}, {"variant": "fp16"}),
        ({"cpu_offload": "true"}, {"cpu_offload": True}),
        ({"sequential_cpu_offload": True}, {"sequential_cpu_offload": True}),
        ({"vae_tiling": True, "vae_slicing": True}, {"vae_tiling": True, "vae_slicing": True}),
        ({"attention_slicing": True}, {"attention_slicing": True}),
        ({"scheduler": "Euler a"}, {"scheduler": "Euler a"}),
        ({"n_threads": 2}, {"n_threads": 2}),
        ({"max_pixels": 4096}, {"max_pixels": 4096}),
        (
            {"lora_list": [LORA], "image_lora_fuse_kwargs": {"lora_scale": 0.5}},
            {"lora_list": [LORA], "image_lora_fuse_kwargs": {"lora_scale": 0.5}},
        ),
    ],
)
def test_options_reach_the_worker(options: dict[str, Any], expected: dict[str, Any]) -> None:
    assert worker_options(options) == {"max_pixels": 2048 * 2048} | expected


def test_what_is_loaded_beside_the_model_reaches_the_worker_as_paths() -> None:
    places: list[tuple[Role, str]] = [("gguf", "/q.gguf"), ("lightning", "/l"), ("controlnet", "/a")]
    additions = tuple(
        Addition(role=role, source=Source(model_hub="local", model_id=place))
        for role, place in [*places, ("controlnet", "/b")]
    )
    options = worker_options({}, msgspec.structs.replace(an_artifact(), additions=additions))
    assert options.pop("max_pixels")
    assert options == {"gguf_file": "/q.gguf", "lightning_file": "/l", "controlnet": ["/a", "/b"]}


def test_the_launchs_defaults_go_before_the_familys() -> None:
    family = ImageFamily(model_name="sd", default_generate_config={"guidance_scale": 0.0, "num_inference_steps": 1})
    options = worker_options({"default_generate_config": {"num_inference_steps": 4}}, an_artifact(family))
    assert options["generate_config"] == {"guidance_scale": 0.0, "num_inference_steps": 4}


def test_a_familys_options_go_below_the_launchs() -> None:
    artifact = an_artifact(
        ImageFamily(model_name="sd", default_model_config={"torch_dtype": "bfloat16", "variant": "fp16", "else": 1})
    )
    options = worker_options({"variant": "fp8"}, artifact)
    assert (options["torch_dtype"], options["variant"]) == ("bfloat16", "fp8")


def test_without_a_gpu_the_device_is_the_cpu() -> None:
    assert worker_options({}, n_gpu=0)["device"] == "cpu"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cpu_ofload": True}, "cpu_offload"),
        ({"torch_dtype": "float8"}, "torch_dtype"),
        ({"cpu_offload": True, "sequential_cpu_offload": True}, "exclude each other"),
        ({"lora_list": [{"lora_name": "a"}]}, "local_path"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DecodeError, match=sentence):
        decode(options, DiffusersOptions, "options", strict=False)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({}, None),
        ({"engine": "diffusers"}, None),
        ({"model_format": "diffusers"}, None),
        ({"engine": "MLX"}, "these files are for MLX"),
        (
            {"model_format": "ggufv2"},
            "diffusers loads folders of pipelines (model_format pytorch), not ggufv2",
        ),
    ],
)
def test_it_says_what_it_cannot_load(spec: dict[str, Any], reason: str | None) -> None:
    assert ENGINE.accepts(an_artifact(**spec)) == reason


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.environments.has_package", lambda name: False)
    assert Diffusers().installed() == "its library is not installed: hostler engines install diffusers"
    broken = Diffusers(settings=EngineSettings(python="/nowhere/python"))
    assert "names '/nowhere/python', which is not an executable file" in str(broken.installed())
