"""What tests share: a word for "this machine lacks something", waiting with a deadline, counting what a test left.

No fixtures (conftest.py has them) and nothing of pcshare: a broken package must not break the counting.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

SHM = Path("/dev/shm")
SHM_PREFIX = "pcshare-"
POLL_INTERVAL_S = 0.01
LISTINGS_MAX = 100  # of threads, where they come and go all the time
LEFTOVERS_TIMEOUT_S = 20.0  # a coordinator that was told to end unregisters its blocks first
TAG = "PCSHARE_TEST_TAG"  # in the environment of every process that a test starts, however far down

IN_CI = os.environ.get("PCSHARE_CI") == "1"


def needs(lack: str | None) -> None:
    """Skips the test if this machine lacks something, and says what. With PCSHARE_CI=1 it fails: CI has everything."""
    if lack is None:
        return
    if IN_CI:
        pytest.fail(f"this machine lacks: {lack}", pytrace=False)
    pytest.skip(f"this machine lacks: {lack}")


def duration_s(full: float, in_ci: float) -> float:
    """How long a test marked slow goes on: CI takes the short form."""
    return in_ci if IN_CI else full


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 25.0) -> None:
    """Polls until condition holds; fails naming what did not come. By default for less time than an orphan waits."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            pytest.fail(f"waited {timeout_s:g} s in vain: {what}")
        time.sleep(POLL_INTERVAL_S)


def _all_threads_stopped(pid: int) -> bool:
    try:
        stats = [stat.read_text() for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):  # one has ended meanwhile
        return False
    return {stat.rpartition(")")[2].split()[0] for stat in stats} == {"T"}


def suspend(pid: int) -> None:
    """SIGSTOP, and returns when none of its threads runs any more: one that does could still take a fault or answer."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: _all_threads_stopped(pid), "its last thread to be stopped")


def has_ended(process: psutil.Process) -> bool:
    """Also where nobody has waited for it yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


@contextlib.contextmanager
def suspended(pid: int) -> Iterator[None]:
    """While the body runs nothing of this process does."""
    try:
        suspend(pid)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _read_link(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return None


def _own_fds() -> set[str]:
    found = ((number, _read_link(f"/proc/self/fd/{number}")) for number in os.listdir("/proc/self/fd"))
    return {f"fd {number} -> {target}" for number, target in found if target is not None}


def _own_threads() -> set[str]:
    """As two listings in a row have them: one ends early where a thread ends meanwhile."""
    tids = os.listdir("/proc/self/task")
    for _ in range(LISTINGS_MAX):
        before, tids = tids, os.listdir("/proc/self/task")
        if tids == before:
            break
    found = set()
    for tid in tids:
        with contextlib.suppress(OSError):
            found.add(f"thread {tid} ({Path(f'/proc/self/task/{tid}/comm').read_text().strip()})")
    return found


def _is_tagged(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return f"{TAG}={os.getpid()}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def own_processes() -> set[psutil.Process]:
    """Descendants of this one, and processes that descend from a test but whose parent has ended."""
    found = set(psutil.Process().children(recursive=True))
    for pid in psutil.pids():
        if pid != os.getpid() and _is_tagged(pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.add(psutil.Process(pid))
    return found


def _describe(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"process {process.pid} ({process.status()}): {' '.join(process.cmdline()) or process.name()}"
    return f"process {process.pid}"


def _shm_entries() -> set[str]:
    return {path.name for path in SHM.glob(f"{SHM_PREFIX}*")}


def _is_mapped_by_others(entry: str) -> bool:
    """Whether a process that no test here started uses it: somebody else's, for instance another run's."""
    own = {process.pid for process in own_processes()} | {os.getpid()}
    for pid in psutil.pids():
        if pid not in own:
            with contextlib.suppress(OSError):
                if f"{SHM}/{entry}" in Path(f"/proc/{pid}/maps").read_text():
                    return True
    return False


@dataclass(frozen=True)
class Inventory:
    """What this process holds at one moment."""

    fds: set[str]
    threads: set[str]
    processes: set[psutil.Process]
    shm: set[str]

    @classmethod
    def take(cls) -> Inventory:
        return cls(_own_fds(), _own_threads(), own_processes(), _shm_entries())

    def leftovers(self) -> list[str]:
        """What is there now and was not then, a line each."""
        now = Inventory.take()
        left = sorted(now.fds - self.fds) + sorted(now.threads - self.threads)
        left += [_describe(process) for process in now.processes - self.processes]
        left += [f"{SHM}/{entry}" for entry in sorted(now.shm - self.shm) if not _is_mapped_by_others(entry)]
        return left

    def leftovers_after_wait(self, timeout_s: float = LEFTOVERS_TIMEOUT_S) -> list[str]:
        """leftovers(), given time for what ends by itself."""
        deadline = time.monotonic() + timeout_s
        while (left := self.leftovers()) and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_S)
        return left

    def clear(self) -> None:
        """Ends the processes and removes the entries that came since, so that the next test is not blamed for them."""
        for process in own_processes() - self.processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
                process.wait(timeout=LEFTOVERS_TIMEOUT_S)
        for entry in _shm_entries() - self.shm:
            if not _is_mapped_by_others(entry):
                (SHM / entry).unlink(missing_ok=True)
