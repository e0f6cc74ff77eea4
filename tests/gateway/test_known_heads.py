"""Heads that a connection has seen before: what needs no parser then, and all that still does."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from types import FrameType, SimpleNamespace

import msgspec
import pytest
from both_ends import BODY, HEAD, REPLY, STREAM, TOLD, WHOLE, ends

from gateway import metrics, passed_on
from gateway.connections import JOINED_BYTES
from gateway.door.protocol import HELD_LIMIT_BYTES, KnownRequest
from gateway.known_head import KEPT_LIMIT_BYTES, STRANGE_LIMIT, KnownHead, around_length

__all__ = ["ends"]

LONG = b'{"model":"mock","prompt":"%b"}' % (b"y" * 1000)
LONG_HEAD = HEAD.replace(b"%d\r\n" % len(BODY), b"%d\r\n" % len(LONG))


class NoParser:
    """Stands where nothing is to be parsed."""

    def feed_data(self, data: bytes) -> None:
        raise AssertionError(data)


def ask(ends: SimpleNamespace, request: bytes = HEAD + BODY, reply: bytes = REPLY) -> bytes:
    """What the client gets."""
    ends.client.data_received(request)
    ends.engine.data_received(reply)
    return ends.to_client.taken()


@pytest.fixture
def known(ends: SimpleNamespace) -> SimpleNamespace:
    """Ends that have seen two requests and replies; what comes from now on must not need a parser."""
    for _ in range(2):
        ask(ends)
    ends.to_engine.taken()
    ends.parsers = ends.client.parser, ends.engine._parser
    ends.client.parser = ends.engine._parser = NoParser()
    return ends


def parse(ends: SimpleNamespace) -> None:
    """From now on it may."""
    ends.client.parser, ends.engine._parser = ends.parsers


async def test_the_same_head_with_another_length_needs_no_parser(known: SimpleNamespace) -> None:
    served = known.replica.served
    for request, body, reply in ((LONG_HEAD, LONG, REPLY), (HEAD, BODY, REPLY), (LONG_HEAD, LONG, REPLY)):
        told = ask(known, request + body, reply)
        assert told.startswith(b"HTTP/1.1 200 OK\r\n")
        assert told.endswith(b"\r\n\r\n{}")
        sent = known.to_engine.taken()
        assert b"\r\ncontent-length: %d\r\n\r\n" % len(body) in sent
        assert sent.endswith(body)
    assert known.replica.served == served + 3
    assert known.replica.in_flight == 0
    assert known.connections.idle == [known.engine]


async def test_a_known_head_is_answered_as_one_that_is_parsed(ends: SimpleNamespace) -> None:
    def without_id(told: bytes) -> list[bytes]:
        return [line for line in told.split(b"\r\n") if not line.startswith(b"x-request-id")]

    answers = [without_id(ask(ends, reply=WHOLE)) for _ in range(5)]
    assert ends.engine.known.told
    assert all(answer == answers[0] for answer in answers)
    asked = [line for line in ends.to_engine.taken().split(b"POST ") if line]
    assert len({msgspec.json.encode(sorted(map(bytes.decode, without_id(one)))) for one in asked}) == 1


async def test_the_plain_way_gets_the_length_of_the_request_that_it_is_given(known: SimpleNamespace) -> None:
    known.replica.state = None  # it is ready no longer
    known.client.data_received(LONG_HEAD + LONG)
    assert dict(known.client.cycle.scope["headers"])[b"content-length"] == b"%d" % len(LONG)
    assert bytes(known.client.cycle.body) == LONG
    await asyncio.gather(*known.client.tasks, return_exceptions=True)


@pytest.mark.parametrize("ends_after", [False, True])
async def test_a_reply_with_a_known_head_tells_its_own_length(ends: SimpleNamespace, ends_after: bool) -> None:
    """Also where somebody else has seen the head, and where the client is to leave."""
    for _ in range(2):  # the second is learned, and nothing of it is told yet
        ask(ends)
    ends.client.data_received(HEAD + BODY)
    if ends_after:
        ends.client.shutdown()
    ends.engine.data_received(WHOLE)
    assert ends.to_client.taken().lower().count(b"content-length: %d\r\n" % len(TOLD)) == 1


@pytest.mark.parametrize(
    "line", [b"x-content-length: 7", b"x-note: content-length: 7", b"x-content-length: 102", b"content-length-x: 102"]
)
async def test_a_header_that_only_looks_like_the_length_is_left_as_it_is(ends: SimpleNamespace, line: bytes) -> None:
    def marked(reply: bytes) -> bytes:
        return reply.replace(b"content-type", line + b"\r\ncontent-type")

    for reply, size in ((WHOLE, len(TOLD)), (REPLY, 2)) * 4:
        told = ask(ends, reply=marked(reply))
        assert [one for one in told.split(b"\r\n") if b"content-length" in one] == [line, b"content-length: %d" % size]


async def test_uvicorns_own_clock_ends_no_connection_on_which_a_known_head_has_come(known: SimpleNamespace) -> None:
    known.client.data_received(HEAD + BODY)
    known.client.flow.pause_reading()
    known.engine.data_received(REPLY)
    assert known.client.timeout_keep_alive_task is not None
    known.client.data_received(LONG_HEAD)
    assert known.client.timeout_keep_alive_task is None


async def test_an_easy_request_takes_few_calls_and_an_event_of_a_stream_fewer(known: SimpleNamespace) -> None:
    """What a request costs beside the system's own work, told by what no other load of the machine disturbs."""
    ask(known, HEAD + BODY, WHOLE)  # the second with this head
    calls = calls_of(lambda: ask(known, HEAD + BODY, WHOLE))
    assert len(calls) <= 66, calls
    assert "passed_on" not in calls  # of its headers, which are passed on as before
    parse(known)
    head, event = STREAM[: STREAM.index(b"28")], STREAM[STREAM.index(b"28") : STREAM.index(b"3e")]
    known.client.data_received(HEAD + BODY)
    known.engine.data_received(head + event)
    calls = calls_of(lambda: known.engine.data_received(event))
    assert len(calls) <= 8, calls


