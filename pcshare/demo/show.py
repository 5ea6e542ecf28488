"""show: what the audience sees: a live picture of the arriving pages, then tables and the promises in few words.

Draws what it is given. On a terminal the picture moves; elsewhere a line now and then says how far it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pcshare import units
from pcshare.demo import judge
from pcshare.demo.cast import DATA, Player
from pcshare.demo.play import Outcome
from pcshare.demo.stage import Performance
from pcshare.status import BlockStatus, StatusReport
from pcshare.views.progress import ProgressView, percent_text

PICTURE_PERIOD_S = 0.1
LINE_PERIOD_S = 0.5
REFRESHES_A_SECOND = 10
WIDE_COLUMNS = 110
LOG_COLUMNS = 120  # where no terminal says how wide it is
HELPER_COLUMNS = len("random_lookup")
RIGHT, WRONG = ("right", "green"), ("WRONG", "bold red")


def console_for(stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=LOG_COLUMNS)


class Stagehand:
    """The Audience of a play, on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._view = ProgressView()
        self._shown_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._curtain()

    def _curtain(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))

    def act(self, title: str) -> None:
        """A new act: the picture before stays as it was, a new one begins."""
        self._curtain()
        self._console.print(Text(title, style="bold"))
        self._view, self._shown_s = ProgressView(), 0.0
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, refresh_per_second=REFRESHES_A_SECOND)
            self._live.start()

    def watch(self, report: StatusReport, bitmap_of: Callable[[BlockStatus], bytes], players: Sequence[Player]) -> None:
        complete = all(block.state == "END" for block in report.blocks)
        period_s = PICTURE_PERIOD_S if self._live is not None else LINE_PERIOD_S
        if time.monotonic() - self._shown_s < period_s and not (complete and not any(True for _ in _open(players))):
            return
        self._shown_s = time.monotonic()
        if self._live is None:
            self._console.print(_line(report, players), soft_wrap=True)
            return
        self._view.update(report, bitmap_of)
        self._live.update(Group(self._view, _players_line(players)), refresh=True)


def _open(players: Sequence[Player]) -> list[Player]:
    return [player for player in players if not player.ended]


def _players_line(players: Sequence[Player]) -> Text:
    text = Text()
    for player in players:
        text.append(f"{player.name} ", style="dim" if player.ended else "yellow")
        text.append("done  " if player.ended else "works  ", style="green" if player.ended else "yellow")
    return text


def _line(report: StatusReport, players: Sequence[Player]) -> Text:
    """For a log: what the picture would show, in words."""
    blocks = [block for block in report.blocks if block.page_count > block.hole_pages]
    parts = [
        f"{block.idstr} {percent_text(block.fraction)} (demand {block.demand_pages:,}, stream {block.stream_pages:,})"
        for block in blocks
    ]
    waiting = sum(helper.waiting for helper in report.helpers)
    return Text(f"  {'  '.join(parts)}  helpers at work {len(_open(players))}, waiting {waiting}")


# -- what is printed at the end


def print_outcome(console: Console, outcome: Outcome) -> None:
    console.print()
    console.print(helpers_table(outcome, console.width >= WIDE_COLUMNS))
    console.print()
    console.print(comparison(outcome), soft_wrap=True)
    console.print()
    for line in promises(outcome):
        console.print(line, soft_wrap=True)
    for trouble in troubles(outcome):
        console.print(trouble, soft_wrap=True)


