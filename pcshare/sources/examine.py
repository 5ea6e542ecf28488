"""Looks at a source as a coordinator would find it: reachable, how large, what it offers, how fast it answers.

Opens it, reads some of it through a page channel of its own, closes it. It changes nothing and judges nothing.
"""

from __future__ import annotations

import os
import statistics
import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pcshare.errors import SourceError
from pcshare.signals import signals_blocked, wait_for_event
from pcshare.sources.npy import ArrayDescription
from pcshare.sources.opened import OpenedSource
from pcshare.sources.shown import shown

if TYPE_CHECKING:
    from pcshare.page_channel import ChannelFigures

STREAM_S = 1.0  # long enough for a rate, short enough to wait for
READ_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class SourceReport:
    """Sizes in bytes, round trips of one page in microseconds, throughput in bytes a second (0: too little to tell)."""

    source: str
    kind: str
    used_length: int
    data_length: int  # without holes
    array: ArrayDescription | None
    facts: dict[str, str | int | bool]  # what this kind of source has to say
    round_trip_us: float  # median
    round_trip_us_max: float
    throughput: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine_source(source: OpenedSource) -> SourceReport:
    """Measures an open source. Raises SourceError where it cannot be read. Interrupted, it leaves the reading to a
    thread that ends with the source, or with the process."""
    figures = _measure(source)
    if figures.error:
        raise SourceError(
            f"{shown(source.spec.text)}: reading at offset {figures.error_offset}: {os.strerror(figures.error)}",
            errno=figures.error,
        )
    return SourceReport(
        source=shown(source.spec.text),
        kind=source.spec.scheme,
        used_length=source.used_length,
        data_length=sum(end - start for start, end in source.extents),
        array=source.array,
        facts=source.facts(),
        round_trip_us=statistics.median(figures.round_trips_us),
        round_trip_us_max=max(figures.round_trips_us),
        throughput=figures.stream_bytes / figures.stream_s if figures.stream_s else 0.0,
    )


def _measure(source: OpenedSource) -> ChannelFigures:
    """In a thread of its own: a read may take as long as it may, and the main thread is to hear of ^C meanwhile."""
    from pcshare.page_channel import measure_channel  # late: the grammar works without the compiled core

    outcome: list[ChannelFigures | BaseException] = []
    is_over = threading.Event()

    def run() -> None:
        try:
            outcome.append(measure_channel(channel, length, duration_s=STREAM_S, timeout_s=READ_TIMEOUT_S))
        except BaseException as error:
            outcome.append(error)
        is_over.set()

    channel, length = source.make_channel(), source.used_length
    thread = threading.Thread(target=run, name="pcshare-examine", daemon=True)
    with signals_blocked():  # a signal that another thread takes does not end the main thread's wait
        thread.start()
    wait_for_event(is_over)
    (figures,) = outcome
    if isinstance(figures, BaseException):
        raise figures
    return figures
