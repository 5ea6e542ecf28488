"""peer_qemu: the receiving end of a post-copy migration, by QEMU and by pcshare, from the same real source.

Each round starts a fresh source, with a guest that writes all of its memory. Two migrations make one measurement:

  limited   the source's stream is limited, and one reader touches pages at random, the same ones at both, one after the
            other; p50 and p99 of the touches whose page was missing. Then the limit goes, and all of it comes.
  at full speed   nothing is limited and nobody touches anything: the time from migrate-start-postcopy to the source's
            own word that it is completed (it waits for the destination's), and the CPU time of the destination's
            processes meanwhile.

Why this is fair. Both have the memory in a memfd. QEMU's guest is left paused and pcshare runs none: receiving is what
is compared. QEMU gives its memory to nobody, so its reader is its own main thread, told by qtest's `readb` over a Unix
socket; from each time the median round trip of the same command for a page that is there is taken off. pcshare's reader
is a helper, which looks at the clock before and after the touch. QEMU also loads the device state (some 13 KB), which
pcshare keeps as bytes.

What to know of the figures. QEMU 7.2 as a source sends a tenth of a second's worth and sleeps for the rest of it;
requests do not wake it, not with preempt either. Touches that took longer than 20 ms waited for that, at both
destinations: p99 is the source's sleep, and the one "while the source is awake" is of the others. How many waited says
how many requests a destination gets answered while the source is awake.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from pcshare.bench.contest import OURS, Contest, Figures, Row
from pcshare.bench.lab import ANY_CPU, MIB, PAGE, Lab, cpu_seconds, wait_for
from pcshare.bench.qemu import (
    COMPLETED,
    EXECUTABLE,
    POSTCOPY,
    POSTCOPY_ACTIVE,
    PREEMPT,
    RAM,
    ROM_HOLE,
    UNLIMITED,
    Guest,
    Qemu,
)
from pcshare.errors import PcshareError
from pcshare.launcher import Coordinator
from pcshare.scratch import scratch_folder

LEFT_OUT = "migrations over a network, a guest that runs at the destination"
QEMU = "QEMU"
RAM_MIB, RAM_MIB_SHORT = 512, 64
LIMIT_BYTES_S = 32 * MIB
TOUCHES = 1000
ROUNDS = 5
ROUND_TRIPS = 1000
ASLEEP_MS = 20.0  # longer than that takes what waited for a source that slept
RATIO_MAX = 0.95
WAIT_S = 60.0
QTEST_TIMEOUT_S = 20.0

CHANNELS = {"one channel": (POSTCOPY,), "preempt": (POSTCOPY, PREEMPT)}


@dataclass(frozen=True)
class Line:
    """How source and destination are connected: as QEMU says it, and as a source of pcshare."""

    uri: str
    source: str


def against_qemu(lab: Lab) -> Iterator[Contest]:
    for transport in ("Unix socket", "TCP"):
        for channel, capabilities in CHANNELS.items():
            yield _contest(lab, f"peers, QEMU, {channel}, {transport}", capabilities, transport == "TCP")


def _contest(lab: Lab, name: str, capabilities: Sequence[str], is_tcp: bool) -> Contest:
    def measured(start: Start) -> Callable[[int], Figures]:
        def rival(number: int) -> Figures:
            bench = _Bench(lab, capabilities, is_tcp, start)
            return {**bench.limited(number + 1), **bench.at_full_speed()}

        return rival

    return Contest(
        name=name,
        stream="the source's own, limited to 32 MiB a second, then at full speed",
        pinning="none",
        rivals={OURS: measured(_pcshare), QEMU: measured(_qemu)},
        rows=[
            _row("fault, median", "p50"),
            _row("fault, p99", "p99"),
            Row("fault, p99 while the source is awake", "p99_awake", QEMU, is_optional=True),
            _row("time at full speed", "seconds"),
            _row("CPU time at full speed", "cpu_s"),
        ],
        rounds=ROUNDS,
        needs=[EXECUTABLE],
    )


def _row(what: str, figure: str) -> Row:
    return Row(what, figure, QEMU, number="F14", at_most=RATIO_MAX)


def _line(folder: Path, is_tcp: bool) -> Line:
    if not is_tcp:
        path = folder / "migration.sock"
        return Line(f"unix:{path}", f"qemu+unix:{path}")
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port = tried.getsockname()[1]
    return Line(f"tcp:127.0.0.1:{port}", f"qemu+tcp://127.0.0.1:{port}")


# -- the destinations


class Destination(Protocol):
    pids: Sequence[int]

    def wait_for_listen(self) -> None:
        """Until its memory can be read."""

    def touch(self, count: int, seed: int) -> list[float]:
        """What those touches took, in us, whose pages were missing."""

    def wait_for_end(self) -> None: ...


@dataclass(frozen=True)
class Scene:
    """What a destination is started with."""

    lab: Lab
    folder: Path  # of this migration alone
    guest: Guest
    capabilities: Sequence[str]
    line: Line


# A destination that waits for a source.
Start = Callable[[Scene], contextlib.AbstractContextManager[Destination]]


class _Pcshare:
    def __init__(self, lab: Lab, serving: Coordinator) -> None:
        self._lab = lab
        self._serving = serving
        status = serving.status()
        self.pids: Sequence[int] = (status.pid, status.keeper_pid)

    def wait_for_listen(self) -> None:
        wait_for(lambda: self._serving.status().state in ("RUNNING", "END"), "state RUNNING", WAIT_S)

    def touch(self, count: int, seed: int) -> list[float]:
        target = f"pcshare:{self._serving.socket}#{RAM}"
        return cast("list[float]", self._lab.touch("times", ANY_CPU, count, seed, target))

    def wait_for_end(self) -> None:
        wait_for(lambda: self._serving.status().state == "END", "state END", WAIT_S)


@contextlib.contextmanager
def _pcshare(scene: Scene) -> Iterator[Destination]:
    with Coordinator(blocks=scene.line.source) as serving:
        yield _Pcshare(scene.lab, serving)


class _Qemu:
    def __init__(self, qemu: Qemu, qtest_path: Path) -> None:
        self._qemu = qemu
        self._qtest_path = qtest_path
        self.pids: Sequence[int] = (qemu.process.pid,)

    def wait_for_listen(self) -> None:
        self._qemu.wait_for_migration(POSTCOPY_ACTIVE, COMPLETED)

    def touch(self, count: int, seed: int) -> list[float]:
        pages = random_pages(count, seed, self._qemu.guest.ram_size // PAGE)
        addresses = [page * PAGE for page in pages if page * PAGE not in ROM_HOLE]
        with contextlib.closing(_Qtest(self._qtest_path)) as reader, self._memfd().open("rb") as memory:
            faults_s = [reader.read_s(address) for address in addresses if _is_missing(memory.fileno(), address)]
            round_trip_s = statistics.median(reader.read_s(addresses[0]) for _ in range(ROUND_TRIPS))
        return [max(0.0, fault_s - round_trip_s) * 1e6 for fault_s in faults_s]

    def wait_for_end(self) -> None:
        self._qemu.wait_for_migration(COMPLETED)

    def _memfd(self) -> Path:
        fds = Path(f"/proc/{self._qemu.process.pid}/fd")
        return next(fd for fd in fds.iterdir() if os.readlink(fd).startswith("/memfd:"))


@contextlib.contextmanager
def _qemu(scene: Scene) -> Iterator[Destination]:
    path = scene.folder / "qtest.sock"
    options = ["-qtest", f"unix:{path},server=on,wait=off", "-qtest-log", "none"]
    incoming = scene.line.uri
    with Qemu(scene.guest, scene.folder, "sink", incoming=incoming, paused=True, options=options) as sink:
        sink.set_capabilities(*scene.capabilities)
        yield _Qemu(sink, path)


class _Qtest:
    """Reads of a QEMU's main thread."""

    def __init__(self, path: Path) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(QTEST_TIMEOUT_S)
        self._connection.connect(str(path))
        self._answers = self._connection.makefile("rb")

    def read_s(self, address: int) -> float:
        """How long it took, there and back."""
        command, begin_s = b"readb %#x\n" % address, time.perf_counter()
        self._connection.sendall(command)
        answer = self._answers.readline()
        took_s = time.perf_counter() - begin_s
        if not answer.startswith(b"OK "):
            raise PcshareError(f"QEMU answered {answer!r} to {command!r}")
        return took_s

    def close(self) -> None:
        self._answers.close()
        self._connection.close()


