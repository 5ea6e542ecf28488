"""A thousand helper processes on one block: attached at one moment, touching at random at one moment, all right."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pcshare import transport
from pcshare.coordinator import Options, Server
from pcshare.errors import AttachTimeout
from pcshare.keeper import Keeper
from pcshare.sources import parse_arguments
from pcshare_helpers.expected import expected_touch
from support import needs, wait_until
from support_coordinator import EXECUTABLES, coordinator, die_with_parent
from support_serving import LAZY, WAIT_S, HelperProcess, Serving, make_file

N_HELPERS = 1000
N_TOUCHES = 200
N_BYTES = 192 << 20  # more pages than they touch: faults go on until the end
FDS_A_HELPER = 3  # of the coordinator
FDS_BESIDE = 100
ATTACH_TIMEOUT_S, TOUCH_TIMEOUT_S = 40.0, 40.0

# Each waits here until all of them have been started, so that they connect at one moment.
BARRIER = 'read _; exec "$@" </proc/self/fd/"$BEGIN"'


@dataclass
class Crowd:
    """Processes of touch that wait for two signals: to connect, and to touch."""

    processes: list[subprocess.Popen[bytes]]
    connect: int  # closing it is the signal
    begin: int
    folder: Path

    def report(self, number: int) -> dict[str, Any]:
        said: dict[str, Any] = json.loads((self.folder / f"{number}.out").read_text().splitlines()[-1])
        return said

    def said(self, number: int) -> str:
        return (self.folder / f"{number}.err").read_text()


@contextlib.contextmanager
def crowd(socket: str, folder: Path, seed: int) -> Iterator[Crowd]:
    """N_HELPERS of them, each with a seed of its own; ended, whatever happens."""
    connect, begin = os.pipe(), os.pipe()
    made = Crowd([], connect[1], begin[1], folder)
    try:
        for number in range(N_HELPERS):
            touch = [str(EXECUTABLES / "touch"), f"--socket={socket}", "--pattern=random", "--latency", "--wait"]
            with (folder / f"{number}.out").open("wb") as out, (folder / f"{number}.err").open("wb") as err:
                one = subprocess.Popen(
                    ["/bin/sh", "-c", BARRIER, "sh", *touch, f"--count={N_TOUCHES}", f"--seed={seed + number}"],
                    stdin=connect[0],
                    stdout=out,
                    stderr=err,
                    pass_fds=[begin[0]],
                    env={**os.environ, "BEGIN": str(begin[0])},
                    preexec_fn=die_with_parent,
                )
            made.processes.append(one)
        yield made
    finally:
        for fd in (made.connect, made.begin, connect[0], begin[0]):
            with contextlib.suppress(OSError):
                os.close(fd)
        for process in made.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def release(fd: int) -> float:
    """Gives the signal; since when."""
    os.close(fd)
    return time.monotonic()


@pytest.mark.slow
def test_a_thousand_helpers_attach_at_once_and_read_the_right_bytes(
    runtime_dir: Path, tmp_path: Path, rng: random.Random, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """P1, P3, P4, P7: nobody is refused, nobody waits long, nothing is left."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = FDS_A_HELPER * N_HELPERS + FDS_BESIDE
    needs(None if hard in (-1, 0) or hard >= wanted else f"a hard limit of {wanted} open files (ulimit -Hn)")
    path = make_file(tmp_path, rng, N_BYTES)
    with coordinator(f"data={path}", options=["--stream=lazy"]) as served:
        before = served.held()
        with crowd(served.socket, tmp_path, seed) as helpers:
            connected_s = release(helpers.connect)
            wait_until(
                lambda: (
                    len(served.status().helpers) == N_HELPERS
                    or any(process.poll() is not None for process in helpers.processes)
                ),
                "all of them to be attached",
                ATTACH_TIMEOUT_S,
            )
            attached_s = time.monotonic() - connected_s
            assert {process.pid for process in helpers.processes} == {one.pid for one in served.status().helpers}, [
                helpers.said(number) for number, process in enumerate(helpers.processes) if process.poll() is not None
            ][:3]
            began_s = release(helpers.begin)
            for process in helpers.processes:
                process.wait(TOUCH_TIMEOUT_S)
            touched_s = time.monotonic() - began_s
            wrong = {
                number: (process.returncode, helpers.report(number), helpers.said(number))
                for number, process in enumerate(helpers.processes)
                if process.returncode != 0
                or helpers.report(number)["result"] != expected_touch(path, "random", seed + number, N_TOUCHES)
            }
            assert wrong == {}
            missing = sum(helpers.report(number)["missing_pages"] for number in range(N_HELPERS))
        status, block = served.status(), served.block("data")
        assert (block.foreign_pages, block.lost_pages) == (0, 0)
        assert status.helpers_joined == N_HELPERS
        served.wait_until_alone(before)
    with capsys.disabled():
        print(
            f"\n{N_HELPERS} helpers: attached in {attached_s:.2f} s; {N_HELPERS * N_TOUCHES} touches, {missing} of a "
            f"page that was not there, in {touched_s:.2f} s; {status.faults} faults, {status.faults / touched_s:.0f} a "
            f"second, answered after {status.blocktime.p50:.0f} us at the median, p99 {status.blocktime.p99:.0f}, at "
            f"most {status.blocktime.max:.0f}"
        )


def test_helper_waits_for_room_where_too_many_wait_to_be_accepted(
    runtime_dir: Path, tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P4: the kernel says EAGAIN to who connects; a helper hears of it only when its time is over."""
    monkeypatch.setattr(transport, "BACKLOG", 1)
    path = make_file(tmp_path, rng, 20 * 4096)
    options = Options(f"full-{os.getpid()}", parse_arguments([f"data={path}"]), stream_mode=LAZY)
    with contextlib.closing(Serving(Server(options, Keeper.spawn()))) as served, contextlib.ExitStack() as stack:
        served.server.start()  # it listens, and its loop does not run yet
        for _ in range(2):
            stack.enter_context(transport.connect(served.socket, WAIT_S))
        with pytest.raises(AttachTimeout):
            transport.connect(served.socket, 0.01)
        helper = stack.enter_context(HelperProcess(served.socket))
        helper.do(PEEK)
        assert helper.do("peek(100)") == (-errno.EAGAIN, True)
        with pytest.raises(AttachTimeout, match="too many helpers wait"):
            helper.do("attach(timeout_s=0.1)")
        pending = helper.start("peek(20000)")
        assert not pending.is_done()
        served.start_loop()
        assert pending.result()[0] == 0  # the text is that of its last try that failed


PEEK = """
from pcshare.core import lib
def peek(timeout_ms):
    rc = lib.pcshare_peek(ffi.new('struct pcshare_info *'), SOCKET.encode(), b'', 0, timeout_ms)
    return rc, b'too many helpers wait' in ffi.string(lib.pcshare_error_text())
"""
