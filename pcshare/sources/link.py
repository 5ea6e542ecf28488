"""link: what keeps a block's page channel connected to one of its equivalent servers, in a thread of its own.

It connects, negotiates, hands the connection to the channel, hears of its loss and connects again, to the same server
or to the next; it tells how that goes. It reads no page, asks for none, and decides nothing about a block. Some facts:
 - the channel keeps what a lost connection owed and asks for it of the next one, demand first: nothing to do here;
 - a child process dies with the thread that started it: hence all connections, the first one too, are made here;
 - a server that has accepted may never answer: before one that comes back is trusted it must answer a small read;
 - some servers let a second connection wait for ever: the demand connection has a short time limit.
"""

from __future__ import annotations

import errno
import logging
import math
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pcshare.errors import PcshareError, SourceError
from pcshare.nbd.client import Session, negotiate
from pcshare.signals import signals_blocked, wait_for_event
from pcshare.sources.child import Child
from pcshare.sources.endpoint import Connected, connect, stoppable
from pcshare.sources.grammar import ExecTarget, ObjectTarget, SshTarget, Target
from pcshare.sources.shown import shown
from pcshare.sources.wakeup import StopFlag, Wakeup

log = logging.getLogger("pcshare")

# -- time limits

CONNECT_TIMEOUT_S = 10.0  # until the server's host has accepted
HANDSHAKE_TIMEOUT_S = 10.0  # from then until the export is chosen
REPLY_TIMEOUT_S = 30.0  # a server that owes an answer and says nothing for so long is lost; timeout= changes it
BLOCK_STATUS_TIMEOUT_S = 5.0  # for finding out what is a hole: what is not known by then counts as data
DEMAND_TIMEOUT_S = 3.0  # for the demand connection, of a server that has just answered; nobody listens meanwhile
BACKOFF_S, BACKOFF_MAX_S = 0.1, 10.0  # between attempts to connect, doubled each time
DEMAND_BACKOFF_MAX_S = 60.0  # where it is refused, the primary connection does its work
STEADY_S = 10.0  # a connection that lived so long was a good one: what follows it is a new loss
SOURCE_TIMEOUT_S = 30.0  # how long a source may be away before what is missing is lost, if that is the policy

_CHILD_TARGETS = (ExecTarget, SshTarget, ObjectTarget)

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class LinkState:
    """How a link stands. server names the one that serves, or those that do not."""

    is_away: bool
    reason: str
    server: str
    gave_up: bool = False  # away for longer than the source timeout: who waits has been told that it is lost
    cure: str = "trying again"  # what is done about it


class Event(Protocol):
    """A connection was lost (pcshare.page_channel.NbdEvent)."""

    @property
    def connection(self) -> int: ...
    @property
    def error(self) -> int: ...
    @property
    def text(self) -> str: ...


class Channel(Protocol):
    """What a link needs of a page channel (pcshare.page_channel.NbdChannel)."""

    def connect(self, fd: int, *, demand: bool, structured: bool) -> int: ...
    def disconnect(self, error: int, text: str) -> None: ...
    def give_up(self, error: int) -> None: ...
    def fileno(self) -> int: ...
    def events(self) -> Iterator[Event]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Need:
    """What every equivalent server must offer; sizes in bytes."""

    size: int
    alignment: int  # the largest minimum of a read
    length_max: int  # the smallest maximum
    preferred: int = 0  # what the first server reads at a time at best; 0: not known


@dataclass
class _Line:
    """A session that is to be handed over, or a connection that the channel has."""

    session: Session
    connected: Connected
    number: int = -1  # the channel's, from the hand-over on
    since_s: float = math.inf

    @property
    def child(self) -> Child | None:
        return self.connected.child

    def end(self) -> str:
        """What is to be said about it beside the error: how its process ended."""
        self.session.close()
        return self.child.end() if self.child else ""

    def explained(self, error: BaseException) -> BaseException:
        """Ends it because of an error; what is to be raised."""
        self.session.close()
        return self.connected.explained(error)


