"""Mutated status segments, and all that reads one: a report or a PcshareError comes of it, soon, and nothing else.

The segment has small tables, so that thousands can be read a second; the sizes in it are anything.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from pcshare import runtime
from pcshare.core import ffi, lib
from pcshare.errors import PcshareError
from pcshare.status import StatusReader, StatusReport
from pcshare.status.layout import BLOCK_BYTES, HEADER_BYTES, HELPER_BYTES
from pcshare.views.report import status_report

BLOCKS, HELPERS, PAGES = 3, 4, 200
BLOCKS_OFFSET = -(-HEADER_BYTES // 8) * 8
HELPERS_OFFSET = BLOCKS_OFFSET + BLOCKS * BLOCK_BYTES
TABLES_BYTES = HELPERS_OFFSET + HELPERS * HELPER_BYTES
SEGMENT_BYTES = TABLES_BYTES + 64
LARGE_BYTES = 4 << 20  # room for tables as large as they may be
TIME_MAX_S = 20.0  # of one segment: some milliseconds on an idle machine
PICTURE_EVERY = 20  # a picture takes longer than a report
EDGES = tuple(edge + by for edge in (1, 1 << 8, 1 << 12, 1 << 16, 1 << 31, 1 << 32, 1 << 63, 1 << 64) for by in (-1, 0))
TEXTS = (b"\xff", b"\x1b[31m", b"%s%n", b"")


def fields(ctype: str, offset: int) -> Iterator[tuple[int, int]]:
    """(where, how many bytes) of each number and each text in a struct of the segment."""
    for _, field in ffi.typeof(ctype).fields:
        size = ffi.sizeof(field.type)
        if field.type.kind == "struct":
            yield from fields(field.type.cname, offset + field.offset)
        elif field.type.kind == "array" and field.type.item.cname != "char":
            each = ffi.sizeof(field.type.item)
            yield from ((offset + field.offset + at, each) for at in range(0, size, each))
        else:
            yield offset + field.offset, size


def right_segment() -> bytes:
    """One that a coordinator with two blocks and two helpers might have written."""
    segment = bytearray(SEGMENT_BYTES)
    header = ffi.from_buffer("struct status_header *", segment)
    header.magic, header.version, header.size = lib.STATUS_MAGIC, lib.STATUS_VERSION, TABLES_BYTES
    header.blocks_offset, header.blocks_max = BLOCKS_OFFSET, BLOCKS
    header.helpers_offset, header.helpers_max = HELPERS_OFFSET, HELPERS
    header.pid, header.pid_start_ticks, header.target_page_size, header.source_page_sizes = os.getpid(), 1, 4096, 4096
    header.name, header.socket_path, header.machine = b"fuzz", b"/run/fuzz.sock", b"pc"
    for block in _table(segment, "block")[:2]:
        block.idstr, block.in_use, block.state = b"data", 1, lib.STATUS_STATE_RUNNING
        block.used_length, block.page_size, block.page_count = PAGES * 4096 - 5, 4096, PAGES
        block.bitmap_offset, block.received_pages = TABLES_BYTES, 7
    for helper in _table(segment, "helper")[:2]:
        helper.state, helper.pid, helper.faults = lib.STATUS_HELPER_ATTACHED, os.getpid(), 3
        helper.blocktime.count[5], helper.blocktime.max_us = 3, 30
    return bytes(segment)


def _table(segment: bytearray, kind: str) -> list[Any]:
    offset, count = (BLOCKS_OFFSET, BLOCKS) if kind == "block" else (HELPERS_OFFSET, HELPERS)
    base = ffi.cast("char *", ffi.from_buffer(segment)) + offset
    table = ffi.cast(f"struct status_{kind} *", base)
    return [table[index] for index in range(count)]


ALL_FIELDS = [
    *fields("struct status_header", 0),
    *(field for index in range(2) for field in fields("struct status_block", BLOCKS_OFFSET + index * BLOCK_BYTES)),
    *(field for index in range(2) for field in fields("struct status_helper", HELPERS_OFFSET + index * HELPER_BYTES)),
]
GEOMETRY = ALL_FIELDS[:8]  # magic, version, size, where the tables are


def mutate(segment: bytearray, rng: random.Random) -> int:
    """Changes some fields; returns how long the file is to be."""
    if rng.random() < 0.02:
        segment[:] = rng.randbytes(SEGMENT_BYTES)
    for _ in range(rng.randint(1, 4)):
        where, size = rng.choice(GEOMETRY if rng.random() < 0.2 else ALL_FIELDS)
        if size > 8:  # a text
            segment[where : where + size] = rng.choice([rng.randbytes(size), rng.choice(TEXTS).ljust(size, b"x")])
            continue
        value = int.from_bytes(segment[where : where + size], "little") + rng.randint(-2, 2)
        value = rng.choice([value, rng.choice(EDGES), 1 << rng.randrange(64)]) % (1 << 8 * size)
        segment[where : where + size] = value.to_bytes(size, "little")
    chance = rng.random()
    return rng.randrange(SEGMENT_BYTES) if chance < 0.1 else LARGE_BYTES if chance < 0.15 else SEGMENT_BYTES


def read_everything(name: str, with_picture: bool) -> StatusReport | None:
    """What `pcshare status` reads and prints; None if it was refused."""
    try:
        with StatusReader(name) as reader:
            report = reader.report()
            json.dumps(report.to_json())
            for block in report.blocks:
                with suppress(PcshareError):
                    assert len(reader.bitmap(block)) == -(-block.page_count // 8)
            if with_picture:
                Console(file=io.StringIO(), width=100).print(status_report(report, reader.bitmap))
            return report
    except PcshareError:
        return None


@dataclass
class Tally:
    read: int = 0
    refused: int = 0
    longest_s: float = 0.0


class SegmentFile:
    """A segment that nobody serves, rewritten again and again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._fd = os.open(runtime.shm_path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, SEGMENT_BYTES)
        self._mapping = mmap.mmap(self._fd, SEGMENT_BYTES)  # never looked at; it says that somebody uses the file

    def write(self, content: bytes | bytearray, length: int) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, content, 0)
        os.ftruncate(self._fd, length)

    def close(self) -> None:
        self._mapping.close()
        os.close(self._fd)
        runtime.shm_path(self.name).unlink()


@contextmanager
def segment_file(name: str) -> Iterator[SegmentFile]:
    made = SegmentFile(name)
    try:
        yield made
    finally:
        made.close()


def fuzz_reader(count: int, seed: int) -> Tally:
    """AssertionError, or whatever the reader raised, tells of the input that did it."""
    rng, tally, right = random.Random(seed), Tally(), right_segment()
    with segment_file(f"fuzz-{os.getpid()}") as file:
        for number in range(count):
            segment = bytearray(right)
            length = mutate(segment, rng)
            file.write(segment, length)
            begin = time.monotonic()
            try:
                report = read_everything(file.name, number % PICTURE_EVERY == 0)
            except Exception as error:
                error.add_note(f"segment {number} of seed {seed}")
                raise
            took_s = time.monotonic() - begin
            assert took_s < TIME_MAX_S, f"segment {number} of seed {seed} took {took_s:.1f} s"
            tally.longest_s = max(tally.longest_s, took_s)
            tally.read += report is not None
            tally.refused += report is None
    return tally
