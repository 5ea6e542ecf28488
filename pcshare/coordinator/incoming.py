"""incoming: a migration as the coordinator's loop sees it: how far it is, who may connect, what is waited for.

Two tables decide: what becomes of a connection, and of the migration when its main connection ends. Reading is the
threads': reception for a main connection, records alone for a preempt channel; they ask the loop, where alone a phase
changes and blocks are made, handed out and forgotten. No page is touched here.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum

from pcshare.coordinator.arrivals import Arrival, Arrivals, Verdict
from pcshare.coordinator.blocks import Blocks
from pcshare.coordinator.calls import Calls
from pcshare.coordinator.device_state import DeviceStateFile
from pcshare.coordinator.inbound import Inbound
from pcshare.coordinator.options import PAGE_SIZE_AUTO, STREAM_EAGER, Options
from pcshare.coordinator.reception import FAILED, TARGET_PAGE_SIZE, Reception, SourceIncomplete, send_message
from pcshare.coordinator.takeover import KeptBlock
from pcshare.errors import MigrationError, PcshareError, UsageError
from pcshare.fault_thread import FaultThreads
from pcshare.fds import OwnedFd
from pcshare.incoming import IncomingStream
from pcshare.keeper import Keeper
from pcshare.migration.return_path import shut
from pcshare.migration.wire import Announcement, ConnectionKind, Header, PostcopyAdvise
from pcshare.signals import signals_blocked
from pcshare.sources import LinkState, SourceSpec
from pcshare.state import State
from pcshare.status import SegmentWriter
from pcshare.units import format_bytes

log = logging.getLogger("pcshare")

PROGRESS_INTERVAL_S = 0.5  # how often what is waited for is said anew while pages come in precopy
SILENT_SOURCE_S = 60.0  # before LISTEN a source that was silent for so long makes room for another one
LAST_WORD_TIMEOUT_S = 0.1  # for SHUT to leave, in the loop: the socket's buffer is empty but for a few PONGs


class Phase(Enum):
    """How far the migration is."""

    WAITING = "no source has come"
    PRECOPY = "a migration is under way"
    POSTCOPY = "its memory is handed out, and the source is there"
    PAUSED = "its memory is handed out, and the source is away"
    RECOVERING = "a source is taking it up again"
    OVER = "it is over"


# What a connection is good for, in which phase. What is not here is hung up on.
_ARRIVALS: dict[tuple[Phase, ConnectionKind], Verdict] = {
    (Phase.WAITING, ConnectionKind.MIGRATION): Verdict.TAKE,
    (Phase.PRECOPY, ConnectionKind.PREEMPT): Verdict.KEEP,  # LISTEN is on its way on the other connection
    (Phase.POSTCOPY, ConnectionKind.PREEMPT): Verdict.TAKE,
    (Phase.POSTCOPY, ConnectionKind.RECOVERY): Verdict.KEEP,  # the source may know before us that the link is dead
    (Phase.PAUSED, ConnectionKind.RECOVERY): Verdict.TAKE,
    (Phase.RECOVERING, ConnectionKind.RECOVERY): Verdict.KEEP,  # the other one may be a stranger
    (Phase.RECOVERING, ConnectionKind.PREEMPT): Verdict.KEEP,
}

_WHAT_COMES = {
    ConnectionKind.MIGRATION: "a new migration",
    ConnectionKind.RECOVERY: "the rest of a migration that broke",
    ConnectionKind.PREEMPT: "pages beside a migration",
    ConnectionKind.MULTIFD: "a part of a migration that uses multifd",
}
_MULTIFD = (
    "the source sends pages on several connections (multifd), which is not done here; switch the capability multifd "
    "off at the source (migrate_set_capability multifd off)"
)

# What becomes of the migration when its main connection ends before the migration does.
_AFTER_LOSS = {
    Phase.PRECOPY: Phase.WAITING,
    Phase.POSTCOPY: Phase.PAUSED,
    Phase.RECOVERING: Phase.PAUSED,
}


class _Connection:
    """One that is read, by a thread of its own."""

    def __init__(self, name: str, arrival: Arrival, stream: IncomingStream, run: Callable[[_Connection], None]) -> None:
        self.host, self.peer, self.number = arrival.host, arrival.peer, arrival.number
        self.stream = stream
        self._thread = threading.Thread(target=run, args=(self,), name=name)

    def start(self) -> None:
        """PcshareError: no thread can be had; the connection is closed."""
        try:
            with signals_blocked():
                self._thread.start()
        except RuntimeError as error:
            self.stream.close()
            raise PcshareError(f"a thread to read it: {error}", errno=errno.EAGAIN) from error

    def close(self) -> None:
        """Its thread has left its last word with the loop, or gets no answer any more."""
        self.stream.stop()
        self._thread.join()
        self.stream.close()


class IncomingMigration:
    """A coordinator's only source. close() may be called at any time, twice. Called in the loop: on_served, when blocks
    have been handed out; on_over, before nobody can connect any more."""

    def __init__(
        self,
        options: Options,
        blocks: Blocks,
        segment: SegmentWriter,
        keeper: Keeper,
        fault_threads: FaultThreads,
        on_served: Callable[[], None],
        on_over: Callable[[], None],
        taken: Sequence[OwnedFd] = (),
        *,
        was_over: bool = False,
    ) -> None:
        """taken: sockets that listen already. was_over: before this coordinator took over; nobody may connect."""
        self._spec = incoming_source(options)
        self._options = options
        self._blocks = blocks
        self._segment = segment
        self._keeper = keeper
        self._fault_threads = fault_threads
        self._on_served = on_served
        self._on_over = on_over
        self._device_state = DeviceStateFile(options.device_state) if options.device_state else None
        self._phase = Phase.WAITING
        self._inbound: Inbound | None = None
        self._main: _Connection | None = None
        self._preempt: list[_Connection] = []
        self._broken_by = ""  # what else than the main connection ended it
        self._multifd: Arrival | None = None  # a connection of multifd's that came before its main connection spoke
        self._heard = (0, 0.0)  # how many bytes of precopy had come, and when that changed
        self._last_words = ""  # why the last source did not do
        self._machine = ""
        self._away_since_s: float | None = None
        self._gave_up = False
        self._progress_at_s: float | None = None
        self._complete = threading.Event()  # every block is, or the end has come
        self.calls = Calls()
        self._arrivals = Arrivals(None if was_over else self._spec.target, self._judge, self._is_idle, taken)
        self._epoll = select.epoll()
        for one in (self.calls, self._arrivals):
            self._epoll.register(one.fileno(), select.EPOLLIN)
        self._say_what_is_awaited()

    @property
    def addresses(self) -> list[str]:
        """Where a source is to go, as bound."""
        prefix = "qemu+unix:" if self._spec.scheme == "qemu+unix" else "qemu+tcp://"
        return [f"{prefix}{address}" for address in self._arrivals.addresses]

    @property
    def sockets(self) -> list[socket.socket]:
        return self._arrivals.sockets

    @property
    def ram_section_id(self) -> int | None:
        """Of a migration that has come to LISTEN and is not over."""
        handed_out = self._phase in (Phase.POSTCOPY, Phase.PAUSED, Phase.RECOVERING)
        return self._inbound.ram_section.section_id if handed_out and self._inbound is not None else None

    def take_over(self, kept: Sequence[KeptBlock], ram_section_id: int | None) -> None:
        """Goes on where a coordinator before this one was: the source must take up again what it has not sent. None: it
        was over."""
        self._inbound = Inbound(self._spec, self._blocks, self._keeper, self._fault_threads)
        self._inbound.take_over(kept, ram_section_id or 0)
        missing = self._inbound.missing_pages()
        if ram_section_id is None and missing:
            self._fail("the source", SourceIncomplete(f"it has ended, and {missing} pages never came"))
        elif ram_section_id is None:
            self._end()
        else:
            self._await_recovery()

    def _await_recovery(self) -> None:
        self._away_since_s = time.monotonic()
        self._enter(Phase.PAUSED)
        self._report_link("its connection ended with the coordinator before this one", is_away=True)

    @property
    def is_over(self) -> bool:
        """No connection is read, and none will be."""
        return self._phase is Phase.OVER

    # -- the loop's side

    def fileno(self) -> int:
        return self._epoll.fileno()

    def handle(self) -> None:
        """Readable, or wait_s() is over."""
        self.calls.run()
        self._arrivals.handle()
        now = time.monotonic()
        if self._progress_at_s is not None and now >= self._progress_at_s:
            self._say_what_is_awaited()
        if not self._gave_up and self._patience_ends_s() <= now:
            self._give_up()

    def wait_s(self) -> float | None:
        """How soon handle() is wanted even if nothing is readable; None: not before."""
        now = time.monotonic()
        waits = [] if (silent_s := self._arrivals.drop_silent()) is None else [silent_s]
        if self._progress_at_s is not None:
            waits.append(self._progress_at_s - now)
        if not self._gave_up and self._patience_ends_s() < float("inf"):
            waits.append(self._patience_ends_s() - now)
        return max(0.0, min(waits)) if waits else None

    def block_ended(self) -> None:
        """One of the blocks is complete."""
        if self._blocks.all_ended():
            self._complete.set()

    def retry_now(self) -> None:
        """An operator mended something: only the source can do more."""
        if self._phase is Phase.PAUSED:
            log.warning("only the source can mend it: migrate there again, with resume, to %s", self._where())

    # -- who connects

    def _is_idle(self) -> bool:
        return self._main is None

    def _judge(self, arrival: Arrival, kind: ConnectionKind) -> Verdict:
        verdict = _ARRIVALS.get((self._phase, kind), Verdict.REFUSE)
        why = self._phase.value
        if kind is ConnectionKind.PREEMPT and not self._may_be_preempt(arrival):
            verdict = Verdict.REFUSE
        elif kind is ConnectionKind.MULTIFD:
            why = _MULTIFD
            self._multifd_came(arrival)
        elif kind is ConnectionKind.MIGRATION and self._uses_multifd(arrival):
            verdict, why = Verdict.REFUSE, _MULTIFD
        elif kind is ConnectionKind.MIGRATION and self._make_room():
            verdict = Verdict.KEEP
        if verdict is Verdict.TAKE:
            verdict, why = self._try_to_take(arrival, kind)
        if verdict is Verdict.REFUSE:
            log.warning("%s is hung up on: it brings %s, but %s", arrival.peer, _WHAT_COMES[kind], why)
        return verdict

    def _may_be_preempt(self, arrival: Arrival) -> bool:
        """Nothing in it says whose it is: the first from the source's own host."""
        return not self._preempt and self._main is not None and arrival.host == self._main.host

    def _multifd_came(self, arrival: Arrival) -> None:
        """Connects after its main connection, from the same host; which of them speaks first is open."""
        if self._phase is Phase.WAITING:
            self._multifd = arrival
            self._last_words = _MULTIFD
            self._say_what_is_awaited()
        elif self._phase is Phase.PRECOPY and self._main is not None and _is_of(arrival, self._main):
            self._refuse_main(_MULTIFD)

    def _uses_multifd(self, arrival: Arrival) -> bool:
        return self._phase is Phase.WAITING and self._multifd is not None and _is_of(self._multifd, arrival)

    def _make_room(self) -> bool:
        """For a new migration, before LISTEN: a source that is silent for long may be dead, and nothing is lost with
        what it sent."""
        if self._phase is not Phase.PRECOPY or self._main is None:
            return False
        silent_s = self._silent_s()
        if silent_s < SILENT_SOURCE_S:
            return False
        self._refuse_main(f"another source came, and this one was silent for {silent_s:.0f} s")
        return True

    def _silent_s(self) -> float:
        """For how long precopy has brought nothing."""
        assert self._main is not None
        came, now = self._main.stream.counters().bytes, time.monotonic()
        if came != self._heard[0]:
            self._heard = came, now
        return now - self._heard[1]

    def _refuse_main(self, why: str) -> None:
        """Before LISTEN: the source hears that its machine goes on there, if it has opened a way to tell it."""
        assert self._main is not None
        assert self._inbound is not None
        if self._broken_by:
            return
        self._broken_by = why
        with contextlib.suppress(PcshareError):
            send_message(self._inbound.core, shut(FAILED))
            self._inbound.core.flush(LAST_WORD_TIMEOUT_S)
        self._main.stream.stop()

    def _try_to_take(self, arrival: Arrival, kind: ConnectionKind) -> tuple[Verdict, str]:
        """For want of fds or memory it may not be taken: what goes on here goes on."""
        try:
            if kind is ConnectionKind.MIGRATION:
                self._inbound = Inbound(self._spec, self._blocks, self._keeper, self._fault_threads)
            self._take(arrival, kind)
        except (PcshareError, OSError) as error:
            if kind is ConnectionKind.MIGRATION:
                self._close_inbound()
            return Verdict.REFUSE, f"it cannot be taken: {error}"
        return Verdict.TAKE, ""

    def _take(self, arrival: Arrival, kind: ConnectionKind) -> None:
        assert self._inbound is not None
        stream = IncomingStream(self._inbound.core, arrival.detach())
        if kind is ConnectionKind.PREEMPT:
            connection = _Connection("pcshare-preempt", arrival, stream, self._run_preempt)
            connection.start()
            self._preempt.append(connection)
            return
        recovers = kind is ConnectionKind.RECOVERY
        reception = Reception(self._inbound.core, stream, _Asking(self), self._inbound.ram_section, recovers=recovers)
        connection = _Connection(
            "pcshare-incoming", arrival, stream, lambda connection: self._run_main(connection, reception)
        )
        connection.start()
        self._main, self._multifd, self._heard = connection, None, (0, time.monotonic())
        self._enter(Phase.RECOVERING if recovers else Phase.PRECOPY)

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._say_what_is_awaited()
        self._arrivals.look_again()

    # -- threads

    def _run_main(self, connection: _Connection, reception: Reception) -> None:
        error: Exception | None = None
        try:
            reception.run()
        except Exception as raised:  # whatever it is, the loop must know that nobody reads any more
            error = raised
        self.calls.tell(lambda: self._main_ended(connection, error))

    def _run_preempt(self, connection: _Connection) -> None:
        """Bare records to the end mark, or to a hang-up between two of them: newer sources have no mark, and one whose
        link broke there ends its main connection itself."""
        error: Exception | None = None
        try:
            connection.stream.records()
        except Exception as raised:
            error = raised
        self.calls.tell(lambda: self._preempt_ended(connection, error))

    def _main_ended(self, connection: _Connection, error: Exception | None) -> None:
        if self._main is not connection:
            return
        self._close_connections()
        if error is None:
            self._end()
        elif isinstance(error, SourceIncomplete):
            self._fail(connection.peer, error)
        elif not isinstance(error, PcshareError | OSError):
            raise error
        else:
            self._lose(connection.peer, error)

    def _close_connections(self) -> None:
        for one in (*self._preempt, *([self._main] if self._main else [])):
            one.close()
        self._main = None
        self._preempt.clear()

    def _preempt_ended(self, connection: _Connection, error: Exception | None) -> None:
        """A channel that brought pages and breaks is the end of the link; another one was a stranger's."""
        if connection not in self._preempt:
            return
        counters = connection.stream.counters()
        self._preempt.remove(connection)
        connection.close()
        if error is None or self._main is None or self._complete.is_set():
            return
        if not isinstance(error, PcshareError | OSError):
            raise error
        log.warning("%s, preempt channel: %s", connection.peer, error)
        if counters.data_pages or counters.zero_pages or counters.fill_pages:
            self._broken_by = f"its preempt channel: {error}"
            self._main.stream.stop()

    # -- what the reception asks for

    def source_came(self, header: Header) -> None:
        self._machine = header.machine
        log.info("a migration of a machine %s comes in", header.machine)

    def announce(self, blocks: tuple[Announcement, ...], advise: PostcopyAdvise | None) -> None:
        assert self._inbound is not None
        self._check_wanted()
        self._inbound.announce(blocks)
        page_sizes = 0 if advise is None else advise.page_sizes
        for one in blocks:
            page_sizes |= one.page_size or TARGET_PAGE_SIZE
        self._segment.describe_source(self._machine, TARGET_PAGE_SIZE, page_sizes)
        self._say_what_is_awaited()

    def discard_begins(self) -> None:
        self._blocks.discard_begins()

    def keep_device_state(self, content: bytes) -> None:
        """In the reception's thread."""
        if self._device_state is not None:
            self._device_state.write(content)

    def listen(self, is_all: bool) -> None:
        assert self._inbound is not None
        self._check_wanted()
        if is_all:
            self._inbound.require_all()
        self._inbound.listen()
        self._enter(Phase.POSTCOPY)
        self._on_served()

    def _check_wanted(self) -> None:
        """Before LISTEN. MigrationError: the source has been told already that it is not."""
        if self._broken_by:
            raise MigrationError(self._broken_by)

    def run(self) -> None:
        self._blocks.run()

    def resumed(self) -> None:
        assert self._inbound is not None
        self._away_since_s = None
        if self._gave_up:
            self._gave_up = False
            self._inbound.core.give_up(0)
        self._enter(Phase.POSTCOPY)
        self._report_link("", is_away=False)

    def missing_pages(self) -> int:
        assert self._inbound is not None
        return self._inbound.missing_pages()

    def wait_until_complete(self, timeout_s: float) -> bool:
        """In the reception's thread."""
        return self._complete.wait(timeout_s)

    # -- how it goes on, and ends

    def _lose(self, peer: str, error: Exception) -> None:
        """The main connection has ended before the migration has."""
        reason = self._broken_by or str(error)
        self._broken_by = ""
        phase = _AFTER_LOSS[self._phase]
        if phase is Phase.WAITING:
            log.warning("%s: the migration is dropped: %s", peer, reason)
            self._last_words = reason
            self._forget()
        else:
            if self._phase is Phase.RECOVERING:
                log.warning("%s: the recovery ended: %s", peer, reason)
            self._away_since_s = self._away_since_s or time.monotonic()
            self._report_link(reason, is_away=True)
        self._enter(phase)

    def _forget(self) -> None:
        """Nothing was handed out: the next source begins anew."""
        self._blocks.forget(self._fault_threads)
        self._segment.describe_source("", 0, 0)
        self._close_inbound()

    def _close_inbound(self) -> None:
        if self._inbound is not None:
            self._inbound.close()
            self._inbound = None

    def _end(self) -> None:
        """Every byte is here, and the source knows."""
        self._finish()
        self._close_inbound()
        log.info("the migration is complete")

    def _fail(self, peer: str, error: SourceIncomplete) -> None:
        """What has not come never will: the source has let go of it."""
        log.error("%s: %s", peer, error)
        self._finish()
        if self._options.poison:
            self._give_up_requests()
        self._report_link(str(error), is_away=True, cure="it will not come back")

    def _finish(self) -> None:
        """No source is wanted any more."""
        self._phase = Phase.OVER
        self._on_over()
        self._arrivals.end()
        self._say_what_is_awaited()

    def _patience_ends_s(self) -> float:
        if not self._options.poison or self._away_since_s is None:
            return float("inf")
        return self._away_since_s + self._options.source_timeout_s

    def _give_up(self) -> None:
        """The policy: who waits is told that what is missing is lost, until a source comes back after all."""
        self._give_up_requests()
        waited_s = self._options.source_timeout_s
        log.warning("no source has come back within %g s: touching what is missing is SIGBUS", waited_s)
        self._report_link(f"no source has come back within {waited_s:g} s", is_away=True)

    def _give_up_requests(self) -> None:
        assert self._inbound is not None
        self._gave_up = True
        self._inbound.core.give_up(errno.EIO)

    def _report_link(self, reason: str, *, is_away: bool, cure: str = "") -> None:
        state = LinkState(
            is_away=is_away,
            reason=reason,
            server="the source",
            gave_up=self._gave_up,
            cure=cure or f"waiting for it at {self._where()}",
        )
        for block in self._blocks:
            if block.state is not State.END:
                self._blocks.links.of_block(block.index)(state)

    # -- what is said

    def _where(self) -> str:
        return " or ".join(self.addresses)

    def _say_what_is_awaited(self) -> None:
        """To who attaches, and to `pcshare status`."""
        self._progress_at_s = None
        text = ""
        if self._phase is Phase.WAITING:
            text = f"waiting for a source at {self._where()}"
            text += f" (the last one: {self._last_words})" if self._last_words else ""
        elif self._phase is Phase.PRECOPY and self._main is not None:
            self._progress_at_s = time.monotonic() + PROGRESS_INTERVAL_S
            self._silent_s()
            came = self._heard[0]
            text = f"waiting for LISTEN: precopy, {format_bytes(came)} received from {self._main.peer}"
        self._blocks.waiting_for = text
        if self._phase is Phase.PAUSED and self._blocks.all_ended():
            text = f"every page is here, but the source does not know: waiting for it at {self._where()}"
        self._segment.set_text(text)

    # -- end

    def close(self) -> None:
        """Hangs up. Twice is fine. The fault threads end afterwards."""
        self.calls.end()
        self._complete.set()  # who waits for it looks, and finds that the loop has ended
        self._close_connections()
        self._close_inbound()
        self._arrivals.close()
        self.calls.close()
        self._epoll.close()


