"""A real coordinator for tests: `pcshare coordinator` as a process, helper programs run against it, and what it holds.

Starts and ends it; makes no claims about it. It dies with the test run, also when that is killed. Needing SIGKILL to
end it is a failure of the test.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

import pcshare
from pcshare.status import BlockStatus, StatusReport, read_status
from pcshare.stress import resources, stacks
from support import wait_until

EXECUTABLES = Path(pcshare.__file__).parent / "_bin"
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
STATE_TIMEOUT_S = 30.0
HELPER_TIMEOUT_S = 60.0
PR_SET_PDEATHSIG = 1
READER_THREAD = "pcshare-read"  # started when reads wait, up to READERS_MAX a block, and kept
READERS_MAX = 16 + 2

_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """For preexec_fn: the process gets SIGKILL when the thread that started it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(frozen=True)
class Held:
    """What a coordinator and its keeper hold at one moment."""

    fds: int
    threads: int  # without the readers of a source
    keeper_fds: int
    processes: int

    def is_within(self, before: Held) -> bool:
        """Whether it is no more than before, of anything."""
        now = (self.fds, self.threads, self.keeper_fds, self.processes)
        then = (before.fds, before.threads, before.keeper_fds, before.processes)
        return all(a <= b for a, b in zip(now, then, strict=True))


@dataclass
class Serving:
    """A coordinator that serves."""

    name: str
    pid: int
    socket: str
    process: subprocess.Popen[bytes]  # what was started: its keeper

    def status(self) -> StatusReport:
        """What its status segment says; it is not asked."""
        return read_status(self.name)

    def block(self, idstr: str) -> BlockStatus:
        return next(block for block in self.status().blocks if block.idstr == idstr)

    def wait_for_state(self, state: str, idstr: str = "data") -> BlockStatus:
        """A page is seen before it is counted, and a block is whole before it is said to be at its END."""
        wait_until(lambda: self.block(idstr).state == state, f"state {state} of block {idstr}", STATE_TIMEOUT_S)
        return self.block(idstr)

    def held(self) -> Held:
        serves, keeper = psutil.Process(self.pid), psutil.Process(self.process.pid)
        resources.wait_until_asleep(keeper)
        below = keeper.children(recursive=True)
        names = []
        for path in Path(f"/proc/{self.pid}/task").glob("*/comm"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                names.append(path.read_text().strip())
        threads = sum(name != READER_THREAD for name in names)
        assert len(names) - threads <= READERS_MAX * len(self.status().blocks)
        return Held(serves.num_fds(), threads, keeper.num_fds(), len(below))

    def wait_until_alone(self, before: Held) -> None:
        """Until every helper has gone from its tables and it holds what it held before they came."""
        wait_until(lambda: not self.status().helpers, f"an end of the helpers of {self.name}")
        wait_until(
            lambda: self.held().is_within(before),
            f"{self.name} to hold no more than before: {before} then, {self.held()} now",
        )


@dataclass
class Finished:
    """A helper program that has ended."""

    returncode: int
    report: dict[str, Any]
    stderr: str


class Helper:
    """A helper program that runs: a module of pcshare_helpers, or an executable of pcshare/_bin."""

    def __init__(self, served: Serving, program: str, *arguments: object) -> None:
        executable = EXECUTABLES / program
        command = [str(executable)] if executable.exists() else [sys.executable, "-m", f"pcshare_helpers.{program}"]
        self.process = subprocess.Popen(
            [*command, f"--socket={served.socket}", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )

    def finish(self, timeout_s: float = HELPER_TIMEOUT_S) -> Finished:
        """Waits for its end; its last line is its report."""
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            pytest.fail(f"{self.process.args!r} did not end within {timeout_s:g} s; it said {out!r} {err!r}")
        lines = out.splitlines()
        report = json.loads(lines[-1]) if lines else {}
        return Finished(self.process.returncode, report, err)


def run_helper(served: Serving, program: str, *arguments: object) -> Finished:
    """A helper program from its start to its end."""
    return Helper(served, program, *arguments).finish()


@contextlib.contextmanager
def coordinator(
    *sources: str, name: str | None = None, options: Sequence[str] = (), within: Sequence[str] = ()
) -> Iterator[Serving]:
    """A coordinator of these blocks (BLOCK=SOURCE), ready when the body starts, ended by SIGTERM when it is left.
    within: words of a command that runs another one in its place."""
    name = name or f"test-{os.getpid()}-{time.monotonic_ns() % 10**9}"
    command = [*within, sys.executable, "-m", "pcshare", "coordinator", f"--name={name}", "--json"]
    if os.geteuid():
        command.append("--debug")  # else psutil could not count for us
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, *options, "--", *sources],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            preexec_fn=die_with_parent,
        )
        try:
            ready = _wait_for_ready(process, log)
            yield Serving(name, int(ready["pid"]), read_status(name).socket, process)
            _stop(process, log)
        finally:
            _kill(process)


def _wait_for_ready(process: subprocess.Popen[bytes], log: IO[bytes]) -> dict[str, Any]:
    """The one JSON line that it prints when attach would succeed."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], READY_TIMEOUT_S)[0]:
        pytest.fail(f"the coordinator was not ready within {READY_TIMEOUT_S:g} s:\n{_said(log)}")
    line = process.stdout.readline()
    if not line:
        pytest.fail(f"the coordinator ended before it was ready:\n{_said(log)}")
    ready: dict[str, Any] = json.loads(line)
    assert ready["event"] == "ready"
    return ready


def _stop(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    if process.poll() is not None:
        pytest.fail(f"the coordinator had ended by itself, with {process.returncode}:\n{_said(log)}")
    process.terminate()
    try:
        returncode = process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        where = "\n".join(stacks.threads(pid, f"process {pid}") for pid in family)
        pytest.fail(f"the coordinator did not end within {STOP_TIMEOUT_S:g} s of SIGTERM:\n{_said(log)}\n{where}")
    assert returncode == 0, _said(log)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """After a failure; a coordinator that has ended is not hit."""
    if process.poll() is None:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _said(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")
