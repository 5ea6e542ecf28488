"""P5: a coordinator that is killed is started again and goes on where it was. Nobody reads a wrong byte, no write is
lost, nobody waits for ever, and what was received is not asked for again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import pcshare
from pcshare import trace
from pcshare.errors import CoordinatorGone, SourceLost
from pcshare.protocol import AdminOp
from pcshare.status import StatusReport, read_status
from support import suspend, suspended, wait_until
from support_coordinator import Helper as Program
from support_coordinator import coordinator, die_with_parent
from support_nbd import RealServer, nbdkit
from support_serving import HUGE_PAGE, PAGE, WAIT_S, HelperProcess, make_file
from support_takeover import Restarting, restarting

N_PAGES = 300
LENGTH = N_PAGES * PAGE - 11
MIB = 1 << 20
LAZY = ["--stream=lazy"]
SLOW = "#delay=800ms"  # a page comes so late that its coordinator dies over it
PCSHARE = [sys.executable, "-m", "pcshare"]
COMMAND_TIMEOUT_S = 30.0
CHECK_BYTES = 1  # what is read of a server to see whether it works


@pytest.fixture
def server_folder() -> Iterator[Path]:
    """A short path, for sockets of servers, which leave them behind."""
    with tempfile.TemporaryDirectory(prefix="pcs-", dir="/tmp") as folder:
        yield Path(folder)


def page_at(content: bytes, page: int) -> bytes:
    return content[page * PAGE : (page + 1) * PAGE]


def run(*arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PCSHARE, *arguments], capture_output=True, text=True, timeout=timeout_s, preexec_fn=die_with_parent
    )


# ---- who waits ----


@pytest.mark.parametrize("times", [1, 3])
def test_whoever_waits_when_it_dies_gets_the_right_bytes(
    runtime_dir: Path, data_file: Path, content: bytes, times: int
) -> None:
    """P5, T9: faults that were read are not forgotten; nor are ranges that were asked for."""
    with restarting(f"data={data_file}{SLOW}", options=LAZY) as served:
        helpers = [served.attached() for _ in range(3)]
        cow = served.attached("mode='cow'")
        touches = [helper.start(f"read(b, {7 * number * PAGE}, {PAGE})") for number, helper in enumerate(helpers)]
        in_python = helpers[0].start(f"b[{50 * PAGE}]")
        ensured = helpers[1].start(f"b.ensure(slice({60 * PAGE}, {64 * PAGE})); bytes(b[{60 * PAGE}:{64 * PAGE}])")
        written = cow.start(f"write(b, {70 * PAGE + 5}, b'mine'); read(b, {70 * PAGE}, {PAGE})")
        served.wait_for_faults(5)
        for _ in range(times):
            served.restart()
        for number, touch in enumerate(touches):
            assert touch.result() == page_at(content, 7 * number)
        assert in_python.result() == content[50 * PAGE]
        assert ensured.result() == content[60 * PAGE : 64 * PAGE]
        mine = bytearray(page_at(content, 70))
        mine[5:9] = b"mine"
        assert written.result() == mine
        served.wait_for_waiting(0)
        assert served.restarts == times
        assert served.block().foreign_pages == 0
        assert served.block().received_pages == 3 + 1 + 4 + 1


def test_fault_that_nobody_had_read_is_answered(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """P5: it came when the coordinator was stopped, or when there was none."""
    with restarting(f"data={data_file}", options=LAZY) as served:
        first, second = served.attached(), served.attached()
        suspend(served.pid)
        unread = first.start(f"read(b, 0, {PAGE})")
        with served.away():
            nobody = second.start(f"read(b, {PAGE}, {PAGE})")
            assert not unread.is_done()
        assert unread.result() == page_at(content, 0)
        assert nobody.result() == page_at(content, 1)


def test_c_program_goes_on(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    with restarting(f"data={data_file}#delay=2ms", options=[*LAZY, "--read-ahead=off"]) as served:
        programs = [
            Program(served.served, "touch", "--pattern=scan"),
            *(Program(served.served, "touch", "--pattern=random", "--count=400", f"--seed={n}") for n in range(2)),
            Program(served.served, "forking_pool", "--workers=3"),
        ]
        wait_until(lambda: served.status().faults > 40, "the programs to be under way")
        for _ in range(3):
            received = served.block().received_pages
            served.restart()
            assert served.block().received_pages >= received
        reports = [program.finish() for program in programs]
        assert [report.returncode for report in reports] == [0] * 4, reports
        assert served.attached().do("bytes(b)") == content
        assert served.block().foreign_pages == 0
        alone = pcshare_run_scan(data_file)
        assert reports[0].report["result"] == alone


def pcshare_run_scan(path: Path) -> object:
    """What the scan of these bytes says where nobody is killed."""
    with coordinator(f"data={path}") as served:
        return Program(served, "touch", "--pattern=scan").finish().report["result"]


def test_writes_are_kept(runtime_dir: Path, data_file: Path, content: bytes, rng: random.Random) -> None:
    """P2: those before, those while no coordinator is there, those after; also into pages that never came before."""
    expected = bytearray(content)
    with restarting(f"data={data_file}#delay=1ms", options=["--writable=data", *LAZY]) as served:
        writer, reader = served.attached(), served.attached()

        def write(helper: HelperProcess) -> None:
            for _ in range(30):
                offset, piece = rng.randrange(LENGTH - 8), rng.randbytes(8)
                helper.do(f"write(b, {offset}, {piece!r})")
                expected[offset : offset + 8] = piece

        write(writer)
        served.restart()
        write(writer)
        with served.away():
            for page in range(N_PAGES):  # those that are here take writes at any time
                if writer.do(f"b.is_received(slice({page * PAGE}, {page * PAGE + 1}))"):
                    writer.do(f"write(b, {page * PAGE + 100}, b'nobody is there')")
                    expected[page * PAGE + 100 : page * PAGE + 115] = b"nobody is there"
            waits = reader.start(f"write(b, {LENGTH - 4}, b'last')")
        waits.result()
        expected[-4:] = b"last"
        served.order(AdminOp.STREAM_EAGER)
        served.restart()
        served.wait_for_state("END")
        for helper in (writer, reader, served.attached()):
            assert helper.do("bytes(b)") == expected
        assert served.block().foreign_pages == 0


@pytest.mark.parametrize("writable", [False, True])
def test_page_that_is_here_and_was_not_noted(
    runtime_dir: Path, data_file: Path, content: bytes, writable: bool
) -> None:
    """P1, P2: no alarm, the right bytes, and no write lost."""
    options = [*LAZY, "--writable=data"] if writable else LAZY
    with restarting(f"data={data_file}", options=options) as served:
        helper = served.attached()
        helper.do(f"b.ensure(slice(0, {20 * PAGE}))")
        expected = bytearray(content)
        if writable:
            helper.do(f"write(b, {7 * PAGE}, b'written')")
            expected[7 * PAGE : 7 * PAGE + 7] = b"written"
        with served.away():
            served.unnote([5, 6, 7, 8, 19])
        assert served.block().received_pages == 15
        assert helper.do(f"read(b, {5 * PAGE}, {PAGE})") == page_at(content, 5)
        assert served.attached().do("bytes(b)") == expected
        helper.do("b.ensure()")
        served.wait_for_state("END")
        assert helper.do("bytes(b)") == expected
        assert served.block().foreign_pages == 0


def test_page_that_somebody_planted_meanwhile_is_repaired(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """P1: in a read-only block, when its turn to be placed comes."""
    with restarting(f"data={data_file}", options=LAZY) as served:
        helper = served.attached()
        planter = served.helper()
        planter.do("m = hand_over('welcome').unregistered()")
        with served.away():
            assert planter.do("[m[page * 4096] for page in (5, 6, 100)]") == [0, 0, 0]
        served.order(AdminOp.STREAM_EAGER)
        served.wait_for_state("END")
        assert helper.do("bytes(b)") == content


# ---- helpers that come, go, stop and die meanwhile ----


def test_helper_that_leaves_or_dies_while_nobody_is_there_is_let_go(runtime_dir: Path, data_file: Path) -> None:
    """P4, P7: and what it held goes too."""
    with restarting(f"data={data_file}{SLOW}", options=LAZY) as served:
        served.restart()  # what a coordinator holds is compared with what another one does that took over
        before = served.held()
        leaver, victim, execs, stays = (served.attached() for _ in range(4))
        waits = stays.start(f"read(b, 0, {PAGE})")
        victim.start(f"read(b, 9 * {PAGE})")
        served.wait_for_faults(2)
        with served.away():
            leaver.do("b.close()")
            victim.kill()
            execs.start("os.execv('/bin/sleep', ['sleep', '60'])")
            wait_until(lambda: psutil.Process(execs.pid).name() == "sleep", "the exec")
        waits.result()
        wait_until(
            lambda: [helper.pid for helper in served.status().helpers] == [stays.pid], "the others to be let go", WAIT_S
        )
        stays.do("b.close()")
        served.wait_until_alone(before)
        execs.kill()


def test_helper_that_comes_while_nobody_is_there_is_served_by_the_next(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    with restarting(f"data={data_file}", options=LAZY) as served:
        helpers = [served.helper() for _ in range(3)]
        with served.away():
            attaching = [helper.start("b = attach(); bytes(b)") for helper in helpers]
            time.sleep(0.05)  # some of them may come before it is there, some after: both are right
        for pending in attaching:
            assert pending.result() == content


@pytest.mark.parametrize("step", ["welcome", "register"])
def test_hand_over_that_was_cut_short_harms_nobody(
    runtime_dir: Path, data_file: Path, content: bytes, step: str
) -> None:
    """P4: who had not attached yet is hung up on, and tries again."""
    with restarting(f"data={data_file}", options=LAZY) as served:
        helper, other = served.helper(), served.attached()
        helper.do(f"h = hand_over({step!r})")
        served.restart()
        with pytest.raises((ConnectionError, EOFError, pcshare.errors.PcshareError)):
            helper.do("h.connection.receive(20.0); None")
        assert other.do("bytes(b)") == content
        assert helper.do("b = attach(); bytes(b)") == content


def test_stopped_helper_goes_on(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    with restarting(f"data={data_file}{SLOW}", options=LAZY) as served:
        helper, other = served.attached(), served.attached()
        touch = helper.start(f"read(b, 0, {PAGE})")
        ensured = helper.start(f"b.ensure(slice({2 * PAGE}, {3 * PAGE}))")
        served.wait_for_faults(1)
        with suspended(helper.pid):
            served.restart()
            assert other.do(f"read(b, {5 * PAGE}, {PAGE})") == page_at(content, 5)
            served.restart()
        assert touch.result() == page_at(content, 0)
        ensured.result()
        assert helper.do(f"read(b, {2 * PAGE}, {PAGE})") == page_at(content, 2)


def test_forked_child_goes_on(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """Of a fork before, and of one while nobody is there."""
    with restarting(f"data={data_file}{SLOW}", options=LAZY) as served:
        helper = served.attached()
        helper.do(
            "def in_child(page):\n"
            "    r, w = os.pipe()\n"
            "    if os.fork() == 0:\n"
            "        os.write(w, read(b, page * 4096, 4096)); os._exit(0)\n"
            "    os.close(w)\n"
            "    with open(r, 'rb') as f: found = f.read()\n"
            "    os.wait()\n"
            "    return found"
        )
        before = helper.start("in_child(3)")
        served.wait_for_faults(1)
        with served.away():
            meanwhile = helper.start("in_child(4)")
        assert before.result() == page_at(content, 3)
        assert meanwhile.result() == page_at(content, 4)
        assert helper.do("in_child(5)") == page_at(content, 5)


def test_more_ranges_than_are_under_way_at_once(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """A helper's threads ask for 150; 64 are with the coordinator when it dies, and no one is forgotten."""
    with restarting(f"data={data_file}#delay=300ms", options=LAZY) as served:
        helper = served.attached()
        helper.do("from concurrent.futures import ThreadPoolExecutor; pool = ThreadPoolExecutor(150)")
        pending = helper.start(
            f"list(pool.map(lambda page: b.ensure(slice(page * {PAGE}, page * {PAGE} + 1)), range(0, 300, 2)))"
        )
        wait_until(lambda: served.block().demand_pages + served.block().stream_pages > 3, "the first to come", WAIT_S)
        for _ in range(2):
            served.restart()
        pending.result()
        assert all(helper.do(f"read(b, {page * PAGE}, {PAGE})") == page_at(content, page) for page in range(0, 300, 2))
        wait_until(lambda: served.block().received_pages == 150, "the last ones to be counted")
        helper.do("pool.shutdown()")


