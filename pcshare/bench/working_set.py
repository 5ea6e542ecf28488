"""working_set: a second start that brings first what the first start's helper touched, beside that first start.

The job: one helper looks at a tenth of the pages, at random, and the source takes 2 ms for whatever it is asked. Its
time is that from the first touch to the last. The set was recorded by a lazy start, which alone sees every touch. An
eager start that waits for bytes too, since the source gives 100 MB a second, is told beside one that does not: where
bytes cost nothing an eager stream brings the whole block before the helper has touched its part.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pcshare.bench.contest import Contest, Figures, Row
from pcshare.bench.lab import GIB, PAGE, Lab

LENGTH = GIB
PART = 0.1  # of the pages
DELAY, DELAY_RATE = "#delay=2ms", "#delay=2ms&rate=100M"
SEED = 2
ROUNDS = 5  # the first start of a lazy one takes a minute
FIRST, SECOND = "first start", "second start"
DEMANDED_MAX, TIME_MAX = 0.05, 0.4


def starts(lab: Lab) -> Sequence[Contest]:
    return [
        _contest(lab, "lazy", DELAY),
        _contest(lab, "eager", DELAY),
        _contest(lab, "eager", DELAY_RATE, ", 100 MB/s"),
    ]


def _contest(lab: Lab, stream: str, filters: str, place: str = "") -> Contest:
    recorded = lab.folder / "recorded.set"

    def started(stream: str, **options: Any) -> Figures:
        source = f"{lab.file(lab.length(LENGTH))}{filters}"
        with lab.coordinator(source, stream, **options) as serving:
            figures = lab.touch("list", lab.cpus[0], _look_ups(lab), f"pcshare:{serving.socket}")
            (block,) = serving.status().blocks
            return {**figures, "demanded": block.demand_pages}

    def record() -> Figures:
        recorded.unlink(missing_ok=True)
        return started("lazy", record=recorded)

    def first(_: int) -> Figures:
        return record() if stream == "lazy" else started(stream)

    def second(_: int) -> Figures:
        if not recorded.exists():
            record()
        return started(stream, replay=recorded)

    return Contest(
        name=f"after, working set, stream {stream}{place}",
        stream=stream,
        pinning="helper on CPU 0, fault threads as by default",
        rivals={FIRST: first, SECOND: second},
        rows=[
            Row("pages demanded", "demanded", FIRST, of=SECOND, number="F12", at_most=DEMANDED_MAX),
            Row("time", "seconds", FIRST, of=SECOND, number="F12", at_most=TIME_MAX),
        ],
        rounds=ROUNDS,
    )


def _look_ups(lab: Lab) -> Path:
    pages = lab.length(LENGTH) // PAGE
    path = lab.folder / "look-ups.list"
    path.write_bytes(array("Q", random.Random(SEED).sample(range(pages), int(pages * PART))).tobytes())
    return path
