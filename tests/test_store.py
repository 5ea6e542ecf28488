"""The store: what is said to whoever keeps fds for the next coordinator, what comes back, and a supervisor with one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import pcshare
from pcshare.errors import CoordinatorGone
from pcshare.fds import OwnedFd
from pcshare.status import StatusReport, read_status
from pcshare.store import LISTEN_FDS_START, FdStore
from pcshare.transport import FDS_MAX, Datagrams
from support import suspend, wait_until
from support_serving import PAGE, WAIT_S, HelperProcess, make_file
from support_supervisor import Supervisor, supervising

N_PAGES = 100
LAZY = "--stream=lazy"


@pytest.fixture
def data_file(tmp_path: Path, rng: random.Random) -> Path:
    return make_file(tmp_path, rng, N_PAGES * PAGE - 3)


@pytest.fixture
def supervisor(runtime_dir: Path) -> Iterator[Supervisor]:
    with supervising(runtime_dir) as made:
        yield made


# ---- what is said ----


class Ends:
    """A store, and the socket on which it is heard."""

    def __init__(self) -> None:
        self.heard, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.heard.settimeout(WAIT_S)
        self.store = FdStore(Datagrams(ours))

    def next(self) -> tuple[bytes, list[int]]:
        data, fds, flags, _ = socket.recv_fds(self.heard, 4096, 253)
        assert not flags & socket.MSG_CTRUNC
        return data, fds

    def is_silent(self) -> bool:
        self.heard.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self.heard.recv(1)
            return False
        return True

    def close(self) -> None:
        self.store.close()
        self.heard.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def same_file(one: int, other: int) -> bool:
    a, b = os.fstat(one), os.fstat(other)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def test_what_is_said_byte_for_byte(ends: Ends) -> None:
    with OwnedFd(os.memfd_create("a")) as a, OwnedFd(os.memfd_create("b")) as b:
        ends.store.put("two", [a.fileno(), b.fileno()])
        data, fds = ends.next()
        assert data == b"FDSTORE=1\nFDNAME=two\nFDPOLL=0"
        assert [same_file(fd, one.fileno()) for fd, one in zip(fds, (a, b), strict=True)] == [True, True]
        for fd in fds:
            os.close(fd)
    ends.store.remove("two")
    ends.store.tell_ready()
    ends.store.tell_stopping()
    for said in (b"FDSTOREREMOVE=1\nFDNAME=two", b"READY=1", b"STOPPING=1"):
        assert ends.next() == (said, [])
    assert ends.is_silent()


def test_many_fds_of_a_name_go_in_their_order(ends: Ends) -> None:
    """As many a datagram as a message may carry."""
    with contextlib.ExitStack() as owners:
        made = [owners.enter_context(OwnedFd(os.memfd_create(str(number)))) for number in range(2 * FDS_MAX + 1)]
        ends.store.put("many", [one.fileno() for one in made])
        got: list[int] = []
        for n_fds in (FDS_MAX, FDS_MAX, 1):
            data, fds = ends.next()
            assert (data, len(fds)) == (b"FDSTORE=1\nFDNAME=many\nFDPOLL=0", n_fds)
            got += fds
        assert all(same_file(fd, one.fileno()) for fd, one in zip(got, made, strict=True))
        for fd in got:
            os.close(fd)


def test_all_that_was_put_or_known_is_removed_at_the_end(ends: Ends) -> None:
    with OwnedFd(os.memfd_create("a")) as a:
        ends.store.put("put", [a.fileno()])
        os.close(ends.next()[1][0])
    ends.store.know({"known": [], "gone": []})
    ends.store.remove("gone")
    ends.next()
    ends.store.remove_all()
    assert {ends.next()[0] for _ in range(2)} == {b"FDSTOREREMOVE=1\nFDNAME=put", b"FDSTOREREMOVE=1\nFDNAME=known"}
    assert ends.is_silent()


def test_without_a_store_nothing_happens(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("PCSHARE_STORE_FD", "NOTIFY_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    for store in (FdStore.found(), FdStore(None)):
        assert not store.is_there
        store.put("x", [0])
        store.remove("x")
        store.tell_ready()
        store.close()
        store.close()
    assert not caplog.records


def test_store_that_is_named_but_gone_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PCSHARE_STORE_FD", raising=False)
    for address in (str(tmp_path / "nobody"), "@nobody-at-all", "x" * 300):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert not FdStore.found().is_there


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract name"])
def test_store_is_found_by_its_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int, abstract: bool
) -> None:
    address = f"@pcshare-test-{os.getpid()}-{seed}" if abstract else str(tmp_path / "s")
    monkeypatch.delenv("PCSHARE_STORE_FD", raising=False)
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.settimeout(WAIT_S)
        heard.bind("\0" + address[1:] if abstract else address)
        store = FdStore.found()
        store.tell_ready()
        assert heard.recv(100) == b"READY=1"
        store.close()


def test_store_that_does_not_listen_any_more_is_told_of_in_the_log(
    ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the second line, and no reason to fail."""
    ends.heard.close()
    ends.store.put("listener", [0])
    assert "not kept for a restart" in caplog.text


