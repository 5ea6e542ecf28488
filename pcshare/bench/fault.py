"""fault: one fault at a time whose page is at hand, beside the smallest server that does the work at all.

The limit is two processes of C (bench-limit server): one touches, one polls, reads the file, copies and wakes. Where
the server has a CPU of its own, waking that CPU is what the time goes for; on the helper's CPU it is not. One that
spins there never sleeps, and takes that CPU from all others: it is told, and is no limit.
"""

from __future__ import annotations

from collections.abc import Sequence

from pcshare.bench.contest import OURS, Contest, Figures, Rival, Row
from pcshare.bench.lab import ANY_CPU, MIB, ONLY_DEMAND, Lab

DOES_NOT_MEASURE = "a source that is not at hand, several helpers at once, the stream, reading ahead"
LENGTH = 64 * MIB
TOUCHES = 16000  # different pages, far from each other
SAME, OTHER, SPINS = "server on the same CPU", "server on another CPU", "server that spins on another CPU"


def contests(lab: Lab) -> Sequence[Contest]:
    places = {"CPU 0": lab.cpus[0], "CPU 1": lab.other_cpu, "no CPU": ANY_CPU}
    return [_contest(lab, place, cpu) for place, cpu in places.items()]


def _contest(lab: Lab, place: str, cpu: int) -> Contest:
    length, touches = lab.length(LENGTH), lab.count(TOUCHES)

    def ours(_: int) -> Figures:
        with lab.coordinator(lab.file(length), **ONLY_DEMAND) as serving:
            return lab.touch("walk", cpu, touches, f"pcshare:{serving.socket}")

    def limit(server_cpu: int, how: str = "blocks") -> Rival:
        return lambda _: lab.limit("server", how, lab.file(length), server_cpu, lab.cpus[0], touches)

    return Contest(
        name=f"fault, helper on {place}",
        stream="lazy",
        pinning=f"helper on {place}, fault threads as by default",
        rivals={
            OURS: ours,
            SAME: limit(lab.cpus[0]),
            OTHER: limit(lab.other_cpu),
            SPINS: limit(lab.other_cpu, "spins"),
        },
        rows=[
            Row("median", "p50", OTHER, number="F1", at_most=0.3),
            Row("median", "p50", SAME, number="F1", at_most=1.3),
            Row("p99", "p99", SAME, number="F2", at_most=2),
            Row("p99.9", "p99.9", SAME, number="F2", at_most=2),
            Row("median", "p50", SPINS),
        ],
        in_check=True,
    )
