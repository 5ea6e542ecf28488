"""units: what people write for sizes, rates and durations, and how numbers are shown to them."""

from __future__ import annotations

import pytest

from pcshare.errors import UsageError
from pcshare.units import format_bytes, format_rate, format_us, parse_duration, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4K", 4096),
        ("4k", 4096),
        ("4KiB", 4096),
        ("200M", 200 << 20),
        ("1.5G", 3 << 29),
        ("1T", 1 << 40),
        (" 2 MiB ", 2 << 20),
        ("0.5K", 512),
        (12345, 12345),
        (str((1 << 63) - 1), (1 << 63) - 1),
    ],
)
def test_size_is_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "K", "-1", "4X", "4KK", "1,5G", "1e6", "0x10", "\u0664K", "8E", "9999P", -1, 1 << 63, "nan"]
)
def test_what_is_no_size_is_named(text: str | int) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert repr(text) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(("text", "rate"), [("200M", 200 << 20), ("200M/s", 200 << 20), ("1", 1), (500, 500)])
def test_rate_is_read(text: str | int, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["0", "fast", "200M/h", "", 0, -5])
def test_what_is_no_rate_is_named(text: str | int) -> None:
    with pytest.raises(UsageError, match="not a rate") as caught:
        parse_rate(text)
    assert repr(text) in caught.value.message
    assert "200M" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250us", 250e-6),
        ("250\u00b5s", 250e-6),
        ("2ms", 0.002),
        ("1s", 1.0),
        ("1.5s", 1.5),
        ("5min", 300.0),
        ("10ns", 1e-8),
        ("3", 3.0),
        (0.25, 0.25),
        ("0", 0.0),
    ],
)
def test_duration_is_read(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "ms", "2 fortnights", "-1s", "1e9", "99999999h", -0.5, float("nan"), float("inf")]
)
def test_what_is_no_duration_is_named(text: str | float) -> None:
    with pytest.raises(UsageError) as caught:
        parse_duration(text)
    assert repr(text) in caught.value.message
    assert "2ms" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (4096, "4 KiB"), (1536, "1.5 KiB"), (200 << 20, "200 MiB"), (3 << 40, "3 TiB"), (1 << 60, "1024 PiB")],
)
def test_bytes_are_shown(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize(
    ("us", "text"), [(0, "0 us"), (12.34, "12.3 us"), (999, "999 us"), (1234, "1.2 ms"), (2_500_000, "2.5 s")]
)
def test_microseconds_are_shown(us: float, text: str) -> None:
    assert format_us(us) == text


def test_rate_is_shown() -> None:
    assert format_rate(200 << 20) == "200 MiB/s"


def test_shown_size_reads_back() -> None:
    for n_bytes in (0, 1, 512, 4096, 5 << 20, 7 << 30):
        assert parse_size(format_bytes(n_bytes)) == n_bytes
