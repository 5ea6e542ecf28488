"""page_channel: skin over the core's page channels: what a source makes and the fault threads take.

A channel is passed on as the core's pointer, and each function that takes one consumes it, also when it fails. Whoever
keeps one frees it. Reads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pcshare.core import ffi, lib
from pcshare.errors import SourceError, check


def _made(rc: int, channel: Any, what: str) -> Any:
    if rc < 0:
        raise SourceError(f"cannot make {what}: {os.strerror(-rc)}", errno=-rc)
    return channel[0]


def file_channel(fd: int, length: int) -> Any:
    """Reads a file of so many bytes through a duplicate of fd."""
    channel = ffi.new("struct page_channel **")
    return _made(lib.page_channel_file_new(channel, os.dup(fd), length), channel, "a page channel")


def zero_channel() -> Any:
    """Any read is zeros."""
    channel = ffi.new("struct page_channel **")
    return _made(lib.page_channel_zero_new(channel), channel, "a page channel")


def filter_channel(inner: Any, *, delay_us: int, rate: int, error_errno: int, error_path: str) -> Any:
    """A filter in front of a channel, which it consumes. rate in bytes a second; 0 switches a filter off."""
    channel = ffi.new("struct page_channel **")
    rc = lib.page_channel_filter_new(channel, inner, delay_us, rate, error_errno, os.fsencode(error_path))
    return _made(rc, channel, "the filters")


@dataclass(frozen=True)
class ChannelFigures:
    """What a channel took. error is a positive errno where a read failed, and the rest was then not tried."""

    round_trips_us: tuple[float, ...]  # of one page each, one after the other
    stream_bytes: int  # in large pieces, several at once
    stream_s: float
    error: int
    error_offset: int


def measure_channel(channel: Any, size: int, *, duration_s: float, timeout_s: float) -> ChannelFigures:
    """Reads pages from all over a source of size bytes, then for duration_s from its start. Consumes the channel."""
    report = ffi.new("struct channel_meter_report *")
    rc = lib.channel_meter_run(channel, size, round(duration_s * 1000), round(timeout_s * 1000), report)
    check(rc, "measuring a source")
    trips = tuple(report.round_trip_ns[i] / 1000 for i in range(report.n_round_trips))
    return ChannelFigures(trips, report.stream_bytes, report.stream_ns / 1e9, report.error, report.error_offset)


def free_channel(channel: Any) -> None:
    lib.page_channel_free(channel)


@dataclass(frozen=True)
class NbdEvent:
    """A connection was lost: error is a positive errno, owed the number of reads it had not answered."""

    connection: int
    error: int
    owed: int
    text: str


class NbdChannel:
    """The side of an NBD page channel that supplies connections. pointer goes to whoever reads through it, once, who
    frees it; close() lets go of it here, before or after."""

    def __init__(
        self,
        *,
        size: int,
        alignment: int,
        length_max: int,
        reply_timeout_ms: int,
        server_count: int,
        preferred: int = 0,
    ) -> None:
        """size in bytes; alignment and length_max of one read, bytes; server_count: how many equivalents there are;
        preferred: what a server reads at a time at best, bytes; 0: not known."""
        settings = ffi.new("struct nbd_settings *")
        settings.size, settings.alignment, settings.length_max = size, alignment, length_max
        settings.reply_timeout_ms, settings.server_count = reply_timeout_ms, server_count
        settings.preferred = preferred
        channel = ffi.new("struct page_channel **")
        self.pointer = _made(lib.page_channel_nbd_new(channel, settings), channel, "a page channel")
        self._is_open = True

    def connect(self, fd: int, *, demand: bool, structured: bool) -> int:
        """Takes a connection on which nothing is outstanding; consumes fd. Returns its number in events."""
        number = ffi.new("uint32_t *")
        kind = lib.NBD_DEMAND if demand else lib.NBD_PRIMARY
        check(lib.page_channel_nbd_connect(self.pointer, fd, kind, structured, number), "adding a connection")
        return int(number[0])

    def disconnect(self, error: int, text: str) -> None:
        """Ends both connections as if they were lost."""
        lib.page_channel_nbd_disconnect(self.pointer, error, text.encode())

    def give_up(self, error: int) -> None:
        """A positive errno: what waits for a connection fails with it; 0: it waits again."""
        lib.page_channel_nbd_give_up(self.pointer, error)

    def fileno(self) -> int:
        """Readable when an event waits."""
        return int(lib.page_channel_nbd_event_fd(self.pointer))

    def events(self) -> Iterator[NbdEvent]:
        """The events that wait."""
        event = ffi.new("struct nbd_event *")
        while lib.page_channel_nbd_next_event(self.pointer, event):
            text = ffi.string(event.text).decode(errors="replace")
            yield NbdEvent(event.connection, event.error, event.n_owed, text)

    def close(self) -> None:
        """Nothing is wanted any more; the servers are told. Twice is fine."""
        if self._is_open:
            self._is_open = False
            lib.page_channel_nbd_end(self.pointer)
            lib.page_channel_nbd_release(self.pointer)
