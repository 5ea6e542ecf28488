"""What stands between a source and its readers for demonstrations and tests: delay, rate, error; and timeout, how long
a server may take for an answer.

Reads the list of filters that follows a source, and puts the core's filter channel in front of a page channel. It opens
nothing and knows no kind of source; what a filter does to a request is the core's business.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pcshare.errors import SourceError, UsageError
from pcshare.sources.percent import decode_percent
from pcshare.units import parse_duration, parse_rate

DELAY_US_MAX = 3600 * 1_000_000  # an hour: who waits longer for one page has mistyped
TIMEOUT_MS_MAX = 3600 * 1000  # an hour: whoever waits longer has mistyped, too
RATE_MAX = 1 << 40  # bytes a second: more than any memory gives; the core multiplies it by nanoseconds

# These mean something to whoever asks a page channel (again, interrupted, closed), so no source may fail with them.
RESERVED_ERRORS = frozenset({errno.EAGAIN, errno.EINTR, errno.ECANCELED})

# What reading a number can raise: digits beyond Python's limit are a ValueError, an infinite float an OverflowError.
_BAD_NUMBER = (UsageError, ValueError, OverflowError)

_HELP = (
    "filters are delay=2ms, rate=200M (bytes a second), error=EIO@FILE (fails while FILE exists) and, for a server, "
    "timeout=30s (how long an answer may take), joined by '&'; "
    "a '#' that belongs to a path is written %23 after file:, as in file:a%23b.npy"
)


@dataclass(frozen=True)
class FilterSpec:
    """What is said after a source's '#'. All zero and empty: nothing."""

    delay_us: int = 0
    rate: int = 0
    error_errno: int = 0
    error_path: str = ""
    timeout_ms: int = 0  # not the filter channel's business: whoever talks to the server keeps to it

    def __bool__(self) -> bool:
        return self != FilterSpec()

    @property
    def changes_requests(self) -> bool:
        return replace(self, timeout_ms=0) != FilterSpec()

    def with_absolute_path(self) -> FilterSpec:
        """The same with the error filter's FILE counted from the present directory."""
        if not self.error_path:
            return self
        try:
            return replace(self, error_path=os.path.abspath(self.error_path))
        except OSError as error:
            raise SourceError(
                f"the error filter's {self.error_path!r} cannot be found: the present directory is gone",
                errno=error.errno,
                hint="give an absolute path",
            ) from error


def parse_filters(fragment: str) -> FilterSpec:
    """Reads 'delay=2ms&rate=200M&error=EIO@FILE'; raises UsageError for anything else."""
    fields: dict[str, Any] = {}
    seen: set[str] = set()
    for item in fragment.split("&"):
        key, equals, value = item.partition("=")
        if not equals or key not in _PARSERS:
            raise UsageError(f"unknown filter {item!r} in '#{fragment}'", hint=_HELP)
        if key in seen:
            raise UsageError(f"filter {key!r} is given twice in '#{fragment}'", hint="each filter once")
        seen.add(key)
        fields |= _PARSERS[key](value)
    return FilterSpec(**fields)


def wrap_channel(channel: Any, filters: FilterSpec) -> Any:
    """The channel behind its filters; consumes it, also when it fails. Without filters it comes back as it is."""
    if not filters.changes_requests:
        return channel
    from pcshare.page_channel import filter_channel  # late: the grammar works without the compiled core

    return filter_channel(
        channel,
        delay_us=filters.delay_us,
        rate=filters.rate,
        error_errno=filters.error_errno,
        error_path=filters.error_path,
    )


def _parse_delay(value: str) -> dict[str, Any]:
    try:
        delay_us = round(parse_duration(value) * 1_000_000)
    except _BAD_NUMBER as error:
        raise _bad_value("delay", value, "a duration such as 2ms") from error
    if not 0 < delay_us <= DELAY_US_MAX:
        raise _bad_value("delay", value, f"between 1us and {DELAY_US_MAX // 1_000_000}s")
    return {"delay_us": delay_us}


def _parse_timeout(value: str) -> dict[str, Any]:
    try:
        timeout_ms = round(parse_duration(value) * 1000)
    except _BAD_NUMBER as error:
        raise _bad_value("timeout", value, "a duration such as 30s") from error
    if not 0 < timeout_ms <= TIMEOUT_MS_MAX:
        raise _bad_value("timeout", value, f"between 1ms and {TIMEOUT_MS_MAX // 1000}s")
    return {"timeout_ms": timeout_ms}


def _parse_rate(value: str) -> dict[str, Any]:
    try:
        rate = parse_rate(value)
    except _BAD_NUMBER as error:
        raise _bad_value("rate", value, "bytes a second such as 200M") from error
    if not 0 < rate <= RATE_MAX:
        raise _bad_value("rate", value, f"between 1 and {RATE_MAX} bytes a second")
    return {"rate": rate}


def _parse_error(value: str) -> dict[str, Any]:
    name, at, path = value.partition("@")
    number = getattr(errno, name, 0) if re.fullmatch("E[A-Z0-9]+", name) else 0
    path = decode_percent(path)
    if not number or not at or not path:
        raise _bad_value("error", value, "ERRNO@FILE such as EIO@/tmp/fail")
    if number in RESERVED_ERRORS:
        raise _bad_value("error", value, "an error of a source, such as EIO, ENODATA or ETIMEDOUT")
    return {"error_errno": number, "error_path": path}


def _bad_value(key: str, value: str, wanted: str) -> UsageError:
    return UsageError(f"filter '{key}={value}' is not right", hint=f"{key} takes {wanted}")


_PARSERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "delay": _parse_delay,
    "rate": _parse_rate,
    "error": _parse_error,
    "timeout": _parse_timeout,
}
