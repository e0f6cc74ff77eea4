"""The parts of the hot path that need no server."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.exchange import EVENT_LIMIT_BYTES, Events, _engine_error

STREAMS = (b"data: 1\n\ndata: 2\n\n: note\n\n", b"data: 1\r\n\r\ndata: 2\r\n\r\n", b"event: x\ndata: a\ndata: b\n\n")


@given(stream=st.sampled_from(STREAMS), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_only_whole_events_pass_and_no_byte_is_lost(stream: bytes, cuts: list[int]) -> None:
    places = sorted({0, *(min(cut, len(stream)) for cut in cuts), len(stream)})
    events = Events()
    passed = b""
    for begin, end in itertools.pairwise(places):
        passed += events.whole(stream[begin:end])
        assert passed == b"" or passed.endswith((b"\n\n", b"\r\n\r\n"))
    assert passed + bytes(events.held) == stream
    assert events.held == b""


def test_half_an_event_is_held_back() -> None:
    events = Events()
    assert events.whole(b"data: 1\n\ndata: ha") == b"data: 1\n\n"
    assert bytes(events.held) == b"data: ha"


def test_an_event_without_an_end_is_not_kept_for_ever() -> None:
    events = Events()
    passed = b"".join(events.whole(b"x" * 65536) for _ in range(64))
    assert len(passed) + len(events.held) == 64 * 65536
    assert len(events.held) <= EVENT_LIMIT_BYTES


@pytest.mark.parametrize(
    ("said", "message", "code"),
    [
        (b'{"error": {"message": "no", "type": "t", "code": 400}}', "no", 400),
        (b'{"error": "words"}', "words", None),
        (b'{"detail": "fastapi"}', "fastapi", None),
        (b"<html>", "<html>", None),
        (b"", "The engine answered 500.", None),
        (b"[1]", "[1]", None),
        (b'{"error": {"code": {}}}', '{"error": {"code": {}}}', None),
        (b"\xff\xfe", "\ufffd\ufffd", None),
    ],
)
def test_whatever_an_engine_says_becomes_an_error(said: bytes, message: str, code: int | None) -> None:
    error = _engine_error(500, said)
    assert (error.message, error.code, error.source) == (message, code, "engine")
