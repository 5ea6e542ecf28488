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
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from pcshare import admin
from pcshare.client import Block
from pcshare.errors import HostError, PcshareError
from pcshare.launcher import Coordinator
from pcshare.protocol import AdminOp
from pcshare.scratch import scratch_folder
from pcshare.signals import signals_blocked

EXECUTABLES = Path(__file__).resolve().parent.parent / "_bin"
MIB, GIB = 1 << 20, 1 << 30
PAGE, HUGE_PAGE = 4096, 2 << 20
WARM_BYTES = 6 * GIB
WARM_PART = 3  # of what is available, one part in so many at most
LENGTH_MIN = 2 * HUGE_PAGE
FILE_SEED = 1
ANY_CPU = -1  # not pinned: where the scheduler likes
PR_SET_PDEATHSIG = 1
MAP_HUGETLB = 0x40000
START_TIMEOUT_S = 10.0
PROGRAM_TIMEOUT_S = 300.0
FILL_TIMEOUT_S = 300.0
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
COMPACT_MEMORY = Path("/proc/sys/vm/compact_memory")
OTHER_FOLDER = Path("/var/tmp")  # where the usual one for temporary files is memory

# Options of a coordinator that brings a page only when somebody touches it.
ONLY_DEMAND: Mapping[str, Any] = {"stream": "lazy", "read_ahead": 0}

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
    temporary files, if that is a disk. is_check: contests may take the shorter form that they have for a check. shrink:
    they take this part of their lengths and counts, which is no measurement but shows that they run."""

    def __init__(self, folder: Path | None = None, *, is_check: bool = False, shrink: int = 1) -> None:
        self.is_check = is_check
        self.shrink = shrink
        self._closing = contextlib.ExitStack()
        self.folder = self._closing.enter_context(scratch_folder("pcshare-bench-", folder or usual_folder()))
        self.cpus = sorted(os.sched_getaffinity(0))
        self._files: dict[int, Path] = {}

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closing.close()

    def warm(self) -> None:
        """Before the first measurement: memory that the host has given, and that it does not take back until close."""
        self._closing.enter_context(warm_memory(min(WARM_BYTES, psutil.virtual_memory().available // WARM_PART)))

    # -- how much

    def length(self, full: int, check: int | None = None) -> int:
        """Bytes of a source, whole huge pages of them. check: in the form for a check."""
        wanted = check if check is not None and self.is_check else full
        return max(wanted // self.shrink // HUGE_PAGE * HUGE_PAGE, LENGTH_MIN)

    def count(self, full: int) -> int:
        return max(full // self.shrink, 1)

    # -- what the host must have

    @property
    def other_cpu(self) -> int:
        """One that is not the first; HostError: there is only one."""
        if len(self.cpus) < 2:
            raise HostError("this process may use one CPU only, and the benchmark needs two")
        return self.cpus[1]

    def need(self, *tools: str) -> None:
        """HostError where one of these programs is missing."""
        missing = sorted({tool for tool in tools if shutil.which(tool) is None})
        if missing:
            packages = " ".join(sorted({TOOLS[tool] for tool in missing}))
            raise HostError(f"not installed: {', '.join(missing)}", hint=f"Debian, Ubuntu: apt-get install {packages}")

    def need_huge_pages(self, length: int) -> None:
        """HostError where so many bytes of huge pages are neither free nor ours to reserve."""
        lacking = _lacking_huge_pages(length)
        if lacking and not os.access(HUGE_PAGES / "nr_hugepages", os.W_OK):
            wanted = _huge_pages("nr_hugepages") + lacking
            raise HostError(f"{lacking} huge pages too few are free", hint=f"sudo sysctl vm.nr_hugepages={wanted}")

    @contextlib.contextmanager
    def huge_pages(self, length: int) -> Iterator[None]:
        """So many bytes of huge pages are free and warm; what had to be reserved for that is given back in the end."""
        if not length:
            yield
            return
        self.need_huge_pages(length)
        former, lacking = _huge_pages("nr_hugepages"), _lacking_huge_pages(length)
        try:
            if lacking:
                _reserve_huge_pages(former + lacking)
            _touch_huge_pages(length)
            yield
        finally:
            if lacking:
                _give_back_huge_pages(former + lacking, former)

    @contextlib.contextmanager
    def pinned(self, cpu: int) -> Iterator[None]:
        """What is started inside runs on that CPU alone; ANY_CPU: where it may."""
        before = os.sched_getaffinity(0)
        if cpu != ANY_CPU:
            os.sched_setaffinity(0, {cpu})
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    # -- sources

    def file(self, length: int) -> Path:
        """Random bytes, the same in each run, in the page cache."""
        if length not in self._files:
            path, source = self.folder / f"{length}.bin", random.Random(FILE_SEED)
            with path.open("wb") as file:
                for at in range(0, length, MIB):
                    file.write(source.randbytes(min(MIB, length - at)))
                file.flush()
                os.fsync(file.fileno())  # else it is written out while something is measured
            self._files[length] = path
        path = self._files[length]
        _read_once(path)
        return path

    @contextlib.contextmanager
    def nbdkit(self, *arguments: str) -> Iterator[str]:
        """An nbdkit on a Unix socket; yields its URI."""
        self.need("nbdkit")
        path, ready = self.folder / "nbd.sock", self.folder / "nbd.pid"
        command = ["nbdkit", "--foreground", f"--pidfile={ready}", "--unix", str(path), *arguments]
        try:
            with self.process(command) as server:
                wait_for(lambda: server.poll() is not None or ready.exists(), "nbdkit's pid file")
                if server.returncode is not None:
                    raise PcshareError(f"nbdkit {' '.join(arguments)} ended with status {server.returncode}")
                yield f"nbd+unix:///?socket={path}"
        finally:
            for made in (path, ready):
                made.unlink(missing_ok=True)

    # -- who is measured

    @contextlib.contextmanager
    def coordinator(self, source: str | Path | Mapping[str, str], stream: str, **options: Any) -> Iterator[Coordinator]:
        """As it starts by default, but for the stream. One block is called data."""
        blocks = {"data": str(source)} if isinstance(source, (str, Path)) else source
        with Coordinator(blocks=blocks, stream=stream, **options) as serving:
            yield serving

    def start_stream(self, serving: Coordinator) -> None:
        """Of a coordinator whose stream was paused."""
        admin.send(str(serving.socket), AdminOp.STREAM_EAGER)

    def fill_seconds(self, serving: Coordinator, block: Block) -> float:
        """How long the paused stream takes, from the order to go on to the last page of the block."""
        begin_s = time.monotonic()
        self.start_stream(serving)
        block.wait(timeout_s=FILL_TIMEOUT_S)
        return time.monotonic() - begin_s

    def touch(self, *arguments: object, at_start: Callable[[], None] | None = None) -> dict[str, float]:
        """What `bench-touch` measured, by name. at_start: called when it has attached, before it touches anything."""
        return self._program("bench-touch", arguments, at_start)

    def limit(self, *arguments: object) -> dict[str, float]:
        """What `bench-limit` measured, by name."""
        return self._program("bench-limit", arguments)

    def crowd(self, *arguments: object) -> dict[str, float]:
        """What `bench-crowd` measured, by name."""
        return self._program("bench-crowd", arguments)

    def _program(
        self, name: str, arguments: Sequence[object], at_start: Callable[[], None] | None = None
    ) -> dict[str, float]:
        command = [str(EXECUTABLES / name), *(["-w"] if at_start else []), *map(str, arguments)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with self.process(command, bufsize=0, **pipes) as program:
            assert program.stdout is not None
            begun = program.stdout.read(1) if at_start else b""  # nothing, if it has failed
            if at_start and begun:
                at_start()
            try:
                out, problems = program.communicate(begun, timeout=PROGRAM_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise PcshareError(f"{name} did not end within {PROGRAM_TIMEOUT_S:g} s") from None
        if program.returncode != 0:
            raise PcshareError(f"{' '.join([name, *command[1:]])} failed: {problems.decode().strip()}")
        told: dict[str, float] = json.loads(out)
        return told

    @contextlib.contextmanager
    def process(self, command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Lives as long as the with block, and never longer than this process."""
        with subprocess.Popen(command, preexec_fn=die_with_parent, **options) as process:
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