class _BackOff:
    """How long to wait before the next attempt."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._next_s = 0.0

    def next_s(self) -> float:
        wait_s = self._next_s
        self._next_s = min(max(BACKOFF_S, 2 * wait_s), self._longest_s)
        return wait_s

    def reset(self) -> None:
        self._next_s = 0.0


class Link(Generic[Facts]):
    """The connections of one source. open() gives what learn() finds out in the first session; serve() feeds a channel
    from then on; close() ends it all. on_change hears LinkState in the link's thread."""

    def __init__(self, servers: Sequence[Target], learn: Callable[[Session], Facts], reply_timeout_s: float) -> None:
        self._servers = servers
        self._learn = learn
        self._reply_timeout_s = reply_timeout_s
        self._at = 0  # index of the server in use, or to be tried next
        self._stop = StopFlag()
        self._wakeup = Wakeup()
        self._opened = threading.Event()
        self._failure: BaseException | None = None
        self._facts: Facts | None = None
        self._first: _Line | None = None
        self._is_known = False  # what learn() would find out: the first connection is one like those after a loss
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._need = Need(0, 1, 1)
        self._on_change: Callable[[LinkState], None] | None = None
        self._lost_after_s = math.inf
        self._try_now = False
        self._is_let_go = False
        self._state = LinkState(False, "", shown(servers[0].text))
        self._states: dict[str, str] = {}  # of objects: URL, and what the first provider said of it
        self._primary: _Line | None = None
        self._demand: _Line | None = None
        self._backoff = _BackOff(BACKOFF_MAX_S)
        self._demand_backoff = _BackOff(DEMAND_BACKOFF_MAX_S)
        self._primary_due = self._demand_due = self._lost_due = math.inf
        self._thread = threading.Thread(target=self._run, name="pcshare-link")

    # -- for other threads

    def open(self, stop: StopFlag | None = None) -> Facts:
        """Connects to the first server that answers, and learns of it. SourceError says of each why it does not."""
        with signals_blocked():  # they belong to the main thread, and the child processes are not to block them
            self._thread.start()
        with (StopFlag() if stop is None else stop).calling(self._stop.set):
            wait_for_event(self._opened)
        if self._failure is not None:
            raise self._failure
        assert self._facts is not None
        return self._facts

    def take_up(self, object_states: Mapping[str, str]) -> None:
        """Instead of open(), for a source of which all is known: serve() connects to it, as often as it takes."""
        self._is_known = True
        self._states.update(object_states)
        with signals_blocked():
            self._thread.start()

    @property
    def object_states(self) -> dict[str, str]:
        """Of objects: in which state they were found, which they must keep."""
        return dict(self._states)

    @property
    def server(self) -> str:
        """The one in use, or to be tried next."""
        return self._server

    def watch(self, on_change: Callable[[LinkState], None], lost_after_s: float | None) -> None:
        """Before serve(). lost_after_s: when what is missing is lost; None: never."""
        self._on_change = on_change
        self._lost_after_s = math.inf if lost_after_s is None else lost_after_s

    def serve(self, channel: Channel, need: Need) -> None:
        """The channel is the link's from here on, and is closed with it, also if it is refused."""
        with self._lock:
            if not self._stop.is_set:
                self._need, self._channel = need, channel
                self._wakeup.set()
                return
        channel.close()
        raise SourceError("the source is closed", errno=errno.EBADF)

    def retry_now(self) -> None:
        """Does not wait for the next attempt, where one is to come."""
        self._try_now = True
        self._wakeup.set()

    def let_go(self) -> None:
        """Begins to close, politely: what is being said to a server is said to its end. Waits for nothing."""
        self._is_let_go = True
        self._wakeup.set()

    def close(self) -> None:
        """Says goodbye to the servers and waits for the processes to end. Twice is fine."""
        with self._lock:
            self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._wakeup.close()

    # -- the thread

    def _run(self) -> None:
        try:
            with self._stop.calling(self._wakeup.set):
                if not self._is_known:
                    self._open()
                if self._failure is None:
                    self._serve()
        except BaseException as error:
            log.exception("the link to %s has failed", self._names())
            self._tell(LinkState(True, f"the link has failed: {error!r}", self._names()))
        finally:
            self._end()

    def _open(self) -> None:
        try:
            self._first, self._facts = self._open_any()
        except BaseException as error:
            self._failure = error
        finally:
            self._opened.set()

    def _open_any(self) -> tuple[_Line, Facts]:
        failures: list[PcshareError] = []
        for _ in self._servers:
            try:
                return self._open_one()
            except PcshareError as error:
                failures.append(error)
                self._go_to_next()
        self._stop.check()
        raise _all_failed(self._servers, failures)

    def _open_one(self) -> tuple[_Line, Facts]:
        line = self._connect(CONNECT_TIMEOUT_S, HANDSHAKE_TIMEOUT_S)
        try:
            with stoppable(line.connected, self._stop):
                facts = self._learn(line.session)
        except BaseException as error:
            raise line.explained(error) from None
        if not line.session.usable:  # an answer is still to come, too late: the connection is of no use any more
            line.end()
            line = self._connect(CONNECT_TIMEOUT_S, HANDSHAKE_TIMEOUT_S)
        return line, facts

    def _serve(self) -> None:
        while not self._stop.is_set and not self._is_let_go:
            self._wait()
            if self._channel is None or self._stop.is_set or self._is_let_go:
                continue
            if self._first is not None:
                self._adopt_first(self._first)
            elif self._is_known:
                self._is_known = False
                self._begin_away()
            self._hear()
            self._act()

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        if self._channel is not None:
            poll.register(self._channel.fileno(), select.POLLIN)
        due = min(self._primary_due, self._demand_due, self._lost_due if self._may_give_up() else math.inf)
        poll.poll(None if due == math.inf else max(0.0, due - time.monotonic()) * 1000)
        self._wakeup.clear()

    def _end(self) -> None:
        with self._lock:
            self._stop.set()  # no channel comes after this
            channel = self._channel
        if channel is not None:
            channel.close()
        for line in (self._first, self._primary, self._demand):
            if line is not None:
                line.end()

    # -- connecting

    def _connect(
        self, connect_s: float, handshake_s: float, latest: float = math.inf, *, is_plain: bool = False
    ) -> _Line:
        """A session with the server in use, with nothing outstanding; at the latest then (time.monotonic())."""
        server = self._servers[self._at]
        if isinstance(server, _CHILD_TARGETS):
            handshake_s += connect_s  # the start of the process is part of it
        connected = connect(server, min(latest, time.monotonic() + connect_s), self._stop, self._reply_timeout_s)
        try:
            with stoppable(connected, self._stop):
                deadline = min(latest, time.monotonic() + handshake_s)
                session = negotiate(connected.socket, server.export, deadline, is_plain=is_plain)
            self._stop.check()
            self._check_state(server, session.export.description)
        except BaseException as error:
            raise connected.explained(error) from None
        return _Line(session, connected)

    def _check_state(self, server: Target, description: str) -> None:
        """Each provider holds fast to the state in which it found its object, and names it: all must have found one."""
        if not isinstance(server, ObjectTarget):
            return
        first = self._states.setdefault(server.url, description)
        if description != first:
            raise SourceError(f"the object changed: it was {first}, and is {description}", errno=errno.ESTALE)

    def _connect_again(self) -> _Line:
        """A session with a server that was lost: it must be the same as before, and answer."""
        latest = max(self._lost_due, time.monotonic() + BACKOFF_S) if self._may_give_up() else math.inf
        line = self._connect(CONNECT_TIMEOUT_S, HANDSHAKE_TIMEOUT_S, latest)
        try:
            self._check(line.session)
            with stoppable(line.connected, self._stop):
                _ask_a_little(line.session, min(latest, time.monotonic() + self._reply_timeout_s))
        except BaseException as error:
            raise line.explained(error) from None
        return line

    def _check(self, session: Session) -> None:
        export, need = session.export, self._need
        if export.size != need.size:
            raise SourceError(
                f"comes back with another size: {export.size} bytes, and it had {need.size}", errno=errno.ESTALE
            )
        if export.block_min > need.alignment or export.block_max < need.length_max:
            raise SourceError(
                f"takes reads of {export.block_min} to {export.block_max} bytes only, not {need.alignment} to "
                f"{need.length_max} as the first server did",
                errno=errno.EINVAL,
            )

    def _hand_over(self, line: _Line, *, demand: bool) -> _Line:
        assert self._channel is not None
        structured = line.session.export.structured
        try:
            line.number = self._channel.connect(line.session.detach().detach(), demand=demand, structured=structured)
        except BaseException:
            line.end()
            raise
        line.since_s = time.monotonic()
        return line

    def _adopt_first(self, line: _Line) -> None:
        self._first = None
        try:
            self._check(line.session)
            self._adopt(line)
        except PcshareError as error:
            line.end()
            self._lose(error.message)

    def _begin_away(self) -> None:
        now = time.monotonic()
        self._lost_due, self._primary_due = now + self._lost_after_s, now
        self._tell(LinkState(True, "it is connected to anew", self._server))

    def _adopt(self, line: _Line) -> None:
        self._primary = self._hand_over(line, demand=False)
        self._primary_due = math.inf
        if line.session.export.multi_conn:
            self._demand_due = time.monotonic()
        if self._state.gave_up and self._channel is not None:
            self._channel.give_up(0)
        self._tell(LinkState(False, "", self._server))

    # -- what happens

    def _hear(self) -> None:
        assert self._channel is not None
        for event in self._channel.events():
            if self._primary is not None and event.connection == self._primary.number:
                self._lose_primary(event)
            elif self._demand is not None and event.connection == self._demand.number:
                self._lose_demand()

    def _lose_primary(self, event: Event) -> None:
        """Begins anew, with both: a server that lost one connection is not to be trusted with the other."""
        assert self._channel is not None
        assert self._primary is not None
        self._channel.disconnect(event.error, event.text)
        primary, demand, self._primary, self._demand = self._primary, self._demand, None, None
        if time.monotonic() - primary.since_s >= STEADY_S:
            self._lost_due = math.inf
            self._backoff.reset()
        self._tell(LinkState(True, event.text, self._server))  # before what may take seconds
        ending = primary.end()
        if demand is not None:
            demand.end()
        self._lose(f"{event.text}; {ending}" if ending else event.text)

    def _lose(self, reason: str) -> None:
        now = time.monotonic()
        self._lost_due = min(self._lost_due, now + self._lost_after_s)
        self._primary_due = now + self._backoff.next_s()
        self._demand_due = math.inf
        self._tell(LinkState(True, reason, self._server))
        self._go_to_next()

    def _go_to_next(self) -> None:
        self._at = (self._at + 1) % len(self._servers)

    def _lose_demand(self) -> None:
        assert self._demand is not None
        demand, self._demand = self._demand, None
        if time.monotonic() - demand.since_s >= STEADY_S:
            self._demand_backoff.reset()
        demand.end()
        self._demand_due = time.monotonic() + self._demand_backoff.next_s()

    def _act(self) -> None:
        if self._try_now:
            self._try_now = False
            self._hurry()
        if self._may_give_up() and time.monotonic() >= self._lost_due:
            self._give_up()
        if time.monotonic() >= self._primary_due:
            self._find_server()
        elif time.monotonic() >= self._demand_due:
            self._add_demand()

    def _hurry(self) -> None:
        now = time.monotonic()
        if self._primary_due != math.inf:
            self._primary_due = now
        if self._demand_due != math.inf:
            self._demand_due = now

    def _find_server(self) -> None:
        """Tries each server once, beginning with the one whose turn it is."""
        failures: list[str] = []
        for _ in self._servers:
            try:
                self._adopt(self._connect_again())
                return
            except PcshareError as error:
                if self._stop.is_set:
                    return
                failures.append(error.message if len(self._servers) == 1 else _named(self._server, error.message))
                self._go_to_next()
        self._primary_due = time.monotonic() + self._backoff.next_s()
        self._tell(LinkState(True, "; ".join(failures), self._names(), self._state.gave_up))

    def _add_demand(self) -> None:
        self._demand_due = math.inf
        try:
            line = self._connect(DEMAND_TIMEOUT_S, DEMAND_TIMEOUT_S, is_plain=True)
        except PcshareError as error:
            self._put_off_demand(error)
            return
        try:
            self._check(line.session)
            self._demand = self._hand_over(line, demand=True)
        except PcshareError as error:
            line.end()
            self._put_off_demand(error)

    def _put_off_demand(self, error: PcshareError) -> None:
        log.info("%s: no connection for demand: %s", self._server, error.message)
        self._demand_due = time.monotonic() + max(BACKOFF_S, self._demand_backoff.next_s())

    def _may_give_up(self) -> bool:
        """_lost_due counts. It stays when a server comes back, until one has proved good: else one that is lost again
        and again would be waited for without end."""
        return self._state.is_away and not self._state.gave_up and self._lost_due != math.inf

    def _give_up(self) -> None:
        assert self._channel is not None
        self._channel.give_up(errno.ETIMEDOUT)
        self._tell(LinkState(True, self._state.reason, self._state.server, gave_up=True))

    # -- telling

    @property
    def _server(self) -> str:
        return shown(self._servers[self._at].text)

    def _names(self) -> str:
        return ",".join(shown(server.text) for server in self._servers)

    def _tell(self, state: LinkState) -> None:
        if state != self._state:
            self._state = state
            if self._on_change is not None:
                self._on_change(state)


def _ask_a_little(session: Session, deadline: float) -> None:
    """One byte, or as few as there may be. A refusal is an answer too."""
    try:
        session.read(0, 1, deadline)
    except SourceError:
        if not session.usable:
            raise


def _all_failed(servers: Sequence[Target], failures: Sequence[PcshareError]) -> PcshareError:
    """One error of all; where they are of one kind (this host cannot, wrong usage) of that kind."""
    kinds = {type(failure) for failure in failures}
    kind = kinds.pop() if len(kinds) == 1 else SourceError
    pairs = zip(servers, failures, strict=True)
    text = "; ".join(_named(shown(server.text), failure.message) for server, failure in pairs)
    return kind(text, errno=failures[0].errno, hint=failures[0].hint)


def _named(server: str, message: str) -> str:
    """A provider names its object itself."""
    return message if message.startswith(server) else f"{server}: {message}"
