"""report: what a run has found, for people: a table for each contest, with figures, ratios and what they keep to."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pcshare.bench.contest import Played, Result
from pcshare.bench.run import Outcome

UNITS = {"p50": "us", "p99": "us", "p99.9": "us", "max": "us", "seconds": "s"}


def show(outcome: Outcome, console: Console) -> None:
    for played in outcome.played:
        console.print(contest_table(played))
    told = outcome.machine
    console.print(
        f"{told['cpu']}, {told['cpus']} CPUs{', virtual' if told['virtual'] else ''}, Linux {told['kernel']}, "
        f"load {told['load_before']:.1f} before and {told['load_after']:.1f} after; {outcome.seconds:.0f} s"
    )


def write(outcome: Outcome, folder: Path) -> Iterator[Path]:
    """figures.json: all that was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "figures.json"
    path.write_text(json.dumps(outcome.to_json(), indent=1))
    yield path


def contest_table(played: Played) -> Table:
    contest = played.contest
    table = Table(title=f"{contest.name} (stream {contest.stream}; {contest.pinning})", title_justify="left")
    for heading in ("", "what", "pcshare", "against", "figure", "ratio", "must be", ""):
        table.add_column(heading)
    for cells in rows(played):
        table.add_row(*cells)
    return table


def rows(played: Played) -> Iterator[Sequence[str]]:
    for result in played.results():
        row, unit = result.row, UNITS.get(result.row.figure, "")
        yield (
            row.number,
            row.what if row.of == "pcshare" else f"{row.what} ({row.of})",
            f"{spread(result.ours)} {unit}",
            row.against,
            f"{spread(result.theirs)} {unit}",
            f"{result.median:.2f} ({result.interval[0]:.2f}-{result.interval[1]:.2f})",
            bound(result),
            {None: "", True: "yes", False: "no"}[result.is_met],
        )


def bound(result: Result) -> str:
    row = result.row
    told = [
        *([f"<= {row.at_most:g}"] if row.at_most is not None else []),
        *([f">= {row.at_least:g}"] if row.at_least is not None else []),
        *([f"around {row.contains:g}"] if row.contains is not None else []),
    ]
    return ", ".join(told)


def spread(values: Sequence[float]) -> str:
    """Median (smallest-largest), in three digits or so."""
    return f"{_short(statistics.median(values))} ({_short(min(values))}-{_short(max(values))})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
