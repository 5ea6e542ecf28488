"""resources: what a coordinator, its keeper and this process hold, and what they may hold.

Counts with psutil and judges; changes nothing. Every allowance is a constant with its reason: what is beyond is a
failure that names the resource, by how much it grew, and where.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass

import psutil

FDS_PER_HELPER = 3  # its uffd, its connection, and the core's copy of that
FDS_HANDSHAKES = 64  # connections that have not become helpers yet, or whose helper is dead and not reaped
FDS_LEFT = 0  # when all have gone nothing of them stays
FDS_PER_SERVER = 2  # connections to a source; one that was not there at first may be later
THREADS_PER_SERVER = 2  # and who reads their answers
KEEPER_FDS_PER_HELPER = 2  # what it keeps for the coordinator after this one: its connection and its uffd
KEEPER_FDS_HANDSHAKES = 32  # those who are kept already and not yet shown, or not shown any more and still kept
THREADS_PER_FILE = 18  # readers that a file's channel starts when it needs them: 16 for demand, 2 for the stream
USS_LEFT_BYTES = 16 << 20  # allocators keep what a busy time took: reading buffers, Python's arenas
RSS_LEFT_BYTES = 24 << 20  # the same, and pages of libraries that were touched only now
BUFFERS_KEPT = 16  # of one page each: one for each read that may be under way
ASLEEP_LIMIT_S, LOOK_AGAIN_S = 10.0, 0.01
KEEPER_BYTES = 4 << 20  # besides the pages that it placed, which count as its own


@dataclass(frozen=True)
class Held:
    """What one process holds at one moment. rss and uss in bytes."""

    fds: int
    sockets: int
    threads: int
    children: int
    rss: int
    uss: int

    @classmethod
    def of(cls, process: psutil.Process) -> Held:
        with process.oneshot():
            memory = process.memory_full_info()
            return cls(
                fds=process.num_fds(),
                sockets=_sockets(process.pid),
                threads=process.num_threads(),
                children=len(process.children(recursive=True)),
                rss=memory.rss,
                uss=memory.uss,
            )


def wait_until_asleep(keeper: psutil.Process) -> None:
    """A coordinator that is ready has sent the keeper what it is to keep. The keeper runs until it has read that, and
    sleeps only then; on a busy machine that takes a while."""
    deadline_s = time.monotonic() + ASLEEP_LIMIT_S
    while keeper.status() != psutil.STATUS_SLEEPING and time.monotonic() < deadline_s:
        time.sleep(LOOK_AGAIN_S)


def _sockets(pid: int) -> int:
    count = 0
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/{pid}/fd/{number}").startswith("socket:")
    return count


@dataclass(frozen=True)
class Growth:
    """A resource that grew beyond what it may."""

    whose: str
    resource: str
    before: int
    now: int
    allowed: int

    def __str__(self) -> str:
        return (
            f"{self.whose}: {self.resource} grew by {self.now - self.before:,} from {self.before:,} to {self.now:,}; "
            f"{self.allowed:,} is allowed"
        )


def grown(whose: str, before: Held, now: Held, allowed: dict[str, int]) -> list[Growth]:
    """Every resource that grew by more than is allowed; one that is not named may not grow."""
    found = []
    for resource, was in vars(before).items():
        grew = vars(now)[resource] - was
        if grew > allowed.get(resource, 0):
            found.append(Growth(whose, resource, was, vars(now)[resource], allowed.get(resource, 0)))
    return found


def allowed_during(helpers: int, files: int, servers: int, pages_bytes: int, page_size: int) -> dict[str, int]:
    """Of a coordinator with so many helpers attached and so many sources."""
    fds = FDS_PER_HELPER * helpers + FDS_HANDSHAKES + FDS_PER_SERVER * servers
    return {
        "fds": fds,
        "sockets": fds,
        "threads": THREADS_PER_FILE * files + THREADS_PER_SERVER * servers,
        "rss": RSS_LEFT_BYTES + BUFFERS_KEPT * page_size + pages_bytes,
        "uss": USS_LEFT_BYTES + BUFFERS_KEPT * page_size + pages_bytes,
    }


def allowed_after(files: int, servers: int, pages_bytes: int, page_size: int) -> dict[str, int]:
    """When every helper has gone."""
    return {
        "fds": FDS_LEFT + FDS_PER_SERVER * servers,
        "sockets": FDS_LEFT + FDS_PER_SERVER * servers,
        "threads": THREADS_PER_FILE * files + THREADS_PER_SERVER * servers,
        "rss": RSS_LEFT_BYTES + BUFFERS_KEPT * page_size + pages_bytes,
        "uss": USS_LEFT_BYTES + BUFFERS_KEPT * page_size,
    }


def allowed_keeper(helpers: int, pages_bytes: int) -> dict[str, int]:
    """While so many helpers are attached."""
    fds = KEEPER_FDS_PER_HELPER * helpers + KEEPER_FDS_HANDSHAKES
    return {**allowed_keeper_after(pages_bytes), "fds": fds, "sockets": fds}


def allowed_keeper_after(pages_bytes: int) -> dict[str, int]:
    """When every helper has gone."""
    return {"rss": KEEPER_BYTES + pages_bytes, "uss": KEEPER_BYTES + pages_bytes}
