"""Reading ahead: a thread that reads on faults seldom, one that touches anywhere gets what it touches and no more.

How far ahead is c/read_ahead_test.c, a case a run, also under the sanitizers; the rest is real helpers and sources.
"""

from __future__ import annotations

import contextlib
import queue
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pcshare
from core_support import WAIT_S, compile_c
from pcshare.cli.options import READ_AHEAD, parse_read_ahead
from pcshare.coordinator.options import READ_AHEAD as DEFAULT
from pcshare.errors import UsageError
from pcshare.nbd.wire import Command
from pcshare.protocol import AdminOp
from pcshare.trace import read_trace
from support import wait_until
from support_nbd import Handshake, Peer, Request, ScriptedServer, nbdkit, serve_reads
from support_serving import HUGE_PAGE, LAZY, PAGE, HelperProcess, Serving, make_file, page_of, serving

SANITIZERS = {"plain": None, "asan": "address,undefined", "tsan": "thread"}
CASES = (
    "two_faults_in_a_row_open_a_stream",
    "window_doubles_up_to_the_most",
    "fault_elsewhere_brings_nothing",
    "fault_before_the_stream_brings_nothing",
    "every_second_page_is_no_stream",
    "same_fault_again_changes_nothing",
    "next_window_is_due_in_the_middle_of_the_last",
    "what_others_brought_is_passed_over",
    "two_arrays_walked_in_turns_are_two_streams",
    "threads_are_told_apart",
    "thread_that_faults_anywhere_displaces_no_other",
    "thread_that_also_faults_anywhere_keeps_its_stream",
    "many_threads_that_fault_anywhere_displace_none_that_reads_on",
    "threads_that_ended_make_room",
    "one_page_at_a_time_where_pages_are_large",
    "threads_at_the_same_time_get_what_each_would_alone",
)
N_PAGES = 1000
LENGTH = N_PAGES * PAGE - 1234
FEW = N_PAGES // 8  # faults of a scan: far more than it takes, far fewer than there are pages
AROUND = 16  # pages: what the server below reads at a time
EIO = 5


@pytest.fixture(scope="module", params=sorted(SANITIZERS))
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("c") / f"read_ahead_test_{request.param}"
    return compile_c(target, "read_ahead_test.c", ["read_ahead.c"], SANITIZERS[request.param])


@pytest.mark.parametrize("case", CASES)
def test_read_ahead(program: Path, case: str) -> None:
    done = subprocess.run(
        ["setarch", "-R", str(program), case], capture_output=True, text=True, timeout=WAIT_S * 2, check=False
    )
    assert done.returncode == 0, done.stderr


def attached(served: Serving, *, mode: str = "ro") -> HelperProcess:
    helper = served.helper()
    helper.do(f"b = attach(mode={mode!r})")
    return helper


def touching(pages: str, length: int = PAGE) -> str:
    """Code that reads the pages of a range or list in one thread, in order; its value is their bytes."""
    return f"b''.join(read(b, page * {PAGE}, min({length}, len(b) - page * {PAGE})) for page in {pages})"


def check_scanned(served: Serving, content: bytes, read: bytes) -> None:
    """P1; and each page has come once."""
    assert read == content
    served.wait_for_counts(received_pages=N_PAGES, foreign_pages=0)
    wait_until(lambda: served.block().demand_pages + served.block().stream_pages == N_PAGES, "all to be counted")


# ---- sources that have their bytes at hand ----


