"""fault_thread: skin over the core's fault threads: what Python adds, removes and hears.

No fault passes through here (P9): Python decides who is served and reacts to events, the core serves.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from pcshare.core import ffi, lib
from pcshare.errors import PcshareError, check
from pcshare.fds import OwnedFd
from pcshare.ramblock import RAMBlock

log = logging.getLogger("pcshare")

# By default one fault thread a CPU, up to so many. The thread on the CPU that faulted wakes no other one; where waking
# another CPU costs little, threads on more CPUs win nothing.
FAULT_THREADS_FEW, FAULT_THREADS_MANY = 4, 16
WAKE_DEAR_NS = 10_000  # so much more for another CPU than for one's own
WAKE_COST_ROUNDS = 40  # some milliseconds
DEMANDS_IN_FLIGHT_MAX = int(lib.FAULT_DEMANDS_IN_FLIGHT_MAX)
REQUESTS_IN_FLIGHT_MAX = int(lib.FAULT_REQUESTS_IN_FLIGHT_MAX)

_RUN = struct.Struct("=QII")  # struct working_set_run


class EventKind(IntEnum):
    """What the core tells."""

    BLOCK_COMPLETE = 1
    BLOCK_SOURCE_ERROR = 2
    BLOCK_PLACE_ERROR = 4
    BLOCK_FOREIGN = 8
    BLOCK_GAPS = 16
    REMOTE_LEFT = 32
    REMOTE_HUNG_UP = 64
    REMOTE_DISABLED = 128
    BLOCK_LATE = 256
    BLOCK_REPLAYED = 512


@dataclass(frozen=True)
class FaultEvent:
    """error is a positive errno or 0; offset is in bytes of the block, or for a remote fd an address."""

    kind: EventKind
    block_index: int
    remote_id: int
    error: int
    offset: int


def wake_cost_ns(cpu_a: int, cpu_b: int, rounds: int = WAKE_COST_ROUNDS) -> int:
    """What it costs a thread on one CPU to wake one that sleeps on the other, or on the same; median, ns."""
    cost_ns = ffi.new("uint64_t *")
    check(lib.wake_cost_measure(cpu_a, cpu_b, rounds, cost_ns), f"measuring a wake-up between CPU {cpu_a} and {cpu_b}")
    return int(cost_ns[0])


def default_cpus() -> list[int]:
    """One fault thread for each of the first CPUs this process may use: how many is measured where there are many."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) <= FAULT_THREADS_FEW:
        return cpus
    try:
        own_ns, other_ns = wake_cost_ns(cpus[0], cpus[0]), wake_cost_ns(cpus[0], cpus[len(cpus) // 2])
    except PcshareError as error:  # no thread left, a CPU that went away: no reason not to serve
        log.warning("%s: %d fault threads", error, FAULT_THREADS_FEW)
        return cpus[:FAULT_THREADS_FEW]
    log.debug("waking a thread costs %d ns on its own CPU, %d ns on another one", own_ns, other_ns)
    return cpus[: FAULT_THREADS_MANY if other_ns - own_ns > WAKE_DEAR_NS else FAULT_THREADS_FEW]


def _packed(runs: Iterable[tuple[int, int, int]]) -> Any:
    """struct working_set_run[] of runs (page, how many, block index); keeps its bytes alive."""
    return ffi.from_buffer("struct working_set_run[]", b"".join(_RUN.pack(*run) for run in runs))


class FaultThreads:
    """The set of fault threads with what they serve."""

    def __init__(self, status_header: Any) -> None:
        pointer = ffi.new("struct fault_threads **")
        check(lib.fault_threads_new(pointer, status_header), "making the fault threads")
        self.pointer: Any = pointer[0]
        self.running = False

    def start(self, cpus: Sequence[int]) -> None:
        """One thread a CPU in the list, pinned to it (-1: not pinned). Returns when all run."""
        check(
            lib.fault_threads_start(self.pointer, ffi.new("int32_t[]", list(cpus)), len(cpus)),
            "starting the fault threads",
        )
        self.running = True

    def stop(self) -> None:
        """Quits and joins. Twice is fine."""
        lib.fault_threads_stop(self.pointer)
        self.running = False

    def close(self) -> None:
        """Stops and frees everything that was added. Twice is fine."""
        if self.pointer != ffi.NULL:
            lib.fault_threads_free(self.pointer)
            self.pointer = ffi.NULL
            self.running = False

    def fileno(self) -> int:
        """Readable when an event waits."""
        return int(lib.fault_threads_event_fd(self.pointer))

    def events(self) -> Iterator[FaultEvent]:
        """The events that wait."""
        event = ffi.new("struct fault_event *")
        while lib.fault_threads_next_event(self.pointer, event):
            yield FaultEvent(EventKind(event.kind), event.block_index, event.remote_id, event.error, event.offset)

    def add_block(self, block: RAMBlock, channel: Any, *, poison: bool) -> None:
        """Block and channel belong to the fault threads from here on, also on failure."""
        policy = lib.SOURCE_LOSS_POISON if poison else lib.SOURCE_LOSS_PAUSE
        check(lib.fault_threads_add_block(self.pointer, block.pointer, channel, policy), f"serving block {block.idstr}")

    def remove_block(self, index: int) -> None:
        check(lib.fault_threads_remove_block(self.pointer, index), "removing a block")

    def complete_block(self, index: int) -> None:
        check(lib.fault_threads_complete_block(self.pointer, index), "ending a block")

    def resume_block(self, index: int) -> None:
        check(lib.fault_threads_resume_block(self.pointer, index), "resuming a block")

    def set_fault_timeout(self, timeout_s: float) -> None:
        """How long a page that somebody waits for may take (0: for ever) before it is told and, with poison, lost.
        Before start."""
        lib.fault_threads_set_fault_timeout(self.pointer, max(1, round(timeout_s * 1000)) if timeout_s else 0)

    def set_read_ahead(self, length: int) -> None:
        """How many bytes a thread that reads on is kept ahead of at most; 0: a fault brings its page alone. Before
        start."""
        lib.fault_threads_set_read_ahead(self.pointer, length)

    def set_stream(self, mode: int, rate: int = 0) -> None:
        """mode: STATUS_STREAM_*; rate in bytes a second."""
        lib.fault_threads_set_stream(self.pointer, mode, rate)

    def hold_stream(self) -> None:
        """Nothing is streamed before set_stream; the status goes on saying what it says."""
        lib.fault_threads_hold_stream(self.pointer)

    def record(self, fd: int, runs_max: int) -> None:
        """Notes which pages helpers are the first to wait for, runs_max runs at most, in a file of memory, which may
        hold what the coordinator before this one noted. Before there are blocks. RemoteProtocolError: it holds
        something else."""
        check(lib.fault_threads_record(self.pointer, fd, runs_max), "recording a working set")

    def recorded(self, first: int) -> list[tuple[int, int, int]]:
        """The runs from the first-th on: page, how many, block index. The last one may still grow."""
        runs = ffi.new("const struct working_set_run **")
        n_runs = lib.fault_threads_recorded(self.pointer, runs)
        if n_runs <= first:
            return []
        return list(_RUN.iter_unpack(ffi.buffer(runs[0] + first, (n_runs - first) * _RUN.size)))

    def note_runs(self, runs: Iterable[tuple[int, int, int]]) -> None:
        """Notes runs (page, how many, block index) as if they were touched now."""
        rows = _packed(runs)
        check(lib.fault_threads_note_runs(self.pointer, rows, len(rows)), "noting a working set")

    def replay(self, runs: Iterable[tuple[int, int, int]]) -> None:
        """Asks for runs (page, how many, block index) in this order, ahead of the background. Ends with BLOCK_REPLAYED
        for each block that has one."""
        rows = _packed(runs)
        check(lib.fault_threads_replay(self.pointer, rows, len(rows)), "replaying a working set")

    def piece_bytes(self, index: int) -> int:
        """What the stream asks the source of a block for at a time."""
        return int(lib.fault_threads_piece_bytes(self.pointer, index))

    def add_remote(
        self,
        block: RAMBlock,
        uffd: OwnedFd,
        control: OwnedFd,
        maps: Sequence[tuple[int, int, int]],
        status: Any,
        *,
        has_events: bool = False,
        strict: bool = False,
        kept_slot: int = 0,
    ) -> int:
        """A helper's uffd with its maps (client_addr, offset in the block, length; bytes). Both fds are consumed.
        has_events: it may write the block, and its uffd tells what it removes and moves; strict: it is registered for
        MINOR faults too; kept_slot: its record in the file of keep_maps(). Returns its id."""
        rows = [
            {"client_addr": addr, "length": length, "page": offset // block.page_size} for addr, offset, length in maps
        ]
        remote = ffi.new("struct remote_fd **")
        rc = lib.remote_fd_new(
            remote,
            block.pointer,
            uffd.detach(),
            control.detach(),
            ffi.new("struct remote_map[]", rows),
            len(rows),
            status,
        )
        check(rc, "registering a remote fd")
        remote[0].has_events, remote[0].is_strict, remote[0].kept_slot = has_events, strict, kept_slot
        number = ffi.new("uint32_t *")
        check(lib.fault_threads_add_remote(self.pointer, remote[0], number), "polling a remote fd")
        return int(number[0])

    def keep_maps(self, maps_fd: int) -> None:
        """A file of struct kept_maps: the maps of who moves and unmaps its memory are kept up to date there."""
        check(lib.fault_threads_keep_maps(self.pointer, maps_fd), "keeping helpers' maps")

    def apply_event(self, remote_id: int, message: Any) -> None:
        """Does what a struct uffd_message says that somebody else has read from a remote fd."""
        lib.fault_threads_apply_event(self.pointer, remote_id, message)

    def remove_remote(self, remote_id: int) -> None:
        check(lib.fault_threads_remove_remote(self.pointer, remote_id), "removing a remote fd")

    def forget_requests(self, remote_id: int) -> None:
        """Those that it sent to another coordinator, which has not read them."""
        check(lib.fault_threads_forget_requests(self.pointer, remote_id), "reading what a remote fd's helper asked for")

    def wake_remote(self, remote_id: int) -> None:
        """Everybody who waits there faults again."""
        check(lib.fault_threads_wake_remote(self.pointer, remote_id), "waking a remote fd")

    def disable_remote(self, remote_id: int, error: int) -> None:
        check(lib.fault_threads_disable_remote(self.pointer, remote_id, error), "disabling a remote fd")

    def is_gone(self, remote_id: int) -> bool:
        """Whether the address space behind a remote fd has ended."""
        return bool(lib.fault_threads_probe_remote(self.pointer, remote_id) == -errno.ESRCH)

    def is_alive(self, remote_id: int) -> bool:
        """Whether it lives. Neither this nor is_gone: the kernel does not tell."""
        return bool(lib.fault_threads_probe_remote(self.pointer, remote_id) == 0)
