"""scan: one helper reads a cold block in order, its file in the page cache, beside the programs that fill a block.

Without the stream every page is a fault, unless it is read ahead; with it helper and stream go the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

from pcshare.bench.contest import OURS, Contest, Figures, Row
from pcshare.bench.fill import LIMIT, limit
from pcshare.bench.lab import ANY_CPU, GIB, MIB, Lab

DOES_NOT_MEASURE = "a disk or a network, what the helper does with the bytes (it reads one of each page), huge pages"
LENGTH, CHECK_LENGTH = GIB, 512 * MIB


def contests(lab: Lab) -> Sequence[Contest]:
    return [_contest(lab, "lazy"), _contest(lab, "eager")]


def _contest(lab: Lab, stream: str) -> Contest:
    length = lab.length(LENGTH, CHECK_LENGTH)

    def ours(_: int) -> Figures:
        with lab.coordinator(lab.file(length), "paused" if stream == "eager" else stream) as serving:
            return lab.touch(
                *("scan", ANY_CPU, f"pcshare:{serving.socket}"),
                at_start=lambda: lab.start_stream(serving) if stream == "eager" else None,
            )

    return Contest(
        name=f"scan, stream {stream}",
        stream="paused, then eager" if stream == "eager" else stream,
        pinning="none",
        rivals={OURS: ours, LIMIT: lambda _: limit(lab, length)},
        rows=[Row("speed", "bytes_per_s", LIMIT, number="F7", at_least=0.6)],
        in_check=True,
    )