def calls_of(work: Callable[[], object]) -> list[str]:
    """The functions of ours, and of what is written in Python, that are called for it."""
    names = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename != __file__:
            names.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return names


async def test_tokens_of_a_known_reply_are_counted(ends: SimpleNamespace) -> None:
    tally = metrics.tally_of("mock")
    before = tally.completion_tokens, tally.durations.total_s
    for _ in range(3):
        ask(ends, reply=WHOLE)
    assert tally.completion_tokens == before[0] + 6
    assert tally.durations.total_s > before[1]


async def test_a_body_that_comes_behind_a_known_head_needs_no_parser_either(known: SimpleNamespace) -> None:
    known.client.data_received(LONG_HEAD)
    assert not known.to_engine.taken()
    assert not passed_on.is_between_requests(known.client)
    known.client.data_received(LONG)
    assert known.to_engine.taken().endswith(LONG)
    known.engine.data_received(REPLY)
    assert known.to_client.taken().endswith(b"{}")
    assert passed_on.is_between_requests(known.client)


async def test_a_body_in_pieces_behind_a_known_head_is_parsed(known: SimpleNamespace) -> None:
    known.client.data_received(LONG_HEAD + LONG[:10])
    parse(known)
    known.client.data_received(LONG[10:20])
    assert not known.client._held
    known.client.data_received(LONG[20:])
    assert known.to_engine.taken().endswith(LONG)


async def test_a_large_body_behind_a_known_head_is_not_held(known: SimpleNamespace) -> None:
    parse(known)
    size = HELD_LIMIT_BYTES + 1
    known.client.data_received(HEAD.replace(b"%d\r\n" % len(BODY), b"%d\r\n" % size))
    assert not known.client._held
    known.client.data_received(b"{" * size)
    await asyncio.gather(*known.client.tasks, return_exceptions=True)


async def test_a_known_head_is_refused_where_there_are_too_many_clients(known: SimpleNamespace) -> None:
    parse(known)
    known.client._door.crowd.most = 0
    known.client.data_received(HEAD + BODY)
    assert not known.to_engine.taken()
    assert known.client.tasks
    await asyncio.gather(*known.client.tasks, return_exceptions=True)


async def test_who_waits_for_the_word_to_send_a_body_gets_it_each_time(ends: SimpleNamespace) -> None:
    head = HEAD.replace(b"host: ", b"expect: 100-continue\r\nhost: ")
    for _ in range(4):
        ends.client.data_received(head)
        assert ends.to_client.taken() == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert ask(ends, BODY).endswith(b"{}")


