"""served: the coordinator of a round, whichever process it is at present: killed, replaced, stopped, given orders.

Keeps the books of who was killed, so that a coordinator that ends although nobody killed it is a failure. Knows no
helper and no block.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

import psutil

from pcshare import admin, errors
from pcshare.launcher import Coordinator
from pcshare.protocol import AdminOp
from pcshare.status import StatusReport, read_status
from pcshare.stress import resources
from pcshare.stress.resources import Held
from pcshare.stress.tally import Stuck, Tally, Zero

# From the last kill until another one serves: a start takes some tenths of a second, some seconds on a loaded machine;
# the keeper waits up to 5 s before it starts one again that was killed before it served.
RESTART_LIMIT_S = 30.0
ORDER_AGAIN_S = 0.05
DEATH_LIMIT_S = 10.0  # from the end of a coordinator to that of its keeper: with memory to give back
# What the keeper and a failing coordinator write.
_KILLED = re.compile(rb"pcshare-keeper: the coordinator \(pid (\d+)\) was killed by signal (\d+)")
_TROUBLE = re.compile(rb"^.*(?:ended with exit code|Traceback|not kept ).*$", re.M)


@dataclass
class Replacing:
    """A `pcshare coordinator --replace` that runs."""

    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    since_s: float

    def complaint(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace").strip()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


class Served:
    """begin() when it serves and nobody is attached: what it holds then is what it may hold in the end."""

    def __init__(self, coordinator: Coordinator, log: IO[bytes], tally: Tally) -> None:
        report = coordinator.status()
        assert coordinator.socket is not None
        self.name, self.socket = coordinator.name, coordinator.socket
        self._coordinator, self._log, self._tally = coordinator, log, tally
        self.pid, self.keeper = report.pid, psutil.Process(report.keeper_pid)
        resources.wait_until_asleep(self.keeper)
        self.before = (Held.of(psutil.Process(self.pid)), Held.of(self.keeper))
        self._killed: set[int] = set()
        self._replacing: list[Replacing] = []
        self._expected_restarts = self._died_at_steps = 0
        self._changed_s = self._killed_s = -RESTART_LIMIT_S
        self._stopped: list[psutil.Process] = []
        self.note_deaths: Callable[[], None] = lambda: None  # called before anything is held to be a failure

    def limit_fds(self, spare: int) -> None:
        """So many more than it has now, for it, its keeper and whoever comes after it."""
        most = max(int(fd) for fd in os.listdir(f"/proc/{self.pid}/fd")) + 1 + spare
        for process in (psutil.Process(self.pid), self.keeper):
            process.rlimit(psutil.RLIMIT_NOFILE, (most, most))

    # -- what happens to it

    def kill(self) -> None:
        """SIGKILL to whoever is the coordinator at this moment, also if it only begins to be."""
        for child in self._children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
                self._killed.add(child.pid)
                self._tally.coordinator_kills += 1
                self._expected_restarts += 1
                self._changed_s = self._killed_s = time.monotonic()

    def _children(self) -> list[psutil.Process]:
        """Living ones: one, or none between two coordinators."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child for child in self.keeper.children() if child.status() != psutil.STATUS_ZOMBIE]
        return []

    def replace(self) -> None:
        """Another process of the same program takes its place, in its own time."""
        complaints = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        command = [sys.executable, "-P", "-m", "pcshare", "coordinator", f"--name={self.name}", "--replace", "--json"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=complaints)
        self._replacing.append(Replacing(process, complaints, time.monotonic()))
        self._expected_restarts += 1
        self._changed_s = time.monotonic()

    def stop(self, *, the_keeper: bool) -> psutil.Process | None:
        """SIGSTOP; who must get the SIGCONT."""
        stopped = next(iter(self._children()), None) if not the_keeper else self.keeper
        if stopped is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                stopped.suspend()
                self._stopped.append(stopped)
        return stopped

    def go_on(self) -> None:
        """Whoever was stopped and still lives."""
        while self._stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._stopped.pop().resume()

    def end_by_kill(self) -> None:
        """Dead, and nobody starts it again."""
        if self.keeper.ppid() == self.pid:  # it has no keeper that could
            psutil.Process(self.pid).kill()
            return
        self.keeper.suspend()
        self.kill()
        self.keeper.kill()

    @property
    def is_being_replaced(self) -> bool:
        return bool(self._replacing)

    def has_died(self) -> None:
        """At a named step, as it was told to."""
        self._died_at_steps += 1
        self._tally.coordinator_kills += 1
        self._expected_restarts += 1
        self._changed_s = self._killed_s = time.monotonic()

    # -- orders

    def order(self, op: AdminOp, argument: int = 0) -> None:
        """Carried out when this returns, also if another coordinator must come first."""
        self.go_on()
        while True:
            try:
                admin.send(self.socket, op, argument)
                return
            except (errors.PcshareError, OSError) as error:
                self.note_deaths()
                if not self.is_changing():
                    self._tally.fail(f"the order {op.name} failed: {error}")
                    return
                time.sleep(ORDER_AGAIN_S)

    # -- looks

    def is_changing(self) -> bool:
        """It was killed or replaced a short time ago."""
        return bool(self._replacing) or time.monotonic() - self._changed_s < RESTART_LIMIT_S

    def serves(self) -> bool:
        report = read_status(self.name)
        return report.alive and report.pid not in self._killed and not self._replacing

    def look(self, report: StatusReport) -> bool:
        """Whether it serves. Failures: it is dead for too long, or died although nobody killed it."""
        self._reap_replacing()
        if report.restarts > self._expected_restarts or not report.alive:
            self.note_deaths()
        if report.restarts > self._expected_restarts:
            ended = f"killed or replaced {self._expected_restarts} times"
            self._tally.fail(f"it was started again {report.restarts} times, and {ended}")
        if report.alive and report.pid not in self._killed:
            if report.pid != self.pid:
                self.pid = report.pid
                self._tally.restarts += 1
            return True
        if not self.is_changing():
            self._tally.fail(f"no coordinator serves {RESTART_LIMIT_S:g} s after the last kill", Zero.STUCK)
            raise Stuck
        return False

    def _reap_replacing(self) -> None:
        for one in [one for one in self._replacing if one.process.poll() is not None]:
            self._replacing.remove(one)
            self._changed_s = time.monotonic()
            if one.process.returncode == 0:
                self._tally.replaces += 1
            elif self._killed_s < one.since_s - RESTART_LIMIT_S:  # else it was dying, or starting
                self._tally.fail(f"replacing it failed: {one.complaint()}")
            one.close()

    def held(self) -> tuple[Held, Held] | None:
        """What coordinator and keeper hold; None: it dies at this moment. Whether it may is found out elsewhere."""
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return Held.of(psutil.Process(self.pid)), Held.of(self.keeper)
        return None

    def compare(self, when: str, allowed: dict[str, int], allowed_keeper: dict[str, int]) -> None:
        now = self.held()
        if now is None:
            return
        for whose, before, held, may in zip(
            ("coordinator", "keeper"), self.before, now, (allowed, allowed_keeper), strict=True
        ):
            for resource, was in vars(before).items():
                self._tally.see_growth(f"{when}: {whose}", resource, vars(held)[resource] - was)
            for growth in resources.grown(whose, before, held, may):
                self._tally.fail(f"{when}: {growth}", Zero.LEAKS)

    # -- the end

    def close(self) -> None:
        while self._replacing:
            self._replacing.pop().close()
        self.go_on()

    def check_log(self) -> None:
        """What they wrote: nobody was killed by anything but us, and nobody failed."""
        self._log.seek(0)
        written = self._log.read()
        others = [(int(pid), int(n)) for pid, n in _KILLED.findall(written) if int(pid) not in self._killed]
        if len(others) > self._died_at_steps or any(number != signal.SIGKILL for _, number in others):
            self._tally.fail(f"coordinators were killed, and not by us: {others}")
        for line in _TROUBLE.findall(written):
            self._tally.fail(f"it wrote: {line.decode(errors='replace')}")

    def left(self) -> list[int]:
        """Processes that still run and must not."""
        deadline_s = time.monotonic() + DEATH_LIMIT_S
        while (left := [pid for pid in (self.pid, self.keeper.pid) if _runs(pid)]) and time.monotonic() < deadline_s:
            time.sleep(ORDER_AGAIN_S)
        return left


def _runs(pid: int) -> bool:
    """A zombie does not: whoever adopted it has not waited for it yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
