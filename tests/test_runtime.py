"""runtime: names, the directory of the sockets and who may own it, listening sockets, the list of names."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

import pytest

from pcshare import runtime
from pcshare.errors import HostError, UsageError


@pytest.fixture
def xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["a", "weights-2.v3_x", "A" * 48, "0", "_", "-x"])
def test_name_is_accepted(name: str) -> None:
    assert runtime.check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "a/b", "a b", "A" * 49, "na\u00efve", "a\n", "a=b", "\0", "\u0661"]
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        runtime.check_name(name)
    assert repr(name) in caught.value.message
    for path in (runtime.shm_name, runtime.socket_path, runtime.shared_socket_path):
        with pytest.raises(UsageError):
            path(name)


def test_block_names_have_the_length_of_the_wire() -> None:
    assert runtime.is_block_name("b" * 63)
    assert not runtime.is_block_name("b" * 64)
    assert not runtime.is_block_name("a=b")
    with pytest.raises(UsageError):
        runtime.check_block_name("b" * 64)


def test_runtime_directory_is_made_for_this_user_alone(xdg: Path) -> None:
    old_umask = os.umask(0)
    try:
        path = runtime.runtime_dir(create=True)
    finally:
        os.umask(old_umask)
    assert path == xdg / "pcshare"
    assert path.stat().st_mode & 0o777 == 0o700
    assert runtime.runtime_dir(create=True) == path
    assert runtime.socket_path("a") == path / "a.sock"


def test_looking_makes_no_directory(xdg: Path) -> None:
    assert runtime.runtime_dir() == xdg / "pcshare"
    assert not (xdg / "pcshare").exists()


def test_symlink_in_place_of_the_directory_is_refused(xdg: Path) -> None:
    (xdg / "real").mkdir(mode=0o700)
    (xdg / "pcshare").symlink_to(xdg / "real")
    with pytest.raises(HostError, match="not a directory of its own") as caught:
        runtime.runtime_dir(create=True)
    assert "XDG_RUNTIME_DIR" in (caught.value.hint or "")


def test_file_in_place_of_the_directory_is_refused(xdg: Path) -> None:
    (xdg / "pcshare").touch()
    with pytest.raises(HostError, match="not a directory of its own"):
        runtime.runtime_dir(create=True)


def test_directory_that_others_can_write_is_refused(xdg: Path) -> None:
    (xdg / "pcshare").mkdir()
    (xdg / "pcshare").chmod(0o1777)
    with pytest.raises(HostError, match="mode 1777"):
        runtime.runtime_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a directory away needs root")
def test_directory_of_somebody_else_is_refused(xdg: Path) -> None:
    (xdg / "pcshare").mkdir(mode=0o700)
    os.chown(xdg / "pcshare", 65534, 65534)
    with pytest.raises(HostError, match="belongs to uid 65534"):
        runtime.runtime_dir()


def test_runtime_directory_without_parent_is_refused_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    with pytest.raises(HostError) as caught:
        runtime.runtime_dir(create=True)
    assert str(tmp_path / "missing") in caught.value.message
    assert "XDG_RUNTIME_DIR" in (caught.value.hint or "")


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_without_a_usable_variable_the_fallback_is_ours_alone(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    uid = os.geteuid()
    expected = Path(f"/run/user/{uid}/pcshare") if Path(f"/run/user/{uid}").is_dir() else Path(f"/tmp/pcshare-{uid}")
    assert runtime.runtime_dir() == expected


def test_path_too_long_for_a_socket_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/" + "d" * 100)
    with pytest.raises(UsageError) as caught:
        runtime.socket_path("name")
    assert "119 bytes" in caught.value.message
    assert "107" in caught.value.message


def test_longest_name_fits_a_socket_in_the_usual_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"/run/user/{2**32 - 2}")
    assert len(os.fsencode(runtime.socket_path("n" * runtime.NAME_LENGTH_MAX))) <= runtime.SOCKET_PATH_BYTES_MAX
    assert len(os.fsencode(runtime.shared_socket_path("n" * runtime.NAME_LENGTH_MAX))) <= runtime.SOCKET_PATH_BYTES_MAX


def test_listening_socket_is_told_from_a_dead_one(xdg: Path) -> None:
    path = runtime.socket_path("a", create_dir=True)
    assert not runtime.is_listening(path)
    assert runtime.find_socket("a") is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        assert not runtime.is_listening(path)  # bound, not listening yet
        listener.listen()
        assert runtime.is_listening(path)
        assert runtime.find_socket("a") == path
    assert not runtime.is_listening(path)
    assert runtime.find_socket("a") == path  # what a dead one left


def test_file_that_is_no_socket_is_not_found(xdg: Path) -> None:
    runtime.socket_path("a", create_dir=True).touch()
    assert runtime.find_socket("a") is None


def test_names_lists_segments_and_nothing_else() -> None:
    name = f"test-{uuid.uuid4().hex[:8]}"
    made = [runtime.SHM_DIR / f"{prefix}{name}" for prefix in ("pcshare-", "other-", "pcshare-.")]
    try:
        for path in made:
            path.touch(mode=0o600)
        found = runtime.names()
        assert name in found
        assert f".{name}" not in found
        assert found == sorted(found)
    finally:
        for path in made:
            path.unlink()
    assert name not in runtime.names()