async def test_a_large_reply_with_a_known_head_is_told_whole(known: SimpleNamespace) -> None:
    ask(known)
    text = b"[%b]" % (b"1" * JOINED_BYTES)
    assert ask(known, reply=REPLY.replace(b"2\r\n\r\n{}", b"%d\r\n\r\n%b" % (len(text), text))).endswith(text)


async def test_a_reply_that_differs_for_clients_does_so_behind_a_known_head(ends: SimpleNamespace) -> None:
    other = HEAD.replace(b"completions", b"embeddings").replace(b"%d\r\n" % len(BODY), b"31\r\n")
    for _ in range(3):
        assert ask(ends, reply=WHOLE).endswith(TOLD)
        assert b'replica":"mock-0"' in ask(ends, other + b'{"model":"mock","input":"text"}', WHOLE)


def test_what_is_passed_on_of_a_known_head_is_by_the_engine_that_gets_it() -> None:
    headers = [(b"x-one", b"1"), (b"content-length", b"2"), (b"x-two", b"2")]
    known = KnownRequest(b"", b"", b"", headers, SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    for own, left in (((), (1, 2)), ((b"x-one",), (2,)), ((b"x-two",), (1,)), ((), (1, 2))):
        lines = known.passed_on(frozenset(own))
        assert [line[-1:] for line in lines.split(b"\r\n")[:-1]] == [b"%d" % number for number in left]


async def test_a_known_head_shows_that_heads_are_alike_after_all(ends: SimpleNamespace) -> None:
    for number in range(3 * STRANGE_LIMIT):
        ask(ends)
        ask(ends)
        ask(ends, HEAD.replace(b"host: ", b"x-number: %d\r\nhost: " % number) + BODY)
        assert ends.client._known


async def test_a_known_head_whose_body_does_not_come_ends_as_any_other(known: SimpleNamespace) -> None:
    known.client.data_received(LONG_HEAD)
    parse(known)
    now = time.monotonic()
    for after_s in (1, 50):
        known.client.end_if_quiet(now + after_s)
    assert known.to_client.end is None
    known.client.end_if_quiet(now + 62)
    assert known.to_client.end == "closed"


async def test_a_shutdown_lets_a_request_be_answered_of_which_the_known_head_has_come(known: SimpleNamespace) -> None:
    known.client.data_received(LONG_HEAD)
    parse(known)
    known.client.shutdown()
    assert known.to_client.end is None
    assert not known.client.cycle.keep_alive
    known.client.data_received(LONG)
    assert bytes(known.client.cycle.body) == LONG
    await asyncio.gather(*known.client.tasks, return_exceptions=True)


async def test_who_leaves_behind_a_known_head_has_asked_nothing(known: SimpleNamespace) -> None:
    known.client.data_received(LONG_HEAD)
    known.client.connection_lost(None)
    assert not known.to_engine.taken()
    assert known.replica.in_flight == 0


async def test_two_requests_at_once_are_parsed(ends: SimpleNamespace) -> None:
    ask(ends)
    ask(ends)
    ask(ends)
    ends.to_engine.taken()
    ends.client.data_received(HEAD + BODY + HEAD + BODY)
    assert ends.to_engine.taken().count(b"POST") == 1
    assert len(ends.client.pipeline) == 1
    ends.engine.data_received(REPLY)
    await asyncio.gather(*ends.client.tasks, return_exceptions=True)


async def test_a_request_behind_one_that_is_being_answered_is_parsed(ends: SimpleNamespace) -> None:
    ask(ends)
    ask(ends)
    ask(ends)
    ends.client.data_received(HEAD + BODY)
    ends.client.data_received(HEAD + BODY)
    assert len(ends.client.pipeline) == 1
    ends.engine.data_received(REPLY)
    await asyncio.gather(*ends.client.tasks, return_exceptions=True)


@pytest.mark.parametrize(
    "head",
    [
        HEAD.replace(b"localhost", b"127.0.0.1"),
        HEAD.replace(b"localhost", b"localhost\r\nx-request-id: mine"),
        HEAD.replace(b"content-length: ", b"content-length:  "),
        HEAD.replace(b"content-length: ", b"Content-length: "),
    ],
)
async def test_a_head_that_differs_is_parsed_and_answered(ends: SimpleNamespace, head: bytes) -> None:
    for one in (HEAD, HEAD, HEAD, head, HEAD, head, head, head):
        assert ask(ends, one + BODY).endswith(b"{}")
        assert (b"x-request-id: mine" in head and one is head) == (b"x-request-id: mine" in ends.to_engine.taken())


async def test_a_key_that_is_no_longer_good_is_refused_behind_a_known_head(ends: SimpleNamespace) -> None:
    ask(ends)
    ask(ends)
    ask(ends)
    ends.to_engine.taken()
    fleet = ends.client._door.fleet
    fleet.settings = msgspec.structs.replace(fleet.settings, api_keys=("other",))
    ends.client.data_received(HEAD + BODY)
    assert not ends.to_engine.taken()
    assert ends.client.tasks  # it is the plain way's, which refuses it
    await asyncio.gather(*ends.client.tasks, return_exceptions=True)


@pytest.mark.parametrize("parts", [(LONG_HEAD + LONG,), (LONG_HEAD, LONG)])
async def test_a_body_over_the_limit_is_refused_behind_a_known_head(
    ends: SimpleNamespace, parts: tuple[bytes, ...]
) -> None:
    fleet = ends.client._door.fleet
    fleet.settings = msgspec.structs.replace(fleet.settings, max_body_bytes=100)
    ask(ends)
    ask(ends)
    assert ask(ends).endswith(b"{}")
    ends.to_engine.taken()
    for part in parts:
        ends.client.data_received(part)
    assert not ends.to_engine.taken()
    assert ends.client.tasks
    await asyncio.gather(*ends.client.tasks, return_exceptions=True)


async def test_who_is_told_to_close_is_told_so_behind_a_known_head(known: SimpleNamespace) -> None:
    known.client.data_received(HEAD + BODY)
    known.client.shutdown()
    known.engine.data_received(REPLY)
    assert b"connection: close\r\n" in known.to_client.taken()
    assert known.to_client.end == "closed"


@pytest.mark.parametrize(
    "reply",
    [
        STREAM,
        REPLY.replace(b"200 OK", b"201 Created"),
        REPLY.replace(b"200 OK", b"400 Bad Request"),
        REPLY.replace(b"application/json", b"text/plain"),
        b"HTTP/1.1 100 Continue\r\n\r\n" + REPLY,
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + REPLY,
    ],
)
async def test_a_reply_that_differs_is_parsed(ends: SimpleNamespace, reply: bytes) -> None:
    ask(ends)
    ask(ends)
    first = ask(ends)
    other = ask(ends, reply=reply)
    assert other.split(b"\r\n")[0].split()[1] in (reply.split()[1], b"200")
    assert ask(ends).split(b"x-request-id")[0] == first.split(b"x-request-id")[0]
    assert ends.connections.idle == [ends.engine]
    assert ends.replica.in_flight == 0


async def test_a_known_reply_in_two_pieces_is_parsed(ends: SimpleNamespace) -> None:
    ask(ends)
    ask(ends)
    ask(ends)
    for cut in (10, len(REPLY) - 2, len(REPLY) - 1):
        ends.client.data_received(HEAD + BODY)
        ends.engine.data_received(REPLY[:cut])
        ends.engine.data_received(REPLY[cut:])
        assert ends.to_client.taken().endswith(b"\r\n\r\n{}")
    assert ends.connections.idle == [ends.engine]


async def test_a_known_reply_has_its_own_status(ends: SimpleNamespace) -> None:
    ask(ends)
    ask(ends)
    ends.client.data_received(HEAD + BODY)
    for part in (b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n", b"{}"):  # which leaves the known one be
        ends.engine.data_received(part)
    assert ends.to_client.taken().startswith(b"HTTP/1.1 400 ")
    assert ask(ends).startswith(b"HTTP/1.1 200 ")


async def test_an_engine_that_says_more_than_it_was_asked_is_not_asked_again(ends: SimpleNamespace) -> None:
    ask(ends)
    ask(ends)
    ask(ends)
    assert ask(ends, reply=REPLY + REPLY).endswith(b"\r\n\r\n{}")
    assert not ends.connections.idle


async def test_a_reply_that_lasts_until_its_end_is_not_learned(ends: SimpleNamespace) -> None:
    ask(ends)
    ask(ends, reply=REPLY.replace(b"content-type", b"connection: close\r\ncontent-type"))
    assert ends.to_engine.end == "closed"
    assert ends.engine.known is None


async def test_where_no_two_heads_are_alike_none_is_learned_any_more(ends: SimpleNamespace) -> None:
    def numbered(message: bytes, number: int) -> bytes:
        return message.replace(b"content-length", b"x-number: %d\r\ncontent-length" % number)

    ask(ends)
    assert ends.client._known is ends.engine.known is None  # one alone may be the last
    for number in range(STRANGE_LIMIT):
        ask(ends, numbered(HEAD, number) + BODY, numbered(REPLY, number))
        assert ends.client._known
        assert ends.engine.known
    for number in range(STRANGE_LIMIT, STRANGE_LIMIT + 3):
        assert ask(ends, numbered(HEAD, number) + BODY, numbered(REPLY, number)).endswith(b"{}")
        assert ends.client._known is ends.engine.known is None


async def test_a_large_head_is_not_kept(ends: SimpleNamespace) -> None:
    def marked(message: bytes, size: int) -> bytes:
        return message.replace(b"content-length", b"x-large: %b\r\ncontent-length" % (b"y" * size), 1)

    for size, is_kept in ((KEPT_LIMIT_BYTES, False), (KEPT_LIMIT_BYTES // 2, True)):
        ends.client._strange = ends.engine._strange = 0
        for _ in range(3):
            assert ask(ends, marked(HEAD, size) + BODY, marked(REPLY, size)).endswith(b"{}")
        assert (ends.client._known is not None) == (ends.engine.known is not None) == is_kept


def test_a_head_is_known_by_all_of_its_bytes_but_its_length() -> None:
    head = around_length(HEAD + BODY, [(b"content-length", b"%d" % len(BODY))])
    assert head is not None
    known = KnownHead(*head, [(b"content-length", b"0"), (b"host", b"localhost")])
    assert known.rest(HEAD + BODY) == 0
    assert (HEAD + BODY)[known.body_at :] == BODY
    assert known.headers() == [(b"content-length", b"%d" % len(BODY)), (b"host", b"localhost")]
    assert known.rest(HEAD) == len(BODY)
    assert known.rest(LONG_HEAD + LONG[:-3]) == 3
    assert known.rest(HEAD + BODY + b"P") == -1
    for other in (
        b"",
        HEAD[:-1],
        HEAD[:40],
        HEAD.replace(b"POST", b"post"),
        HEAD.replace(b"\r\n\r\n", b"\r\nx: y\r\n\r\n"),
        HEAD.replace(b"%d\r\n" % len(BODY), b"\r\n"),
        HEAD.replace(b"%d\r\n" % len(BODY), b"-1\r\n"),
        HEAD.replace(b"%d\r\n" % len(BODY), b"0x1\r\n"),
        HEAD.replace(b"%d\r\n" % len(BODY), b"1" * 20 + b"\r\n"),
    ):
        assert known.rest(other) < 0
    length = [(b"content-length", b"5")]
    assert around_length(b"POST / HTTP/1.1\r\nhost: x\r\n\r\n\r\ncontent-length: 5\r\n\r\n", length) is None
    assert around_length(b"POST / HTTP/1.1\r\ncontent-length: 5\r\n", length) is None
    assert around_length(HEAD, length) is None


@pytest.mark.parametrize("length", [0, 2, 3])
async def test_the_head_of_an_interim_reply_is_not_taken_for_that_of_the_reply(
    ends: SimpleNamespace, length: int
) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\ncontent-length: %d\r\n\r\n" % length
    for _ in range(4):
        assert ask(ends, reply=interim + REPLY).endswith(b"\r\n\r\n{}")
        ends.client.data_received(HEAD + BODY)
        ends.engine.data_received(interim)
        assert not ends.to_client.taken()
        ends.engine.data_received(REPLY)
        assert ends.to_client.taken().endswith(b"\r\n\r\n{}")
    assert ends.engine.known is None or not ends.engine.known.rest(REPLY)
