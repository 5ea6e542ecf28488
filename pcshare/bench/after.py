"""after: a block that is complete, beside a memfd that never was anything else; what a coordinator costs that has
nothing to do; and, in working_set.py, a start after one that has recorded its working set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pcshare.bench import working_set
from pcshare.bench.contest import OURS, Contest, Figures, Rival, Row
from pcshare.bench.crowd import idle_helpers
from pcshare.bench.lab import GIB, MIB, ONLY_DEMAND, Lab, cpu_seconds, wait_for
from pcshare.launcher import Coordinator

DOES_NOT_MEASURE = "writing, huge pages; memory of a coordinator unless by root, whom alone the kernel lets look"
LENGTH = GIB
MEMFD = "memfd"
IDLE_S = 60
SETTLE_S = 1.0  # a coordinator that has just completed a block, or lost a helper, has something to do
COMPLETE_TIMEOUT_S = 120.0
TOUCHES = 16000  # before it is left alone
CPU_MS_MAX = 1.0  # in IDLE_S
CPU_PERCENT_MAX = 0.1
OWN_MIB_MAX = 60.0
PART_OF_BLOCKS = 0.001  # of their lengths; that much may be had beyond it
BLOCK = "data"


def contests(lab: Lab) -> Sequence[Contest]:
    return [
        _sum(lab, "in order", is_random=False),
        _sum(lab, "at random", is_random=True),
        _complete(lab),
        _idle(lab),
        *working_set.starts(lab),
    ]


# -- plain memory


def _sum(lab: Lab, order: str, *, is_random: bool) -> Contest:
    def seed(number: int) -> int:
        return number + 1 if is_random else 0

    def ours(number: int) -> Figures:
        with lab.coordinator(lab.file(lab.length(LENGTH)), "eager") as serving:
            return lab.touch("sum", lab.cpus[0], seed(number), f"pcshare:{serving.socket}")

    def memfd(number: int) -> Figures:
        return lab.touch("sum", lab.cpus[0], seed(number), f"memfd:{lab.file(lab.length(LENGTH))}")

    return Contest(
        name=f"after, every byte read {order}",
        stream="eager, until the block is complete",
        pinning="reader on CPU 0",
        rivals={OURS: ours, MEMFD: memfd},
        rows=[Row("time", "seconds", MEMFD, number="F10", contains=1.0)],
        in_check=True,
    )


# -- nothing to do


def _complete(lab: Lab) -> Contest:
    """F10: when all is there nobody is in its path, and nobody is busy."""

    def ours(_: int) -> Figures:
        with lab.coordinator(lab.file(lab.length(LENGTH)), "eager") as serving:
            wait_for(lambda: serving.status().state == "END", "state END", COMPLETE_TIMEOUT_S)
            return {"cpu_ms": 1000 * _cpu_seconds_idle(lab, serving)}

    return _alone("a complete block", "eager, until the block is complete", ours, [
        Row(f"CPU time in {IDLE_S} s", "cpu_ms", "", number="F10", at_most=CPU_MS_MAX)
    ])  # fmt: skip


def _idle(lab: Lab) -> Contest:
    """F11: all that a coordinator needs is there, nothing happens."""
    length = lab.length(LENGTH)

    def ours(_: int) -> Figures:
        with lab.coordinator(lab.file(length), **ONLY_DEMAND) as serving:
            target = f"pcshare:{serving.socket}"
            lab.touch("walk", lab.cpus[0], lab.count(TOUCHES), target)
            with idle_helpers(lab, 1, target):
                used_s = _cpu_seconds_idle(lab, serving)
                figures = {"cpu_percent": 100 * used_s / lab.count(IDLE_S)}
                if _sees_memory():
                    own = sum(private_bytes(pid) for pid in _pids(serving))
                    figures["own_mib"] = (own - PART_OF_BLOCKS * length) / MIB
                return figures

    rows = [Row(f"CPU time in {IDLE_S} s", "cpu_percent", "", number="F11", at_most=CPU_PERCENT_MAX)]
    if _sees_memory():
        rows.append(Row("memory beyond 0.1 % of the block", "own_mib", "", number="F11", at_most=OWN_MIB_MAX))
    return _alone("one idle helper", "lazy", ours, rows)


def _alone(name: str, stream: str, ours: Rival, rows: Sequence[Row]) -> Contest:
    return Contest(name=f"after, {name}", stream=stream, pinning="none", rivals={OURS: ours}, rows=rows, rounds=1)


def _pids(serving: Coordinator) -> tuple[int, int]:
    """Coordinator and keeper."""
    status = serving.status()
    return status.pid, status.keeper_pid


def _cpu_seconds_idle(lab: Lab, serving: Coordinator) -> float:
    """CPU time that coordinator and keeper use while they are left alone."""
    time.sleep(SETTLE_S)
    before_s = cpu_seconds(*_pids(serving))
    time.sleep(lab.count(IDLE_S))
    return cpu_seconds(*_pids(serving)) - before_s


# -- memory


def _sees_memory() -> bool:
    """Coordinator and keeper let nobody of their own user look into them."""
    return os.geteuid() == 0


def private_bytes(pid: int) -> int:
    """Memory that the process shares with nobody, its blocks' memory apart."""
    return sum(size for name, size in _mappings(pid) if not name.startswith(f"/memfd:pcshare-{BLOCK} "))


def _mappings(pid: int) -> Iterator[tuple[str, int]]:
    """What each is of, and its private bytes."""
    name, size = "", 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        field, *rest = line.split(maxsplit=5)
        if not field.endswith(":"):  # the line that opens a mapping: addresses, rights, offset, device, inode, path
            yield name, size
            name, size = rest[4] if len(rest) > 4 else "", 0
        elif field.startswith("Private_"):
            size += int(rest[0]) << 10
    yield name, size
