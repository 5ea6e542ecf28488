"""P4: one helper that wants much does not keep others waiting: pages of faults, and ranges.

The source takes so long for each page, one after the other, that times say what stood before what, whatever else this
machine does. How much a flood of faults from the page cache disturbs is measured by scripts/bench-fairness.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import pytest

from pcshare.fault_thread import DEMANDS_IN_FLIGHT_MAX, REQUESTS_IN_FLIGHT_MAX
from pcshare.protocol import AdminOp
from support import needs, wait_until
from support_nbd import ScriptedServer, Withheld, nbdkit
from support_serving import CROWD_CPUS_MAX, LAZY, PAGE, HelperProcess, Serving, make_file, page_of, serving

N_PAGES = 4000
PAGE_S = 0.02  # what the source takes for a page
SHARE = 8  # pages of one helper at a file, PAGE_CHANNEL_DEMANDS_OF_ONE
CROWDS_SHARE = 2  # of a crowd at a near server, NBD_DEMANDS_OF_CROWD_NEAR
FLOOD = 64
SLACK_PAGES = 4
TOUCHES = 8
ATTEMPTS, CROWDS_PAGES = 3, 4 * N_PAGES  # to meet a crowd before it is through
THREADS_OF_A_HELPER = 1000
RATE_OF_RANGES = 2 << 20  # bytes a second


@pytest.fixture
def data_file(tmp_path: Path, rng: random.Random) -> Path:
    return make_file(tmp_path, rng, N_PAGES * PAGE)


@pytest.fixture
def serial(data_file: Path) -> str:
    """One page after the other, those of faults in the order in which they are asked for."""
    return f"data={data_file}#rate={round(PAGE / PAGE_S)}"


def attached(served: Serving) -> HelperProcess:
    helper = served.helper()
    helper.do("b = attach()")
    return helper


def flood(helper: HelperProcess, n_threads: int, n_pages: int = N_PAGES // 2) -> None:
    """Threads that fault as fast as they are answered, each its own pages."""
    helper.do(
        "import threading\n"
        f"def touch(first):\n"
        f"    for page in range(first, {n_pages}, {n_threads}): read(b, page * {PAGE})\n"
        f"for i in range({n_threads}): threading.Thread(target=touch, args=(i,), daemon=True).start()"
    )


def touch_s(helper: HelperProcess, page: int) -> float:
    """How long a touch takes."""
    return float(
        helper.do(f"import time; start = time.monotonic(); read(b, {page * PAGE}, 9); time.monotonic() - start")
    )


def test_page_waits_behind_a_share_of_another_helpers_flood(runtime_dir: Path, serial: str) -> None:
    """Not behind all that it waits for; also a page that is in the flood's own queue."""
    with serving(serial, stream_mode=LAZY) as served:
        flooder, other = attached(served), attached(served)
        flood(flooder, FLOOD)
        served.wait_for_waiting(FLOOD, flooder.pid)
        took_s = [touch_s(other, N_PAGES - 1 - number) for number in range(TOUCHES)]
        served.wait_for_waiting(FLOOD, flooder.pid)
        assert statistics.median(took_s) < FLOOD * PAGE_S / 2
        queued = FLOOD - 2  # behind what has come: asked for long after those before it
        took_s = [touch_s(other, served.block().received_pages + queued) for _ in range(3)]
        assert statistics.median(took_s) < FLOOD * PAGE_S / 2


