"""launcher: pcshare.Coordinator, with the real coordinator process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import pcshare
from pcshare import errors, launcher, runtime
from pcshare.launcher import Event
from pcshare.nbd.client import negotiate
from pcshare.status import read_status
from support import suspend, wait_until

PAGE = 4096
PAGES = 32
TIMEOUT_S = 30.0

pytestmark = pytest.mark.usefixtures("runtime_dir")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(PAGES * PAGE))
    return path


def is_gone(name: str) -> bool:
    return name not in runtime.names() and runtime.find_socket(name) is None


def nbd_read(address: str, export: str) -> bytes:
    """What an export on a Unix socket or HOST:PORT holds."""
    family = socket.AF_UNIX if "/" in address else socket.AF_INET
    host, _, port = address.rpartition(":")
    with socket.socket(family) as connection:
        connection.connect(address if "/" in address else (host, int(port)))
        with negotiate(connection, export, time.monotonic() + TIMEOUT_S) as session:
            return session.read(0, session.export.size, time.monotonic() + TIMEOUT_S)


# -- life


def test_attach_succeeds_as_soon_as_the_context_is_entered(source: Path) -> None:
    with pcshare.Coordinator(blocks={"data": str(source)}) as coordinator:
        assert coordinator.pid is not None
        assert coordinator.pid != os.getpid()
        assert coordinator.socket is not None
        assert runtime.is_listening(coordinator.socket)
        assert coordinator.status().pid == coordinator.pid
        with coordinator.attach("data") as block:
            assert bytes(block) == source.read_bytes()
    assert is_gone(coordinator.name)
    assert coordinator.pid is None


def test_start_and_stop_without_context_and_stop_twice(source: Path) -> None:
    coordinator = pcshare.Coordinator(blocks=str(source))
    coordinator.start()
    with pytest.raises(errors.PcshareError, match="started already"):
        coordinator.start()
    coordinator.stop()
    coordinator.stop()
    assert is_gone(coordinator.name)
    coordinator.start()
    assert coordinator.status().alive
    coordinator.stop()


def test_names_made_up_differ(source: Path) -> None:
    names = {pcshare.Coordinator(blocks=str(source)).name for _ in range(8)}
    assert len(names) == 8


@pytest.mark.parametrize("form", ["mapping", "text", "sequence", "path"])
def test_blocks_come_in_the_forms_of_the_command_line(source: Path, form: str) -> None:
    blocks: Any = {
        "mapping": {"data": str(source), "more": "zero:8K"},
        "text": f"data={source}",
        "sequence": [f"data={source}", "more=zero:8K"],
        "path": source,
    }[form]
    with pcshare.Coordinator(blocks=blocks, stream="lazy") as coordinator:
        found = {block.idstr: block for block in coordinator.status().blocks}
    assert ("more" in found) == (form in ("mapping", "sequence"))
    (data,) = (block for name, block in found.items() if name != "more")
    assert data.page_count == PAGES


def test_blocks_are_exported_at_the_addresses_that_it_tells(source: Path, runtime_dir: Path) -> None:
    path = str(runtime_dir / "x.sock")
    coordinator = pcshare.Coordinator(blocks={"data": str(source)}, exports=[path, "127.0.0.1:0"], stream="lazy")
    with coordinator:
        first, second = coordinator.exports
        assert first == path
        for address in (first, second):
            assert nbd_read(address, "data") == source.read_bytes()
    assert not coordinator.exports
    with pcshare.Coordinator(blocks=str(source), exports=path) as alone:
        assert alone.exports == (path,)


def test_address_that_is_taken_is_the_error_it_is(source: Path, runtime_dir: Path) -> None:
    with (
        pcshare.Coordinator(blocks=str(source), exports=f"{runtime_dir}/x.sock"),
        pytest.raises(errors.NameInUse, match="somebody listens"),
    ):
        pcshare.Coordinator(blocks=str(source), exports=f"{runtime_dir}/x.sock").start()


def test_options_reach_the_coordinator(source: Path) -> None:
    with pcshare.Coordinator(
        "options-of-mine",
        {"data": str(source)},
        stream="400K",
        page_size=4096,
        writable="data",
        on_source_loss="poison",
        fault_threads=1,
        orphan_timeout_s=0.5,
        allow_uid=[os.getuid()],
    ) as coordinator:
        report = coordinator.status()
        assert coordinator.name == "options-of-mine"
        assert (report.stream, report.stream_rate) == ("rate", 400 << 10)
        assert report.blocks[0].writable
        with coordinator.attach("data", mode="rw") as block:
            memoryview(block)[:5] = b"mine!"


def test_module_in_the_working_directory_is_never_imported(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("random", "click", "pcshare"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    with pcshare.Coordinator(blocks=str(source)) as coordinator:
        assert coordinator.status().alive


def test_coordinator_is_in_a_session_of_its_own(source: Path) -> None:
    with pcshare.Coordinator(blocks=str(source)) as coordinator:
        assert coordinator.pid is not None
        assert os.getsid(coordinator.pid) != os.getsid(0)


def test_thread_that_listens_takes_no_signals(source: Path) -> None:
    with pcshare.Coordinator(blocks=str(source)) as coordinator:
        (thread,) = (thread for thread in threading.enumerate() if thread.name == f"pcshare-events-{coordinator.name}")
        status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
        (blocked,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk"))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            assert blocked & 1 << (number - 1)


# -- refusals


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"blocks": {"data": "/no/such/file"}}, errors.PcshareError),
        ({"blocks": {"data": "ftp9://host/x"}}, errors.PcshareError),
        ({"blocks": {"data": "zero:8K"}, "writable": ["other"]}, errors.PcshareError),
        ({"blocks": {"data": "zero:8K"}, "stream": "sideways"}, errors.UsageError),
        ({"blocks": {"data": "zero:8K"}, "page_size": "3K"}, errors.UsageError),
    ],
)
def test_refusal_of_the_coordinator_is_raised_here(options: dict[str, Any], error: type[errors.PcshareError]) -> None:
    with pytest.raises(error) as raised:
        pcshare.Coordinator(**options).start()
    assert type(raised.value) is not errors.CoordinatorGone
    assert raised.value.message


def test_missing_file_is_a_source_error_that_names_it() -> None:
    with pytest.raises(errors.SourceError, match="/no/such/file") as raised:
        pcshare.Coordinator(blocks={"data": "/no/such/file"}).start()
    assert raised.value.errno == 2


def test_name_of_a_living_coordinator_is_refused_and_that_one_lives_on(source: Path) -> None:
    with pcshare.Coordinator("taken", str(source)) as first:
        with pytest.raises(errors.NameInUse, match="runs already"):
            pcshare.Coordinator("taken", str(source)).start()
        assert first.status().alive
        with first.attach() as block:
            assert len(block) == PAGES * PAGE


@pytest.mark.parametrize(
    "options", [{"blocks": {}}, {"blocks": {"a/b": "zero:1M"}}, {"name": "a/b", "blocks": "zero:1M"}]
)
def test_what_makes_no_sense_is_refused_before_a_process_is_started(options: dict[str, Any]) -> None:
    with pytest.raises(errors.UsageError):
        pcshare.Coordinator(**options)


def test_not_ready_in_time_is_an_error_and_nothing_is_left(source: Path) -> None:
    given_up = threading.Event()

    def hold(event: Event) -> None:
        if event.name == "PROBE":
            given_up.wait(TIMEOUT_S)

    coordinator = pcshare.Coordinator(blocks=str(source), on_event=hold, ready_timeout_s=0.001)
    releasing = threading.Timer(1.0, given_up.set)  # this callback must return for its thread to end
    releasing.start()
    with pytest.raises(errors.AttachTimeout, match="not ready"):
        coordinator.start()
    releasing.join()
    assert is_gone(coordinator.name)


# -- events


def test_notifiers_run_here_in_their_order(source: Path) -> None:
    events: list[Event] = []
    with pcshare.Coordinator(blocks={"data": str(source)}, on_event=events.append) as coordinator:
        wait_until(lambda: any(event.name == "INBOUND_END" for event in events), "INBOUND_END")
        assert coordinator.status().state == "END"
    names = [event.name for event in events if event.name.isupper()]
    assert names == ["PROBE", "INBOUND_ADVISE", "INBOUND_LISTEN", "INBOUND_END"]
    assert "RUNNING" in [event.state for event in events] or "END" in [event.state for event in events]


def veto_by_text(event: Event) -> str | None:
    return "not on my watch" if event.name == "PROBE" else None


def veto_by_exception(event: Event) -> str | None:
    if event.name == "PROBE":
        raise RuntimeError("not on my watch")
    return None


@pytest.mark.parametrize("veto", [veto_by_text, veto_by_exception])
def test_veto_at_probe_reaches_the_user_with_its_reason(source: Path, veto: Callable[[Event], str | None]) -> None:
    """A7."""
    coordinator = pcshare.Coordinator(blocks=str(source), on_event=veto)
    with pytest.raises(errors.Vetoed, match="not on my watch"):
        coordinator.start()
    assert is_gone(coordinator.name)


def test_probe_without_an_answer_is_given_up_after_the_notifiers_time(source: Path) -> None:
    def hang(event: Event) -> None:
        if event.name == "PROBE":  # it must return for its thread to end
            wait_until(lambda: coordinator._process is not None and coordinator._process.poll() is not None, "its end")

    coordinator = pcshare.Coordinator(blocks=str(source), on_event=hang, notifier_timeout_s=0.2)
    with pytest.raises(errors.PcshareError, match="PROBE"):
        coordinator.start()


def test_death_of_the_coordinator_is_told_and_cleared_away(source: Path) -> None:
    ended = threading.Event()
    reasons: list[str | None] = []

    def listen(event: Event) -> None:
        if event.name == "ended":
            reasons.append(event.reason)
            ended.set()

    with pcshare.Coordinator(blocks=str(source), stream="lazy", on_event=listen, keeper=False) as coordinator:
        assert coordinator.pid is not None
        os.kill(coordinator.pid, signal.SIGKILL)
        assert ended.wait(TIMEOUT_S)
        assert not coordinator.status().alive
    assert reasons == ["killed by SIGKILL"]
    assert is_gone(coordinator.name)


def test_coordinator_that_goes_on_in_another_process_is_told(source: Path) -> None:
    """P5."""
    went_on = threading.Event()
    names: list[str] = []

    def listen(event: Event) -> None:
        names.append(event.name)
        if event.name == "restarted":
            went_on.set()

    with pcshare.Coordinator(blocks={"data": str(source)}, stream="lazy", on_event=listen) as coordinator:
        before = coordinator.pid
        assert before is not None
        with coordinator.attach("data") as block:
            os.kill(before, signal.SIGKILL)
            assert went_on.wait(TIMEOUT_S)
            assert coordinator.pid not in (None, before)
            assert bytes(memoryview(block)) == source.read_bytes()
        assert coordinator.status().restarts == 1
    assert names.count("PROBE") == 1
    assert "ended" not in names
    assert is_gone(coordinator.name)


def test_orderly_stop_is_not_told_as_a_death(source: Path) -> None:
    names: list[str] = []
    with pcshare.Coordinator(blocks=str(source), on_event=lambda event: names.append(event.name)):
        pass
    assert "ended" not in names


def test_coordinator_that_does_not_end_is_killed_with_a_warning(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "STOP_TIMEOUT_S", 0.2)
    coordinator = pcshare.Coordinator(blocks=str(source), stream="lazy").start()
    assert coordinator.pid is not None
    suspend(coordinator.pid)
    with pytest.warns(RuntimeWarning, match="outlived SIGTERM"):
        coordinator.stop()
    assert is_gone(coordinator.name)


# -- whose life it depends on


CREATOR = """
import os, sys, time, pcshare
coordinator = pcshare.Coordinator({name!r}, {source!r}, stream="lazy").start()
print(coordinator.pid, flush=True)
{then}
sys.stdin.read()
"""


def creator(name: str, source: Path, then: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CREATOR.format(name=name, source=str(source), then=then)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_coordinator_ends_when_its_creator_is_killed(source: Path, number: signal.Signals) -> None:
    with creator("creator-killed", source) as process:
        coordinator = psutil.Process(int(line_of(process)))
        process.send_signal(number)
    coordinator.wait(TIMEOUT_S)
    wait_until(lambda: is_gone("creator-killed"), "coordinator's things gone")


def test_coordinator_ends_when_its_creator_just_exits(source: Path) -> None:
    with creator("creator-exits", source, "os._exit(0)") as process:
        pid = int(line_of(process))
    wait_until(lambda: not psutil.pid_exists(pid), "an end of the coordinator", TIMEOUT_S)
    wait_until(lambda: is_gone("creator-exits"), "coordinator's things gone")


def test_child_of_fork_does_not_keep_the_coordinator_of_a_dead_creator(source: Path) -> None:
    then = "child = os.fork()\nif child: print(child, flush=True)\nelse: coordinator.stop(); time.sleep(1000)"
    with creator("creator-forks", source, then) as process:
        coordinator = psutil.Process(int(line_of(process)))
        child = psutil.Process(int(line_of(process)))
        try:
            assert read_status("creator-forks").alive, "stop() in the child ended the parent's coordinator"
            process.kill()
            process.wait()
            coordinator.wait(TIMEOUT_S)
            assert child.is_running()
        finally:
            child.kill()


def test_stop_leaves_nothing_in_this_process(source: Path) -> None:
    """P7, after use and after a refusal."""

    def held() -> tuple[int, int]:
        return psutil.Process().num_fds(), threading.active_count()

    with pcshare.Coordinator(blocks=str(source)):
        pass
    before = held()
    for _ in range(3):
        with pcshare.Coordinator(blocks=str(source)):
            pass
        with pytest.raises(errors.PcshareError):
            pcshare.Coordinator(blocks="/no/such/file").start()
    assert held() == before
    assert [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE] == []


def _send_and_close(connection: socket.socket, sent: bytes) -> None:
    with connection, contextlib.suppress(BrokenPipeError):  # who refuses need not read to the end
        connection.sendall(sent)


def test_line_without_end_is_refused_and_broken_json_too() -> None:
    for sent, reason in ((b"x" * (launcher.LINE_BYTES_MAX + launcher.RECEIVE_BYTES), "longer"), (b"{\n", "Expecting")):
        ours, theirs = socket.socketpair()
        link = launcher._Link(ours)
        sender = threading.Thread(target=_send_and_close, args=(theirs, sent))
        sender.start()
        with pytest.raises((errors.PcshareError, ValueError), match=reason):
            list(link.lines())
        link.close()
        sender.join()
