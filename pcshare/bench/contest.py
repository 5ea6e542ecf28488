"""contest: what is measured beside what, and what follows from the figures: ratios, their spread, a verdict.

Runs nothing and prints nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Any

OURS = "pcshare"
CONFIDENCE = 0.95  # of the interval in which the median lies; fewer than six runs give less: then it is all of them

Figures = Mapping[str, float]  # by name: "p50" (us), "seconds", "bytes_per_s" ...
Rival = Callable[[int], Figures]  # measures once; told the round's number, from 0 on, as a seed


@dataclass(frozen=True)
class Row:
    """A ratio: one figure of one rival divided by a figure of another. at_most or at_least: what it must keep to; a row
    without either is only told. number: under which it is known (F1 ...), or "". against "": no ratio, the
    figure itself must keep to it.

    Of times (p50, seconds: less is better) a row says at_most; how fast bytes come is told as bytes_per_s (more is
    better), of which it says at_least."""

    what: str
    figure: str
    against: str
    against_figure: str = ""  # the same
    of: str = OURS
    number: str = ""
    at_most: float | None = None
    at_least: float | None = None
    contains: float | None = None  # the interval must contain it
    is_optional: bool = False  # a round may be without the figure; told of the rounds that have it, if there are any


@dataclass(frozen=True)
class Contest:
    """Rivals that are measured in turns, and the rows that follow. stream and pinning: of pcshare's coordinator.

    needs: programs of other people's, as lab.TOOLS names them. huge_bytes: of huge pages that must be free meanwhile.
    """

    name: str
    stream: str
    pinning: str
    rivals: Mapping[str, Rival]
    rows: Sequence[Row]
    in_check: bool = False  # belongs to --check
    rounds: int | None = None  # at most, where one takes long
    needs: Sequence[str] = ()
    huge_bytes: int = 0


@dataclass
class Played:
    """The figures of a contest, round by round."""

    contest: Contest
    figures: dict[str, list[Figures]] = field(default_factory=dict)

    def results(self) -> Iterator[Result]:
        for row in self.contest.rows:
            pairs = [(a, b) for a, b in zip(*self._figures(row), strict=True) if a is not None and b is not None]
            if pairs:
                ours, theirs = map(list, zip(*pairs, strict=True))
                yield Result(self.contest, row, ours, theirs)

    def _figures(self, row: Row) -> tuple[list[float | None], list[float | None]]:
        """Those of one and of the other, round by round."""

        def values(rival: str, figure: str) -> list[float | None]:
            return [one.get(figure) if row.is_optional else one[figure] for one in self.figures[rival]]

        ours = values(row.of, row.figure)
        return ours, values(row.against, row.against_figure or row.figure) if row.against else [1.0] * len(ours)


@dataclass(frozen=True)
class Result:
    """A row with its figures, round by round."""

    contest: Contest
    row: Row
    ours: Sequence[float]
    theirs: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """Infinite where the other figure was 0 and ours was not; 1 where both were."""
        return [_ratio(a, b) for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def name(self) -> str:
        """The row in a few words, for messages."""
        against = f" against {self.row.against}" if self.row.against else ""
        return f"{self.row.number} {self.contest.name}: {self.row.what}{against}".lstrip()

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """In which the median of many runs lies, as far as these tell."""
        return median_interval(self.ratios)

    @property
    def is_beyond(self) -> bool:
        """The whole interval lies beyond what the row must keep to."""
        low, high = self.interval
        row = self.row
        return (
            (row.at_most is not None and low > row.at_most)
            or (row.at_least is not None and high < row.at_least)
            or (row.contains is not None and not low <= row.contains <= high)
        )

    @property
    def is_met(self) -> bool | None:
        """By the median; None where nothing is asked."""
        row = self.row
        if row.contains is not None:
            return not self.is_beyond
        if row.at_most is None and row.at_least is None:
            return None
        return (row.at_most is None or self.median <= row.at_most) and (
            row.at_least is None or self.median >= row.at_least
        )

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval
        row = self.row
        return {
            "contest": self.contest.name,
            "stream": self.contest.stream,
            "pinning": self.contest.pinning,
            "number": row.number,
            "what": row.what,
            "of": row.of,
            "figure": row.figure,
            "against": row.against,
            "against_figure": row.against_figure or row.figure,
            "ours": list(self.ours),
            "theirs": list(self.theirs),
            "ratios": [_finite(ratio) for ratio in self.ratios],
            "median": _finite(self.median),
            "interval": [_finite(low), _finite(high)],
            "at_most": row.at_most,
            "at_least": row.at_least,
            "contains": row.contains,
            "met": self.is_met,
            "beyond": self.is_beyond,
        }


def _finite(ratio: float) -> float | None:
    """JSON has no infinity."""
    return ratio if math.isfinite(ratio) else None


def _ratio(ours: float, theirs: float) -> float:
    if theirs:
        return ours / theirs
    return float("inf") if ours else 1.0


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics that holds the median with CONFIDENCE, whatever the distribution: the
    number of values below the median is binomial. Smallest and largest where there are too few."""
    ordered, n = sorted(values), len(values)
    outside = 0.0  # the probability that the median lies below ordered[low]
    low = 0
    while low < (n - 1) // 2:
        outside += comb(n, low) / 2**n
        if 1 - 2 * (outside + comb(n, low + 1) / 2**n) < CONFIDENCE:
            break
        low += 1
    return ordered[low], ordered[n - 1 - low]
