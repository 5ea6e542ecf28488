"""The keeper: what it answers, whom it obeys, and that it ends with whoever it works for."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pcshare import keeper as keeper_room
from pcshare.core import ffi, lib
from pcshare.errors import HostError, PcshareError
from pcshare.fds import OwnedFd
from pcshare.keeper import FD_VARIABLE, Keeper
from support import has_ended, wait_until
from support_serving import PAGE, WAIT_S, is_readable

REQUEST_BYTES = ffi.sizeof("struct keeper_request")
ANSWER_BYTES = ffi.sizeof("struct keeper_answer")


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    made = Keeper.spawn()
    yield made
    made.close()


class Raw:
    """A keeper that is talked to in bytes."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(WAIT_S)
        with theirs:
            self.process = subprocess.Popen(
                [keeper_room.executable(), "--serve", str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )

    def ask(self, **fields: Any) -> tuple[Any, list[int]]:
        request = ffi.new("struct keeper_request *", {"version": lib.KEEPER_VERSION, **fields})
        self.socket.send(bytes(ffi.buffer(request)))
        data, fds, _, _ = socket.recv_fds(self.socket, ANSWER_BYTES, 4)
        answer = ffi.new("struct keeper_answer *")
        ffi.memmove(answer, data, len(data))
        return answer, fds

    def close(self) -> int:
        self.socket.close()
        return self.process.wait(WAIT_S)


@pytest.fixture
def raw() -> Iterator[Raw]:
    made = Raw()
    yield made
    made.close()


def make(raw: Raw, **fields: Any) -> int:
    """A block of one page; its number."""
    answer, fds = raw.ask(**{"op": lib.KEEPER_MAKE, "map_length": PAGE, "page_size": PAGE, "idstr": b"data", **fields})
    assert (answer.status, len(fds)) == (0, 2)
    for fd in fds:
        os.close(fd)
    return int(answer.block)


def test_spawned_keeper_ends_when_it_is_let_go() -> None:
    """P7."""
    made = Keeper.spawn()
    process = psutil.Process(made.pid)
    assert process.ppid() == os.getpid()
    made.close()
    made.close()
    assert not process.is_running()


def test_keeper_says_when_it_is_gone(keeper: Keeper) -> None:
    os.kill(keeper.pid, signal.SIGKILL)
    assert is_readable(keeper.fileno(), WAIT_S)
    assert lib.keeper_complete_block(keeper.pointer, 0) == -errno.EPIPE
    assert b"the keeper is gone" in ffi.string(lib.keeper_error_text(keeper.pointer))


def test_connecting_to_what_is_no_keeper_is_an_error() -> None:
    """P7: the socket is closed in any case."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.send(b"hello")
    theirs.shutdown(socket.SHUT_WR)
    with theirs, pytest.raises(PcshareError, match="connecting to the keeper"):
        Keeper(OwnedFd(ours.detach()))


def test_missing_executable_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(keeper_room, "EXECUTABLE", tmp_path / "pcshare-keeper")
    with pytest.raises(HostError, match=r"pcshare-keeper; install the package again") as caught:
        Keeper.spawn()
    assert caught.value.errno == errno.ENOENT


def test_inherited_socket_is_taken_once_and_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert keeper_room.inherited_socket() is None
    read_end, write_end = os.pipe()
    os.set_inheritable(read_end, True)
    monkeypatch.setenv(FD_VARIABLE, str(read_end))
    with OwnedFd(write_end):
        taken = keeper_room.inherited_socket()
        assert taken is not None
        assert not os.get_inheritable(taken.fileno())
        taken.close()
    assert FD_VARIABLE not in os.environ


# ---- what it answers ----


def test_request_of_another_version_is_refused(raw: Raw) -> None:
    answer, _ = raw.ask(version=99, op=lib.KEEPER_HELLO)
    assert answer.status == -errno.EPROTONOSUPPORT
    assert b"version" in ffi.string(answer.text)


def test_unknown_request_is_refused(raw: Raw) -> None:
    answer, _ = raw.ask(op=77)
    assert answer.status == -errno.EOPNOTSUPP


@pytest.mark.parametrize("op", ["DROP", "REPAIR", "COMPLETE", "LISTEN"])
@pytest.mark.parametrize("block", [0, 5000])
def test_block_that_is_not_there_is_refused(raw: Raw, op: str, block: int) -> None:
    answer, _ = raw.ask(op=getattr(lib, f"KEEPER_{op}"), block=block)
    assert answer.status == -errno.ENOENT


def test_keeper_tells_its_pid_and_what_its_memory_offers(raw: Raw) -> None:
    answer, fds = raw.ask(op=lib.KEEPER_HELLO)
    assert (answer.status, answer.pid, len(fds)) == (0, raw.process.pid, 1)
    os.close(fds[0])
    answer, fds = raw.ask(op=lib.KEEPER_MAKE, map_length=PAGE, page_size=PAGE, idstr=b"data")
    assert answer.ioctls >> lib.UFFD_IOCTL_COPY & 1
    for fd in fds:
        os.close(fd)


def test_block_that_was_dropped_gives_its_number_back(raw: Raw) -> None:
    """P7."""
    os.close(raw.ask(op=lib.KEEPER_HELLO)[1][0])  # it has made all that it makes at the start
    before = psutil.Process(raw.process.pid).num_fds()
    first = make(raw)
    for _ in range(3):
        assert make(raw) == first + 1
        assert raw.ask(op=lib.KEEPER_DROP, block=first + 1)[0].status == 0
    assert raw.ask(op=lib.KEEPER_DROP, block=first)[0].status == 0
    assert psutil.Process(raw.process.pid).num_fds() == before + 1  # the placing uffd stays for the next block


def test_memory_that_cannot_be_made_is_refused_and_nothing_stays(raw: Raw) -> None:
    make(raw)
    before = psutil.Process(raw.process.pid).num_fds()
    for length, page_size in ((1 << 62, PAGE), (1 << 40, 2 << 20), (0, PAGE)):
        answer, fds = raw.ask(op=lib.KEEPER_MAKE, map_length=length, page_size=page_size, idstr=b"data")
        assert answer.status < 0
        assert ffi.string(answer.text)
        assert not fds
    assert psutil.Process(raw.process.pid).num_fds() == before


# ---- memory that is written before it is served ----


def defer(raw: Raw, **fields: Any) -> tuple[int, int]:
    """(number, memfd) of a block of one page that is not served yet."""
    wanted = {"op": lib.KEEPER_MAKE, "deferred": 1, "map_length": PAGE, "page_size": PAGE, "idstr": b"data", **fields}
    answer, fds = raw.ask(**wanted)
    assert (answer.status, answer.place_addr, len(fds)) == (0, 0, 1)
    return int(answer.block), fds[0]


def mapped(raw: Raw) -> bool:
    return "pcshare-data" in Path(f"/proc/{raw.process.pid}/maps").read_text()


def test_deferred_memory_is_neither_mapped_nor_sealed_before_listen(raw: Raw) -> None:
    number, memfd = defer(raw)
    assert not mapped(raw)
    assert fcntl.fcntl(memfd, fcntl.F_GET_SEALS) == 0
    with mmap.mmap(memfd, PAGE) as mapping:
        mapping[:5] = b"first"
    answer, (uffd,) = raw.ask(op=lib.KEEPER_LISTEN, block=number)
    assert (answer.status, answer.block) == (0, number)
    assert answer.ioctls >> lib.UFFD_IOCTL_COPY & 1
    assert mapped(raw)
    done = ffi.new("uint64_t *")
    assert lib.uffd_copy(uffd, answer.place_addr, bytes(PAGE), PAGE, done) == -errno.EEXIST
    assert os.pread(memfd, 5, 0) == b"first"
    with pytest.raises(PermissionError):
        os.pwrite(memfd, b"x", 0)
    for fd in (memfd, uffd):
        os.close(fd)


def test_block_that_listens_already_is_refused(raw: Raw) -> None:
    number, memfd = defer(raw)
    os.close(memfd)
    os.close(raw.ask(op=lib.KEEPER_LISTEN, block=number)[1][0])
    for block in (number, make(raw)):
        answer, fds = raw.ask(op=lib.KEEPER_LISTEN, block=block)
        assert (answer.status, fds) == (-errno.EALREADY, [])


def test_block_that_cannot_listen_stays_deferred(raw: Raw) -> None:
    """P7: here it lacks huge pages, more than any machine has."""
    os.close(raw.ask(op=lib.KEEPER_HELLO)[1][0])  # it has made all that it makes at the start
    before = psutil.Process(raw.process.pid).num_fds()
    number, memfd = defer(raw, map_length=1 << 40, page_size=2 << 20)
    os.close(memfd)
    for _ in range(2):
        answer, fds = raw.ask(op=lib.KEEPER_LISTEN, block=number)
        assert (answer.status, fds) == (-errno.ENOMEM, [])
        assert b"huge pages" in ffi.string(answer.text)
        assert not mapped(raw)
    assert raw.ask(op=lib.KEEPER_DROP, block=number)[0].status == 0
    assert psutil.Process(raw.process.pid).num_fds() == before + 1  # the placing uffd


def test_deferred_block_is_not_repaired_and_may_be_dropped(raw: Raw) -> None:
    number, memfd = defer(raw)
    os.close(memfd)
    for length in (0, PAGE):
        assert raw.ask(op=lib.KEEPER_REPAIR, block=number, length=length)[0].status == -errno.EINVAL
    assert raw.ask(op=lib.KEEPER_COMPLETE, block=number)[0].status == 0
    assert raw.ask(op=lib.KEEPER_DROP, block=number)[0].status == 0
    assert make(raw) == number


@pytest.mark.parametrize(
    "span",
    [{"offset": 0, "length": 4 << 20}, {"offset": PAGE, "length": 1}, {"offset": 2**64 - 1, "length": 2}],
    ids=["larger than the staging", "behind the block", "round the end"],
)
def test_repair_outside_the_block_is_refused(raw: Raw, span: dict[str, int]) -> None:
    number = make(raw)
    assert raw.ask(op=lib.KEEPER_REPAIR, block=number, **span)[0].status == -errno.EINVAL


def test_writable_block_is_never_repaired(raw: Raw) -> None:
    """P2: what is there may be a write; and its pages can vanish, which would be a fault of the keeper's own."""
    number = make(raw, writable=1)
    assert raw.ask(op=lib.KEEPER_REPAIR, block=number, length=PAGE)[0].status == -errno.EINVAL


def test_request_of_another_size_ends_it(raw: Raw) -> None:
    raw.socket.send(b"x" * (REQUEST_BYTES - 1))
    assert raw.process.wait(WAIT_S) == 1


def test_hang_up_ends_it(raw: Raw) -> None:
    make(raw)
    assert raw.close() == 0


def test_interrupt_of_the_terminal_leaves_a_serving_keeper_alone(raw: Raw) -> None:
    make(raw)
    os.kill(raw.process.pid, signal.SIGINT)
    assert make(raw) == 1


# ---- as the parent of a command ----


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [keeper_room.executable(), "--", *command], capture_output=True, text=True, timeout=WAIT_S, check=False
    )


