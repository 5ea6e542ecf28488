"""lab: what every sub-benchmark needs: warm memory, sources, the measuring programs, coordinators, servers.

The memory of a virtual machine may be backed lazily by its host, which takes free memory back: a benchmark then
measures the host. A lab touches memory first and keeps the host from taking it away until it closes. It knows no
contest.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from pcshare.errors import HostError, PcshareError
from pcshare.launcher import Coordinator

EXECUTABLES = Path(__file__).resolve().parent.parent / "_bin"
MIB, GIB = 1 << 20, 1 << 30
PAGE, HUGE_PAGE = 4096, 2 << 20
WARM_BYTES = 6 * GIB
WARM_PART = 3  # of what is available, one part in so many at most
FILE_SEED = 1
PR_SET_PDEATHSIG = 1
START_TIMEOUT_S = 10.0
PROGRAM_TIMEOUT_S = 300.0

# Debian's packages, for the hint.
TOOLS = {
    "nbdkit": "nbdkit",
    "nbdcopy": "libnbd-bin",
    "nbdfuse": "libnbd-bin",
    "fusermount3": "fuse3",
    "qemu-system-x86_64": "qemu-system-x86",
}


class Lab:
    """A folder with what a run needs, for as long as it lasts. folder: where the sources lie; None: the usual place for
    temporary files."""

    def __init__(self, folder: Path | None = None) -> None:
        self._closing = contextlib.ExitStack()
        self.folder = Path(
            self._closing.enter_context(tempfile.TemporaryDirectory(prefix="pcshare-bench-", dir=folder))
        )
        self.cpus = sorted(os.sched_getaffinity(0))
        self._files: dict[int, Path] = {}
        self._warm = warm_memory(min(WARM_BYTES, psutil.virtual_memory().available // WARM_PART))

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._warm.close()
        self._closing.close()

    @property
    def other_cpu(self) -> int:
        """One that is not the first; HostError: there is only one."""
        if len(self.cpus) < 2:
            raise HostError("this process may use one CPU only, and the benchmark needs two")
        return self.cpus[1]

    def need(self, *tools: str) -> None:
        """HostError where one of these programs is missing."""
        missing = [tool for tool in tools if shutil.which(tool) is None]
        if missing:
            packages = " ".join(sorted({TOOLS[tool] for tool in missing}))
            raise HostError(f"not installed: {', '.join(missing)}", hint=f"Debian, Ubuntu: apt-get install {packages}")

    # -- sources

    def file(self, length: int) -> Path:
        """Random bytes, the same in each run, in the page cache."""
        if length not in self._files:
            path, source = self.folder / f"{length}.bin", random.Random(FILE_SEED)
            with path.open("wb") as file:
                for at in range(0, length, MIB):
                    file.write(source.randbytes(min(MIB, length - at)))
            self._files[length] = path
        path = self._files[length]
        _read_once(path)
        return path

    @contextlib.contextmanager
    def nbdkit(self, *arguments: str) -> Iterator[str]:
        """An nbdkit on a Unix socket; yields its URI."""
        self.need("nbdkit")
        path = self.folder / "nbd.sock"
        with self.process(["nbdkit", "--foreground", "--unix", str(path), *arguments]):
            wait_for(lambda: _accepts(path), "nbdkit's socket")
            try:
                yield f"nbd+unix:///?socket={path}"
            finally:
                path.unlink(missing_ok=True)

    # -- who is measured

    @contextlib.contextmanager
    def coordinator(self, source: str | Path | Mapping[str, str], stream: str, **options: Any) -> Iterator[Coordinator]:
        """As it starts by default, but for the stream. One block is called data."""
        blocks = {"data": str(source)} if isinstance(source, (str, Path)) else source
        with Coordinator(blocks=blocks, stream=stream, **options) as serving:
            yield serving

    def touch(self, *arguments: object) -> dict[str, float]:
        """What `bench-touch` measured, by name."""
        return self._program("bench-touch", arguments)

    def limit(self, *arguments: object) -> dict[str, float]:
        """What `bench-limit` measured, by name."""
        return self._program("bench-limit", arguments)

    def _program(self, name: str, arguments: Sequence[object]) -> dict[str, float]:
        command = [str(EXECUTABLES / name), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S)
        if done.returncode != 0:
            raise PcshareError(f"{' '.join([name, *command[1:]])} failed: {done.stderr.strip()}")
        told: dict[str, float] = json.loads(done.stdout)
        return told

    @contextlib.contextmanager
    def process(self, command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Lives as long as the with block, and never longer than this process."""
        with subprocess.Popen(command, preexec_fn=_die_with_parent, **options) as process:
            try:
                yield process
            finally:
                process.terminate()


def warm_memory(length: int) -> mmap.mmap:
    """Touches so many bytes and gives back all but one page in each MiB, so that free pages cannot merge into pieces
    that the host takes. Closing what it returns gives them back too."""
    held = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.madvise(mmap.MADV_NOHUGEPAGE)
    for offset in range(0, length, PAGE):
        held[offset] = 1
    for offset in range(0, length, MIB):
        held.madvise(mmap.MADV_DONTNEED, offset + PAGE, MIB - PAGE)
    return held


def machine() -> dict[str, Any]:
    """What was measured on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "")
    return {
        "cpu": model or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "virtual": "hypervisor" in info,
        "kernel": platform.release(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def cpu_seconds(*pids: int) -> float:
    """CPU time that these processes have used, ended threads included."""
    libc, clock, total = ctypes.CDLL(None), ctypes.c_int(), 0.0
    for pid in pids:
        error = libc.clock_getcpuclockid(pid, ctypes.byref(clock))
        if error:
            raise PcshareError(f"process {pid}: {os.strerror(error)}", errno=error)
        total += time.clock_gettime(clock.value)
    return total


def wait_for(is_there: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_there():
        if time.monotonic() > deadline:
            raise PcshareError(f"{what} did not appear within {timeout_s:g} s")
        time.sleep(0.002)


def _accepts(path: Path) -> bool:
    """A socket file is there before somebody listens."""
    with socket.socket(socket.AF_UNIX) as tried:
        return tried.connect_ex(str(path)) == 0


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _read_once(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(MIB)
        while file.readinto(buffer):
            pass
