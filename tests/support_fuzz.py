"""The fuzz programs (c/*_fuzz.c, and the reader of status segments in Python) as one list: built with sanitizers, run.

Also a program: `support_fuzz.py [COUNT|SECONDSs] [SEED]` runs all of them, which scripts/fuzz calls.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from core_support import CORE, NBD_FILES, compile_c
from support_status_fuzz import fuzz_reader

SANITIZERS = "address,undefined"
KEEPER = CORE.parent / "_bin" / "pcshare-keeper"
HELPERS_SIDE = [
    *sorted(path.name for path in CORE.glob("helper*.c")),
    *("bitmap.c", "uffd.c", "status_segment.c", "trace.c", "fd_message.c"),
]
NO_COORDINATOR = ("helper", "incoming", "nbd_", "page_channel_nbd", "_core")  # begin the names of other sides' files
COORDINATORS_SIDE = sorted(
    path.name
    for path in CORE.glob("*.c")
    if not path.name.startswith(NO_COORDINATOR) and not path.name.startswith("keeper_")
)
COUNT_DEFAULT = 1_000_000
PYTHON_PART = 10  # a segment takes Python so many times as long as all else takes C
ROUND_INPUTS = 20_000  # between two looks at the clock


@dataclass(frozen=True)
class Fuzz:
    """One program. arguments: what it takes after COUNT and SEED, given a folder of its own."""

    files: list[str]
    arguments: Callable[[Path], list[str]] = lambda folder: []


PROGRAMS: dict[str, Fuzz] = {
    "control": Fuzz(COORDINATORS_SIDE, lambda folder: [str(KEEPER)]),
    "helper": Fuzz(HELPERS_SIDE, lambda folder: [str(folder / "fuzz.sock")]),
    "status": Fuzz(HELPERS_SIDE),
    "nbd": Fuzz(NBD_FILES),
    "incoming": Fuzz(
        ["incoming.c", "incoming_stream.c", "incoming_record.c", "incoming_request.c", "incoming_path.c", "bitmap.c",
         "page_channel.c", "thread.c"]
    ),
}  # fmt: skip


def build(name: str, folder: Path) -> Path:
    return compile_c(folder / f"{name}_fuzz", f"{name}_fuzz.c", PROGRAMS[name].files, SANITIZERS)


def run(program: Path, count: int, seed: int) -> subprocess.CompletedProcess[str]:
    name = program.name.removesuffix("_fuzz")
    command = [str(program), str(count), str(seed), *PROGRAMS[name].arguments(program.parent)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run_python(count: int, seed: int) -> str:
    tally = fuzz_reader(count, seed)
    told = f"{count} mutated segments: {tally.read} read, {tally.refused} refused"
    return f"{told}; the longest took {tally.longest_s:.3f} s"


class Session:
    """Everything once, or for a time in turns; prints a line for each run."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._programs = {name: build(name, folder) for name in PROGRAMS}
        self._seed = seed
        self.failed = False

    def _one(self, name: str, count: int) -> None:
        begin, self._seed = time.monotonic(), self._seed + 1
        if name == "python":
            said, ok = run_python(count, self._seed), True
        else:
            ran = run(self._programs[name], count, self._seed)
            said, ok = ran.stdout.strip() + ran.stderr, ran.returncode == 0 and not ran.stderr
        took_s = time.monotonic() - begin
        print(f"{name}: seed {self._seed}, {took_s:.0f} s: {said if ok else f'FAILED: {said}'}", flush=True)
        self.failed |= not ok

    def run_count(self, count: int) -> None:
        for name in PROGRAMS:
            self._one(name, count)
        self._one("python", max(1, count // PYTHON_PART))

    def run_time(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.failed:
            self.run_count(ROUND_INPUTS)


def main(arguments: list[str]) -> int:
    wanted = arguments[0] if arguments else str(COUNT_DEFAULT)
    seed = int(arguments[1]) if len(arguments) > 1 else random.SystemRandom().randrange(1 << 32)
    print(f"fuzzing under {SANITIZERS}; again with the same numbers: scripts/fuzz {wanted} {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="pcs-") as folder:
        session = Session(Path(folder), seed)
        if wanted.endswith("s"):
            session.run_time(float(wanted[:-1]))
        else:
            session.run_count(int(wanted))
    return int(session.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
