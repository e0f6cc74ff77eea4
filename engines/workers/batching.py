"""Dynamic batching: the inputs of all requests go through one model, together where that is quick.

A request is split into single inputs. A thread prepares them (tokenises), a few at a time; another runs the model on
batches of inputs of like length. What a batch may hold is told in tokens with their padding, so that neither many
short inputs nor a few long ones need more memory than the model was given. Knows nothing of models: what is
prepared, and what becomes of it, are functions of its user.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

QUEUE_BATCHES = 16  # worth of prepared inputs may wait, a quarter of them of one request
POOL_BATCHES = 4  # worth of waiting inputs are looked at to find some of like length
CHUNK_INPUTS = 64  # are prepared at once,
CHUNK_CHARACTERS = 2**18  # or fewer if they are long

T = TypeVar("T")
R = TypeVar("R")


class Piece(NamedTuple):
    """One prepared input: what the model takes, its length in tokens, and what it can share a batch with."""

    content: Any
    length: int
    group: Hashable = None


class _Work:
    """A request's inputs: those that wait, and the results of those that are done."""

    def __init__(self, size: int) -> None:
        self.waiting: deque[tuple[int, Piece]] = deque()
        self.results: list[Any] = [None] * size
        self.left = size
        self.tokens = 0  # of those that wait
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, exc: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(exc)

    def finish(self, index: int, result: Any) -> None:
        self.results[index] = result
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(None)


class _Job(NamedTuple):
    """A piece that waits or runs, whose it is, and its place among that one's."""

    work: _Work
    place: int
    piece: Piece


