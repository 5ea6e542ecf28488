"""crew: the processes that act: long-lived actors, and programs that come and go. Starts, feeds, hears and ends them.

Never waits for an actor: whatever it was told may take until a page comes. Knows nothing of what is right.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

LINE_BYTES_MAX = 1 << 24
EXECUTABLES = Path(__file__).resolve().parent.parent / "_bin"
COMPLAINT_CHARS = 2000


def has_numpy() -> bool:
    return importlib.util.find_spec("numpy") is not None


@dataclass
class Order:
    """What an actor was told and has not answered."""

    id: int
    content: dict[str, Any]
    sent_s: float
    outages: set[int] = field(default_factory=set)  # times without a coordinator that it met


@dataclass
class ActorProcess:
    """One actor. excused: it follows one that died of a page that was lost, so the plan's attachments are gone."""

    writer: int
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    pending: dict[int, Order] = field(default_factory=dict)
    heard_s: float = field(default_factory=time.monotonic)
    excused: bool = False
    _buffer: bytes = b""

    @classmethod
    def start(cls, socket: str, writer: int, world: str, environment: Mapping[str, str]) -> ActorProcess:
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (close() closes it)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pcshare.stress.actor", socket, str(writer), world],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            env={**os.environ, **environment},
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        return cls(writer, process, errors)

    @property
    def pid(self) -> int:
        return self.process.pid

    def fileno(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def tell(self, number: int, content: dict[str, Any]) -> Order:
        """Gives an order; a process that has died is noticed when it is heard."""
        assert self.process.stdin is not None
        if not self.pending:
            self.heard_s = time.monotonic()
        order = self.pending[number] = Order(number, content, time.monotonic())
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"id": number, **content}).encode() + b"\n")
        return order

    def hear(self) -> Iterator[tuple[Order, dict[str, Any]]]:
        """Answers that have come, with what they answer."""
        for line in self._lines():
            answer = json.loads(line)
            self.heard_s = time.monotonic()
            yield self.pending.pop(answer["id"]), answer

    def _lines(self) -> list[bytes]:
        while True:
            try:
                piece = os.read(self.fileno(), 1 << 16)
            except BlockingIOError:
                break
            if not piece or len(self._buffer) > LINE_BYTES_MAX:
                break
            self._buffer += piece
        *whole, self._buffer = self._buffer.split(b"\n")
        return whole

    def died(self) -> int | None:
        """Its exit code (negative: the signal), None while it lives."""
        return self.process.poll()

    def waits_s(self) -> float:
        """How long it has had something to do and said nothing."""
        return time.monotonic() - self.heard_s if self.pending else 0.0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def complaint(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")[-COMPLAINT_CHARS:].strip()

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        for end in (self.process.stdin, self.process.stdout, self.errors):
            if end is not None:
                with contextlib.suppress(BrokenPipeError):
                    end.close()


@dataclass
class Program:
    """A helper program on its own. expected: computes what it must find; None where that is not known."""

    name: str
    process: subprocess.Popen[str]
    expected: Callable[[], object] | None
    started_s: float
    killed: bool = False

    @classmethod
    def start(
        cls, name: str, socket: str, arguments: list[str], expected: Callable[[], object] | None = None
    ) -> Program:
        executable = EXECUTABLES / name
        command = [str(executable)] if executable.exists() else [sys.executable, "-P", "-m", f"pcshare_helpers.{name}"]
        process = subprocess.Popen(
            [*command, f"--socket={socket}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
        return cls(name, process, expected, time.monotonic())

    def kill(self) -> None:
        """At this very moment; it may be attaching. Its children, if it has any, find out."""
        if self.process.poll() is None:
            self.process.kill()
            self.killed = True

    def ended(self) -> bool:
        return self.process.poll() is not None

    def runs_s(self) -> float:
        return time.monotonic() - self.started_s

    def report(self) -> tuple[dict[str, Any], str]:
        """Its last line and its complaints; once, after its end."""
        out, err = self.process.communicate()
        lines = out.splitlines()
        with contextlib.suppress(ValueError):
            return (json.loads(lines[-1]) if lines else {}), err.strip()[-COMPLAINT_CHARS:]
        return {}, err.strip()[-COMPLAINT_CHARS:]

    def close(self) -> None:
        """With its children: they may wait for pages, and hold its pipes open."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@contextlib.contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """What is started inside has these variables, too. Only for moments in which nobody else starts anything."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def stderr_to(file: IO[bytes]) -> Iterator[None]:
    """What is started inside writes its stderr into a file. Only for moments in which nobody else writes."""
    before = os.dup(2)
    try:
        os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def tail(file: IO[bytes]) -> str:
    """The end of what was written into it."""
    length = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), COMPLAINT_CHARS, max(0, length - COMPLAINT_CHARS)).decode(errors="replace").strip()
