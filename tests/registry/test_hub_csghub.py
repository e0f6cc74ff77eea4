"""The hub `csghub` against a real server on this machine that speaks its API."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from pathlib import Path

import pytest
from hub_servers import Answer, Server, StartFetch, wait_until

from registry.hubs import find_cached
from registry.schema import Source

pytest.importorskip("pycsghub")

COMMIT = "c" * 40
GGUF = b"GGUF" + bytes(range(256)) * 40
FILES = {"config.json": b"{}", "model.safetensors": GGUF, "pytorch_model.bin": b"pickle"}
ALL = Source(model_hub="csghub", model_id="owner/tiny")
WEIGHTS = Source(model_hub="csghub", model_id="owner/tiny", files=("model.safetensors",))


class Repository:
    """A repository on `server`, as csghub-sdk asks for it."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def add(self, files: dict[str, bytes], *, has_sizes: bool = True) -> None:
        siblings = []
        for path, content in files.items():
            told: dict[str, object] = {"rfilename": path}
            if has_sizes:
                lfs = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 1}
                told |= {"size": len(content), "blobId": "b", "lfs": lfs}
            siblings.append(told)
            self.server.answers[f"/csg/owner/tiny/resolve/{COMMIT}/{path}"] = Answer(content)
        info = json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        for revision in ("main", COMMIT):
            self.server.answers[f"/csg/api/models/owner/tiny/revision/{revision}"] = Answer(info)

    def answer_of(self, path: str) -> Answer:
        return self.server.answers[f"/csg/owner/tiny/resolve/{COMMIT}/{path}"]

    def downloads(self, path: str) -> int:
        return self.server.asked[f"GET /csg/owner/tiny/resolve/{COMMIT}/{path}"]

    @property
    def env(self) -> dict[str, str]:
        return {"XINFERENCE_CSG_ENDPOINT": f"{self.server.url}/", "XINFERENCE_CSG_TOKEN": "csg-tell-nobody"}


@pytest.fixture
def hub(server: Server) -> Repository:
    return Repository(server)


def test_what_engines_need_is_fetched_with_the_token(hub: Repository, start_fetch: StartFetch, tmp_path: Path) -> None:
    hub.add(FILES)
    folder = start_fetch(ALL, **hub.env).path()
    assert folder == tmp_path / "cache/csghub/owner/tiny" / COMMIT
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json": b"{}", "model.safetensors": GGUF}
    sent = hub.server.headers[f"/csg/owner/tiny/resolve/{COMMIT}/config.json"]
    assert sent["authorization"] == "Bearer csg-tell-nobody"
    assert not list((tmp_path / "cache/csghub").glob(".partial-*"))
    assert find_cached(ALL, tmp_path / "cache") == folder


def test_a_hub_that_tells_no_sizes_serves_too(hub: Repository, start_fetch: StartFetch) -> None:
    hub.add(FILES, has_sizes=False)
    fetch = start_fetch(WEIGHTS, **hub.env)
    assert fetch.path().read_bytes() == GGUF
    assert {line["total_bytes"] for line in fetch.lines if line.get("stage") == "downloading"} <= {None}


def test_a_file_with_another_hash_is_refused(hub: Repository, start_fetch: StartFetch, tmp_path: Path) -> None:
    hub.add(FILES)
    hub.answer_of("model.safetensors").body = GGUF[::-1]
    assert "does not have the hash" in start_fetch(WEIGHTS, **hub.env).error(permanent=False)
    assert not list((tmp_path / "cache/csghub/owner").rglob("*.safetensors"))
    hub.answer_of("model.safetensors").body = GGUF
    assert start_fetch(WEIGHTS, **hub.env).path().read_bytes() == GGUF


@pytest.mark.parametrize(
    ("status", "permanent", "words"),
    [
        (404, True, "There is no repository owner/tiny"),
        (401, True, "XINFERENCE_CSG_TOKEN"),
        (502, False, "HTTP 502"),
    ],
)
def test_a_refusal_of_the_hub_is_told(
    status: int, permanent: bool, words: str, hub: Repository, start_fetch: StartFetch
) -> None:
    hub.server.answers["/csg/api/models/owner/tiny/revision/main"] = Answer(b"{}", status=status)
    assert words in start_fetch(ALL, **hub.env).error(permanent=permanent)


def test_a_hub_that_is_down_is_worth_another_try(start_fetch: StartFetch) -> None:
    said = start_fetch(ALL, XINFERENCE_CSG_ENDPOINT="http://127.0.0.1:9").error(permanent=False)
    assert "http://127.0.0.1:9 could not be reached" in said


def test_a_killed_fetch_leaves_nothing_that_counts_and_whole_files_are_kept(
    hub: Repository, start_fetch: StartFetch, tmp_path: Path
) -> None:
    hub.add(FILES)
    answer = hub.answer_of("model.safetensors")
    answer.gate = threading.Event()
    first = start_fetch(ALL, **hub.env)
    wait_until(answer.half_sent.is_set, "half of the weights")
    partials = tmp_path / "cache/csghub"
    wait_until(lambda: bool(list(partials.glob(".partial-*/*/work/owner/tiny/.msc"))), "the other file")
    first.kill(signal.SIGKILL)
    first.process.wait(10)
    answer.gate.set()
    assert find_cached(ALL, tmp_path / "cache") is None
    assert not (partials / "owner").exists()

    folder = start_fetch(ALL, **hub.env).path()
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert hub.downloads("config.json") == 1
    assert not list(partials.glob(".partial-*"))


def test_without_its_library_it_says_what_to_install(start_fetch: StartFetch) -> None:
    assert "pip install csghub-sdk" in start_fetch(ALL, without="pycsghub").error(permanent=True)


@pytest.mark.parametrize("has_sizes", [True, False])
def test_files_can_be_listed_without_a_download(hub: Repository, start_fetch: StartFetch, has_sizes: bool) -> None:
    hub.add(FILES, has_sizes=has_sizes)
    size = len(GGUF) if has_sizes else 0
    assert start_fetch(WEIGHTS, only_list=True, **hub.env).files() == {"model.safetensors": size}
    assert hub.downloads("model.safetensors") == 0