def _is_of(multifd: Arrival, main: Arrival | _Connection) -> bool:
    """Nothing in it says whose it is: a source's other connections come from its host, after its first."""
    return multifd.host == main.host and multifd.number > main.number


class _Asking:
    """What a reception asks for, from its thread."""

    def __init__(self, migration: IncomingMigration) -> None:
        self._migration = migration
        self._ask = migration.calls.ask

    def source_came(self, header: Header) -> None:
        self._ask(lambda: self._migration.source_came(header))

    def announce(self, blocks: tuple[Announcement, ...], advise: PostcopyAdvise | None) -> None:
        self._ask(lambda: self._migration.announce(blocks, advise))

    def discard_begins(self) -> None:
        self._ask(self._migration.discard_begins)

    def listen(self, device_state: bytes, *, is_all: bool) -> None:
        self._migration.keep_device_state(device_state)
        self._ask(lambda: self._migration.listen(is_all))

    def run(self) -> None:
        self._ask(self._migration.run)

    def resumed(self) -> None:
        self._ask(self._migration.resumed)

    def missing_pages(self) -> int:
        return self._ask(self._migration.missing_pages)

    def wait_until_complete(self, timeout_s: float) -> bool:
        return self._migration.wait_until_complete(timeout_s)


def incoming_source(options: Options) -> SourceSpec:
    """The one source of a coordinator that takes a migration. UsageError: options that do not go with it."""
    (spec,) = options.sources
    if options.stream_mode not in (None, STREAM_EAGER):
        raise UsageError(
            f"--stream: {spec.text} sends when and as fast as it likes",
            hint="leave it out, and set max-postcopy-bandwidth at the source",
        )
    if options.page_size not in (TARGET_PAGE_SIZE, PAGE_SIZE_AUTO):
        raise UsageError(
            f"--page-size: the blocks of {spec.text} have the pages that they have there",
            hint="leave it out, and back the source's memory with huge pages",
        )
    return spec