def test_command_gets_a_keeper_and_its_exit_code_is_passed_on() -> None:
    script = """
import os
from pcshare.keeper import Keeper, inherited_socket
print(Keeper(inherited_socket()).pid == os.getppid())
exit(7)
"""
    done = run(sys.executable, "-c", script)
    assert (done.returncode, done.stdout) == (7, "True\n"), done.stderr


def test_killed_command_is_told_and_becomes_128_and_the_signal() -> None:
    done = run("sh", "-c", "kill -KILL $$")
    assert done.returncode == 128 + signal.SIGKILL
    assert "was killed by signal 9" in done.stderr


@pytest.mark.parametrize(("command", "code"), [("/no/such/command", 127), ("/etc/passwd", 126)])
def test_command_that_cannot_start_is_told_as_a_shell_does(command: str, code: int) -> None:
    done = run(command)
    assert done.returncode == code
    assert command in done.stderr


def test_without_arguments_it_says_who_starts_it() -> None:
    done = subprocess.run([keeper_room.executable()], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 2
    assert "pcshare coordinator" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop_signals_are_passed_on_to_the_command(number: signal.Signals) -> None:
    script = f"trap 'exit 9' {number.value}; echo ready; while :; do sleep 0.01; done"
    with subprocess.Popen([keeper_room.executable(), "--", "sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(WAIT_S) == 9


def test_command_ends_with_its_keeper() -> None:
    """Without it no page could be placed."""
    command = [keeper_room.executable(), "--", "sh", "-c", "echo $$; exec sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
        wait_until(lambda: has_ended(child), "the command's end")
