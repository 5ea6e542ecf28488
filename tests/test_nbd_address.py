"""nbd.address: what is written and where it listens; sockets' files that the dead leave, and those of the living."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from pcshare.errors import NameInUse, PcshareError, UsageError
from pcshare.nbd.address import LOOPBACK, Address, Listening, listen_on, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/run/a.sock", Address(path="/run/a.sock")),
        ("./a", Address(path="./a")),
        ("a/b:5", Address(path="a/b:5")),
        (":10809", Address(hosts=LOOPBACK, port=10809)),
        ("127.0.0.1:0", Address(hosts=("127.0.0.1",), port=0)),
        ("store.example:80", Address(hosts=("store.example",), port=80)),
        ("[::1]:65535", Address(hosts=("::1",), port=65535)),
        ("[::]:7", Address(hosts=("::",), port=7)),
    ],
)
def test_address_is_read(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", "a", "10809", "host:", "host:x", "host:65536", "host:-1", "::1", "::1:7", ":²", "/", "a/", "/" + "x" * 107],
)
def test_what_is_no_address_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)


@pytest.fixture
def folder(runtime_dir: Path) -> Path:
    """Short, and without sockets at the end."""
    return runtime_dir


def test_socket_is_for_its_user_alone_and_gone_at_the_end(folder: Path) -> None:
    before = os.umask(0)
    try:
        listening = Listening(Address(path=f"{folder}/a.sock"))
    finally:
        os.umask(before)
    with listening:
        assert stat.S_IMODE(os.stat(folder / "a.sock").st_mode) == 0o600
        assert listening.addresses == [f"{folder}/a.sock"]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{folder}/a.sock")
    assert list(folder.iterdir()) == []


def test_relative_path_is_told_in_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with Listening(parse_address("./a b.sock")) as listening:
        assert listening.addresses == [f"{folder}/a b.sock"]
        assert listening.uris("x/y") == [f"nbd+unix:///x%2Fy?socket={folder}/a%20b.sock"]
        monkeypatch.chdir("/")  # and removed all the same
    assert list(folder.iterdir()) == []


def test_socket_of_a_dead_server_is_replaced(folder: Path) -> None:
    path = folder / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Listening(Address(path=str(path))), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_socket_of_a_living_server_is_refused_and_left(folder: Path, kind: int) -> None:
    path = folder / "a.sock"
    with socket.socket(socket.AF_UNIX, kind) as living:
        living.bind(str(path))
        living.listen()
        with pytest.raises(NameInUse) as refused:
            Listening(Address(path=str(path)))
        assert refused.value.errno == errno.EADDRINUSE
        assert path.is_socket()
    path.unlink()


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/etc/passwd")])
def test_what_is_no_socket_is_refused_and_left(folder: Path, make: object) -> None:
    path = folder / "a.sock.bin"
    make(path)  # type: ignore[operator]
    with pytest.raises(NameInUse) as refused:
        Listening(Address(path=str(path)))
    assert refused.value.errno == errno.EEXIST
    assert os.path.lexists(path)


def test_socket_that_somebody_else_put_there_is_left(folder: Path) -> None:
    path = folder / "a.sock"
    with Listening(Address(path=str(path))):
        path.unlink()
        path.touch()
    assert path.exists()
    path.unlink()


def test_folder_that_is_missing_is_told(folder: Path) -> None:
    with pytest.raises(PcshareError, match="No such file") as refused:
        Listening(Address(path=f"{folder}/no/a.sock"))
    assert refused.value.hint == "make the directory first"


def test_port_alone_is_loopback_and_one_port_for_both() -> None:
    with Listening(parse_address(":0")) as listening:
        ports = {address.rpartition(":")[2] for address in listening.addresses}
        hosts = {address.rpartition(":")[0] for address in listening.addresses}
        assert len(ports) == 1
        assert "127.0.0.1" in hosts <= {"127.0.0.1", "[::1]"}
        (port,) = ports
        assert listening.uris("a")[0] == f"nbd://127.0.0.1:{port}/a"
        socket.create_connection(("127.0.0.1", int(port))).close()


def test_port_in_use_is_refused_and_nothing_stays_open(folder: Path) -> None:
    with Listening(parse_address("127.0.0.1:0")) as first:
        with pytest.raises(NameInUse) as refused:
            listen_on([f"{folder}/a.sock", first.addresses[0]])
        assert refused.value.errno == errno.EADDRINUSE
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("host", ["no-such-host.invalid", "no..such", "x" * 80])
def test_host_that_nobody_knows_is_wrong_usage(host: str) -> None:
    with pytest.raises(UsageError, match=host):
        Listening(parse_address(f"{host}:10809"))


def test_address_of_another_machine_is_told() -> None:
    with pytest.raises(PcshareError, match=r"192\.0\.2\.1:10809") as refused:
        Listening(parse_address("192.0.2.1:10809"))
    assert refused.value.errno == errno.EADDRNOTAVAIL
    assert "name an address of this host" in (refused.value.hint or "")
