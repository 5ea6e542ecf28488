"""support_rig: fault threads with blocks and remote fds and no coordinator around them, and a source that pushes.

The source that pushes is Python: it may be used only where no thread of the test's process waits for a page.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from core_support import Child
from pcshare.core import ffi, lib
from pcshare.errors import PcshareError
from pcshare.fault_thread import EventKind, FaultEvent, FaultThreads
from pcshare.fds import OwnedFd
from pcshare.keeper import Keeper
from pcshare.ramblock import DeferredMemory, RAMBlock, rounded_up
from pcshare.sources import open_source, parse_arguments
from pcshare.status import SegmentWriter
from support import wait_until
from support_serving import LAZY, PAGE, WAIT_S, is_readable


class PushSource:
    """The page channel of a source that pushes; what it is asked for is collected, and answered when the test says."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: list[Any] = []
        self._freed = False
        self._callbacks = (
            ffi.callback("int(struct page_channel *, void *, uint64_t, uint64_t)", self._read_now),
            ffi.callback("void(struct page_channel *, struct page_request *)", self._submit),
            ffi.callback("void(struct page_channel *)", self._free),
        )
        read_now, submit, free = self._callbacks
        self._ops = ffi.new("struct page_channel_ops *", {"read_now": read_now, "submit": submit, "free": free})
        self.channel = ffi.new("struct page_channel *", {"ops": self._ops, "pushes": 1})
        self.channel.stream_piece_bytes = 64 << 10
        self.channel.stream_piece_count = self.channel.stream_piece_count_demand = 4

    @staticmethod
    def _read_now(*_: Any) -> int:
        return int(lib.PAGE_CHANNEL_WOULD_BLOCK)

    def _submit(self, _: Any, request: Any) -> None:
        with self._lock:
            if not self._freed:
                self._requests.append(request)
                return
        request.done(request, -errno.ECANCELED)

    def _free(self, _: Any) -> None:
        with self._lock:
            self._freed = True
        self.answer(-errno.ECANCELED)

    def asked(self) -> list[tuple[int, int]]:
        """(first page, pages) of each request that is outstanding."""
        with self._lock:
            return [(request.page, request.n_pages) for request in self._requests]

    def wait_until_asked(self, *wanted: tuple[int, int]) -> None:
        wait_until(lambda: sorted(self.asked()) == sorted(wanted), f"requests for {wanted}, not {self.asked()}")

    def answer(self, result: int) -> None:
        """All that is outstanding."""
        with self._lock:
            requests, self._requests = self._requests, []
        for request in requests:
            request.done(request, result)


class Rig:
    """Fault threads with blocks and remote fds, and no coordinator around them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.keeper = Keeper.spawn()
        self.segment = SegmentWriter(name, "/nowhere.sock")
        self.threads = FaultThreads(self.segment.header)
        self.threads.set_stream(LAZY)
        self.blocks: dict[int, RAMBlock] = {}
        self._slots = 0
        self._regions: dict[int, int] = {}

    def add_block(self, source: str, index: int = 0, *, writable: bool = False, poison: bool = False) -> RAMBlock:
        opened = open_source(parse_arguments([source])[0])
        region = self.segment.add_bitmap(rounded_up(opened.used_length, PAGE) // PAGE, [(0, 1)])
        status = self.segment.block_slot(index)
        status.bitmap_offset = self._regions[index] = region.offset
        ram = RAMBlock(
            self.keeper, opened.spec.block, used_length=opened.used_length, page_size=PAGE, writable=writable,
            extents=opened.extents, index=index, status=status, received=region.address,
        )  # fmt: skip
        channel = opened.make_channel()
        opened.close()
        try:
            self.threads.add_block(ram, channel, poison=poison)
        except PcshareError:
            ram.close()
            raise
        self.blocks[index] = ram
        return ram

    def add_pushed(
        self,
        source: PushSource,
        page_count: int,
        *,
        memory: DeferredMemory | None = None,
        extents: Sequence[tuple[int, int]] | None = None,
        received: Iterable[int] = (),
        index: int = 0,
        page_size: int = PAGE,
        poison: bool = False,
    ) -> RAMBlock:
        """A block whose source pushes; memory holds the received pages; without extents it has no holes."""
        region = self.segment.add_bitmap(page_count, [(0, page_count)])
        status = self.segment.block_slot(index)
        status.bitmap_offset = self._regions[index] = region.offset
        for page in received:
            lib.bitmap_test_and_set(region.address, page)
        ram = RAMBlock(
            self.keeper, "pushed", used_length=page_count * page_size, page_size=page_size, writable=False,
            extents=[(0, page_count * page_size)] if extents is None else extents, index=index, status=status,
            received=region.address, memory=memory,
        )  # fmt: skip
        self.threads.add_block(ram, source.channel, poison=poison)
        self.blocks[index] = ram
        return ram

    def push(self, page: int, content: bytes | int, index: int = 0, *, demand: bool = False) -> tuple[int, int]:
        """Places what came: bytes, or so many pages of zeros. (what the core answered, pages placed)"""
        placed = ffi.new("uint64_t *")
        if isinstance(content, int):
            n_pages, data = content, ffi.NULL
        else:
            n_pages, data = len(content) // self.blocks[index].page_size, ffi.from_buffer(content)
        rc = lib.fault_threads_place(self.threads.pointer, index, page, n_pages, data, demand, placed)
        return rc, placed[0]

    def add_remote(
        self,
        ram: RAMBlock,
        helper: Child,
        maps: list[tuple[int, int, int]] | None = None,
        *,
        has_events: bool = False,
        strict: bool = False,
    ) -> tuple[int, socket.socket]:
        """(id, the helper's end of the control socket)"""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        status = self.segment.helper_slot(self._slots)
        status.state = lib.STATUS_HELPER_ATTACHED
        self._slots += 1
        maps = maps or [(helper.addr, 0, ram.map_length)]
        uffd, control = OwnedFd(os.dup(helper.uffd)), OwnedFd(ours.detach())
        number = self.threads.add_remote(ram, uffd, control, maps, status, has_events=has_events, strict=strict)
        return number, theirs

    def remove_block(self, index: int) -> None:
        self.threads.remove_block(index)
        self.blocks.pop(index).close()
        self.segment.free_bitmap(self._regions.pop(index))

    def events(self) -> list[FaultEvent]:
        return list(self.threads.events())

    def wait_for_event(self, kind: EventKind) -> FaultEvent:
        found: list[FaultEvent] = []

        def has_come() -> bool:
            is_readable(self.threads.fileno(), 0.05)
            found.extend(event for event in self.threads.events() if event.kind is kind)
            return bool(found)

        wait_until(has_come, f"event {kind.name}", WAIT_S)
        return found[0]

    def close(self) -> None:
        for ram in self.blocks.values():
            ram.close()
        self.threads.close()
        self.segment.close()
        self.keeper.close()
