"""page_channel: skin over the core's page channels: what a source makes and the fault threads take.

A channel is passed on as the core's pointer, and each function that takes one consumes it, also when it fails. Whoever
keeps one frees it. Reads nothing.
"""

from __future__ import annotations

import os
from typing import Any

from pcshare.core import ffi, lib
from pcshare.errors import SourceError


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


def free_channel(channel: Any) -> None:
    lib.page_channel_free(channel)
