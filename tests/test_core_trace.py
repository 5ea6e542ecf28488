"""Trace points: records in a ring, nothing while nobody traces."""

from __future__ import annotations

import threading
import time

from pcshare.core import ffi, lib


def test_nobody_traces_and_nothing_happens() -> None:
    """G5."""
    lib.trace_to(ffi.NULL)
    lib.trace_point(lib.TRACE_FAULT, 1, 2, 3, 4)


def test_record_says_what_when_and_who() -> None:
    """G5."""
    ring = ffi.new("struct trace_ring *")
    before = time.monotonic_ns()
    lib.trace_to(ring)
    lib.trace_point(lib.TRACE_FAULT, 1, 2, 3, 4)
    lib.trace_to(ffi.NULL)
    lib.trace_point(lib.TRACE_WAKE, 1, 2, 3, 4)
    record = ring.records[0]
    assert ring.next == 1
    assert before <= record.time_ns <= time.monotonic_ns()
    assert (record.event, record.tid) == (lib.TRACE_FAULT, threading.get_native_id())
    assert (record.block_index, record.subject, record.page, record.detail) == (1, 2, 3, 4)


def test_full_ring_overwrites_the_oldest() -> None:
    ring = ffi.new("struct trace_ring *")
    lib.trace_to(ring)
    for page in range(lib.TRACE_RECORDS + 2):
        lib.trace_point(lib.TRACE_PLACE, 0, 0, page, 1)
    lib.trace_to(ffi.NULL)
    assert ring.next == lib.TRACE_RECORDS + 2
    pages = [ring.records[slot].page for slot in (0, 1, 2, lib.TRACE_RECORDS - 1)]
    assert pages == [lib.TRACE_RECORDS, lib.TRACE_RECORDS + 1, 2, lib.TRACE_RECORDS - 1]
