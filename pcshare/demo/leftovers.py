"""leftovers: what the show left behind in this process, below it and in /dev/shm (promise P7).

Counts and cleans nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from pcshare import runtime

SETTLE_TIMEOUT_S = 5.0  # a process that was told to end, and the thread of an attachment, take a moment
LOOK_PERIOD_S = 0.02


@dataclass(frozen=True)
class Leaked:
    """How much more there is than before; all 0 is right."""

    fds: int
    processes: int
    threads: int
    shm: int

    @property
    def nothing(self) -> bool:
        return not any(vars(self).values())

    def to_json(self) -> dict[str, int]:
        return dict(vars(self))


class Inventory:
    """What this process has, at one moment."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._fds, self._threads = self._process.num_fds(), self._process.num_threads()
        self._children = set(self._process.children(recursive=True))
        self._others: set[psutil.Process] = set()

    def watch(self, processes: Iterable[psutil.Process]) -> None:
        """These belong to the show, whoever is their parent by now. This process is not, although it attaches."""
        self._others.update(set(processes) - {self._process})

    def leaked(self, names: Iterable[str]) -> Leaked:
        """What has come since and stayed, given time to go. names: of the coordinators there were."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while not (found := self._compare(list(names))).nothing and time.monotonic() < deadline:
            time.sleep(LOOK_PERIOD_S)
        return found

    def _compare(self, names: list[str]) -> Leaked:
        processes = set(self._process.children(recursive=True)) - self._children
        processes |= {process for process in self._others if process.is_running()}
        return Leaked(
            fds=max(0, self._process.num_fds() - self._fds),
            processes=len(processes),
            threads=max(0, self._process.num_threads() - self._threads),
            shm=sum(runtime.shm_path(name).exists() for name in names),
        )