def _give_back_huge_pages(reserved: int, former: int) -> None:
    """Whoever else has changed the number meanwhile keeps what he has added, and gets back what he has taken off."""
    with signals_blocked():
        now = _huge_pages("nr_hugepages")
        wanted = former + now - reserved if now >= reserved else min(now, former)
        (HUGE_PAGES / "nr_hugepages").write_text(str(wanted))


def _touch_huge_pages(length: int) -> None:
    """The host gives memory when it is touched first."""
    with mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB) as held:
        for offset in range(0, length, HUGE_PAGE):
            held[offset] = 1


def usual_folder() -> Path:
    """For sources. HostError: what usually is a disk is memory, where a file of gigabytes has no place."""
    for folder in (Path(tempfile.gettempdir()), OTHER_FOLDER):
        if folder.is_dir() and not _is_memory(folder):
            return folder
    raise HostError("the folders for temporary files are in memory", hint="name one on a disk with --folder")


def _is_memory(folder: Path) -> bool:
    device = folder.stat().st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return kind.split()[0] in ("tmpfs", "ramfs")
    return False


def _huge_pages(name: str) -> int:
    return int((HUGE_PAGES / name).read_text())


def _lacking_huge_pages(length: int) -> int:
    """How many of 2 MiB, beside those that are free."""
    if not length:
        return 0
    if not HUGE_PAGES.is_dir():
        raise HostError("this kernel has no huge pages of 2 MiB", hint="use one with CONFIG_HUGETLBFS")
    return max(length // HUGE_PAGE - (_huge_pages("free_hugepages") - _huge_pages("resv_hugepages")), 0)


def _reserve_huge_pages(count: int) -> None:
    """HostError: there is not so much memory in one piece."""
    number = HUGE_PAGES / "nr_hugepages"
    number.write_text(str(count))
    if _huge_pages("nr_hugepages") < count:
        COMPACT_MEMORY.write_text("1")
        number.write_text(str(count))
    found = _huge_pages("nr_hugepages")
    if found < count:
        raise HostError(
            f"of {count} huge pages of 2 MiB the kernel found {found}", hint="free memory, or reserve them at boot"
        )


def die_with_parent() -> None:
    """For preexec_fn."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _read_once(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(MIB)
        while file.readinto(buffer):
            pass
