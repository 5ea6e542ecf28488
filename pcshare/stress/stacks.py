"""stacks: where processes wait, for the report of a failure. Reads /proc and changes nothing."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

WAITING_FOR_A_PAGE = "handle_userfault"


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()
    return ""


def wait_channel(pid: int) -> str:
    """The function of the kernel in which its main thread sleeps; empty where this user may not know."""
    return _read(Path(f"/proc/{pid}/wchan"))


def threads(pid: int, who: str) -> str:
    """A line a thread: its name, where it sleeps, and where the kernel's stack may be read, its upper end."""
    lines = [f"{who} {pid}:"]
    with contextlib.suppress(OSError):
        for tid in sorted(os.listdir(f"/proc/{pid}/task"), key=int):
            task = Path(f"/proc/{pid}/task/{tid}")
            stack = " < ".join(line.split("] ")[-1] for line in _read(task / "stack").splitlines()[:4])
            lines.append(f"  {tid} {_read(task / 'comm')}: {_read(task / 'wchan') or '-'} {stack}")
    return "\n".join(lines)
