"""The batcher of our workers: what shares a batch, who goes first, and what leaves the queue."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from engines.workers.batching import Batcher, Piece

Batches = list[list[str]]


def words(texts: Sequence[str]) -> list[Piece]:
    """A text of n letters has n tokens; its first letter is its group."""
    return [Piece(text, len(text), text[0]) for text in texts]


class Model:
    """Answers each text in capitals, notes the batches, and can be held up."""

    def __init__(self) -> None:
        self.batches: Batches = []
        self.may_run = threading.Event()
        self.may_run.set()
        self.runs = threading.Semaphore(0)

    def __call__(self, texts: list[str]) -> list[str]:
        self.batches.append(list(texts))
        self.runs.release()
        assert self.may_run.wait(10)
        if any("bad" in text for text in texts):
            raise ValueError(f"cannot read {texts}")
        return [text.upper() for text in texts]

    async def is_running(self) -> None:
        assert await asyncio.to_thread(self.runs.acquire, timeout=10)


@pytest.fixture
def model() -> Model:
    return Model()


async def test_results_come_in_the_order_of_the_inputs_with_the_tokens_that_were_read(model: Model) -> None:
    batcher = Batcher(model, batch_tokens=20)
    assert await batcher.map(["aaaa", "a", "aaaaaaaa", "aa"], words) == (["AAAA", "A", "AAAAAAAA", "AA"], 15)
    assert await batcher.map([], words) == ([], 0)


async def test_no_batch_has_more_tokens_with_its_padding_than_it_may(model: Model) -> None:
    texts = ["a" * (1 + n * 7 % 19) for n in range(200)]
    results, _ = await Batcher(model, batch_tokens=40).map(texts, words)
    assert results == [text.upper() for text in texts]
    assert max(len(batch) * max(map(len, batch)) for batch in model.batches) <= 40


async def test_one_input_that_is_longer_than_a_batch_goes_alone(model: Model) -> None:
    await Batcher(model, batch_tokens=10).map(["a" * 50, "a", "aa"], words)
    assert ["a" * 50] in model.batches


async def test_inputs_of_like_length_share_batches_so_that_little_is_padding(model: Model) -> None:
    batcher = Batcher(model, batch_tokens=100)
    await batcher.map(["a" * 50, "a"] * 30, words)
    assert batcher.padded_tokens < 1.2 * batcher.tokens


async def test_inputs_of_many_requests_share_a_batch(model: Model) -> None:
    model.may_run.clear()
    batcher = Batcher(model, batch_tokens=100)
    first = asyncio.create_task(batcher.map(["aaa"], words))
    await model.is_running()
    others = [asyncio.create_task(batcher.map([f"a{n}"], words)) for n in range(10)]
    while batcher.waiting_inputs < 10:
        await asyncio.sleep(0.01)
    model.may_run.set()
    assert [(await other)[0] for other in others] == [[f"A{n}"] for n in range(10)]
    await first
    assert len(model.batches) == 2


async def test_groups_do_not_share_a_batch(model: Model) -> None:
    await Batcher(model, batch_tokens=100).map(["a", "b", "aa", "bb", "a"], words)
    assert all(len({text[0] for text in batch}) == 1 for batch in model.batches)


async def test_a_small_request_does_not_wait_for_a_huge_one(model: Model) -> None:
    model.may_run.clear()
    batcher = Batcher(model, batch_tokens=20)
    huge = asyncio.create_task(batcher.map(["aaaaa"] * 2000, words))
    await model.is_running()
    small = asyncio.create_task(batcher.map(["b"], words))
    while len(batcher._works) < 2 or not batcher._works[-1].waiting:
        await asyncio.sleep(0.01)
    model.may_run.set()
    assert await small == (["B"], 1)
    assert ["b"] in model.batches[:4]
    assert not huge.done()
    assert len((await huge)[0]) == 2000


async def test_what_waits_is_bounded_and_one_request_may_not_fill_the_queue(model: Model) -> None:
    model.may_run.clear()
    prepared = 0

    def prepare(texts: Sequence[str]) -> list[Piece]:
        nonlocal prepared
        prepared += len(texts)
        return words(texts)

    batcher = Batcher(model, batch_tokens=100)
    huge = asyncio.create_task(batcher.map(["a" * 100] * 10_000, prepare))
    await model.is_running()
    small = asyncio.create_task(batcher.map(["b"], prepare))
    while not batcher._works[-1].waiting:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert prepared < 200
    model.may_run.set()
    await small
    huge.cancel()


async def test_the_inputs_of_a_client_that_leaves_do_not_run(model: Model) -> None:
    model.may_run.clear()
    batcher = Batcher(model, batch_tokens=10)
    leaving = asyncio.create_task(batcher.map(["a" * 10] * 50, words))
    await model.is_running()
    while batcher.waiting_inputs < 30:
        await asyncio.sleep(0.01)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert (batcher.waiting_inputs, batcher.waiting_tokens) == (0, 0)
    staying = asyncio.create_task(batcher.map(["b"], words))
    model.may_run.set()
    assert await staying == (["B"], 1)
    assert model.batches == [["a" * 10], ["b"]]


async def test_an_input_that_fails_spoils_no_other_requests(model: Model) -> None:
    model.may_run.clear()
    batcher = Batcher(model, batch_tokens=100)
    first = asyncio.create_task(batcher.map(["x"], words))
    await model.is_running()
    good = asyncio.create_task(batcher.map(["agood", "afine"], words))
    bad = asyncio.create_task(batcher.map(["aokay", "a bad"], words))
    while batcher.waiting_inputs < 4:
        await asyncio.sleep(0.01)
    model.may_run.set()
    assert (await good)[0] == ["AGOOD", "AFINE"]
    with pytest.raises(ValueError, match="a bad"):
        await bad
    await first
    assert len(model.batches[1]) == 4  # they were tried together first
    assert await batcher.map(["a"], words) == (["A"], 1)


async def test_an_input_that_cannot_be_prepared_is_the_requests_own_error(model: Model) -> None:
    def prepare(texts: Sequence[str]) -> list[Piece]:
        raise ValueError("no such letter")

    batcher = Batcher(model, batch_tokens=10)
    with pytest.raises(ValueError, match="no such letter"):
        await batcher.map(["a"], prepare)
    assert await batcher.map(["a"], words) == (["A"], 1)


async def test_long_inputs_are_prepared_few_at_a_time(model: Model) -> None:
    chunks = []

    def prepare(texts: Sequence[str]) -> list[Piece]:
        chunks.append(len(texts))
        return [Piece("a", 1) for _ in texts]

    await Batcher(model, batch_tokens=1000).map(["a" * 100_000] * 5, prepare, len)
    assert chunks == [2, 2, 1]
