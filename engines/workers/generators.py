"""Who generates: transformers' own continuous batching, or, for models that it cannot take, one line at a time."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from engines.workers.sampling import Line, pick
from engines.workers.server import Cancelled, Turns

PAGE_TOKENS = 32


class Failed(RuntimeError):
    """The model failed at a line; the text is the library's."""


class Batch(Protocol):
    """Takes lines at any time; each goes on until its end token, its length, or until it is cancelled."""

    running: int

    def start(self, line: Line) -> None: ...

    def cancel(self, line: Line) -> None: ...


class Together:
    """All lines at once, each step one token of each: continuous batching over a paged cache.

    The library's scheduler and cache, with the choice of tokens ours: its own knows no seeds, no penalties, and one
    temperature for all.
    """

    def __init__(self, model: Any, *, cache_tokens: int, batch_tokens: int, most_lines: int) -> None:
        self.running = 0
        self._model = model
        self._sizes = {
            "num_blocks": -(-cache_tokens // PAGE_TOKENS),
            "max_batch_tokens": batch_tokens,
            "max_requests_per_batch": most_lines,
        }
        self._lines: dict[str, Line] = {}
        self._names = itertools.count()
        self._lock = threading.Lock()
        self._manager = self._new_manager()

    def start(self, line: Line) -> None:
        """Called in the event loop, in which the library delivers."""
        with self._lock:
            if not self._manager.is_running():  # an error in a step has ended it
                self._manager = self._new_manager()
        name = str(next(self._names))
        self._lines[name] = line
        self.running += 1
        told = 0

        def deliver(output: Any) -> None:
            nonlocal told
            if name not in self._lines:
                return
            new = output.generated_tokens[told:]
            told += len(new)
            is_last = output.is_finished()
            if is_last:
                self._forget(name)
            line.put(new, is_last, Failed(output.error) if output.error else None)

        self._manager.register_result_handler(name, deliver)
        taken = self._manager.add_request(
            line.prompt,
            request_id=name,
            max_new_tokens=line.wish.max_tokens,
            streaming=True,
            eos_token_id=sorted(line.wish.end_ids) or -1,
        )
        if taken is None:
            self._forget(name)
            raise Failed("the model is starting again after an error; try again")

    def cancel(self, line: Line) -> None:
        """It is left out of the next step."""
        for name in [name for name, known in self._lines.items() if known is line]:
            self._manager.cancel_request(name)
            self._forget(name)

    def _forget(self, name: str) -> None:
        if self._lines.pop(name, None) is not None:
            self.running -= 1
        router = self._manager.output_router
        with router._lock:
            router.result_handlers.pop(name, None)

    def _new_manager(self) -> Any:
        from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
        from transformers.generation.continuous_batching.cb_logits_processors import (
            ContinuousBatchingLogitsProcessor,
            ContinuousBatchingLogitsProcessorList,
        )

        batch = self

        class Picker(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
            """Leaves of each row of logits the token that is picked."""

            supported_kwargs: dict[str, type] = {}
            ignored_kwargs: tuple[str, ...] = ()

            def fill_defaults(self, int32_tensor: Any) -> None:
                return

            def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Any:
                import torch

                self.names = [one.state.request_id for one in requests_with_new_token]
                return torch.zeros(len(self.names), dtype=torch.int32)

            def __call__(self, scores: Any, tensor_arg: Any) -> Any:
                lines = [batch._lines.get(name) for name in self.names]
                rows = [row for row, line in enumerate(lines) if line is not None]
                if not rows:
                    return scores
                tokens = pick(scores[rows], [line for line in lines if line is not None])
                scores[rows] = float("-inf")
                scores[rows, tokens] = 0.0
                return scores

        page = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # the latter up to 5.17
        manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                use_async_batching=False, use_cuda_graph=False, **{page: PAGE_TOKENS}, **self._sizes
            ),
        )
        picker = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([Picker()]))
        picker.tensors_required = 1
        manager.logit_processor = picker
        manager.warmup()  # makes the cache, and fails at models that it cannot take
        manager.start()
        return manager


class OneByOne:
    """One line after the other, by the library's `generate`."""

    def __init__(self, model: Any) -> None:
        self.running = 0
        self._model = model
        self._turns = Turns()
        self._stops: dict[int, threading.Event] = {}
        self._tasks: set[Any] = set()

    def start(self, line: Line) -> None:
        """Called in the event loop."""
        import asyncio

        self.running += 1
        stop = self._stops[id(line)] = threading.Event()

        async def run() -> None:
            try:
                await self._turns.run(lambda _: self._generate(line, stop), stop)
                line.put([], True, None)
            except Cancelled:
                pass
            except Exception as exc:  # the edge: whoever waits for the line gets it
                line.put([], True, exc)
            finally:
                self.running -= 1
                self._stops.pop(id(line), None)

        task = asyncio.ensure_future(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self, line: Line) -> None:
        """It ends with the next token."""
        if stop := self._stops.get(id(line)):
            stop.set()

    def _generate(self, line: Line, stop: threading.Event) -> None:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        def choose(input_ids: Any, scores: Any) -> Any:
            token = pick(scores.float(), [line])
            return torch.full_like(scores, float("-inf")).scatter(-1, token.unsqueeze(-1), 0.0)

        def look(input_ids: Any, scores: Any, **more: Any) -> Any:
            line.put([int(input_ids[0, -1])], False, None)
            return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device, dtype=torch.bool)

        with torch.inference_mode():
            ids = torch.tensor([line.prompt], device=self._model.device)
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=line.wish.max_tokens,
                    eos_token_id=sorted(line.wish.end_ids) or None,
                    pad_token_id=0,
                ),
                logits_processor=LogitsProcessorList([choose]),
                stopping_criteria=StoppingCriteriaList([look]),
            )
        if stop.is_set():
            raise Cancelled


def new_batch(model: Any, *, together: bool, **sizes: int) -> Batch:
    """Together where that is wanted and the model can, else one by one; the log says why."""
    if not together:
        return OneByOne(model)
    try:
        return Together(model, **sizes)
    except (ImportError, AttributeError, ValueError, TypeError, NotImplementedError) as exc:
        print(f"answers one request at a time: no continuous batching for this model ({exc})", file=sys.stderr)
        return OneByOne(model)
