"""What a launch on engine `flexible` runs, and which launchers may."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engines.base import Endpoint, EngineSettings, Launch, Placement
from engines.flexible import Flexible
from gateway.launch import LaunchRequest, plan
from registry.registry import Registry

TRANSFORMERS = "xinference.model.flexible.launchers.transformers"
OURS = "my_package.launcher"


def registry_with(folder: Path, **fields: Any) -> Registry:
    registry = Registry.open(folder / "registrations")
    registry.register("flexible", json.dumps({"model_name": "mine"} | fields), persist=False)
    return registry


def planned(folder: Path, *launchers: str, options: dict[str, Any] | None = None, **fields: Any) -> Launch:
    engine = Flexible(settings=EngineSettings(launchers=launchers))
    wish = LaunchRequest(model_name="mine", model_type="flexible", options=options or {})
    return plan("uid", wish, registry_with(folder, **fields), (engine,))


def options_of(launch: Launch, model: str = ".") -> dict[str, Any]:
    engine = Flexible(settings=EngineSettings(launchers=(OURS,)))
    command = engine.command(launch, Path(model), Placement(), Endpoint(socket="/run/a.sock", api_key="key"))
    assert command.argv[0] == sys.executable
    assert command.argv[-9:] == ("flexible", "--model", model, "--uid", "uid", "--host", "/run/a.sock", "--port", "0")
    options: dict[str, Any] = json.loads(command.env["WORKER_OPTIONS"])
    return options


def test_the_worker_is_told_the_launcher_its_arguments_and_the_family(tmp_path: Path) -> None:
    launch = planned(tmp_path, OURS, options={"a": 1, "b": 2}, launcher=OURS, launcher_args='{"b": 3}')
    options = options_of(launch)
    assert (options["launcher"], options["args"]) == (OURS, {"a": 1, "b": 3})
    assert options["allowed"] == [TRANSFORMERS, OURS]
    assert (options["spec"]["model_name"], options["spec"]["model_uri"]) == ("mine", None)
    assert options["spec"]["launcher_args"] == '{"b": 3}'


def test_a_launcher_finds_the_files_under_model_uri(tmp_path: Path) -> None:
    launch = planned(tmp_path, OURS, launcher=OURS, model_uri=str(tmp_path))
    assert launch.artifact.local_path == tmp_path
    assert options_of(launch, str(tmp_path))["spec"]["model_uri"] == str(tmp_path)


@pytest.mark.parametrize(
    ("launcher", "allowed", "said"),
    [
        (OURS, (), "is not allowed. It is code that would run on this machine"),
        (OURS, ("my_package",), "is not allowed"),
        (OURS, (OURS + "s",), "`flexible_launchers`"),
        ("os.system", (), "is not allowed"),
        ("xinference.model.flexible.launchers.yolo", (), "is not built in"),
    ],
)
def test_a_launcher_that_is_not_named_exactly_is_refused(
    tmp_path: Path, launcher: str, allowed: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        planned(tmp_path, *allowed, launcher=launcher)


def test_the_worker_is_told_what_was_checked_whatever_the_launch_says_of_its_environment(tmp_path: Path) -> None:
    launch = planned(tmp_path, OURS, launcher=OURS)
    envs = {"WORKER_OPTIONS": '{"launcher": "os.system", "allowed": ["os.system"]}', "MORE": "1"}
    launch = msgspec.structs.replace(launch, envs=envs)
    command = Flexible().command(launch, Path(), Placement(), Endpoint(socket="/run/a.sock", api_key="key"))
    assert json.loads(command.env["WORKER_OPTIONS"])["launcher"] == OURS
    assert command.env["MORE"] == "1"
