"""working_set: a second start that brings first what the first start's helper touched, beside that first start.

The job: one helper looks at a tenth of the pages, at random, and the source takes 2 ms for whatever it is asked. Its
time is that from the first touch to the last.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pcshare.bench.contest import Contest, Figures, Row
from pcshare.bench.lab import GIB, PAGE, Lab

LENGTH = GIB
PART = 0.1  # of the pages
DELAY = "#delay=2ms"
SEED = 2
ROUNDS = 3  # the first start of a lazy one takes a minute
FIRST, SECOND = "first start", "second start"
FAULTS_MAX, TIME_MAX = 0.05, 0.4


def starts(lab: Lab) -> Sequence[Contest]:
    return [_contest(lab, stream) for stream in ("lazy", "eager")]


def _contest(lab: Lab, stream: str) -> Contest:
    def started(**options: Any) -> Figures:
        source = f"{lab.file(lab.length(LENGTH))}{DELAY}"
        with lab.coordinator(source, stream, **options) as serving:
            figures = lab.touch("list", lab.cpus[0], _look_ups(lab), f"pcshare:{serving.socket}")
            return {**figures, "faults": serving.status().faults}

    recorded = lab.folder / f"{stream}.set"

    def first(_: int) -> Figures:
        recorded.unlink(missing_ok=True)
        return started(record=recorded)

    def second(number: int) -> Figures:
        if not recorded.exists():
            first(number)
        return started(replay=recorded)

    rows: Mapping[str, float] = {"faults": FAULTS_MAX, "seconds": TIME_MAX}
    return Contest(
        name=f"after, working set, stream {stream}",
        stream=stream,
        pinning="helper on CPU 0, fault threads as by default",
        rivals={FIRST: first, SECOND: second},
        rows=[Row(figure, figure, FIRST, of=SECOND, number="F12", at_most=most) for figure, most in rows.items()],
        rounds=ROUNDS,
    )


def _look_ups(lab: Lab) -> Path:
    pages = lab.length(LENGTH) // PAGE
    path = lab.folder / "look-ups.list"
    path.write_bytes(array("Q", random.Random(SEED).sample(range(pages), int(pages * PART))).tobytes())
    return path
