"""fds: an fd has one owner, which closes it once."""

from __future__ import annotations

import os

import pytest

from pcshare.fds import OwnedFd, open_uffd_device


def _new() -> OwnedFd:
    return OwnedFd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_with_block_closes_and_close_is_idempotent() -> None:
    with _new() as owned:
        fd = owned.fileno()
        assert _is_open(fd)
    assert not _is_open(fd)
    other = os.open(os.devnull, os.O_RDONLY)  # most likely of the same number
    owned.close()
    assert _is_open(other)
    os.close(other)


def test_closed_one_gives_no_number() -> None:
    owned = _new()
    owned.close()
    assert owned.closed
    with pytest.raises(ValueError, match="closed"):
        owned.fileno()
    with pytest.raises(ValueError, match="closed"):
        owned.dup()


def test_detached_fd_is_the_callers() -> None:
    owned = _new()
    fd = owned.detach()
    owned.close()
    assert _is_open(fd)
    os.close(fd)


def test_copy_has_an_owner_of_its_own_and_is_close_on_exec() -> None:
    with _new() as owned:
        copy = owned.dup()
    assert _is_open(copy.fileno())
    assert not os.get_inheritable(copy.fileno())
    copy.close()


def test_forgotten_fd_is_closed() -> None:
    owned = _new()
    fd = owned.fileno()
    del owned
    assert not _is_open(fd)


def test_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        OwnedFd(-1)


def test_device_is_opened_where_this_user_may() -> None:
    device = open_uffd_device()
    may = os.access("/dev/userfaultfd", os.R_OK | os.W_OK, effective_ids=True)
    assert (device is not None) == may
    if device is not None:
        device.close()
