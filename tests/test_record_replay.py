"""--record and --replay: what helpers touch first is written down in that order, and comes first the next time."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

import pcshare
from core_support import child
from pcshare import working_set
from pcshare.core import lib
from pcshare.errors import UsageError, WorkingSetError
from pcshare.fault_thread import EventKind, FaultEvent
from pcshare.protocol import AdminOp
from pcshare.trace import read_trace
from pcshare.working_set import Run, Runs, SetBlock, WorkingSet
from support import has_ended, wait_until
from support_coordinator import die_with_parent
from support_rig import PushSource, Rig
from support_serving import EAGER, HUGE_PAGE, LAZY, PAGE, PAUSED, RATE, WAIT_S, make_file, page_of, serving
from support_takeover import restarting

N_PAGES = 4000
SMALL_PIECES = 48  # of stream.c
LENGTH = N_PAGES * PAGE - 1234
FAR = 20  # pages between two that no request joins
PCSHARE = [sys.executable, "-m", "pcshare"]
COMMAND_TIMEOUT_S = 60.0
THREAD_ID = lib.UFFD_FEATURE_BIT_THREAD_ID


@pytest.fixture
def ws(tmp_path: Path) -> Path:
    (tmp_path / "sets").mkdir()
    return tmp_path / "sets" / "ws"


@pytest.fixture
def sources() -> list[PushSource]:
    """Two, and what is added, which live as long as the rig that calls them."""
    return [PushSource(), PushSource()]


@pytest.fixture
def rig(sources: list[PushSource]) -> Iterator[Rig]:
    made = Rig(f"rig-{os.getpid()}")
    yield made
    made.close()


def write_set(path: Path, runs: Sequence[Run], *blocks: SetBlock) -> None:
    blocks = blocks or (SetBlock("data", LENGTH, PAGE),)
    path.write_bytes(working_set.pack(WorkingSet(blocks, Runs.of(runs))))


def recorded(path: Path) -> list[tuple[str, int, int]]:
    """(block, first page, how many) of each run that a file has."""
    found = working_set.read(str(path))
    return [(found.blocks[place].idstr, page, count) for place, page, count in found.runs]


def pages_in(path: Path) -> list[int]:
    return [at for _, page, count in recorded(path) for at in range(page, page + count)]


def requests(trace: Path) -> list[tuple[int, int, int]]:
    """(block, first page, how many) of what the stream asked the source for."""
    return [(one.block_index, one.page, one.detail) for one in read_trace(str(trace)) if one.event == "stream_request"]


def touch(pages: Sequence[int]) -> str:
    return f"[read(b, page * {PAGE}) for page in {list(pages)}]"


def replay_has_ended(caplog: pytest.LogCaptureFixture) -> bool:
    return any(re.match(r"replayed in \d+\.\d s", message) for message in caplog.messages)


def wait_for_replay(caplog: pytest.LogCaptureFixture) -> None:
    wait_until(lambda: replay_has_ended(caplog), "an end of the replay", WAIT_S)


# ---- recording ----


def test_file_has_the_order_of_the_first_touches_of_all_helpers_and_blocks(
    runtime_dir: Path, data_file: Path, ws: Path
) -> None:
    """Each page once, whoever touches it again; a range that was waited for in its place; a prefetched one not."""
    with serving(f"a={data_file}", f"b={data_file}", stream_mode=LAZY, record=str(ws)) as served:
        one, two = served.helper(), served.helper()
        one.do(f"b = attach('a'); {touch([700, 3])}")
        two.do(f"b = attach('b'); {touch([3, 9])}; a = attach('a'); read(a, 700 * {PAGE}); read(a, 5 * {PAGE})")
        one.do(f"{touch([5, 4, 3, 6])}; b.ensure(slice({100 * PAGE}, {110 * PAGE} - 1))")
        one.do(f"b.prefetch(slice({500 * PAGE}, {510 * PAGE})); b.ensure(slice({95 * PAGE}, {105 * PAGE}))")
        two.do(touch([8, 9, 10]))
    assert recorded(ws) == [
        *[("a", 700, 1), ("a", 3, 1), ("b", 3, 1), ("b", 9, 1), ("a", 5, 1), ("a", 4, 1), ("a", 6, 1)],
        *[("a", 100, 10), ("a", 95, 5), ("b", 8, 1), ("b", 10, 1)],
    ]
    assert working_set.read(str(ws)).blocks == (SetBlock("a", LENGTH, PAGE), SetBlock("b", LENGTH, PAGE))


def test_pages_in_a_row_are_one_run(runtime_dir: Path, data_file: Path, ws: Path) -> None:
    with serving(f"data={data_file}", stream_mode=LAZY, record=str(ws)) as served:
        served.helper().do(f"b = attach(); {touch(range(50, 250))}; b.ensure(slice({250 * PAGE}, {999 * PAGE}))")
    assert recorded(ws) == [("data", 50, 949)]


def test_file_is_written_while_it_runs(runtime_dir: Path, data_file: Path, ws: Path) -> None:
    """What a coordinator that is killed for good loses is a few seconds'; and an empty one is there from the start."""
    with serving(f"data={data_file}", stream_mode=LAZY, record=str(ws)) as served:
        assert recorded(ws) == []
        helper = served.helper()
        helper.do(f"b = attach(); {touch([7, 8, 100])}")
        wait_until(lambda: recorded(ws) == [("data", 7, 2), ("data", 100, 1)], "the file", WAIT_S)
        helper.do(touch([101, 5]))
        wait_until(lambda: recorded(ws) == [("data", 7, 2), ("data", 100, 2), ("data", 5, 1)], "the rest", WAIT_S)
        assert os.listdir(ws.parent) == ["ws"]


