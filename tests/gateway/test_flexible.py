"""Flexible models through the door: Xinference's launcher contract, its client, and launchers that fail."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from harness import Gateway, StartGateway
from xinference_client import RESTfulClient

TRANSFORMERS = "xinference.model.flexible.launchers.transformers"

# A launcher as users have it: it imports Xinference's classes, which are not installed here.
LAUNCHERS = """
import asyncio, dataclasses, os, time
from pathlib import Path
from xinference.model.flexible import FlexibleModel, FlexibleModelSpec

class Adder(FlexibleModel):
    def load(self):
        path = Path(self.model_family.model_uri or "") / "base.txt"
        self.base = int(path.read_text()) if self.model_family.model_uri else self.config["base"]

    def infer(self, *args, **kwargs):
        if kwargs.get("sleep"):
            time.sleep(kwargs["sleep"])
        return {"sum": self.base + sum(args), "kwargs": kwargs, "pid": os.getpid()}

def adder(model_uid: str, model_spec: FlexibleModelSpec, **kwargs) -> FlexibleModel:
    return Adder(model_uid=model_uid, model_path=model_spec.model_uri, model_family=model_spec, config=kwargs)

@dataclasses.dataclass
class Found:
    where: Path
    data: bytes

class Odd:
    def infer(self, kind):
        if kind == "memory":
            return bytearray(1 << 50)
        if kind == "raise":
            raise LookupError("no such thing")
        if kind == "gpu":
            raise RuntimeError("CUDA error: device-side assert triggered")
        if kind == "unknown":
            return object()
        return [Found(Path("/a"), b"xyz"), float("nan"), {1, 1}, (n for n in range(2))]

def odd(model_uid, model_spec, **kwargs):
    return Odd()

class Waiting:
    async def infer(self, name, seen=[]):
        seen.append(name)
        while len(seen) < 2:
            await asyncio.sleep(0.01)
        return seen

def waiting(model_uid, model_spec, **kwargs):
    return Waiting()

def broken(model_uid, model_spec, **kwargs):
    raise ValueError("the weights are of another model")

def needy(model_uid, model_spec, **kwargs):
    import a_library_that_is_not_here

def nothing(model_uid, model_spec, **kwargs):
    return None

