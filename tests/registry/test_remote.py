"""Catalogues behind a URL: fetched, checked and kept, from a server on this machine."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hub_servers import Answer, Server

from registry import remote
from registry.decode import DecodeError
from registry.registry import Registry
from registry.remote import catalogue_file, catalogue_files, is_url


def a_catalogue(*names: str) -> bytes:
    spec = {"model_format": "ggufv2", "model_size_in_billions": 1, "quantization": "q", "model_id": "org/x"}
    common = {"version": 2, "model_lang": ["en"], "model_ability": ["chat"], "model_family": "other"}
    specs = [spec | {"model_file_name_template": "x.gguf"}]
    return json.dumps({"LLM": [common | {"model_name": name, "model_specs": specs} for name in names]}).encode()


def test_a_url_is_fetched_and_laid_over_the_catalogue(server: Server, tmp_path: Path) -> None:
    server.answers["/c.json"] = Answer(a_catalogue("ours"))
    url = f"{server.url}/c.json"
    assert (is_url(url), is_url("/a/https://b"), is_url("HTTPS://x"), is_url("ftp://x")) == (True, False, True, False)
    (tmp_path / "f.json").write_bytes(a_catalogue("mine"))
    files = catalogue_files([url, str(tmp_path / "f.json")], tmp_path / "kept")
    registry = Registry.builtin(extra_files=files)
    assert all(registry.find(name) for name in ("ours", "mine", "qwen3"))


def test_the_copy_is_used_when_nobody_answers_or_what_comes_is_wrong(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/c.json"
    server.answers["/c.json"] = Answer(a_catalogue("ours"))
    copy = catalogue_file(url, tmp_path)
    for bad in (
        Answer(status=500),
        Answer(b"{"),
        Answer(b"[]"),
        Answer(b'{"LLM": [{"model_name": "x"}]}'),
        Answer(status=302, headers={"Location": "ftp://127.0.0.1/c.json"}),
        Answer(status=302, headers={"Location": "file:///etc/passwd"}),
        Answer(a_catalogue("ours"), headers={"Content-Length": "100000", "Connection": "close"}),
    ):
        server.answers["/c.json"] = bad
        assert catalogue_file(url, tmp_path) == copy
        with pytest.raises(DecodeError, match="catalogue"):
            catalogue_file(url, tmp_path, must_fetch=True)
        assert copy.read_bytes() == a_catalogue("ours")
    server.close()
    assert catalogue_file(url, tmp_path) == copy
    assert [path.name for path in tmp_path.iterdir()] == [copy.name]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(status=404), "404"),
        (Answer(b"{"), "damaged"),
        (Answer(a_catalogue("x" * 2000)), "larger than 1000 bytes"),
        (Answer(status=302, headers={"Location": "ftp://127.0.0.1/c.json"}), "ftp"),
        (Answer(status=302, headers={"Location": "file:///etc/passwd"}), "302"),
    ],
)
def test_without_a_copy_it_is_an_error_that_names_the_url(
    server: Server, tmp_path: Path, answer: Answer, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LIMIT_BYTES", 1000)
    server.answers["/c.json"] = answer
    with pytest.raises(DecodeError) as refused:
        catalogue_file(f"{server.url}/c.json", tmp_path)
    assert server.url in str(refused.value)
    assert said in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_server_that_never_ends_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LIMIT_S", 0.3)
    server.answers["/c.json"] = Answer(a_catalogue("ours"), gate=threading.Event())
    with pytest.raises(DecodeError, match="cannot be had"):
        catalogue_file(f"{server.url}/c.json", tmp_path)


def test_offline_nobody_is_asked(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["/c.json"] = Answer(a_catalogue("ours"))
    copy = catalogue_file(f"{server.url}/c.json", tmp_path)
    monkeypatch.setenv("HOSTLER_OFFLINE", "1")
    assert catalogue_file(f"{server.url}/c.json", tmp_path) == copy
    assert server.asked["GET /c.json"] == 1
    with pytest.raises(DecodeError, match="HOSTLER_OFFLINE"):
        catalogue_file(f"{server.url}/other.json", tmp_path)


def test_a_new_catalogue_may_not_take_a_registered_name(tmp_path: Path) -> None:
    registry = Registry.builtin()
    spec: dict[str, Any] = {"model_format": "pytorch", "model_size_in_billions": 1, "quantization": "none"}
    model = {"version": 2, "model_name": "ours", "model_family": "other", "model_lang": ["en"]}
    specs = [spec | {"model_uri": str(tmp_path)}]
    registry.register("LLM", model | {"model_ability": ["chat"], "model_specs": specs}, persist=False)
    (tmp_path / "c.json").write_bytes(a_catalogue("ours", "other"))
    with pytest.raises(ValueError, match="ours, which is registered here"):
        registry.replace_catalogue([tmp_path / "c.json"])
    assert registry.find("other") is None
    registry.unregister("LLM", "ours")
    registry.replace_catalogue([tmp_path / "c.json"])
    assert registry.find("other")
