"""P5 while a migration comes in: the coordinator is killed before LISTEN, after it, and when all is over. The source
takes up again what it has not sent, as after any other break; helpers wait, and read what the source holds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import suspend, wait_until
from support_migration import HUGE_PAGE, HungUp, Preempt, Refused, Source, SourceBlock, playing
from support_qemu import MIB, POSTCOPY, PREEMPT, UNLIMITED, Guest, Qemu, assert_same_memory
from support_scene import N_PAGES, RAM, each_preempt
from support_scene import Scene as AnyScene
from support_serving import PAGE, WAIT_S
from support_takeover import Restarting, restarting

SLOWLY = 0.25 * MIB  # bytes a second: the coordinator dies in the middle of it
# What is asked for is not held back on a preempt channel: nor must that be over before.
READ_SLOWLY = (  # a quarter, and the rest when it may go on
    f"b''.join((time.sleep(0.003), page < {N_PAGES // 4} or go_on.wait(), read(b, page * {PAGE}, {PAGE}))[2]"
    f" for page in range({N_PAGES}))"
)

Scene = AnyScene[Restarting]


@pytest.fixture
def scene(runtime_dir: Path, seed: int) -> Iterator[Scene]:
    path = runtime_dir / "migration.sock"
    with restarting(f"qemu+unix:{path}") as served:
        yield Scene(served, path, seed)


# ---- before LISTEN ----


def test_death_before_a_source_came(scene: Scene) -> None:
    """The address stays, and who attaches waits."""
    helper, attached = scene.attaching()
    for _ in range(2):
        scene.served.restart()
    assert not attached.is_done()
    assert scene.served.status().reason.startswith("waiting for a source at ")
    source = scene.source()
    with playing(source):
        attached.result()
        assert helper.do("bytes(b)") == source.memory(RAM)
    scene.assert_whole(source)


def test_death_before_listen_forgets_what_came(scene: Scene) -> None:
    """B1: as when the source breaks off; nothing of it survives. The source may come again, with other blocks too."""
    helper, attached = scene.attaching()
    broken = scene.source()

    def script(source: Source) -> None:
        source.connect()
        source.precopy(share=0.5)
        wait_until(lambda: scene.served.status().state == "ADVISE", "the blocks to be announced", WAIT_S)
        scene.served.restart()
        source.return_path.wait_for_hang_up()
        source.close()

    with playing(broken, script):
        pass
    assert scene.served.status().blocks == ()
    assert not attached.is_done()
    source = scene.source([SourceBlock("other", MIB, seed=7), SourceBlock(RAM, MIB, seed=8)])
    with playing(source):
        attached.result()
        assert helper.do("bytes(b)") == source.memory(RAM)
    scene.assert_whole(source)


# ---- after LISTEN ----


def recover(scene: Scene, source: Source, before: int) -> None:
    """What a source does when its receiver has died and serves again."""
    scene.served.wait_for_restart(before)
    scene.wait_for_state("PAUSED")
    source.recover()
    scene.wait_for_state("RUNNING")


@each_preempt
@pytest.mark.parametrize("share", [0.0, 0.5], ids=["at once", "after a pass"])
def test_death_in_postcopy(scene: Scene, preempt: Preempt, share: float) -> None:
    """G4, D3: what was received is kept, and the bitmaps say so; who waits goes on waiting."""
    waiting = [scene.attaching() for _ in range(2)]
    source = scene.source(preempt=preempt, rate_bytes_s=SLOWLY)
    may_kill = threading.Event()
    lacking: list[int] = []

    def script(source: Source) -> None:
        source.connect()
        if share:
            source.precopy(share)
        source.enter_postcopy()
        for _ in range(2):
            may_kill.set()
            before = scene.served.restarts
            with pytest.raises(HungUp):
                source.postcopy()
            recover(scene, source, before)
            lacking.append(sum(source.blocks[RAM].unsent))
        source.rate_bytes_s = None
        source.postcopy()
        source.finish()

    with playing(source, script):
        reads = []
        for helper, attached in waiting:
            attached.result()
            helper.do("import threading, time; go_on = threading.Event()")
            reads.append(helper.start(READ_SLOWLY))
        for _ in range(2):
            assert may_kill.wait(WAIT_S)
            may_kill.clear()
            enough = scene.here() + N_PAGES // 20
            wait_until(lambda enough=enough: scene.here() >= enough, "some pages", WAIT_S)  # type: ignore[misc]
            scene.served.kill()
        for helper, _ in waiting:
            helper.do("go_on.set()")
        for read in reads:
            assert read.result() == source.memory(RAM)
    scene.assert_whole(source)
    assert N_PAGES > lacking[0] > lacking[1]
    assert scene.served.restarts == 2


@each_preempt
def test_page_that_was_asked_for_of_a_dead_one_comes(scene: Scene, preempt: Preempt) -> None:
    """P3, D3: the next one asks again."""
    source = scene.source(preempt=preempt, only_requested=True, in_order=True)
    last = N_PAGES - 1

    def script(source: Source) -> None:
        source.connect()
        source.enter_postcopy()
        helper = scene.attached()
        read = helper.start(f"read(b, {last * PAGE}, {PAGE})")
        ensured = helper.start(f"b.ensure(slice({5 * PAGE}, {9 * PAGE})); read(b, {5 * PAGE}, {4 * PAGE})")
        wait_until(lambda: bool(source.return_path.requests), "a request", WAIT_S)
        recover_after(scene, source, scene.served.kill())
        rest = threading.Thread(target=source.postcopy)
        rest.start()
        assert read.result() == source.blocks[RAM].page(last)
        assert ensured.result() == b"".join(source.blocks[RAM].page(page) for page in range(5, 9))
        source.release()
        rest.join(WAIT_S)
        source.finish()

    with playing(source, script):
        pass
    scene.assert_whole(source)


def recover_after(scene: Scene, source: Source, before: int) -> None:
    source.return_path.wait_for_hang_up()
    recover(scene, source, before)


def test_death_while_paused_and_in_recovery(scene: Scene) -> None:
    source = scene.source(rate_bytes_s=SLOWLY)
    helper, attached = scene.attaching()

    def script(source: Source) -> None:
        source.connect()
        source.enter_postcopy()
        source.main.break_at = source.main.written + 100_000
        with contextlib.suppress(Exception):
            source.postcopy()
        scene.wait_for_state("PAUSED")
        scene.served.restart()
        scene.wait_for_state("PAUSED")
        source.begin_recovery()
        source.ask_bitmaps()
        before = scene.served.kill()
        recover_after(scene, source, before)
        source.rate_bytes_s = None
        source.postcopy()
        source.finish()

    with playing(source, script):
        attached.result()
        assert helper.do("bytes(b)") == source.memory(RAM)
    scene.assert_whole(source)


def test_death_with_huge_pages(scene: Scene, huge_pages: Callable[[int], None]) -> None:
    huge_pages(8)
    block = SourceBlock(RAM, 4 * HUGE_PAGE, page_size=HUGE_PAGE, seed=3)
    source = scene.source([block], rate_bytes_s=1.0 * MIB)
    helper, attached = scene.attaching()

    def script(source: Source) -> None:
        source.connect()
        source.enter_postcopy()
        before = scene.served.restarts
        with pytest.raises(HungUp):
            source.postcopy()
        recover(scene, source, before)
        source.rate_bytes_s = None
        source.postcopy()
        source.finish()

    with playing(source, script):
        attached.result()
        read = helper.start("bytes(b)")
        wait_until(lambda: scene.here() >= 1, "a page", WAIT_S)
        scene.served.kill()
        assert read.result() == source.memory(RAM)
    scene.assert_whole(source)


def test_death_after_the_end(scene: Scene) -> None:
    """Nobody listens for a source any more, nobody waits for one, and the blocks stay; also while a helper is stopped,
    and has not let go of its block."""
    source = scene.source()
    with playing(source):
        helper, stopped = scene.attached(), scene.attached()
        suspend(stopped.pid)
        helper.do("b.wait()")
    scene.assert_whole(source)
    wait_until(lambda: not scene.listens(), "an end of listening", WAIT_S)
    for _ in range(2):
        assert not scene.listens()
        scene.served.restart()
        assert (scene.served.status().state, scene.served.status().reason) == ("END", "")
        assert helper.do("bytes(b)") == source.memory(RAM)
        scene.assert_whole(source)
    os.kill(stopped.pid, signal.SIGCONT)
    assert stopped.do("bytes(b)") == source.memory(RAM)
    assert not scene.path.exists()


def test_death_after_an_end_that_was_no_good_one(scene: Scene) -> None:
    """P3: what never came will not come now either, and who waits for it waits, visibly."""
    source = scene.source()

    def script(source: Source) -> None:
        source.connect()
        source.enter_postcopy()
        with pytest.raises(Refused):
            source.finish()

    with playing(source, script):
        helper = scene.attached()
        touch = helper.start("read(b, 0)")
    wait_until(lambda: "pages never came" in scene.served.status().reason, "the end to be noticed", WAIT_S)
    for _ in range(2):
        scene.served.restart()
        scene.wait_for_state("PAUSED")
        assert "pages never came" in scene.served.status().reason
        assert not scene.listens()
        scene.served.wait_for_waiting(1)
    assert not touch.is_done()


# ---- a real QEMU ----


@pytest.mark.parametrize("capabilities", [(POSTCOPY,), (POSTCOPY, PREEMPT)], ids=["one channel", "preempt"])
def test_machine_is_whole_although_its_receiver_was_killed(
    scene: Scene, tmp_path: Path, capabilities: tuple[str, ...]
) -> None:
    """P5, P6: three times. QEMU is told to migrate again, with resume, as after any break."""
    helper, attached = scene.attaching()
    with Qemu(Guest(), tmp_path) as source:
        source.set_capabilities(*capabilities)
        source.set_parameters(max_postcopy_bandwidth=8 * MIB)
        source.migrate(f"unix:{scene.path}")
        source.start_postcopy()
        content = source.memory()
        attached.result()
        read = helper.start("bytes(b)")
        for _ in range(3):
            enough = scene.here() + 200
            wait_until(lambda enough=enough: scene.here() >= enough, "some pages", WAIT_S)  # type: ignore[misc]
            before = scene.served.kill()
            source.wait_for_migration("postcopy-paused")
            scene.served.wait_for_restart(before)
            scene.wait_for_state("PAUSED")
            source.resume_migration(f"unix:{scene.path}")
            scene.wait_for_state("RUNNING")
        source.set_parameters(max_postcopy_bandwidth=UNLIMITED)
        source.wait_for_migration("completed")
        assert_same_memory(read.result(), content)
    scene.wait_for_state("END")
    scene.served.restart()
    assert_same_memory(scene.attached().do("bytes(b)"), content)
    assert all(block.foreign_pages == 0 for block in scene.served.status().blocks)


def test_machine_comes_again_after_a_death_in_precopy(scene: Scene, tmp_path: Path) -> None:
    helper, attached = scene.attaching()
    with Qemu(Guest(), tmp_path) as source:
        source.set_capabilities(POSTCOPY)
        source.set_parameters(downtime_limit=1, max_bandwidth=20 * MIB)
        source.migrate(f"unix:{scene.path}")
        wait_until(lambda: scene.served.status().state == "ADVISE", "precopy", WAIT_S)
        scene.served.restart()
        wait_until(lambda: source.migration().get("status") == "failed", "QEMU to give up", WAIT_S)
        assert not attached.is_done()
        source.set_parameters(max_bandwidth=UNLIMITED)
        source.migrate(f"unix:{scene.path}")
        source.start_postcopy()
        content = source.memory()
        attached.result()
        assert_same_memory(helper.do("bytes(b)"), content)
        source.wait_for_migration("completed")
