"""The helper's side of the C core, used as a C program uses it, against a small coordinator that misbehaves on command.

Everything runs plainly, under the address and undefined-behaviour sanitizers and under the thread sanitizer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helper_c_support import ATTACHED, COMPLETE, LOST, ORPHANED, Helper, SmallCoordinator, build
from support import needs, suspended, wait_until

pytestmark = pytest.mark.filterwarnings("error")
NOBODY = 65534
ECHO_MS = 20000  # a time limit that is never reached
SOON_MS = 150  # one that is
MUTE_MS = 3000  # one that is, after an answer
Make = Callable[..., tuple[SmallCoordinator, Helper]]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """programs(name, build_name): the compiled program; made once."""
    folder = tmp_path_factory.mktemp("helper-c")
    folder.chmod(0o755)
    made: dict[tuple[str, str], Path] = {}

    def program(name: str, build_name: str) -> Path:
        if (name, build_name) not in made:
            made[name, build_name] = build(folder, name, build_name)
        return made[name, build_name]

    return program


@contextmanager
def pair(programs: Callable[[str, str], Path], folder: Path, build_name: str) -> Iterator[Make]:
    """make(...): a coordinator and a helper that ends well: nothing in its hands, nothing for a sanitizer to say."""
    made: list[tuple[SmallCoordinator, Helper, int]] = []

    def make(**arguments: object) -> tuple[SmallCoordinator, Helper]:
        socket = folder / "s"
        coordinator = SmallCoordinator(programs("small_coordinator", "plain"), socket, **arguments)  # type: ignore[arg-type]
        helper = Helper(programs("helper_driver", build_name), socket)
        made.append((coordinator, helper, helper.number("fds")))
        return coordinator, helper

    try:
        yield make
        for _, helper, n_fds in made:
            for slot in range(8):
                helper.do(f"drop {slot}")
            assert helper.number("fds") == n_fds, "the helper's fds"
            wait_until(lambda h=helper: h.number("sentinels") == 0, "the sentinel's end")  # type: ignore[misc]
    finally:
        statuses = [(helper.close(), coordinator.close(), helper.errors) for coordinator, helper, _ in made]
    for helper_status, coordinator_status, errors in statuses:
        assert helper_status == 0, errors
        assert coordinator_status == 0
        assert "Sanitizer" not in errors
        assert "runtime error" not in errors


@pytest.fixture(params=["plain", "address", "thread"])
def make(request: pytest.FixtureRequest, programs: Callable[[str, str], Path], runtime_dir: Path) -> Iterator[Make]:
    runtime_dir.chmod(0o755)
    with pair(programs, runtime_dir, request.param) as made:
        yield made


@pytest.fixture
def make_plain(programs: Callable[[str, str], Path], runtime_dir: Path) -> Iterator[Make]:
    """For what a sanitizer would change: locked memory."""
    runtime_dir.chmod(0o755)
    with pair(programs, runtime_dir, "plain") as made:
        yield made


@pytest.fixture
def make_unpoisoned(programs: Callable[[str, str], Path], runtime_dir: Path) -> Iterator[Make]:
    """A helper on a kernel that has no UFFDIO_POISON."""
    with pair(programs, runtime_dir, "unpoisoned") as made:
        yield made


def refusal(answer: str) -> tuple[int, str]:
    number, _, text = answer.partition(" ")
    return int(number), text.strip()


def flags(helper: Helper, slot: int = 0) -> set[str]:
    return set(helper.do(f"flags {slot}").split()[1:])


# ---- attaching and reading ----


@pytest.mark.parametrize("mode", ["ro", "rw", "cow", "default"])
def test_pages_come_on_demand_and_are_right(make: Make, mode: str) -> None:
    coordinator, helper = make(options=("writable",) if mode == "rw" else ())
    helper.attach(0, mode)
    assert helper.do("read 0 3") == "ok"
    assert helper.do("read 0 15") == "ok"
    assert helper.do("read 0 3") == "ok"
    assert helper.do("progress 0").split()[:2] == ["2", "16"]
    assert coordinator.total("fault") == 2
    assert coordinator.total("foreign") == 0


def test_mapping_is_kept_from_dumps_children_and_huge_pages_and_registered(make: Make) -> None:
    """T4"""
    _, helper = make()
    helper.attach(0, "ro")
    assert {"dd", "dc", "um"} <= flags(helper)
    helper.attach(1, "cow")
    assert {"dd", "um"} <= flags(helper, 1)
    assert "dc" not in flags(helper, 1), "the child gets a copy of what was written"


def test_peek_tells_the_sizes_and_keeps_nothing(make: Make) -> None:
    coordinator, helper = make(pages=16, tail=100)
    assert helper.do("peek") == f"0 data {15 * 4096 + 100} {16 * 4096} 1"
    coordinator.event("hung-up")
    assert coordinator.total("attach") == 0


def test_what_is_written_copy_on_write_stays_here(make: Make) -> None:
    _, helper = make()
    helper.attach(0, "cow")
    helper.attach(1, "ro")
    assert helper.do("write 0 5 77") == "ok"
    assert helper.do("word 0 5 77") == "ok"
    assert helper.do("read 1 5") == "ok"


def test_what_is_written_shared_is_seen_by_others(make: Make) -> None:
    """P2"""
    coordinator, helper = make(options=("writable",))
    helper.attach(0, "rw")
    helper.attach(1, "ro")
    assert helper.do("write 0 5 77") == "ok"
    coordinator.do("place 0 16")
    assert helper.do("word 1 5 77") == "ok"


def test_writing_to_a_read_only_mapping_is_segv(make: Make) -> None:
    _, helper = make()
    helper.attach(0, "ro")
    assert helper.do("write 0 5 77") == "segv"
    assert helper.do("read 0 5") == "ok"


def test_rw_of_a_read_only_block_is_refused(make: Make) -> None:
    _, helper = make()
    number, text = refusal(helper.do(f"attach 0 rw {ECHO_MS}"))
    assert number == -71
    assert "not writable" in text


def test_callers_mapping_is_replaced_and_given_back_inaccessible(make: Make) -> None:
    _, helper = make()
    helper.attach(0, "ro", place="at")
    assert helper.do("read 0 7") == "ok"
    left = set(helper.do("detach 0").split()[1:])
    assert "mr" in left
    assert "rd" not in left


def test_callers_mapping_of_another_length_is_left_alone(make: Make) -> None:
    _, helper = make()
    number, _ = refusal(helper.do(f"attach 0 ro {ECHO_MS} long"))
    assert number == -116


def test_huge_pages(make: Make, huge_pages: Callable[[int], None]) -> None:
    """T11: one huge page is there, five are mapped."""
    huge_pages(3)
    coordinator, helper = make(pages=5, page_size=2 << 20)
    for slot, mode in enumerate(("ro", "cow", "ro")):
        helper.attach(slot, mode, place="at" if slot == 2 else "")
        assert helper.do(f"read {slot} 3") == "ok"
    assert helper.do("fork a read 0 4;b read 1 3") == "0"
    assert [helper.result(tag) for tag in "ab"] == ["ok", "ok"]
    assert helper.do("join") == "exit 0"
    assert coordinator.total("foreign") == 0


# ---- asking for ranges ----


def test_ensure_is_one_request_for_the_whole_range(make: Make) -> None:
    coordinator, helper = make()
    helper.attach()
    assert helper.number(f"ensure 0 5000 20000 {ECHO_MS}") == 0
    assert coordinator.event("request").split()[2:] == ["5000", "20000", "wait"]
    assert helper.number("received 0 5000 20000") == 1
    assert helper.number(f"ensure 0 5000 20000 {ECHO_MS}") == 0
    assert helper.number(f"ensure 0 7 0 {ECHO_MS}") == 0
    assert coordinator.total("request") == 0
    assert coordinator.total("fault") == 0


@pytest.mark.parametrize("command", ["ensure 0 {} {} 1000", "prefetch 0 {} {}", "received 0 {} {}"])
@pytest.mark.parametrize("numbers", [(61540, 1), (0, 61541), (1 << 63, 1 << 63), ((1 << 64) - 1, 2)])
def test_a_range_outside_the_block_is_refused(make: Make, command: str, numbers: tuple[int, int]) -> None:
    _, helper = make(pages=16, tail=100)
    helper.attach()
    assert helper.number(command.format(*numbers)) == -22


def test_the_end_of_the_block_is_in_it(make: Make) -> None:
    _, helper = make(pages=16, tail=100)
    helper.attach()
    assert helper.number(f"ensure 0 61440 100 {ECHO_MS}") == 0
    assert helper.number("ensure 0 61540 0 0") == 0


def test_ensure_has_a_time_limit(make: Make) -> None:
    coordinator, helper = make()
    helper.attach()
    coordinator.do("hold")
    assert helper.number(f"ensure 0 0 4096 {SOON_MS}") == -110
    assert helper.number("ensure 0 0 4096 0") == -110
    coordinator.do("serve")
    assert helper.number(f"ensure 0 4096 4096 {ECHO_MS}") == 0


def test_ensure_is_interrupted_by_a_signal(make: Make) -> None:
    coordinator, helper = make()
    helper.attach()
    coordinator.do("hold")
    helper.write(f"main ensure 0 0 4096 {ECHO_MS}")
    coordinator.event("request")
    # The main thread may not sleep yet when the coordinator has the request: the signal is sent until it is noticed.
    answers: list[str] = []

    def noticed() -> bool:
        if helper.count("main "):
            answers.append(helper.result("main"))
        else:
            os.kill(helper.process.pid, signal.SIGUSR1)
        return bool(answers)

    wait_until(noticed, "an answer after the signal")
    assert refusal(answers[0])[0] == -4


def test_lost_range_is_told(make: Make) -> None:
    coordinator, helper = make()
    helper.attach()
    coordinator.do("hold")
    tag = helper.start(f"ensure 0 4096 8192 {ECHO_MS}")
    coordinator.event("request")
    coordinator.do("lose 5")
    number, text = refusal(helper.result(tag))
    assert number == -5
    assert text.startswith("4096 8192 block data: the source lost 8192 bytes from 4096 on")


def test_an_answer_with_no_errno_in_it_ends_the_conversation_not_the_request(make: Make) -> None:
    coordinator, helper = make()
    helper.attach()
    coordinator.do("hold")
    tag = helper.start(f"ensure 0 4096 8192 {ECHO_MS}")
    coordinator.event("request")
    coordinator.do("lose 4096")  # the kernel's errnos end at 4095
    assert coordinator.event("request").split()[2:4] == ["4096", "8192"], "it is asked again, after attaching again"
    coordinator.do("place 0 16")
    assert refusal(helper.result(tag))[0] == 0


def test_requests_in_flight_are_limited_and_the_others_wait_their_turn(make: Make) -> None:
    coordinator, helper = make(pages=128)
    helper.attach()
    coordinator.do("hold")
    tags = [helper.start(f"ensure 0 {page * 4096} 4096 {ECHO_MS}") for page in range(80)]
    for _ in range(64):
        coordinator.event("request")
    assert helper.number("prefetch 0 0 4096") == 0
    assert coordinator.event("request").endswith("hint"), "no 65th came before it"
    coordinator.do("place 0 128")
    assert [refusal(helper.result(tag))[0] for tag in tags] == [0] * 80


def test_abandoned_requests_count_until_they_are_answered(make: Make) -> None:
    coordinator, helper = make(pages=128)
    helper.attach()
    coordinator.do("hold")
    for page in range(64):
        assert helper.number(f"ensure 0 {page * 4096} 4096 0") == -110
    tag = helper.start(f"ensure 0 400000 4096 {ECHO_MS}")
    for _ in range(64):
        coordinator.event("request")
    assert helper.number("prefetch 0 0 4096") == 0
    assert coordinator.event("request").endswith("hint")
    coordinator.do("place 0 128")
    assert refusal(helper.result(tag))[0] == 0


def test_prefetch_does_not_wait(make: Make) -> None:
    coordinator, helper = make()
    helper.attach()
    coordinator.do("hold")
    assert helper.number("prefetch 0 0 8192") == 0
    assert coordinator.event("request").split()[2:] == ["0", "8192", "hint"]


# ---- progress ----


def test_progress_is_read_while_the_coordinator_is_stopped(make: Make) -> None:
    coordinator, helper = make()
    helper.attach()
    assert helper.do("read 0 3") == "ok"
    with suspended(coordinator.pid):
        assert helper.number("received 0 12288 4096") == 1
        assert helper.number("received 0 12288 4097") == 0
        received, _, _, seq = helper.do("progress 0").split()
        assert received == "1"
        assert helper.number(f"ensure 0 12288 4096 {ECHO_MS}") == 0
        assert helper.number(f"wait 0 {seq} {SOON_MS}") == -110


def test_waiting_for_progress_ends_with_progress(make: Make) -> None:
    coordinator, helper = make()
    helper.attach()
    seq = helper.do("progress 0").split()[3]
    tag = helper.start(f"wait 0 {seq} {ECHO_MS}")
    coordinator.do("place 2 3")
    assert helper.result(tag) == "0"


@pytest.mark.parametrize("cause", ["bye", "hang-up"])
def test_waiting_for_progress_ends_when_the_state_changes(make: Make, cause: str) -> None:
    coordinator, helper = make(orphan_ms=60000)
    helper.attach()
    seq = helper.do("progress 0").split()[3]
    tag = helper.start(f"wait 0 {seq} {ECHO_MS}")
    wait_until(lambda: any("futex" in where for where in sleeping_places(helper)), "a thread that waits")
    coordinator.do("deafen")
    coordinator.do(cause)
    assert helper.result(tag) == "0"


# ---- the end ----


def check_complete(helper: Helper, slot: int = 0) -> None:
    assert helper.number(f"await {slot} {COMPLETE}") == COMPLETE
    assert not flags(helper, slot) & {"um", "dc", "nh"}, "plain memory again"
    assert helper.do(f"read {slot} 9") == "ok"
    assert helper.number(f"ensure {slot} 0 65536 0") == 0
    assert helper.number(f"received {slot} 0 65536") == 1


def test_end_makes_it_plain_memory_and_wakes_who_waits(make: Make) -> None:
    """G3, P7"""
    coordinator, helper = make()
    helper.attach()
    coordinator.do("hold")
    read, ensure = helper.start("read 0 9"), helper.start(f"ensure 0 0 65536 {ECHO_MS}")
    coordinator.event("request")
    coordinator.do("keep-silent")
    coordinator.do("place 0 16")
    coordinator.do("finish")
    coordinator.do("end")
    coordinator.event("leave")
    check_complete(helper)
    assert helper.result(read) == "ok"
    assert refusal(helper.result(ensure))[0] == 0
    wait_until(lambda: helper.number("sentinels") == 0, "the sentinel's end")


@pytest.mark.parametrize("last_word", ["hang-up", "bye", "garbage"])
def test_whatever_happens_after_the_end_is_the_end(make: Make, last_word: str) -> None:
    coordinator, helper = make(orphan_ms=1)
    helper.attach()
    coordinator.do("place 0 16")
    coordinator.do("finish")
    coordinator.do("deafen")
    coordinator.do(last_word)
    check_complete(helper)
    assert helper.errors == ""


def test_block_that_is_complete_is_mapped_plainly(make: Make) -> None:
    coordinator, helper = make()
    coordinator.do("place 0 16")
    coordinator.do("finish")
    for slot, mode in enumerate(("ro", "cow")):
        helper.attach(slot, mode, place="at" if slot else "")
        check_complete(helper, slot)
    assert helper.do("write 1 0 7") == "ok"
    assert helper.do("read 0 0") == "ok"
    assert coordinator.total("attach") == 0
    assert helper.number("sentinels") == 0


def test_block_that_becomes_complete_while_it_is_handed_over(make: Make) -> None:
    coordinator, helper = make()
    coordinator.do("wrong complete-at-ack")
    helper.attach()
    check_complete(helper)
    assert helper.number("sentinels") == 0


# ---- a coordinator that goes away ----


def check_lost(helper: Helper, why: str, slot: int = 0) -> None:
    """3 is here, 9 is not."""
    assert helper.number(f"await {slot} {LOST}") == LOST
    assert helper.do(f"read {slot} 3") == "ok"
    assert helper.do(f"read {slot} 9") == "sigbus"
    assert helper.do(f"read {slot} 9") == "sigbus"
    number, text = refusal(helper.do(f"ensure {slot} 0 65536 {ECHO_MS}"))
    assert number == -104
    assert why in text
    assert helper.number(f"prefetch {slot} 0 65536") == -104
    assert helper.number(f"ensure {slot} 12288 4096 0") == 0
    said = "touching a page that has not arrived is SIGBUS from now on"
    wait_until(lambda: said in helper.errors, "the line on stderr")
    assert "pcshare: block data: the coordinator" in helper.errors


@pytest.mark.parametrize("mode", ["ro", "rw", "cow"])
def test_bye_before_the_end_is_sigbus_at_what_is_missing(make: Make, mode: str) -> None:
    """P3"""
    coordinator, helper = make(options=("writable",) if mode == "rw" else ())
    helper.attach(0, mode)
    assert helper.do("read 0 3") == "ok"
    coordinator.do("hold")
    read, ensure = helper.start("read 0 10"), helper.start(f"ensure 0 0 65536 {ECHO_MS}")
    coordinator.event("request")
    coordinator.do("bye")
    assert helper.result(read) == "sigbus"
    assert refusal(helper.result(ensure))[0] == -104
    check_lost(helper, "ended before the block was complete")
    assert coordinator.total("foreign") == 0


def test_missing_page_is_sigbus_where_the_kernel_has_no_poison(make_unpoisoned: Make) -> None:
    coordinator, helper = make_unpoisoned()
    for slot, mode in enumerate(("ro", "cow")):
        helper.attach(slot, mode)
        assert helper.do(f"read {slot} 3") == "ok"
    coordinator.do("bye")
    for slot in range(2):
        check_lost(helper, "ended before", slot)
    assert helper.do("fork a read 0 3;b read 0 9;c read 1 3;d read 1 9;e read 1 10") == "0"
    assert [helper.result(tag) for tag in "abcde"] == ["ok", "sigbus", "ok", "sigbus", "sigbus"]
    assert helper.do("join") == "exit 0"


def test_fault_that_a_coordinator_had_read_before_it_said_bye_is_answered(make: Make) -> None:
    """T9"""
    coordinator, helper = make()
    helper.attach()
    coordinator.do("eat")
    read = helper.start("read 0 10")
    coordinator.event("fault")
    coordinator.do("bye")
    assert helper.result(read) == "sigbus"


def test_removed_page_of_a_lost_block_is_zeros(make: Make) -> None:
    coordinator, helper = make(options=("writable",))
    helper.attach(0, "rw")
    coordinator.do("place 0 8")
    assert helper.do("read 0 3") == "ok"
    assert helper.number("remove 0 3") == 0
    coordinator.do("bye")
    assert helper.number(f"await 0 {LOST}") == LOST
    assert helper.do("read 0 4") == "ok", "received, never touched here"
    assert helper.do("word 0 3 0") == "ok"
    assert helper.do("read 0 9") == "sigbus", "never received"


def test_killed_coordinator_is_waited_for_and_then_given_up(make: Make) -> None:
    """P3"""
    coordinator, helper = make(orphan_ms=300)
    helper.attach()
    assert helper.do("read 0 3") == "ok"
    coordinator.do("hold")
    read, ensure = helper.start("read 0 10"), helper.start(f"ensure 0 0 65536 {ECHO_MS}")
    coordinator.event("request")
    coordinator.kill()
    assert helper.number(f"await 0 {ORPHANED}") in (ORPHANED, LOST)
    assert helper.result(read) == "sigbus"
    assert refusal(helper.result(ensure))[0] == -104
    check_lost(helper, "has not come back within 300 ms")


@pytest.mark.parametrize("answering", ["hold", "eat"])
def test_restarted_coordinator_serves_who_waits(make: Make, answering: str) -> None:
    """P5, T9: with "eat" the dead one had read the fault."""
    coordinator, helper = make(orphan_ms=60000)
    helper.attach(0, "ro")
    helper.attach(1, "cow")
    coordinator.do(answering)
    reads = [helper.start(f"read {slot} 10") for slot in range(2)]
    ensure = helper.start(f"ensure 0 0 65536 {ECHO_MS}")
    coordinator.event("request")
    if answering == "eat":
        coordinator.event("fault")
        coordinator.event("fault")
    coordinator.kill()
    assert helper.number(f"await 0 {ORPHANED}") == ORPHANED
    assert helper.number("prefetch 0 0 8192") == 0, "a hint, dropped"
    assert helper.number(f"ensure 0 0 4096 {SOON_MS}") == -110
    coordinator.restart()
    assert [helper.result(tag) for tag in reads] == ["ok", "ok"]
    assert refusal(helper.result(ensure))[0] == 0
    assert helper.number(f"await 0 {ATTACHED}") == ATTACHED
    assert coordinator.total("foreign") == 0


@pytest.mark.parametrize("insult", ["hang-up", "garbage", "out-of-turn", "lose-nothing"])
def test_link_that_breaks_is_made_again(make: Make, insult: str) -> None:
    coordinator, helper = make(orphan_ms=60000)
    helper.attach()
    coordinator.event("attach")
    coordinator.do(insult)
    coordinator.event("attach")
    assert helper.number(f"await 0 {ATTACHED}") == ATTACHED
    assert helper.do("read 0 5") == "ok"
    assert helper.number(f"ensure 0 0 65536 {ECHO_MS}") == 0


@pytest.mark.parametrize(
    "obstacle", ["refuse-hello", "mute-once", "die-at-hello", "die-at-attach", "die-after-ack", "features"]
)
def test_restarted_coordinator_that_fails_again_is_tried_again(make: Make, obstacle: str) -> None:
    coordinator, helper = make(orphan_ms=60000)
    helper.attach()
    coordinator.event("hello")
    coordinator.do("hold")
    read = helper.start("read 0 10")
    coordinator.do(f"wrong {obstacle}")
    coordinator.do("hang-up")
    coordinator.event("hello")
    if obstacle.startswith("die"):
        coordinator.killed_itself()
        coordinator.restart()
    coordinator.do("wrong nothing")
    coordinator.do("hang-up")
    coordinator.do("serve")
    assert helper.result(read) == "ok"
    assert coordinator.total("foreign") == 0


def test_block_that_was_completed_meanwhile(make: Make) -> None:
    coordinator, helper = make(orphan_ms=60000)
    helper.attach()
    coordinator.do("place 0 16")
    coordinator.kill()
    assert helper.number(f"await 0 {ORPHANED}") == ORPHANED
    coordinator.restart()
    coordinator.do("finish")
    coordinator.do("hang-up")  # who has come back already is told by nobody else
    check_complete(helper)


def test_another_block_under_the_same_name_is_not_taken_for_ours(make: Make) -> None:
    """P1"""
    first, helper = make(orphan_ms=5000)
    helper.attach()
    assert helper.do("read 0 3") == "ok"
    first.kill()
    second, other = make()
    second.event("hello")
    check_lost(helper, "another coordinator listens")
    assert second.total("attach") == 0
    other.attach()
    assert other.do("read 0 9") == "ok"


def test_one_coordinator_that_is_stopped_holds_up_no_other(
    make: Make, programs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """P4: the sentinel waits for nobody."""
    stopped, helper = make(orphan_ms=60000)
    helper.attach(0)
    other = SmallCoordinator(programs("small_coordinator", "plain"), tmp_path / "o")
    try:
        helper.do(f"socket {tmp_path / 'o'}")
        helper.attach(1)
        stopped.do("hang-up")
        stopped.event("hung-up")
        with suspended(stopped.pid):
            assert helper.number(f"ensure 1 0 65536 {ECHO_MS}") == 0
            other.do("bye")
            assert helper.number(f"await 1 {COMPLETE}") == LOST
        assert helper.do("read 0 3") == "ok"
    finally:
        helper.do("drop 1")
        assert other.close() == 0


# ---- a coordinator that lies, dies or says nothing while a helper attaches ----

LIES = {
    "magic": (71, "no coordinator"),
    "tiny": (71, "no coordinator"),
    "version": (93, "install the same pcshare"),
    "type": (71, "message type 77"),
    "early-end": (71, "END"),
    "header-length": (71, "WELCOME"),
    "short": (71, "WELCOME"),
    "long": (71, "longer"),
    "no-fds": (71, "0 fds"),
    "one-fd": (71, "1 fds"),
    "unannounced-fd": (71, "number of fds"),
    "four-fds": (71, "4 fds"),
    "page-size": (71, "page size"),
    "map-length": (71, "page size"),
    "used-length": (71, "used length"),
    "long-memory": (71, "shorter than the block"),
    "pipe-memory": (71, "shorter than the block"),
    "block-index": (71, "status segment"),
    "no-status": (71, "status segment"),
    "mode": (71, "mode"),
    "ndim": (71, "array"),
    "name": (71, "another block"),
    "endless": (71, "no end"),
    "features": (22, "lacks features"),
    "refuse-hello": (1, "uid 7 may not attach; start the coordinator with --allow-uid 7"),
    "refuse-silently": (1, "the coordinator refuses: Operation not permitted"),
    "refuse-version": (93, "this coordinator speaks version 2 only"),
    "refuse-attach": (16, "too many helpers"),
    "ack-version": (93, "install the same pcshare"),
    "hang-up-at-hello": (104, "hung up"),
    "hang-up-at-attach": (104, "hung up"),
}


@pytest.mark.parametrize("lie", LIES)
def test_wrong_answer_is_refused_with_its_reason_and_leaves_nothing(make: Make, lie: str) -> None:
    coordinator, helper = make()
    error, text = LIES[lie]
    before = helper.number("fds")
    coordinator.do(f"wrong {lie}")
    number, said = refusal(helper.do(f"attach 0 ro {ECHO_MS}"))
    assert number == -error
    assert text in said
    assert helper.number("fds") == before
    coordinator.do("wrong nothing")
    helper.attach(0, "ro", place="at")
    assert helper.do("read 0 3") == "ok"
    assert coordinator.total("foreign") == 0


@pytest.mark.parametrize("step", ["mute", "mute-attach"])
@pytest.mark.parametrize("place", ["", "at"])
def test_coordinator_that_never_answers_is_a_timeout(make: Make, step: str, place: str) -> None:
    coordinator, helper = make()
    if place:
        helper.attach(1, "ro")  # sizes are asked for before it goes silent
    coordinator.do(f"wrong {step}")
    limit_ms = MUTE_MS if step == "mute-attach" else SOON_MS  # its HELLO is answered
    number, text = refusal(helper.do(f"attach 0 ro {limit_ms}"))
    assert number == -110
    assert ("ATTACH" if step == "mute-attach" else "HELLO") in text


def test_attaching_is_interrupted_by_a_signal(make: Make) -> None:
    coordinator, helper = make()
    coordinator.do("wrong mute")
    helper.write(f"main attach 0 ro {ECHO_MS}")
    coordinator.event("hello")

    def noticed() -> bool:
        os.kill(helper.process.pid, signal.SIGUSR1)
        return helper.count("main ") > 0

    wait_until(noticed, "an answer after the signal")
    assert refusal(helper.result("main"))[0] == -4


@pytest.mark.parametrize(("step", "outcome"), [("die-at-hello", -104), ("die-at-attach", -104), ("die-after-ack", 0)])
def test_coordinator_killed_at_each_step(make: Make, step: str, outcome: int) -> None:
    """P1, P7"""
    coordinator, helper = make(orphan_ms=60000)
    coordinator.do(f"wrong {step}")
    assert refusal(helper.do(f"attach 0 ro {ECHO_MS}"))[0] == outcome
    coordinator.killed_itself()
    coordinator.restart()
    if outcome:
        helper.attach()
    assert helper.do("read 0 5") == "ok"
    assert coordinator.total("foreign") == 0


def test_nobody_listens(make: Make) -> None:
    coordinator, helper = make()
    coordinator.do("deafen")
    assert refusal(helper.do(f"attach 0 ro {ECHO_MS}"))[0] == -111
    helper.do("socket /nowhere/s")
    assert refusal(helper.do(f"attach 0 ro {ECHO_MS}"))[0] == -2
    helper.do("socket " + "x" * 108)
    assert refusal(helper.do(f"attach 0 ro {ECHO_MS}"))[0] == -36


# ---- detaching ----


def test_detach_disturbs_nobody_not_even_who_waits_in_it(make: Make) -> None:
    coordinator, helper = make()
    helper.attach(0)
    helper.attach(1)
    coordinator.do("hold")
    reads = [helper.start(f"read {slot} 10") for slot in range(2)]
    ensure = helper.start(f"ensure 0 0 65536 {ECHO_MS}")
    coordinator.event("request")
    wait_until(lambda: is_in_fault(helper, 2), "both readers in their faults")
    helper.do("detach 0")
    assert helper.result(reads[0]) == "segv"
    assert refusal(helper.result(ensure))[0] == -125
    coordinator.event("leave")
    coordinator.do("serve")
    assert helper.result(reads[1]) == "ok"
    assert coordinator.total("foreign") == 0


def sleeping_places(helper: Helper) -> list[str]:
    return [path.read_text() for path in Path(f"/proc/{helper.process.pid}/task").glob("*/wchan")]


def is_in_fault(helper: Helper, n_threads: int) -> bool:
    """n threads of the helper sleep outside of any system call."""
    calls = [path.read_text().split()[0] for path in Path(f"/proc/{helper.process.pid}/task").glob("*/syscall")]
    return calls.count("-1") >= n_threads


@pytest.mark.parametrize("state", [ORPHANED, LOST])
def test_detach_works_whatever_became_of_the_coordinator(make: Make, state: int) -> None:
    coordinator, helper = make(orphan_ms=60000)
    helper.attach()
    if state == LOST:
        coordinator.do("bye")
    else:
        coordinator.kill()
    assert helper.number(f"await 0 {state}") == state
    helper.do("detach 0")


def test_attach_and_detach_again_and_again(make: Make) -> None:
    coordinator, helper = make()
    for page in range(16):
        helper.attach(page % 8, "ro")
        assert helper.do(f"read {page % 8} {page}") == "ok"
        helper.do(f"detach {page % 8}")
        coordinator.event("leave")


# ---- fork ----


@pytest.mark.parametrize("mode", ["ro", "rw", "cow"])
def test_child_of_fork_has_the_same_memory_at_the_same_place(make: Make, mode: str) -> None:
    """P1, T6"""
    coordinator, helper = make(options=("writable",) if mode == "rw" else ())
    helper.attach(0, mode)
    assert helper.do("read 0 3") == "ok"
    assert helper.do(f"fork a read 0 3;b read 0 9;c ensure 0 0 65536 {ECHO_MS};d state 0;e flags 0") == "0"
    assert [helper.result(tag) for tag in "ab"] == ["ok", "ok"]
    assert refusal(helper.result("c"))[0] == 0
    assert helper.result("d") == str(ATTACHED)
    assert "um" in helper.result("e")
    assert helper.do("join") == "exit 0"
    assert helper.do("read 0 10") == "ok"
    assert coordinator.total("foreign") == 0


def test_child_of_fork_keeps_its_copy_of_what_was_written(make: Make) -> None:
    _, helper = make()
    helper.attach(0, "cow")
    assert helper.do("write 0 5 77") == "ok"
    assert helper.do("fork a word 0 5 77;b write 0 5 78;c word 0 5 78;d read 0 6") == "0"
    assert [helper.result(tag) for tag in "abcd"] == ["ok"] * 4
    assert helper.do("join") == "exit 0"
    assert helper.do("word 0 5 77") == "ok"


def test_fork_while_other_threads_wait(make: Make) -> None:
    coordinator, helper = make(pages=64)
    helper.attach()
    coordinator.do("hold")
    read, ensure = helper.start("read 0 10"), helper.start(f"ensure 0 0 65536 {ECHO_MS}")
    coordinator.event("request")
    wait_until(lambda: is_in_fault(helper, 1), "the reader in its fault")
    assert helper.do(f"fork a ensure 0 131072 4096 {ECHO_MS};b read 0 10") == "0"
    coordinator.event("request")
    coordinator.do("place 0 64")
    assert refusal(helper.result("a"))[0] == 0
    assert helper.result("b") == "ok"
    assert helper.do("join") == "exit 0"
    assert helper.result(read) == "ok"
    assert refusal(helper.result(ensure))[0] == 0
    assert coordinator.total("request") == 0, "the child asked for nothing of its parent's"


def test_fork_while_a_thread_attaches(make: Make) -> None:
    """The child drops what was half made: a socket kept open in it would hide its parent's end from the coordinator."""
    coordinator, helper = make()
    coordinator.do("wrong mute-attach")
    tag = helper.start(f"attach 0 cow {ECHO_MS}")
    coordinator.event("attach")
    before = helper.number("fds")
    assert helper.do(f"fork a fds;b pause {SOON_MS}") == "0"
    assert int(helper.result("a")) < before
    coordinator.do("hang-up")
    assert refusal(helper.result(tag))[0] == -104
    coordinator.event("hung-up")
    helper.do("join")


