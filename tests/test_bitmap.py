"""The bitmap: one bit a page, changed by several threads at once."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from pcshare.core import ffi, lib

BITS = 1000


@pytest.fixture
def words() -> Iterator[Any]:
    wordsp = ffi.new("uint64_t **")
    assert lib.bitmap_new(wordsp, BITS) == 0
    yield wordsp[0]
    lib.bitmap_free(wordsp[0], BITS)


def bits_of(words: Any) -> set[int]:
    return {bit for bit in range(BITS) if lib.bitmap_test(words, bit)}


def test_bytes_are_whole_words() -> None:
    assert [lib.bitmap_bytes(bits) for bits in (0, 1, 64, 65, 2**64 - 1)] == [0, 8, 8, 16, 2**61]


def test_bitmap_of_no_bits_is_refused() -> None:
    wordsp = ffi.new("uint64_t **")
    assert lib.bitmap_new(wordsp, 0) == -errno.EINVAL
    assert wordsp[0] == ffi.NULL


def test_set_and_clear_say_what_was_before(words: Any) -> None:
    for bit in (0, 1, 63, 64, BITS - 1):
        assert lib.bitmap_test(words, bit) == 0
        assert lib.bitmap_test_and_set(words, bit) == 0
        assert lib.bitmap_test_and_set(words, bit) == 1
        assert lib.bitmap_test(words, bit) == 1
        assert lib.bitmap_test_and_clear(words, bit) == 1
        assert lib.bitmap_test_and_clear(words, bit) == 0
    assert bits_of(words) == set()


@pytest.mark.parametrize(
    ("start", "end"), [(0, 0), (5, 5), (7, 3), (0, 1), (63, 64), (63, 65), (64, 128), (1, 999), (0, BITS), (130, 131)]
)
def test_range_changes_its_bits_and_no_others(words: Any, start: int, end: int) -> None:
    lib.bitmap_set_range(words, start, end)
    assert bits_of(words) == set(range(start, end))
    assert lib.bitmap_count(words, 0, BITS) == len(range(start, end))
    lib.bitmap_set_range(words, 0, BITS)
    lib.bitmap_clear_range(words, start, end)
    assert bits_of(words) == set(range(BITS)) - set(range(start, end))


def test_random_changes_match_a_set(words: Any) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, model = random.Random(seed), set[int]()
    for _ in range(500):
        start, end = sorted(rng.choices(range(BITS + 1), k=2))
        end = min(end, start + rng.choice([1, 3, 70, BITS]))
        if rng.random() < 0.5:
            lib.bitmap_set_range(words, start, end)
            model |= set(range(start, end))
        else:
            lib.bitmap_clear_range(words, start, end)
            model -= set(range(start, end))
        start, end = sorted(rng.choices(range(BITS + 1), k=2))
        inside = [bit for bit in range(start, end) if bit in model]
        outside = [bit for bit in range(start, end) if bit not in model]
        assert lib.bitmap_count(words, start, end) == len(inside)
        assert lib.bitmap_next_set(words, start, end) == (inside[0] if inside else end)
        assert lib.bitmap_next_clear(words, start, end) == (outside[0] if outside else end)
    assert bits_of(words) == model


def test_next_in_an_empty_range_is_its_end(words: Any) -> None:
    assert lib.bitmap_next_clear(words, 7, 7) == 7
    assert lib.bitmap_next_set(words, 9, 7) == 7


def test_each_bit_is_claimed_by_exactly_one_of_several_threads() -> None:
    """T7: who sets a placing bit is the only one."""
    bits = 20000
    wordsp = ffi.new("uint64_t **")
    assert lib.bitmap_new(wordsp, bits) == 0
    claimed: list[list[int]] = [[] for _ in range(4)]
    barrier = threading.Barrier(len(claimed))

    def claim(mine: list[int]) -> None:
        barrier.wait()
        mine.extend(bit for bit in range(bits) if not lib.bitmap_test_and_set(wordsp[0], bit))

    threads = [threading.Thread(target=claim, args=(mine,)) for mine in claimed]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(bit for mine in claimed for bit in mine) == list(range(bits))
    lib.bitmap_free(wordsp[0], bits)


def test_bitmap_of_a_huge_block_costs_memory_only_where_touched() -> None:
    """The 32 MiB of bits of a 1 TiB block of 4 KiB pages stay unreal."""
    bits = 2**40 // 4096
    wordsp = ffi.new("uint64_t **")
    assert lib.bitmap_new(wordsp, bits) == 0
    before = psutil.Process().memory_info().rss
    lib.bitmap_test_and_set(wordsp[0], bits - 1)
    lib.bitmap_clear_range(wordsp[0], 0, bits // 4)
    assert psutil.Process().memory_info().rss - before < 16 << 20
    assert lib.bitmap_next_set(wordsp[0], 0, bits) == bits - 1
    lib.bitmap_free(wordsp[0], bits)
