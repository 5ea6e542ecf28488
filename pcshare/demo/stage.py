"""stage: one performance: a coordinator, the cast on it, and what the status segment said meanwhile.

The clock of a performance starts when the coordinator serves and its stream is let go; the interpreters of the helpers
start after that. Counters are looked at from outside, a few dozen times a second: what a helper did between the last
look and its end is missing from its row, never from the totals of the blocks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import psutil

from pcshare import admin, errors
from pcshare.client import attach
from pcshare.demo.cast import DATA, Cast, Player, Role
from pcshare.launcher import Coordinator
from pcshare.protocol import AdminOp
from pcshare.status import BlockStatus, HelperStatus, StatusReader, StatusReport, blocktime_quantile

LOOK_PERIOD_S = 0.025
TIME_LIMIT_MIN_S = 60.0
TIME_LIMIT_FACTOR = 10  # times what arriving should take: a loaded machine is slow, and only a hang is for ever
GENERATIONS_MAX = 4  # from a pool's worker up to the helper that was started

Watch = Callable[[StatusReport, Callable[[BlockStatus], bytes], Sequence[Player]], None]


@dataclass
class Counters:
    """What a helper's attachments counted, taken together."""

    faults: int = 0
    demand_pages: int = 0
    buckets: list[int] = field(default_factory=list)
    max_us: int = 0

    def add(self, seen: HelperStatus) -> None:
        self.faults += seen.faults
        self.demand_pages += seen.demand_pages
        self.max_us = max(self.max_us, seen.blocktime.max)
        more = seen.blocktime.buckets
        self.buckets = [a + b for a, b in zip(self.buckets or [0] * len(more), more, strict=True)]

    def quantile_us(self, quantile: float) -> float:
        return blocktime_quantile(self.buckets, quantile, self.max_us)


class Sampler:
    """Remembers the last counters of every attachment, and whose it was."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, int, str], HelperStatus] = {}
        self._owners: dict[int, int | None] = {}
        self.processes: set[psutil.Process] = set()  # all that were ever attached

    def look(self, report: StatusReport, player_pids: set[int]) -> None:
        for helper in report.helpers:
            self._last[helper.slot, helper.pid, helper.block] = helper
            if helper.pid not in self._owners:
                self._owners[helper.pid] = _ancestor(helper.pid, player_pids)
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.processes.add(psutil.Process(helper.pid))

    def counters(self, pid: int) -> Counters:
        """Of a helper and the processes that it forked."""
        total = Counters()
        for seen in self._last.values():
            if self._owners.get(seen.pid) == pid:
                total.add(seen)
        return total


def _ancestor(pid: int, wanted: set[int]) -> int | None:
    """The nearest of the wanted processes, from this one upwards."""
    with contextlib.suppress(psutil.Error):
        process: psutil.Process | None = psutil.Process(pid)
        for _ in range(GENERATIONS_MAX):
            if process is None or process.pid in wanted:
                break
            process = process.parent()
        return process.pid if process is not None and process.pid in wanted else None
    return None


@dataclass
class Performance:
    """What came of it. Times in seconds from the moment in which the stream was let go."""

    players: list[Player]
    sampler: Sampler
    report: StatusReport  # when all had ended and everything had arrived
    copied_s: float | None  # when everything had arrived, where that was waited for before anybody started
    total_s: float  # when the last player had ended
    late: list[str]  # who did not end in time, and was killed

    def counters(self, player: Player) -> Counters:
        return self.sampler.counters(player.process.pid)


class Stage:
    """A coordinator that serves these blocks and streams nothing before the curtain rises."""

    def __init__(self, name: str, blocks: dict[str, str], writable: Iterable[str], arrival_s: float) -> None:
        self._arrival_s = arrival_s
        self._coordinator = Coordinator(name, blocks, stream="paused", writable=writable)
        self._started_s = 0.0

    @contextlib.contextmanager
    def open(self) -> Iterator[Coordinator]:
        with self._coordinator:
            yield self._coordinator

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def _raise_curtain(self) -> None:
        assert self._coordinator.socket is not None
        self._started_s = time.monotonic()
        admin.send(self._coordinator.socket, AdminOp.STREAM_EAGER)

    def perform(self, plan: Sequence[Role], watch: Watch, *, copy_first: bool = False) -> Performance:
        """Lets the stream go and the cast start at once, or with copy_first only when everything has arrived."""
        assert self._coordinator.socket is not None
        with StatusReader(self._coordinator.name) as reader, Cast(self._coordinator.socket) as cast:
            sampler = Sampler()
            self._raise_curtain()
            copied_s = self._copy(reader, watch) if copy_first else None
            cast.start(plan)
            late = self._play(cast, reader, sampler, watch)
            total_s = self.elapsed_s()
            if not late:
                self._wait_for_the_rest(reader, watch, cast)
            return Performance(cast.players, sampler, reader.report(), copied_s, total_s, late)

    def _copy(self, reader: StatusReader, watch: Watch) -> float:
        """Waits until the whole block has arrived while nobody touches it; when that was."""
        with attach(self._coordinator.name, DATA) as block:
            while not self._arrived(lambda: block.wait(timeout_s=LOOK_PERIOD_S)):
                self._look(reader, watch, [])
            return self.elapsed_s()

    def _wait_for_the_rest(self, reader: StatusReader, watch: Watch, cast: Cast) -> None:
        while any(block.state != "END" for block in self._look(reader, watch, cast.players).blocks):
            time.sleep(LOOK_PERIOD_S)

    @staticmethod
    def _arrived(wait: Callable[[], None]) -> bool:
        try:
            wait()
        except errors.AttachTimeout:
            return False
        return True

    def _play(self, cast: Cast, reader: StatusReader, sampler: Sampler, watch: Watch) -> list[str]:
        """Until every player has ended, or the time is up: who had to be killed."""
        pids = {player.process.pid for player in cast.players}
        while any(True for _ in cast.running()):
            sampler.look(self._look(reader, watch, cast.players), pids)
            if self._is_late():
                return cast.kill()
            time.sleep(LOOK_PERIOD_S)
        self._look(reader, watch, cast.players)
        return []

    def _is_late(self) -> bool:
        return self.elapsed_s() > max(TIME_LIMIT_MIN_S, TIME_LIMIT_FACTOR * self._arrival_s)

    def _look(self, reader: StatusReader, watch: Watch, players: Sequence[Player]) -> StatusReport:
        """One look at the segment; raises what would make everybody wait for ever."""
        report = reader.report()
        if not report.alive:
            raise errors.CoordinatorGone("the coordinator of the show has ended", hint="its last words are above")
        for block in report.blocks:
            if block.state == "PAUSED":
                raise errors.SourceError(f"block {block.idstr} is paused: {block.reason}", hint="is the file intact?")
        watch(report, reader.bitmap, players)
        return report
