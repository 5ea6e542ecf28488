"""calls: what other threads want done in the coordinator's loop, where blocks, notifiers and the status are changed.

A thread asks and waits for the answer, or leaves word and goes on. Knows nothing of what is called.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from pcshare.errors import PcshareError
from pcshare.sources import Wakeup

T = TypeVar("T")


class LoopEnded(PcshareError):
    """The loop takes no more calls: the coordinator ends."""

    def __init__(self) -> None:
        super().__init__("the coordinator ends", errno=errno.ECANCELED)


class Calls:
    """One queue; readable when something waits in it."""

    def __init__(self) -> None:
        self._wakeup = Wakeup()
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Callable[[], Any], Future[Any] | None]] = deque()
        self._ended = False

    def fileno(self) -> int:
        return self._wakeup.fileno()

    def ask(self, call: Callable[[], T]) -> T:
        """What the call returns, or raises, in the loop. LoopEnded instead of an answer."""
        answer: Future[T] = Future()
        if not self._put(call, answer):
            raise LoopEnded
        return answer.result()

    def tell(self, call: Callable[[], None]) -> None:
        """Nobody waits for it; what it raises ends the loop. After the loop's end it is forgotten."""
        self._put(call, None)

    def _put(self, call: Callable[[], Any], answer: Future[Any] | None) -> bool:
        with self._lock:
            if self._ended:
                return False
            self._waiting.append((call, answer))
            self._wakeup.set()
            return True

    def run(self) -> None:
        """Makes the calls that wait. For the loop."""
        self._wakeup.clear()
        while self._waiting:
            call, answer = self._waiting.popleft()
            if answer is None:
                call()
                continue
            try:
                answer.set_result(call())
            except Exception as error:  # is the asker's to deal with
                answer.set_exception(error)

    def end(self) -> None:
        """Who waits gets LoopEnded. Twice is fine."""
        with self._lock:
            self._ended = True
        while self._waiting:
            _, answer = self._waiting.popleft()
            if answer is not None:
                answer.set_exception(LoopEnded())

    def close(self) -> None:
        self.end()
        self._wakeup.close()
