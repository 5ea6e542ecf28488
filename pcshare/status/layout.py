"""layout: names and places in the status segment, as core/status_segment.h lays it out, and what both sides need."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path

from pcshare.core import ffi, lib

STATE_NAMES = ("NONE", "ADVISE", "DISCARD", "LISTENING", "RUNNING", "PAUSED", "END")  # by STATUS_STATE_*
STREAM_NAMES = ("eager", "lazy", "rate", "paused")  # by STATUS_STREAM_*
HELPER_STATE_NAMES = ("free", "attached", "disabled", "orphaned", "left")  # by STATUS_HELPER_*
STATE_SUMMARY_ORDER = (
    "PAUSED",
    "RUNNING",
    "LISTENING",
    "DISCARD",
    "ADVISE",
    "NONE",
    "END",
)  # the first that a block is in

SEGMENT_MODE = 0o600
SEGMENT_MODE_SHARED = 0o644
TEXT_READ_TRIES_MAX = 64  # a text that is still being written then comes from a writer that stopped in the middle
BITMAP_BYTES_MAX = 2 << 30  # of the largest block, 64 TiB in 4 KiB pages; a sparse file may say any size
BITMAP_EAGER_BYTES = int(lib.STATUS_BITMAP_EAGER_BYTES)  # reserved whole
PAGES_A_BITMAP_PAGE = mmap.PAGESIZE * 8

HEADER_BYTES: int = ffi.sizeof("struct status_header")
BLOCK_BYTES: int = ffi.sizeof("struct status_block")
HELPER_BYTES: int = ffi.sizeof("struct status_helper")


def named(names: tuple[str, ...], value: int) -> str:
    """The word for a number in the segment; a number that has none stands for itself."""
    return names[value] if value < len(names) else str(value)


def page_up(n_bytes: int) -> int:
    return -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


BLOCKS_OFFSET = page_up(HEADER_BYTES)
HELPERS_OFFSET = BLOCKS_OFFSET + page_up(BLOCK_BYTES * lib.STATUS_BLOCKS_MAX)
TABLES_BYTES = HELPERS_OFFSET + page_up(HELPER_BYTES * lib.STATUS_HELPERS_MAX)


def summary_state(states: Iterable[str]) -> str:
    """One word for a set of blocks: what most needs to be seen; END only if all are at the end."""
    present = set(states)
    return next((state for state in STATE_SUMMARY_ORDER if state in present), "NONE")


def process_stat(pid: int) -> tuple[str, int] | None:
    """State letter and start ticks of a process, or None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])  # fields 3 and 22 of proc(5)
    except (OSError, IndexError, ValueError):
        return None


def parent_pid(pid: int) -> int:
    """Of a process; 0 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])  # field 4 of proc(5)
    except (OSError, IndexError, ValueError):
        return 0