def test_coordinator_sees_the_parents_end_although_a_child_lives(make: Make) -> None:
    coordinator, helper = make()
    helper.attach()
    coordinator.event("attach")
    assert helper.do("fork a read 0 3;b detach 0;c pause 20000") == "0"
    assert helper.result("a") == "ok"
    coordinator.event("leave")
    helper.do("detach 0")
    coordinator.event("leave")
    helper.do("end-child")


def test_fork_of_a_fork(make: Make) -> None:
    coordinator, helper = make()
    helper.attach(0, "ro")
    helper.attach(1, "cow")
    assert helper.do("fork s settle;x fork a read 0 5,b read 1 6,c read 0 7;y join") == "0"
    assert [helper.result(tag) for tag in "abc"] == ["ok"] * 3
    assert helper.result("y") == "exit 0"
    assert helper.do("join") == "exit 0"
    assert coordinator.total("foreign") == 0


def test_fork_without_a_coordinator(make: Make) -> None:
    """The child waits for the coordinator like its parent."""
    coordinator, helper = make(orphan_ms=60000)
    helper.attach()
    coordinator.kill()
    assert helper.number(f"await 0 {ORPHANED}") == ORPHANED
    assert helper.do("fork a state 0;b read 0 9") == "0"
    assert helper.result("a") == str(ORPHANED)
    coordinator.restart()
    assert helper.result("b") == "ok"
    assert helper.do("join") == "exit 0"


