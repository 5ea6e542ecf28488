"""leftovers: whether a name is in use, and what a dead coordinator left under it.

Says and removes; what becomes of leftovers is decided elsewhere.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pcshare import runtime
from pcshare.errors import (
    AccessRefused,
    NameInUse,
    NoSuchCoordinator,
    PcshareError,
)
from pcshare.status.layout import (
    process_stat,
)
from pcshare.status.reader import is_locked, open_segment, read_status
from pcshare.status.report import StatusReport


@dataclass(frozen=True)
class Leftovers:
    """What a coordinator that is no more left under its name. pid 0: it died before it said so."""

    name: str
    pid: int
    paths: tuple[Path, ...]
    living_helpers: tuple[int, ...]  # pids that live and were attached

    def __str__(self) -> str:
        who = f"coordinator {self.name!r}" + (f" (pid {self.pid})" if self.pid else "")
        living = f"; {len(self.living_helpers)} of its helpers still live" if self.living_helpers else ""
        return f"{who} died and left {', '.join(map(str, self.paths))}{living}"


def _report_of_segment(name: str) -> StatusReport | None:
    """The report of a segment that can be read as one; None for anything else under that name."""
    try:
        return read_status(name)
    except AccessRefused:
        raise
    except PcshareError:
        return None


def _dead_sockets(name: str, recorded: str) -> Iterator[Path]:
    paths = {runtime.socket_path(name), runtime.shared_socket_path(name)}
    if Path(recorded).name == f"{name}{runtime.SOCKET_SUFFIX}":
        paths.add(Path(recorded))
    return (path for path in sorted(paths) if path.is_socket() and not runtime.is_listening(path))


def in_use(name: str) -> bool:
    """Whether a coordinator of that name lives, also one that is stopped, or just starting."""
    try:
        with open_segment(name) as fd:
            if is_locked(fd):
                return True
    except NoSuchCoordinator:
        pass
    path = runtime.find_socket(name)
    return path is not None and runtime.is_listening(path)


def leftovers(name: str) -> Leftovers | None:
    """What a dead coordinator left; None if there is nothing, or if it lives."""
    if in_use(name):
        return None
    report = _report_of_segment(name)
    segment = runtime.shm_path(name)
    paths = (*((segment,) if segment.exists() else ()), *_dead_sockets(name, report.socket if report else ""))
    if not paths:
        return None
    helpers = report.helpers if report else ()
    living = sorted({helper.pid for helper in helpers if process_stat(helper.pid) is not None})
    return Leftovers(name, report.pid if report else 0, paths, tuple(living))


@contextmanager
def _locked_segment(name: str) -> Iterator[None]:
    """Holds the dead writer's lock, so that nobody can start under the name meanwhile and be taken apart."""
    try:
        segment = open_segment(name)
    except NoSuchCoordinator:
        yield
        return
    with segment:
        try:
            fcntl.flock(segment.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise name_in_use(name) from None
        yield


def remove_leftovers(name: str) -> Leftovers | None:
    """Removes what a dead coordinator left and says what that was. NameInUse if it lives."""
    found = leftovers(name)
    if found is None:
        if in_use(name):
            raise name_in_use(name)
        return None
    with _locked_segment(name):
        for path in found.paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise AccessRefused(
                    f"cannot remove {path}: {error.strerror}", errno=error.errno, hint=f"remove it: sudo rm {path}"
                ) from None
    return found


def name_in_use(name: str) -> NameInUse:
    """The refusal of a name that is taken: says by whom, living or dead, and the cure."""
    try:
        found = leftovers(name)
    except AccessRefused:
        return NameInUse(f"the name {name!r} is taken by another user", errno=errno.EEXIST, hint="take another --name")
    if found is not None:
        return NameInUse(str(found), errno=errno.EEXIST, hint="start it with --replace to remove that")
    report = _report_of_segment(name)
    pid = f", pid {report.pid}" if report else ""
    return NameInUse(
        f"a coordinator {name!r} runs already{pid}",
        errno=errno.EEXIST,
        hint=f"take another --name, or end it: pcshare stop {name}",
    )
