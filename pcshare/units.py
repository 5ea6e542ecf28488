"""units: sizes, rates and durations as people write them, and bytes and microseconds as people read them.

Multiples of bytes are binary: K is 1024. Must not guess: what cannot be read is a UsageError that names the text.
"""

from __future__ import annotations

import re
from fractions import Fraction

from pcshare.errors import UsageError

SIZE_MAX = (1 << 63) - 1  # what an off_t holds
DURATION_S_MAX = 366 * 86400  # a year: far beyond any time limit, far below any overflow

_MULTIPLES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
# Digits are limited: Python refuses to read thousands of them with an error of its own.
_SIZE = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([KMGTP]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_SECONDS = {
    "": Fraction(1),
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "\u00b5s": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
}
_DURATION = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([a-z\u00b5]*)")


def parse_size(text: str | int) -> int:
    """Bytes: ``"4K"``, ``"200M"``, ``"1.5G"``, ``"4096"`` or a number. A fraction of a byte is dropped."""
    if isinstance(text, int):
        size = text
    else:
        match = _SIZE.fullmatch(text.strip())
        if match is None:
            raise UsageError(f"not a size: {text!r}", hint="write it like 4096, 4K, 200M or 1.5G (K is 1024 bytes)")
        size = int(Fraction(match[1]) * _MULTIPLES[match[2].upper()])
    if not 0 <= size <= SIZE_MAX:
        raise UsageError(f"size out of range: {text!r}", hint=f"sizes go from 0 to {SIZE_MAX} bytes")
    return size


def parse_rate(text: str | int) -> int:
    """Bytes a second: ``"200M"``, ``"200M/s"`` or a number; at least 1."""
    amount = text.strip().removesuffix("/s") if isinstance(text, str) else text
    try:
        rate = parse_size(amount)
    except UsageError:
        rate = 0
    if rate == 0:
        raise UsageError(f"not a rate: {text!r}", hint="write bytes a second, more than 0, like 500K, 200M or 1.5G")
    return rate


def parse_duration(text: str | int | float) -> float:
    """Seconds: ``"2ms"``, ``"250us"``, ``"1s"``, ``"5min"``; a bare number is seconds."""
    if isinstance(text, str):
        match = _DURATION.fullmatch(text.strip())
        unit = _SECONDS.get(match[2]) if match else None
        if match is None or unit is None:
            raise UsageError(f"not a duration: {text!r}", hint="write it like 250us, 2ms, 1s, 1.5s or 5min")
        seconds = float(Fraction(match[1]) * unit)
    else:
        seconds = float(text)
    if not 0 <= seconds <= DURATION_S_MAX:
        raise UsageError(
            f"duration out of range: {text!r}", hint="durations go from 0 to a year, like 250us, 2ms or 1s"
        )
    return seconds


def _three_digits(number: float) -> str:
    if number >= 100:
        return f"{number:.0f}"
    return f"{number:.1f}".removesuffix(".0")


def format_bytes(n_bytes: int) -> str:
    """``4096`` becomes ``"4 KiB"``."""
    amount = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            return f"{_three_digits(amount)} {unit}"
        amount /= 1024
    return f"{_three_digits(amount)} PiB"


def format_rate(bytes_per_s: float) -> str:
    return f"{format_bytes(int(bytes_per_s))}/s"


def format_us(us: float) -> str:
    """Microseconds: ``1234`` becomes ``"1.2 ms"``."""
    if us < 1000:
        return f"{_three_digits(us)} us"
    if us < 1_000_000:
        return f"{_three_digits(us / 1000)} ms"
    return f"{_three_digits(us / 1_000_000)} s"
