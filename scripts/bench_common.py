"""bench_common: what the benchmark scripts share: warm memory, compiled programs, spreads.

The memory of a virtual machine may be backed lazily by its host, which takes free memory back: a benchmark then
measures the host. warm_memory() touches it first and keeps the host from taking it away during the run.
"""

from __future__ import annotations

import mmap
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "pcshare" / "core"
LIBRARY = ROOT / "pcshare" / "_bin" / "libpcshare.a"
MIB = 1 << 20
PAGE = 4096
START_TIMEOUT_S = 10.0


def warm_memory(length: int = 2 << 30) -> mmap.mmap:
    """Touches so many bytes and gives back all but one page in each MiB, so that free pages cannot merge into pieces
    that the host takes. Hold what it returns until the run ends."""
    held = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.madvise(mmap.MADV_NOHUGEPAGE)
    for offset in range(0, length, PAGE):
        held[offset] = 1
    for offset in range(0, length, MIB):
        held.madvise(mmap.MADV_DONTNEED, offset + PAGE, MIB - PAGE)
    return held


def compile_program(name: str, folder: Path) -> str:
    """scripts/NAME.c, linked with the helper's library."""
    if not LIBRARY.exists():
        sys.exit(f"{LIBRARY} is missing: run scripts/test once, it builds everything")
    program = folder / name
    source = Path(__file__).with_name(f"{name}.c")
    subprocess.run(["cc", "-O2", "-pthread", f"-I{CORE}", str(source), str(LIBRARY), "-o", str(program)], check=True)
    return str(program)


def run_for_figures(command: Sequence[str]) -> list[float]:
    """The numbers of the one line that a program prints."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(text) for text in done.stdout.split()]


def wait_for(is_there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_there():
        if time.monotonic() > deadline:
            sys.exit(f"{what} did not appear within {START_TIMEOUT_S:g} s")
        time.sleep(0.005)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (smallest-largest)."""
    return f"{statistics.median(values):{digits + 5}.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
