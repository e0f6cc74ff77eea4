"""The launch history: kept over restarts, bounded, and never half written."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from harness import StartGateway

from gateway.history import ENTRIES_LIMIT, Entry, LaunchHistory


def names(history: LaunchHistory) -> list[str]:
    return [one.model_name for one in history.entries()]


def test_the_newest_come_first_and_take_the_place_of_their_like(tmp_path: Path) -> None:
    history = LaunchHistory(tmp_path / "h.json")
    for name, uid in (("a", ""), ("b", ""), ("a", "2"), ("a", "")):
        history.add(Entry(model_name=name, model_uid=uid, data={"n": 1}))
    assert [(one.model_name, one.model_uid) for one in history.entries()] == [("a", ""), ("a", "2"), ("b", "")]
    assert LaunchHistory(tmp_path / "h.json").entries() == history.entries()
    assert (tmp_path / "h.json").stat().st_mode & 0o777 == 0o600
    assert history.remove("a", "2")
    assert not history.remove("a", "2")
    assert history.remove("a")
    assert names(LaunchHistory(tmp_path / "h.json")) == ["b"]


def test_it_is_bounded(tmp_path: Path) -> None:
    history = LaunchHistory(tmp_path / "h.json")
    for number in range(ENTRIES_LIMIT + 5):
        history.add(Entry(model_name=str(number)))
    assert len(history.entries()) == ENTRIES_LIMIT
    assert names(history)[0] == str(ENTRIES_LIMIT + 4)
    with pytest.raises(ValueError, match="bytes"):
        history.add(Entry(model_name="a", data={"x": "y" * 100_000}))
    assert "a" not in names(history)


def test_a_damaged_file_begins_anew_and_one_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "h.json").write_text("[{")
    history = LaunchHistory(tmp_path / "h.json")
    assert history.entries() == []
    history.add(Entry(model_name="a"))
    assert names(LaunchHistory(tmp_path / "h.json")) == ["a"]
    (tmp_path / "h.partial").mkdir()
    with pytest.raises(IsADirectoryError):
        history.add(Entry(model_name="b"))
    assert names(history) == ["a"]


async def test_over_the_api(start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    assert (await gateway.get("/v1/launch_history")).json == []
    entry = {"model_name": "qwen3", "model_uid": "org/q", "data": {"replica": 2}}
    added = await gateway.post("/v1/launch_history", entry)
    assert (added.status, added.json) == (200, {"status": "ok"})
    await gateway.post("/v1/launch_history", {"model_name": "qwen3"})
    assert (await gateway.get("/v1/launch_history")).json[1] == entry
    for body in (
        {},
        {"model_name": ""},
        {"model_name": 5},
        {"model_name": "a", "data": []},
        [],
        {"model_name": "a", "data": {"x": "y" * 100_000}},
    ):
        assert (await gateway.post("/v1/launch_history", body)).status == 400
    await gateway.end()

    gateway = await start_gateway(home=gateway.home)
    assert msgspec.json.decode((gateway.home / "launch_history.json").read_bytes())
    assert (await gateway.request("DELETE", "/v1/launch_history/qwen3/org/q")).json == {"status": "ok"}
    assert (await gateway.request("DELETE", "/v1/launch_history/qwen3/org/q")).status == 404
    assert (await gateway.request("DELETE", "/v1/launch_history/qwen3")).json == {"status": "ok"}
    assert (await gateway.get("/v1/launch_history")).json == []
