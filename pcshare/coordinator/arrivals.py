"""arrivals: connections to the place where a migration comes in, from accept until it is known what each of them is.

Nothing but its first bytes tell a main connection, a recovery and a preempt channel apart, and a preempt channel may
say nothing for long. So each is kept, unread, until somebody wants it. Whom to want is not decided here, and no byte is
taken.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import selectors
import socket
import struct
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto

from pcshare.fds import OwnedFd
from pcshare.migration.wire import MULTIFD_MAGIC, U32, ConnectionKind, connection_kind
from pcshare.nbd.address import Listening, host_port, parse_address

log = logging.getLogger("pcshare")

ARRIVALS_MAX = 8  # a migration has two connections; strangers must not take the room of either for long
SILENCE_TIMEOUT_S = 10.0  # for a first byte, while there is no migration under way that a connection could belong to
KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))  # seconds; a dead host's
USER_TIMEOUT_MS = 30_000  # for what we sent to be acknowledged: a dead host's, while we ask for pages
_UCRED = struct.Struct("iII")


class Verdict(Enum):
    """What becomes of a connection whose first byte is there."""

    TAKE = auto()  # is read from now on
    KEEP = auto()  # later, perhaps
    REFUSE = auto()


class Arrival:
    """A connection that nobody reads yet; owns it."""

    def __init__(self, connection: socket.socket, where: str, number: int) -> None:
        self.connection = connection
        self.number = number  # they are accepted in the order in which they connected
        self.host, self.peer = _peer_of(connection, where)
        self.since_s = time.monotonic()
        self.is_watched = False

    def first_bytes(self) -> bytes:
        """As many as are there, up to a magic number's; empty: the peer has closed. BlockingIOError: none yet."""
        try:
            return self.connection.recv(U32.size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except ConnectionError:
            return b""

    def detach(self) -> OwnedFd:
        return OwnedFd(self.connection.detach())

    def close(self) -> None:
        self.connection.close()


class Arrivals:
    """Listens at once; taken: on sockets that do so already; place None: nowhere. judge: says what becomes of a
    connection of that kind, and takes it where it says TAKE. is_idle: no connection is read, so that a silent one
    belongs to nobody."""

    def __init__(
        self,
        place: str | None,
        judge: Callable[[Arrival, ConnectionKind], Verdict],
        is_idle: Callable[[], bool],
        taken: Sequence[OwnedFd] = (),
    ) -> None:
        self._judge = judge
        self._is_idle = is_idle
        self._listening = None if place is None else Listening(parse_address(place), taken)
        self._selector = selectors.EpollSelector()
        self._waiting: list[Arrival] = []
        self._numbers = itertools.count()
        for listener in self.sockets:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, None)

    @property
    def sockets(self) -> list[socket.socket]:
        return [] if self._listening is None else self._listening.sockets

    @property
    def addresses(self) -> list[str]:
        """As bound."""
        return [] if self._listening is None else self._listening.addresses

    def fileno(self) -> int:
        return self._selector.fileno()

    def handle(self) -> None:
        """Accepts, and looks at who has spoken."""
        for key, _ in self._selector.select(0):
            if isinstance(key.data, Arrival):
                self._look_at(key.data)
            elif isinstance(key.fileobj, socket.socket):
                self._accept(key.fileobj)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:  # gone again, or no fds left
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                log.warning("cannot accept a source: %s", error.strerror)
            return
        arrival = Arrival(connection, self.addresses[0], next(self._numbers))
        _prepare(connection)
        self._waiting.append(arrival)
        self._watch(arrival, True)
        if len(self._waiting) > ARRIVALS_MAX:
            surplus = self._waiting[0 if self._is_idle() else -1]
            log.warning("%s is hung up on: too many connections", surplus.peer)
            self._drop(surplus)

    def _watch(self, arrival: Arrival, wanted: bool) -> None:
        if wanted and not arrival.is_watched:
            self._selector.register(arrival.connection, selectors.EVENT_READ, arrival)
        elif not wanted and arrival.is_watched:
            self._selector.unregister(arrival.connection)
        arrival.is_watched = wanted

    def _look_at(self, arrival: Arrival) -> None:
        if arrival not in self._waiting:
            return
        try:
            first = arrival.first_bytes()
        except BlockingIOError:
            return
        if not first:
            self._drop(arrival)
            return
        self._watch(arrival, False)
        kind = _kind(first)
        if kind is None:
            log.warning("%s is hung up on: it begins with %s, and so no migration does", arrival.peer, first.hex(" "))
            self._drop(arrival)
            return
        self._waiting.remove(arrival)  # its taker's, or put back
        verdict = self._judge(arrival, kind)
        if verdict is Verdict.REFUSE:
            arrival.close()
        elif verdict is Verdict.KEEP:
            self._waiting.append(arrival)

    def look_again(self) -> None:
        """At all that were kept: what is wanted has changed."""
        for arrival in self._waiting:
            arrival.since_s = time.monotonic()
            self._watch(arrival, True)

    def _drop(self, arrival: Arrival) -> None:
        self._watch(arrival, False)
        self._waiting.remove(arrival)
        arrival.close()

    def drop_silent(self) -> float | None:
        """Hangs up on those that have said nothing for too long. How soon that is wanted again, in seconds."""
        if not self._is_idle():
            return None
        now = time.monotonic()
        for arrival in list(self._waiting):
            if arrival.is_watched and now - arrival.since_s >= SILENCE_TIMEOUT_S:
                log.warning("%s is hung up on: it said nothing for %g s", arrival.peer, SILENCE_TIMEOUT_S)
                self._drop(arrival)
        since_s = [arrival.since_s for arrival in self._waiting if arrival.is_watched]
        return max(0.0, min(since_s) + SILENCE_TIMEOUT_S - now) if since_s else None

    def end(self) -> None:
        """Nobody can connect any more; who waits is hung up on. Twice is fine."""
        for arrival in list(self._waiting):
            self._drop(arrival)
        for listener in self.sockets:
            self._selector.unregister(listener)
        if self._listening is not None:
            self._listening.close()

    def close(self) -> None:
        """Twice is fine."""
        self.end()
        self._selector.close()


def _kind(first: bytes) -> ConnectionKind | None:
    """A byte tells, but for multifd: that one is no stranger's by chance."""
    kind = connection_kind(first[0])
    return None if kind is ConnectionKind.MULTIFD and first != U32.pack(MULTIFD_MAGIC) else kind


def _prepare(connection: socket.socket) -> None:
    """Requests leave at once, and a host that died is found out."""
    if connection.family == socket.AF_UNIX:
        return
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


def _peer_of(connection: socket.socket, where: str) -> tuple[str, str]:
    """Its host, empty for this one; and how to call it."""
    with contextlib.suppress(OSError):
        if connection.family != socket.AF_UNIX:
            host, port, *_ = connection.getpeername()
            return host, f"the source {host_port(host, port)}"
        pid, _, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return "", f"the source (process {pid}) on {where}"
    return "", f"the source on {where}"
