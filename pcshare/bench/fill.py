"""fill: how fast the stream brings a whole block, its file in the page cache, beside programs that do nothing but copy.

The limit is the faster of two (per round): one reads and copies by UFFDIO_COPY, the other reads and writes the memfd
(bench-limit copy, pwrite; huge pages cannot be written so). One thread each; pcshare has one that reads beside one that
copies. What a plain memcpy does on this machine is told too.
"""

from __future__ import annotations

from collections.abc import Sequence

from pcshare.bench.contest import OURS, Contest, Figures, Row
from pcshare.bench.lab import GIB, HUGE_PAGE, MIB, PAGE, Lab
from pcshare.errors import PcshareError

DOES_NOT_MEASURE = "a disk or a network, helpers that touch meanwhile, what memory costs that the host has to find"
LENGTH, CHECK_LENGTH = 2 * GIB, 512 * MIB
LIMIT = "copy or pwrite"
MEMCPY = "memcpy into memory that is there"


def contests(lab: Lab) -> Sequence[Contest]:
    return [
        _contest(lab, PAGE, Row("speed", "bytes_per_s", LIMIT, number="F5", at_least=0.9)),
        _contest(lab, HUGE_PAGE, Row("speed", "bytes_per_s", LIMIT, number="F6", at_least=0.7)),
    ]


def limit(lab: Lab, length: int, page_size: int = PAGE) -> Figures:
    """bytes_per_s: of the fastest program. That of each under its own name."""
    path = lab.file(length)
    speeds = {"copy": lab.limit("copy", path, page_size)["bytes_per_s"]}
    if page_size == PAGE:
        speeds["pwrite"] = lab.limit("pwrite", path)["bytes_per_s"]
    return {"bytes_per_s": max(speeds.values()), **speeds}


def _contest(lab: Lab, page_size: int, row: Row) -> Contest:
    length = lab.length(LENGTH, CHECK_LENGTH)

    def ours(_: int) -> Figures:
        with lab.coordinator(lab.file(length), "paused", page_size=page_size) as serving, serving.attach() as block:
            if block.page_size != page_size:
                raise PcshareError(f"the block has pages of {block.page_size} bytes")
            return {"bytes_per_s": length / lab.fill_seconds(serving, block)}

    return Contest(
        name=f"fill, pages of {'4 KiB' if page_size == PAGE else '2 MiB'}",
        stream="paused, then eager",
        pinning="none",
        rivals={
            OURS: ours,
            LIMIT: lambda _: limit(lab, length, page_size),
            MEMCPY: lambda _: lab.limit("memcpy", lab.file(length)),
        },
        rows=[row, Row("speed", "bytes_per_s", MEMCPY)],
        in_check=True,
        huge_bytes=length if page_size == HUGE_PAGE else 0,
    )
