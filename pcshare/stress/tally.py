"""tally: what has been counted and what has failed, over all rounds. No I/O."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

FAILURES_MAX = 20  # more say nothing new


class Stuck(Exception):
    """Something waits for ever: nothing more can be learned from this round."""


class Zero(StrEnum):
    """What must never be counted."""

    WRONG_BYTES = "wrong_bytes"
    LOST_WRITES = "lost_writes"
    STUCK = "stuck"
    LEAKS = "leaks"
    OTHER = "other"


@dataclass
class Tally:
    """Of one run. where is told with every failure, so that it can be repeated."""

    seed: int
    where: str = ""
    actions: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    faults: int = 0
    kills: int = 0  # of helpers
    coordinator_kills: int = 0
    source_kills: int = 0
    restarts: int = 0  # of coordinators
    replaces: int = 0
    joins: int = 0
    leaves: int = 0
    refusals: int = 0  # of helpers that were too many
    step_kills: Counter[str] = field(default_factory=Counter)  # of all these, those that died at a named step
    lost_deaths: int = 0  # of actors that met a page that the source had lost
    bytes_checked: int = 0
    writes_checked: int = 0
    recorded_pages: int = 0  # in the working sets that coordinators wrote
    waits_ms: list[float] = field(default_factory=list)  # for each time without a coordinator: the longest touch
    notes: Counter[str] = field(default_factory=Counter)
    zeros: Counter[Zero] = field(default_factory=lambda: Counter(dict.fromkeys(Zero, 0)))
    failures: list[str] = field(default_factory=list)
    grew: dict[str, int] = field(default_factory=dict)  # the most that each resource grew by in a round

    def see_growth(self, whose: str, resource: str, by: int) -> None:
        key = f"{whose} {resource}"
        self.grew[key] = max(self.grew.get(key, 0), by)

    def fail(self, text: str, zero: Zero = Zero.OTHER, count: int = 1) -> None:
        told = f"{text} [{self.where}; repeat with --seed {self.seed}]"
        self.zeros[zero] += count
        if len(self.failures) < FAILURES_MAX:
            self.failures.append(told)

    def note(self, text: str) -> None:
        """Something that was not done, and why."""
        self.notes[text] += 1

    def new_outage(self) -> int:
        """A time without a coordinator begins: its number."""
        self.waits_ms.append(0.0)
        return len(self.waits_ms) - 1

    def see_wait(self, outage: int, waited_ms: float) -> None:
        self.waits_ms[outage] = max(self.waits_ms[outage], waited_ms)

    @property
    def ok(self) -> bool:
        return not self.failures

    @staticmethod
    def must_be_zero() -> list[Zero]:
        """Those that have a name."""
        return [zero for zero in Zero if zero is not Zero.OTHER]

    def longest_waits_ms(self) -> dict[str, float | int | None]:
        """Across coordinators' restarts: of each the longest touch that overlapped it."""
        waited = [wait_ms for wait_ms in self.waits_ms if wait_ms]
        median = statistics.median(waited) if waited else None
        return {"count": len(waited), "median": median, "max": max(waited, default=None)}

    def to_json(self) -> dict[str, Any]:
        counted = (
            *("rounds", "faults", "kills", "coordinator_kills", "source_kills", "restarts", "replaces", "joins"),
            *("leaves", "refusals", "lost_deaths", "bytes_checked", "writes_checked", "recorded_pages"),
        )
        return {
            "actions": dict(self.actions),
            **{key: getattr(self, key) for key in counted},
            "step_kills": dict(sorted(self.step_kills.items())),
            **{str(zero): self.zeros[zero] for zero in self.must_be_zero()},
            "restart_wait_ms": self.longest_waits_ms(),
            "notes": dict(self.notes),
            "grew": self.grew,
            "failures": self.failures,
        }
