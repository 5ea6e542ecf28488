"""working_sets: `--record FILE` and `--replay FILE`: what helpers touch first is kept, and comes first next time.

The core notes touches and asks for what is replayed; here the file is read, and written now and then. A thread of its
own writes, since a folder may be slow: no fault and no helper waits for it. What was noted lies in a memfd, which the
coordinator after this one is given.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable

from pcshare import working_set
from pcshare.coordinator.blocks import Block
from pcshare.coordinator.options import Options
from pcshare.errors import PcshareError, WorkingSetError
from pcshare.fault_thread import FaultThreads
from pcshare.fds import OwnedFd
from pcshare.signals import signals_blocked
from pcshare.state import State
from pcshare.working_set import Packer, SetBlock, WorkingSet

log = logging.getLogger("pcshare")

SAVE_INTERVAL_S = 3.0  # what a coordinator that is killed for good may lose of the file
SAVE_REST = 20  # times as long as the last save took: a large set costs no more than that of a CPU


class WorkingSets:
    """What one coordinator records and replays. taken: the memfd in which the one before it noted what was touched."""

    def __init__(self, options: Options, taken: list[OwnedFd], *, goes_on: bool) -> None:
        """goes_on: another coordinator has served these blocks before; then a set that cannot be read is a warning,
        later. Else what cannot be is refused here: UsageError, WorkingSetError."""
        self._options = options
        for older in taken[:-1]:
            older.close()
        self._memory = taken[-1] if taken else None
        self._is_memory_new = False
        self._is_new = not taken  # what is recorded begins here
        self._loaded: WorkingSet | None = None
        self._reads_late = goes_on and not (options.record and self._is_new)
        if options.record and self._is_new:
            working_set.check_target(options.record)
        if options.replay and not self._reads_late:
            self._loaded = self._load(options.replay)
        self.is_first_recording = options.record is not None and self._loaded is None
        self._quit = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._packer: Packer | None = None
        self._places: dict[int, int] = {}  # of blocks by index, in the file's table
        self._n_packed = 0
        self._saved: tuple[int, int] | None = None  # how many runs, and pages of the last one
        self._is_full_told = False
        self._failure_told = ""
        self._replaying: set[int] = set()  # blocks whose replay is not over
        self._replay_began_s = 0.0

    @property
    def new_memory(self) -> OwnedFd | None:
        """What the coordinator after this one must have, and has not been left yet."""
        return self._memory if self._is_memory_new else None

    def _load(self, path: str) -> WorkingSet | None:
        """None: it is not there yet, and will be."""
        try:
            return working_set.read(path)
        except FileNotFoundError as error:
            record = self._options.record
            if record and os.path.realpath(record) == os.path.realpath(path):
                return None
            raise WorkingSetError(
                f"there is no working set {path}",
                errno=error.errno,
                hint=f"record it first: --record {path}; or give both options, and the first start records",
            ) from None

    # -- beginning

    def record_to(self, fault_threads: FaultThreads) -> None:
        """From here on touches are noted. Before there are blocks."""
        self._fault_threads = fault_threads
        if not self._options.record:
            return
        if self._memory is not None:
            try:
                fault_threads.record(self._memory.fileno(), working_set.RUNS_MAX)
                return
            except PcshareError as error:  # of another version of pcshare
                log.warning("what was recorded until now is not known any more: %s", error)
                self._memory.close()
        self._memory = OwnedFd(os.memfd_create("pcshare-touched", os.MFD_CLOEXEC))
        self._is_memory_new = True
        fault_threads.record(self._memory.fileno(), working_set.RUNS_MAX)

    def begin(self, blocks: Iterable[Block]) -> None:
        """All blocks are there, and nothing is streamed yet: what is replayed is asked for."""
        if not self._options.record and not self._options.replay:
            return
        self._blocks = {
            block.index: SetBlock(block.idstr, block.ram.used_length, block.ram.page_size) for block in blocks
        }
        self._ended = {block.index for block in blocks if block.state is State.END}
        self._places = {index: place for place, index in enumerate(self._blocks)}
        self._packer = Packer(list(self._blocks.values()))
        self._pieces = {
            index: max(1, self._fault_threads.piece_bytes(index) // block.page_size)
            for index, block in self._blocks.items()
        }
        if self._loaded is not None:
            self._replay(self._loaded)
        self._loaded = None

    def start(self) -> None:
        """What is recorded is written from now on. WorkingSetError: it cannot be."""
        if self._options.record and self._is_new:
            self._save()  # also where nothing is touched; and better refused now than at the end
        if self._options.record or (self._options.replay and self._reads_late):
            self._thread = threading.Thread(target=self._work, name="pcshare-working-set")
            with signals_blocked():
                self._thread.start()

    def _work(self) -> None:
        if self._options.replay and self._reads_late:
            self._replay_late(self._options.replay)
        rest_s = SAVE_INTERVAL_S
        is_last = not self._options.record
        while not is_last:
            self._wake.wait(rest_s)
            self._wake.clear()
            is_last = self._quit
            began_s = time.monotonic()
            self._save_or_say()
            rest_s = max(SAVE_INTERVAL_S, SAVE_REST * (time.monotonic() - began_s))

    # -- replaying

    def _replay_late(self, path: str) -> None:
        """Of a coordinator that went on: helpers did not wait for this."""
        try:
            loaded = self._load(path)
            if loaded is not None:
                self._replay(loaded)
        except PcshareError as error:
            log.warning("what is missing of the working set is not replayed: %s", error)

    def _replay(self, loaded: WorkingSet) -> None:
        path = self._options.replay
        runs, remarks = working_set.fit(loaded, self._blocks)
        for remark in remarks:
            log.warning("working set %s: %s", path, remark)
        if self._options.record and self._is_new:  # what is recorded goes on from there
            self._fault_threads.note_runs((page, count, index) for index, page, count in runs)
        planned = working_set.plan(runs, self._pieces)
        log.warning("replaying %s pages in %s runs from %s", f"{planned.n_pages:,}", f"{len(planned.runs):,}", path)
        self._replay_began_s = time.monotonic()
        self._replaying = {index for index, *_ in planned.runs} - self._ended
        self._fault_threads.replay((page, count, index) for index, page, count in planned.runs)

    def block_replayed(self, index: int) -> None:
        """The core has told so; or the block is complete."""
        if index not in self._replaying:
            return
        self._replaying.discard(index)
        if not self._replaying:
            log.warning("replayed in %.1f s", time.monotonic() - self._replay_began_s)

    # -- recording

    def save_soon(self) -> None:
        """Nothing more is going to be touched."""
        self._wake.set()

    def _save_or_say(self) -> None:
        try:
            self._save()
            self._failure_told = ""
        except WorkingSetError as error:  # tried again and again; said once
            if str(error) != self._failure_told:
                log.warning("%s", error)
            self._failure_told = str(error)

    def _save(self) -> None:
        """Writes what is noted by now, if that is more than the file has."""
        assert self._packer is not None
        assert self._options.record is not None
        runs = self._fault_threads.recorded(self._n_packed)
        n_runs, n_pages = self._n_packed + len(runs), runs[-1][1] if runs else 0
        if (n_runs, n_pages) == self._saved:
            return
        in_file = [(self._places[index], page, count) for page, count, index in runs]
        self._packer.add(in_file[:-1])
        self._n_packed += len(in_file[:-1])
        working_set.write(self._options.record, self._packer.packed(in_file[-1:]), self._options.name)
        self._saved = n_runs, n_pages
        if n_runs == working_set.RUNS_MAX and not self._is_full_told:
            self._is_full_told = True
            log.warning("recording to %s has stopped: a working set has %d runs at most", self._options.record, n_runs)

    # -- end

    def close(self) -> None:
        """Writes the rest. Before the fault threads are freed. Twice is fine."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._quit = True
            self._wake.set()
            thread.join()
        if self._memory is not None:
            self._memory.close()