def test_fork_of_a_lost_block(make: Make) -> None:
    coordinator, helper = make()
    helper.attach(0, "ro")
    helper.attach(1, "cow")
    assert helper.do("read 0 3") == "ok"
    assert helper.do("write 1 4 77") == "ok"
    coordinator.do("bye")
    for slot in range(2):
        assert helper.number(f"await {slot} {LOST}") == LOST
    assert helper.do("read 1 9") == "sigbus"
    assert helper.do("fork a read 0 3;b read 0 9;c word 1 4 77;d read 1 9;e read 1 10;f state 1") == "0"
    assert [helper.result(tag) for tag in "abcdef"] == ["ok", "sigbus", "ok", "sigbus", "sigbus", str(LOST)]
    assert helper.do("join") == "exit 0"


def test_fork_of_a_complete_block_is_plain(make: Make) -> None:
    coordinator, helper = make()
    helper.attach()
    coordinator.do("place 0 16")
    coordinator.do("finish")
    coordinator.do("end")
    check_complete(helper)
    wait_until(lambda: helper.number("sentinels") == 0, "the sentinel's end")
    assert helper.do("fork a read 0 9;b sentinels;c state 0") == "0"
    assert [helper.result(tag) for tag in "abc"] == ["ok", "0", str(COMPLETE)]
    assert helper.do("join") == "exit 0"


