"""arms: processes that will die at a named step: who has been told to, and who has done it.

A file each, which the process reads at its start and removes at its death (core/trace.h). Starts and kills nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pcshare import trace
from pcshare.stress.tally import Tally


@dataclass(frozen=True)
class Armed:
    """who: of its party, one of several."""

    party: str
    who: str
    step: str


class Arms:
    """Of one round. A process that is started with its path() in trace.DIE_VARIABLE is armed if arm() came before."""

    def __init__(self, folder: Path, tally: Tally) -> None:
        self._folder, self._tally = folder, tally
        self._armed: dict[str, Armed] = {}
        self._died: set[str] = set()  # since they were armed

    def path(self, who: str) -> Path:
        return self._folder / f"die-{who}"

    def arm(self, party: str, who: str, step: str, passings: int) -> None:
        """Who was armed before and has not died lives on."""
        self.disarm(who)
        trace.write_death(self.path(who), step, passings)
        self._armed[who] = Armed(party, who, step)
        self._died.discard(who)

    def disarm(self, who: str) -> None:
        if who not in self._armed:
            return
        try:
            self.path(who).unlink()
            del self._armed[who]
        except FileNotFoundError:
            pass  # it is dead, and is taken as that

    def is_waiting(self) -> bool:
        return any(self.path(who).exists() for who in self._armed)

    def has_died(self, who: str) -> bool:
        return who in self._died or self._has_just_died(who)

    def _has_just_died(self, who: str) -> bool:
        return who in self._armed and not self.path(who).exists()

    def take_dead(self) -> Iterator[Armed]:
        for one in [one for who, one in self._armed.items() if self._has_just_died(who)]:
            del self._armed[one.who]
            self._died.add(one.who)
            self._tally.step_kills[one.step] += 1
            yield one

    def close(self) -> None:
        for who in list(self._armed):
            self.disarm(who)
