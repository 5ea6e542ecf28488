"""tally: what has been counted and what has failed, over all rounds. No I/O."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

FAILURES_MAX = 20  # more say nothing new


class Stuck(Exception):
    """Something waits for ever: nothing more can be learned from this round."""


@dataclass
class Tally:
    """Of one run. where is told with every failure, so that it can be repeated."""

    seed: int
    where: str = ""
    actions: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    faults: int = 0
    kills: int = 0
    joins: int = 0
    leaves: int = 0
    restarts: int = 0  # of actors that met a page that the source had lost
    bytes_checked: int = 0
    mismatched_bytes: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    grew: dict[str, int] = field(default_factory=dict)  # the most that each resource grew by in a round

    def see_growth(self, whose: str, resource: str, by: int) -> None:
        key = f"{whose} {resource}"
        self.grew[key] = max(self.grew.get(key, 0), by)

    def fail(self, text: str) -> None:
        told = f"{text} [{self.where}; repeat with --seed {self.seed}]"
        if len(self.failures) < FAILURES_MAX:
            self.failures.append(told)

    def note(self, text: str) -> None:
        """Something that was not done, and why."""
        self.notes[text] += 1

    @property
    def ok(self) -> bool:
        return not self.failures and not self.mismatched_bytes

    def to_json(self) -> dict[str, Any]:
        counted = {key: getattr(self, key) for key in ("rounds", "faults", "kills", "joins", "leaves", "restarts")}
        return {
            "actions": dict(self.actions),
            **counted,
            "bytes_checked": self.bytes_checked,
            "mismatched_bytes": self.mismatched_bytes,
            "notes": dict(self.notes),
            "grew": self.grew,
            "failures": self.failures,
        }
