"""blocks: the life of the blocks that a coordinator owns, from their sources to END.

States, reasons and what is said about them; placing and asking are the core's. A state changes here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pcshare import runtime
from pcshare.coordinator.links import LinkReports
from pcshare.coordinator.opening import close_sources, open_sources
from pcshare.coordinator.options import Options
from pcshare.coordinator.takeover import KeptBlock
from pcshare.errors import NoSuchBlock, PcshareError, UsageError
from pcshare.fault_thread import EventKind, FaultEvent, FaultThreads
from pcshare.fds import OwnedFd
from pcshare.keeper import Keeper
from pcshare.notifier import Change, NotifierChain
from pcshare.ramblock import CoreExtents, DeferredMemory, KeptMemory, RAMBlock
from pcshare.sources import CompleteSource, LinkState, OpenedSource, reopen_source, shown
from pcshare.state import State, StateCell
from pcshare.status import BitmapRegion, SegmentWriter
from pcshare.units import format_bytes

log = logging.getLogger("pcshare")

HOST_PAGE = os.sysconf("SC_PAGE_SIZE")
SOURCE_IN_REASON_LENGTH_MAX = 120  # a reason holds twice as much, and must have room for the error and its cure
CGROUP_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Block:
    """A RAM block with its source and its state. Before LISTEN nobody has its memory, and ram is not there."""

    def __init__(self, source: OpenedSource, index: int, region: BitmapRegion) -> None:
        self.source = source
        self.memory = source.memory()  # while it is open
        self.index = index
        self.region = region  # the received bitmap
        self._ram: RAMBlock | None = None
        self.is_served = False  # the fault threads have it, its memory can be handed out
        self.cell = StateCell()
        self.failure = ""  # why the core has paused it
        self.away = ""  # why its source does not answer
        self.late = ""  # which page takes too long
        self.note = ""  # what else there is to say
        self.reason = ""  # what of these is shown
        self.gave_up = False  # the source was away for too long: readers were told that what is missing is lost

    @property
    def idstr(self) -> str:
        return self.source.spec.block

    @property
    def ram(self) -> RAMBlock:
        assert self._ram is not None, f"block {self.idstr} is asked for before LISTEN"
        return self._ram

    @ram.setter
    def ram(self, ram: RAMBlock) -> None:
        self._ram = ram

    @property
    def state(self) -> State:
        return self.cell.value


class Blocks:
    """All blocks of a coordinator. on_state hears (idstr, state, reason) of each change."""

    def __init__(
        self,
        options: Options,
        segment: SegmentWriter,
        notifiers: NotifierChain,
        on_state: Callable[[str, State, str], None],
    ) -> None:
        self._options = options
        self._segment = segment
        self._notifiers = notifiers
        self._on_state = on_state
        self._by_index: dict[int, Block] = {}
        self.links = LinkReports()
        self.waiting_for = ""  # while blocks are still to come with a source: what for

    def __iter__(self) -> Iterator[Block]:
        return iter(tuple(self._by_index.values()))

    def by_index(self, index: int) -> Block:
        return self._by_index[index]

    def find(self, idstr: str) -> Block:
        """The block of that name; with an empty name the only one. NoSuchBlock names those there are; PcshareError
        EAGAIN says what is waited for before it can be handed out."""
        if self.waiting_for:
            raise PcshareError(f"{idstr or 'the block'} is not there yet: {self.waiting_for}", errno=errno.EAGAIN)
        names = sorted(block.idstr for block in self)
        for block in self:
            if block.idstr == idstr or (not idstr and len(names) == 1):
                return block
        what = f"no block {idstr!r} here" if idstr else "there are several blocks: name one"
        raise NoSuchBlock(f"{what} (there are: {', '.join(names)})", errno=errno.ENODEV)

    # -- making

    def open_sources(self, stopped: socket.socket) -> list[OpenedSource]:
        """Opens every source, or none; PcshareError when stopped becomes readable."""
        opened = open_sources(self._options.sources, stopped)
        try:
            self._check_writable(opened)
        except BaseException:
            close_sources(opened)
            raise
        warn_if_larger_than_memory(opened)
        return opened

    def _check_writable(self, opened: list[OpenedSource]) -> None:
        unknown = self._options.writable - {source.spec.block for source in opened}
        if unknown:
            raise UsageError(
                f"--writable {', '.join(sorted(unknown))}: no such block",
                hint=f"the blocks are {', '.join(source.spec.block for source in opened)}",
            )

    def add(self, source: OpenedSource, page_size: int, keeper: Keeper, fault_threads: FaultThreads) -> None:
        """Makes a block, discards what it may hold, listens on it and lets it run."""
        block = self._new(source, page_size, source.extents)
        ram = self._make_ram(block, keeper, page_size, source.extents)
        try:
            self._change(block, State.ADVISE)
            self._notifiers.notify(Change.INBOUND_ADVISE, block.idstr)
            self._discard_all(block)
            patience_s = self._options.source_timeout_s if self._options.poison else None
            source.watch(self.links.of_block(block.index), patience_s)
            channel = source.make_channel()
        except BaseException:
            ram.free()
            del self._by_index[block.index]
            raise
        self._serve(block, channel, fault_threads)
        self._change(block, State.RUNNING)

    def reopen_source(self, kept: KeptBlock, fd: OwnedFd | None) -> OpenedSource:
        """The source that a block had; a server of it may be away. UsageError: the options name none for it."""
        for spec in self._options.sources:
            if spec.block == kept.idstr and self._is_at_end(kept):
                return CompleteSource(spec, kept.source)
            if spec.block == kept.idstr:
                return reopen_source(spec, kept.source, fd)
        raise UsageError(f"block {kept.idstr} is served, and no source is named for it")

    def region_of(self, kept: KeptBlock) -> BitmapRegion:
        """The received bitmap of a block that is taken over."""
        return self._segment.take_bitmap(kept.bitmap_offset, -(-kept.source.used_length // kept.page_size))

    def take_over(
        self, kept: KeptBlock, source: OpenedSource, region: BitmapRegion, keeper: Keeper, fault_threads: FaultThreads
    ) -> Block:
        """Serves a block where the coordinator before this one stopped. Its helpers know it already, so nothing that
        they see goes back."""
        block = self._by_index[kept.index] = Block(source, kept.index, region)
        block.memory = kept.source
        memory = KeptMemory(kept.keeper_block)
        ram = self._make_ram(block, keeper, kept.page_size, source.extents, memory, writable=kept.writable)
        block.cell = StateCell(State.LISTENING)
        patience_s = self._options.source_timeout_s if self._options.poison else None
        source.watch(self.links.of_block(block.index), patience_s)
        fault_threads.add_block(ram, source.make_channel(), poison=self._options.poison)
        block.is_served = True
        self._change(block, State.END if self._is_at_end(kept) else State.RUNNING)
        return block

    def _is_at_end(self, kept: KeptBlock) -> bool:
        return bool(self._segment.block_slot(kept.index).state == State.END)

    def drop_unclaimed(self) -> None:
        """What the coordinator before this one announced and never handed out."""
        for index in self._segment.used_block_slots():
            if index not in self._by_index:
                self._segment.clear_block(index)

    def describe(self) -> tuple[KeptBlock, ...]:
        """For the coordinator after this one."""
        return tuple(
            KeptBlock(
                index=block.index,
                idstr=block.idstr,
                keeper_block=block.ram.keeper_block,
                page_size=block.ram.page_size,
                writable=block.ram.writable,
                bitmap_offset=block.region.offset,
                source=block.memory,
            )
            for block in self
        )

    def _new(self, source: OpenedSource, page_size: int, extents: Sequence[tuple[int, int]]) -> Block:
        """A block with a place in the status segment, and nothing else."""
        index = len(self._by_index)
        pages = [(start // page_size, -(-end // page_size)) for start, end in extents]
        region = self._segment.add_bitmap(-(-source.used_length // page_size), pages)
        self._segment.block_slot(index).bitmap_offset = region.offset
        block = self._by_index[index] = Block(source, index, region)
        return block

    def _make_ram(
        self,
        block: Block,
        keeper: Keeper,
        page_size: int,
        extents: Sequence[tuple[int, int]] | CoreExtents,
        memory: DeferredMemory | KeptMemory | None = None,
        *,
        writable: bool | None = None,
    ) -> RAMBlock:
        """writable: what it was made as; a source that is complete does not say it any more. None: what it is to be."""
        source = block.source
        try:
            block.ram = RAMBlock(
                keeper,
                block.idstr,
                used_length=source.used_length,
                page_size=page_size,
                writable=self.is_writable(source) if writable is None else writable,
                extents=extents,
                index=block.index,
                status=self._segment.block_slot(block.index),
                received=block.region.address,
                memory=memory,
            )
        except BaseException:
            if memory is None:
                del self._by_index[block.index]
            raise
        return block.ram

    def _serve(self, block: Block, channel: Any, fault_threads: FaultThreads) -> None:
        """From here on faults are answered. channel is consumed."""
        self._change(block, State.LISTENING)
        fault_threads.add_block(block.ram, channel, poison=self._options.poison)
        block.is_served = True
        self._notifiers.notify(Change.INBOUND_LISTEN, block.idstr)

    def _discard_all(self, block: Block) -> None:
        """Nothing of old content may survive: a new memfd holds nothing, and a sealed one could not be discarded any
        more."""
        self._change(block, State.DISCARD)
        if block.ram.is_empty():
            return
        block.ram.discard([(0, block.ram.map_length // block.ram.page_size)])

    # -- blocks that come with a migration stream: announced, written, and only then handed out

    def probe(self, sources: Sequence[OpenedSource]) -> None:
        """May these be served? Before anything is made of them."""
        for source in sources:
            self._notifiers.notify(Change.PROBE, source.spec.block)

    def is_writable(self, source: OpenedSource) -> bool:
        return source.default_writable or source.spec.block in self._options.writable

    def announce(self, source: OpenedSource, page_size: int) -> Block:
        """A block that a source is going to fill, shown and not yet served."""
        block = self._new(source, page_size, [(0, source.used_length)])
        self._segment.describe_block(block.index, block.idstr, source.used_length, page_size)
        self._change(block, State.ADVISE)
        self._notifiers.notify(Change.INBOUND_ADVISE, block.idstr)
        return block

    def discard_begins(self) -> None:
        for block in self:
            self._change(block, State.DISCARD)

    def listen(
        self,
        block: Block,
        keeper: Keeper,
        memory: DeferredMemory,
        page_size: int,
        fault_threads: FaultThreads,
        extents: CoreExtents,
    ) -> None:
        """Serves a block that was announced. memory is consumed; block.region holds what of it is received, and what
        lies outside of extents is zeros."""
        self._change(block, State.DISCARD)
        block.memory = dataclasses.replace(block.memory, extents=extents.ranges())
        ram = self._make_ram(block, keeper, page_size, extents, memory)
        try:
            channel = block.source.make_channel()
        except BaseException:
            ram.free()
            raise
        self._serve(block, channel, fault_threads)

    def run(self) -> None:
        """Every block that was listened on runs."""
        for block in self:
            if block.state is State.LISTENING:
                self._change(block, State.RUNNING)

    def forget(self, fault_threads: FaultThreads) -> None:
        """All blocks, which nobody has yet: what their source sent is worth nothing without the rest."""
        for block in self:
            self._change(block, State.NONE)
            if block.is_served:  # it failed at another one
                block.ram.close()
                fault_threads.remove_block(block.index)
            self._segment.clear_block(block.index)
            self._segment.free_bitmap(block.region.offset)
            block.source.close()
        self._by_index.clear()
        for event in fault_threads.events():
            log.debug("of a block that is forgotten: %s", event)

    # -- changes

    def _change(self, block: Block, state: State, reason: str = "") -> None:
        if block.cell.exchange(state) is state and reason == block.reason:
            return
        block.reason = reason
        self._segment.set_text(reason, block.index)
        self._segment.set_state(state, block.index)
        self._on_state(block.idstr, state, reason)

    def _show(self, block: Block) -> None:
        """State and reason follow from what is known of the block."""
        if block.state is State.END:
            return
        waits_for_late = block.late and not self._options.poison  # else it is lost, and waited for by nobody
        state = State.PAUSED if block.failure or block.away or waits_for_late else State.RUNNING
        reason = block.failure or block.away or block.late or block.note
        if state is State.PAUSED and block.state is not State.PAUSED:
            log.warning("block %s is paused: %s", block.idstr, reason)
        self._change(block, state, reason)

    def handle(self, event: FaultEvent) -> bool:
        """Reacts to an event of a block. True: the block is complete now."""
        block = self.by_index(event.block_index)
        if event.kind is EventKind.BLOCK_COMPLETE:
            self._change(block, State.END)
            return True
        if event.kind is EventKind.BLOCK_FOREIGN:
            self._report_foreign(block, event.offset)
        elif event.kind is EventKind.BLOCK_PLACE_ERROR:
            self._pause(block, _placing_failed(block, event))
        elif event.kind is EventKind.BLOCK_LATE:
            self._late(block, event)
        elif event.kind is EventKind.BLOCK_GAPS:
            self._pause(block, self._lost(block))
        elif self._options.poison:
            self._note(block, f"{_reading_failed(block, event)}; touching what it lost is SIGBUS")
        else:
            self._pause(block, _reading_failed(block, event))
        return False

    def _pause(self, block: Block, reason: str) -> None:
        block.failure = f"{reason}; mend it, then: pcshare resume {self._options.name}"
        self._show(block)

    def _note(self, block: Block, reason: str) -> None:
        """The first since the start or the last resume: all that a source lost may follow, read by read."""
        if block.state is State.END or block.note:
            return
        log.warning("block %s: %s", block.idstr, reason)
        block.note = reason
        self._show(block)

    def _late(self, block: Block, event: FaultEvent) -> None:
        """A page takes too long, or no page does any more."""
        was_late, options = bool(block.late), self._options
        block.late = _too_long(block, event, options) if event.error else ""
        self._show(block)
        if block.late and options.poison and not was_late and block.state is not State.END:
            log.warning("block %s: %s", block.idstr, block.late)  # of a pause _show says it
        elif was_late and not block.late:
            log.warning("block %s goes on: what took too long has come", block.idstr)

    def _lost(self, block: Block) -> str:
        lost, text = self._segment.block_slot(block.index).lost_pages, _shortened(shown(block.source.spec.text))
        return f"all that {text} still has is here, it lost {lost} pages; touching them is SIGBUS"

    def _report_foreign(self, block: Block, offset: int) -> None:
        count = self._segment.block_slot(block.index).foreign_pages
        what = "left as it is, since it may be a write" if block.ram.writable else "replaced by the source's bytes"
        log.error(
            "block %s: %d foreign pages so far, one at offset %d: some process mapped or filled the block's memory "
            "without registering it, and whoever read there before now read its bytes; %s",
            block.idstr,
            count,
            offset,
            what,
        )

    def resume(self, fault_threads: FaultThreads) -> None:
        """Asks failed sources again, and tries at once to reach those that are away."""
        for block in self:
            if block.is_served and block.state is not State.END:
                self._resume(block, fault_threads)
                block.source.retry_now()

    def _resume(self, block: Block, fault_threads: FaultThreads) -> None:
        block.failure = block.late = block.note = ""
        fault_threads.resume_block(block.index)  # first: whoever sees it RUNNING finds nothing lost
        self._show(block)

    def hear_links(self, fault_threads: FaultThreads) -> None:
        """Takes what links reports."""
        for index, link in self.links.take():
            block = self._by_index.get(index)
            if block is not None and block.state is not State.END:
                self._link_changed(block, link, fault_threads)

    def _link_changed(self, block: Block, link: LinkState, fault_threads: FaultThreads) -> None:
        was_away, was_given_up = bool(block.away), block.gave_up
        block.away, block.gave_up = _away(link) if link.is_away else "", link.gave_up
        if was_given_up and not link.is_away:
            self._resume(block, fault_threads)  # what was given up for lost is asked for after all
        else:
            self._show(block)
        if was_away and block.state is State.RUNNING:
            log.warning("block %s goes on with %s", block.idstr, _shortened(link.server))

    def all_ended(self) -> bool:
        return all(block.state is State.END for block in self)

    def close(self) -> None:
        """What Python holds of them; their memory goes with the fault threads."""
        for block in self:
            if block.is_served:
                block.ram.close()
        close_sources([block.source for block in self])


def _shortened(text: str) -> str:
    """Both ends of a long source: the path's begin, and its file with the filters."""
    if len(text) <= SOURCE_IN_REASON_LENGTH_MAX:
        return text
    half = (SOURCE_IN_REASON_LENGTH_MAX - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def _reading_failed(block: Block, event: FaultEvent) -> str:
    text = _shortened(shown(block.source.spec.text))
    if event.error == errno.ENODATA:
        return f"{text} is shorter than it was: nothing at offset {event.offset}"
    return f"reading {text} at offset {event.offset}: {os.strerror(event.error)}"


def _too_long(block: Block, event: FaultEvent, options: Options) -> str:
    text = _shortened(shown(block.source.spec.text))
    meanwhile = "; touching it is SIGBUS until it comes" if options.poison else ""
    return (
        f"{text} has not brought offset {event.offset} within {options.fault_timeout_s:g} s{meanwhile}; it is waited "
        f"for, and asked for again by: pcshare resume {options.name}"
    )


def _away(link: LinkState) -> str:
    lost = ", touching what is missing is SIGBUS" if link.gave_up else ""
    return f"{_shortened(link.server)} is away{lost}: {_shortened(link.reason)}; {link.cure}"


def _placing_failed(block: Block, event: FaultEvent) -> str:
    if event.error == errno.ENOMEM:
        kind = "huge page" if block.ram.page_size > HOST_PAGE else "memory"
        return f"no {kind} is left for the page at offset {event.offset}"
    if event.error == errno.ENOSPC:
        return f"{runtime.SHM_DIR} has no room to note the page at offset {event.offset}"
    if event.error in (errno.ESRCH, errno.EPIPE):
        return "the keeper is gone, and with it the way to place pages"
    return f"placing a page at offset {event.offset}: {os.strerror(event.error)}"


def memory_at_hand() -> int:
    """Bytes: what is available here, or what the control group leaves, if that is less."""
    import psutil  # late: nobody waits for a page then

    available = int(psutil.virtual_memory().available)
    for name in CGROUP_LIMIT_FILES:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            available = min(available, int(text))
    return available


def warn_if_larger_than_memory(opened: Sequence[OpenedSource]) -> None:
    """Before anything is made: pages that do not fit will pause their block."""
    needed = sum(end - start for source in opened for start, end in source.extents)
    available = memory_at_hand()
    if needed > available:
        log.warning(
            "the sources hold %s and %s of memory are at hand: what does not fit will not arrive; stream lazily "
            "(--stream lazy) to bring only what is touched",
            format_bytes(needed),
            format_bytes(available),
        )
