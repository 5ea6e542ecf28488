"""uffd: the verbs of userfaultfd for Python, and the names of its features and ioctls.

A thin skin over core/uffd.h for the host check, for tools and for tests. The pages of a block go nowhere through it:
that is the fault thread's work, in C. Must not retry and must not decide.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pcshare.core import ffi, lib
from pcshare.errors import check
from pcshare.fds import OwnedFd, inherit_uffd_device, uffd_device

MODE_MISSING: int = lib.UFFD_MODE_MISSING
MODE_WP: int = lib.UFFD_MODE_WP
MODE_MINOR: int = lib.UFFD_MODE_MINOR

_NO_DEVICE = -1
_DEVICE_NEW = 0xAA00  # USERFAULTFD_IOC_NEW: _IO(0xAA, 0)
_USER_MODE_ONLY = 1
_OPEN_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_SYSTEM_CALL_NUMBERS = {"x86_64": 323, "i386": 374, "i686": 374, "ppc64le": 364, "s390x": 355, "armv7l": 388}
_SYSTEM_CALL_NUMBER_GENERIC = 282  # aarch64, riscv64, loongarch64


def _constants(prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): getattr(lib, name) for name in dir(lib) if name.startswith(prefix)}


FEATURES = _constants("UFFD_FEATURE_BIT_")  # name to mask
IOCTLS = {name: 1 << bit for name, bit in _constants("UFFD_IOCTL_").items()}  # name to mask
MESSAGES = {value: name for name, value in _constants("UFFD_MESSAGE_").items()}


def feature_names(mask: int) -> tuple[str, ...]:
    return tuple(name for name, bit in sorted(FEATURES.items(), key=lambda item: item[1]) if mask & bit)


def ioctl_names(mask: int) -> tuple[str, ...]:
    return tuple(name for name, bit in sorted(IOCTLS.items(), key=lambda item: item[1]) if mask & bit)


@dataclass(frozen=True)
class Offer:
    """What the kernel answers to a handshake, as masks. user_mode_only: faults inside system calls are not served."""

    features: int
    ioctls: int
    user_mode_only: bool


@dataclass(frozen=True)
class Message:
    """One message of a uffd; ``fork_fd`` is the caller's to close, -1 if there is none. to_addr: of REMAP."""

    event: int
    fault_addr: int
    length: int
    tid: int
    flags: int
    fork_fd: int
    to_addr: int = 0