# ---- what comes back ----


def given(tmp_path: Path, n: int, **environment: str) -> dict[str, list[int]]:
    """kept_fds() of a process of its own that has files named 0, 1, ... as 3, 4, ...: the numbers by name."""
    code = (
        "import os, sys, json\n"
        "from pcshare.store import kept_fds, LISTEN_VARIABLES\n"
        f"files = [os.memfd_create(str(number)) for number in range({n})]\n"
        "high = [os.dup(fd) for fd in files]\n"
        "env = json.loads(sys.argv[1])\n"
        "os.environ.update({key: value.replace('OWN', str(os.getpid())) for key, value in env.items()})\n"
        "kept = kept_fds()\n"
        "assert not any(name in os.environ for name in LISTEN_VARIABLES)\n"
        "assert kept_fds() == {}\n"
        "assert not any(os.get_inheritable(fd.fileno()) for fds in kept.values() for fd in fds)\n"
        "print(json.dumps({name: [fd.fileno() for fd in fds] for name, fds in kept.items()}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(environment)], capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[int]] = json.loads(done.stdout)
    return found


def test_fds_come_back_by_name_once(tmp_path: Path) -> None:
    names = "state:ro.1:ro.1:state"
    assert given(tmp_path, 4, LISTEN_PID="OWN", LISTEN_FDS="4", LISTEN_FDNAMES=names) == {
        "state": [LISTEN_FDS_START, LISTEN_FDS_START + 3],
        "ro.1": [LISTEN_FDS_START + 1, LISTEN_FDS_START + 2],
    }


def test_fds_for_another_process_are_not_ours(tmp_path: Path) -> None:
    assert given(tmp_path, 1, LISTEN_PID="1", LISTEN_FDS="1", LISTEN_FDNAMES="state") == {}
    assert given(tmp_path, 1, LISTEN_FDS="1", LISTEN_FDNAMES="state") == {}
    assert given(tmp_path, 1, LISTEN_PID="OWN", LISTEN_FDS="many") == {}
    assert given(tmp_path, 0, LISTEN_PID="OWN", LISTEN_FDS="0", LISTEN_FDNAMES="") == {}


def test_fds_without_names_belong_to_no_name(tmp_path: Path) -> None:
    assert given(tmp_path, 2, LISTEN_PID="OWN", LISTEN_FDS="2") == {"": [3, 4]}
    assert given(tmp_path, 2, LISTEN_PID="OWN", LISTEN_FDS="2", LISTEN_FDNAMES="a") == {"a": [3], "": [4]}


# ---- a supervisor ----


def coordinator_command(path: Path, *options: str) -> list[str]:
    name = f"supervised-{os.getpid()}"
    return [sys.executable, "-m", "pcshare", "coordinator", f"--name={name}", LAZY, *options, f"data={path}"]


def name_of(command: list[str]) -> str:
    return next(word for word in command if word.startswith("--name=")).removeprefix("--name=")


def start_anew(supervisor: Supervisor, command: list[str], helper: HelperProcess, content: bytes) -> StatusReport:
    """The next one cannot go on: the helper of the one before, which has page 0, is told; the name is free."""
    ensured = helper.start(f"b.ensure(slice({5 * PAGE}, {6 * PAGE}))")
    supervisor.start(*command)
    with pytest.raises(CoordinatorGone):
        ensured.result()
    assert helper.do(f"read(b, 0, {PAGE})") == content[:PAGE]
    report = read_status(name_of(command))
    assert (report.alive, report.restarts) == (True, 0)
    with HelperProcess(report.socket) as late:
        assert late.do("b = attach(); bytes(b)") == content
    return report


def stop_and_leave_nothing(supervisor: Supervisor) -> None:
    assert supervisor.stop() == 0
    wait_until(lambda: not supervisor.names(), "everything to be removed")


def test_coordinator_without_a_keeper_goes_on_under_a_supervisor(
    supervisor: Supervisor, data_file: Path, content: bytes
) -> None:
    """P5: by the fds alone that were kept; the process with the mappings lives, since its socket is among them."""
    command = coordinator_command(data_file, "--no-keeper", "--writable=data")
    first = supervisor.start(*command)
    name = name_of(command)
    report = read_status(name)
    assert (report.pid, report.restarts) == (first.pid, 0)
    assert sorted(set(supervisor.names())) == ["helpers", "keeper", "listener", "segment", "source.0", "state"]
    with HelperProcess(report.socket) as helper, HelperProcess(report.socket) as late:
        helper.do("b = attach(); write(b, 5, b'mine')")
        expected = content[:5] + b"mine" + content[9:]
        for number in range(3):
            supervisor.kill()
            touch = helper.start(f"read(b, {number * PAGE}, {PAGE})")
            attaching = late.start("b = attach(); len(b)")
            again = supervisor.start(*command)
            assert touch.result() == expected[number * PAGE : (number + 1) * PAGE]
            assert attaching.result() == len(content)
            late.do("b.close()")
            report = read_status(name)
            assert (report.pid, report.restarts, report.alive) == (again.pid, number + 1, True)
            assert psutil.pid_exists(report.keeper_pid)
        assert helper.do("bytes(b)") == expected
    assert supervisor.stop() == 0
    wait_until(lambda: supervisor.said("STOPPING=1") == 1, "its word")
    wait_until(lambda: not supervisor.names(), "everything to be removed")
    wait_until(lambda: not psutil.pid_exists(report.keeper_pid), "an end of the process with the mappings")


def test_supervisor_that_keeps_no_fds_starts_a_new_one(supervisor: Supervisor, data_file: Path, content: bytes) -> None:
    """As without any: the blocks went with the old one."""
    command = coordinator_command(data_file, "--no-keeper")
    supervisor.start(*command)
    with supervisor._lock:
        for _, fd in supervisor.kept:
            os.close(fd)
        supervisor.kept.clear()
    supervisor.kill()
    supervisor.start(*command)
    report = read_status(name_of(command))
    assert (report.restarts, report.alive) == (0, True)
    with HelperProcess(report.socket) as helper:
        assert helper.do("b = attach(); bytes(b)") == content
    assert supervisor.stop() == 0


def test_death_before_it_was_ready_leaves_the_next_one_a_clean_start(
    supervisor: Supervisor, data_file: Path, content: bytes
) -> None:
    """Some fds were kept, and no state: nothing goes on, and nothing is in the way."""
    command = coordinator_command(data_file, "--no-keeper")
    supervisor.start(*command)
    with supervisor._lock:
        for one in [one for one in supervisor.kept if one[0] in ("state", "keeper")]:
            supervisor.kept.remove(one)
            os.close(one[1])
    supervisor.kill()
    supervisor.start(*command)
    report = read_status(name_of(command))
    assert (report.restarts, report.alive) == (0, True)
    with HelperProcess(report.socket) as helper:
        assert helper.do("b = attach(); bytes(b)") == content
    stop_and_leave_nothing(supervisor)


def test_keeper_passes_on_what_it_is_told(supervisor: Supervisor, data_file: Path, content: bytes) -> None:
    """The second line: also what is kept for helpers, and that it goes; the keeper restarts by itself meanwhile."""
    command = coordinator_command(data_file)
    keeper = supervisor.start(*command)
    name = name_of(command)
    report = read_status(name)
    assert report.keeper_pid == keeper.pid
    with HelperProcess(report.socket) as helper:
        helper.do("b = attach()")
        wait_until(lambda: supervisor.names().count("ro.0") == 2, "the helper's fds to be passed on")
        os.kill(report.pid, signal.SIGKILL)
        wait_until(lambda: supervisor.said("READY=1") == 2, "the next one")
        replace = [sys.executable, "-m", "pcshare", "coordinator", f"--name={name}", "--replace"]
        subprocess.run(replace, check=True, timeout=WAIT_S, capture_output=True)
        wait_until(lambda: "next" not in supervisor.names(), "the next one's fds to be in their place")
        assert helper.do("bytes(b)") == content
        helper.do("b.close()")
        wait_until(lambda: "ro.0" not in supervisor.names(), "the helper's fds to go")
    assert all("FDPOLL=0" in told.lines for told in supervisor.told if "FDSTORE=1" in told.lines)
    assert supervisor.stop() == 0
    wait_until(lambda: supervisor.said("STOPPING=1") == 1, "its word")
    wait_until(lambda: not supervisor.names(), "everything to be removed")


def test_fds_without_mappings_are_good_for_a_good_bye(supervisor: Supervisor, data_file: Path, content: bytes) -> None:
    """P3: keeper and coordinator die, the supervisor starts them again: who waits is told, and the name is free."""
    command = coordinator_command(data_file)
    keeper = supervisor.start(*command)
    before = read_status(name_of(command))
    with HelperProcess(before.socket) as helper:
        helper.do("b = attach(); read(b, 0)")
        wait_until(lambda: supervisor.names().count("ro.0") == 2, "the helper's fds to be passed on")
        suspend(keeper.pid)  # so that it cannot tell its child
        os.kill(before.pid, signal.SIGKILL)
        supervisor.kill()
        start_anew(supervisor, command, helper, content)
    stop_and_leave_nothing(supervisor)
    with pytest.raises(pcshare.errors.NoSuchCoordinator):
        read_status(before.name)


def test_who_comes_after_a_coordinator_and_its_mappings_starts_anew(
    supervisor: Supervisor, data_file: Path, content: bytes
) -> None:
    """P3, --no-keeper: the supervisor has kept the socket of a process that is gone."""
    command = coordinator_command(data_file, "--no-keeper", f"--export={supervisor.folder / 'x.sock'}")
    supervisor.start(*command)
    before = read_status(name_of(command))
    with HelperProcess(before.socket) as helper:
        helper.do("b = attach(); read(b, 0)")
        supervisor.kill()
        os.kill(before.keeper_pid, signal.SIGKILL)
        assert start_anew(supervisor, command, helper, content).keeper_pid != before.keeper_pid
    stop_and_leave_nothing(supervisor)
