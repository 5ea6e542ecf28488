"""What comes from others, mutated: control messages, replies of NBD servers, status segments, texts that people write.

Here for some seconds each, with a new seed in every run; scripts/fuzz goes on for as long as wanted. Whatever comes:
what it means, or the one error; never another exception, a crash, a sanitizer's report, a wait without end, an fd that
stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

import support_fuzz
from conftest import SEED
from pcshare import attach, client, protocol, runtime, units
from pcshare.core import lib
from pcshare.errors import (
    LocalProtocolError,
    PcshareError,
    RemoteProtocolError,
    SourceError,
    UsageError,
    VersionMismatch,
)
from pcshare.nbd import address
from pcshare.protocol import AdminOp, Map, Mode, Welcome
from pcshare.sources import grammar
from pcshare.status import StatusReader, blocktime_quantile
from support import IN_CI
from support_coordinator import coordinator
from support_hand_over import hand_over
from support_serving import make_file
from support_status_fuzz import (
    BLOCKS_OFFSET,
    LARGE_BYTES,
    SEGMENT_BYTES,
    fuzz_reader,
    read_everything,
    right_segment,
    segment_file,
)

COUNTS = {"control": 20_000, "helper": 10_000, "status": 20_000, "nbd": 10_000}  # incoming has a test of its own
SEGMENTS = 1000
HAND_OVERS, HAND_OVER_LENGTH = 1000, 16 * 4096
EXAMPLES = 400 if IN_CI else 150

FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
from_the_seed = hypothesis_seed(SEED)


# -- the C core, under sanitizers


@pytest.mark.parametrize("name", COUNTS)
def test_mutated_input_comes_to_the_same_end_as_in_a_second_reading(name: str, tmp_path: Path, seed: int) -> None:
    """P1, P4, P7."""
    ran = support_fuzz.run(support_fuzz.build(name, tmp_path), COUNTS[name] if IN_CI else COUNTS[name] // 4, seed)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert " mutated " in ran.stdout


# -- hand-overs, to a coordinator that runs


def test_mutated_hand_overs_disturb_nobody(runtime_dir: Path, tmp_path: Path, rng: random.Random) -> None:
    """P4, P7."""
    path = make_file(tmp_path, rng, HAND_OVER_LENGTH)
    with coordinator(f"data={path}", options=["--stream=lazy"]) as served:
        assert hand_over(served.socket, rng, 20, HAND_OVER_LENGTH)  # what is opened at first stays open
        before = served.held()
        outcomes = hand_over(served.socket, rng, HAND_OVERS, HAND_OVER_LENGTH)
        assert outcomes.total() == HAND_OVERS
        assert min(outcomes["attached"], outcomes["refused"], outcomes["hung up"]) > HAND_OVERS // 100, outcomes
        served.wait_until_alone(before)
        with path.open("rb") as file:
            content = file.read()
        with attach(socket=served.socket) as block:
            block.ensure()
            assert bytes(block) == content


# -- status segments


def test_mutated_status_segments_are_read_or_refused(seed: int) -> None:
    tally = fuzz_reader(SEGMENTS, seed)
    assert tally.read + tally.refused == SEGMENTS
    assert tally.read > SEGMENTS // 10 < tally.refused


def test_texts_of_a_status_segment_do_not_steer_a_terminal() -> None:
    """Anybody may put a segment into /dev/shm, and `pcshare status` shows it."""
    segment = bytearray(right_segment())
    evil = b"\x1b]0;evil\x07\r\n\x9b\xff"
    segment[BLOCKS_OFFSET : BLOCKS_OFFSET + len(evil)] = evil
    with segment_file(f"evil-{os.getpid()}") as file:
        file.write(segment, SEGMENT_BYTES)
        report = read_everything(file.name, with_picture=True)
    assert report is not None
    assert report.blocks[0].idstr == "\ufffd]0;evil" + "\ufffd" * 5


@pytest.mark.parametrize(("page_count", "offset"), [(2**63, 0), (2**50, 0), (8, 2**64 - 1), (2**35, 0)])
def test_a_bitmap_beyond_all_measure_is_refused(page_count: int, offset: int) -> None:
    """The last of them lies inside a file that is sparse."""
    with segment_file(f"large-{os.getpid()}") as file:
        file.write(right_segment(), 1 << 33 if page_count == 2**35 else LARGE_BYTES)
        with StatusReader(file.name) as reader:
            block = reader.report().blocks[0]
            vars(block).update(page_count=page_count, bitmap_offset=offset)
            with pytest.raises(PcshareError) as caught:
                reader.bitmap(block)
    assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_what_is_no_file_is_no_status_segment_and_nobody_waits_for_it(kind: str) -> None:
    name = f"odd-{os.getpid()}"
    path = runtime.shm_path(name)
    (os.mkfifo if kind == "fifo" else os.mkdir)(path)
    try:
        with pytest.raises(PcshareError) as caught:
            StatusReader(name)
        assert caught.value.errno == errno.EPROTO
        assert caught.value.hint
    finally:
        (path.unlink if kind == "fifo" else path.rmdir)()


@from_the_seed
@FUZZ
@given(st.lists(st.integers(0, 2**64 - 1), min_size=32, max_size=32), st.floats(0, 1), st.integers(0, 2**64 - 1))
def test_a_quantile_lies_between_nothing_and_the_longest_wait(counts: list[int], quantile: float, max_us: int) -> None:
    assert 0 <= blocktime_quantile(counts, quantile, max_us) <= max_us


# -- control messages, in Python

numbers = st.integers(0, 2**64 - 1)
halves = st.integers(0, 2**32 - 1)


def short_text(length: int) -> st.SearchStrategy[str]:
    """So many bytes of UTF-8 at most, none of them NUL."""
    letters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
    return st.text(letters, max_size=length).filter(lambda text: len(text.encode()) <= length)


welcomes = st.builds(
    Welcome, halves, st.sampled_from(Mode), halves, numbers, numbers, numbers, numbers, numbers, short_text(63),
    short_text(200), st.lists(numbers, max_size=lib.WIRE_DIMS_MAX).map(tuple), numbers,
)  # fmt: skip
maps = st.lists(st.builds(Map, numbers, numbers, numbers), min_size=1, max_size=lib.WIRE_MAPS_MAX)
texts_of_errors = short_text(lib.WIRE_TEXT_MAX - 1)
signed = st.integers(-(2**31), 2**31 - 1)
modes, orders, names = st.sampled_from(Mode), st.sampled_from(AdminOp), short_text(lib.WIRE_IDSTR_MAX - 1)
V = protocol.VERSION
messages: st.SearchStrategy[tuple[bytes, int, Any]] = st.one_of(
    welcomes.map(lambda one: (protocol.pack_welcome(one), 2, one)),
    maps.map(lambda one: (protocol.pack_attach(one), 1, protocol.Attach(tuple(one)))),
    st.builds(lambda a, b: (protocol.pack_hello(a, b), 0, protocol.Hello(V, V, b, a)), names, modes),
    st.builds(lambda a, b, c: (protocol.pack_request(a, b, c), 0, protocol.Request(c, a, b)), numbers, numbers, halves),
    st.builds(lambda a, b: (protocol.pack_ack(a, b), 0, protocol.Ack(a, b)), halves, halves),
    st.builds(lambda a, b: (protocol.pack_error(a, b), 0, protocol.ErrorMessage(a, b)), signed, texts_of_errors),
    st.builds(lambda a, b: (protocol.pack_admin(a, b), 0, protocol.Admin(a, b)), orders, numbers),
)


@from_the_seed
@FUZZ
@given(messages)
def test_any_message_that_can_be_packed_comes_back(packed: tuple[bytes, int, Any]) -> None:
    data, n_fds, message = packed
    assert protocol.parse(data, n_fds) == message


changed_bytes = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4)


def parse_or_refuse(data: bytes, n_fds: int) -> None:
    with contextlib.suppress(RemoteProtocolError, VersionMismatch):
        protocol.parse(data, n_fds)


@from_the_seed
@FUZZ
@given(st.binary(max_size=300), st.integers(0, 9))
def test_garbage_is_a_message_or_the_one_error(data: bytes, n_fds: int) -> None:
    parse_or_refuse(data, n_fds)


@from_the_seed
@FUZZ
@given(messages, changed_bytes, st.integers(0, 4))
def test_a_mutated_message_is_a_message_or_the_one_error(
    packed: tuple[bytes, int, Any], changes: list[tuple[int, int]], n_fds: int
) -> None:
    mutated = bytearray(packed[0])
    for where, value in changes:
        mutated[where % len(mutated)] = value
    parse_or_refuse(bytes(mutated), n_fds)
    parse_or_refuse(bytes(mutated), packed[1])


@from_the_seed
@FUZZ
@given(st.text(st.characters()))
@example("a file called \udcff")
def test_any_text_fits_an_error_or_a_reason(text: str) -> None:
    """It may hold the name of a file, and that any bytes."""
    message = protocol.parse(protocol.pack_error(errno.EIO, text), 0)
    assert isinstance(message, protocol.ErrorMessage)
    assert len(message.text.encode()) < lib.WIRE_TEXT_MAX


@pytest.mark.parametrize("idstr", ["a\0b", "\udcff", "x" * 64])
def test_a_name_that_cannot_be_sent_is_refused_before_it_is(idstr: str) -> None:
    with pytest.raises(LocalProtocolError):
        protocol.pack_hello(idstr)


@pytest.mark.parametrize(("socket", "block"), [("/s", "a\0b"), ("/s", "\ud800"), ("/a\0b", "a"), ("\ud800", "a")])
def test_attaching_to_what_is_no_name_is_wrong_usage(socket: str, block: str) -> None:
    """Not an attachment to what comes before the NUL."""
    with pytest.raises(UsageError):
        attach(socket=socket, block=block, timeout_s=0)


# -- what a coordinator says of an array

DTYPES = (b"<f8", b"|O", b"|V0", b"<f8,<i4", b"[('a', '<f8'), ('b', '|O')]", b"[('a', '<f8', (2,))]", b"(" * 999)
dtypes = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(DTYPES),
    st.text("[](),'<>|fiuVSO0123456789ab ", max_size=30).map(str.encode),
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy has old letters for some types
@from_the_seed
@FUZZ
@given(dtypes, st.lists(st.one_of(st.integers(0, 9), numbers), max_size=4).map(tuple), numbers, st.booleans())
def test_an_array_fits_the_block_or_is_refused(
    described: bytes, shape: tuple[int, ...], offset: int, is_fortran: bool
) -> None:
    whole = np.zeros(256, dtype=np.uint8)
    try:
        array = client._array_on(whole, described, shape, offset % 300, is_fortran)
    except PcshareError as error:
        assert error.errno == errno.EPROTO  # noqa: PT017  (either outcome is right)
        return
    assert not array.dtype.hasobject
    assert array.nbytes + offset % 300 <= 256


# -- texts that people write

PIECES = (
    "nbd://", "nbd+unix://", "exec:", "ssh://", "s3://", "gs://", "az://", "https://", "file:", "zero:", "qemu+tcp://",
    "qemu+unix:", "#", "delay=", "rate=", "error=", "error-file=", "&", ",", "=", "/", "//", "?", "socket=", "@", ":",
    "[", "]", "%", "%00", "%ff", "..", "host", "10", "1G", "2ms", "EIO", "\0", "\udc80", "é", "~", "-", "\n", "[::1]",
    "65536", "-1", "1e9999", "9" * 5000, "inf", "nan", "a.npy",
)  # fmt: skip
texts = st.one_of(
    st.text(max_size=30), st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=8).map("".join)
)


@from_the_seed
@FUZZ
@given(texts)
@example("h:" + "9" * 5000)
def test_any_argument_is_understood_or_wrong_usage(text: str) -> None:
    for parse in (
        grammar.parse_argument, address.parse_address, units.parse_size, units.parse_rate, units.parse_duration,
        runtime.check_name, runtime.check_block_name,
    ):  # fmt: skip
        with contextlib.suppress(UsageError, SourceError):
            parse(text)


@from_the_seed
@FUZZ
@given(st.lists(texts, max_size=4))
def test_any_arguments_together_are_understood_or_wrong_usage(several: list[str]) -> None:
    with contextlib.suppress(UsageError, SourceError):
        assert len(grammar.parse_arguments(several)) == len(several)


def test_ports_and_sizes_with_zeros_in_front_are_what_they_were(rng: random.Random) -> None:
    port = rng.randrange(65536)
    assert address.parse_address(f"h:{port:09}").port == port
    assert units.parse_size(f"{port:020}K") == port * 1024
