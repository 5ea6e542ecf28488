"""plots: pictures of a run's figures, as SVG: ratios against their bounds, latencies, throughput, peers.

Needs matplotlib (extra plots); only report.py imports this, and late. Draws what the JSON document of an outcome says,
the same each time: no date, no random names. Colours are those of Okabe and Ito, which people tell apart who see few.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pcshare.bench.contest import OURS
from pcshare.bench.report import UNITS, Document, benchmark_of, ratio, told_machine
from pcshare.bench.run import NAMES

BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY = (
    *("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#777777"),
)
RIVAL_COLOURS = (VERMILION, ORANGE, GREEN, PURPLE, SKY, GREY)
ALLOWED = "#DCE9F2"  # where a ratio may lie
QUANTILES = ("p50", "p99", "p99.9")
STYLE: Any = {  # matplotlib's own type of it differs from version to version
    "svg.hashsalt": "pcshare",
    "svg.fonttype": "none",  # text stays text: a tenth of the size, and can be searched
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
WIDTH_IN, ROW_IN, PANEL_IN = 10.0, 0.26, 0.75
RATIO_MIN, RATIO_MAX = 0.02, 50.0  # what lies beyond is drawn at the edge
MANY_TICKS = 1e4  # an axis whose ends are this far apart

Picture = Callable[[Document], Figure | None]


def draw(document: Document, folder: Path) -> Iterator[Path]:
    """One file a picture; none where nothing of it was measured."""
    pictures: Mapping[str, Picture] = {
        "ratios": ratios,
        "faults": latencies,
        "throughput": throughput,
        "peers": peers,
    }
    for name, picture in pictures.items():
        with matplotlib.rc_context(STYLE):
            figure = picture(document)
            if figure is not None:
                path = folder / f"{name}.svg"
                figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.15)
                yield path


# -- ratios


def ratios(document: Document) -> Figure | None:
    """Each as a dot with its interval, over the range in which it may lie; a panel of each sub-benchmark."""
    panels = {name: [one for one in document["results"] if _is_ratio_of(one, name)] for name in NAMES}
    panels = {name: results for name, results in panels.items() if results}
    if not panels:
        return None
    heights = [len(results) * ROW_IN + PANEL_IN for results in panels.values()]
    figure = Figure((WIDTH_IN, sum(heights) + PANEL_IN), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    ends = _ratio_range([one for results in panels.values() for one in results])
    for one, (name, results) in zip(axes, panels.items(), strict=True):
        _ratio_panel(one, results, ends)
        one.set_title(f"{name}: {NAMES[name]}", loc="left", fontweight="bold")
    axes[-1].set_xlabel("ratio of the first figure, mostly pcshare's, to the other one (logarithmic)")
    met, failed, told = (Line2D([], [], color=c, marker="o", lw=1.5) for c in (BLUE, VERMILION, GREY))
    keys = {
        "median keeps to its bound": met,
        "median does not": failed,
        "no bound": told,
        "where it may lie": Patch(color=ALLOWED),
    }
    _head(figure, "Ratios: median of the rounds, with its 95 % interval", document, keys)
    return figure


def _is_ratio_of(result: Mapping[str, Any], name: str) -> bool:
    return benchmark_of(result["contest"]) == name and bool(result["against"])


def _ratio_panel(axes: Axes, results: Sequence[Mapping[str, Any]], ends: tuple[float, float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(*ends)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_yticks(range(len(results)), [_label(result) for result in results])
    axes.axvline(1, color=GREY, lw=0.8, ls=":")
    for y, result in enumerate(results):
        colour = {True: BLUE, False: VERMILION, None: GREY}[result["met"]]
        median, low, high = (_clipped(value) for value in (result["median"], *result["interval"]))
        least, most = result["at_least"] or ends[0], result["at_most"] or ends[1]
        if result["contains"] is not None:
            axes.plot([result["contains"]] * 2, [y - 0.35, y + 0.35], color=BLUE, alpha=0.3, lw=3)
        elif result["at_least"] or result["at_most"]:
            axes.barh(y, most - least, left=least, height=0.7, color=ALLOWED)
        axes.plot([low, high], [y, y], color=colour, lw=1.5, solid_capstyle="butt")
        axes.plot(median, y, "o", color=colour, ms=5)
        axes.annotate(
            ratio(result["median"]), (1, y), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", color=colour, annotation_clip=False,
        )  # fmt: skip
    _plain_ticks(axes)
    axes.tick_params(axis="x", labelbottom=True)
    axes.tick_params(axis="y", length=0)


def _ratio_range(results: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    ends = [_clipped(end) for result in results for end in result["interval"]]
    bounds = [result[key] for result in results for key in ("at_most", "at_least", "contains") if result[key]]
    return min([0.5, *ends, *bounds]) / 1.3, max([2.0, *ends, *bounds]) * 1.3


def _clipped(ratio: float | None) -> float:
    return RATIO_MAX if ratio is None else min(max(ratio, RATIO_MIN), RATIO_MAX)


def _label(result: Mapping[str, Any]) -> str:
    place = result["contest"].removeprefix(benchmark_of(result["contest"])).lstrip(", ")
    number = f"{result['number']}  " if result["number"] else ""
    ours = "" if result["of"] == OURS else f" {result['of']}"
    return f"{number}{place}: {result['what']}{ours} / {result['against']}"


# -- latencies


def latencies(document: Document) -> Figure | None:
    """Quantiles of a fault, of every rival that tells them; a panel of each contest."""
    contests = [
        one for one in document["figures"]
        if benchmark_of(one["contest"]) in ("fault", "demand") and _tells(one, QUANTILES)
    ]  # fmt: skip
    if not contests:
        return None
    columns = min(3, len(contests))
    lines = -(-len(contests) // columns)
    figure = Figure((WIDTH_IN, 2.9 * lines + 1.1), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    colours = _colours(name for one in contests for name in _tells(one, QUANTILES))
    for panel, one in zip(axes, contests, strict=False):
        _latency_panel(panel, one, colours)
    for panel in list(axes)[len(contests) :]:
        panel.set_visible(False)
    keys = {name: Line2D([], [], color=colour, marker="o") for name, colour in colours.items()}
    _head(
        figure,
        "One fault: how long the touch of a missing page takes (median of the rounds, their range)",
        document,
        keys,
    )
    return figure


def _latency_panel(axes: Axes, contest: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    names = _tells(contest, QUANTILES)
    axes.set_yscale("log")
    for number, name in enumerate(names):
        rounds = contest["rivals"][name]
        shift = (number - (len(names) - 1) / 2) * 0.08  # so that ranges do not hide each other
        values = [[one[quantile] for one in rounds] for quantile in QUANTILES]
        _points(axes, [x + shift for x in range(len(QUANTILES))], values, colours[name])
    axes.set_title(contest["contest"], loc="left")
    axes.set_xticks(range(len(QUANTILES)), QUANTILES)
    axes.set_xlim(-0.4, len(QUANTILES) - 0.6)
    axes.grid(axis="y", color="#DDDDDD", lw=0.6)
    axes.set_ylabel("us (logarithmic)")
    _plain_ticks(axes, is_y=True)


def _points(axes: Axes, places: Sequence[float], values: Sequence[Sequence[float]], colour: str) -> None:
    medians = [statistics.median(one) for one in values]
    axes.errorbar(
        places, medians, yerr=_range_of(values, medians), color=colour, marker="o", ms=4.5, lw=1.4, elinewidth=1
    )


# -- throughput


def throughput(document: Document) -> Figure | None:
    contests = [
        one for one in document["figures"]
        if benchmark_of(one["contest"]) in ("fill", "scan") and _tells(one, ["bytes_per_s"])
    ]  # fmt: skip
    if not contests:
        return None
    figure = Figure((WIDTH_IN, 4.4), layout="constrained")
    axes = figure.subplots()
    colours = _colours(name for one in contests for name in _tells(one, ["bytes_per_s"]))
    for place, one in enumerate(contests):
        _bars(axes, place, one, colours)
    axes.set_xticks(range(len(contests)), [one["contest"] for one in contests])
    axes.set_xlim(-0.6, len(contests) - 0.4)
    axes.set_ylabel("GB/s")
    axes.margins(y=0.12)
    axes.grid(axis="y", color="#DDDDDD", lw=0.6)
    keys = {name: Patch(color=colour) for name, colour in colours.items()}
    _head(figure, "A whole block: how fast it comes (median of the rounds, their range)", document, keys)
    return figure


def _bars(axes: Axes, place: int, contest: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    names = _tells(contest, ["bytes_per_s"])
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        speeds = [one["bytes_per_s"] * UNITS["bytes_per_s"][1] for one in contest["rivals"][name]]
        median, x = statistics.median(speeds), place + (number - (len(names) - 1) / 2) * width
        axes.bar(x, median, width * 0.92, color=colours[name], yerr=_range_of([speeds], [median]), ecolor="#333333")
        axes.annotate(f"{median:.2f}", (x, max(speeds)), xytext=(0, 3), textcoords="offset points", ha="center")


# -- peers


def peers(document: Document) -> Figure | None:
    """Times of both, as dots on one line."""
    results = [one for one in document["results"] if _is_ratio_of(one, "peers") and _in_ms(one) is not None]
    if not results:
        return None
    figure = Figure((WIDTH_IN, len(results) * ROW_IN * 1.1 + 1.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    colours = _colours(name for result in results for name in (OURS, result["against"]))
    for y, result in enumerate(results):
        factor = _in_ms(result) or 1.0
        ours, theirs = ([value * factor for value in result[key]] for key in ("ours", "theirs"))
        axes.plot([statistics.median(ours), statistics.median(theirs)], [y, y], color="#BBBBBB", lw=1.2, zorder=1)
        for name, values in ((result["against"], theirs), (OURS, ours)):
            axes.plot([min(values), max(values)], [y, y], color=colours[name], lw=3, alpha=0.35, solid_capstyle="butt")
            axes.plot(statistics.median(values), y, "o", color=colours[name], ms=6)
    axes.set_yticks(range(len(results)), [_peer_label(result) for result in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlabel("ms (logarithmic; left is better)")
    axes.grid(axis="x", color="#DDDDDD", lw=0.6)
    _plain_ticks(axes)
    keys = {name: Line2D([], [], color=colour, marker="o", lw=0) for name, colour in colours.items()}
    _head(figure, "The same work by peers (median of the rounds, their range)", document, keys)
    return figure


def _in_ms(result: Mapping[str, Any]) -> float | None:
    """What a figure is multiplied with; None: it is no time."""
    return {"us": 1e-3, "ms": 1.0, "s": 1e3}.get(UNITS.get(result["figure"], ("", 1.0))[0])


def _peer_label(result: Mapping[str, Any]) -> str:
    return f"{result['contest'].removeprefix('peers, ')}: {result['what']}"


# -- what all have


def _tells(contest: Mapping[str, Any], figures: Sequence[str]) -> list[str]:
    """The rivals of which these figures are known in every round, ours first."""
    names = [name for name, rounds in contest["rivals"].items() if all(set(figures) <= set(one) for one in rounds)]
    return sorted(names, key=lambda name: (name != OURS, name))


def _colours(names: Iterator[str]) -> Mapping[str, str]:
    """Of each rival, in the order in which they come: ours is blue, more than there are colours share them."""
    others = [name for name in dict.fromkeys(names) if name != OURS]
    return {OURS: BLUE, **{name: RIVAL_COLOURS[i % len(RIVAL_COLOURS)] for i, name in enumerate(others)}}


def _range_of(values: Sequence[Sequence[float]], medians: Sequence[float]) -> list[list[float]]:
    """For errorbar: how far down and up they go."""
    pairs = list(zip(values, medians, strict=True))
    return [[median - min(one) for one, median in pairs], [max(one) - median for one, median in pairs]]


def _plain_ticks(axes: Axes, *, is_y: bool = False) -> None:
    """0.5, 1, 2 ... on a logarithmic axis; powers of ten alone where there are many."""
    axis, (low, high) = (axes.yaxis, axes.get_ylim()) if is_y else (axes.xaxis, axes.get_xlim())
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < MANY_TICKS else (1.0,), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _head(figure: Figure, title: str, document: Document, keys: Mapping[str, Artist]) -> None:
    """Title, machine and key, above everything."""
    figure.legend(
        keys.values(), keys, title=f"{title}\n{told_machine(document)}\n", title_fontsize=10, alignment="left",
        loc="outside upper left", ncols=4, frameon=False, borderpad=0,
    )  # fmt: skip
