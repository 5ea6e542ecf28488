"""door: the coordinator's listening socket, and the connections that have not become helpers yet.

Accepts, gives each connection its turn and its time, and makes room where too many wait. What is said on them is the
handshake's; whoever has attached is the helpers'.
"""

from __future__ import annotations

import collections
import logging
import math
import selectors
import time
from collections.abc import Callable

from pcshare.coordinator.handshake import Handshake
from pcshare.transport import Connection, Listener

log = logging.getLogger("pcshare")

HANDSHAKES_MAX = 1024  # connections that have not attached yet: as HELPERS_MAX, which may all come at once
ACCEPT_AGAIN_S = 0.25  # after no fd was left for one more


class Door:
    """Open from open() on; close() hangs up on everybody who has not come in."""

    def __init__(
        self, listener: Listener, selector: selectors.BaseSelector, handshake: Callable[[Connection], Handshake]
    ) -> None:
        self._listener = listener
        self._selector = selector
        self._new_handshake = handshake
        self.handshakes: dict[int, Handshake] = {}  # by the connection's fd
        self._accepts = False
        self._open_at_s = math.inf  # when it is to be opened again

    def open(self) -> None:
        if not self._accepts:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._accepts = True

    def shut(self, for_s: float) -> None:
        """Who connects waits meanwhile."""
        if self._accepts:
            self._selector.unregister(self._listener)
        self._accepts = False
        self._open_at_s = time.monotonic() + for_s

    def wait_s(self) -> float | None:
        """How soon look() is wanted even if nothing is readable; None: not before."""
        due_s = min((handshake.deadline for handshake in self.handshakes.values()), default=math.inf)
        if not self._accepts:
            due_s = min(due_s, self._open_at_s)
        return None if due_s == math.inf else max(0.0, due_s - time.monotonic())

    def look(self) -> None:
        """Gives up on who has said nothing for too long, and opens again when it is time."""
        now = time.monotonic()
        for number, handshake in list(self.handshakes.items()):
            if handshake.deadline <= now:
                self._forget(number).time_out()
        if not self._accepts and now >= self._open_at_s:
            self.open()

    def _accept(self) -> None:
        try:
            connection = self._listener.accept()
        except OSError as error:  # no fds left: those that are here come first
            log.warning("cannot accept a helper: %s", error.strerror)
            self.shut(ACCEPT_AGAIN_S)
            return
        if connection is None:
            return
        handshake = self._new_handshake(connection)
        self.handshakes[connection.fileno()] = handshake
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._step(handshake))
        if len(self.handshakes) > HANDSHAKES_MAX:
            self._drop_greediest()

    def _drop_greediest(self) -> None:
        """Makes room: the oldest connection of the process that has most of them."""
        pids = {number: one.connection.credentials().pid for number, one in self.handshakes.items()}
        counts = collections.Counter(pids.values())
        self._forget(max(pids, key=lambda number: counts[pids[number]])).make_room()

    def _forget(self, number: int) -> Handshake:
        self._selector.unregister(number)
        return self.handshakes.pop(number)

    def _step(self, handshake: Handshake) -> None:
        number = handshake.connection.fileno()
        if self.handshakes.get(number) is not handshake:
            return  # given up since select() found it readable
        key = self._selector.get_key(number)
        self._selector.unregister(number)
        del self.handshakes[number]
        if handshake.step():
            self.handshakes[number] = handshake
            self._selector.register(number, selectors.EVENT_READ, key.data)

    def close(self) -> None:
        for handshake in self.handshakes.values():
            handshake.connection.close_unread()
        self.handshakes.clear()
