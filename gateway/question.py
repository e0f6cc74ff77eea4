"""Questions that may never be answered, such as those to a driver that hangs: each is waited for only so long."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

AnswerT = TypeVar("AnswerT")


class NoAnswer(Exception):
    """It has not come in time. `last` is the one before, None if there was none."""

    def __init__(self, last: Any) -> None:
        super().__init__("no answer in time")
        self.last = last


class Question(Generic[AnswerT]):
    """Asked by one thread at a time, which is only for that: however long it hangs, no other does, nor our end."""

    def __init__(self, ask: Callable[..., AnswerT], *, limit_s: float) -> None:
        self._ask = ask
        self._limit_s = limit_s
        self._is_free = threading.Lock()
        self._is_silent = False
        self._last: AnswerT | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> AnswerT:
        """The answer. While an earlier question hangs, nobody waits again.

        Raises:
            NoAnswer
            whatever the question raises.
        """
        if not self._is_free.acquire(timeout=0 if self._is_silent else self._limit_s):
            raise NoAnswer(self._last)
        answer: concurrent.futures.Future[AnswerT] = concurrent.futures.Future()

        def ask() -> None:
            try:
                self._last = self._ask(*args, **kwargs)
                answer.set_result(self._last)
            except BaseException as exc:
                answer.set_exception(exc)
            finally:
                self._is_silent = False
                self._is_free.release()

        try:
            threading.Thread(target=ask, daemon=True, name=f"question {id(self):x}").start()
        except RuntimeError:
            self._is_free.release()
            raise
        try:
            return answer.result(self._limit_s)
        except concurrent.futures.TimeoutError:
            self._is_silent = True
            if answer.done():  # just now, or it is the question that has raised this
                self._is_silent = False
                return answer.result()
            raise NoAnswer(self._last) from None