no_function = 3
"""
NAMES = ("adder", "odd", "waiting", "broken", "needy", "nothing", "no_function", "missing")


async def start(
    start_gateway: StartGateway, folder: Path, *names: str, settings: dict[str, Any] | None = None, **fields: Any
) -> Gateway:
    """A gateway with a registered flexible model for each launcher, whose module is on the import path."""
    (folder / "launchers").mkdir(exist_ok=True)
    (folder / "launchers" / "my_launchers.py").write_text(LAUNCHERS)
    gateway = await start_gateway(
        flexible_launchers=["my_launchers.adder"],
        env={
            "PYTHONPATH": f"{folder / 'launchers'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "XINFERENCE_FLEXIBLE_LAUNCHERS": ",".join(f"my_launchers.{name}" for name in NAMES[1:]),
        },
        **{"restart_limit": 1} | (settings or {}),
    )
    for name in names:
        launcher = name if "." in name else f"my_launchers.{name}"
        family = {"model_name": name.rpartition(".")[2], "launcher": launcher} | fields
        registered = await gateway.post(
            "/v1/model_registrations/flexible", {"model": json.dumps(family), "persist": False}
        )
        assert registered.status == 200, registered.body
    return gateway


async def launch(gateway: Gateway, name: str, **options: Any) -> Any:
    return await gateway.post("/v1/models", {"model_name": name, "model_type": "flexible"} | options)


async def infer(gateway: Gateway, name: str, *args: Any, **kwargs: Any) -> Any:
    return await gateway.post("/v1/flexible/infers", {"model": name, "args": args} | kwargs)


async def test_a_launcher_written_for_xinference_runs_unchanged_and_its_client_infers(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start(start_gateway, tmp_path, "adder", launcher_args='{"base": 10}')

    def talk() -> Any:
        client = RESTfulClient(gateway.address)
        uid = client.launch_model(model_name="adder", model_type="flexible")
        described = client.list_models()[uid]
        assert (described["model_type"], described["launcher"]) == ("flexible", "my_launchers.adder")
        return client.get_model(uid).infer(1, 2, name="x")

    answer = await asyncio.to_thread(talk)
    assert (answer["sum"], answer["kwargs"]) == (13, {"name": "x"})


async def test_a_launcher_reads_the_models_own_files(start_gateway: StartGateway, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "base.txt").write_text("100")
    gateway = await start(start_gateway, tmp_path, "adder", model_uri=str(tmp_path / "model"))
    assert (await launch(gateway, "adder")).status == 200
    assert (await infer(gateway, "adder", 1)).json["sum"] == 101


async def test_results_of_all_kinds_become_json(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start(start_gateway, tmp_path, "odd")
    assert (await launch(gateway, "odd")).status == 200
    answer = await infer(gateway, "odd", "things")
    assert answer.json == [{"where": "/a", "data": "eHl6"}, None, [1], [0, 1]]


async def test_coroutines_are_answered_at_once(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start(start_gateway, tmp_path, "waiting")
    assert (await launch(gateway, "waiting")).status == 200
    answers = await asyncio.gather(infer(gateway, "waiting", "a"), infer(gateway, "waiting", "b"))
    assert [sorted(answer.json) for answer in answers] == [["a", "b"], ["a", "b"]]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken", "cannot load the model: ValueError: the weights are of another model"),
        ("needy", "does not have: No module named 'a_library_that_is_not_here'. Name it in the model's"),
        ("nothing", "returned NoneType, which has no `infer`"),
        ("no_function", "is a int and no function"),
        ("missing", "There is no launcher my_launchers.missing"),
        ("not.allowed", "is not allowed"),
    ],
)
async def test_a_launcher_that_cannot_load_says_why(
    start_gateway: StartGateway, tmp_path: Path, name: str, said: str
) -> None:
    gateway = await start(start_gateway, tmp_path, name)
    answer = await launch(gateway, name.rpartition(".")[2])
    assert answer.status in (400, 503)
    assert said in answer.error["message"]


@pytest.mark.parametrize(
    ("kind", "status", "code", "said"),
    [
        ("memory", 503, "out_of_memory", "There was not enough memory for this request. Send a smaller one"),
        ("raise", 500, None, "The model failed: LookupError: no such thing"),
        ("unknown", 500, None, "returned object, which has no form in JSON"),
    ],
)
async def test_a_request_that_fails_says_why_and_the_next_one_is_answered(
    start_gateway: StartGateway, tmp_path: Path, kind: str, status: int, code: str | None, said: str
) -> None:
    gateway = await start(start_gateway, tmp_path, "odd")
    assert (await launch(gateway, "odd")).status == 200
    answer = await infer(gateway, "odd", kind)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert said in answer.error["message"]
    assert (await infer(gateway, "odd", "things")).status == 200
    assert (await gateway.until("odd"))["starts"] == 1


async def test_a_gpu_that_has_failed_is_told_and_the_engine_started_again(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start(start_gateway, tmp_path, "odd", settings={"restart_limit": 5})
    assert (await launch(gateway, "odd")).status == 200
    answer = await infer(gateway, "odd", "gpu")
    assert (answer.status, "device-side assert" in answer.error["message"]) == (500, True)
    await gateway.until("odd", starts=2, state="ready")
    assert (await infer(gateway, "odd", "things")).status == 200


async def test_arguments_that_the_model_does_not_take_are_a_bad_request(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start(start_gateway, tmp_path, "odd")
    assert (await launch(gateway, "odd")).status == 200
    assert (await infer(gateway, "odd")).status == 400
    answer = await gateway.post("/v1/flexible/infers", {"model": "odd", "args": "x"})
    assert (answer.status, answer.error["param"]) == (400, "args")


async def test_a_worker_that_is_killed_in_mid_request_answers_it_after_its_restart(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start(start_gateway, tmp_path, "adder", launcher_args='{"base": 10}', settings={"restart_limit": 5})
    assert (await launch(gateway, "adder")).status == 200
    running = asyncio.ensure_future(infer(gateway, "adder", 1, sleep=2))
    replica = await gateway.until("adder", in_flight=1)
    await asyncio.sleep(0.3)
    os.kill(replica["pid"], signal.SIGKILL)
    answer = await running
    assert (answer.status, answer.json["sum"]) == (200, 11)
    assert answer.json["pid"] != replica["pid"]


async def test_task_mock_gives_back_what_it_gets(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start(start_gateway, tmp_path, TRANSFORMERS, launcher_args='{"task": "mock"}')
    assert (await launch(gateway, "transformers")).status == 200
    assert (await infer(gateway, "transformers", 1, a=[1, {"b": None}])).json == {"a": [1, {"b": None}]}


# --- transformers, really


@pytest.mark.engine
async def test_a_pipeline_of_transformers_classifies_with_real_weights(
    start_gateway: StartGateway, tmp_path: Path, tiny_reranker: Path, torch_python: str
) -> None:
    gateway = await start(
        start_gateway,
        tmp_path,
        TRANSFORMERS,
        settings={"engines": {"flexible": {"python": torch_python}}},
        launcher_args='{"task": "text-classification", "device": "cpu"}',
        model_uri=str(tiny_reranker),
    )
    launched = await launch(gateway, "transformers", envs={"OMP_NUM_THREADS": "1"})
    assert launched.status == 200, launched.body
    answer = await infer(gateway, "transformers", ["a sentence", "another"])
    assert [set(found) for found in answer.json] == [{"label", "score"}] * 2
    assert all(0 <= found["score"] <= 1 for found in answer.json)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"not weights"), "cannot load the model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot load the model"),
    ],
    ids=["corrupt-weights", "no-weights"],
)
async def test_damaged_files_are_told(
    start_gateway: StartGateway, tmp_path: Path, tiny_reranker: Path, torch_python: str, damage: Any, said: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_reranker, folder)
    damage(folder)
    gateway = await start(
        start_gateway,
        tmp_path,
        TRANSFORMERS,
        settings={"engines": {"flexible": {"python": torch_python}}},
        launcher_args='{"task": "text-classification", "device": "cpu"}',
        model_uri=str(folder),
    )
    answer = await launch(gateway, "transformers", envs={"OMP_NUM_THREADS": "1"})
    assert answer.status == 503
    assert said in answer.error["message"]


async def test_a_missing_library_is_told(start_gateway: StartGateway, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    gateway = await start(
        start_gateway, tmp_path, TRANSFORMERS, launcher_args='{"task": "fill-mask"}', model_uri=str(tmp_path / "model")
    )
    answer = await launch(gateway, "transformers")
    assert answer.status == 503
    assert "No module named 'transformers'. Say `hostler engines install transformers`" in answer.error["message"]
