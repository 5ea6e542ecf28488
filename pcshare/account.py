"""account: the user that a coordinator which root started becomes, for good, before anything else is started.

What needs root is done first: /dev/userfaultfd is opened and stays open, the directory for the socket is made. Keeper,
coordinator, sources and exporter start as that user, so nothing of it has ever run as root. Knows nothing of who may
attach.

The kernel clears the parent-death signal on a change of ids; it is set again. That nobody may look into the process is
set again by whoever is started by exec: exec clears it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import grp
import os
import pwd
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pcshare import runtime
from pcshare.errors import HostError, UsageError
from pcshare.fds import DEVICE_FD_VARIABLE, open_uffd_device

PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
ID_MAX = (1 << 32) - 2  # the largest number says "leave it" in setresuid(2)

_CAPABILITIES = ("CapPrm:", "CapEff:", "CapAmb:")  # what may be used now, and what exec would pass on


@dataclass(frozen=True)
class Account:
    """A user, the group it acts as, and all groups it is in."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    def __str__(self) -> str:
        return f"{self.name} (uid {self.uid}, gid {self.gid})"


# -- what --user says


def parse_account(text: str) -> Account:
    """USER or USER:GROUP, by name or number. UsageError: no such user or group; root; a number of which no group is
    known."""
    user, colon, group = text.partition(":")
    if not user or (colon and not group):
        raise UsageError(f"not a user: {text!r}", hint="use USER or USER:GROUP, each a name or a number")
    found = _find_user(user)
    gid = _find_group(group) if colon else None if found is None else found.pw_gid
    if found is None and not user.isdecimal():
        raise UsageError(f"no user {user!r} on this host", hint="make it: sudo useradd --system NAME, or use a number")
    if gid is None:
        raise UsageError(f"uid {user} has no entry among this host's users", hint=f"say its group too: {user}:GROUP")
    if found is None:
        return _not_root(Account(user, _number(user), gid, (gid,), "/"))
    groups = tuple(os.getgrouplist(found.pw_name, gid))
    return _not_root(Account(found.pw_name, found.pw_uid, gid, groups, found.pw_dir))


def _not_root(account: Account) -> Account:
    if account.uid == 0:
        raise UsageError("--user root: it is root who is given up", hint="name another user, or leave --user out")
    return account


def _number(text: str) -> int:
    number = int(text)
    if number > ID_MAX:
        raise UsageError(f"not the number of a user or group: {text}", hint=f"the largest is {ID_MAX}")
    return number


def _find_user(text: str) -> pwd.struct_passwd | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(_number(text)) if text.isdecimal() else pwd.getpwnam(text)
    return None


def _find_group(text: str) -> int:
    if text.isdecimal():
        return _number(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise UsageError(
            f"no group {text!r} on this host", hint="make it: sudo groupadd --system NAME, or use a number"
        ) from None


# -- becoming it


def become(account: Account, needed: Iterable[str | Path] = ()) -> None:
    """This process is that user from here on, and so is what it starts. needed: files that it must be able to use then.

    UsageError: this is not root. HostError: it cannot be done, or not for good."""
    if os.geteuid() != 0:
        raise UsageError(f"--user needs root, and this is uid {os.geteuid()}", hint="use sudo, or leave --user out")
    runtime.make_shared_dir_of(account.uid, account.gid)
    _keep_device()
    _change(account)
    verify(account)
    _set_environment(account)
    _check_reach(account, needed)


def _keep_device() -> None:
    device = open_uffd_device()
    if device is not None:
        os.set_inheritable(device.fileno(), True)
        os.environ[DEVICE_FD_VARIABLE] = str(device.detach())


def _change(account: Account) -> None:
    with _death_signal_kept():
        try:
            os.setgroups(account.groups)
            os.setresgid(account.gid, account.gid, account.gid)
            os.setresuid(account.uid, account.uid, account.uid)
        except OSError as error:
            raise HostError(
                f"cannot become {account}: {error.strerror}",
                errno=error.errno,
                hint="give it the capabilities SETUID and SETGID, or leave --user out",
            ) from None


@contextlib.contextmanager
def _death_signal_kept() -> Iterator[None]:
    prctl = ctypes.CDLL(None).prctl
    number, parent = ctypes.c_int(), os.getppid()
    prctl(PR_GET_PDEATHSIG, ctypes.byref(number), 0, 0, 0)
    yield
    prctl(PR_SET_PDEATHSIG, number.value, 0, 0, 0)
    if number.value and os.getppid() != parent:
        os.kill(os.getpid(), number.value)


def verify(account: Account) -> None:
    """HostError: this process is somebody else, has a capability, or could become root again."""
    uids, gids = set(os.getresuid()), set(os.getresgid())
    if uids != {account.uid} or gids != {account.gid} or set(os.getgroups()) - {account.gid} - set(account.groups):
        raise HostError(f"this process should be {account}, and has uids {uids}, gids {gids}", errno=errno.EPERM)
    held = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    if any(int(row[1], 16) for row in held if row[:1] and row[0] in _CAPABILITIES):
        raise HostError(
            f"this process is {account}, and kept capabilities",
            errno=errno.EPERM,
            hint="start it without securebits and ambient capabilities",
        )
    with contextlib.suppress(PermissionError):
        os.setresuid(-1, 0, -1)
        raise HostError(f"this process is {account}, and could become root again", errno=errno.EPERM)


def _set_environment(account: Account) -> None:
    """As for somebody who has logged in. The runtime directory was root's."""
    os.environ.update(HOME=account.home, USER=account.name, LOGNAME=account.name)
    os.environ.pop("XDG_RUNTIME_DIR", None)


def _check_reach(account: Account, needed: Iterable[str | Path]) -> None:
    for path in (sys.executable, Path(__file__), *needed):
        if not os.access(path, os.R_OK):
            raise HostError(
                f"{account} cannot reach {path}",
                errno=errno.EACCES,
                hint="install pcshare where every user can read it: sudo python3 -m venv /opt/pcshare && "
                "sudo /opt/pcshare/bin/pip install . in a checkout of it",
            )
