"""report: what a status segment said at one moment, as values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Blocktime:
    """How long threads waited for pages, in microseconds; p50 and p99 interpolated inside a log2 bucket, max exact."""

    p50: float
    p99: float
    max: int
    total: int
    buckets: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"p50": self.p50, "p99": self.p99, "max": self.max}


def blocktime_quantile(buckets: Iterable[int], quantile: float, max_us: int) -> float:
    """Bucket i counts waits of [2^(i-1), 2^i) us, bucket 0 those under 1 us. 0.0 if nobody waited."""
    counts = tuple(buckets)
    rank = quantile * sum(counts)
    for index, count in enumerate(counts):
        if count and rank <= count:
            low, high = (1 << index) >> 1, 1 << index
            if index == len(counts) - 1:
                high = max(max_us, low)  # the last bucket is open
            return round(min(low + (high - low) * rank / count, max_us), 1)
        rank -= count
    return 0.0


@dataclass(frozen=True)
class BlockStatus:
    index: int
    idstr: str
    used_length: int
    page_size: int
    writable: bool
    state: str
    reason: str
    received_pages: int
    hole_pages: int
    page_count: int
    demand_pages: int
    stream_pages: int
    zero_pages: int
    foreign_pages: int
    lost_pages: int
    removed_pages: int
    bitmap_offset: int

    @property
    def fraction(self) -> float:
        """How much is here: 1.0 is complete."""
        return (self.received_pages + self.hole_pages) / self.page_count if self.page_count else 1.0

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("index", "bitmap_offset")}


@dataclass(frozen=True)
class HelperStatus:
    slot: int
    pid: int
    uid: int
    state: str
    block: str
    faults: int
    waiting: int
    demand_pages: int
    blocktime: Blocktime
    exporter: bool  # the coordinator's own, which gives its blocks out over NBD

    def to_json(self) -> dict[str, Any]:
        told = {key: value for key, value in vars(self).items() if key not in ("slot", "blocktime")}
        return {**told, "blocktime_us": self.blocktime.to_json()}


@dataclass(frozen=True)
class SourceStatus:
    """What an incoming migration says of the machine it comes from; sizes in bytes, page_sizes those of its blocks."""

    machine: str
    target_page_size: int
    page_sizes: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "page_sizes": list(self.page_sizes)}


@dataclass(frozen=True)
class StatusReport:
    """What a status segment says, and what became of the process that writes it.

    alive: that process exists (also stopped) and its socket listens. restarts: how often another process has gone on
    where the one before it was killed, or replaced; restarting: none serves now, and the keeper is to start one."""

    name: str
    pid: int
    keeper_pid: int
    restarts: int
    restarting: bool
    alive: bool
    stopped: bool
    state: str
    reason: str
    stream: str
    stream_rate: int
    socket: str
    faults: int
    helpers_joined: int
    helpers_left: int
    blocktime: Blocktime
    blocks: tuple[BlockStatus, ...]
    helpers: tuple[HelperStatus, ...]
    source: SourceStatus | None = None  # of an incoming migration that has announced its blocks

    def to_json(self) -> dict[str, Any]:
        apart = ("blocktime", "source", "blocks", "helpers")
        told = {key: value for key, value in vars(self).items() if key not in apart}
        return {
            **told,
            "source": self.source and self.source.to_json(),
            "blocktime_us": self.blocktime.to_json(),
            "blocks": [block.to_json() for block in self.blocks],
            "helpers": [helper.to_json() for helper in self.helpers],
        }