def test_scan_faults_far_less_often_than_there_are_pages(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    with serving(f"data={data_file}", stream_mode=LAZY) as served:
        helper = attached(served)
        check_scanned(served, content, helper.do(touching(f"range({N_PAGES})")))
        assert served.status().faults <= FEW
        assert served.block().stream_pages >= N_PAGES - FEW


def test_without_reading_ahead_each_page_is_a_fault(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    with serving(f"data={data_file}", stream_mode=LAZY, read_ahead=0) as served:
        helper = attached(served)
        check_scanned(served, content, helper.do(touching(f"range({N_PAGES})")))
        served.wait_for_counts(demand_pages=N_PAGES, stream_pages=0)
        assert served.status().faults >= N_PAGES


def test_touches_anywhere_bring_what_is_touched_and_no_more(
    runtime_dir: Path, data_file: Path, content: bytes, rng: random.Random
) -> None:
    pages = rng.sample(range(0, N_PAGES, 3), 200)
    with serving(f"data={data_file}", stream_mode=LAZY) as served:
        helper = attached(served)
        assert helper.do(touching(repr(pages))) == b"".join(content[page * PAGE : (page + 1) * PAGE] for page in pages)
        assert (served.block().received_pages, served.block().stream_pages) == (len(pages), 0)


def test_records_across_two_pages_bring_nothing_else(runtime_dir: Path, data_file: Path, rng: random.Random) -> None:
    first = rng.sample(range(0, N_PAGES - 4, 4), 100)
    with serving(f"data={data_file}", stream_mode=LAZY) as served:
        helper = attached(served)
        helper.do(touching(repr(first), 2 * PAGE))
        assert (served.block().received_pages, served.block().stream_pages) == (2 * len(first), 0)


def test_two_arrays_walked_in_turns_by_one_thread_are_both_read_ahead(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    half = N_PAGES // 2
    turns = [page for pair in zip(range(half), range(half, N_PAGES), strict=True) for page in pair]
    with serving(f"data={data_file}", stream_mode=LAZY) as served:
        helper = attached(served)
        read = helper.do(touching(repr(turns)))
        assert read == b"".join(content[page * PAGE : (page + 1) * PAGE] for page in turns)
        assert served.status().faults <= FEW


def test_what_a_helper_writes_while_it_is_read_ahead_stays(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """P2: a page that was read from the source before the helper wrote it is not placed after."""
    with serving(f"data={data_file}", stream_mode=LAZY, writable=["data"]) as served:
        writer, reader = attached(served, mode="rw"), attached(served)
        writer.do(f"for page in range({N_PAGES}): write(b, page * {PAGE} + 8, b'written!')")
        expected = bytearray(content)
        for page in range(N_PAGES):
            expected[page * PAGE + 8 : page * PAGE + 16] = b"written!"
        assert reader.do("bytes(b)") == bytes(expected)
        assert served.status().faults <= 2 * FEW
        assert served.block().foreign_pages == 0


def test_removed_pages_are_not_brought_again(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    with serving(f"data={data_file}", stream_mode=LAZY, writable=["data"]) as served:
        helper = attached(served, mode="rw")
        helper.do(
            "import ctypes\n"
            "addr = int(ffi.cast('uintptr_t', ffi.from_buffer(b)))\n"
            f"assert ctypes.CDLL(None).madvise(ctypes.c_void_p(addr + 5 * {PAGE}), {4 * PAGE}, 9) == 0  # MADV_REMOVE"
        )
        read = helper.do(touching("range(40)"))
        assert read == content[: 5 * PAGE] + bytes(4 * PAGE) + content[9 * PAGE : 40 * PAGE]


def test_holes_are_not_filled(runtime_dir: Path, tmp_path: Path, rng: random.Random) -> None:
    path = make_file(tmp_path, rng, 10 * PAGE)
    with path.open("r+b") as file:
        file.seek(100 * PAGE)
        file.write(rng.randbytes(30 * PAGE))
    content = path.read_bytes()
    with serving(f"data={path}", stream_mode=LAZY) as served:
        helper = attached(served)
        assert helper.do(touching("range(8)")) == content[: 8 * PAGE]
        served.wait_for_counts(received_pages=10)  # 8 and 9 lie ahead, and then a hole
        assert helper.do(touching("range(8, 130)")) == content[8 * PAGE :]
        assert served.block().foreign_pages == 0


def test_strict_scan_is_read_ahead_too(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """Faults on received pages, where a strict helper is given pages, are no misses."""
    with serving(f"data={data_file}", stream_mode=LAZY, strict=True) as served:
        helper = attached(served)
        check_scanned(served, content, helper.do(touching(f"range({N_PAGES})")))
        assert served.block().demand_pages <= FEW


def test_huge_pages_are_read_ahead_one_at_a_time(
    runtime_dir: Path, tmp_path: Path, rng: random.Random, huge_pages: Callable[[int], None]
) -> None:
    huge_pages(6)
    path = make_file(tmp_path, rng, 6 * HUGE_PAGE)
    content = path.read_bytes()
    with serving(f"data={path}", stream_mode=LAZY, page_size=HUGE_PAGE) as served:
        helper = attached(served)
        read = helper.do(f"b''.join(read(b, page * {HUGE_PAGE}, 16) for page in range(3))")
        assert read == b"".join(content[page * HUGE_PAGE : page * HUGE_PAGE + 16] for page in range(3))
        wait_until(lambda: served.block().stream_pages == 1, "the page that is read ahead")
        assert helper.do("bytes(b)") == content


def test_threads_that_scan_beside_one_that_touches_anywhere_read_the_right_bytes(
    runtime_dir: Path, tmp_path: Path, rng: random.Random
) -> None:
    """P1, with several fault threads that bring the windows of one helper at once."""
    n_pages, n_threads = 8000, 4
    path = make_file(tmp_path, rng, n_pages * PAGE)
    content, part = path.read_bytes(), n_pages // n_threads
    pages = rng.sample(range(n_pages), 1000)
    with serving(f"data={path}", stream_mode=LAZY, fault_threads=2) as served:
        scanner, toucher = attached(served), attached(served)
        parts = [scanner.start(touching(f"range({i * part}, {(i + 1) * part})")) for i in range(n_threads)]
        touched = toucher.start(touching(repr(pages)))
        assert b"".join(one.result() for one in parts) == content
        assert touched.result() == b"".join(page_of(content, page) for page in pages)
        served.wait_for_counts(received_pages=n_pages, foreign_pages=0)
        assert served.status().faults <= n_pages // 8 + 2 * len(pages)


# ---- sources that must be asked ----


def test_scan_of_a_slow_file_asks_for_few_pages_alone(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    with serving(f"data={data_file}#delay=5ms", stream_mode=LAZY) as served:
        helper = attached(served)
        check_scanned(served, content, helper.do(touching(f"range({N_PAGES})")))
        assert served.block().demand_pages <= N_PAGES // 4


def test_scan_over_nbd_asks_for_few_pages_alone(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    arguments = ["--filter=delay", "file", data_file, "rdelay=5ms"]
    with (
        nbdkit(runtime_dir, *arguments, tcp=True) as server,
        serving(f"data={server.uri()}", stream_mode=LAZY) as served,
    ):
        helper = attached(served)
        check_scanned(served, content, helper.do(touching(f"range({N_PAGES})")))
        assert served.block().demand_pages <= N_PAGES // 4


class BlockServer:
    """An NBD server that says it reads AROUND pages at a time. refuses: which reads (offset, length) are errors."""

    def __init__(self, content: bytes, preferred: int, refuses: Callable[[int, int], bool]) -> None:
        self._content, self._refuses = content, refuses
        self._handshake = Handshake(size=len(content), block_sizes=(1, preferred, 32 << 20))
        self.server = ScriptedServer(self._script)
        host, port = self.server.listen()
        self.uri = f"nbd://{host}:{port}/"

    def _script(self, peer: Peer) -> None:
        self._handshake.run(peer)
        serve_reads(peer, self._content, self._answer)

    def _answer(self, peer: Peer, request: Request) -> bool:
        refused = request.command == Command.READ and self._refuses(request.offset, request.length)
        if refused:
            peer.answer_error(request, EIO)
        return refused

    def reads(self) -> list[tuple[int, int]]:
        """First page and pages of each read since the last call."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self.server.seen.get_nowait())
        return [(one.offset // PAGE, -(-one.length // PAGE)) for one in found if one.command == Command.READ]


@contextlib.contextmanager
def block_server(
    content: bytes, preferred: int = PAGE, refuses: Callable[[int, int], bool] = lambda *_: False
) -> Iterator[BlockServer]:
    made = BlockServer(content, preferred, refuses)
    try:
        yield made
    finally:
        made.server.close()


def test_server_that_reads_blocks_is_asked_for_the_block_at_once(
    runtime_dir: Path, content: bytes, rng: random.Random
) -> None:
    blocks = rng.sample(range(N_PAGES // AROUND), 20)
    pages = [block * AROUND + rng.randrange(AROUND) for block in blocks]
    with (
        block_server(content, AROUND * PAGE) as server,
        serving(f"data={server.uri}", stream_mode=LAZY) as served,
    ):
        helper = attached(served)
        server.reads()
        assert helper.do(touching(repr(pages))) == b"".join(content[page * PAGE : (page + 1) * PAGE] for page in pages)
        assert server.reads() == [(block * AROUND, AROUND) for block in blocks]
        served.wait_for_counts(demand_pages=len(blocks), stream_pages=len(blocks) * (AROUND - 1))
        assert helper.do(touching(repr(sorted(blocks)), 1)) is not None  # the rest of what was asked for is whole
        assert served.block().foreign_pages == 0


def test_only_what_is_missing_of_a_block_is_asked_for(runtime_dir: Path, content: bytes) -> None:
    with (
        block_server(content, AROUND * PAGE) as server,
        serving(f"data={server.uri}", stream_mode=LAZY) as served,
    ):
        helper = attached(served)
        helper.do(f"b.ensure(slice({20 * PAGE}, {21 * PAGE})); b.ensure(slice({28 * PAGE}, {29 * PAGE}))")
        server.reads()
        assert helper.do(touching("[24]")) == page_of(content, 24)
        assert server.reads() == [(21, 7)]
        assert helper.do(touching(f"[{N_PAGES - 1}]")) == content[(N_PAGES - 1) * PAGE :]
        assert server.reads() == [((N_PAGES - 1) // AROUND * AROUND, 1 + (N_PAGES - 1) % AROUND)]


def test_without_reading_ahead_a_page_is_asked_for_alone(runtime_dir: Path, content: bytes) -> None:
    with (
        block_server(content, AROUND * PAGE) as server,
        serving(f"data={server.uri}", stream_mode=LAZY, read_ahead=0) as served,
    ):
        helper = attached(served)
        server.reads()
        assert helper.do(touching("[24]")) == page_of(content, 24)
        assert server.reads() == [(24, 1)]


def test_large_blocks_are_asked_for_in_parts(runtime_dir: Path, content: bytes) -> None:
    with (
        block_server(content, 2 << 20) as server,
        serving(f"data={server.uri}", stream_mode=LAZY) as served,
    ):
        helper = attached(served)
        server.reads()
        assert helper.do(touching("[100]")) == page_of(content, 100)
        assert server.reads() == [(64, 64)]


def test_nbdkit_is_asked_for_its_blocks(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    arguments = ["--filter=blocksize-policy", "file", data_file, "blocksize-preferred=64K"]
    with (
        nbdkit(runtime_dir, *arguments, tcp=True) as server,
        serving(f"data={server.uri()}", stream_mode=LAZY) as served,
    ):
        helper = attached(served)
        assert helper.do(touching("[24]")) == page_of(content, 24)
        served.wait_for_counts(demand_pages=1, stream_pages=AROUND - 1)


# ---- what fails ----

BAD = 200  # a page that the server cannot read


def covers_bad(offset: int, length: int) -> bool:
    return offset <= BAD * PAGE < offset + length


@pytest.mark.parametrize("poison", [False, True], ids=["pause", "poison"])
@pytest.mark.parametrize("around", [1, AROUND], ids=["pages", "blocks"])
def test_error_at_a_page_that_nobody_touched_is_nobodys_error(
    runtime_dir: Path, content: bytes, poison: bool, around: int
) -> None:
    """P3: what is brought ahead or around and fails is forgotten; who touches it all the same is told."""
    with (
        block_server(content, around * PAGE, covers_bad) as server,
        serving(f"data={server.uri}", stream_mode=LAZY, poison=poison) as served,
    ):
        helper = attached(served)
        assert helper.do(touching(f"range({BAD})")) == content[: BAD * PAGE]
        assert helper.do(touching(f"range({BAD + 1}, {BAD + 20})")) == content[(BAD + 1) * PAGE : (BAD + 20) * PAGE]
        wait_until(
            lambda: any(covers_bad(page * PAGE, n * PAGE) for page, n in server.reads()),
            "the page ahead to be asked for",
        )
        assert (served.block().state, served.block().lost_pages) == ("RUNNING", 0)
        pending = helper.start(f"read(b, {BAD * PAGE})")
        if poison:
            assert -helper.wait_for_end() == signal.SIGBUS
            assert served.block().lost_pages == 1
        else:
            assert f"offset {BAD * PAGE}" in served.wait_for_state("PAUSED").reason
            assert not pending.is_done()


def test_range_that_waits_for_what_failed_ahead_asks_itself(runtime_dir: Path, content: bytes, tmp_path: Path) -> None:
    """P3: the range had nothing to ask for, since all of it was on its way."""
    asked, go_on, trace = threading.Event(), threading.Event(), tmp_path / "trace"

    def refuses(offset: int, length: int) -> bool:
        if offset != 3 * PAGE or length != 4 * PAGE or go_on.is_set():
            return False
        asked.set()
        assert go_on.wait(WAIT_S)
        return True

    with (
        block_server(content, PAGE, refuses) as server,
        serving(f"data={server.uri}", stream_mode=LAZY, trace=str(trace)) as served,
    ):
        helper = attached(served)
        helper.do(touching("range(3)"))
        assert asked.wait(WAIT_S)
        pending = helper.start(f"b.ensure(slice({3 * PAGE}, {6 * PAGE}))")
        wait_until(
            lambda: any(one.event == "range_request" and one.detail == 3 for one in read_trace(str(trace))),
            "the range to be asked for",
        )
        go_on.set()
        pending.result()
        assert helper.do(touching("range(7)")) == content[: 7 * PAGE]
        assert served.block().state == "RUNNING"


def test_block_that_was_paused_for_a_page_ahead_of_others_is_resumed(runtime_dir: Path, content: bytes) -> None:
    """The page itself was touched, at last; a resume asks for it, and for what lies around it."""
    works = threading.Event()
    with (
        block_server(content, AROUND * PAGE, lambda *span: covers_bad(*span) and not works.is_set()) as server,
        serving(f"data={server.uri}", stream_mode=LAZY) as served,
    ):
        helper = attached(served)
        pending = helper.start(f"read(b, {BAD * PAGE})")
        served.wait_for_state("PAUSED")
        works.set()
        served.order(AdminOp.RESUME)
        assert pending.result() == content[BAD * PAGE : BAD * PAGE + 1]
        helper.do("b.ensure()")
        assert helper.do("bytes(b)") == content


# ---- the option ----


@pytest.mark.parametrize(
    ("text", "length"), [("off", 0), ("0", 0), ("4K", 4096), ("1M", 1 << 20), ("64M", 64 << 20), ("65536", 65536)]
)
def test_option_says_how_far(text: str, length: int) -> None:
    assert parse_read_ahead(text) == length
    assert READ_AHEAD.convert(text, None, None) == length


@pytest.mark.parametrize("text", ["", "1", "4095", "65M", "-1", "on", "1M/s"])
def test_option_refuses_what_is_no_length(text: str) -> None:
    with pytest.raises(UsageError, match="not a length to read ahead") as caught:
        parse_read_ahead(text)
    assert "4K to 64M" in str(caught.value.hint)


def test_command_line_and_options_have_one_default() -> None:
    from pcshare.cli.coordinator import command

    default = next(param.default for param in command.params if param.name == "read_ahead")
    assert parse_read_ahead(str(default)) == DEFAULT


@pytest.mark.parametrize(("read_ahead", "ahead"), [("off", False), (0, False), ("256K", True), (1 << 20, True)])
def test_launcher_passes_it_on(runtime_dir: Path, data_file: Path, read_ahead: str | int, ahead: bool) -> None:
    with (
        pcshare.Coordinator(blocks={"data": str(data_file)}, stream="lazy", read_ahead=read_ahead) as coordinator,
        HelperProcess(coordinator.socket or "") as helper,
    ):
        helper.do("b = attach()")
        helper.do(touching("range(100)"))
        assert (coordinator.status().blocks[0].stream_pages > 0) == ahead