def test_child_whose_place_is_taken_ends_with_a_message(make: Make) -> None:
    """T6: it must never read foreign memory."""
    _, helper = make()
    helper.attach()
    helper.do("rob 0")
    assert helper.do("fork a read 0 3") == "0"
    assert helper.do("join") == "exit 70"
    wait_until(lambda: "this child of a fork ends, its memory cannot be made anew" in helper.errors, "the message")
    assert helper.do("read 0 3") == "ok"
    assert helper.count("a ") == 0


def test_helper_that_dies_is_seen_at_once(make: Make, programs: Callable[[str, str], Path], runtime_dir: Path) -> None:
    coordinator, _ = make()
    victim = Helper(programs("helper_driver", "plain"), runtime_dir / "s")
    victim.attach()
    coordinator.event("attach")
    victim.process.kill()
    coordinator.event("hung-up")
    victim.close()


# ---- locked memory, and users without privileges ----


@pytest.mark.parametrize("mode", ["ro", "cow"])
def test_locked_memory_is_unlocked_for_the_duration(make_plain: Make, mode: str) -> None:
    """A6, T4"""
    needs(None if os.geteuid() == 0 else "root, for mlockall")
    coordinator, helper = make_plain(pages=64)
    assert helper.number("mlockall") == 0
    helper.attach(0, mode)
    assert helper.do("progress 0").split()[0] == "0", "attaching has brought nothing"
    assert coordinator.total("fault") == 0
    assert "lo" not in flags(helper)
    assert helper.do("read 0 3") == "ok"
    assert helper.do("fork a read 0 3;b read 0 9") == "0"
    assert [helper.result(tag) for tag in "ab"] == ["ok", "ok"]
    assert helper.do("join") == "exit 0"
    coordinator.do("place 0 64")
    coordinator.do("finish")
    coordinator.do("end")
    assert helper.number(f"await 0 {COMPLETE}") == COMPLETE
    wait_until(lambda: "lo" in flags(helper), "the lock again")
    assert helper.number("munlockall") == 0
    assert coordinator.total("foreign") == 0


