"""Sources that are NBD servers: nbd://, nbd+unix:///, exec:, ssh and object stores; one or several equivalent ones.

Finds out how long the export is, whether it begins like a .npy file, and where its holes are. The pages are read by the
core's channel, and the connections are the link's.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pcshare.errors import SourceError
from pcshare.nbd.client import ServerExport, Session
from pcshare.sources.file import EXTENTS_MAX
from pcshare.sources.grammar import SourceSpec, path_of_server
from pcshare.sources.link import BLOCK_STATUS_TIMEOUT_S, REPLY_TIMEOUT_S, Link, LinkState, Need
from pcshare.sources.npy import NPY_HEAD_MAX, ArrayDescription, parse_npy
from pcshare.sources.opened import OpenedSource, SourceMemory
from pcshare.sources.shown import shown
from pcshare.sources.wakeup import StopFlag

if TYPE_CHECKING:
    from pcshare.page_channel import NbdChannel

# Requests are whole pages, so this costs nothing, and lets equivalent servers differ below it.
ALIGNMENT_MIN = 4096
# With several servers reads are no longer than this, so that one with a smaller maximum than the first can stand in.
LENGTH_MAX_OF_SEVERAL = 1 << 20


@dataclass(frozen=True)
class _Facts:
    """What the first session told."""

    export: ServerExport
    need: Need
    extents: list[tuple[int, int]]
    array: ArrayDescription | None


class NbdSource(OpenedSource):
    """One block's servers, of which one is connected."""

    def __init__(self, spec: SourceSpec, stop: StopFlag | None = None, memory: SourceMemory | None = None) -> None:
        """memory: it was open before, and is connected to when its channel is there."""
        self._reply_timeout_s = spec.filters.timeout_ms / 1000 or REPLY_TIMEOUT_S
        self._server_count = len(spec.equivalents)
        self._made = False
        self._link = Link(spec.equivalents, self._learn, self._reply_timeout_s)
        self._name = path_of_server(spec.equivalents[0])
        try:
            self._export: ServerExport | None = None  # as the first server told of it, to this process
            if memory is not None:
                self._take_up(spec, memory)
                return
            facts = self._link.open(stop)
            self._export, self._need = facts.export, facts.need
            super().__init__(spec, facts.need.size, facts.extents, facts.array)
        except BaseException:
            self._link.close()
            raise

    def _take_up(self, spec: SourceSpec, memory: SourceMemory) -> None:
        details = memory.details
        preferred = details.get("preferred", 0)  # one from before this version does not tell
        self._need = Need(memory.used_length, details["alignment"], details["length_max"], preferred)
        self._link.take_up(details["states"])
        super().__init__(spec, memory.used_length, memory.extents, memory.array)

    def _details(self) -> dict[str, Any]:
        return {
            "alignment": self._need.alignment,
            "length_max": self._need.length_max,
            "preferred": self._need.preferred,
            "states": self._link.object_states,
        }

    def _learn(self, session: Session) -> _Facts:
        export = session.export
        head = session.read(0, min(export.size, NPY_HEAD_MAX), time.monotonic() + self._reply_timeout_s)
        array = _array(head, export.size, self._name)
        extents = session.data_extents(time.monotonic() + BLOCK_STATUS_TIMEOUT_S, EXTENTS_MAX)
        return _Facts(export, _need(session, self._server_count), extents, array)

    def _new_channel(self) -> Any:
        """Once: the connections feed one channel."""
        if self._made:
            raise SourceError(f"{shown(self.spec.text)}: the source feeds one channel, and has it", errno=errno.EBUSY)
        from pcshare.page_channel import free_channel  # late: the grammar works without the compiled core

        channel = self._make()
        try:
            self._link.serve(channel, self._need)
        except BaseException:
            free_channel(channel.pointer)
            raise
        self._made = True
        return channel.pointer

    def _make(self) -> NbdChannel:
        from pcshare.page_channel import NbdChannel

        need = self._need
        return NbdChannel(
            size=need.size,
            alignment=need.alignment,
            length_max=need.length_max,
            reply_timeout_ms=round(self._reply_timeout_s * 1000),
            server_count=self._server_count,
            preferred=need.preferred,
        )

    def facts(self) -> dict[str, str | int | bool]:
        export = self._export
        if export is None:
            return {"server": self._link.server}
        return {
            "server": self._link.server,
            "description": export.description or "none",
            "smallest read": f"{export.block_min} bytes, {export.block_preferred} preferred",
            "largest read": f"{export.block_max} bytes",
            "several connections": "yes" if export.multi_conn else "no: demand and stream share one",
            "replies": "structured" if export.structured else "simple",
            "tells its holes": "yes" if export.block_status else "no",
        }

    def watch(self, on_change: Callable[[LinkState], None], lost_after_s: float | None) -> None:
        self._link.watch(on_change, lost_after_s)

    def retry_now(self) -> None:
        self._link.retry_now()

    def let_go(self) -> None:
        self._link.let_go()

    def close(self) -> None:
        self._link.close()


def _need(session: Session, server_count: int) -> Need:
    export = session.export
    alignment = max(export.block_min, ALIGNMENT_MIN)
    most = export.block_max if server_count == 1 else min(export.block_max, LENGTH_MAX_OF_SEVERAL)
    length_max = most - most % alignment
    if length_max == 0:
        raise SourceError(
            f"the server sends at most {export.block_max} bytes at a time, less than a page", errno=errno.EINVAL
        )
    return Need(export.size, alignment, length_max, export.block_preferred)


def _array(head: bytes, size: int, name: str) -> ArrayDescription | None:
    """The array of what begins like a .npy file. Where the name does not say that it is one, a broken header is data
    that happens to begin so."""
    try:
        return parse_npy(head, size, name)
    except SourceError:
        if name.lower().endswith(".npy"):
            raise
        return None
