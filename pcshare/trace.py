"""trace: skin over the core's trace ring: a file that the core writes its steps to, and how to read it back.

Costs nothing while nobody traces. One ring a process.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcshare.core import ffi, lib
from pcshare.errors import PcshareError
from pcshare.fds import OwnedFd

EVENT_NAMES = {
    getattr(lib, name): name.removeprefix("TRACE_").lower()
    for name in dir(lib)
    if name.startswith("TRACE_") and name not in ("TRACE_MAGIC", "TRACE_VERSION", "TRACE_RECORDS")
}


# Who passes which steps, by their numbers.
PARTIES = {"coordinator": range(1, 60), "helper": range(60, 80), "source": range(80, 100)}
DIE_VARIABLE = "PCSHARE_DIE_AT"  # names a file that says at which step to die: see core/trace.h

_NUMBERS = {name: number for number, name in EVENT_NAMES.items()}


def step(name: str, *, block_index: int = 0, subject: int = 0) -> None:
    """A step of our own, beside those of the core."""
    lib.trace_point(_NUMBERS[name], block_index, subject, 0, 0)


def steps_of(party: str) -> list[str]:
    return [name for number, name in sorted(EVENT_NAMES.items()) if number in PARTIES[party]]


def write_death(path: Path, name: str, passings: int) -> None:
    """Whoever reads it at its start dies when it passes that step so often, and removes the file at that moment."""
    new = path.with_suffix(".new")
    new.write_text(f"{_NUMBERS[name]} {passings}\n")
    new.rename(path)


@dataclass(frozen=True)
class Record:
    """One step. time_ns is CLOCK_MONOTONIC; subject is a remote fd's id or a worker's number; what detail is, trace.h
    says."""

    time_ns: int
    event: str
    tid: int
    block_index: int
    subject: int
    page: int
    detail: int


class TraceFile:
    """A ring that the core writes to until close()."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._buffer: Any = ffi.from_buffer(memory, require_writable=True)

    @classmethod
    def start(cls, path: str) -> TraceFile:
        """Makes or empties the file and traces to it from now on."""
        import os

        length = ffi.sizeof("struct trace_ring")
        try:
            fd = OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
            os.posix_fallocate(fd.fileno(), 0, length)
        except OSError as error:
            raise PcshareError(f"cannot trace to {path}: {error.strerror}", errno=error.errno) from None
        with fd:
            started = cls(mmap.mmap(fd.fileno(), length))
        ring = ffi.cast("struct trace_ring *", started._buffer)
        ring.magic, ring.version = lib.TRACE_MAGIC, lib.TRACE_VERSION
        lib.trace_to(ring)
        return started

    def close(self) -> None:
        lib.trace_to(ffi.NULL)
        ffi.release(self._buffer)
        self._memory.close()


def read_trace(path: str) -> Iterator[Record]:
    """The records that are still in the ring, oldest first."""
    content = Path(path).read_bytes()
    if len(content) < ffi.sizeof("struct trace_ring"):
        raise PcshareError(f"{path} is too short for a trace")
    ring = ffi.from_buffer("struct trace_ring *", content)
    if ring.magic != lib.TRACE_MAGIC or ring.version != lib.TRACE_VERSION:
        raise PcshareError(f"{path} is no trace of this version of pcshare")
    for number in range(max(0, ring.next - lib.TRACE_RECORDS), ring.next):
        one = ring.records[number % lib.TRACE_RECORDS]
        yield Record(
            one.time_ns,
            EVENT_NAMES.get(one.event, str(one.event)),
            one.tid,
            one.block_index,
            one.subject,
            one.page,
            one.detail,
        )
