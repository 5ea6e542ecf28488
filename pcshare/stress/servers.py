"""servers: processes that are the source of a block, which a round starts, kills, stops and starts again.

nbdkit where it is installed, else `pcshare serve`. Knows no block and no coordinator.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from pcshare import runtime
from pcshare.stress.tally import Stuck

LISTEN_LIMIT_S = 20.0  # until it listens: a start of Python on a loaded machine
LOOK_AGAIN_S = 0.01
NBDKIT = "nbdkit"


def has_nbdkit() -> bool:
    return shutil.which(NBDKIT) is not None


class Server:
    """One server of one file, at one socket, whichever process it is at present. close() ends it for good."""

    def __init__(self, path: Path, socket_path: Path, *, with_nbdkit: bool) -> None:
        self.environment = dict(os.environ)
        self._path, self._socket = path, socket_path
        self._with_nbdkit = with_nbdkit
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self._socket}"

    @property
    def is_there(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        self._socket.unlink(missing_ok=True)  # nbdkit takes no socket's place
        self._process = subprocess.Popen(
            self._command(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.environment,
        )

    def _command(self) -> list[str]:
        if self._with_nbdkit:
            return [NBDKIT, "--exit-with-parent", "--foreground", "--unix", str(self._socket), "file", str(self._path)]
        return [sys.executable, "-P", "-m", "pcshare", "serve", f"block={self._path}", f"--socket={self._socket}"]

    def listens(self) -> bool:
        return self.is_there and runtime.is_listening(self._socket)

    def wait_until_listening(self) -> None:
        deadline_s = time.monotonic() + LISTEN_LIMIT_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self._socket))
                return
            time.sleep(LOOK_AGAIN_S)
        raise Stuck(f"the server of {self._path} does not listen after {LISTEN_LIMIT_S:g} s")

    def ended_by_itself(self) -> int | None:
        """Its exit code, negative for a signal; None: it runs, or was killed."""
        return None if self._process is None else self._process.poll()

    def stop(self) -> None:
        """SIGSTOP."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL at this moment; its connections break."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.kill()
        self._socket.unlink(missing_ok=True)
