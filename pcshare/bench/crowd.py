"""crowd: many helper processes at once, by bench-crowd: idle ones as company, or all touching together; and which
pages the measuring programs touch. Knows no contest."""

from __future__ import annotations

import contextlib
import math
import subprocess
from collections.abc import Iterator

from pcshare.bench.lab import EXECUTABLES, Lab
from pcshare.errors import PcshareError

HELPERS_SPARE = 8  # beside a crowd: who measures, who looks


@contextlib.contextmanager
def idle_helpers(lab: Lab, n: int, target: str) -> Iterator[None]:
    """So many processes are attached and touch nothing, for as long as the with block lasts."""
    command = [str(EXECUTABLES / "bench-crowd"), "idle", str(n), target]
    with lab.process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as crowd:
        assert crowd.stdin is not None
        assert crowd.stdout is not None
        if not crowd.stdout.readline():
            raise PcshareError(f"not all of {n} helpers could attach to {target} (above)")
        yield
        crowd.stdin.close()  # they leave
        crowd.wait()


def touch_together(lab: Lab, n: int, touches: int, target: str) -> dict[str, float]:
    """touches different pages touched by n processes, each its share; seconds, and faults_per_s of all of them."""
    told = lab.crowd("touch", n, touches, target)
    return {**told, "faults_per_s": told["touches"] / told["seconds"]}


def stride(count: int) -> int:
    """The step in which `bench-touch walk` goes through so many pages, as bench_common.h has it."""
    step = count // 2 + count // 7
    while math.gcd(step, count) != 1:
        step += 1
    return step