def helpers_table(outcome: Outcome, wide: bool) -> Table:
    """first, all: when a helper had its first result, and all of it; with a star: when everything is copied first."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="dim")
    table.add_column("helper", no_wrap=True, min_width=HELPER_COLUMNS)
    if wide:
        table.add_column("what it does")
    for column in ("first", "all", "first*", "all*", "faults", "p50", "p99", "demand", "result"):
        table.add_column(column, justify="right", no_wrap=True)
    again = {player.name: player for player in outcome.second.players}
    for player, verdict in zip(_judged(outcome), outcome.verdicts, strict=True):
        counters = outcome.first.counters(player)
        table.add_row(
            Text(player.name, style="bold"),
            *([player.role.does] if wide else []),
            *times(player.report, 0.0),
            *times(again[player.name].report if player.name in again else {}, outcome.second.copied_s),
            f"{counters.faults:,}",
            units.format_us(counters.quantile_us(0.5)),
            units.format_us(counters.quantile_us(0.99)),
            f"{counters.demand_pages:,}",
            _styled(verdict.right),
        )
    return table


def _judged(outcome: Outcome) -> list[Player]:
    names = {verdict.name for verdict in outcome.verdicts}
    return [player for player in outcome.first.players if player.name in names]


def _styled(right: bool) -> Text:
    word, style = RIGHT if right else WRONG
    return Text(word, style=style)


def times(report: dict[str, Any], offset_s: float | None) -> tuple[str, str]:
    """First result and total of a helper; counted from offset_s before its first attach."""
    found = (report.get("first_result_s"), report.get("total_s"))
    first, total = ("-" if s is None or offset_s is None else units.format_us((s + offset_s) * 1e6) for s in found)
    return first, total


def comparison(outcome: Outcome) -> Text:
    """The sentence that the show is for."""
    first, copied = outcome.time_to_first_result_s, outcome.copy_first_s
    size = units.format_bytes(_data(outcome).used_length)
    text = Text.assemble(
        (f"{size} at {units.format_rate(outcome.rate)}: ", "dim"),
        ("first result after " + _seconds(first), "bold green"),
        f"; copying everything first: after {_seconds(copied)}",
    )
    text.append(f"\nAll helpers done after {_seconds(outcome.first.total_s)}; copied first: ")
    text.append(f"{_seconds(outcome.second.total_s)}, of which {_seconds(outcome.second.copied_s)} were copying.")
    text.append(
        f"\n{outcome.pages('demand'):,} pages on demand, {outcome.pages('stream'):,} by the stream."
        "\nTimes of a helper count from its first attach; with * everything is copied first, measured in this run.",
        style="dim",
    )
    return text


def _data(outcome: Outcome) -> BlockStatus:
    return next(block for block in outcome.blocks if block.idstr == DATA)


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else units.format_us(seconds * 1e6)


def promises(outcome: Outcome) -> list[Text]:
    """What was shown, a line each."""
    read = sum(verdict.bytes_checked for verdict in outcome.verdicts)
    kept = judge.kept_writes(outcome.first)
    leaked = outcome.leaked
    return [
        _promise(
            "P1 no wrong byte",
            not outcome.mismatched_bytes and not outcome.pages("foreign") and outcome.bytes_compared > 0,
            f"{units.format_bytes(read)} read by helpers, {units.format_bytes(outcome.bytes_compared)} compared with "
            f"the file: {outcome.mismatched_bytes:,} bytes differ, {outcome.pages('foreign'):,} foreign pages",
        ),
        _promise(
            "P2 no lost write",
            outcome.kept,
            f"{kept['stamps']:,} writes are there; {kept['written_before_arrival']:,} were before the page came",
        ),
        _promise(
            "P7 nothing stays behind",
            leaked.nothing,
            f"{leaked.fds} fds, {leaked.processes} processes, {leaked.threads} threads, {leaked.shm} names in /dev/shm",
        ),
        _promise(
            "P8 nobody gets in who may not",
            outcome.trespasser_refused,
            "writing to the read-only block: refused when asked, SIGSEGV when forced, in that helper only",
        ),
    ]


def _promise(title: str, kept: bool, how: str) -> Text:
    word = ("kept    ", "green") if kept else ("BROKEN  ", "bold red")
    return Text.assemble(word, (title, "bold"), f": {how}")


def troubles(outcome: Outcome) -> list[Text]:
    """What went wrong, helper by helper."""
    lines = []
    for act, verdicts in (("", outcome.verdicts), (" (copied first)", outcome.second_verdicts)):
        for verdict in verdicts:
            if verdict.complaint or not verdict.right:
                what = f"found {verdict.found}, right is {verdict.expected}"
                lines.append(f"{verdict.name}{act}: {what}; {verdict.complaint}")
    lines += [f"{name} did not end in time and was killed" for name in _late(outcome.first, outcome.second)]
    return [Text(line, style="red") for line in lines]


def _late(*performances: Performance) -> list[str]:
    return [name for performance in performances for name in performance.late]


# -- the same for programs


def to_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome as `--json` prints it. Times in seconds, blocktime in microseconds."""
    return {
        "ok": outcome.ok,
        "source_bytes": _data(outcome).used_length,
        "rate": outcome.rate,
        "blocks": [block.to_json() for block in outcome.blocks],
        "helpers": _helpers_json(outcome),
        "demand_pages": outcome.pages("demand"),
        "stream_pages": outcome.pages("stream"),
        "foreign_pages": outcome.pages("foreign"),
        "bytes_compared": outcome.bytes_compared,
        "mismatched_bytes": outcome.mismatched_bytes,
        "time_to_first_result_s": outcome.time_to_first_result_s,
        "copy_first_s": outcome.copy_first_s,
        "copied_s": outcome.second.copied_s,
        "total_s": outcome.first.total_s,
        "copy_first_total_s": outcome.second.total_s,
        "writes": judge.kept_writes(outcome.first),
        "write_to_read_only_refused": outcome.trespasser_refused,
        "late": _late(outcome.first, outcome.second),
        "leaked": outcome.leaked.to_json(),
    }


def _helpers_json(outcome: Outcome) -> list[dict[str, Any]]:
    again = {player.name: player.report for player in outcome.second.players}
    copied_s = outcome.second.copied_s
    told = []
    for player, verdict in zip(_judged(outcome), outcome.verdicts, strict=True):
        counters = outcome.first.counters(player)
        copied = again.get(player.name, {})
        told.append(
            {
                "name": player.name,
                "pid": player.process.pid,
                "ok": verdict.right,
                "result": verdict.found,
                "expected": verdict.expected,
                "first_result_s": player.report.get("first_result_s"),
                "total_s": player.report.get("total_s"),
                "copy_first_result_s": _later(copied.get("first_result_s"), copied_s),
                "copy_first_total_s": _later(copied.get("total_s"), copied_s),
                "bytes_checked": verdict.bytes_checked,
                "faults": counters.faults,
                "demand_pages": counters.demand_pages,
                "blocktime_us": {
                    "p50": counters.quantile_us(0.5),
                    "p99": counters.quantile_us(0.99),
                    "max": counters.max_us,
                },
                "error": verdict.complaint or None,
            }
        )
    return told


def _later(seconds: float | None, offset_s: float | None) -> float | None:
    return None if seconds is None or offset_s is None else seconds + offset_s
