"""Transport: one datagram with its fds; what is cut off, late or gone is an error of its kind and leaks nothing."""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pcshare import transport
from pcshare.errors import AttachTimeout, CoordinatorGone, NoSuchCoordinator, PcshareError, RemoteProtocolError
from pcshare.transport import Connection, Listener
from support import wait_until


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    """Our end, and the peer's as a plain socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with Connection(ours) as connection, theirs:
        yield connection, theirs


def send_fds(end: socket.socket, data: bytes, n_fds: int) -> None:
    read_end, write_end = os.pipe()
    end.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [read_end] * n_fds))])
    os.close(read_end)
    os.close(write_end)


def test_message_comes_whole_with_its_fds(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    send_fds(peer, b"hello", 2)
    data, fds = connection.receive(1.0)
    assert (data, len(fds)) == (b"hello", 2)
    for fd in fds:
        assert not os.get_inheritable(fd.fileno())
        fd.close()


def test_sent_message_carries_copies_of_the_fds(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    with open(os.devnull) as null:
        connection.send(b"hello", [null.fileno()])
        data, fds, _, _ = socket.recv_fds(peer, 100, 4)
        assert data == b"hello"
        assert os.path.samestat(os.fstat(fds[0]), os.fstat(null.fileno()))
        os.close(fds[0])


def test_message_that_is_too_long_is_the_peers_fault(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    send_fds(peer, b"x" * (transport.MESSAGE_BYTES_MAX + 1), 1)
    with pytest.raises(RemoteProtocolError, match="cut off") as caught:
        connection.receive_now()
    assert caught.value.errno == errno.EPROTO


def test_too_many_fds_are_the_peers_fault_and_are_closed(pair: tuple[Connection, socket.socket]) -> None:
    """P7: the fds that did fit would leak here."""
    connection, peer = pair
    before = set(os.listdir("/proc/self/fd"))
    send_fds(peer, b"hello", transport.FDS_MAX + 3)
    with pytest.raises(RemoteProtocolError, match="cut off"):
        connection.receive_now()
    wait_until(lambda: set(os.listdir("/proc/self/fd")) == before, "the fds to be closed")


def test_nothing_there_is_no_error(pair: tuple[Connection, socket.socket]) -> None:
    with pytest.raises(BlockingIOError):
        pair[0].receive_now()


def test_peer_that_says_nothing_is_a_timeout_with_a_cure(pair: tuple[Connection, socket.socket]) -> None:
    with pytest.raises(AttachTimeout, match=r"no answer within 0\.01 s") as caught:
        pair[0].receive(0.01)
    assert caught.value.errno == errno.ETIMEDOUT
    assert caught.value.hint


def test_peer_that_hangs_up_is_told(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    peer.close()
    assert connection.receive_now() == (b"", [])
    with pytest.raises(CoordinatorGone, match="hung up") as caught:
        connection.receive(1.0)
    assert caught.value.errno == errno.ECONNRESET


def test_what_was_sent_before_the_hang_up_is_read_first(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    peer.send(b"last words")
    peer.close()
    assert connection.receive(1.0)[0] == b"last words"


def test_peer_that_does_not_read_is_not_waited_for(pair: tuple[Connection, socket.socket]) -> None:
    """P4."""
    connection, _ = pair

    def send_on() -> None:
        while True:
            connection.send(b"x" * 1000)

    with pytest.raises(BlockingIOError):
        send_on()


def test_sending_to_nobody_is_an_error_and_no_signal(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    peer.close()
    with pytest.raises(BrokenPipeError):
        connection.send(b"hello")


def test_peer_is_who_connected(pair: tuple[Connection, socket.socket]) -> None:
    """P8."""
    assert pair[0].credentials() == transport.PeerCredentials(os.getpid(), os.geteuid(), os.getegid())


def test_shutdown_hangs_up_for_copies_too(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    with connection.dup():
        connection.shutdown()
        connection.shutdown()
        assert peer.recv(10) == b""


def test_listener_has_a_socket_of_its_mode_and_removes_it(tmp_path: Path) -> None:
    """P7, P8."""
    path = tmp_path / "s.sock"
    listener = Listener(str(path), 0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    assert listener.accept() is None
    with transport.connect(str(path), 1.0) as ours:
        accepted = listener.accept()
        assert accepted is not None
        with accepted:
            ours.send(b"hello")
            assert accepted.receive(1.0)[0] == b"hello"
    listener.close()
    listener.close()
    assert not path.exists()


def test_listener_leaves_a_socket_that_took_its_place(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    listener = Listener(str(path), 0o600)
    path.unlink()
    other = Listener(str(path), 0o600)
    listener.close()
    assert path.exists()
    other.close()


def test_listener_on_a_taken_path_leaks_nothing_and_removes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    path.write_text("not a socket")
    with pytest.raises(OSError, match="Address already in use"):
        Listener(str(path), 0o600)
    assert path.read_text() == "not a socket"


@pytest.mark.parametrize("there", [False, True])
def test_connecting_where_nobody_listens_says_so(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "s.sock"
    if there:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(str(path))
    with pytest.raises(NoSuchCoordinator, match=f"nobody listens on {path}") as caught:
        transport.connect(str(path), 1.0)
    assert caught.value.errno == (errno.ECONNREFUSED if there else errno.ENOENT)


def test_connecting_to_a_socket_of_another_kind_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.bind(str(path))
        stream.listen()
        with pytest.raises(PcshareError, match=f"cannot connect to {path}") as caught:
            transport.connect(str(path), 1.0)
    assert caught.value.errno == errno.EPROTOTYPE


def test_full_backlog_is_a_timeout(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as full:
        full.bind(str(path))
        full.listen(0)
        with transport.connect(str(path), 1.0), pytest.raises(AttachTimeout, match="takes no connection") as caught:
            transport.connect(str(path), 0.01)
    assert caught.value.errno == errno.ETIMEDOUT
