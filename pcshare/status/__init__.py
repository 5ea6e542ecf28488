"""status: the status segment of a coordinator: who writes it, who reads it, and what a dead one left behind.

layout (names and offsets) · writer · report (values) · reader · leftovers. Must not connect to a coordinator and must
not decide what becomes of leftovers.
"""

from __future__ import annotations

from pcshare.status.layout import (
    HELPER_STATE_NAMES,
    HELPERS_OFFSET,
    STATE_NAMES,
    STREAM_NAMES,
    TABLES_BYTES,
    named,
    process_stat,
    summary_state,
)
from pcshare.status.leftovers import Leftovers, in_use, leftovers, name_in_use, remove_leftovers
from pcshare.status.reader import StatusReader, await_restart, read_status
from pcshare.status.report import (
    BlockStatus,
    Blocktime,
    HelperStatus,
    SourceStatus,
    StatusReport,
    blocktime_quantile,
)
from pcshare.status.writer import BitmapRegion, SegmentWriter

__all__ = [
    "HELPERS_OFFSET",
    "HELPER_STATE_NAMES",
    "STATE_NAMES",
    "STREAM_NAMES",
    "TABLES_BYTES",
    "BitmapRegion",
    "BlockStatus",
    "Blocktime",
    "HelperStatus",
    "Leftovers",
    "SegmentWriter",
    "SourceStatus",
    "StatusReader",
    "StatusReport",
    "await_restart",
    "blocktime_quantile",
    "in_use",
    "leftovers",
    "name_in_use",
    "named",
    "process_stat",
    "read_status",
    "remove_leftovers",
    "summary_state",
]
