"""The hub `local`, patterns, and the fetch program's own manners."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hub_servers import ROOT, StartFetch
from hypothesis import given
from hypothesis import strategies as st

from registry.hubs import HUBS, find_cached
from registry.hubs.base import HubError, choose, choose_or_explain
from registry.schema import Source


def test_a_file_is_its_own_path(start_fetch: StartFetch, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    source = Source(model_hub="local", model_id=str(path), files=("other.gguf",))
    assert find_cached(source, tmp_path / "cache") == path
    assert start_fetch(source).path() == path
    assert not (tmp_path / "cache").exists()


def test_in_a_folder_the_first_match_is_taken(start_fetch: StartFetch, tmp_path: Path) -> None:
    for name in ("b-Q4_0.gguf", "a-Q8_0.gguf", "c/d-Q4_0.gguf"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"GGUF")
    source = Source(model_hub="local", model_id=str(tmp_path), files=("*q4_0.gguf",))
    assert find_cached(source, tmp_path / "cache") == tmp_path / "b-Q4_0.gguf"
    assert start_fetch(source).path() == tmp_path / "b-Q4_0.gguf"
    assert find_cached(Source(model_hub="local", model_id=str(tmp_path)), tmp_path) == tmp_path


def test_a_path_that_does_not_exist_is_told_with_its_neighbours(start_fetch: StartFetch, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    source = Source(model_hub="local", model_id=str(tmp_path / "modle.gguf"))
    assert find_cached(source, tmp_path) is None
    assert "Did you mean 'model.gguf'?" in start_fetch(source).error(permanent=True)


def test_a_folder_without_a_match_is_told(start_fetch: StartFetch, tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    source = Source(model_hub="local", model_id=str(tmp_path), files=("*.gguf",))
    assert find_cached(source, tmp_path) is None
    said = start_fetch(source).error(permanent=True)
    assert "'*.gguf'" in said
    assert "model.bin" in said


def test_an_unknown_hub_is_told_with_the_nearest(start_fetch: StartFetch) -> None:
    said = start_fetch(Source(model_hub="hugingface", model_id="o/r")).error(permanent=True)
    assert "Did you mean 'huggingface'?" in said


@pytest.mark.parametrize("argument", ["", "{}", '{"source": {}, "cache": "/x"}', '{"sauce": 1}'])
def test_a_bad_argument_is_told_on_stdout(argument: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "registry.hubs.fetch", argument],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert done.returncode == 1
    assert '"permanent":true' in done.stdout
    assert done.stdout.count("\n") == 1


def test_asking_what_is_cached_loads_no_hub() -> None:
    code = (
        "import sys, registry.hubs, registry.resolve\n"
        "heavy = {'huggingface_hub', 'pip', 'tqdm', 'asyncio', 'http.client'} & set(sys.modules)\n"
        "heavy |= {m for m in registry.hubs.HUBS.values() if m in sys.modules} - {'registry.hubs.local'}\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env={"PYTHONPATH": str(ROOT)}, timeout=60)


def test_every_hub_is_a_module_of_its_name() -> None:
    for hub, module in HUBS.items():
        assert module == f"registry.hubs.{hub}"
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()


def test_a_match_is_by_path_or_last_part_whatever_the_case() -> None:
    names = ["x/B.GGUF", "x/a.gguf", "mmproj-a.gguf", "readme"]
    assert choose(names, ["*.gguf"]) == ["x/B.GGUF", "x/a.gguf"]
    assert choose(names, ["A.gguf"]) == ["x/a.gguf"]
    assert choose(names, ["x/a.*", "mmproj*"]) == ["x/a.gguf", "mmproj-a.gguf"]
    assert choose(names, ["y/a.gguf"]) == []


def test_the_parts_of_one_model_are_one_model() -> None:
    parts = {f"m-Q4_0-0000{n}-of-00003.gguf": 1 for n in (1, 2, 3)}
    assert choose_or_explain(parts, ["*Q4_0*.gguf"], "here") == sorted(parts)
    with pytest.raises(HubError, match="2 models in here"):
        choose_or_explain(parts | {"m-Q4_0_4_4.gguf": 1}, ["*Q4_0*.gguf"], "here")


@given(st.lists(st.text(max_size=8)), st.lists(st.text(max_size=4), max_size=3))
def test_what_is_chosen_was_offered_and_is_chosen_once(names: list[str], patterns: list[str]) -> None:
    chosen = choose(names, patterns)
    assert set(chosen) <= set(names)
    assert len(set(chosen)) == len(chosen)
    if not patterns:
        assert not chosen


def test_files_can_be_listed(start_fetch: StartFetch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "picture.png").write_bytes(b"p")
    for source, listed in (
        (Source(model_hub="local", model_id=str(tmp_path)), {"config.json": 2}),
        (Source(model_hub="local", model_id=str(tmp_path), files=("*.gguf",)), {"a.gguf": 4}),
        (Source(model_hub="local", model_id=str(tmp_path / "a.gguf")), {"a.gguf": 4}),
    ):
        assert start_fetch(source, only_list=True).files() == listed