def test_crowd_has_two_pages_at_a_near_server(runtime_dir: Path, rng: random.Random) -> None:
    """Beside one that faults now and then; each of its answers would take the CPUs that the other needs."""
    cpus = len(os.sched_getaffinity(0))
    needs(None if cpus < CROWD_CPUS_MAX else f"fewer than {CROWD_CPUS_MAX} CPUs")
    n_threads = 4 * cpus
    content = rng.randbytes((CROWDS_PAGES + N_PAGES // 2) * PAGE)
    held = Withheld(content, [])
    with (
        tempfile.TemporaryDirectory(prefix="pcs-", dir="/tmp") as folder,
        ScriptedServer(held.script) as server,
    ):
        path, _ = server.listen(Path(folder) / "s.sock")
        with serving(f"data=nbd+unix:///?socket={path}#timeout=600s", stream_mode=LAZY, read_ahead=0) as served:
            crowd, steady = attached(served), attached(served)
            flood(crowd, n_threads, CROWDS_PAGES)
            pages = range(CROWDS_PAGES, CROWDS_PAGES + N_PAGES // 2)
            steady.start(f"import time\nfor page in {pages}: read(b, page * {PAGE}); time.sleep(0.001)")
            owed: list[int] = []
            while CROWDS_SHARE + 1 not in owed and len(owed) < ATTEMPTS:  # who has just stood still is no crowd
                before = served.block().demand_pages
                wait_until(lambda: served.block().demand_pages > before + N_PAGES // 16, "both to fault")  # noqa: B023
                held.withholds_all = True
                served.wait_for_waiting(n_threads, crowd.pid)
                served.wait_for_waiting(1, steady.pid)
                wait_until(lambda: held.owed_count > CROWDS_SHARE, "the server to have read what it was asked")
                time.sleep(0.05)  # for what it should not be asked
                owed.append(held.owed_count)
                held.withholds_all = False
                held.answer_late()
            assert CROWDS_SHARE + 1 in owed, owed

            def is_complete() -> bool:
                held.answer_late()  # also what came into its hands just before it gave nothing back any more
                return served.block().received_pages == pages.stop

            wait_until(is_complete, "all pages")
            for helper in (crowd, steady):
                assert helper.do(f"read(b, 0, {len(content)})") == content


def test_every_thread_of_a_flood_is_served_right(runtime_dir: Path, data_file: Path) -> None:
    """P1, P3: queues lose nobody, whether the answers come from a file's readers or from a server."""
    content = data_file.read_bytes()
    with serving(f"data={data_file}#delay=2ms", stream_mode=LAZY) as served:
        helper = attached(served)
        found = [helper.start(f"read(b, {7 * number * PAGE}, {PAGE})") for number in range(300)]
        assert [one.result() for one in found] == [page_of(content, 7 * number) for number in range(300)]
        assert (served.block().demand_pages, served.waiting()) == (300, 0)


def test_every_thread_of_a_flood_over_nbd_is_served_right(tmp_path: Path, runtime_dir: Path, data_file: Path) -> None:
    content = data_file.read_bytes()
    with (
        nbdkit(tmp_path, "--filter=delay", "file", data_file, "rdelay=2ms", tcp=True) as server,
        serving(f"data={server.uri()}", stream_mode=LAZY) as served,
    ):
        helpers = [attached(served) for _ in range(2)]
        found = [
            (number, helper.start(f"read(b, {7 * number * PAGE}, {PAGE})"))
            for number in range(200)
            for helper in helpers
        ]
        for number, pending in found:
            assert pending.result() == page_of(content, 7 * number)
        assert (served.block().demand_pages, served.waiting()) == (200, 0)


def test_who_waits_for_a_page_in_the_queue_of_one_that_dies_gets_it(
    runtime_dir: Path, tmp_path: Path, data_file: Path
) -> None:
    """P3, P4: also after a pause, when all that is waited for is queued anew."""
    broken = tmp_path / "broken"
    broken.touch()
    content = data_file.read_bytes()
    with serving(f"data={data_file}#delay=20ms&error=EIO@{broken}", stream_mode=LAZY) as served:
        other, flooder = attached(served), attached(served)
        pages = range(2 * FLOOD)
        theirs = [other.start(f"read(b, {page * PAGE}, {PAGE})") for page in pages]
        served.wait_for_waiting(len(pages), other.pid)
        for page in pages:
            flooder.start(f"read(b, {page * PAGE})")
        served.wait_for_waiting(len(pages), flooder.pid)
        served.wait_for_state("PAUSED")
        broken.unlink()
        served.order(AdminOp.RESUME)
        flooder.kill()
        served.resume_until(lambda: all(one.is_done() for one in theirs), "their pages")
        assert [one.result() for one in theirs] == [page_of(content, page) for page in pages]
        wait_until(lambda: served.waiting() == 0, "nobody to wait")


def test_resume_is_fair_too(runtime_dir: Path, tmp_path: Path, data_file: Path) -> None:
    """Whoever waited for few pages while a source was broken does not wait behind all of another's."""
    broken = tmp_path / "broken"
    broken.touch()
    source = f"data={data_file}#rate={round(PAGE / PAGE_S)}&error=EIO@{broken}"
    with serving(source, stream_mode=LAZY) as served:
        flooder, other = attached(served), attached(served)
        for page in range(2 * FLOOD):
            flooder.start(f"read(b, {page * PAGE})")
        served.wait_for_waiting(2 * FLOOD, flooder.pid)
        pending = other.start(f"read(b, {1000 * PAGE})")
        served.wait_for_waiting(1, other.pid)
        wait_until(lambda: served.block().state == "PAUSED", "the pause")
        time.sleep(4 * FLOOD * PAGE_S)  # what was asked before has failed by now
        broken.unlink()
        served.order(AdminOp.RESUME)
        begin = time.monotonic()
        pending.result()
        assert time.monotonic() - begin < FLOOD * PAGE_S
        assert served.waiting(flooder.pid) > 0


def test_small_range_does_not_wait_for_a_large_one(runtime_dir: Path, data_file: Path) -> None:
    """Helpers take turns, piece by piece."""
    with serving(f"data={data_file}#rate={RATE_OF_RANGES}", stream_mode=LAZY) as served:
        greedy, modest = attached(served), attached(served)
        all_of_it = greedy.start("b.ensure()")
        wait_until(lambda: served.block().received_pages > 0, "the first piece", 60)
        modest.do(f"b.ensure(slice({(N_PAGES - 5) * PAGE}, None), timeout_s=25)")
        assert served.block().received_pages < N_PAGES * 3 // 4
        assert not all_of_it.is_done()


# ---- limits of one helper ----


def test_who_is_over_a_limit_is_told_which(runtime_dir: Path, data_file: Path) -> None:
    """Its value, its name, and what to do; and it alone is cut off."""
    with serving(f"data={data_file}#delay=5s", stream_mode=LAZY) as served:
        rude, other = served.helper(), attached(served)
        rude.do(
            "from pcshare import protocol\n"
            "h = hand_over('ack')\n"
            f"for i in range({REQUESTS_IN_FLIGHT_MAX} + 1):\n"
            "    h.connection.send(protocol.pack_request(i * 4096, 4096, 1))"
        )
        told = rude.do("said = h.connection.receive(20.0)[0]; protocol.parse(said, 0).text")
        assert f"more ranges at once than a helper may: {REQUESTS_IN_FLIGHT_MAX}" in told
        assert "FAULT_REQUESTS_IN_FLIGHT_MAX" in told
        assert [one.state for one in served.helpers(other.pid)] == ["attached"]


def test_nobody_is_cut_off_for_its_thousand_threads(runtime_dir: Path, data_file: Path) -> None:
    """They wait in its own queue, and all are served."""
    with serving(f"data={data_file}#delay=1ms", stream_mode=LAZY) as served:
        helper = attached(served)
        helper.do(
            "import threading; threading.stack_size(65536)\n"
            f"pages = range(0, 3 * {THREADS_OF_A_HELPER}, 3)\n"
            f"threads = [threading.Thread(target=read, args=(b, page * {PAGE})) for page in pages]\n"
            "for thread in threads: thread.start()\n"
            "for thread in threads: thread.join()"
        )
        assert (served.block().demand_pages, served.waiting()) == (THREADS_OF_A_HELPER, 0)


def test_nobody_is_cut_off_for_pages_that_came_another_way(runtime_dir: Path, rng: random.Random) -> None:
    """They stand in its queue behind pages that hang, but it waits for them no more."""
    hanging = range(16)  # of one helper at once: at a near server 4, at a far one 16
    rounds = DEMANDS_IN_FLIGHT_MAX // THREADS_OF_A_HELPER + 1
    content = rng.randbytes((rounds + 1) * THREADS_OF_A_HELPER * PAGE)
    withheld = Withheld(content, [(page * PAGE, PAGE) for page in hanging])
    with (
        tempfile.TemporaryDirectory(prefix="pcs-", dir="/tmp") as folder,
        ScriptedServer(withheld.script) as server,
    ):
        path, _ = server.listen(Path(folder) / "s.sock")
        with serving(f"data=nbd+unix:///?socket={path}#timeout=600s", stream_mode=LAZY) as served:
            helper, other = attached(served), attached(served)
            helper.do("import threading; threading.stack_size(65536)")
            for page in hanging:
                helper.start(f"read(b, {page * PAGE})")
            served.wait_for_waiting(len(hanging), helper.pid)
            for number in range(1, rounds + 1):
                first, end = number * THREADS_OF_A_HELPER, (number + 1) * THREADS_OF_A_HELPER
                helper.do(
                    f"pages = range({first}, {end})\n"
                    f"threads = [threading.Thread(target=read, args=(b, page * {PAGE})) for page in pages]\n"
                    "for thread in threads: thread.start()"
                )
                served.wait_for_waiting(len(hanging) + THREADS_OF_A_HELPER, helper.pid)
                other.do(f"b.ensure(slice({first * PAGE}, {end * PAGE}))")
                helper.do("for thread in threads: thread.join()")
            assert [one.state for one in served.helpers(helper.pid)] == ["attached"]
            assert served.waiting(helper.pid) == len(hanging)
