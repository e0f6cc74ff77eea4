"""Where a launch on engine `remote` sends requests, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.base import Endpoint, Launch, Placement
from engines.remote import Remote, RemoteOptions
from gateway.launch import LaunchRequest, plan
from registry.decode import DecodeError, Secret, decode
from registry.registry import Registry


def planned(**options: Any) -> Launch:
    return plan("mine", LaunchRequest(model_engine="remote", options=options), Registry.builtin(), (Remote(),))


def endpoint_of(launch: Launch) -> Endpoint:
    endpoint = Remote().command(launch, Path(), Placement(), Endpoint(port=1, api_key="local")).endpoint
    assert endpoint is not None
    return endpoint


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"base_url": "http://peer:9997"}, Endpoint(url="http://peer:9997/v1", silence_s=600)),
        ({"base_url": "https://a.example/v1/", "timeout_s": "5"}, Endpoint(url="https://a.example/v1", silence_s=5)),
        (
            {"base_url": "https://a.example/x/openai", "api_key": "secret", "headers": {"x-team": "blue"}},
            Endpoint(url="https://a.example/x/openai", api_key="secret", headers={"x-team": "blue"}, silence_s=600),
        ),
    ],
)
def test_a_launch_is_served_at(options: dict[str, Any], expected: Endpoint) -> None:
    launch = planned(**options)
    assert endpoint_of(launch) == expected
    assert not launch.artifact.has_files


@pytest.mark.parametrize(
    ("url", "path", "expected"),
    [
        ("https://a.example/v1", "/v1/chat/completions", "https://a.example/v1/chat/completions"),
        ("https://a.example/v1", "/tokenize", "https://a.example/tokenize"),
        ("https://a.example/x/v1", "/v1/models", "https://a.example/x/v1/models"),
        ("https://a.example/v1beta/openai", "/v1/chat/completions", "https://a.example/v1beta/openai/chat/completions"),
        ("https://a.example/v1beta/openai", "/health", "https://a.example/v1beta/openai/health"),
    ],
)
def test_a_path_is_asked_for_at(url: str, path: str, expected: str) -> None:
    assert Endpoint(url=url).url_of(path) == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "Required key 'base_url'"),
        ({"base_url": "a.example/v1"}, "is an address such as"),
        ({"base_url": "ftp://a.example"}, "is an address such as"),
        ({"base_url": "file:///etc/passwd"}, "is an address such as"),
        ({"base_url": "https://"}, "is an address such as"),
        ({"base_url": "https://me:key@a.example/v1"}, "a key goes into `api_key`"),
        ({"base_url": "https://a.example/v1?key=1"}, "a key goes into `api_key`"),
        ({"base_url": "https://a.example", "api_kye": "x"}, "Did you mean 'api_key'"),
        ({"base_url": "https://a.example", "timeout_s": 0}, "timeout_s"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DecodeError, match=said):
        decode(options, RemoteOptions, "options", strict=False)


def test_keys_are_not_shown() -> None:
    options = decode(
        {"base_url": "https://a.example", "api_key": "very-secret", "headers": {"api-key": "very-secret"}},
        RemoteOptions,
    )
    assert isinstance(options.api_key, Secret)
    assert "very-secret" not in repr(options)


@pytest.mark.parametrize(("options", "name"), [({}, "mine"), ({"model": "gpt-x"}, "gpt-x")])
def test_the_model_is_known_there_as(options: dict[str, Any], name: str) -> None:
    assert Remote().served_name(planned(base_url="https://a.example", **options)) == name


def test_the_name_of_a_family_lends_its_abilities_and_fetches_nothing() -> None:
    wish = LaunchRequest(
        model_engine="remote", model_name="qwen2.5-instruct", options={"base_url": "https://a.example"}
    )
    launch = plan("mine", wish, Registry.builtin(), (Remote(),))
    assert "tools" in launch.artifact.family.abilities
    assert not launch.artifact.has_files
