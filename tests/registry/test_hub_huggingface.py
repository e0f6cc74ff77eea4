"""The hub `huggingface` against a real server on this machine that speaks the Hub's API."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from hub_servers import COMMIT, HuggingFace, Server, StartFetch, wait_until

from registry.hubs import find_cached
from registry.hubs.base import what_engines_need
from registry.schema import Source

OLD, NEW = "a" * 40, COMMIT
GGUF = b"GGUF" + bytes(range(256)) * 40
FILES = {"README.md": b"hi", "Tiny-Q4_0.gguf": GGUF, "Tiny-Q8_0.gguf": GGUF * 2, ".gitattributes": b"x"}
Q4 = Source(model_hub="huggingface", model_id="owner/tiny", files=("*q4_0*.gguf",))


@pytest.fixture
def hub(server: Server) -> HuggingFace:
    return HuggingFace(server)


def test_only_the_matching_files_are_fetched(hub: HuggingFace, start_fetch: StartFetch, tmp_path: Path) -> None:
    hub.add(FILES)
    cache = tmp_path / "cache"
    assert find_cached(Q4, cache) is None

    fetch = start_fetch(Q4, **hub.env)
    path = fetch.path()

    assert path.name == "Tiny-Q4_0.gguf"
    assert path.read_bytes() == GGUF
    assert path.is_relative_to(tmp_path / "hf")
    assert [hub.downloads(name) for name in FILES] == [0, 1, 0, 0]
    assert find_cached(Q4, cache) == path
    assert (
        fetch.lines[-2].items()
        >= {
            "stage": "downloading",
            "done_bytes": len(GGUF),
            "total_bytes": len(GGUF),
            "file": "Tiny-Q4_0.gguf",
        }.items()
    )


def test_what_was_fetched_is_not_asked_for_again(hub: HuggingFace, start_fetch: StartFetch, tmp_path: Path) -> None:
    hub.add(FILES)
    path = start_fetch(Q4, **hub.env).path()
    asked = hub.server.asked.total()
    assert start_fetch(Q4, **hub.env).path() == path
    assert hub.server.asked.total() == asked
    path.resolve().write_bytes(b"cut")
    assert find_cached(Q4, tmp_path / "cache") is None


def test_without_patterns_what_engines_need_is_fetched(hub: HuggingFace, start_fetch: StartFetch) -> None:
    hub.add(
        {
            "config.json": b"{}",
            "model.safetensors": b"safe",
            "pytorch_model.bin": b"pickle",
            "onnx/model.onnx": b"onnx",
            "sub/tokenizer.json": b"{}",
        }
    )
    folder = start_fetch(Source(model_hub="huggingface", model_id="owner/tiny"), **hub.env).path()
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json", "model.safetensors", "sub/tokenizer.json"}


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("config.json pytorch_model.bin", "config.json pytorch_model.bin"),
        ("a.safetensors b.bin b.pth c.ckpt", "a.safetensors"),
        ("model.safetensors 2_Dense/pytorch_model.bin", "2_Dense/pytorch_model.bin model.safetensors"),
        ("u/a.safetensors scheduler/config.json", "scheduler/config.json u/a.safetensors"),
        ("model.safetensors consolidated.safetensors params.json", "model.safetensors params.json"),
        ("consolidated.safetensors params.json", "consolidated.safetensors params.json"),
        ("model.safetensors tf_model.h5 flax_model.msgpack .gitattributes a.gguf", "model.safetensors"),
        ("original/consolidated.00.pth m.safetensors optimizer.pt", "m.safetensors"),
    ],
)  # fmt: skip
def test_safetensors_go_before_pickles_and_foreign_files_stay(names: str, chosen: str) -> None:
    assert what_engines_need(dict.fromkeys(names.split(), 1), "here") == chosen.split()


def test_a_revision_is_honoured(hub: HuggingFace, start_fetch: StartFetch) -> None:
    hub.add({"Tiny-Q4_0.gguf": b"old"}, commit=OLD, revision="v1")
    hub.add(FILES)
    for revision, content in (("v1", b"old"), (OLD, b"old"), (NEW, GGUF), (None, GGUF)):
        source = Source(model_hub="huggingface", model_id="owner/tiny", model_revision=revision, files=("*Q4_0*.gguf",))
        assert start_fetch(source, **hub.env).path().read_bytes() == content


def test_a_token_is_sent(hub: HuggingFace, start_fetch: StartFetch) -> None:
    hub.add(FILES)
    start_fetch(Q4, HF_TOKEN="hf_tell_nobody", **hub.env).path()
    assert hub.server.headers["/api/models/owner/tiny"]["authorization"] == "Bearer hf_tell_nobody"


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", ["There is no repository owner/tiny", "HF_TOKEN"]),
        (403, "GatedRepo", ["is gated", "/owner/tiny", "HF_TOKEN"]),
        (404, "RevisionNotFound", ["no revision 'main'"]),
        (403, "", ["refuses access", "HTTP 403"]),
    ],
)
def test_a_refusal_of_the_hub_is_told(
    status: int, code: str, words: list[str], hub: HuggingFace, start_fetch: StartFetch
) -> None:
    hub.refuse("owner/tiny", status, code)
    said = start_fetch(Q4, **hub.env).error(permanent=True)
    for word in words:
        assert word in said


def test_a_hub_in_trouble_is_worth_another_try(hub: HuggingFace, start_fetch: StartFetch) -> None:
    hub.refuse("owner/tiny", 503, "")
    assert "HTTP 503" in start_fetch(Q4, **hub.env).error(permanent=False)


def test_a_hub_that_is_down_is_worth_another_try(start_fetch: StartFetch) -> None:
    said = start_fetch(Q4, HF_ENDPOINT="http://127.0.0.1:9").error(permanent=False)
    assert "http://127.0.0.1:9 could not be reached" in said


def test_what_a_repository_holds_is_told_when_nothing_matches(hub: HuggingFace, start_fetch: StartFetch) -> None:
    hub.add(FILES)
    source = Source(model_hub="huggingface", model_id="owner/tiny", files=("*Q5_0*.gguf",))
    said = start_fetch(source, **hub.env).error(permanent=True)
    assert "'*Q5_0*.gguf'" in said
    assert "It has: Tiny-Q8_0.gguf, Tiny-Q4_0.gguf" in said


def test_a_pattern_that_names_several_models_is_refused(hub: HuggingFace, start_fetch: StartFetch) -> None:
    hub.add(FILES)
    source = Source(model_hub="huggingface", model_id="owner/tiny", files=("*.gguf",))
    assert "2 models" in start_fetch(source, **hub.env).error(permanent=True)
    assert hub.downloads("Tiny-Q4_0.gguf") == 0


def test_a_name_that_is_no_repository_is_told(start_fetch: StartFetch) -> None:
    source = Source(model_hub="huggingface", model_id="a/b/c")
    assert "not the name of a repository" in start_fetch(source).error(permanent=True)


def test_a_repository_larger_than_the_disk_is_refused(hub: HuggingFace, start_fetch: StartFetch) -> None:
    hub.add(FILES)
    listing = hub.server.answers["/api/models/owner/tiny"]
    listing.body = listing.body.replace(str(len(GGUF)).encode(), str(2**60).encode())
    assert "disk is too small" in start_fetch(Q4, **hub.env).error(permanent=True)


def test_offline_what_the_library_has_is_used(hub: HuggingFace, start_fetch: StartFetch, tmp_path: Path) -> None:
    hub.add(FILES)
    said = start_fetch(Q4, HF_HUB_OFFLINE="1", **hub.env).error(permanent=True)
    assert "HF_HUB_OFFLINE" in said

    path = start_fetch(Q4, **hub.env).path()
    for marker in (tmp_path / "cache/fetched").iterdir():
        marker.unlink()
    assert find_cached(Q4, tmp_path / "cache") is None
    assert start_fetch(Q4, HF_HUB_OFFLINE="1", **hub.env).path() == path

    other = Source(model_hub="huggingface", model_id="owner/tiny", files=("*Q8_0*.gguf",))
    assert "HF_HUB_OFFLINE" in start_fetch(other, HF_HUB_OFFLINE="1", **hub.env).error(permanent=True)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_fetch_ended_in_the_middle_leaves_nothing_that_counts(
    signal_number: int, hub: HuggingFace, start_fetch: StartFetch, tmp_path: Path
) -> None:
    hub.add(FILES)
    answer = hub.answer_of("Tiny-Q4_0.gguf")
    answer.gate = threading.Event()
    first = start_fetch(Q4, **hub.env)
    wait_until(answer.half_sent.is_set, "half of the file")
    blobs = tmp_path / "hf/hub/models--owner--tiny/blobs"
    wait_until(lambda: bool(list(blobs.glob("*.incomplete"))), "a partial file")

    began_at = time.monotonic()
    first.kill(signal_number)
    first.process.wait(10)
    assert time.monotonic() - began_at < 2
    answer.gate.set()
    assert find_cached(Q4, tmp_path / "cache") is None
    for partial in blobs.glob("*.incomplete"):
        assert signal_number == signal.SIGKILL
        long_ago = time.time() - 3600
        os.utime(partial, (long_ago, long_ago))

    assert start_fetch(Q4, **hub.env).path().read_bytes() == GGUF
    assert list(blobs.glob("*.incomplete")) == []


def test_two_fetches_at_once_share_one_download(hub: HuggingFace, start_fetch: StartFetch) -> None:
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


def test_after_a_kill_the_files_that_were_whole_are_not_fetched_again(
    hub: HuggingFace, start_fetch: StartFetch
) -> None:
    hub.add({"config.json": b"{}", "model.safetensors": GGUF})
    answer = hub.answer_of("model.safetensors")
    answer.gate = threading.Event()
    source = Source(model_hub="huggingface", model_id="owner/tiny")
    first = start_fetch(source, **hub.env)
    wait_until(lambda: answer.half_sent.is_set() and hub.downloads("config.json") == 1, "one file and a half")
    time.sleep(0.3)
    first.kill(signal.SIGKILL)
    first.process.wait(10)
    answer.gate.set()

    folder = start_fetch(source, **hub.env).path()
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert hub.downloads("config.json") == 1


def test_offline_may_be_asked_for_in_the_order(hub: HuggingFace, start_fetch: StartFetch, tmp_path: Path) -> None:
    hub.add(FILES)
    assert "offline mode forbids" in start_fetch(Q4, offline=True, **hub.env).error(permanent=True)
    assert hub.server.asked.total() == 0
    path = start_fetch(Q4, **hub.env).path()
    for marker in (tmp_path / "cache/fetched").iterdir():
        marker.unlink()
    assert start_fetch(Q4, offline=True, **hub.env).path() == path


def test_files_can_be_listed_without_a_download(hub: HuggingFace, start_fetch: StartFetch, tmp_path: Path) -> None:
    hub.add(FILES)
    listed = start_fetch(Q4, only_list=True, **hub.env).files()
    assert listed == {name: len(FILES[name]) for name in listed}
    assert len(listed) == 1
    assert all(hub.downloads(name) == 0 for name in FILES)
    assert find_cached(Q4, tmp_path / "cache") is None
    hub.refuse("owner/tiny", 404, "RepoNotFound")
    assert "no repository owner/tiny" in start_fetch(Q4, only_list=True, **hub.env).error(permanent=True)
