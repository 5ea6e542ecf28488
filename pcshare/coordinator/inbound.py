"""inbound: the blocks of one migration, from RAM START until they are served, or forgotten.

For the coordinator's loop alone. Before LISTEN their memory is the core's, which stores into it in place, and nobody
else's; at LISTEN each becomes a RAM block like any other, whose source pushes. Knows no connection.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pcshare.coordinator.blocks import Block, Blocks, warn_if_larger_than_memory
from pcshare.coordinator.pushed import PushedSource
from pcshare.coordinator.reception import RamSection
from pcshare.coordinator.takeover import KeptBlock
from pcshare.errors import HostError, LimitReached, MigrationError
from pcshare.fault_thread import FaultThreads
from pcshare.incoming import Incoming
from pcshare.keeper import Keeper
from pcshare.migration.wire import Announcement
from pcshare.ramblock import CoreExtents, DeferredMemory
from pcshare.sources import SourceSpec
from pcshare.sources.grammar import BLOCK_NAME_MAX, SOURCE_LENGTH_MAX
from pcshare.state import State

PAGE_SIZES = (4096, 2 << 20)  # what memory here comes in


@dataclass
class _Announced:
    block: Block
    number: int  # the core's
    page_size: int
    memory: DeferredMemory | None  # None: it was taken over, and is served


class Inbound:
    """One migration's memory."""

    def __init__(self, spec: SourceSpec, blocks: Blocks, keeper: Keeper, fault_threads: FaultThreads) -> None:
        self._spec = spec
        self._blocks = blocks
        self._keeper = keeper
        self._fault_threads = fault_threads
        self._announced: list[_Announced] = []
        self.ram_section = RamSection()
        self.core = Incoming(os.sysconf("SC_PAGE_SIZE"))

    # -- before LISTEN

    def announce(self, found: tuple[Announcement, ...]) -> None:
        """Makes every block, or raises why not: a veto, sizes that do not fit, no memory."""
        for one in found:
            _check(one)
        sources = [self._source(number, one) for number, one in enumerate(found)]
        warn_if_larger_than_memory(sources)
        self._blocks.probe(sources)
        for number, (source, one) in enumerate(zip(sources, found, strict=True)):
            self._make(number, source, one)

    def _source(self, number: int, one: Announcement) -> PushedSource:
        return PushedSource(self._spec, one.idstr, one.used_length, lambda: self.core.page_channel(number))

    def _make(self, number: int, source: PushedSource, one: Announcement) -> None:
        page_size = one.page_size or PAGE_SIZES[0]
        block = self._blocks.announce(source, page_size)
        memory = DeferredMemory(
            self._keeper,
            one.idstr,
            map_length=one.used_length,
            page_size=page_size,
            writable=self._blocks.is_writable(source),
        )
        self._announced.append(_Announced(block, number, page_size, memory))
        found = self.core.add_block(one.idstr, used_length=one.used_length, page_size=page_size, memfd=memory.fileno())
        assert found == number

    def target_pages(self) -> tuple[int, int]:
        """All, and those of them that have come."""
        progress = [self.core.progress(one.number) for one in self._announced]
        return sum(pages for pages, _ in progress), sum(received for _, received in progress)

    def require_all(self) -> None:
        """MigrationError names a block of which pages never came."""
        for one in self._announced:
            pages, received = self.core.progress(one.number)
            if received < pages:
                raise MigrationError(
                    f"the source has ended, and of block {one.block.idstr} {pages - received} pages never came"
                )

    # -- after another coordinator's LISTEN

    def take_over(self, kept: Sequence[KeptBlock], ram_section_id: int) -> None:
        """Serves the blocks of a migration that a coordinator before this one took in; its source is away."""
        self.ram_section.section_id = ram_section_id
        for number, one in enumerate(kept):
            self._take_one(number, one)

    def _take_one(self, number: int, kept: KeptBlock) -> None:
        memory = kept.source

        def take_channel() -> Any:
            return self.core.page_channel(number)

        source = PushedSource(self._spec, kept.idstr, memory.used_length, take_channel, memory.extents)
        region = self._blocks.region_of(kept)
        found = self.core.take_block(
            kept.idstr,
            used_length=memory.used_length,
            page_size=kept.page_size,
            received=region.address,
            extents=memory.extents,
        )
        assert found == number
        block = self._blocks.take_over(kept, source, region, self._keeper, self._fault_threads)
        self.core.listen_block(number, self._fault_threads, block.index)
        self._announced.append(_Announced(block, number, kept.page_size, None))

    # -- LISTEN

    def listen(self) -> None:
        """Hands every block out."""
        for one in self._announced:
            unmapped = self.core.unmap_block(one.number, one.block.region.address)
            extents = CoreExtents(unmapped.extents, unmapped.n_extents)
            assert one.memory is not None
            self._blocks.listen(one.block, self._keeper, one.memory, one.page_size, self._fault_threads, extents)
            self.core.listen_block(one.number, self._fault_threads, one.block.index)

    def missing_pages(self) -> int:
        """Target pages that have not come, of blocks that are not at their end."""
        counts = [self.core.progress(one.number) for one in self._announced if one.block.state is not State.END]
        return sum(pages - received for pages, received in counts)

    # -- the end

    def close(self) -> None:
        """Nothing more comes. What was not handed out is forgotten. Streams are closed before."""
        self.core.close()
        for one in self._announced:
            if one.memory is not None:
                one.memory.free()
        self._announced.clear()


def _check(one: Announcement) -> None:
    if len(one.idstr.encode()) > BLOCK_NAME_MAX:
        raise LimitReached(
            f"block {one.idstr!r}: its name is longer than {BLOCK_NAME_MAX} bytes",
            errno=errno.ENAMETOOLONG,
            hint="give the source's memory a shorter id",
        )
    if one.used_length > SOURCE_LENGTH_MAX:
        raise LimitReached(
            f"block {one.idstr} has {one.used_length} bytes, more than {SOURCE_LENGTH_MAX}", errno=errno.EFBIG
        )
    if one.page_size is not None and one.page_size not in PAGE_SIZES:
        raise HostError(
            f"block {one.idstr} has pages of {one.page_size} bytes: only those of 4 KiB and 2 MiB are taken here",
            errno=errno.EOPNOTSUPP,
            hint="back the source's memory with pages of 2 MiB (memory-backend-memfd,hugetlb=on,hugetlbsize=2M)",
        )
