"""The hub `modelscope` against a real server on this machine that speaks its API."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
from hub_servers import ModelScope, Server, StartFetch, wait_until

from registry.hubs import find_cached
from registry.schema import Source

pytest.importorskip("modelscope_hub")

GGUF = b"GGUF" + bytes(range(256)) * 40
LARGE = b"GGUF" + bytes(range(256)) * 40_000
FILES = {"README.md": b"hi", "Tiny-Q4_0.gguf": GGUF, "Tiny-Q8_0.gguf": GGUF * 2, ".gitattributes": b"x"}
Q4 = Source(model_hub="modelscope", model_id="owner/tiny", files=("*q4_0*.gguf",))


@pytest.fixture
def hub(server: Server) -> ModelScope:
    return ModelScope(server)


def test_only_the_matching_files_are_fetched(hub: ModelScope, start_fetch: StartFetch, tmp_path: Path) -> None:
    hub.add(FILES)
    assert find_cached(Q4, tmp_path / "cache") is None
    fetch = start_fetch(Q4, **hub.env)
    path = fetch.path()
    assert path.is_relative_to(tmp_path / "cache/modelscope/owner/tiny")
    assert path.name == "Tiny-Q4_0.gguf"
    assert path.read_bytes() == GGUF
    assert [hub.downloads(name) for name in FILES] == [0, 1, 0, 0]
    assert find_cached(Q4, tmp_path / "cache") == path
    assert fetch.lines[-2].items() >= {"done_bytes": len(GGUF), "total_bytes": len(GGUF), "eta_s": 0.0}.items()
    assert not list((tmp_path / "cache/modelscope").glob(".partial-*"))


def test_without_patterns_what_engines_need_is_fetched(hub: ModelScope, start_fetch: StartFetch) -> None:
    hub.add({"config.json": b"{}", "sub/model.safetensors": b"safe", "sub/model.bin": b"pickle", "a.onnx": b"o"})
    folder = start_fetch(Source(model_hub="modelscope", model_id="owner/tiny"), **hub.env).path()
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json", "sub/model.safetensors"}


def test_a_revision_is_honoured_and_a_branch_that_moves_mixes_nothing(hub: ModelScope, start_fetch: StartFetch) -> None:
    hub.add({"config.json": b"old", "model.safetensors": GGUF}, revision="v1")
    hub.add({"config.json": b"new", "model.safetensors": GGUF})
    old = start_fetch(Source(model_hub="modelscope", model_id="owner/tiny", model_revision="v1"), **hub.env).path()
    new = start_fetch(Source(model_hub="modelscope", model_id="owner/tiny"), **hub.env).path()
    assert (old / "config.json").read_bytes() == b"old"
    assert (new / "config.json").read_bytes() == b"new"
    assert (new / "model.safetensors").samefile(old / "model.safetensors")
    assert hub.downloads("model.safetensors") == 0


@pytest.mark.parametrize(
    "layout", ["models/owner--tiny/snapshots/master", "models/owner/tiny", "hub/models/owner/tiny"]
)
def test_what_the_library_has_is_not_fetched_again(
    layout: str, hub: ModelScope, start_fetch: StartFetch, tmp_path: Path
) -> None:
    hub.add(FILES)
    theirs = tmp_path / "ms" / layout / "Tiny-Q4_0.gguf"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(GGUF)
    path = start_fetch(Q4, MODELSCOPE_CACHE=str(tmp_path / "ms"), **hub.env).path()
    assert path.samefile(theirs)
    assert hub.downloads("Tiny-Q4_0.gguf") == 0


def test_a_damaged_file_of_the_library_is_not_taken(hub: ModelScope, start_fetch: StartFetch, tmp_path: Path) -> None:
    hub.add(FILES)
    theirs = tmp_path / "ms/models/owner/tiny/Tiny-Q4_0.gguf"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(GGUF[::-1])
    assert start_fetch(Q4, MODELSCOPE_CACHE=str(tmp_path / "ms"), **hub.env).path().read_bytes() == GGUF
    assert theirs.read_bytes() == GGUF[::-1]


def test_a_file_with_another_hash_is_refused(hub: ModelScope, start_fetch: StartFetch, tmp_path: Path) -> None:
    hub.add(FILES)
    hub.answer_of("Tiny-Q4_0.gguf").body = GGUF[::-1]
    said = start_fetch(Q4, **hub.env).error(permanent=False)
    assert "is not what ModelScope lists" in said
    assert find_cached(Q4, tmp_path / "cache") is None
    assert not list((tmp_path / "cache/modelscope/owner").rglob("*.gguf"))


def test_a_token_is_sent(hub: ModelScope, start_fetch: StartFetch) -> None:
    hub.add(FILES)
    start_fetch(Q4, MODELSCOPE_API_TOKEN="ms-tell-nobody", **hub.env).path()
    assert hub.server.headers[hub.url_of("Tiny-Q4_0.gguf")]["Authorization"] == "Bearer ms-tell-nobody"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (404, ["There is no repository owner/tiny", "MODELSCOPE_API_TOKEN"]),
        (403, ["refuses access", "MODELSCOPE_API_TOKEN"]),
        (401, ["refuses access", "MODELSCOPE_API_TOKEN"]),
    ],
)
def test_a_refusal_of_the_hub_is_told(status: int, words: list[str], hub: ModelScope, start_fetch: StartFetch) -> None:
    hub.refuse(status)
    said = start_fetch(Q4, **hub.env).error(permanent=True)
    for word in words:
        assert word in said


def test_a_hub_in_trouble_or_down_is_worth_another_try(hub: ModelScope, start_fetch: StartFetch) -> None:
    hub.refuse(503)
    assert "503" in start_fetch(Q4, **hub.env).error(permanent=False)
    env = hub.env | {"MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}
    assert "could not be reached" in start_fetch(Q4, **env).error(permanent=False)


@pytest.mark.parametrize("name", ["a/b/c", "../x", "a", "a/..", "/etc/passwd"])
def test_a_name_that_is_no_repository_is_told(name: str, start_fetch: StartFetch) -> None:
    source = Source(model_hub="modelscope", model_id=name)
    assert "not the name of a repository" in start_fetch(source).error(permanent=True)


def test_a_hub_that_lists_tricky_paths_is_refused(hub: ModelScope, start_fetch: StartFetch, tmp_path: Path) -> None:
    hub.add({"../../Tiny-Q4_0.gguf": GGUF})
    assert "outside of its folder" in start_fetch(Q4, **hub.env).error(permanent=True)
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_repository_larger_than_the_disk_is_refused(hub: ModelScope, start_fetch: StartFetch) -> None:
    hub.add(FILES)
    listing = hub.server.answers["/api/v1/models/owner/tiny/repo/files?Revision=master&Recursive=True"]
    listing.body = listing.body.replace(str(len(GGUF)).encode(), str(2**60).encode())
    assert "disk is too small" in start_fetch(Q4, **hub.env).error(permanent=True)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_fetch_ended_in_the_middle_is_gone_on_with(
    signal_number: int, hub: ModelScope, start_fetch: StartFetch, tmp_path: Path
) -> None:
    hub.add({"Tiny-Q4_0.gguf": LARGE})
    answer = hub.answer_of("Tiny-Q4_0.gguf")
    answer.gate = threading.Event()
    first = start_fetch(Q4, **hub.env)
    wait_until(lambda: any(line.get("done_bytes", 0) > 0 for line in first.lines), "some bytes")

    began_at = time.monotonic()
    first.kill(signal_number)
    first.process.wait(10)
    assert time.monotonic() - began_at < 1
    answer.gate.set()
    assert find_cached(Q4, tmp_path / "cache") is None

    second = start_fetch(Q4, **hub.env)
    assert second.path().read_bytes() == LARGE
    assert hub.server.headers[hub.url_of("Tiny-Q4_0.gguf")]["Range"] != "bytes=0-"
    told = [line for line in second.lines if line.get("stage") == "downloading"]
    assert told[0]["done_bytes"] > 0


def test_two_fetches_at_once_share_one_download(hub: ModelScope, start_fetch: StartFetch) -> None:
    hub.add(FILES)
    answer = hub.answer_of("Tiny-Q4_0.gguf")
    answer.gate = threading.Event()
    first = start_fetch(Q4, **hub.env)
    wait_until(answer.half_sent.is_set, "half of the file")
    second = start_fetch(Q4, **hub.env)
    second.wait_for_stage("waiting")
    answer.gate.set()
    assert first.path() == second.path()
    assert hub.downloads("Tiny-Q4_0.gguf") == 1


def test_without_its_library_it_says_what_to_install(start_fetch: StartFetch) -> None:
    said = start_fetch(Q4, without="modelscope_hub").error(permanent=True)
    assert "pip install modelscope-hub" in said


def test_offline_no_hub_is_asked(hub: ModelScope, start_fetch: StartFetch) -> None:
    hub.add(FILES)
    assert "offline mode" in start_fetch(Q4, offline=True, **hub.env).error(permanent=True)
    assert "offline mode" in start_fetch(Q4, HOSTLER_OFFLINE="1", **hub.env).error(permanent=True)
    assert hub.server.asked.total() == 0
    path = start_fetch(Q4, **hub.env).path()
    assert start_fetch(Q4, offline=True, **hub.env).path() == path


def test_files_can_be_listed_without_a_download(hub: ModelScope, start_fetch: StartFetch, tmp_path: Path) -> None:
    hub.add(FILES)
    assert start_fetch(Q4, only_list=True, **hub.env).files() == {"Tiny-Q4_0.gguf": len(GGUF)}
    assert hub.downloads("Tiny-Q4_0.gguf") == 0
    assert find_cached(Q4, tmp_path / "cache") is None
