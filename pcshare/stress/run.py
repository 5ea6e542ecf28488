"""run: rounds of stress until the time is up or something fails."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pcshare.scratch import scratch_folder
from pcshare.signals import signals_blocked
from pcshare.stress import plan
from pcshare.stress.crew import has_numpy
from pcshare.stress.round import Round
from pcshare.stress.tally import Tally

DEBUG_VARIABLE = "PCSHARE_DEBUG"  # the coordinator stays dumpable, so that psutil may look at it


@dataclass(frozen=True)
class Options:
    seconds: float
    helpers: int
    seed: int


@dataclass
class Summary:
    """What came of it."""

    options: Options
    seconds: float
    tally: Tally

    @property
    def ok(self) -> bool:
        return self.tally.ok

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "seed": self.options.seed, "seconds": round(self.seconds, 3), **self.tally.to_json()}


def run(
    options: Options,
    tell: Callable[[str], None],
    hold: Callable[[], None],
    plans: Iterator[plan.RoundPlan] | None = None,
    is_enough: Callable[[Tally], bool] = lambda tally: False,
) -> Summary:
    """Plays the rounds of the seed, or other plans. tell: a line for people after each; hold: called at the first
    failure. Ends when the time is up, or it is enough."""
    started_s = time.monotonic()
    deadline_s = started_s + options.seconds
    tally = Tally(options.seed)
    if has_numpy():
        with signals_blocked():  # they are for the main thread
            import numpy  # noqa: F401  (its threads start with it, and are no leak of a round)
    with _dumpable():
        for drawn in plans or plan.rounds(options.seed, options.helpers):
            tally.where = _where(drawn)
            with scratch_folder("pcshare-stress-") as folder:
                Round(drawn, folder, options.helpers, tally, deadline_s, _telling(hold, tally, tell)).play()
            tally.rounds += 1
            tell(_line(tally, time.monotonic() - started_s))
            if time.monotonic() >= deadline_s or tally.failures or is_enough(tally):
                break
    return Summary(options, time.monotonic() - started_s, tally)


def _telling(hold: Callable[[], None], tally: Tally, tell: Callable[[str], None]) -> Callable[[], None]:
    """Says what is held before it holds."""

    def hold_told() -> None:
        for failure in tally.failures:
            tell(f"FAILED {failure}")
        hold()

    return hold_told


def _where(drawn: plan.RoundPlan) -> str:
    kinds = f"{'2M' if drawn.huge else '4K'} pages, stream {drawn.stream}, {'poison' if drawn.poison else 'pause'}"
    if drawn.dies_at_steps:
        return f"round {drawn.number}"
    limit = ", few helpers" if drawn.helpers_max else ", few fds" if drawn.fds_spare else ""
    return f"round {drawn.number}: {', '.join(block.name for block in drawn.blocks)}; {kinds}{limit}, {drawn.ending}"


def _line(tally: Tally, elapsed_s: float) -> str:
    kills = f"killed {tally.kills:,} helpers, {tally.coordinator_kills:,} coordinators, {tally.source_kills:,} sources"
    counts = f"{sum(tally.actions.values()):,} actions, {tally.joins:,} joins, {kills}, {tally.restarts:,} restarts"
    checked = f"{tally.faults:,} faults, {tally.bytes_checked >> 20:,} MiB and {tally.writes_checked:,} writes checked"
    trouble = f", {len(tally.failures)} failures" if tally.failures else ""
    return f"{elapsed_s:6.1f} s  {tally.where}  {counts}, {checked}{trouble}"


@contextmanager
def _dumpable() -> Any:
    before = os.environ.get(DEBUG_VARIABLE)
    os.environ[DEBUG_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[DEBUG_VARIABLE]
        else:
            os.environ[DEBUG_VARIABLE] = before
