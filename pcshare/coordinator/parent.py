"""parent: the program that started this coordinator, if one did: JSON lines over the socket it left us.

It hears when we are ready or failed and what changes; its end of the socket closing ends us. PROBE waits for its
answer, with a time limit, and so does all that is told before we serve, if the socket is full: a thousand blocks say
more at once than it holds. Nothing that is told later ever waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from typing import Any

from pcshare.errors import Vetoed, to_json
from pcshare.notifier import Change, Notice

LINE_BYTES_MAX = 1 << 16  # an answer is a few hundred bytes


class ParentLink:
    """Our end of the socket pair."""

    def __init__(self, fd: int, notifier_timeout_s: float, *, is_patient: bool = True) -> None:
        os.set_inheritable(fd, False)
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._notifier_timeout_s = notifier_timeout_s
        self._is_patient = is_patient
        self._received = b""
        self._unsent = b""  # the rest of a line of which the beginning is out
        self._next_id = 1

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **event: Any) -> None:
        """A parent that does not read loses events, and only those, as a whole."""
        with contextlib.suppress(OSError, Vetoed):
            if self._flush():
                self._unsent = line = json.dumps(event).encode() + b"\n"
                self._flush()
                if len(self._unsent) == len(line):
                    self._unsent = b""

    def _flush(self) -> bool:
        """Whether nothing is unsent any more."""
        deadline = time.monotonic() + (self._notifier_timeout_s if self._is_patient else 0)
        while self._unsent:
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except BlockingIOError:
                if not self._wait_for_room(deadline - time.monotonic()):
                    self._is_patient = False  # it does not read, and would hold up each event that follows
                    return False
        return True

    def _wait_for_room(self, timeout_s: float) -> bool:
        """Takes what comes meanwhile: a parent whose answers nobody reads would stop reading too."""
        if timeout_s <= 0:
            return False
        readable, writable, _ = select.select([self._socket], [self._socket], [], timeout_s)
        if readable and not self.drain():
            raise _gone()
        return bool(readable or writable)

    def tell_ready(self, **what: Any) -> None:
        """From here on nobody waits for the parent."""
        self.send(event="ready", **what)
        self._is_patient = False

    def tell_failure(self, error: BaseException) -> None:
        self.send(event="failed", **to_json(error))

    def notify(self, notice: Notice) -> None:
        """The notifier that passes on what the chain is told; Vetoed where the parent refuses a PROBE."""
        number = self._next_id
        self._next_id += 1
        self.send(event=notice.change.value, id=number, block=notice.block)
        if notice.change is Change.PROBE:
            self._await_answer(number, notice.block)

    def _await_answer(self, number: int, block: str | None) -> None:
        deadline = time.monotonic() + self._notifier_timeout_s
        while (left := deadline - time.monotonic()) > 0:
            for answer in self._lines(left):
                if answer.get("id") != number:
                    continue
                if answer.get("ok"):
                    return
                raise Vetoed(
                    f"block {block}: refused by the program that started the coordinator: {answer.get('reason')}"
                )
        raise Vetoed(
            f"block {block}: no answer to PROBE within {self._notifier_timeout_s:g} s",
            hint="answer faster, or give it more time with --notifier-timeout",
        )

    def _lines(self, timeout_s: float) -> list[dict[str, Any]]:
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return []
        if not self._receive():
            raise _gone()
        *whole, self._received = self._received.split(b"\n")
        return [json.loads(line) for line in whole]

    def drain(self) -> bool:
        """Forgets the answers that have come and that nobody waits for. False: the parent is gone."""
        is_there = self._receive()
        self._received = self._received.rpartition(b"\n")[2]
        return is_there

    def _receive(self) -> bool:
        try:
            content = self._socket.recv(LINE_BYTES_MAX)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._received = (self._received + content)[-LINE_BYTES_MAX:]
        return bool(content)

    def close(self) -> None:
        self._socket.close()


def _gone() -> Vetoed:
    return Vetoed("the program that started the coordinator ended before it answered")