class Uffd(OwnedFd):
    """One userfaultfd. Verbs that copy answer (bytes done, errno or 0), since both can be true at once."""

    def __init__(self, fd: int, *, user_mode_only: bool = False) -> None:
        super().__init__(fd)
        self.user_mode_only = user_mode_only

    @classmethod
    def open(cls, device: OwnedFd | None = None) -> Uffd:
        """Non-blocking and close-on-exec, by the best way this process has; the handshake is still to be made."""
        user_mode_only = ffi.new("int *")
        device_fd = _NO_DEVICE if device is None else device.fileno()
        fd = check(lib.uffd_open(device_fd, user_mode_only), "cannot open a userfaultfd")
        return cls(fd, user_mode_only=bool(user_mode_only[0]))

    def api(self, features: int) -> Offer:
        """The handshake, once per uffd, with exactly these features."""
        offered, ioctls = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        what = f"userfaultfd handshake with features {', '.join(feature_names(features)) or 'none'}"
        check(lib.uffd_api(self.fileno(), features, offered, ioctls), what)
        return Offer(offered[0], ioctls[0], self.user_mode_only)

    def register(self, client_addr: int, length: int, mode: int = MODE_MISSING) -> int:
        """The mask of ioctls that the range offers."""
        ioctls = ffi.new("uint64_t *")
        what = f"cannot register {length} bytes at {client_addr:#x} with a userfaultfd"
        check(lib.uffd_register(self.fileno(), client_addr, length, mode, ioctls), what)
        return int(ioctls[0])

    def unregister(self, client_addr: int, length: int) -> None:
        what = f"cannot unregister {length} bytes at {client_addr:#x}"
        check(lib.uffd_unregister(self.fileno(), client_addr, length), what)

    def copy(self, client_addr: int, content: bytes) -> tuple[int, int]:
        done = ffi.new("uint64_t *")
        rc = lib.uffd_copy(self.fileno(), client_addr, ffi.from_buffer(content), len(content), done)
        return _done(rc, done)

    def zeropage(self, client_addr: int, length: int) -> tuple[int, int]:
        done = ffi.new("uint64_t *")
        return _done(lib.uffd_zeropage(self.fileno(), client_addr, length, done), done)

    def continue_(self, client_addr: int, length: int) -> tuple[int, int]:
        done = ffi.new("uint64_t *")
        return _done(lib.uffd_continue(self.fileno(), client_addr, length, done), done)

    def poison(self, client_addr: int, length: int) -> tuple[int, int]:
        done = ffi.new("uint64_t *")
        return _done(lib.uffd_poison(self.fileno(), client_addr, length, done), done)

    def wake(self, client_addr: int, length: int) -> None:
        check(lib.uffd_wake(self.fileno(), client_addr, length), f"cannot wake {length} bytes at {client_addr:#x}")

    def wake_all(self) -> None:
        check(lib.uffd_wake_all(self.fileno()), "cannot wake an address space")

    def read(self, n: int = lib.UFFD_READ_MAX) -> list[Message]:
        """What waits, up to n messages; never blocks."""
        raw = ffi.new("struct uffd_message[]", n)
        count = check(lib.uffd_read(self.fileno(), raw, n), "cannot read from a userfaultfd")
        return [Message(m.event, m.fault_addr, m.length, m.tid, m.flags, m.fork_fd, m.to_addr) for m in raw[0:count]]

    def inspect(self, wanted_features: int) -> int:
        """Refuses an fd that is no uffd or whose handshake had other features.

        The answer is equal for copies of one uffd and for those only; 0: this kernel does not tell."""
        identity = ffi.new("uint64_t *")
        check(lib.uffd_inspect(self.fileno(), wanted_features, identity), "not the userfaultfd that was asked for")
        return int(identity[0])


def _done(rc: int, done: Any) -> tuple[int, int]:
    return int(done[0]), -rc


@contextmanager
def with_host_addr(memory: mmap.mmap) -> Iterator[int]:
    """Where a mapping lies in this process; until then it cannot be closed."""
    with ffi.from_buffer(memory, require_writable=True) as buffer:
        yield int(ffi.cast("uintptr_t", buffer))


def probe(device: OwnedFd | None = None) -> Offer:
    """What this kernel offers, asked on a throw-away uffd: the handshake is allowed once per fd."""
    features, ioctls, user_mode_only = ffi.new("uint64_t *"), ffi.new("uint64_t *"), ffi.new("int *")
    device_fd = _NO_DEVICE if device is None else device.fileno()
    check(lib.uffd_probe(device_fd, features, ioctls, user_mode_only), "this host gives no userfaultfd")
    return Offer(features[0], ioctls[0], bool(user_mode_only[0]))


def inherit_device(device: OwnedFd) -> None:
    """Uffds are made with this one where the process can open none itself."""
    inherit_uffd_device(device)
    lib.uffd_inherit_device(device.fileno())


def try_device() -> int:
    """0 if /dev/userfaultfd gives a uffd, else the errno. Uffd.open() takes the best way; this names one."""
    try:
        with uffd_device() as device:
            os.close(fcntl.ioctl(device.fileno(), _DEVICE_NEW, _OPEN_FLAGS))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def try_system_call(*, user_mode_only: bool) -> int:
    """0 if the system call gives a uffd, else the errno."""
    number = _SYSTEM_CALL_NUMBERS.get(platform.machine(), _SYSTEM_CALL_NUMBER_GENERIC)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(ctypes.c_long(number), ctypes.c_int(_OPEN_FLAGS | (_USER_MODE_ONLY if user_mode_only else 0)))
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0
