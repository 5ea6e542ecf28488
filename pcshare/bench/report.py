"""report: what a run has found, for people: tables for the terminal and for GitHub, and with plots.py pictures.

All is made of the JSON document of an outcome, so that it can be made again of a figures.json. Measures nothing.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pcshare.bench.contest import OURS, Played
from pcshare.bench.run import NAMES, Outcome, limits_of
from pcshare.errors import HostError

FIGURES, TABLES = "figures.json", "tables.md"
HEADINGS = ("number", "what", "stream", "pinning", "pcshare", "against", "figure", "ratio", "must be", "met")

Document = Mapping[str, Any]  # an outcome's to_json()

# Of figures, by their names: the unit to tell them in, and how much of the figure's own one is of it.
UNITS: Mapping[str, tuple[str, float]] = {
    **dict.fromkeys(("p50", "p99", "p99.9", "max", "p99_awake"), ("us", 1.0)),
    "seconds": ("s", 1.0),
    "cpu_s": ("s", 1.0),
    "cpu_ms": ("ms", 1.0),
    "cpu_percent": ("%", 1.0),
    "own_mib": ("MiB", 1.0),
    "bytes_per_s": ("GB/s", 1e-9),
    "faults_per_s": ("/s", 1.0),
}


def show(outcome: Outcome, console: Console) -> None:
    for played in outcome.played:
        console.print(contest_table(played))
    console.print(told_machine(outcome.to_json()))


def write(document: Document, folder: Path) -> Iterator[Path]:
    """All that was measured, tables of it, and pictures. HostError: what draws them is not installed."""
    need_plots()
    from pcshare.bench import plots

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ((FIGURES, json.dumps(document, indent=1) + "\n"), (TABLES, tables(document))):
        (folder / name).write_text(text)
        yield folder / name
    yield from plots.draw(document, folder)


def need_plots() -> None:
    """HostError: what draws is not installed. Said before anything is measured."""
    if find_spec("matplotlib") is None:
        raise HostError("matplotlib is not installed, which draws the plots", hint="pip install 'pcshare[plots]'")


def benchmark_of(contest: str) -> str:
    """The sub-benchmark with which a contest's name begins."""
    return contest.replace(",", " ").split()[0]


def told_machine(document: Document) -> str:
    machine = document["machine"]
    return (
        f"{machine['cpu']}, {machine['cpus']} CPUs{', virtual' if machine['virtual'] else ''}, "
        f"{machine['memory_gib']:g} GiB, Linux {machine['kernel']}; load {machine['load_before']:.1f} before and "
        f"{machine['load_after']:.1f} after; {document['seconds']:.0f} s"
    )


# -- tables


def contest_table(played: Played) -> Table:
    contest = played.contest
    table = Table(title=f"{contest.name} (stream {contest.stream}; {contest.pinning})", title_justify="left")
    for heading in ("", "what", "pcshare", "against", "figure", "ratio", "must be", ""):
        table.add_column(heading)
    for cells in rows(played):
        table.add_row(*cells)
    return table


def rows(played: Played) -> Iterator[Sequence[str]]:
    return (cells(result.to_json()) for result in played.results())


def tables(document: Document) -> str:
    """As GitHub shows them, one of each sub-benchmark."""
    told = [f"# Figures\n\n{told_machine(document)}; {document['rounds']} rounds.\n"]
    for name in NAMES:
        results = [result for result in document["results"] if benchmark_of(result["contest"]) == name]
        if results:
            told.append(f"## {name}: {NAMES[name]}\n\nDoes not measure: {limits_of(name)}.\n")
            told.append("\n".join(_markdown(results)) + "\n")
    return "\n".join(told)


def _markdown(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield _line(HEADINGS)
    yield _line(["---"] * len(HEADINGS))
    for result in results:
        number, what, *rest = cells(result)
        place = result["contest"].removeprefix(benchmark_of(result["contest"])).lstrip(", ")
        yield _line([number, f"{place}: {what}", result["stream"], result["pinning"], *rest])


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(text.replace('|', '/') for text in texts)} |"


def cells(result: Mapping[str, Any]) -> Sequence[str]:
    """A result in words: number, what, ours, against, theirs, ratio, bound, whether it is met."""
    is_alone = not result["against"]  # then the figure itself is bound
    unit = UNITS.get(result["figure"], ("", 1.0))[0]
    return (
        result["number"],
        result["what"] if result["of"] == OURS else f"{result['what']} ({result['of']})",
        _told(result["ours"], result["figure"]),
        result["against"],
        "" if is_alone else _told(result["theirs"], result["against_figure"]),
        "" if is_alone else f"{ratio(result['median'])} ({'-'.join(ratio(end) for end in result['interval'])})",
        f"{bound(result)} {unit}".rstrip() if is_alone else bound(result),
        {None: "", True: "yes", False: "no"}[result["met"]],
    )


def bound(result: Mapping[str, Any]) -> str:
    told = [
        *([f"<= {result['at_most']:g}"] if result["at_most"] is not None else []),
        *([f">= {result['at_least']:g}"] if result["at_least"] is not None else []),
        *([f"around {result['contains']:g}"] if result["contains"] is not None else []),
    ]
    return ", ".join(told)


def ratio(value: float | None) -> str:
    """JSON has no infinity: None."""
    return "infinite" if value is None else f"{value:.2f}"


def _told(values: Sequence[float], figure: str) -> str:
    unit, factor = UNITS.get(figure, ("", 1.0))
    return f"{spread([value * factor for value in values])} {unit}".rstrip()


def spread(values: Sequence[float]) -> str:
    """Median (smallest-largest), in three digits or so."""
    return f"{_short(statistics.median(values))} ({_short(min(values))}-{_short(max(values))})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
