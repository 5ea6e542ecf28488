"""helper_c_support: the two C programs that test the helper's side: a small coordinator, and a helper that obeys.

Both are driven line by line over pipes; who waits for something waits for its line. They die with the test's process.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from support import wait_until

TESTS = Path(__file__).resolve().parent
CORE = TESTS.parent / "pcshare" / "core"
LIBRARY = (
    *sorted(CORE.glob("helper*.c")),
    *(CORE / f"{name}.c" for name in ("bitmap", "uffd", "status_segment", "trace", "fd_message")),
)
FLAGS = ("-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{CORE}")
SANITIZERS = {
    "plain": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
    "thread": ("-fsanitize=thread",),
    # A kernel without UFFDIO_POISON, as all before 6.6.
    "unpoisoned": ("-Wl,--wrap=uffd_poison", str(TESTS / "c" / "without_poison.c")),
}
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "handle_segv=0:handle_sigbus=0:allow_user_segv_handler=1:detect_leaks=1",
    "TSAN_OPTIONS": "die_after_fork=0:handle_segv=0:handle_sigbus=0:halt_on_error=0:exitcode=66",
}
WAIT_S = 30.0  # far more than anything here takes; a test that reaches it has failed

ATTACHED, COMPLETE, ORPHANED, LOST = 1, 2, 3, 4


def build(folder: Path, name: str, build_name: str) -> Path:
    """One of tests/c, with the library's own files linked in."""
    program = folder / f"{name}-{build_name}"
    sources = [str(path) for path in (TESTS / "c" / f"{name}.c", *LIBRARY)]
    subprocess.run(["cc", *FLAGS, *SANITIZERS[build_name], *sources, "-o", str(program)], check=True)
    return program


class Program:
    """A child that is talked to line by line."""

    def __init__(self, *argv: str | Path) -> None:
        self.process = subprocess.Popen(
            [str(argument) for argument in argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **SANITIZER_OPTIONS},
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.seen: list[str] = []
        self.errors = ""
        self._readers = [threading.Thread(target=self._read_lines), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _pipe(self, pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def _read_lines(self) -> None:
        for line in self._pipe(self.process.stdout):
            self.lines.put(line.rstrip("\n"))
        self.lines.put("<end>")

    def _read_errors(self) -> None:
        for line in self._pipe(self.process.stderr):
            self.errors += line

    def write(self, line: str) -> None:
        self._pipe(self.process.stdin).write(line + "\n")
        self._pipe(self.process.stdin).flush()

    def wait_line(self, wanted: Callable[[str], bool], what: str) -> str:
        """The first line, of those not asked for before, that is wanted."""
        deadline = time.monotonic() + WAIT_S
        for index, line in enumerate(self.seen):
            if wanted(line):
                return self.seen.pop(index)
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(
                    f"waited in vain for {what}; there was {self.seen}; stderr: {self.errors}"
                ) from None
            if wanted(line):
                return line
            self.seen.append(line)
            assert line != "<end>", f"it ended before {what}; there was {self.seen}; stderr: {self.errors}"

    def count(self, prefix: str) -> int:
        """How many lines so far, not asked for, begin with prefix."""
        while not self.lines.empty():
            self.seen.append(self.lines.get())
        return sum(line.startswith(prefix) for line in self.seen)

    def close(self) -> int:
        """Ends it by the end of its input; its exit status."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe(self.process.stdin).close()
        try:
            status = self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        finally:
            for reader in self._readers:
                reader.join()
            self._pipe(self.process.stdout).close()
            self._pipe(self.process.stderr).close()
        return status


class SmallCoordinator(Program):
    """tests/c/small_coordinator.c."""

    def __init__(
        self,
        program: Path,
        socket: Path,
        *,
        pages: int = 16,
        tail: int = 4096,
        page_size: int = 4096,
        orphan_ms: int = 0,
        options: tuple[str, ...] = (),
    ) -> None:
        super().__init__(program, socket, str(pages), str(tail), str(page_size), str(orphan_ms), *options)
        self.pid = self._served()

    def _served(self) -> int:
        return int(self.event("serving").split()[1])

    def event(self, prefix: str) -> str:
        return self.wait_line(
            lambda line: line == prefix or line.startswith(prefix + " "), f"the coordinator's {prefix!r}"
        )

    def do(self, command: str) -> None:
        self.write(command)
        self.event(f"done {command}")

    def total(self, prefix: str) -> int:
        """How many events until now, not asked for, begin with prefix."""
        self.do("sync")
        return self.count(prefix)

    def kill(self) -> None:
        os.kill(self.pid, 9)
        self.event("server-gone")

    def killed_itself(self) -> None:
        self.event("server-gone")

    def restart(self) -> None:
        self.write("restart")
        self.pid = self._served()


class Helper(Program):
    """tests/c/helper_driver.c. A result is what it answered, without the tag."""

    def __init__(self, program: Path, socket: Path) -> None:
        super().__init__(program, socket)
        self._tags = 0

    def start(self, command: str) -> str:
        """Runs the command in a thread of the helper; the tag to ask for the result with."""
        self._tags += 1
        tag = f"&{self._tags}"
        self.write(f"{tag} {command}")
        return tag

    def result(self, tag: str) -> str:
        return self.wait_line(lambda line: line.startswith(tag + " "), f"the answer {tag}")[len(tag) + 1 :].strip()

    def do(self, command: str) -> str:
        self._tags += 1
        tag = f"t{self._tags}"
        self.write(f"{tag} {command}")
        return self.result(tag)

    def number(self, command: str) -> int:
        return int(self.do(command).split()[0])

    def attach(self, slot: int = 0, mode: str = "ro", timeout_ms: int = 20000, place: str = "") -> None:
        answer = self.do(f"attach {slot} {mode} {timeout_ms} {place}")
        assert answer.split()[0] == "0", answer
        # Under the address sanitizer a fork must not meet a thread that starts: its allocator's locks would stay.
        wait_until(lambda: self.number(f"state {slot}") == COMPLETE or self.number("sentinels") == 1, "the sentinel")
