"""support_users: other users and narrower hosts for tests: a command as somebody else, in a mount namespace of its own.

Where the interpreter or the package lie below a folder that only root may enter, that folder is shown there with the
way to them open; nothing of the host is changed. Makes no claims about pcshare.
"""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from support import needs
from support_serving import NOBODY, ROOT

DEVICE = Path("/dev/userfaultfd")
UNPRIVILEGED = Path("/proc/sys/vm/unprivileged_userfaultfd")


def needs_root() -> None:
    needs(None if os.geteuid() == 0 else "root, to become another user")


def _is_shut(folder: Path) -> bool:
    return not folder.stat().st_mode & stat.S_IXOTH


def _shut(path: Path) -> Path | None:
    """The topmost folder on the way to a path that others may not enter."""
    return next((folder for folder in reversed(path.parents) if _is_shut(folder)), None)


def _ways() -> Iterator[Path]:
    """What another user must reach to run this interpreter with this package."""
    yield from {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), ROOT.resolve()}


def _opened(number: int, shut: Path, path: Path) -> str:
    """Shell: in place of a shut folder an empty one that is open, with the path in it."""
    return (
        f'mkdir "$scratch/{number}"; mount --rbind {shlex.quote(str(path))} "$scratch/{number}"; '
        f"mountpoint -q {shlex.quote(str(shut))} && grep -q ' {shut} tmpfs ' /proc/mounts || "
        f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(shut))}; "
        f"mkdir -p {shlex.quote(str(path))}; "
        f'mount --rbind "$scratch/{number}" {shlex.quote(str(path))}; '
    )


@cache
def _script() -> str:
    shut = [(folder, path) for path in _ways() if (folder := _shut(path)) is not None]
    opened = "".join(_opened(number, folder, path) for number, (folder, path) in enumerate(shut))
    return f"set -e; scratch=/mnt; mount -t tmpfs tmpfs /mnt; {opened}"


def reachable(*, without_device: bool = False, then: Iterable[str] = ()) -> list[str]:
    """Words of a command that runs another one, as root still, on a host where every user can reach pcshare.
    without_device: and that has no /dev/userfaultfd. then: shell commands, as root."""
    needs_root()
    hide = f"install -m 600 /dev/null /mnt/hidden; mount --bind /mnt/hidden {DEVICE}"
    lines = [*([hide] if without_device and DEVICE.exists() else []), *then]
    script = _script() + "".join(f"{line}; " for line in lines) + 'exec "$@"'
    return ["unshare", "--mount", "--propagation=private", "sh", "-c", script, "sh"]


def as_user(uid: int = NOBODY, *, without_device: bool = False, then: Iterable[str] = ()) -> list[str]:
    """The same as another user, who may nothing."""
    who = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--pdeathsig=KILL"]
    return [*reachable(without_device=without_device, then=then), *who]


def run(words: Sequence[str], *command: object, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """A command within these words, from its start to its end."""
    return subprocess.run(
        [*words, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )
