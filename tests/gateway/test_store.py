"""Launches on disk: whole or not at all, whatever happens to who writes them."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from engines.base import Launch
from gateway.store import Store
from registry.resolve import Artifact
from registry.schema import LLMFamily, ModelSpec, Source


def a_launch(uid: str, **fields: object) -> Launch:
    spec = ModelSpec(model_format="ggufv2", quantization="Q4_K_M", model_id="org/a")
    family = LLMFamily(model_name="qwen", model_specs=(spec,), model_lang=("en", "中文"))
    artifact = Artifact(family=family, spec=spec, source=Source(model_hub="huggingface", model_id="org/a"))
    return Launch(uid=uid, artifact=artifact, engine="llama.cpp", **fields)  # type: ignore[arg-type]


def test_what_is_written_is_read_by_the_next_store(tmp_path: Path) -> None:
    launches = [
        a_launch("a", options={"n_ctx": 2048, "chat_template": "«{{x}}»"}, gpu_idx=(0, 1), idle_timeout_s=1.5),
        a_launch("org/b", envs={"A": "b"}, preload=True, replica=3),
        a_launch("模型"),
    ]
    for launch in launches:
        Store(tmp_path / "launches").write(launch)
    assert {launch.uid: launch for launch in Store(tmp_path / "launches").read_all()} == {
        launch.uid: launch for launch in launches
    }


def test_a_new_store_is_empty_and_makes_its_folder(tmp_path: Path) -> None:
    assert list(Store(tmp_path / "deep" / "launches").read_all()) == []
    assert (tmp_path / "deep" / "launches").is_dir()


def test_there_is_one_file_a_uid_that_a_person_can_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(a_launch("org/b"))
    store.write(a_launch("org/b", replica=2))
    assert [path.name for path in tmp_path.iterdir()] == ["org%2Fb.json"]
    assert '\n  "replica": 2' in (tmp_path / "org%2Fb.json").read_text()


def test_what_is_deleted_is_gone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(a_launch("a"))
    store.write(a_launch("b"))
    store.delete("a")
    assert [launch.uid for launch in store.read_all()] == ["b"]


def test_what_is_not_there_can_be_deleted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.delete("nothing")
    assert list(store.read_all()) == []


@pytest.mark.parametrize("damage", [b"", b'{"uid": "bad"', b"[]", b'{"uid": 3}', b"\xff\xfe\x00"], ids=repr)
def test_a_damaged_file_is_reported_left_in_place_and_hides_no_other(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    for uid in ("a", "z"):
        store.write(a_launch(uid))
    (tmp_path / "m.json").write_bytes(damage)
    with caplog.at_level(logging.ERROR, logger="hostler.store"):
        assert [launch.uid for launch in store.read_all()] == ["a", "z"]
    assert (tmp_path / "m.json").read_bytes() == damage
    assert len(caplog.messages) == 1
    assert str(tmp_path / "m.json") in caplog.messages[0]


def test_what_another_program_left_in_the_folder_is_no_launch(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "a.partial").write_text("{")
    (tmp_path / "notes.txt").write_text("hello")
    assert list(store.read_all()) == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(a_launch("a", replica=1))
    (tmp_path / "a.partial").mkdir()  # the new text has nowhere to go
    with pytest.raises(OSError, match="directory"):
        store.write(a_launch("a", replica=2))
    assert [launch.replica for launch in store.read_all()] == [1]


WRITER = """
import sys
from pathlib import Path
from gateway.store import Store
from engines.base import Launch
import msgspec

store = Store(Path(sys.argv[1]))
launch = msgspec.json.decode(sys.stdin.buffer.read(), type=Launch)
for number in range(1_000_000):
    of_this_turn = {"turn": str(number), "padding": "x" * (number * 7919 % 200_000)}
    store.write(msgspec.structs.replace(launch, uid=f"m{number % 3}", envs=of_this_turn))
    print(number, flush=True)
"""


@pytest.mark.parametrize("kill_after", [1, 7, 20])
def test_a_writer_that_is_killed_leaves_only_whole_files(kill_after: int, tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-P", "-c", WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    try:
        writer.stdin.write(msgspec.json.encode(a_launch("m0")))
        writer.stdin.close()
        for _ in range(kill_after):
            assert writer.stdout.readline()
    finally:
        writer.kill()
        finished = kill_after + len(writer.stdout.read().split())
        writer.wait(timeout=10)
        writer.stdout.close()

    there = {launch.uid: launch for launch in Store(tmp_path).read_all()}

    assert len(there) == len(list(tmp_path.glob("*.json")))  # each could be read
    for number in range(max(0, finished - 3), finished):  # and has what was last said to be written, or is newer
        assert int(there[f"m{number % 3}"].envs["turn"]) in (number, number + 3)
    for launch in there.values():
        assert len(launch.envs["padding"]) == int(launch.envs["turn"]) * 7919 % 200_000


def test_a_damaged_note_of_a_change_is_told_and_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whole launches lie beside it; which of them were to be kept, nobody knows any more."""
    folder = tmp_path / "launches"
    Store(folder).write(a_launch("m"))
    (folder / ".change").write_bytes(b"\0" * 40)
    assert [launch.uid for launch in Store(folder).read_all()] == ["m"]
    assert ".change" in caplog.text
    caplog.clear()
    Store(folder)
    assert not caplog.text
