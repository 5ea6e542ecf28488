"""actor: a helper program that attaches, checks, writes, forks and leaves as it is told, a JSON line each.

Run as `python -m pcshare.stress.actor`. Every byte that it reads is compared with the source file; it answers each
order with what it checked. It may be killed or stopped at any moment, so it owns nothing that outlives it. One thread:
while it waits for a page it does nothing else, and that is what is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from pcshare.client import Block, attach
from pcshare.errors import LimitReached, PcshareError, SourceLost
from pcshare.stress.plan import PAGE, SLOT_BYTES
from pcshare.stress.world import differing, pages_of, run_of_pages, slot_writes
from pcshare.trace import DIE_VARIABLE

ATTACH_TIMEOUT_S = 30.0
ENSURE_TIMEOUT_S = 60.0
END_TIMEOUT_S = 5.0  # from the last page to the news of it; a restart may lie between
LOOK_AGAIN_S = 0.005
PR_SET_PDEATHSIG = 1
NO_FDS_LEFT = (errno.EMFILE, errno.ENFILE)  # in the coordinator, which says so
CHILD_DIFFERS = 3  # exit status of a forked child that read a wrong byte


class Attachment:
    """A block, the file that says what it must hold, and what was written through it."""

    def __init__(self, block: Block, world: dict[str, Any], writer: int) -> None:
        self.block = block
        self.view = memoryview(block)
        self.slot_area = int(world["slot_area"])
        self.fd = os.open(world["path"], os.O_RDONLY | os.O_CLOEXEC)
        self.writer = writer
        self.own: dict[int, bytes] = {}  # cow: what is written stays here
        self.slowest_s = 0.0  # the longest touch since somebody asked

    def close(self) -> None:
        self.view.release()
        self.block.close()
        os.close(self.fd)

    def page_count(self) -> int:
        return -(-len(self.view) // PAGE)

    def pages(self, seed: int, count: int) -> list[int]:
        return pages_of(self.page_count(), seed, count)

    def run(self, seed: int, count: int) -> list[int]:
        return run_of_pages(self.page_count(), seed, count)

    def _touch(self, page: int) -> bytes:
        """Its bytes; waits for them if they are not here, and notes how long."""
        start_s = time.monotonic()
        found = bytes(self.view[page * PAGE : (page + 1) * PAGE])
        self.slowest_s = max(self.slowest_s, time.monotonic() - start_s)
        return found

    def take_slowest_ms(self) -> float:
        slowest_s, self.slowest_s = self.slowest_s, 0.0
        return round(slowest_s * 1000, 3)

    def check(self, pages: list[int]) -> tuple[int, int, list[int]]:
        """(bytes compared, bytes that differ, pages with such)."""
        checked, wrong, where = 0, 0, []
        for page in pages:
            found = self._touch(page)
            expected = self._expected(page)
            bad = differing(found, expected, self.slot_area)
            checked += len(found)
            wrong += bad
            if bad:
                where.append(page)
        return checked, wrong, where

    def _expected(self, page: int) -> bytes:
        return self.own.get(page) or os.pread(self.fd, PAGE, page * PAGE)

    def write(self, seed: int, count: int) -> list[tuple[int, str]]:
        """Into this writer's slot of each page: (offset, value as hex)."""
        written = []
        for offset, value in slot_writes(len(self.view), self.writer, seed, count):
            self.view[offset : offset + SLOT_BYTES] = value
            written.append((offset, value.hex()))
        return written

    def scribble(self, pages: list[int], seed: int) -> None:
        """Over whole pages of a private mapping: nobody else may ever see it."""
        for page in pages:
            start, stop = page * PAGE, min((page + 1) * PAGE, len(self.view))
            value = random.Random(seed + page).randbytes(stop - start)
            self.view[start:stop] = value
            self.own[page] = value

    def verify(self, written: dict[str, list[str]]) -> list[int]:
        """Offsets of slots that hold none of what they may: what was acknowledged last or, after the death of a writer,
        what it was about to write; where nobody wrote, what the source has."""
        lost = []
        for page in range(self.page_count() if self.slot_area else 0):
            area = slice(page * PAGE, min(page * PAGE + self.slot_area, len(self.view)))
            found, source = bytes(self.view[area]), os.pread(self.fd, self.slot_area, page * PAGE)
            for start in range(0, len(found) - SLOT_BYTES + 1, SLOT_BYTES):
                slot = slice(start, start + SLOT_BYTES)
                offset = page * PAGE + start
                if found[slot].hex() not in written.get(str(offset), [source[slot].hex()]):
                    lost.append(offset)
        return lost