def test_limit_of_locked_memory_is_named(make_plain: Make) -> None:
    needs(None if os.geteuid() == 0 else "root, to become another user")
    _, helper = make_plain(pages=1024, options=("device",))
    assert helper.number(f"memlock {2 << 20}") == 0
    assert helper.number(f"setuid {NOBODY}") == 0
    assert helper.number("mlockall") == 0
    number, text = refusal(helper.do(f"attach 0 ro {ECHO_MS}"))
    assert number == -11
    assert "ulimit -l" in text
    assert helper.number("munlockall") == 0


def test_user_without_privileges_uses_the_offered_device(make: Make) -> None:
    needs(None if os.geteuid() == 0 else "root, to open /dev/userfaultfd and to become another user")
    coordinator, helper = make(options=("device",))
    assert helper.number(f"setuid {NOBODY}") == 0
    helper.attach(0, "ro")
    assert helper.do("read 0 3") == "ok"
    assert helper.number("send 0 4") == 0, "a fault inside a system call"
    assert helper.do("fork a send 0 5;b read 0 6") == "0"
    assert [helper.result(tag) for tag in "ab"] == ["0", "ok"]
    assert helper.do("join") == "exit 0"
    assert coordinator.total("foreign") == 0


def test_user_without_privileges_and_without_the_device_gets_user_faults_only(make: Make) -> None:
    needs(None if os.geteuid() == 0 else "root, to become another user")
    setting = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip()
    needs(None if setting == "0" else "sysctl vm.unprivileged_userfaultfd=0")
    coordinator, helper = make()
    assert helper.number(f"setuid {NOBODY}") == 0
    helper.attach(0, "ro")
    assert helper.do("read 0 3") == "ok"
    assert helper.number("send 0 4") == -14
    assert helper.do("read 0 4") == "ok"
    assert coordinator.total("foreign") == 0


