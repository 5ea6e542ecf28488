"""runtime: where a coordinator's socket and shared memory lie, and what names they may have.

Knows paths and rules for names only: opens no socket, connects to nobody, reads no status segment.

A directory for sockets that somebody else could write would let him answer in a coordinator's place. So one that is a
symlink, not ours or writable by others is refused, never repaired.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from pcshare.errors import HostError, UsageError

NAME_LENGTH_MAX = 48
BLOCK_NAME_LENGTH_MAX = 63  # WIRE_IDSTR_MAX without the NUL
SOCKET_PATH_BYTES_MAX = 107  # sun_path without the NUL
SHM_DIR = Path("/dev/shm")
SHM_PREFIX = "pcshare-"
SHARED_DIR = Path("/run/pcshare")
SOCKET_VARIABLE = "PCSHARE_SOCKET"  # names the socket for attach() without a name
SOCKET_SUFFIX = ".sock"

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", re.ASCII)
_LISTENING = 0x10000  # __SO_ACCEPTCON, in the flags column of /proc/net/unix
_UNIX_COLUMNS = 7  # fields before the path
_LOOKS = 3  # the kernel gives its table out in pieces, and passes an entry over now and then while others come and go


def _is_name(text: str, length_max: int) -> bool:
    return len(text) <= length_max and _NAME.fullmatch(text) is not None


def _refuse_name(what: str, text: str, length_max: int) -> UsageError:
    return UsageError(
        f"not a name for a {what}: {text!r}",
        hint=f"use 1 to {length_max} of the characters A-Z a-z 0-9 . _ - and no dot in front",
    )


def check_name(name: str) -> str:
    """The name of a coordinator, returned as it is, or a UsageError."""
    if not _is_name(name, NAME_LENGTH_MAX):
        raise _refuse_name("coordinator", name, NAME_LENGTH_MAX)
    return name


def is_block_name(text: str) -> bool:
    return _is_name(text, BLOCK_NAME_LENGTH_MAX)


def check_block_name(idstr: str) -> str:
    """The name of a block, returned as it is, or a UsageError."""
    if not is_block_name(idstr):
        raise _refuse_name("block", idstr, BLOCK_NAME_LENGTH_MAX)
    return idstr


def _check_dir(path: Path, owners: tuple[int, ...], forbidden_mode: int, cure: str) -> None:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or not stat.S_ISDIR(found.st_mode):
        raise HostError(f"{path} is not a directory of its own", hint=cure)
    if found.st_uid not in owners:
        raise HostError(f"{path} belongs to uid {found.st_uid}, not to uid {os.geteuid()}", hint=cure)
    if found.st_mode & forbidden_mode:
        raise HostError(
            f"{path} has mode {stat.S_IMODE(found.st_mode):04o}: others could put a socket there", hint=cure
        )


def _make_dir(path: Path, mode: int, cure: str) -> None:
    try:
        path.mkdir(mode=mode)
        path.chmod(mode)  # whatever the umask says
    except FileExistsError:
        pass
    except OSError as error:
        raise HostError(f"cannot make {path}: {error.strerror}", errno=error.errno, hint=cure) from None


def _private_dir_choice() -> tuple[Path, str]:
    """Where our own sockets lie, and the cure if that place will not do."""
    uid = os.geteuid()
    variable = os.environ.get("XDG_RUNTIME_DIR", "")
    if variable.startswith("/"):
        return Path(variable) / "pcshare", "set XDG_RUNTIME_DIR to a directory that is yours alone, or unset it"
    login = Path(f"/run/user/{uid}")
    if login.is_dir():
        return login / "pcshare", "set XDG_RUNTIME_DIR to a directory that is yours alone"
    fallback = Path(f"/tmp/pcshare-{uid}")
    return fallback, f"remove {fallback} or have it removed, or set XDG_RUNTIME_DIR to a directory that is yours alone"


def runtime_dir(*, create: bool = False) -> Path:
    """Where sockets lie that only this user may reach. HostError if what is there is not safely ours."""
    path, cure = _private_dir_choice()
    if create:
        _make_dir(path, 0o700, cure)
    try:
        _check_dir(path, (os.geteuid(),), 0o077 if path.parent == Path("/tmp") else 0o022, cure)
    except FileNotFoundError:
        pass  # nothing there yet is nothing wrong
    except OSError as error:
        raise HostError(f"cannot look at {path}: {error.strerror}", errno=error.errno, hint=cure) from None
    return path


def shared_dir(*, create: bool = False) -> Path:
    """Where this user's sockets lie that others may reach (--allow-uid, --allow-gid): root's in SHARED_DIR, those of
    others each in a folder there that is theirs."""
    own = SHARED_DIR / str(os.geteuid())
    path = own if own.is_dir() else SHARED_DIR
    if create:
        cure = f"make it once: sudo install -d -o {own.name} -m 0755 {own}"
        if path == SHARED_DIR:
            _make_dir(path, 0o755, cure)
        else:
            _check_dir(path, (os.geteuid(),), 0o022, cure)
        if not os.access(path, os.W_OK):
            raise HostError(f"{path} cannot be written by uid {os.geteuid()}", hint=cure)
    return path


def make_shared_dir_of(uid: int, gid: int) -> None:
    """By root, for another user: his folder in SHARED_DIR."""
    own, cure = SHARED_DIR / str(uid), f"remove {SHARED_DIR}, or: sudo chown root {SHARED_DIR}"
    _make_dir(SHARED_DIR, 0o755, cure)
    _check_dir(SHARED_DIR, (0,), 0o022, cure)
    try:
        own.mkdir()
        own.chmod(0o755)  # before it is given away: then that takes one more capability
        os.chown(own, uid, gid)
    except FileExistsError:
        _check_dir(own, (uid,), 0o022, f"remove {own}")


def _sockets_of_others(name: str) -> list[Path]:
    """In folders that are theirs by name, and in no others."""
    return sorted(path for path in SHARED_DIR.glob(f"*/{check_name(name)}{SOCKET_SUFFIX}") if _is_own(path.parent))


def _is_own(folder: Path) -> bool:
    try:
        return folder.name == str(folder.lstat().st_uid)
    except OSError:  # it has just gone
        return False


def _socket_in(directory: Path, name: str) -> Path:
    path = directory / (check_name(name) + SOCKET_SUFFIX)
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES_MAX:
        raise UsageError(
            f"the socket's path {path} has {length} bytes; a Unix socket's has at most {SOCKET_PATH_BYTES_MAX}",
            hint="take a shorter name or a shorter XDG_RUNTIME_DIR",
        )
    return path


def socket_path(name: str, *, create_dir: bool = False) -> Path:
    return _socket_in(runtime_dir(create=create_dir), name)


def shared_socket_path(name: str, *, create_dir: bool = False) -> Path:
    return _socket_in(shared_dir(create=create_dir), name)


def find_socket(name: str) -> Path | None:
    """The socket of that name, this user's own first; where several places have one, that which listens."""
    places = (socket_path(name), shared_socket_path(name), _socket_in(SHARED_DIR, name), *_sockets_of_others(name))
    found = [path for path in places if path.is_socket()]
    return next((path for path in found if is_listening(path)), found[0] if found else None)


def is_listening(path: str | Path) -> bool:
    """Whether somebody listens on that Unix socket. Looks and never connects: one that is stopped listens too."""
    return any(_is_listed(os.fsencode(path)) for _ in range(_LOOKS))


def _is_listed(wanted: bytes) -> bool:
    for line in Path("/proc/net/unix").read_bytes().splitlines()[1:]:
        fields = line.split(None, _UNIX_COLUMNS)
        if len(fields) > _UNIX_COLUMNS and fields[_UNIX_COLUMNS] == wanted and int(fields[3], 16) & _LISTENING:
            return True
    return False


def shm_name(name: str) -> str:
    """The status segment's name for shm_open."""
    return f"/{SHM_PREFIX}{check_name(name)}"


def shm_path(name: str) -> Path:
    return SHM_DIR / shm_name(name)[1:]


def names() -> list[str]:
    """All coordinators, living or dead, whose status segment this user may read."""
    found = []
    for path in SHM_DIR.glob(SHM_PREFIX + "*"):
        name = path.name.removeprefix(SHM_PREFIX)
        if _is_name(name, NAME_LENGTH_MAX) and path.is_file() and os.access(path, os.R_OK):
            found.append(name)
    return sorted(found)