def test_file_is_written_when_every_page_is_here(
    runtime_dir: Path, data_file: Path, ws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: nothing can follow."""
    monkeypatch.setattr("pcshare.coordinator.working_sets.SAVE_INTERVAL_S", 3600.0)
    with serving(f"data={data_file}", stream_mode=LAZY, record=str(ws)) as served:
        helper = served.helper()
        helper.do("b = attach(); b.ensure(); b.close()")
        wait_until(lambda: recorded(ws) == [("data", 0, N_PAGES)], "the file", WAIT_S)


def test_recording_stops_where_the_limit_is(
    runtime_dir: Path, data_file: Path, ws: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And says so; pages come as before."""
    monkeypatch.setattr(working_set, "RUNS_MAX", 3)
    with serving(f"data={data_file}", stream_mode=LAZY, record=str(ws)) as served:
        served.helper().do(f"b = attach(); {touch([10, 20, 30, 40, 50])}")
    assert recorded(ws) == [("data", 10, 1), ("data", 20, 1), ("data", 30, 1)]
    assert [message for message in caplog.messages if "has stopped: a working set has 3 runs at most" in message]


def test_folder_that_goes_away_is_said_once_and_nobody_waits(
    runtime_dir: Path,
    data_file: Path,
    ws: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    content: bytes,
) -> None:
    monkeypatch.setattr("pcshare.coordinator.working_sets.SAVE_INTERVAL_S", 0.01)
    with serving(f"data={data_file}", stream_mode=LAZY, record=str(ws)) as served:
        helper = served.helper()
        shutil.rmtree(ws.parent)
        helper.do(f"b = attach(); {touch([10])}")
        wait_until(lambda: "cannot write the working set" in caplog.text, "the warning", WAIT_S)
        assert helper.do("bytes(b)") == content
        ws.parent.mkdir()
        wait_until(ws.exists, "the file", WAIT_S)
    assert caplog.text.count("cannot write the working set") == 1
    assert pages_in(ws)[0] == 10
    assert sorted(pages_in(ws)) == list(range(N_PAGES))


def test_without_a_word_on_the_stream_a_first_recording_is_lazy(runtime_dir: Path, data_file: Path, ws: Path) -> None:
    for options, stream in [
        ({"record": ws}, "lazy"),
        ({"record": ws, "stream": "eager"}, "eager"),
        ({"record": ws.with_name("new"), "replay": ws.with_name("new")}, "lazy"),
        ({"record": ws, "replay": ws}, "eager"),
        ({"replay": ws}, "eager"),
        ({}, "eager"),
    ]:
        with pcshare.Coordinator(blocks={"data": str(data_file)}, **options) as made:  # type: ignore[arg-type]
            assert made.status().stream == stream, options


# ---- replaying ----


def test_second_start_has_the_recorded_pages_before_they_are_touched(
    runtime_dir: Path, data_file: Path, ws: Path, content: bytes, rng: random.Random, caplog: pytest.LogCaptureFixture
) -> None:
    pages = rng.sample(range(N_PAGES - 1), 200)
    with serving(f"data={data_file}#delay=1ms", stream_mode=LAZY, record=str(ws)) as served:
        served.helper().do(f"b = attach(); {touch(pages)}")
        assert served.status().faults == 200
    assert pages_in(ws) == pages
    with serving(f"data={data_file}#delay=1ms", stream_mode=LAZY, replay=str(ws)) as served:
        wait_for_replay(caplog)
        helper = served.helper()
        found = helper.do(f"b = attach(); [read(b, page * {PAGE}, {PAGE}) for page in {pages}]")
        assert found == [content[page * PAGE : (page + 1) * PAGE] for page in pages]
        assert served.status().faults == 0
        assert served.block().demand_pages == 0
        assert served.block().received_pages < N_PAGES
    begin = next(message for message in caplog.messages if message.startswith("replaying"))
    assert re.fullmatch(rf"replaying 200 pages in \d+ runs from {re.escape(str(ws))}", begin)


@pytest.mark.parametrize("mode", [EAGER, LAZY, RATE, PAUSED])
def test_replay_comes_first_in_every_mode_and_in_its_order(
    runtime_dir: Path, data_file: Path, ws: Path, tmp_path: Path, mode: int
) -> None:
    """Over several blocks, each page once, and the background behind it."""
    touched = [(0, 3000, 2), (1, 40, 1), (0, 500, 1), (1, 2000, 3), (0, 100, 1), (0, 3002, 1)]
    write_set(ws, touched, SetBlock("a", LENGTH, PAGE), SetBlock("b", LENGTH, PAGE))
    trace = tmp_path / "trace"
    with serving(
        f"a={data_file}", f"b={data_file}", stream_mode=mode, stream_rate=1, replay=str(ws), trace=str(trace)
    ) as served:
        wait_until(lambda: len(requests(trace)) >= 5, "the replay", WAIT_S)
        if mode == EAGER:
            served.wait_for_state("END", "a")
            served.wait_for_state("END", "b")
    asked = requests(trace)
    assert asked[:5] == [(0, 3000, 3), (1, 40, 1), (0, 500, 1), (1, 2000, 3), (0, 100, 1)]
    if mode == EAGER:
        assert sum(n_pages for *_, n_pages in asked) == 2 * N_PAGES
    if mode in (LAZY, PAUSED):
        assert len(asked) == 5


def test_demand_does_not_wait_for_the_replay(
    runtime_dir: Path, data_file: Path, ws: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A page behind two hundred that take two seconds each is there before they are."""
    write_set(ws, [(0, page, 1) for page in range(0, N_PAGES - 1, FAR)])
    with serving(f"data={data_file}#delay=2s", stream_mode=LAZY, replay=str(ws)) as served:
        helper = served.helper()
        helper.do("b = attach()")
        assert helper.do(f"read(b, {(N_PAGES - 2) * PAGE}, 9)") == content[(N_PAGES - 2) * PAGE :][:9]
        assert not replay_has_ended(caplog)
        helper.do(f"b.ensure(slice({FAR // 2 * PAGE}, {(FAR // 2 + 1) * PAGE}))")
        assert not replay_has_ended(caplog)


def test_source_that_fails_meanwhile_is_asked_for_the_rest_when_it_is_resumed(
    runtime_dir: Path, data_file: Path, ws: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pages = list(range(0, N_PAGES - 1, FAR))
    write_set(ws, [(0, page, 1) for page in pages])
    broken = tmp_path / "broken"
    broken.touch()
    with serving(f"data={data_file}#delay=1ms&error=EIO@{broken}", stream_mode=LAZY, replay=str(ws)) as served:
        served.wait_for_state("PAUSED")
        assert served.block().received_pages == 0
        assert not replay_has_ended(caplog)
        broken.unlink()
        served.order(AdminOp.RESUME)
        # Of several that failed one may be told only now, which pauses the block again.
        served.resume_until(lambda: replay_has_ended(caplog), "the end of the replay")
        served.wait_for_counts(received_pages=len(pages))


def test_replay_ends_where_the_stream_has_brought_everything(
    runtime_dir: Path, data_file: Path, ws: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_set(ws, [(0, page, 1) for page in range(0, N_PAGES - 1, FAR)])
    with serving(f"data={data_file}", stream_mode=EAGER, replay=str(ws)) as served:
        served.wait_for_state("END")
        wait_for_replay(caplog)
        assert served.block().received_pages == N_PAGES


# ---- both ----


def test_one_file_for_both_is_recorded_first_and_then_replayed_and_added_to(
    runtime_dir: Path, data_file: Path, ws: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is not there at first; what was replayed stays in it, touched or not."""
    both: dict[str, Any] = {"record": str(ws), "replay": str(ws), "stream_mode": LAZY}
    with serving(f"data={data_file}", **both) as served:
        served.helper().do(f"b = attach(); {touch([900, 30, 31])}")
    assert pages_in(ws) == [900, 30, 31]
    with serving(f"data={data_file}", **both) as served:
        wait_for_replay(caplog)
        served.helper().do(f"b = attach(); {touch([900, 3000, 30, 5])}")
        assert served.status().faults == 2
    assert pages_in(ws) == [900, 30, 31, 3000, 5]
    with serving(f"data={data_file}", **both):
        pass
    assert pages_in(ws) == [900, 30, 31, 3000, 5]


def test_recording_to_another_file_begins_with_what_is_replayed(
    runtime_dir: Path, data_file: Path, ws: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_set(ws, [(0, 700, 1)])
    other = ws.with_name("other")
    with serving(f"data={data_file}", stream_mode=LAZY, replay=str(ws), record=str(other)) as served:
        wait_for_replay(caplog)
        served.helper().do(f"b = attach(); {touch([700, 1])}")
    assert (pages_in(other), pages_in(ws)) == ([700, 1], [700])


def test_recording_alone_begins_anew(runtime_dir: Path, data_file: Path, ws: Path) -> None:
    write_set(ws, [(0, 700, 1)])
    with serving(f"data={data_file}", stream_mode=LAZY, record=str(ws)) as served:
        served.helper().do(f"b = attach(); {touch([2])}")
    assert pages_in(ws) == [2]


def test_start_that_fails_leaves_the_old_set(runtime_dir: Path, data_file: Path, ws: Path) -> None:
    write_set(ws, [(0, 700, 1)])
    with pytest.raises(pcshare.errors.SourceError), serving("data=/no/such/file", record=str(ws)):
        pass
    assert pages_in(ws) == [700]


def test_file_that_cannot_be_written_is_said_at_the_start(
    runtime_dir: Path, data_file: Path, ws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not at the end of a day."""

    def fail(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    write_set(ws, [(0, 700, 1)])
    with (
        pytest.raises(WorkingSetError, match=f"cannot write the working set {ws}: No space left"),
        serving(f"data={data_file}", record=str(ws)),
    ):
        pass
    assert pages_in(ws) == [700]
    assert os.listdir(ws.parent) == ["ws"]


# ---- what is served differs from what was recorded ----


def test_block_that_is_not_served_is_ignored_with_a_warning(
    runtime_dir: Path, data_file: Path, ws: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_set(ws, [(0, 5, 1), (1, 7, 1)], SetBlock("gone", LENGTH, PAGE), SetBlock("data", LENGTH, PAGE))
    with serving(f"data={data_file}", stream_mode=LAZY, replay=str(ws)) as served:
        wait_for_replay(caplog)
        assert served.block().received_pages == 1
    assert f"working set {ws}: block gone is not served" in caplog.text


@pytest.mark.parametrize("pages_then", [N_PAGES // 2, N_PAGES * 2])
def test_pages_that_exist_of_a_source_of_another_size_are_replayed_with_a_warning(
    runtime_dir: Path, data_file: Path, ws: Path, caplog: pytest.LogCaptureFixture, pages_then: int
) -> None:
    touched = [page for page in (5, 1000, N_PAGES - 1, N_PAGES, N_PAGES + 500) if page < pages_then]
    write_set(ws, [(0, page, 1) for page in touched], SetBlock("data", pages_then * PAGE, PAGE))
    with serving(f"data={data_file}", stream_mode=LAZY, replay=str(ws)) as served:
        wait_for_replay(caplog)
        assert served.block().received_pages == sum(page < N_PAGES for page in touched)
    assert f"had {pages_then * PAGE} bytes and has {LENGTH}" in caplog.text


def test_set_of_small_pages_is_replayed_in_huge_ones_and_the_reverse(
    runtime_dir: Path,
    tmp_path: Path,
    ws: Path,
    rng: random.Random,
    caplog: pytest.LogCaptureFixture,
    huge_pages: Callable[[int], None],
) -> None:
    huge_pages(6)
    path = make_file(tmp_path, rng, 5 * HUGE_PAGE + 77)
    with serving(f"data={path}", stream_mode=LAZY, record=str(ws)) as served:
        served.helper().do(f"b = attach(); {touch([3 * 512 + 9, 3 * 512 + 1, 5 * 512])}")
    with serving(f"data={path}", stream_mode=LAZY, page_size=HUGE_PAGE, replay=str(ws), record=str(ws)) as served:
        wait_for_replay(caplog)
        helper = served.helper()
        assert helper.do(f"b = attach(); b.is_received(slice({3 * HUGE_PAGE}, {4 * HUGE_PAGE}))")
        assert (served.block().received_pages, served.block().page_count) == (2, 6)
    assert recorded(ws) == [("data", 3, 1), ("data", 5, 1)]
    caplog.clear()
    with serving(f"data={path}", stream_mode=LAZY, replay=str(ws)) as served:
        wait_for_replay(caplog)
        assert served.block().received_pages == 512 + 1


# ---- restarts ----


def test_killed_coordinator_goes_on_recording(runtime_dir: Path, data_file: Path, ws: Path, tmp_path: Path) -> None:
    """Twice, and loses nothing: what it noted outlives it. Who only waited for its answer is in it once."""
    broken = tmp_path / "broken"
    source = f"data={data_file}#error=EIO@{broken}"
    with restarting(source, options=["--stream=lazy", f"--record={ws}"]) as served:
        helper = served.attached()
        helper.do(touch([900, 20]))
        broken.touch()
        pending = helper.start(touch([400]))
        served.wait_for_waiting(1)
        broken.unlink()
        served.restart()
        pending.result()
        helper.do(touch([20, 5]))
        served.restart()
        helper.do(touch([6, 900, 3]))
    assert pages_in(ws) == [900, 20, 400, 5, 6, 3]


def test_killed_coordinator_goes_on_replaying(runtime_dir: Path, data_file: Path, ws: Path) -> None:
    pages = list(range(0, N_PAGES - 1, FAR))
    write_set(ws, [(0, page, 1) for page in pages])
    with restarting(f"data={data_file}#delay=50ms", options=["--stream=lazy", f"--replay={ws}"]) as served:
        wait_until(lambda: served.block().received_pages > 5, "the first pages", WAIT_S)
        served.restart()
        wait_until(lambda: served.block().received_pages == len(pages), "the rest", WAIT_S)
        served.attached().do(touch(pages))
        assert served.status().faults == 0


def test_file_that_went_bad_meanwhile_keeps_no_coordinator_from_going_on(
    runtime_dir: Path, data_file: Path, ws: Path, content: bytes
) -> None:
    write_set(ws, [(0, 1, 1)])
    with restarting(f"data={data_file}", options=["--stream=lazy", f"--replay={ws}"]) as served:
        ws.write_text("garbage")
        served.restart()
        assert served.attached().do(f"read(b, {70 * PAGE}, 9)") == content[70 * PAGE :][:9]
        assert served.restarts == 1


def test_upgrade_goes_on_recording_and_can_begin_it(runtime_dir: Path, data_file: Path, ws: Path) -> None:
    """A set that is given with --replace begins with what is touched from then on."""
    with restarting(f"data={data_file}", options=["--stream=lazy"]) as served:
        helper = served.attached()
        helper.do(touch([900]))
        replace(served.name, f"--record={ws}")
        helper.do(touch([900, 30]))
        replace(served.name)
        helper.do(touch([30, 2]))
        served.restart()
        helper.do(touch([7]))
    assert pages_in(ws) == [30, 2, 7]


def replace(name: str, *options: str) -> None:
    told = run("coordinator", f"--name={name}", "--replace", *options)
    assert told.returncode == 0, told.stderr


def test_killed_with_its_keeper_it_leaves_a_file(runtime_dir: Path, data_file: Path, ws: Path) -> None:
    with pcshare.Coordinator(blocks={"data": str(data_file)}, record=ws) as made, made.attach() as block:
        block.ensure(slice(5 * PAGE, 9 * PAGE))
        wait_until(lambda: pages_in(ws) == [5, 6, 7, 8], "the file", WAIT_S)
        report = made.status()
        processes = [psutil.Process(pid) for pid in (report.keeper_pid, report.pid)]
        for process in processes:
            process.send_signal(signal.SIGKILL)
        wait_until(lambda: all(map(has_ended, processes)), "their end")
    assert pages_in(ws) == [5, 6, 7, 8]


# ---- refusals ----


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PCSHARE, *arguments], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, preexec_fn=die_with_parent
    )


def good_set() -> bytes:
    return working_set.pack(WorkingSet((SetBlock("data", LENGTH, PAGE),), Runs.of([(0, 5, 1)])))


BAD_FILES = {
    "missing": (None, "there is no working set {path}\n  record it first"),
    "empty": (b"", "cannot use {path} as a working set: it is empty\n  record it anew"),
    "garbage": (b"x" * 1000, "cannot use {path} as a working set: it is no working set\n  record it anew"),
    "truncated": (good_set()[:-3], "cannot use {path} as a working set: it should have "),
    "longer": (good_set() + b"\0", "cannot use {path} as a working set: it should have "),
    "damaged": (good_set()[:-1] + b"\xff", "cannot use {path} as a working set: it is damaged"),
    "of another version": (
        good_set()[:8] + b"\x09" + good_set()[9:], "it is a working set of version 9, this pcshare reads version 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_before_anything_is_served(runtime_dir: Path, data_file: Path, ws: Path, name: str) -> None:
    """With exit code 1; and the file is as it was, also where it was to be recorded to."""
    content, text = BAD_FILES[name]
    if content is not None:
        ws.write_bytes(content)
    coordinator = run("coordinator", f"--name=c-{os.getpid()}", f"--replay={ws}", f"data={data_file}")
    job = run("run", f"--replay={ws}", f"data={data_file}", "--", "echo", "not to be run")
    for done in (coordinator, job):
        assert (done.returncode, done.stdout) == (1, "")
        assert text.format(path=ws) in done.stderr
    if content is not None:
        both = run("run", f"--replay={ws}", f"--record={ws}", f"data={data_file}", "--", "true")
        assert both.returncode == 1
        assert ws.read_bytes() == content
    with pytest.raises(WorkingSetError):
        pcshare.Coordinator(blocks={"data": str(data_file)}, replay=ws).start()


def test_file_that_is_no_working_set_is_not_recorded_over(runtime_dir: Path, data_file: Path) -> None:
    before = data_file.read_bytes()
    done = run("run", f"--record={data_file}", f"data={data_file}", "--", "true")
    assert done.returncode == 1
    assert f"{data_file} is no working set: it is not overwritten" in done.stderr
    assert data_file.read_bytes() == before


def test_place_where_no_file_can_be_is_wrong_usage(runtime_dir: Path, data_file: Path, ws: Path) -> None:
    done = run("run", "--record=/no/such/folder/ws", f"data={data_file}", "--", "true")
    assert done.returncode == 2
    assert "--record /no/such/folder/ws: no file can be made there" in done.stderr
    ws.symlink_to(data_file)
    with pytest.raises(UsageError, match="that is a symbolic link"):
        pcshare.Coordinator(blocks={"data": str(data_file)}, record=ws).start()


def test_memory_of_a_machine_is_not_recorded(runtime_dir: Path, ws: Path) -> None:
    for option in ("record", "replay"):
        done = run("coordinator", "--name=vm", f"--{option}={ws}", f"qemu+unix:{runtime_dir}/vm.sock")
        assert done.returncode == 2
        assert "--record and --replay are for sources that are the same at each start" in done.stderr


# ---- the command line ----


def test_run_records_and_replays_and_says_so(runtime_dir: Path, data_file: Path, ws: Path) -> None:
    job = f"import pcshare\nwith pcshare.attach() as b: print(b[7 * {PAGE}] + b[900 * {PAGE}])"
    options = [f"--record={ws}", f"--replay={ws}", "--json"]
    told = []
    for _ in range(2):
        done = run("run", *options, f"data={data_file}", "--", sys.executable, "-c", job)
        assert done.returncode == 0, done.stderr
        told.append((json.loads(done.stdout.splitlines()[-1]), done.stderr))
    assert told[0][0]["helpers"]["faults"] == 2
    assert "replaying" not in told[0][1]
    assert pages_in(ws) == [7, 900]
    assert f"pcshare: replaying 2 pages in 2 runs from {ws}" in told[1][1]


@pytest.mark.parametrize("command", ["run", "coordinator"])
def test_help_says_what_recording_can_see(command: str) -> None:
    text = re.sub(r"\s+", " ", run(command, "--help").stdout)
    assert "--record FILE Write down which pages are touched first" in text
    assert (
        "Only what is waited for can be seen: without --stream, and with nothing to replay, the stream is lazy." in text
    )
    assert "--replay FILE Bring first what was recorded there, in every mode of the stream." in text
    assert "[default: eager; lazy where a first working set is recorded]" in text


# ---- at the core's level ----


def test_demand_goes_ahead_of_two_hundred_thousand_runs(rig: Rig, sources: list[PushSource]) -> None:
    """Of all these the source is asked for a few at once, and a page that somebody touches meanwhile is asked for
    before any of them is answered."""
    n_runs, source = 200_000, sources[0]
    ram = rig.add_pushed(source, 2 * n_runs)
    rig.threads.start([-1, -1])
    rig.threads.replay((2 * (n_runs - 1 - number), 1, 0) for number in range(n_runs))
    last = 2 * (n_runs - 1)
    window = [(last - 2 * number, 1) for number in range(SMALL_PIECES)]
    source.wait_until_asked(*window)
    with child(ram.helper_memfd(writing=False), ram.map_length, features=THREAD_ID) as helper:
        number, control = rig.add_remote(ram, helper)
        helper.tell(f"touch {5 * PAGE}")
        source.wait_until_asked(*window, (5, 1))
        assert rig.push(5, page_of(b"right", 0), demand=True) == (0, 1)
        assert helper.answer()[0] == ord("r")
        rig.threads.remove_remote(number)
        control.close()


@pytest.mark.parametrize(
    ("runs", "asked"),
    [
        ([(page, 1) for page in range(100, 120, 2)], [(page, 1) for page in range(100, 120, 2)]),
        ([(page, 1) for page in range(100, 140, 2)], [(page, 1) for page in range(100, 132, 2)]),
        ([(100, 16), (200, 1)], [(100, 16)]),
        ([(100, 10), (200, 10), (300, 1)], [(100, 10), (200, 6)]),
    ],
)
def test_beside_a_demand_there_are_more_small_requests_and_no_more_pages(
    rig: Rig, sources: list[PushSource], runs: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    """Than in the one piece of 64 KiB that this source is asked for meanwhile."""
    source = sources[0]
    source.channel.stream_piece_count_demand = 1
    ram = rig.add_pushed(source, 1000)
    rig.threads.start([-1])
    with child(ram.helper_memfd(writing=False), ram.map_length, features=THREAD_ID) as helper:
        number, control = rig.add_remote(ram, helper)
        helper.tell(f"touch {5 * PAGE}")
        source.wait_until_asked((5, 1))
        rig.threads.replay((page, count, 0) for page, count in runs)
        source.wait_until_asked((5, 1), *asked)
        assert rig.push(5, page_of(b"right", 0), demand=True) == (0, 1)
        assert helper.answer()[0] == ord("r")
        rig.threads.remove_remote(number)
        control.close()


def test_next_requests_are_under_way_before_answers_are_placed(
    runtime_dir: Path, data_file: Path, ws: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else who reads what was placed is through with it before, and asks for the next page itself."""
    pages, trace = range(0, 1000, 10), tmp_path / "trace"
    write_set(ws, [(0, page, 1) for page in pages])
    with serving(f"data={data_file}#delay=2ms", stream_mode=LAZY, replay=str(ws), trace=str(trace)):
        wait_for_replay(caplog)
    steps = [one.event for one in read_trace(str(trace)) if one.event in ("stream_request", "place")]
    assert Counter(steps) == {"stream_request": len(pages), "place": len(pages)}
    for at, step in enumerate(steps):
        asked, placed = Counter(steps[:at])["stream_request"], Counter(steps[:at])["place"]
        assert step == "stream_request" or asked >= min(len(pages), SMALL_PIECES + placed + 1)


def test_runs_whose_pages_are_here_are_passed_by_without_a_request(rig: Rig, sources: list[PushSource]) -> None:
    """All but the last of two hundred thousand."""
    n_runs, source = 200_000, sources[0]
    rig.add_pushed(source, n_runs + 1)
    rig.threads.start([-1])
    assert rig.push(0, n_runs) == (0, n_runs)
    rig.threads.replay((page, 1, 0) for page in range(n_runs + 1))
    source.wait_until_asked((n_runs, 1))
    assert rig.push(n_runs, 1) == (0, 1)
    source.answer(1)
    rig.wait_for_event(EventKind.BLOCK_REPLAYED)


def test_block_whose_source_does_not_answer_keeps_no_other_waiting(rig: Rig, sources: list[PushSource]) -> None:
    slow, quick = sources
    rig.add_pushed(slow, 1000, index=0)
    rig.add_pushed(quick, 1000, index=1)
    rig.threads.start([-1])
    rig.threads.replay([*((2 * number, 1, 0) for number in range(100)), (7, 3, 1)])
    quick.wait_until_asked((7, 3))
    slow.wait_until_asked(*((2 * number, 1) for number in range(SMALL_PIECES)))
    assert rig.push(7, 3, index=1) == (0, 3)
    quick.answer(1)
    assert rig.wait_for_event(EventKind.BLOCK_REPLAYED).block_index == 1


class QuickSource(PushSource):
    """Answers while it is asked, so that the stream's thread always has something to place, and looks for a late page
    meanwhile; takes some time until there is one, half of it after somebody waits for a page of the other source."""

    N_PAGES = 4000

    def __init__(self, rig: Rig, other: PushSource) -> None:
        super().__init__()
        self.channel.pushes = 0
        self.n_asked = 0
        self.late: list[FaultEvent] = []
        self._rig, self._other = rig, other

    def _submit(self, _: Any, request: Any) -> None:
        if not self.late:
            self.late = [event for event in self._rig.events() if event.kind is EventKind.BLOCK_LATE]
            time.sleep(5e-5)
        if self.n_asked == self.N_PAGES // 2:
            wait_until(lambda: bool(self._other.asked()), "a fault")
        self.n_asked += request.n_pages
        request.done(request, 0)


def test_late_page_is_told_in_the_middle_of_another_blocks_replay(rig: Rig, sources: list[PushSource]) -> None:
    slow, quick = sources[0], QuickSource(rig, sources[0])
    sources.append(quick)
    ram = rig.add_pushed(slow, 1000, index=0)
    rig.add_pushed(quick, quick.N_PAGES, index=1)
    rig.threads.set_fault_timeout(0.05)
    rig.threads.start([-1, -1])
    with child(ram.helper_memfd(writing=False), ram.map_length, features=THREAD_ID) as helper:
        number, control = rig.add_remote(ram, helper)
        rig.threads.replay((page, 1, 1) for page in range(quick.N_PAGES))
        helper.tell(f"touch {5 * PAGE}")
        wait_until(lambda: quick.n_asked == quick.N_PAGES, "the end of the replay")  # who looks at events takes them
        assert [(late.block_index, late.offset) for late in quick.late] == [(0, 5 * PAGE)]
        assert rig.push(5, page_of(b"right", 0), demand=True) == (0, 1)
        assert helper.answer()[0] == ord("r")
        rig.threads.remove_remote(number)
        control.close()


def test_last_run_that_fails_is_asked_for_again_when_the_block_is_resumed(rig: Rig, sources: list[PushSource]) -> None:
    source = sources[0]
    rig.add_pushed(source, 1000)
    rig.threads.start([-1])
    rig.threads.replay([(7, 3, 0)])
    source.wait_until_asked((7, 3))
    source.answer(-errno.EIO)
    rig.wait_for_event(EventKind.BLOCK_SOURCE_ERROR)
    rig.threads.resume_block(0)
    source.wait_until_asked((7, 3))
    assert rig.push(7, 3) == (0, 3)
    source.answer(1)
    rig.wait_for_event(EventKind.BLOCK_REPLAYED)


def test_block_goes_in_the_middle_of_its_replay(rig: Rig, sources: list[PushSource]) -> None:
    source, other = sources
    rig.add_pushed(source, 1000)
    rig.threads.start([-1])
    rig.threads.replay((2 * number, 1, 0) for number in range(100))
    source.wait_until_asked(*((2 * number, 1) for number in range(SMALL_PIECES)))
    rig.remove_block(0)
    assert [event for event in rig.events() if event.kind is EventKind.BLOCK_REPLAYED] == []
    rig.add_pushed(other, 1000)
    rig.threads.replay([(3, 1, 0)])  # nothing of the one before is in its way
    other.wait_until_asked((3, 1))


@pytest.mark.parametrize("run", [(0, 0, 0), (1000, 1, 0), (5, 996, 0), (2**64 - 1, 2, 0), (0, 1, 1), (0, 1, 1024)])
def test_pages_that_are_not_there_are_neither_replayed_nor_noted(rig: Rig, sources: list[PushSource], run: Run) -> None:
    source = sources[0]
    rig.add_pushed(source, 1000)
    rig.threads.start([-1])
    for refuses in (rig.threads.replay, rig.threads.note_runs):
        with pytest.raises(pcshare.errors.PcshareError) as caught:
            refuses([(7, 1, 0), run])
        assert caught.value.errno == errno.EINVAL
    assert source.asked() == []


def test_replay_beside_a_replay_is_refused(rig: Rig, sources: list[PushSource]) -> None:
    source = sources[0]
    rig.add_pushed(source, 1000)
    rig.threads.start([-1])
    rig.threads.replay([(7, 1, 0)])
    source.wait_until_asked((7, 1))
    with pytest.raises(pcshare.errors.PcshareError) as caught:
        rig.threads.replay([(8, 1, 0)])
    assert caught.value.errno == errno.EBUSY


def test_memory_of_something_else_is_not_recorded_to(rig: Rig) -> None:
    memfd = os.memfd_create("pcshare-test", os.MFD_CLOEXEC)
    try:
        for content in (b"short", bytes(4096), b"PCWS\x02\0\0\0" + bytes(4088), b"PCWS\x01\0\0\0" + b"\xff" * 4088):
            os.ftruncate(memfd, 0)
            os.pwrite(memfd, content, 0)
            with pytest.raises(pcshare.errors.RemoteProtocolError):
                rig.threads.record(memfd, 100)
        os.ftruncate(memfd, 0)
        rig.threads.record(memfd, 100)
        assert rig.threads.recorded(0) == []
    finally:
        os.close(memfd)