def test_run_out_of_fds_is_told_and_leaves_nothing(make: Make) -> None:
    _, helper = make()
    before = helper.number("fds")
    refusals = set()
    for spare in range(16):
        helper.do(f"nofile {before + spare}")
        number, text = refusal(helper.do(f"attach 0 ro {ECHO_MS}"))
        helper.do("nofile 1024")
        if number == 0:
            break
        refusals.add(number)
        assert "ulimit -n" in text or "Too many open files" in text
        assert helper.number("fds") == before
    assert number == 0, "with fds enough it works"
    assert refusals == {-24, -71}


# ---- as a C library ----


def test_library_needs_nothing_but_libc(programs: Callable[[str, str], Path]) -> None:
    program = str(programs("helper_driver", "plain"))
    needed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert {line.split()[0].split(".")[0].rsplit("/")[-1] for line in needed.splitlines()} <= {
        "linux-vdso",
        "libc",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
        "libpthread",
    }


def test_sentinel_blocks_all_signals(make: Make) -> None:
    _, helper = make()
    helper.attach()
    tasks = Path(f"/proc/{helper.process.pid}/task")
    wait_until(lambda: helper.number("sentinels") == 1, "the sentinel under its name")
    sentinel = next(task for task in tasks.iterdir() if (task / "comm").read_text().startswith("pcshare-sentine"))
    blocked = next(line for line in (sentinel / "status").read_text().splitlines() if line.startswith("SigBlk"))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1):
        assert int(blocked.split()[1], 16) & 1 << (number - 1)


def test_many_threads_at_once(make: Make) -> None:
    """Attach, read, ensure, fork and detach from several threads; what it is for is the thread sanitizer."""
    coordinator, helper = make(pages=256)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        tags = []
        for slot in range(4):
            tags.append(helper.start(f"attach {slot} {'cow' if slot % 2 else 'ro'} {ECHO_MS}"))
        assert {refusal(helper.result(tag))[0] for tag in tags} == {0}
        tags = [helper.start(f"read {slot} {page}") for slot in range(4) for page in range(0, 256, 37)]
        tags += [helper.start(f"ensure {slot} {slot * 65536} 65536 {ECHO_MS}") for slot in range(4)]
        assert {helper.result(tag).split()[0] for tag in tags} <= {"ok", "0"}
        tags = [helper.start(f"detach {slot}") for slot in range(4)]
        for tag in tags:
            helper.result(tag)
    assert coordinator.total("foreign") == 0
