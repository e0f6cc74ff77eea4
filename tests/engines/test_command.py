"""What a launch on engine `command` runs, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.base import Command, Endpoint, Launch, Placement
from engines.command import CommandOptions, ServerCommand
from gateway.launch import LaunchRequest, plan
from registry.decode import DecodeError, decode
from registry.registry import Registry

PORT = Endpoint(port=8123, api_key="key")
ENGINES = (ServerCommand(),)


def planned(**options: Any) -> Launch:
    return plan("mine", LaunchRequest(model_engine="command", options=options), Registry.builtin(), ENGINES)


def command_of(launch: Launch, endpoint: Endpoint = PORT, model: str = ".") -> Command:
    return ServerCommand().command(launch, Path(model), Placement(), endpoint)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"command": "serve --name '{uid} x' --port {port}"},
            Command(argv=("serve", "--name", "mine x", "--port", "8123"), other_ready_paths=("/v1/models",)),
        ),
        (
            {"command": ["serve", "{port}", '{"a": 1}'], "ready_path": "/ready", "grace_s": 2},
            Command(argv=("serve", "8123", '{"a": 1}'), ready_path="/ready", grace_s=2),
        ),
        (
            {"command": "serve", "env": {"LISTEN": "{host}:{port}", "KEY": "{api_key}"}, "ready_path": "/"},
            Command(argv=("serve",), env={"LISTEN": "127.0.0.1:8123", "KEY": "key"}, ready_path="/"),
        ),
        (
            {"command": "serve $HOME {port} {other}", "ready_path": "/", "working_folder": "/srv"},
            Command(argv=("serve", "$HOME", "8123", "{other}"), ready_path="/", folder="/srv"),
        ),
    ],
)
def test_a_launch_runs(options: dict[str, Any], expected: Command) -> None:
    assert command_of(planned(**options)) == expected


def test_the_path_of_the_models_files_is_put_in() -> None:
    wish = LaunchRequest(model_engine="command", model_path="/m/a.gguf", options={"command": "serve {model} {port}"})
    launch = plan("mine", wish, Registry.builtin(), ENGINES)
    assert launch.artifact.local_path == Path("/m/a.gguf")
    assert command_of(launch, model="/m/a.gguf").argv == ("serve", "/m/a.gguf", "8123")


def test_a_command_line_with_a_place_for_a_socket_gets_one() -> None:
    launch = planned(command="serve --unix {socket}")
    assert ServerCommand().listens_on_socket(launch)
    assert not ServerCommand().listens_on_socket(planned(command="serve {port}"))
    assert command_of(launch, Endpoint(socket="/run/a.sock")).argv == ("serve", "--unix", "/run/a.sock")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "Required key 'command'"),
        ({"command": ""}, "`command` is empty"),
        ({"command": "serve --port 8000"}, r"write \{port\}"),
        ({"command": "serve '{port}"}, "No closing quotation"),
        ({"command": "serve {port}", "ready_path": "health"}, "ready_path"),
        ({"command": "serve {port}", "port": 1}, "Unknown key 'port'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DecodeError, match=said):
        decode(options, CommandOptions, "options", strict=False)


def test_a_model_without_files_has_the_type_and_the_abilities_that_are_given() -> None:
    wish = LaunchRequest(
        model_engine="command",
        model_type="embedding",
        model_ability=("embed", "embed_vision"),
        options={"command": "serve {port}"},
    )
    launch = plan("mine", wish, Registry.builtin(), ENGINES)
    family = launch.artifact.family
    assert (family.model_name, family.model_type, family.abilities) == ("mine", "embedding", ("embed", "embed_vision"))
    assert not launch.artifact.has_files


def test_an_ability_that_there_is_not_is_refused() -> None:
    wish = LaunchRequest(model_engine="command", model_ability=("chatt",), options={"command": "serve {port}"})
    with pytest.raises(ValueError, match="Did you mean 'chat'"):
        plan("mine", wish, Registry.builtin(), ENGINES)


def test_it_is_never_chosen_by_itself() -> None:
    with pytest.raises(ValueError, match="No engine here can run"):
        plan("mine", LaunchRequest(model_path="/m/a.gguf"), Registry.builtin(), ENGINES)
