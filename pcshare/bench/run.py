"""run: plays the rounds of contests: in each every rival once, in turns of who is first. Prints nothing by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from pcshare.bench.contest import Contest, Played, Result
from pcshare.bench.lab import Lab, machine

# In the order in which they run, with what each is about.
NAMES = {
    "fault": "one fault, its page at hand, beside the smallest server",
    "demand": "one fault, its page at a server, without and beside the stream",
    "fill": "a whole block, beside one process that does nothing but copy",
    "scan": "one helper that reads a cold block in order",
    "scale": "cost of a fault as size, helpers and blocks grow",
    "after": "a complete block, an idle coordinator, a second start with a working set",
    "peers": "the same work by nbdfuse and by QEMU",
}
ROUNDS_DEFAULT, ROUNDS_CHECK = 7, 5

Progress = Callable[[str], None]


@dataclass
class Outcome:
    """What a run has found."""

    machine: dict[str, Any]
    rounds: int
    seconds: float = 0.0
    played: list[Played] = field(default_factory=list)

    def results(self) -> Iterator[Result]:
        for one in self.played:
            yield from one.results()

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "results": [result.to_json() for result in self.results()],
            "figures": [{"contest": one.contest.name, "rivals": one.figures} for one in self.played],
        }


def contests_of(name: str, lab: Lab) -> Sequence[Contest]:
    contests: Sequence[Contest] = import_module(f"pcshare.bench.{name}").contests(lab)
    return contests


def limits_of(name: str) -> str:
    """What a sub-benchmark does not measure."""
    text: str = import_module(f"pcshare.bench.{name}").DOES_NOT_MEASURE
    return text


def run(names: Sequence[str], rounds: int, folder: Path | None, tell: Progress, *, only_check: bool = False) -> Outcome:
    """Plays every contest of these sub-benchmarks; with only_check those that belong to the check. HostError: a tool
    that one of them needs is missing, told before anything is measured."""
    outcome = Outcome(machine(), rounds)
    begin_s = time.monotonic()
    with Lab(folder) as lab:
        chosen = [contest for name in names for contest in contests_of(name, lab) if contest.in_check or not only_check]
        for contest in chosen:
            outcome.played.append(play(contest, contest.rounds or rounds, tell))
    outcome.seconds = time.monotonic() - begin_s
    outcome.machine["load_after"] = os.getloadavg()[0]
    return outcome


def play(contest: Contest, rounds: int, tell: Progress) -> Played:
    played = Played(contest, {name: [] for name in contest.rivals})
    for number in range(rounds):
        for name in sorted(contest.rivals, reverse=number % 2 == 1):
            tell(f"{contest.name}: {name}, round {number + 1} of {rounds}")
            played.figures[name].append(contest.rivals[name](number))
    return played