class Actor:
    """The attachments of this process, by the plan's slots."""

    def __init__(self, socket: str, writer: int, world: dict[str, Any]) -> None:
        self._socket, self._writer, self._world = socket, writer, world
        self._slots: dict[int, Attachment] = {}

    def carry_out(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answer; {"absent": true} where the attachment is not there."""
        joins = {
            "attach": self._attach,
            "churn": self._churn,
            "leave_all": self._leave_all,
            "check_all": self._check_all,
            "verify": self._verify,
            "complete": self._complete,
        }
        uses: dict[str, Callable[[Attachment, dict[str, Any]], dict[str, Any]]] = {
            "check": self._check,
            "ensure": self._ensure,
            "prefetch": self._prefetch,
            "write": self._write,
            "cow": self._cow,
            "fork": self._fork,
        }
        kind, slot = order["kind"], order["slot"]
        if kind in joins:
            return joins[kind](order)
        if slot not in self._slots:
            return {"absent": True}
        if kind == "leave":
            self._slots.pop(slot).close()
            return {}
        return uses[kind](self._slots[slot], order)

    def _leave_all(self, order: dict[str, Any]) -> dict[str, Any]:
        while self._slots:
            self._slots.popitem()[1].close()
        return {}

    def _check_all(self, order: dict[str, Any]) -> dict[str, Any]:
        """Some pages of each attachment: nothing is lost or wrong for those who were there all the time."""
        told: dict[str, Any] = {"checked": 0, "wrong": 0, "pages": []}
        for attachment in self._slots.values():
            seen = self._compare(attachment, attachment.pages(order["seed"], order["count"]))
            told |= {key: told[key] + seen[key] for key in told}
        return told

    def _complete(self, order: dict[str, Any]) -> dict[str, Any]:
        """All of a block; stays until it has heard that it is complete, or for a while."""
        attachment = self._open(order["block"], order["mode"])
        try:
            attachment.block.ensure(timeout_s=ENSURE_TIMEOUT_S)
            deadline_s = time.monotonic() + END_TIMEOUT_S
            while attachment.block.state != "complete" and time.monotonic() < deadline_s:
                time.sleep(LOOK_AGAIN_S)
            return self._compare(attachment, list(range(attachment.page_count())))
        finally:
            attachment.close()

    def _churn(self, order: dict[str, Any]) -> dict[str, Any]:
        """Comes and goes, again and again, and looks at one page each time."""
        told: dict[str, Any] = {"checked": 0, "wrong": 0, "pages": []}
        for i in range(order["count"]):
            attachment = self._open(order["block"], order["mode"])
            try:
                seen = self._compare(attachment, attachment.pages(order["seed"] + i, 1)[:1])
            finally:
                attachment.close()
            told |= {key: told[key] + seen[key] for key in told}
        return told

    def _open(self, block: str, mode: str) -> Attachment:
        attached = attach(socket=self._socket, block=block, mode=mode, timeout_s=ATTACH_TIMEOUT_S)
        return Attachment(attached, self._world[block], self._writer)

    def _attach(self, order: dict[str, Any]) -> dict[str, Any]:
        self._slots[order["slot"]] = self._open(order["block"], order["mode"])
        return {}

    def _verify(self, order: dict[str, Any]) -> dict[str, Any]:
        """The end of a round: all of a block through a fresh attachment, and the writes of everybody."""
        attachment = self._open(order["block"], "ro")
        try:
            attachment.block.ensure(timeout_s=ENSURE_TIMEOUT_S)
            told = self._compare(attachment, list(range(attachment.page_count())))
            return {**told, "lost_writes": attachment.verify(order["written"])}
        finally:
            attachment.close()

    @staticmethod
    def _compare(attachment: Attachment, pages: list[int]) -> dict[str, Any]:
        checked, wrong, where = attachment.check(pages)
        return {"checked": checked, "wrong": wrong, "pages": where, "slowest_ms": attachment.take_slowest_ms()}

    def _check(self, attachment: Attachment, order: dict[str, Any]) -> dict[str, Any]:
        return self._compare(attachment, attachment.pages(order["seed"], order["count"]))

    def _ensure(self, attachment: Attachment, order: dict[str, Any]) -> dict[str, Any]:
        pages = attachment.run(order["seed"], order["count"])
        attachment.block.ensure(slice(pages[0] * PAGE, (pages[-1] + 1) * PAGE), timeout_s=ENSURE_TIMEOUT_S)
        return self._compare(attachment, pages)

    @staticmethod
    def _prefetch(attachment: Attachment, order: dict[str, Any]) -> dict[str, Any]:
        pages = attachment.run(order["seed"], order["count"])
        attachment.block.prefetch(slice(pages[0] * PAGE, (pages[-1] + 1) * PAGE))
        return {}

    @staticmethod
    def _write(attachment: Attachment, order: dict[str, Any]) -> dict[str, Any]:
        return {"written": attachment.write(order["seed"], order["count"])}

    def _cow(self, attachment: Attachment, order: dict[str, Any]) -> dict[str, Any]:
        pages = attachment.pages(order["seed"], order["count"])
        attachment.scribble(pages, order["seed"])
        return self._compare(attachment, pages)

    def _fork(self, attachment: Attachment, order: dict[str, Any]) -> dict[str, Any]:
        """A child checks what it inherits; it may be killed while it does."""
        pages = attachment.pages(order["seed"], order["count"])
        child = os.fork()
        if child == 0:
            _be_child(attachment, pages)
        if order["after_ms"]:
            time.sleep(order["after_ms"] / 1000)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killed = code == -signal.SIGKILL and (bool(order["after_ms"]) or DIE_VARIABLE in os.environ)
        if code == -signal.SIGBUS:
            return {"lost": True}
        if code == CHILD_DIFFERS:
            return {"checked": 0, "wrong": 1, "pages": pages}
        return {"checked": 0 if killed else len(pages) * PAGE, "wrong": 0} | (
            {} if code == 0 or killed else {"error": f"a forked child ended with {code}"}
        )


def _be_child(attachment: Attachment, pages: list[int]) -> None:
    """Never returns."""
    code = 1
    try:
        code = CHILD_DIFFERS if attachment.check(pages)[1] else 0
    finally:
        os._exit(code)


def main() -> None:
    """Orders from stdin until it ends; one answer each on stdout."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    socket, writer, world = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    actor = Actor(socket, writer, world)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = actor.carry_out(order)
        except SourceLost:
            answer = {"lost": True}
        except PcshareError as error:
            is_limit = isinstance(error, LimitReached) or error.errno in NO_FDS_LEFT
            answer = {"refused": True} if is_limit else {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"id": order["id"], **answer}), flush=True)


if __name__ == "__main__":
    main()