def _is_missing(memfd: int, offset: int) -> bool:
    """Asks without touching."""
    try:
        return os.lseek(memfd, offset, os.SEEK_DATA) != offset
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing there or behind it
            return True
        raise


def random_pages(count: int, seed: int, n_pages: int) -> Iterator[int]:
    """Those of `bench-touch times`."""
    word = (1 << 64) - 1
    state = seed * 2654435761 + 88172645463325252 & word
    for _ in range(count):
        state ^= state << 13 & word
        state ^= state >> 7
        state ^= state << 17 & word
        yield state % n_pages


# -- the measurements


@dataclass
class _Bench:
    lab: Lab
    capabilities: Sequence[str]
    is_tcp: bool
    start: Start

    def __post_init__(self) -> None:
        self._guest = Guest(ram_mib=max(RAM_MIB // self.lab.shrink, RAM_MIB_SHORT), backend="memfd")

    @contextlib.contextmanager
    def _ends(self, limit_bytes_s: int) -> Iterator[tuple[Qemu, Destination, str]]:
        """A source that can start, a destination that waits, and its address."""
        with scratch_folder("pcshare-bench-") as folder:  # a short path: sockets lie there
            scene = Scene(self.lab, folder, self._guest, self.capabilities, _line(folder, self.is_tcp))
            with self.start(scene) as destination, Qemu(self._guest, scene.folder) as source:
                source.set_capabilities(*self.capabilities, "events")
                if self.lab.shrink > 1:  # so little would be over before post-copy is asked for
                    source.set_parameters(downtime_limit=1)
                source.set_parameters(max_bandwidth=UNLIMITED, max_postcopy_bandwidth=limit_bytes_s)
                yield source, destination, scene.line.uri

    def limited(self, seed: int) -> Figures:
        with self._ends(max(LIMIT_BYTES_S // self.lab.shrink, MIB)) as (source, destination, uri):
            source.migrate(uri)
            source.start_postcopy()
            destination.wait_for_listen()
            faults_us = destination.touch(self.lab.count(TOUCHES), seed)
            source.set_parameters(max_postcopy_bandwidth=UNLIMITED)
            source.wait_for_migration(COMPLETED)
            destination.wait_for_end()
        return fault_figures(faults_us)

    def at_full_speed(self) -> Figures:
        with self._ends(UNLIMITED) as (source, destination, uri):
            used_s = cpu_seconds(*destination.pids)
            source.migrate(uri)
            begin_s = time.time()
            source.execute("migrate-start-postcopy")
            seconds = source.completed_at_s() - begin_s
            destination.wait_for_end()
            return {"seconds": seconds, "cpu_s": cpu_seconds(*destination.pids) - used_s}


def fault_figures(faults_us: Sequence[float]) -> Figures:
    """PcshareError: there are none. p99_awake is not there where each waited for a source that slept."""
    awake_us = [us for us in faults_us if us <= ASLEEP_MS * 1000]
    figures = {
        "p50": quantile(faults_us, 50),
        "p99": quantile(faults_us, 99),
        "faults": len(faults_us),
        "asleep_percent": 100 * (1 - len(awake_us) / len(faults_us)),
    }
    return {**figures, "p99_awake": quantile(awake_us, 99)} if awake_us else figures


def quantile(values: Sequence[float], percent: int) -> float:
    """As bench-touch has it. PcshareError: there is none."""
    if not values:
        raise PcshareError("no page was missing any more when it was touched")
    return sorted(values)[len(values) * percent // 100]
