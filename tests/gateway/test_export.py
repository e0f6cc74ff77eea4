"""All that is served as one file, and back."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from harness import Gateway, StartGateway, fake_model
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from engines import ENGINES
from engines.base import EngineSettings, Launch
from gateway.apply import starts_alike, steps
from gateway.config import Group, Settings, load
from gateway.export import export
from gateway.launch import LaunchRequest, plan
from registry.decode import Secret
from registry.registry import Registry
from registry.schema import LLMFamily, ModelSpec

FAKE_LLAMA = EngineSettings(binary=str(Path(__file__).parents[1] / "fake_engine.py"))
KNOWN = tuple(engine.configured(FAKE_LLAMA) if engine.name == "llama.cpp" else engine for engine in ENGINES)
REGISTRY = Registry(
    [
        LLMFamily(
            model_name="qwen",
            model_specs=(
                ModelSpec(model_format="ggufv2", model_size_in_billions=1, quantization="q4_k_m", model_id="org/a"),
                ModelSpec(model_format="ggufv2", model_size_in_billions="0_5", quantization="q8_0", model_id="org/a"),
                ModelSpec(
                    model_format="ggufv2",
                    model_size_in_billions=1,
                    quantization="q4_k_m",
                    model_hub="modelscope",
                    model_id="other/a",
                ),
            ),
        )
    ]
)

words = st.text(max_size=12).filter(lambda text: "\0" not in text and not any(0xD800 <= ord(c) < 0xE000 for c in text))
values = words | st.sampled_from(["${HOME}", "$${X}", "$", "on", "0_5", "1e3", "~", "a\nb", "${file:/etc/passwd}", "5"])
selections = st.one_of(
    st.fixed_dictionaries(
        {"model_name": st.just("qwen")},
        optional={
            "model_size_in_billions": st.sampled_from([1, "1"]),
            "quantization": st.sampled_from(["q4_k_m", "Q4_K_M"]),
            "model_hub": st.sampled_from(["huggingface", "modelscope"]),
        },
    ),
    st.fixed_dictionaries(
        {"model_path": st.sampled_from(["/a/b-Q4_0.gguf", "/folder of/files"]), "model_format": st.just("ggufv2")},
        optional={
            "quantization": st.sampled_from(["q4_0", "Q8_0"]),
            "model_file": st.sampled_from(["x-{quantization}.gguf", "y.gguf"]),
            "model_name": st.sampled_from(["own-name", "qwen"]),
            "model_ability": st.just(("chat",)),
            "multimodal_projector": st.just("mmproj.gguf"),
        },
    ),
    st.fixed_dictionaries(
        {"model_id": st.just("org/some-gguf"), "model_hub": st.sampled_from(["huggingface", "modelscope"])},
        optional={
            "model_revision": st.just("v1"),
            "quantization": st.just("q4_0"),
            "model_size_in_billions": st.just(3),
        },
    ),
)
copies = st.sampled_from(
    [{}, {"replica": 3}, {"n_gpu": 2}, {"n_gpu": 0}, {"gpu_idx": (0, 1)}, {"gpu_idx": (0, 1, 2, 3), "replica": 2}]
)
others = st.fixed_dictionaries(
    {},
    optional={
        "options": st.dictionaries(st.sampled_from(["n_threads", "n_batch"]), st.integers(1, 64)),
        "envs": st.dictionaries(st.sampled_from(["A", "HF_TOKEN", "9X", "a b"]), values),
        "request_limits": st.integers(0, 9),
        "queue_limit": st.integers(0, 9),
        "pinned": st.booleans(),
        "priority": st.integers(-10, 10),
        "group": st.just("g"),
        "memory": st.sampled_from([2**30, "1.5GiB"]),
        "cpu_fallback": st.booleans(),
        "preload": st.booleans(),
        "idle_timeout_s": st.floats(0.5, 1e9),
        "start_timeout_s": st.floats(0.5, 1e9),
        "load_timeout_s": st.floats(0.5, 1e9),
        "enable_virtual_env": st.booleans(),
    },
)


def launched(requests: dict[str, LaunchRequest]) -> dict[str, Launch]:
    return {uid: plan(uid, request, REGISTRY, KNOWN) for uid, request in requests.items()}


def written_and_read(tmp_path: Path, data: dict[str, Any], ending: str, environment: dict[str, str]) -> Settings:
    file = tmp_path / f"file.{ending}"
    file.write_text(json.dumps(data) if ending == "json" else yaml.safe_dump(data, sort_keys=False))
    return load(str(file), {}, environment)


@given(
    selection=selections,
    copy=copies,
    other=others,
    forced=st.booleans(),
    is_declared=st.booleans(),
    ending=st.sampled_from(["yaml", "json"]),
    with_secrets=st.booleans(),
)
@example(
    selection={"model_name": "qwen"},
    copy={},
    other={"envs": {"A": "$${X}"}},
    forced=False,
    is_declared=False,
    ending="yaml",
    with_secrets=True,
)
@hypothesis_settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_exported_gives_the_same_launches_again(
    selection: dict[str, Any],
    copy: dict[str, Any],
    other: dict[str, Any],
    forced: bool,
    is_declared: bool,
    ending: str,
    with_secrets: bool,
    tmp_path: Path,
) -> None:
    fields = selection | copy | other
    if forced:
        fields |= {"force_options": True, "options": other.get("options", {}) | {"my-flag": [1, "two"]}}
    request = LaunchRequest(**({"model_engine": "llama.cpp"} | fields))
    second = LaunchRequest(model_name="qwen", model_engine="llama.cpp", envs={"HF_TOKEN": "another"})
    requests = {"m/1": request, "second": second}
    launches = launched(requests)
    settings = Settings(groups={"g": Group(max_loaded=2)}, models=requests if is_declared else {})
    exported = export(settings, launches.values(), with_secrets=with_secrets)
    # The environment of whoever uses the file has what the references ask for.
    environment = dict.fromkeys(exported.variables, "")
    for uid, model in exported.settings["models"].items():
        for name, text in model.get("envs", {}).items():
            if text.removeprefix("${").removesuffix("}") in exported.variables:
                environment[text[2:-1]] = requests[uid].envs[name]
    again = written_and_read(tmp_path, exported.settings, ending, environment)
    assert again.groups == settings.groups
    for uid, launch in launched(again.models).items():
        (step,) = steps({uid: launches[uid]}, {uid: launch})
        assert step.fields == ()
        assert starts_alike(launches[uid], launch)


def test_what_may_be_secret_is_a_reference_and_told() -> None:
    request = LaunchRequest(
        model_name="qwen",
        envs={"HF_TOKEN": "hf_1", "OMP_NUM_THREADS": "4", "LOG": "debug", "PIN": "1234", "URL": "https://a:b@c"},
    )
    other = msgspec.structs.replace(request, envs={"HF_TOKEN": "hf_2"})
    remote = LaunchRequest(
        model_engine="remote",
        model_name="far",
        options={"base_url": "https://api.example/v1", "api_key": "sk-9", "headers": {"X-Team": "red"}},
    )
    launches = launched({"m": request, "9/o": other, "far": remote})
    settings = Settings(api_keys=(Secret("key"),), port=1234)
    exported = export(settings, launches.values(), with_secrets=False)
    text = json.dumps(exported.settings) + json.dumps(exported.notes)
    assert not [secret for secret in ("hf_1", "hf_2", "1234", "a:b", "sk-9", "red", '"key"') if secret in text]
    models = exported.settings["models"]
    assert models["m"]["envs"] == {
        "HF_TOKEN": "${HF_TOKEN}",
        "OMP_NUM_THREADS": "4",
        "LOG": "debug",
        "PIN": "${PIN}",
        "URL": "${URL}",
    }
    assert models["9/o"]["envs"] == {"HF_TOKEN": "${_9_O_HF_TOKEN}"}
    assert models["far"]["options"] == {
        "base_url": "https://api.example/v1",
        "api_key": "${api_key}",
        "headers": {"X-Team": "${X_Team}"},
    }
    assert exported.variables == ("HF_TOKEN", "PIN", "URL", "_9_O_HF_TOKEN", "api_key", "X_Team")
    assert "api_keys are left out" in exported.notes[0]
    assert "HF_TOKEN, PIN" in exported.notes[1]
    whole = export(settings, launches.values(), with_secrets=True).settings
    assert whole["models"]["m"]["envs"] == request.envs
    assert whole["models"]["far"]["options"]["headers"] == {"X-Team": "red"}
    assert "api_keys" not in whole


# --- by a real gateway and the command line


async def hostler(gateway: Gateway, *words: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    argv = [sys.executable, "-P", "-m", "gateway.cli", *words, "-e", gateway.address]
    done = await asyncio.to_thread(
        subprocess.run, argv, capture_output=True, text=True, timeout=60, env=os.environ | (env or {})
    )
    return done.returncode, done.stdout, done.stderr


def effective(gateway: Gateway, *, without: tuple[str, ...]) -> dict[str, Any]:
    """Launches on disk, as far as anything is done by them."""
    launches = [json.loads(path.read_text()) for path in (gateway.home / "launches").glob("*.json")]
    return {one["uid"]: {key: value for key, value in one.items() if key not in without} for one in launches}


async def test_an_export_is_taken_by_apply_and_by_serve(start_gateway: StartGateway, tmp_path: Path) -> None:
    file = tmp_path / "fake.gguf"
    gateway = await start_gateway(
        fake={}, model={"options": {"n_threads": 2}}, groups={"g": {"max_loaded": 2}}, min_residency_s=1.5
    )
    bodies: list[dict[str, Any]] = [
        {"model_uid": "a", "replica": 2, "request_limits": 3, "n_threads": 4, "group": "g"},
        {"model_uid": "org/b", "idle_timeout_s": 60, "force_options": True, "my-flag": "${x}", "memory": "1GiB"},
    ]
    for body in bodies:
        answer = await gateway.post("/v1/models?wait_ready=false", fake_model(file, {"tokens": 3}) | body)
        assert answer.status == 200, answer.body
    await gateway.post("/v1/models/a/reload", {"model_config": {"n_threads": 5}})
    launches = effective(gateway, without=("selection",))
    assert launches["a"]["options"] == {"n_threads": 5}

    code, text, told = await hostler(gateway, "export")
    assert (code, yaml.safe_load(text)["groups"]) == (0, {"g": {"max_loaded": 2, "exclusive": False}})
    assert "FAKE_ENGINE in the environment" in told
    assert "home" not in yaml.safe_load(text)
    whole = tmp_path / "whole.yaml"
    whole.write_text(text)
    for verb in ("--dry-run", "--json"):
        code, output, told = await hostler(gateway, "apply", str(whole), verb)
        assert code == 1
        assert "refers to an environment variable that is not set" in told
    fake_of_others = json.dumps({"tokens": 3})
    env = {"FAKE_ENGINE": "{}", "A_FAKE_ENGINE": fake_of_others, "ORG_B_FAKE_ENGINE": fake_of_others}
    code, output, told = await hostler(gateway, "apply", str(whole), "--dry-run", env=env)
    assert code == 0, told
    assert "0 of 3 models are touched, 0 settings of the site differ." in output
    assert (await gateway.get("/v1/models/a")).json["origin"] == "api"

    code, output, told = await hostler(gateway, "apply", str(whole), env=env)
    assert (code, output.count("untouched")) == (0, 3)
    assert (await gateway.get("/v1/models/a")).json["origin"] == "apply"
    assert effective(gateway, without=("selection", "is_applied")) == launches

    other = await start_gateway(models={}, home=tmp_path / "other", groups={"g": {}})
    code, output, told = await hostler(other, "apply", str(whole), env=env)
    assert (code, output.count("added")) == (0, 3), told
    assert "min_residency_s" in output
    assert "never by this file" in output
    found = effective(other, without=("selection", "is_applied"))
    assert {uid: found[uid] for uid in launches} == launches
    assert (await other.complete("org/b")).status == 200
    code, output, told = await hostler(other, "list")
    assert (code, output.count(" apply ")) == (0, 3)

    third = await start_gateway(home=tmp_path / "third", **yaml.safe_load(text), env=env)
    cards = (await third.get("/v1/models")).json["data"]
    assert {card["id"]: card["origin"] for card in cards} == dict.fromkeys(("fake", "a", "org/b"), "settings")
    assert (await third.complete("org/b")).status == 200


async def test_the_gateways_own_file_is_read_where_it_is(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={}, env={"ONLY_THERE": "x"}, watch_settings=False)
    own = gateway.home / "settings.yaml"
    code, output, _ = await hostler(gateway, "apply", str(own))
    assert (code, "0 of 1 models are touched" in output) == (0, True)
    own.write_text(own.read_text() + "access_log: ${ONLY_THERE:-}\n")
    code, _, told = await hostler(gateway, "apply", str(own))
    assert code == 1
    assert "$.access_log" in told
    own.write_text(own.read_text().replace("${ONLY_THERE:-}", "false"))
    code, output, _ = await hostler(gateway, "apply", "--json")
    assert (code, json.loads(output)["settings"]) == (0, [{"name": "access_log", "takes_effect": "at once"}])


async def test_secrets_are_only_given_to_who_has_a_key(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={"tokens": 1})
    answer = await gateway.get("/v1/config/export?with_secrets=true")
    assert answer.status == 403
    assert "api_keys" in answer.error["message"]
    code, _, told = await hostler(gateway, "export", "--with-secrets")
    assert (code, "api_keys" in told) == (1, True)
    with_key = await start_gateway(fake={"tokens": 1}, home=tmp_path / "keys", api_keys=["k"])
    code, text, _ = await hostler(with_key, "export", "--with-secrets", "--format", "json", "-ak", "k")
    assert code == 0
    assert json.loads(text)["models"]["fake"]["envs"] == {"FAKE_ENGINE": '{"tokens": 1}'}


@pytest.mark.parametrize("text", ["models: [", "modles: {}", "models: {x: {model_path: relative}}"])
async def test_a_file_that_is_wrong_is_told_so(text: str, start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={})
    (tmp_path / "bad.yaml").write_text(text)
    code, output, told = await hostler(gateway, "apply", str(tmp_path / "bad.yaml"))
    assert (code, output) == (1, "")
    assert told
    assert "Traceback" not in told
