"""Which hub is taken, with real servers: one that answers, one that never does, and none."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from hub_servers import Answer, Server

from registry.hubs import choose
from registry.hubs.base import HubError
from registry.hubs.choose import choose_hub

CLOSED = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    choose.forget()
    yield
    choose.forget()


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_wish_goes_before_the_environment_and_no_network_is_asked() -> None:
    environment = {"XINFERENCE_MODEL_SRC": "csghub", "HF_ENDPOINT": CLOSED}
    assert choose_hub("pypi", environment) == "pypi"
    assert choose_hub(None, environment) == "csghub"
    assert choose_hub("auto", environment) == "csghub"


@pytest.mark.parametrize("name", ["HOSTLER_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_it_is_huggingface(name: str) -> None:
    assert choose_hub(None, {name: "1", "HF_ENDPOINT": CLOSED}) == "huggingface"
    assert choose_hub(None, {name: "0", "HF_ENDPOINT": CLOSED}) == "modelscope"


def test_a_hub_that_answers_is_taken_and_asked_once(server: Server) -> None:
    environment = {"HF_ENDPOINT": server.url, "XINFERENCE_MODEL_SRC": "auto"}
    assert [choose_hub(None, environment) for _ in range(3)] == ["huggingface"] * 3
    assert server.asked.total() == 1


def test_whatever_a_hub_says_is_an_answer_but_an_error_of_its_own(server: Server) -> None:
    server.answers["/ok"] = Answer(status=403)
    server.answers["/bad"] = Answer(status=502)
    assert choose_hub(None, {"HF_ENDPOINT": f"{server.url}/ok"}) == "huggingface"
    assert choose_hub(None, {"HF_ENDPOINT": f"{server.url}/bad"}) == "modelscope"


def test_a_hub_that_never_answers_is_given_up_after_three_seconds_and_remembered(silent: str) -> None:
    environment = {"HF_ENDPOINT": silent}
    began_at = time.monotonic()
    assert choose_hub(None, environment) == "modelscope"
    assert 2.5 < time.monotonic() - began_at < 3.7
    began_at = time.monotonic()
    assert choose_hub(None, environment) == "modelscope"
    assert time.monotonic() - began_at < 0.1


def test_what_was_found_is_asked_anew_after_a_while(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "KEEP_S", -1.0)
    for _ in range(2):
        assert choose_hub(None, {"HF_ENDPOINT": server.url}) == "huggingface"
    assert server.asked.total() == 2


def test_a_hub_behind_a_proxy_is_reached_through_it(server: Server) -> None:
    server.answers["http://hub.invalid/"] = server.answers["http://hub.invalid"] = Answer()
    environment = {"HF_ENDPOINT": "http://hub.invalid", "http_proxy": server.url}
    assert choose_hub(None, environment) == "huggingface"
    assert choose_hub(None, environment | {"no_proxy": "hub.invalid"}) == "modelscope"


@pytest.mark.parametrize("endpoint", [CLOSED, "nonsense", "http://", "http://[::1", "ftp://127.0.0.1:9"])
def test_what_cannot_be_reached_is_not_taken(endpoint: str) -> None:
    assert choose_hub(None, {"HF_ENDPOINT": endpoint}) == "modelscope"


def test_an_unknown_hub_is_told_with_the_nearest() -> None:
    with pytest.raises(HubError, match=r"which download_hub names\. Did you mean 'modelscope'"):
        choose_hub("modelscop", {})
    with pytest.raises(HubError, match="which XINFERENCE_MODEL_SRC names"):
        choose_hub(None, {"XINFERENCE_MODEL_SRC": "nowhere"})
