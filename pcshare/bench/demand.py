"""demand: one fault at a time whose page is at a server, beside the smallest chain of processes that does it at all;
and what the stream adds to it.

The server is nbdkit on a Unix socket, its file in the page cache. The chain (bench-limit chain) is three processes of C
that block: one touches, one asks and copies, one reads the file. What a real server costs more than that last one is
told by a client of two processes that gets its pages from the same nbdkit (bench-limit nbd). On several CPUs the time
goes for waking CPUs, on one for what has to be done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pcshare.bench.contest import OURS, Contest, Figures, Row
from pcshare.bench.lab import ANY_CPU, GIB, MIB, ONLY_DEMAND, Lab
from pcshare.errors import PcshareError
from pcshare.launcher import Coordinator

DOES_NOT_MEASURE = "a network, a server that is slow itself, several helpers at once, reading ahead"
LENGTH = 64 * MIB
TOUCHES = 8000  # different pages, far from each other
ONE_AT_A_TIME = ("--threads=1",)  # there is one request at a time: with more each goes from thread to thread
CHAIN, CLIENT = "chain of three processes", "smallest client of that server"
STREAMED_LENGTH = GIB  # the stream takes longer for it than the touches do
STREAMED_TOUCHES = 4000  # random pages; those count that were missing
ALONE, BESIDE = "without the stream", "beside the stream"


def contests(lab: Lab) -> Sequence[Contest]:
    return [
        _one_fault(lab, "all on one CPU", lab.cpus[0], at_most=1.3),
        _one_fault(lab, "on any CPU", ANY_CPU, at_most=1),
        _beside_stream(lab),
    ]


@contextmanager
def _coordinator(
    lab: Lab, length: int, cpu: int, server_options: Sequence[str] = (), **options: str
) -> Iterator[Coordinator]:
    """Of a server's file; both processes on that CPU."""
    with (
        lab.pinned(cpu),
        lab.nbdkit(*server_options, "file", str(lab.file(length))) as uri,
        lab.coordinator(uri, **{**ONLY_DEMAND, **options}) as serving,
    ):
        yield serving


def _one_fault(lab: Lab, place: str, cpu: int, at_most: float) -> Contest:
    length, touches = lab.length(LENGTH), lab.count(TOUCHES)

    def ours(_: int) -> Figures:
        with _coordinator(lab, length, cpu, ONE_AT_A_TIME) as serving:
            return lab.touch("walk", cpu, touches, f"pcshare:{serving.socket}")

    def client(_: int) -> Figures:
        with lab.pinned(cpu), lab.nbdkit(*ONE_AT_A_TIME, "file", str(lab.file(length))) as uri:
            return lab.limit("nbd", uri.partition("socket=")[2], cpu, cpu, touches)

    return Contest(
        name=f"demand, {place}",
        stream=ONLY_DEMAND["stream"],
        pinning=f"helper, coordinator, server {place}; so is the chain",
        rivals={
            OURS: ours,
            CHAIN: lambda _: lab.limit("chain", lab.file(length), cpu, cpu, cpu, touches),
            CLIENT: client,
        },
        rows=[
            Row("median", "p50", CHAIN, number="F3", at_most=at_most),
            Row("median", "p50", CLIENT),
            Row("p99", "p99", CLIENT),
        ],
        in_check=True,
        needs=["nbdkit"],
    )


def _beside_stream(lab: Lab) -> Contest:
    length, touches = lab.length(STREAMED_LENGTH), lab.count(STREAMED_TOUCHES)
    may_be_late = lab.shrink > 1  # a small block may be here before the first touch

    def touch(number: int, with_stream: bool) -> Figures:
        with _coordinator(lab, length, ANY_CPU, stream="paused") as serving:
            figures = lab.touch(
                *("random", ANY_CPU, touches, number, f"pcshare:{serving.socket}"),
                at_start=lambda: lab.start_stream(serving) if with_stream else None,
            )
        if not figures["timed"] and not may_be_late:
            raise PcshareError("no page was missing any more when it was touched: the stream was too fast")
        return figures

    return Contest(
        name="demand beside the stream",
        stream="paused; eager from the first touch on",
        pinning="none",
        rivals={ALONE: lambda number: touch(number, False), BESIDE: lambda number: touch(number, True)},
        rows=[
            Row("median", "p50", ALONE, of=BESIDE, number="F4", at_most=2, is_optional=may_be_late),
            Row("p99", "p99", ALONE, of=BESIDE, number="F4", at_most=5, is_optional=may_be_late),
        ],
        in_check=True,
        needs=["nbdkit"],
    )
