"""server: the coordinator's one loop: connections, events of the core, signals, the parent, and an orderly end.

Starts things in the order in which they depend on each other and ends them in the reverse; decides nothing about a
fault.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import selectors
import socket
import stat
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from pcshare import fds, probe, runtime, status, trace, units
from pcshare.coordinator.blocks import Blocks
from pcshare.coordinator.door import Door
from pcshare.coordinator.exports import Exports
from pcshare.coordinator.handshake import Handshake
from pcshare.coordinator.helpers import Helpers
from pcshare.coordinator.opening import close_sources
from pcshare.coordinator.options import (
    PAGE_SIZE_AUTO,
    STREAM_EAGER,
    STREAM_LAZY,
    STREAM_PAUSED,
    STREAM_RATE,
    Options,
)
from pcshare.coordinator.parent import ParentLink
from pcshare.coordinator.takeover import (
    DEVICE,
    EVENTS,
    EXPORT,
    HELPER_TABLE,
    INCOMING,
    KEEPER,
    LISTENER,
    NEXT_COMMAND,
    PARENT,
    SEGMENT,
    SOURCE,
    STATE,
    TOUCHED,
    HelperTable,
    KeptState,
    Predecessor,
)
from pcshare.coordinator.working_sets import WorkingSets
from pcshare.errors import PcshareError, UsageError
from pcshare.fault_thread import EventKind, FaultThreads, default_cpus
from pcshare.fds import OwnedFd
from pcshare.keeper import Keeper, read_events
from pcshare.notifier import Change, NotifierChain
from pcshare.protocol import Admin, AdminOp, Mode, Replace
from pcshare.state import State
from pcshare.store import FdStore
from pcshare.trace import TraceFile
from pcshare.transport import Connection, Listener

if TYPE_CHECKING:
    from pcshare.coordinator.incoming import IncomingMigration

log = logging.getLogger("pcshare")

REAP_INTERVAL_S = 0.25  # how soon after its death a helper without a socket is let go
SOCKET_MODE, SHARED_SOCKET_MODE = 0o600, 0o666  # shared: SO_PEERCRED decides

_BLOCK_EVENTS = (
    EventKind.BLOCK_COMPLETE,
    EventKind.BLOCK_SOURCE_ERROR,
    EventKind.BLOCK_PLACE_ERROR,
    EventKind.BLOCK_FOREIGN,
    EventKind.BLOCK_GAPS,
    EventKind.BLOCK_LATE,
)


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


class Server:
    """A coordinator in this process. start(), run() until stopped, close(); close() may be called at any time, twice,
    and after a failure half-way."""

    def __init__(
        self,
        options: Options,
        keeper: Keeper,
        parent: ParentLink | None = None,
        store: FdStore | None = None,
        predecessor: Predecessor | None = None,
    ) -> None:
        """predecessor: a coordinator that was killed, or made way; this one goes on where it was, and whatever goes
        wrong leaves everything to the next one."""
        self.options = options
        self._store = store or FdStore(None)
        self._keeper = keeper
        self._predecessor = predecessor
        if predecessor is not None and predecessor.state.keeper != self._keeper_identity():
            self._predecessor = None
            predecessor.dismiss(options.name, self._store)
        self.notifiers = NotifierChain()
        self._parent = parent
        self._selector = selectors.DefaultSelector()
        self._closing = contextlib.ExitStack()
        self._stop_read, self._stop_write = socket.socketpair()
        self._stop_write.setblocking(False)
        self._stop_reason: PcshareError | None = None
        self._stopping = False
        self._has_served = False
        self.makes_way = False  # another program goes on from here
        self._resume_mode = (STREAM_EAGER, 0)
        self.incoming: IncomingMigration | None = None
        self._ended = False  # all blocks are complete and the fault threads have joined
        if parent is not None:
            self.notifiers.add(parent.notify)

    # -- start

    def start(self) -> bool:
        """Returns when attach would succeed: whether this coordinator is the first that serves these blocks."""
        is_first = self._predecessor is None
        try:
            self._start()
        except BaseException:
            if self._predecessor is None:
                self.close()
            raise
        self._has_served, self._predecessor = True, None
        return is_first

    @property
    def is_survived(self) -> bool:
        """Whether what is served outlives this process, because nobody has ordered an end: it must then end without
        clearing up."""
        served = self._has_served or self._predecessor is not None
        return self._store.is_there and served and not self._stopping

    def _start(self) -> None:
        options, before = self.options, self._predecessor
        report = probe.require_host(options.page_size or None)
        self._check_options(report)
        taken = before.take_all(TOUCHED) if before else []
        self.working_sets = WorkingSets(options, taken, goes_on=before is not None)
        self._closing.callback(self.working_sets.close)
        self._features = before.state.features if before else _features(report, strict=options.strict)
        _raise_fd_limit()
        path = self._socket_path = before.state.socket_path if before else self._take_name()
        listening = before.take_numbered(EXPORT) if before else {}
        self._n_exports_kept = len(listening)
        self.exports = Exports(options.exports, listening)
        self._closing.callback(self.exports.close)
        segment = before.take(SEGMENT) if before else None
        self._segment = status.SegmentWriter(options.name, path, shared=options.shared, taken=segment)
        self._closing.callback(self._segment.close)
        self._segment.header.keeper_pid = self._keeper.pid
        if options.trace:
            self._closing.callback(TraceFile.start(options.trace).close)
        self.blocks = Blocks(options, self._segment, self.notifiers, self._tell_state)
        self._closing.callback(self.blocks.links.close)
        self._start_serving()
        if before is not None:
            self._take_over_blocks(before)
        else:
            self._make_blocks(report)
        self.working_sets.begin(self.blocks)
        self._set_stream(before is not None)
        self._listen(path, before.take(LISTENER) if before else None)
        if options.exports:
            self._closing.callback(self.exports.close)  # before the helpers, of which the exporter is one
            self._watch(self.exports, self.exports.handle)
        if self.incoming is None or any(self.blocks):
            self._blocks_are_served()
        self.working_sets.start()  # last: a start that fails leaves an old file as it is
        self._tell_ready(path)

    def _blocks_are_served(self) -> None:
        """All that there will ever be are there."""
        if self.options.exports:
            self.exports.start(self._socket_path, self.options.name, self.blocks)

    def _check_options(self, report: probe.HostReport) -> None:
        if self._predecessor is not None and self.options.shared:
            _check_shared(self._predecessor.state.socket_path)
        if self.options.strict:
            probe.check_strict(self.options.page_size or report.page_size, report)
        if self.options.poison and "POISON" not in report.features:
            raise UsageError(
                "--on-source-loss poison needs the userfaultfd feature POISON, which this kernel does not offer",
                hint="use --on-source-loss pause, or Linux 6.6 or later",
            )
        if self.options.takes_migration:
            if self.options.record or self.options.replay:
                raise UsageError(
                    "--record and --replay are for sources that are the same at each start, not for a machine's memory",
                    hint="leave them out",
                )
            from pcshare.coordinator.incoming import incoming_source  # late: a third of what a restart takes

            incoming_source(self.options)
        elif self.options.device_state is not None:
            raise UsageError(
                "--device-state is for an incoming migration",
                hint="name a source such as qemu+unix:PATH, or leave it out",
            )

    def _take_name(self) -> str:
        """The socket's path, once nobody living has the name and what a dead one left is gone."""
        options = self.options
        make = runtime.shared_socket_path if options.shared or options.findable else runtime.socket_path
        path = make(options.name, create_dir=True)
        if status.in_use(options.name):
            raise status.name_in_use(options.name)
        left = status.leftovers(options.name)
        if left is not None:
            if left.living_helpers and not options.replace:
                raise status.name_in_use(options.name)
            status.remove_leftovers(options.name)
            log.warning("cleared what a dead coordinator left: %s", left)
        return str(path)

    def _start_serving(self) -> None:
        """Everything that serves, and nothing yet to be served."""
        options, before = self.options, self._predecessor
        self.fault_threads = FaultThreads(self._segment.header)
        self._closing.callback(self.fault_threads.close)
        self._closing.callback(self.blocks.close)
        self._closing.callback(self.working_sets.close)  # nobody can touch anything any more, and all is still there
        self.fault_threads.set_fault_timeout(options.fault_timeout_s)
        self.fault_threads.set_read_ahead(options.read_ahead)
        self.working_sets.record_to(self.fault_threads)
        self.fault_threads.hold_stream()  # not before every block is there; we may yet die on the way
        if before is None:
            self.fault_threads.start(_cpus(options.fault_threads))
        table = before.helpers if before else HelperTable()
        self.fault_threads.keep_maps(table.fileno())
        self._closing.callback(table.close)
        if before is None:
            self._store.put(HELPER_TABLE, [table.fileno()])
        self.helpers = Helpers(
            self._segment,
            self.fault_threads,
            self._features,
            options.helpers_max,
            self._store,
            table,
            strict=probe.is_strict(self._features[Mode.RO]),  # after a takeover what it was before
        )
        self.helpers.limit_users(options.helpers_per_uid)
        self._closing.callback(self.helpers.close)

    def _make_blocks(self, report: probe.HostReport) -> None:
        if self.options.takes_migration:
            self._make_incoming([])
            return
        opened = self.blocks.open_sources(self._stop_read)
        self._closing.callback(close_sources, opened)
        self.blocks.probe(opened)
        page_size = self.options.page_size
        if page_size == PAGE_SIZE_AUTO:
            lengths = [source.used_length for source in opened]
            page_size = probe.best_page_size(lengths, report, strict=self.options.strict)
            log.info("pages of %s", units.format_bytes(page_size))
        for source in opened:
            self.blocks.add(source, page_size, self._keeper, self.fault_threads)

    def _make_incoming(self, taken: list[OwnedFd], *, was_over: bool = False) -> IncomingMigration:
        from pcshare.coordinator.incoming import IncomingMigration

        self.incoming = IncomingMigration(
            self.options,
            self.blocks,
            self._segment,
            self._keeper,
            self.fault_threads,
            self._listened,
            self._migration_over,
            taken,
            was_over=was_over,
        )
        self._closing.callback(self.incoming.close)
        return self.incoming

    def _take_over_blocks(self, before: Predecessor) -> None:
        state, kept_fds = before.state, before.take_numbered(SOURCE)
        trace.step("taking_over")
        if self.options.takes_migration:
            was_over = bool(state.blocks) and state.ram_section_id is None
            incoming = self._make_incoming([] if was_over else before.take_all(INCOMING), was_over=was_over)
            if state.blocks:
                incoming.take_over(state.blocks, state.ram_section_id)
        else:
            for kept in state.blocks:
                source = self.blocks.reopen_source(kept, next(iter(kept_fds.get(kept.index, [])), None))
                self.blocks.take_over(kept, source, self.blocks.region_of(kept), self._keeper, self.fault_threads)
        self.blocks.drop_unclaimed()
        self._keeper.sweep()
        trace.step("blocks_taken")
        events = [event for fd in before.take_all(EVENTS) for event in read_events(fd)]
        self.helpers.take_over(before.kept_helpers(self._store), self.blocks, events)
        self._store.remove(EVENTS)
        self.fault_threads.start(_cpus(self.options.fault_threads))  # nobody is served before what was read is known

    def _listened(self) -> None:
        """A migration has handed its memory out."""
        self._keep_state()
        self._blocks_are_served()

    def _migration_over(self) -> None:
        """Kept before its sockets are gone: the coordinator after this one must not wait for a source there."""
        self._keep_state()
        self._store.remove(INCOMING)

    def _set_stream(self, as_before: bool) -> None:
        """What an operator has steered since goes on."""
        mode, rate = self.options.stream_mode, self.options.stream_rate
        if mode is None:
            mode = STREAM_LAZY if self.working_sets.is_first_recording else STREAM_EAGER
        if mode != STREAM_PAUSED:
            self._resume_mode = (mode, rate)
        if as_before:
            mode, rate = int(self._segment.header.stream_mode), int(self._segment.header.stream_rate)
        self.fault_threads.set_stream(mode, rate)

    def _keep(self) -> None:
        """Leaves to the coordinator after this one what it must have."""
        store = self._store
        store.put(LISTENER, [self._listener.fileno()])
        store.put(SEGMENT, [self._segment.own_fd])
        for block in self.blocks:
            if (fd := block.source.kept_fd()) is not None:
                store.put(f"{SOURCE}{block.index}", [fd])
        self._keep_exports()
        self._keep_touched()
        if self.incoming is not None:
            store.put(INCOMING, [one.fileno() for one in self.incoming.sockets])
        if self._parent is not None:
            store.put(PARENT, [self._parent.fileno()])
        if (device := fds.inherited_uffd_device()) is not None:
            store.put(DEVICE, [device.fileno()])
        if not self.options.keeper_restarts:
            store.put(KEEPER, [self._keeper.socket_fd])
        self._keep_state()  # last: with it the rest counts

    def _keep_exports(self) -> None:
        """Those that are new: all, but where others were given with --replace."""
        for number, sockets in list(enumerate(self.exports.sockets))[self._n_exports_kept :]:
            self._store.put(f"{EXPORT}{number}", [one.fileno() for one in sockets])

    def _keep_touched(self) -> None:
        """Where what is recorded lies, if that is new."""
        if (memory := self.working_sets.new_memory) is not None:
            self._store.put(TOUCHED, [memory.fileno()])

    def _keeper_identity(self) -> tuple[int, int]:
        """Its pid and its start: no other keeper has both."""
        found = status.process_stat(self._keeper.pid)
        return self._keeper.pid, found[1] if found else 0

    def _keep_state(self) -> None:
        section_id = self.incoming.ram_section_id if self.incoming is not None else None
        state = KeptState(
            self._socket_path, self._keeper_identity(), self._features, self.blocks.describe(), section_id
        )
        with state.to_memfd() as state_fd:
            self._store.put(STATE, [state_fd.fileno()])

    def _listen(self, path: str, taken: OwnedFd | None) -> None:
        self._device = fds.open_uffd_device()
        if self._device is not None:
            self._closing.callback(self._device.close)
        self._listener = Listener(path, SHARED_SOCKET_MODE if self.options.shared else SOCKET_MODE, taken)
        self._closing.callback(self._listener.close)
        self.door = Door(self._listener, self._selector, self._handshake)
        self._closing.callback(self.door.close)
        self._watch(self._stop_read, self._drain_stop)
        self._watch(self.fault_threads, self._take_events)
        self._watch(self.blocks.links, self._hear_links)
        self._watch(self._keeper, self._keeper_gone)
        if self.incoming is not None:
            self._watch(self.incoming, self._hear_incoming)
        if self._parent is not None:
            self._watch(self._parent, self._parent_spoke)
        self.door.open()
        self._take_events()

    def _tell_ready(self, path: str) -> None:
        if self._predecessor is not None:
            self._keep_exports()
            self._keep_touched()
            self._segment.note_restart()
        else:
            self._keep()
        self._store.tell_ready()
        trace.step("ready")
        if self._parent is not None:
            self._parent.tell_ready(
                name=self.options.name,
                pid=os.getpid(),
                socket=path,
                blocks=[block.idstr for block in self.blocks],
                exports=self.exports.addresses,
            )

    def _watch(self, source: _HasFileno, call: Callable[[], None]) -> None:
        self._selector.register(source, selectors.EVENT_READ, call)

    # -- the loop

    def run(self) -> None:
        """Serves until stop(); raises what ended it otherwise."""
        self._join_if_ended()  # small blocks are complete by now
        while not self._stopping and not self.makes_way:
            self._turn()
        if self._stop_reason is not None:
            raise self._stop_reason

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._wait_s()):
            key.data()
        self.door.look()
        self.helpers.reap()
        self.exports.handle()
        self._hear_incoming()
        self._join_if_ended()

    def _wait_s(self) -> float | None:
        waits = [
            self.door.wait_s(),
            REAP_INTERVAL_S if self.helpers.has_unreaped() else None,
            self.exports.wait_s(),
            self.incoming.wait_s() if self.incoming is not None else None,
        ]
        return min((wait_s for wait_s in waits if wait_s is not None), default=None)

    @property
    def wakeup(self) -> tuple[socket.socket, socket.socket]:
        """Of run(): where it waits for a byte, and where to send it. They stay this server's."""
        return self._stop_read, self._stop_write

    def stop(self, reason: PcshareError | None = None) -> None:
        """Ends run(); from any thread and from a signal handler."""
        self._stop_reason = self._stop_reason or reason
        self._stopping = True
        with contextlib.suppress(OSError):  # full: it is awake; closed: it has ended
            self._stop_write.send(b"\0")

    def _drain_stop(self) -> None:
        self._stop_read.recv(4096)

    def _keeper_gone(self) -> None:
        self.stop(PcshareError("the keeper is gone: no page can be placed any more", errno=errno.EPIPE))

    def _parent_spoke(self) -> None:
        assert self._parent is not None
        if not self._parent.drain():
            log.info("the program that started this coordinator has ended")
            self.stop()

    def _handshake(self, connection: Connection) -> Handshake:
        return Handshake(
            connection,
            self.options,
            self.blocks,
            self.helpers,
            self._features,
            self._device,
            self._segment.fd,
            self._carry_out,
        )

    # -- events of the core

    def _take_events(self) -> None:
        for event in self.fault_threads.events():
            if event.kind is EventKind.BLOCK_REPLAYED:
                self.working_sets.block_replayed(event.block_index)
            elif event.kind not in _BLOCK_EVENTS:
                self.helpers.handle(event)
            elif self.blocks.handle(event):
                self._end_block(event.block_index)

    def _hear_links(self) -> None:
        self._take_events()  # what the core told before the link's change belongs before it
        self.blocks.hear_links(self.fault_threads)

    def _hear_incoming(self) -> None:
        if self.incoming is not None:
            self.incoming.handle()

    def _end_block(self, index: int) -> None:
        """Helpers are told first: each unregisters on its own; then our own mappings are plain memory."""
        block = self.blocks.by_index(index)
        self.helpers.tell_end(block)
        trace.step("end_told", block_index=index)
        self.fault_threads.complete_block(index)
        self._store.remove(f"{SOURCE}{index}")
        block.source.let_go()
        trace.step("end_done", block_index=index)
        log.info("block %s is complete", block.idstr)
        self.working_sets.block_replayed(index)
        if self.incoming is not None:
            self.incoming.block_ended()

    def _join_if_ended(self) -> None:
        """When nobody can fault any more the fault threads have nothing left to do."""
        if self._ended or len(self.helpers) or not self.blocks.all_ended():
            return
        if self.incoming is not None and not self.incoming.is_over:
            return
        self._ended = True
        self._selector.unregister(self.fault_threads)
        self.fault_threads.stop()
        self.working_sets.save_soon()
        self.notifiers.notify(Change.INBOUND_END)

    def _tell_state(self, idstr: str, state: State, reason: str) -> None:
        if self._parent is not None:
            self._parent.send(event="state", block=idstr, state=state.name, reason=reason)

    # -- orders

    def _carry_out(self, order: Admin | Replace) -> None:
        if isinstance(order, Replace):
            self._make_way(order)
        else:
            self._steer(order)

    def _make_way(self, order: Replace) -> None:
        """The keeper starts the other one when we have gone."""
        if self.makes_way:
            raise PcshareError("another program takes this coordinator's place already", errno=errno.EBUSY)
        if not self._store.is_there or not self.options.keeper_restarts:
            raise UsageError(
                "this coordinator has no keeper that could start another one in its place",
                errno=errno.EOPNOTSUPP,
                hint="start it without --no-keeper",
            )
        own = [*sys.argv[1:]]
        end = own.index("--") if "--" in own else len(own)
        words = [*order.program, *own[:end], *order.options, *own[end:]]
        with OwnedFd(os.memfd_create("pcshare-next", os.MFD_CLOEXEC)) as command:
            os.pwrite(command.fileno(), b"".join(os.fsencode(word) + b"\0" for word in words), 0)
            self._store.put(NEXT_COMMAND, [command.fileno()])
        self.makes_way = True
        trace.step("makes_way")
        self._stop_write.send(b"\0")

    def leave(self) -> None:
        """Lets go of the sources, politely, and of nothing else: the next one goes on with the rest."""
        self.exports.end_exporter()
        self.fault_threads.stop()
        self.working_sets.close()
        self.blocks.close()

    def _steer(self, order: Admin) -> None:
        modes = {
            AdminOp.STREAM_EAGER: (STREAM_EAGER, 0),
            AdminOp.STREAM_LAZY: (STREAM_LAZY, 0),
            AdminOp.STREAM_RATE: (STREAM_RATE, order.argument),
            AdminOp.STREAM_RESUME: self._resume_mode,
        }
        if order.op.name.startswith("STREAM_") and self.incoming is not None:
            raise UsageError(
                "a migration's source sends when and as fast as it likes",
                errno=errno.EOPNOTSUPP,
                hint="set max-postcopy-bandwidth there",
            )
        if order.op is AdminOp.STOP:
            self.stop()
        elif order.op is AdminOp.RESUME:
            self._hear_links()  # what was told before the order must not pause what it resumes
            self.blocks.resume(self.fault_threads)
            if self.incoming is not None:
                self.incoming.retry_now()
        elif order.op is AdminOp.STREAM_PAUSE:
            self.fault_threads.set_stream(STREAM_PAUSED)
        elif order.op is AdminOp.STREAM_RATE and order.argument <= 0:
            raise UsageError("a rate is at least 1 byte a second", errno=errno.EINVAL)
        else:
            self._resume_mode = modes[order.op]
            self.fault_threads.set_stream(*self._resume_mode)

    # -- end

    def close(self) -> None:
        """Says BYE to helpers, frees blocks, removes socket and status segment, and leaves nothing to anybody."""
        self._store.tell_stopping()
        self._closing.close()
        self._store.remove_all()
        self._store.close()
        self._selector.close()
        self._keeper.close()
        self._stop_read.close()
        self._stop_write.close()


def _features(report: probe.HostReport, *, strict: bool) -> dict[Mode, int]:
    """What helpers' uffds are opened with."""
    return {mode: probe.wanted_features(report.features, writing=mode is Mode.RW, strict=strict) for mode in Mode}


def _check_shared(socket_path: str) -> None:
    """A socket that was made for its own user is not opened to others while it is in use."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_IMODE(os.stat(socket_path).st_mode) != SHARED_SOCKET_MODE:
            raise UsageError(
                "other users cannot be let in by --replace: the socket of this coordinator is its own user's alone",
                hint="stop it, and start it with --allow-uid or --allow-gid",
            )


def _cpus(wanted: int | None) -> list[int]:
    """One pinned thread a CPU; more threads than CPUs are not pinned."""
    cpus = sorted(os.sched_getaffinity(0))
    if wanted is None:
        return default_cpus()
    return cpus[:wanted] + [-1] * (wanted - len(cpus))


def _raise_fd_limit() -> None:
    """Two fds a helper: the soft limit is for programs that use select."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
