"""play: the show from its first file to its last count. Prints nothing: show draws, the command says the rest."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from pcshare.demo import cast, judge, source
from pcshare.demo.cast import Player
from pcshare.demo.judge import Verdict
from pcshare.demo.leftovers import Inventory, Leaked
from pcshare.demo.stage import Performance, Stage
from pcshare.launcher import Coordinator
from pcshare.scratch import scratch_folder
from pcshare.status import BlockStatus, StatusReport

RESULTS_SOURCE = "zero:1M"
DRAFT_SHARE = 3  # the draft takes this part of the time that the file takes: longer than its editor needs to start


@dataclass(frozen=True)
class Options:
    """What the user chose. source None: a file is made, of size bytes. rate None: so that it takes arrival_s."""

    source: Path | None
    size: int
    delay_s: float
    rate: int | None
    arrival_s: float


class Audience(Protocol):
    """Who is told what happens."""

    def say(self, text: str) -> None: ...

    def act(self, title: str) -> None: ...

    def watch(
        self, report: StatusReport, bitmap_of: Callable[[BlockStatus], bytes], players: Sequence[Player]
    ) -> None: ...


@dataclass
class Outcome:
    """Everything that was found out."""

    path: Path
    rate: int
    first: Performance  # helpers at work while the file arrives
    second: Performance  # the same on memory that was copied first
    verdicts: list[Verdict]  # of the first, in its order
    second_verdicts: list[Verdict]
    trespasser_refused: bool
    bytes_compared: int
    bytes_differing: int
    leaked: Leaked

    @property
    def blocks(self) -> tuple[BlockStatus, ...]:
        return self.first.report.blocks

    def pages(self, kind: str) -> int:
        return sum(int(getattr(block, f"{kind}_pages")) for block in self.blocks)

    @property
    def mismatched_bytes(self) -> int:
        return judge.mismatched_bytes(self.bytes_differing, [*self.verdicts, *self.second_verdicts])

    @property
    def all_right(self) -> bool:
        return all(verdict.right and not verdict.complaint for verdict in [*self.verdicts, *self.second_verdicts])

    @property
    def kept(self) -> bool:
        return any(verdict.name == "editor" and verdict.right for verdict in self.verdicts)

    @property
    def ok(self) -> bool:
        clean = not self.mismatched_bytes and not self.pages("foreign") and self.leaked.nothing
        return clean and self.all_right and self.kept and self.trespasser_refused

    @property
    def time_to_first_result_s(self) -> float | None:
        """The earliest first result of all, from that helper's first attach."""
        return min(_first_results(self.first), default=None)

    @property
    def copy_first_s(self) -> float | None:
        """The same when everything is copied first: until the copy is there, and from then to the earliest result."""
        earliest = min(_first_results(self.second), default=None)
        return None if earliest is None or self.second.copied_s is None else self.second.copied_s + earliest


def _first_results(performance: Performance) -> list[float]:
    found = (player.report.get("first_result_s") for player in performance.players)
    return [float(first) for first in found if first is not None]


class Play:
    """The show. run() leaves nothing behind, whatever ends it."""

    def __init__(self, options: Options, audience: Audience) -> None:
        self._options = options
        self._audience = audience
        self._names = [f"demo-{os.getpid()}-{secrets.token_hex(3)}-{act}" for act in ("arriving", "copied")]

    def run(self) -> Outcome:
        with scratch_folder("pcshare-demo-") as folder:
            return self._run(folder)

    def _run(self, folder: Path) -> Outcome:
        path = self._file(folder)
        draft = source.make_draft(folder, path)
        plan = cast.roles(path, draft)
        if not cast.has_numpy():
            self._audience.say(cast.NUMPY_HINT)
        self._audience.say("what is right: computed from the file itself, with read()")
        expected = judge.expected_results(plan, lambda name: None)
        before = Inventory()  # after numpy has started its threads
        rate = source.rate_for(path, self._options.rate, self._options.arrival_s)
        first, compared, differing = self._arriving(path, draft, plan, rate, before)
        second = self._copied(path, [role for role in plan if role.again], rate, before)
        judged = [player for player in first.players if player.name in expected]
        refused = [judge.was_refused(player) for player in first.players if player.name not in expected]
        return Outcome(
            path=path,
            rate=rate,
            first=first,
            second=second,
            verdicts=[judge.judge(player, expected) for player in judged],
            second_verdicts=[judge.judge(player, expected) for player in second.players],
            trespasser_refused=all(refused) and bool(refused),
            bytes_compared=compared,
            bytes_differing=differing,
            leaked=before.leaked(self._names),
        )

    def _file(self, folder: Path) -> Path:
        options = self._options
        if options.source is not None:
            return source.given_file(options.source)
        self._audience.say("packing the interpreter's library into one file")
        return source.make_file(folder, options.size)

    def _arriving(
        self, path: Path, draft: Path, plan: list[cast.Role], rate: int, before: Inventory
    ) -> tuple[Performance, int, int]:
        """The first act; then every byte of the block is compared with the file."""
        blocks = {
            cast.DATA: source.slowed(path, self._options.delay_s, rate),
            cast.RESULTS: RESULTS_SOURCE,
            cast.DRAFT: source.slowed(draft, self._options.delay_s, rate_of_draft(path, draft, rate)),
        }
        stage = Stage(self._names[0], blocks, [cast.DRAFT], path.stat().st_size / rate)
        with stage.open() as coordinator:
            before.watch(_serving(coordinator))
            self._audience.act("computing while it arrives")
            performance = stage.perform([*plan, cast.trespasser()], self._audience.watch)
            before.watch(performance.sampler.processes)
            compared, differing = (0, 0) if performance.late else judge.compare_block(self._names[0], path)
        return performance, compared, differing

    def _copied(self, path: Path, plan: list[cast.Role], rate: int, before: Inventory) -> Performance:
        """The second act: the same file through the same filters is copied first, and then worked on."""
        blocks = {cast.DATA: source.slowed(path, self._options.delay_s, rate), cast.RESULTS: RESULTS_SOURCE}
        stage = Stage(self._names[1], blocks, [], path.stat().st_size / rate)
        with stage.open() as coordinator:
            before.watch(_serving(coordinator))
            self._audience.act("the same with everything copied first")
            performance = stage.perform(plan, self._audience.watch, copy_first=True)
            before.watch(performance.sampler.processes)
        return performance


def rate_of_draft(path: Path, draft: Path, rate: int) -> int:
    """So that it is on its way for a good part of the time that the file is: the stream brings one after the other."""
    return max(1, DRAFT_SHARE * rate * draft.stat().st_size // path.stat().st_size)


def _serving(coordinator: Coordinator) -> list[psutil.Process]:
    """The coordinator and its keeper."""
    report = coordinator.status()
    return [psutil.Process(report.pid), psutil.Process(report.keeper_pid)]