class Batcher(Generic[R]):
    """Runs a model on batches made of the inputs of all requests; one batch at a time.

    Requests take turns: the batch that comes next holds the oldest input of the request whose turn it is, and inputs
    of about its length of whoever has some. So a small request waits for no more than the batch that runs and one
    for each other request, however large those are.

    Args:
        run: the model: the contents of pieces of one group -> a result for each; called in a thread of its own.
        batch_tokens: the longest length times the number of inputs in a batch; one longer input goes alone.
        batch_inputs: the most inputs of a batch.
    """

    def __init__(self, run: Callable[[list[Any]], Sequence[R]], *, batch_tokens: int, batch_inputs: int = 256) -> None:
        self._run = run
        self._batch_tokens, self._batch_inputs = batch_tokens, batch_inputs
        self._queue_tokens = QUEUE_BATCHES * batch_tokens
        self._works: deque[_Work] = deque()
        self._waiters: list[asyncio.Future[None]] = []  # for room, or for something to do
        self._model_thread = ThreadPoolExecutor(1, "model")
        self._prepare_thread = ThreadPoolExecutor(1, "prepare")
        self._loop: asyncio.Task[None] | None = None
        self.waiting_inputs = self.waiting_tokens = 0
        self.batches = self.inputs = self.tokens = self.padded_tokens = 0

    async def map(
        self,
        inputs: Sequence[T],
        prepare: Callable[[Sequence[T]], list[Piece]],
        size_of: Callable[[T], int] = lambda _: 1,
    ) -> tuple[list[R], int]:
        """The results in the order of the inputs, and the tokens that were read.

        To cancel it takes the inputs that have not run out of the queue.

        Args:
            prepare: makes the pieces of some of the inputs; called in a thread.
            size_of: an input's size in characters, for preparing few long ones at once.
        Raises:
            Whatever `prepare` or `run` raises for one of these inputs; other requests do not notice.
        """
        work = _Work(len(inputs))
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._work())
        self._works.append(work)
        feeder = asyncio.create_task(self._feed(work, inputs, prepare, size_of))
        try:
            if inputs:
                await asyncio.wait((work.done, feeder), return_when=asyncio.FIRST_EXCEPTION)
                if feeder.done() and not work.done.done():
                    feeder.result()
                await work.done
            tokens = await feeder
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)
            self._forget(work)
        return work.results, tokens

    async def _feed(
        self,
        work: _Work,
        inputs: Sequence[T],
        prepare: Callable[[Sequence[T]], list[Piece]],
        size_of: Callable[[T], int],
    ) -> int:
        """Prepare the inputs, as there is room for them; the tokens that they have."""
        index = tokens = 0
        for chunk in _chunks(inputs, size_of):
            await self._until(lambda: self._has_room(work))
            pieces = await asyncio.get_running_loop().run_in_executor(self._prepare_thread, prepare, chunk)
            for piece in pieces:
                work.waiting.append((index, piece))
                index += 1
            added = sum(piece.length for piece in pieces)
            tokens += added
            self._count(work, len(pieces), added)
        return tokens

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _has_room(self, work: _Work) -> bool:
        return self.waiting_tokens < self._queue_tokens and work.tokens < self._queue_tokens // 4

    def _count(self, work: _Work, inputs: int, tokens: int) -> None:
        work.tokens += tokens
        self.waiting_inputs += inputs
        self.waiting_tokens += tokens
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    def _forget(self, work: _Work) -> None:
        """Take the request and what waits of it out of the queue."""
        if work in self._works:
            self._works.remove(work)
        waiting = len(work.waiting)
        work.waiting.clear()
        work.done.cancel()
        self._count(work, -waiting, -work.tokens)

    async def _work(self) -> None:
        """One batch after the other, as long as there are any."""
        while True:
            await self._until(lambda: self.waiting_inputs > 0)
            await self._run_batch(self._next_batch())

    def _next_batch(self) -> list[_Job]:
        """Take the next batch out of the queue."""
        while not self._works[0].waiting:
            self._works.rotate(-1)
        pool = self._pool()
        self._works.rotate(-1)
        batch = choose(pool, self._batch_tokens, self._batch_inputs)
        taken: dict[int, tuple[_Work, set[int]]] = {}
        for job in batch:
            taken.setdefault(id(job.work), (job.work, set()))[1].add(job.place)
        for work, indices in taken.values():
            work.waiting = deque(entry for entry in work.waiting if entry[0] not in indices)
        for job in batch:
            self._count(job.work, -1, -job.piece.length)
        return batch

    def _pool(self) -> list[_Job]:
        """The next input of the request whose turn it is, then of every request in turn; of its group alone."""
        group = self._works[0].waiting[0][1].group
        heads = deque((work, iter(tuple(work.waiting))) for work in self._works if work.waiting)
        pool: list[_Job] = []
        tokens = 0
        while heads and tokens < POOL_BATCHES * self._batch_tokens:
            work, entries = heads.popleft()
            entry = next(entries, None)
            if entry is None:
                continue
            heads.append((work, entries))
            if entry[1].group == group:
                pool.append(_Job(work, *entry))
                tokens += entry[1].length
        return pool

    async def _run_batch(self, batch: list[_Job]) -> None:
        """Run it; if that fails in halves, so that an input that cannot be done spoils no other."""
        batch = [job for job in batch if not job.work.done.done()]
        if not batch:
            return
        contents = [job.piece.content for job in batch]
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._model_thread, self._run, contents)
            finished = list(zip(batch, results, strict=True))
        except Exception as exc:
            if len(batch) == 1:
                print(f"an input of {batch[0].piece.length} tokens: {type(exc).__name__}: {exc}", file=sys.stderr)
                batch[0].work.fail(exc)
                return
            middle = len(batch) // 2
            await self._run_batch(batch[:middle])
            await self._run_batch(batch[middle:])
            return
        self.batches += 1
        self.inputs += len(batch)
        self.tokens += sum(job.piece.length for job in batch)
        self.padded_tokens += len(batch) * max(job.piece.length for job in batch)
        for job, result in finished:
            job.work.finish(job.place, result)


def choose(pool: Sequence[_Job], batch_tokens: int, batch_inputs: int) -> list[_Job]:
    """The first of the pool, and those nearest to it in length while the batch stays within its tokens; by length."""
    first = pool[0].piece.length
    batch = [pool[0]]
    longest = first
    for job in sorted(pool[1:], key=lambda job: abs(job.piece.length - first)):
        longest_then = max(longest, job.piece.length)
        if len(batch) == batch_inputs:
            break
        if (len(batch) + 1) * longest_then <= batch_tokens:
            batch.append(job)
            longest = longest_then
    return sorted(batch, key=lambda job: -job.piece.length)


def _chunks(inputs: Sequence[T], size_of: Callable[[T], int]) -> Iterable[Sequence[T]]:
    begin = size = 0
    for index, one in enumerate(inputs):
        size += size_of(one)
        if index > begin and (index - begin == CHUNK_INPUTS or size > CHUNK_CHARACTERS):
            yield inputs[begin:index]
            begin, size = index, size_of(one)
    if begin < len(inputs):
        yield inputs[begin:]