def test_ranges_that_nobody_has_read_are_not_held_against_who_asked(
    runtime_dir: Path, data_file: Path, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P4, P5: several coordinators die one after the other, each when it has said that it serves and before it has read
    anything. The helper asks each of them for all again."""
    death = tmp_path / "death"
    monkeypatch.setenv(trace.DIE_VARIABLE, str(death))
    with restarting(f"data={data_file}#delay=300ms", options=LAZY) as served:
        helper = served.attached()
        helper.do("from concurrent.futures import ThreadPoolExecutor; pool = ThreadPoolExecutor(150)")
        pending = helper.start(
            f"list(pool.map(lambda page: b.ensure(slice(page * {PAGE}, page * {PAGE} + 1)), range(0, 300, 2)))"
        )
        wait_until(lambda: served.block().received_pages > 0, "the first to come", WAIT_S)
        for _ in range(5):
            trace.write_death(death, "helpers_told", 1)
            served.kill_child()
            wait_until(lambda: not death.exists(), "its death", WAIT_S)
        pending.result()
        assert [one.state for one in served.status().helpers] == ["attached"]
        assert all(helper.do(f"read(b, {page * PAGE}, {PAGE})") == page_at(content, page) for page in range(0, 300, 2))
        helper.do("pool.shutdown()")


def test_cut_off_helper_stays_cut_off(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """P4: and is not told so again and again."""
    with restarting(f"data={data_file}", options=LAZY) as served:
        offender, other = served.helper(), served.attached()
        offender.do("h = hand_over('ack'); h.connection._socket.send(b'nonsense' * 8)")

        def state() -> str:
            return {helper.pid: helper.state for helper in served.status().helpers}[offender.pid]

        wait_until(lambda: state() == "disabled", "the offender to be cut off")
        for _ in range(2):
            served.restart()
            assert state() == "disabled"
        touch = offender.start("read(h.memory, 0)")
        wait_until(lambda: waits_in_a_fault(offender.pid), "the offender to wait")
        assert other.do(f"read(b, 0, {9 * PAGE})") == content[: 9 * PAGE]
        assert not touch.is_done()
        offender.kill()
        wait_until(
            lambda: [one.pid for one in served.status().helpers] == [other.pid], "an end of the offender", WAIT_S
        )


def waits_in_a_fault(pid: int) -> bool:
    return any("userfault" in path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/wchan"))


# ---- blocks ----


def test_every_kind_of_block_goes_on(runtime_dir: Path, tmp_path: Path, rng: random.Random) -> None:
    """Holes, an array, an empty block, one that is complete."""
    holed = tmp_path / "holed.bin"
    with holed.open("wb") as file:
        file.truncate(64 * PAGE + 9)
        for page in (3, 30, 31, 64):
            os.pwrite(file.fileno(), rng.randbytes(9), page * PAGE)
    array = np.arange(70_000, dtype=np.int32).reshape(700, 100)
    np.save(tmp_path / "array.npy", array)
    whole = make_file(tmp_path, rng, 5 * PAGE, "whole.bin")
    sources = [f"holed={holed}", f"array={tmp_path / 'array.npy'}", "empty=zero:40960", f"whole={whole}"]
    with restarting(*sources, options=LAZY) as served:
        helper = served.helper()
        helper.do("h, a, e, w = (attach(name) for name in ('holed', 'array', 'empty', 'whole'))")
        helper.do("w.ensure(); read(h, 5 * 4096); read(h, 30 * 4096); write(e, 5000, b'five')")
        served.wait_for_state("END", "whole")
        before = {block.idstr: block for block in served.status().blocks}
        for _ in range(2):
            served.restart()
            after = {block.idstr: block for block in served.status().blocks}
            for idstr, block in before.items():
                now = after[idstr]
                assert (now.received_pages, now.hole_pages, now.fraction, now.used_length, now.writable) == (
                    block.received_pages,
                    block.hole_pages,
                    block.fraction,
                    block.used_length,
                    block.writable,
                ), idstr
        late = served.helper()
        late.do("h, a, e, w = (attach(name) for name in ('holed', 'array', 'empty', 'whole'))")
        for one in (helper, late):
            assert one.do("bytes(h)") == holed.read_bytes()
            assert one.do("(a.asarray().shape, str(a.asarray().dtype), int(a.asarray().sum()))") == (
                (700, 100),
                "int32",
                int(array.sum()),
            )
            assert one.do("bytes(w)") == whole.read_bytes()
            assert one.do("bytes(e)") == bytes(5000) + b"five" + bytes(40960 - 5004)
        helper.do("write(e, 0, b'new')")
        assert late.do("read(e, 0, 3)") == b"new"
        assert all(block.foreign_pages == 0 for block in served.status().blocks)


def test_huge_pages_go_on(
    runtime_dir: Path, tmp_path: Path, rng: random.Random, huge_pages: Callable[[int], None]
) -> None:
    huge_pages(8)
    path = make_file(tmp_path, rng, 3 * HUGE_PAGE + 77)
    content = path.read_bytes()
    with restarting(f"data={path}{SLOW}", options=[*LAZY, "--page-size=2M"]) as served:
        helper = served.attached()
        helper.do("read(b, 0)")
        touch = helper.start(f"read(b, {2 * HUGE_PAGE + 5}, 100)")
        served.wait_for_faults(2)
        with served.away():
            served.unnote([0])
        assert touch.result() == content[2 * HUGE_PAGE + 5 : 2 * HUGE_PAGE + 105]
        served.order(AdminOp.STREAM_EAGER)
        served.wait_for_state("END")
        served.restart()
        assert helper.do("bytes(b)") == content
        assert served.attached().do("bytes(b)") == content
        assert served.block().foreign_pages == 0


def test_all_complete_and_killed(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """Helpers have plain memory by then, and whoever comes gets the same."""
    with restarting(f"data={data_file}") as served:
        helper = served.attached()
        helper.do("b.wait()")
        served.wait_for_state("END")
        for _ in range(2):
            served.restart()
            assert served.block().state == "END"
            assert helper.do("bytes(b)") == content
            assert served.attached().do("(bytes(b), b.state)") == (content, "complete")
        served.wait_for_state("END")
        assert data_file not in [Path(file.path) for file in psutil.Process(served.pid).open_files()]


def test_helper_that_did_not_hear_of_the_end_is_told(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """It was killed when the last page was in, before anybody knew."""
    with restarting(f"data={data_file}#rate=2M") as served:
        helper = served.attached()
        with suspended(helper.pid):
            served.wait_for_state("END")
            served.restart()
        assert helper.do("bytes(b)") == content
        wait_until(lambda: helper.do("b.state") == "complete", "the helper to hear of it")
        wait_until(lambda: not served.status().helpers, "the helper to be let go", WAIT_S)


# ---- the stream ----


def test_what_an_operator_has_steered_goes_on(runtime_dir: Path, data_file: Path) -> None:
    with restarting(f"data={data_file}#rate=1K") as served:
        served.order(AdminOp.STREAM_RATE, 3 * MIB)
        served.restart()
        assert (served.status().stream, served.status().stream_rate) == ("rate", 3 * MIB)
        served.order(AdminOp.STREAM_PAUSE)
        served.restart()
        assert served.status().stream == "paused"


def test_stream_goes_on_although_the_second_one_dies_in_its_takeover(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """P5: what it had not come to is not lost with it."""
    with restarting(f"data={data_file}#delay=1ms", options=[]) as served:
        helper = served.attached()
        for tenth in range(40):
            before = served.kill()
            time.sleep(tenth * 0.01)  # somewhere in the start of the next one, or just after it
            served.kill_child()
            if tenth % 4 == 3:
                served.wait_for_restart(before)
        wait_until(lambda: served.status().alive, "a coordinator", WAIT_S)
        assert served.status().stream == "eager"
        served.wait_for_state("END")
        assert helper.do("bytes(b)") == content
        assert served.block().foreign_pages == 0


def test_full_speed_and_killed_at_random_moments(runtime_dir: Path, tmp_path: Path, rng: random.Random) -> None:
    """P1: pages that were placed and not noted are no foreign ones, and nothing is read wrong."""
    path = make_file(tmp_path, rng, 96 * MIB)
    content = path.read_bytes()
    with restarting(f"data={path}", options=["--stream=60M"]) as served:
        helper, toucher = served.attached(), served.attached()
        toucher.do(f"content = open({str(path)!r}, 'rb').read()")
        touching = toucher.start(
            "import random\n"
            "for _ in range(3000):\n"
            "    at = random.randrange(len(content) - 4096)\n"
            "    assert read(b, at, 4096) == content[at:at + 4096]"
        )
        for _ in range(6):
            time.sleep(rng.uniform(0.0, 0.15))
            served.restart()
        served.order(AdminOp.STREAM_EAGER)
        for _ in range(3):
            if served.block().state != "END":
                served.restart()
                time.sleep(rng.uniform(0.0, 0.02))
        touching.result()
        served.wait_for_state("END")
        assert helper.do(f"bytes(b) == open({str(path)!r}, 'rb').read()")
        assert served.block().foreign_pages == 0
        assert served.block().received_pages == len(content) // PAGE


# ---- sources ----


def test_file_that_has_lost_its_name_is_still_the_source(
    runtime_dir: Path, data_file: Path, content: bytes, rng: random.Random
) -> None:
    """P1: not the other one that has its name by now."""
    with restarting(f"data={data_file}", options=LAZY) as served:
        helper = served.attached()
        data_file.unlink()
        served.restart()
        assert helper.do(f"read(b, 0, {PAGE})") == page_at(content, 0)
        data_file.write_bytes(rng.randbytes(LENGTH))
        served.restart()
        assert helper.do("bytes(b)") == content
        served.wait_for_state("END")
        served.restart()
        assert served.attached().do("bytes(b)") == content


def test_file_of_a_complete_block_may_be_gone_also_if_the_next_one_dies_too(
    runtime_dir: Path, data_file: Path, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P5: what was at its end stays there, wherever the one that takes it over dies."""
    death = tmp_path / "death"
    monkeypatch.setenv(trace.DIE_VARIABLE, str(death))
    with restarting(f"data={data_file}") as served:
        helper = served.attached()
        served.wait_for_state("END")
        data_file.unlink()
        for step in ("blocks_taken", "helpers_taken"):
            trace.write_death(death, step, 1)
            served.restart()
            assert not death.exists(), "nobody died there"
            assert served.block().state == "END"
        assert helper.do("bytes(b)") == content
        assert served.attached().do("bytes(b)") == content


def logged_reads(log: Path) -> list[range]:
    """Offsets that nbdkit was asked for, each with its length."""
    found = re.findall(r"\bRead id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)", log.read_text())
    return [range(int(start, 16), int(start, 16) + int(count, 16)) for start, count in found]


def pages_of(read: range) -> range:
    return range(read.start // PAGE, -(-read.stop // PAGE))


@contextlib.contextmanager
def logging_server(folder: Path, path: Path, *parameters: str) -> Iterator[tuple[RealServer, Path]]:
    log = folder / "reads.log"
    filters = ["--filter=log", *(["--filter=delay"] if parameters else [])]
    with nbdkit(folder, *filters, "file", path, f"logfile={log}", *parameters) as server:
        yield server, log


def test_what_was_received_is_not_asked_for_again(
    runtime_dir: Path, server_folder: Path, tmp_path: Path, rng: random.Random
) -> None:
    """P5, P6: each byte travels once, but for what was on its way at a death."""
    path = make_file(tmp_path, rng, 8 * MIB)
    content = path.read_bytes()
    with (
        logging_server(server_folder, path, "rdelay=5ms") as (server, log),
        restarting(f"data={server.uri()}", options=["--stream=20M"]) as served,
    ):
        helper = served.attached()
        wait_until(lambda: served.block().received_pages > 200, "a part of it", WAIT_S)
        with served.away():
            asked_before = len(logged_reads(log))
            received = [page for page in range(8 * MIB // PAGE) if is_received(helper, page)]
            assert len(received) > 200
        served.order(AdminOp.STREAM_EAGER)
        served.wait_for_state("END")
        reads = [one for one in logged_reads(log)[asked_before:] if len(one) > CHECK_BYTES]
        asked = [page for one in reads for page in pages_of(one)]
        assert not set(asked) & set(received), sorted(set(asked) & set(received))
        assert helper.do("bytes(b)") == content


def is_received(helper: HelperProcess, page: int) -> bool:
    return bool(helper.do(f"b.is_received(slice({page * PAGE}, {page * PAGE + 1}))"))


def test_server_that_is_away_during_the_restart(
    runtime_dir: Path, server_folder: Path, tmp_path: Path, rng: random.Random
) -> None:
    """P3, P6: the block is paused, and goes on when the server is back."""
    path = make_file(tmp_path, rng, 2 * MIB)
    content = path.read_bytes()
    with (
        logging_server(server_folder, path) as (server, _),
        restarting(f"data={server.uri()}", options=LAZY) as served,
    ):
        helper = served.attached()
        assert helper.do(f"read(b, 0, {PAGE})") == page_at(content, 0)
        with served.away():
            server.kill()
        touch = helper.start(f"read(b, {9 * PAGE}, {PAGE})")
        block = served.wait_for_state("PAUSED")
        assert block.reason
        assert served.attached().do(f"read(b, 0, {PAGE})") == page_at(content, 0)
        served.restart()  # once more: who is paused dies too
        served.wait_for_state("PAUSED")
        assert not touch.is_done()
        server.start()
        assert touch.result() == page_at(content, 9)
        served.wait_for_state("RUNNING")
        assert helper.do("bytes(b)") == content


def test_source_and_coordinator_die_together(
    runtime_dir: Path, server_folder: Path, tmp_path: Path, rng: random.Random
) -> None:
    path = make_file(tmp_path, rng, 4 * MIB)
    with (
        logging_server(server_folder, path, "rdelay=10ms") as (server, _),
        restarting(f"data={server.uri()}") as served,
    ):
        helper = served.attached()
        reading = helper.start("bytes(b)")
        for _ in range(3):
            server.kill()
            before = served.kill()
            server.start()
            served.wait_for_restart(before)
        assert reading.result() == path.read_bytes()


def test_command_that_is_the_source_is_started_again(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """exec: as a server that went away; and the old one ends."""
    needs_nbdkit = shutil.which("nbdkit")
    assert needs_nbdkit
    with restarting(f"data=exec:nbdkit -s --exit-with-parent file {data_file}", options=LAZY) as served:
        helper = served.attached()
        assert helper.do(f"read(b, 0, {PAGE})") == page_at(content, 0)
        commands = [one.pid for one in psutil.Process(served.pid).children(recursive=True)]
        assert commands
        served.restart()
        assert helper.do("bytes(b)") == content
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in commands), "an end of the old command", WAIT_S)


def test_paused_block_stays_visibly_paused(runtime_dir: Path, data_file: Path, content: bytes, tmp_path: Path) -> None:
    """P3: until the source does its work again and somebody resumes it."""
    broken = tmp_path / "broken"
    broken.touch()
    with restarting(f"data={data_file}#error=EIO@{broken}", options=LAZY) as served:
        helper = served.attached()
        touch = helper.start(f"read(b, {5 * PAGE}, {PAGE})")
        for _ in range(3):
            block = served.wait_for_state("PAUSED")
            assert "Input/output error" in block.reason
            served.restart()
        served.wait_for_state("PAUSED")
        broken.unlink()
        assert run("resume", served.name).returncode == 0
        assert touch.result() == page_at(content, 5)
        assert served.block().state == "RUNNING"


def test_poison_that_is_left_in_a_helper_is_lifted_when_the_page_arrives(
    runtime_dir: Path, data_file: Path, content: bytes, tmp_path: Path
) -> None:
    """P3, T10: the one who comes after knows of no mark, and lifts what there may be."""
    broken = tmp_path / "broken"
    broken.touch()
    with restarting(f"data={data_file}#error=EIO@{broken}", options=[*LAZY, "--on-source-loss=poison"]) as served:
        marked, victim = served.attached(), served.attached()
        victim.start(f"read(b, {5 * PAGE})")
        assert -victim.wait_for_end() == signal.SIGBUS
        marked.do("fd = os.memfd_create('copy')")
        with pytest.raises(OSError, match="Bad address"):
            marked.do(f"os.write(fd, memoryview(b)[{5 * PAGE}:{6 * PAGE}])")
        with pytest.raises(SourceLost):
            marked.do(f"b.ensure(slice({5 * PAGE}, {6 * PAGE}))")
        served.restart()
        broken.unlink()
        marked.do(f"b.ensure(slice({5 * PAGE}, {6 * PAGE}))")
        assert marked.do(f"read(b, {5 * PAGE}, {PAGE})") == page_at(content, 5)
        served.restart()
        assert marked.do("bytes(b)") == content
        wait_until(lambda: served.block().lost_pages == 0, "nothing to be lost")


def test_poison_of_a_page_that_came_just_before_its_coordinator_died_is_lifted(
    runtime_dir: Path, data_file: Path, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3, T10: it does not come again, so nothing else would lift the mark; nor that of a child forked meanwhile."""
    broken, death = tmp_path / "broken", tmp_path / "death"
    broken.touch()
    monkeypatch.setenv(trace.DIE_VARIABLE, str(death))
    trace.write_death(death, "place", 1)  # it is received, and its mark not lifted
    options = [*LAZY, "--on-source-loss=poison"]
    with restarting(f"data={data_file}#error=EIO@{broken}", options=options) as served:
        marked = served.attached("mode='cow'")
        marked.do(
            "import time\nfd = os.memfd_create('copy')\n"
            "def copied():\n"
            f"    try: return os.pwrite(fd, memoryview(b)[{5 * PAGE}:{6 * PAGE}], 0) == {PAGE}\n"
            "    except OSError: return False  # what a mark is inside a system call\n"
            "def in_child():\n"
            "    pid = os.fork()\n"
            "    if pid:\n"
            "        return os.waitpid(pid, 0)[1]\n"
            "    for _ in range(1000):\n"
            "        if copied(): os._exit(0)\n"
            "        time.sleep(0.01)\n"
            "    os._exit(1)"
        )
        assert not marked.do("copied()")
        before = served.restarts
        broken.unlink()
        with suspended(served.keeper_pid):
            with contextlib.suppress(CoordinatorGone):  # it may die before it answers
                served.order(AdminOp.RESUME)
            wait_until(lambda: not death.exists(), "its death")
            child = marked.start("in_child()")
        served.wait_for_restart(before)
        wait_until(lambda: bool(marked.do("copied()")), "the mark to be lifted")
        assert marked.do(f"read(b, {5 * PAGE}, {PAGE})") == page_at(content, 5)
        assert child.result() == 0


# ---- the keeper ----


def test_two_deaths_before_it_serves_again(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """P5: the keeper never gives up on one that has served."""
    with restarting(f"data={data_file}", options=LAZY) as served:
        helper = served.attached()
        touch = None
        for _ in range(4):
            before = served.kill()
            touch = touch or helper.start(f"read(b, 0, {PAGE})")
            wait_until(served.kill_child, "the next one")
        served.wait_for_restart(before)
        assert touch is not None
        assert touch.result() == page_at(content, 0)


# Python runs this in every process that starts: the coordinator's loop fails as soon as the file is there, once.
FAILS_ONCE = """
import os
from pcshare.coordinator.server import Server
turn = Server._turn
def fail_once(self):
    turn(self)
    if os.path.exists({path!r}):
        os.unlink({path!r})
        raise ZeroDivisionError("nobody expected this")
Server._turn = fail_once
"""


def test_failure_in_its_loop_is_as_good_as_a_kill(
    runtime_dir: Path, data_file: Path, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P5: an exception that nobody expected clears nothing up and takes nothing along."""
    (tmp_path / "hook").mkdir()
    fails = tmp_path / "fails"
    (tmp_path / "hook" / "sitecustomize.py").write_text(FAILS_ONCE.format(path=str(fails)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))
    with restarting(f"data={data_file}", options=LAZY) as served:
        helper = served.attached()
        helper.do(f"read(b, 0, {PAGE})")
        for number in range(2):
            fails.touch()
            late = served.attached()  # something for its loop to do; before the failure, or after the restart
            served.wait_for_restart(number)
            assert not fails.exists()
            assert late.do(f"read(b, {(number + 1) * PAGE}, {PAGE})") == page_at(content, number + 1)
        assert helper.do("bytes(b)") == content


def test_one_that_never_served_is_not_started_again(runtime_dir: Path, tmp_path: Path) -> None:
    done = run("coordinator", "--name=never", f"data={tmp_path / 'missing'}")
    assert done.returncode == 1
    assert "started again" not in done.stderr
    assert done.stderr.count("No such file") == 1


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "stop", "SIGTERM to the child"])
def test_orderly_end_is_final(runtime_dir: Path, data_file: Path, how: str) -> None:
    """P7: also after a restart."""
    with ending(data_file) as (process, name):
        restarted(name)
        if how == "stop":
            assert run("stop", name).returncode == 0
        elif how == "SIGTERM to the child":
            os.kill(read_status(name).pid, signal.SIGTERM)
        else:
            process.send_signal(getattr(signal, how))
        assert process.wait(WAIT_S) == 0


@contextlib.contextmanager
def ending(path: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A coordinator, as its keeper, that the body ends; what it leaves behind is seen by every test's own counting."""
    name = f"ends-{os.getpid()}"
    command = [*PCSHARE, "coordinator", f"--name={name}", "--json", *options, f"data={path}"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, preexec_fn=die_with_parent
    ) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "ready"
        try:
            yield process, name
        finally:
            if process.poll() is None:
                process.kill()


def restarted(name: str) -> StatusReport:
    """Kills it, waits for the next one, and returns what that says."""
    before = read_status(name)
    os.kill(before.pid, signal.SIGKILL)
    wait_until(lambda: read_status(name).restarts > before.restarts and read_status(name).alive, "a restart", WAIT_S)
    return read_status(name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_keeper_that_is_told_to_end_during_a_restart_leaves_nothing(
    runtime_dir: Path, data_file: Path, rng: random.Random, number: signal.Signals
) -> None:
    """P7: whenever it hears it."""
    for delay_s in (0.0, *(rng.uniform(0.0, 0.5) for _ in range(4))):
        with ending(data_file, *LAZY) as (process, name):
            os.kill(read_status(name).pid, signal.SIGKILL)
            time.sleep(delay_s)
            process.send_signal(number)
            process.wait(WAIT_S)
            with pytest.raises(pcshare.errors.NoSuchCoordinator):
                read_status(name)


def test_status_and_stop_during_a_restart(runtime_dir: Path, data_file: Path) -> None:
    """It is not called dead, and stopping waits for the one that can be told."""
    with ending(data_file, *LAZY) as (process, name):
        suspend(process.pid)
        pid = read_status(name).pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not read_status(name).alive, "its end")
        report = read_status(name)
        assert (report.restarting, report.restarts) == (True, 0)
        told = run("status", name)
        assert told.returncode == 1
        assert "starts it again" in told.stderr
        refused = run("coordinator", f"--name={name}", f"data={data_file}")
        assert refused.returncode != 0
        assert "started again" not in refused.stderr
        stop = subprocess.Popen([*PCSHARE, "stop", name], stderr=subprocess.DEVNULL, preexec_fn=die_with_parent)
        os.kill(process.pid, signal.SIGCONT)
        assert stop.wait(WAIT_S) == 0
        assert process.wait(WAIT_S) == 0


def test_nothing_is_left_when_helpers_have_gone(runtime_dir: Path, data_file: Path) -> None:
    """P7: the keeper's fds return to what they were, however many coordinators there were."""
    with restarting(f"data={data_file}", options=LAZY) as served:
        served.restart()
        before = served.held()
        for _ in range(3):
            helpers = [served.attached(f"mode={mode!r}") for mode in ("ro", "cow", "ro")]
            served.restart()
            for helper in helpers:
                helper.do("b.close()")
        served.wait_until_alone(before)


def test_clients_of_an_export_come_back_to_the_same_address(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    path = runtime_dir / "x.sock"
    with restarting(f"data={data_file}", options=[*LAZY, f"--export={path}", "--export=127.0.0.1:0"]) as served:
        uri = f"nbd+unix:///data?socket={path}"
        copied = runtime_dir / "copy"

        def copy() -> bytes:
            subprocess.run(["nbdcopy", uri, str(copied)], check=True, timeout=COMMAND_TIMEOUT_S)
            return copied.read_bytes()

        assert copy() == content
        for _ in range(2):
            before = [child.pid for child in psutil.Process(served.pid).children()]
            served.restart()
            wait_until(lambda pids=before: not any(map(psutil.pid_exists, pids)), "the exporter's end", WAIT_S)  # type: ignore[misc]
            assert copy() == content
    assert not path.exists()


def test_keeper_needs_hardly_more_numbers_of_fds_than_it_has(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """P5: who has as many helpers as its limit of open files allows is started again all the same."""
    n_helpers, limit = 150, 512
    within = ["prlimit", f"--nofile={limit}:{limit}"]
    with coordinator(f"data={data_file}", options=LAZY, within=within) as made, contextlib.ExitStack() as helpers:
        served = Restarting(made, helpers)
        helper = served.helper()
        helper.do(f"all = [attach() for _ in range({n_helpers})]")
        assert 3 * n_helpers < psutil.Process(served.pid).num_fds() < limit
        touches = [helper.start(f"read(all[{number}], {number * PAGE}, {PAGE})") for number in (0, 70, 149)]
        for _ in range(2):
            served.restart()
        for number, touch in zip((0, 70, 149), touches, strict=True):
            assert touch.result() == page_at(content, number)
        assert [len(served.status().helpers), served.block().foreign_pages] == [n_helpers, 0]
        assert all(helper.do(f"[read(b, {200 * PAGE}, {PAGE}) == {page_at(content, 200)!r} for b in all]"))


def test_attaching_and_leaving_all_the_time(
    runtime_dir: Path, data_file: Path, content: bytes, rng: random.Random
) -> None:
    """P4, P5, P7: whatever step of a hand-over a death meets, the helper comes through."""
    with restarting(f"data={data_file}", options=LAZY) as served:
        served.restart()
        before = served.held()
        helpers = [served.helper() for _ in range(3)]
        for helper in helpers:
            helper.do(
                "import random; stop, n = False, 0\n"
                "def come_and_go(content):\n"
                "    global n\n"
                "    while not stop:\n"
                "        with attach(mode=random.choice(['ro', 'cow'])) as b:\n"
                "            at = random.randrange(len(content) - 4096)\n"
                "            assert read(b, at, 4096) == content[at:at + 4096]\n"
                "            n += 1"
            )
        coming = [helper.start(f"come_and_go(open({str(data_file)!r}, 'rb').read())") for helper in helpers]
        for _ in range(8):
            time.sleep(rng.uniform(0.0, 0.3))
            served.restart()
        for helper, pending in zip(helpers, coming, strict=True):
            wait_until(lambda one=helper: one.do("n") > 8, "some more to come and go", WAIT_S)  # type: ignore[misc]
            helper.do("stop = True")
            pending.result()
        served.wait_until_alone(before)
        assert served.block().foreign_pages == 0


def test_program_that_started_it_ends_it_during_a_restart(runtime_dir: Path, data_file: Path) -> None:
    """P7: by its link, which the next one has."""
    for delay_s in (0.0, 0.1, 0.3):
        with pcshare.Coordinator(blocks={"data": str(data_file)}, stream="lazy") as made:
            assert made.pid is not None
            os.kill(made.pid, signal.SIGKILL)
            time.sleep(delay_s)
        with pytest.raises(pcshare.errors.NoSuchCoordinator):
            read_status(made.name)
