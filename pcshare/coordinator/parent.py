"""parent: the program that started this coordinator, if one did: JSON lines over the socket it left us.

It hears when we are ready or failed and what changes; its end of the socket closing ends us. PROBE waits for its
answer, with a time limit; nothing else ever waits for it.
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

    def __init__(self, fd: int, notifier_timeout_s: float) -> None:
        os.set_inheritable(fd, False)
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._notifier_timeout_s = notifier_timeout_s
        self._received = b""
        self._next_id = 1

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **event: Any) -> None:
        """A parent that does not read loses events, and only those."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(event).encode() + b"\n")

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
        if not self.drain():
            raise Vetoed("the program that started the coordinator ended before it answered")
        *whole, self._received = self._received.split(b"\n")
        return [json.loads(line) for line in whole]

    def drain(self) -> bool:
        """Takes what has come. False: the parent is gone."""
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
