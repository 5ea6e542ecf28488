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
    """Plays every contest of these sub-benchmarks; with only_check those that belong to the check. HostError: the host
    lacks what one of them needs, told before anything is measured."""
    outcome = Outcome(machine(), rounds)
    begin_s = time.monotonic()
    with Lab(folder, is_check=only_check) as lab:
        chosen = [contest for name in names for contest in contests_of(name, lab) if contest.in_check or not only_check]
        lab.need(*(tool for contest in chosen for tool in contest.needs))
        lab.need_huge_pages(max((contest.huge_bytes for contest in chosen), default=0))
        tell("touching memory, so that it is there")
        lab.warm()
        count = _Count(sum(turns(contest, rounds) for contest in chosen), tell)
        for contest in chosen:
            with lab.huge_pages(contest.huge_bytes):
                outcome.played.append(play(contest, rounds, count.tell))
    outcome.seconds = time.monotonic() - begin_s
    outcome.machine["load_after"] = os.getloadavg()[0]
    return outcome


@dataclass
class _Count:
    """Says before each turn which one of all it is."""

    turns: int
    tell_line: Progress
    done: int = 0

    def tell(self, line: str) -> None:
        self.done += 1
        self.tell_line(f"{self.done}/{self.turns} {line}")


def rounds_of(contest: Contest, rounds: int) -> int:
    return min(contest.rounds or rounds, rounds)


def turns(contest: Contest, rounds: int) -> int:
    return rounds_of(contest, rounds) * len(contest.rivals)


def play(contest: Contest, rounds: int, tell: Progress) -> Played:
    """Every rival once in each round; who is first takes turns."""
    played = Played(contest, {name: [] for name in contest.rivals})
    for number in range(rounds_of(contest, rounds)):
        for name in sorted(contest.rivals, reverse=number % 2 == 1):
            tell(f"{contest.name}: {name}, round {number + 1}")
            played.figures[name].append(contest.rivals[name](number))
    return played
