"""actions: what a plan's actions do: kills and stops, sources that fail, broken rules, helpers that come.

Carries them out, one after the other, and notes what they do to blocks and sources; judges nothing.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pcshare import transport
from pcshare.protocol import AdminOp
from pcshare.stress import crew, troupe
from pcshare.stress.arms import Arms
from pcshare.stress.plan import Action
from pcshare.stress.served import Served
from pcshare.stress.servers import Server
from pcshare.stress.tally import Tally
from pcshare.stress.troupe import Troupe
from pcshare.stress.world import ERROR_FILE, MadeBlock

ORDER_AGAIN_MS = 50
GARBAGE_TIMEOUT_S = 5.0
STEP_LIMIT_S = 6.0  # until somebody has died at its step, counted from the last thing that was done for it
HOSTILE_LIMIT_S = 20.0  # a helper that breaks the rules takes that long at most, or is killed
NUMPY_PROGRAMS = {"random_lookup", "numpy_user"}
STREAM_OPS = {
    "pause": AdminOp.STREAM_PAUSE,
    "resume": AdminOp.STREAM_RESUME,
    "rate": AdminOp.STREAM_RATE,
    "lazy": AdminOp.STREAM_LAZY,
    "eager": AdminOp.STREAM_EAGER,
}


class Actions:
    """Of one round. page_size is the blocks', poison the policy; arms: None if nobody dies at steps."""

    def __init__(
        self,
        folder: Path,
        blocks: Mapping[str, MadeBlock],
        servers: Mapping[str, Server],
        served: Served,
        troupe: Troupe,
        tally: Tally,
        arms: Arms | None,
        *,
        page_size: int,
        poison: bool,
    ) -> None:
        self._error_file = folder / ERROR_FILE
        self._blocks, self._servers, self._served = blocks, servers, served
        self._troupe, self._tally, self._arms = troupe, tally, arms
        self._page_size, self._poison = page_size, poison
        self._down: set[Server] = set()
        self.scrapped: set[str] = set()  # blocks from which a helper removed pages
        self.planted: set[str] = set()  # blocks in which somebody broke the rules
        self.offenders: set[int] = set()  # the pids of those who did
        self.resumes = 0  # in a row, while no source failed

    def source_fails(self) -> bool:
        """Whether any does: a server that was killed fails until the next one listens, which takes a while to start."""
        for server in [server for server in self._down if server.listens()]:
            self._down.discard(server)
            self.resumes = 0
        return self._error_file.exists() or bool(self._down)

    def carry_out(self, action: Action) -> None:
        single: dict[str, Callable[[Action], object]] = {
            "kill": self._kill,
            "kill_attaching": self._kill_attaching,
            "kill_coordinator": self._kill_coordinator,
            "replace": self._replace_coordinator,
            "kill_source": self._kill_source,
            "stop": self._stop_somebody,
            "arm": self._arm,
            "await_death": self._await_death,
            "offend": self._offend,
            "plant": self._plant,
            "remove": self._remove,
            "touch": self._touch,
            "kill_touch": self._kill_touch,
            "helper": self._helper,
            "stream": self._stream,
            "source_error": self._source_error,
            "garbage": self._garbage,
        }
        if action.kind in single:
            single[action.kind](action)
        else:
            self._troupe.tell(action.actor, **_order(action))

    def _kill(self, action: Action) -> None:
        self._troupe.pump(action.after_ms / 1000)
        self._troupe.kill(action.actor)

    def _kill_attaching(self, action: Action) -> None:
        """At a random step of the hand-over."""
        self._troupe.quiet(action.actor)
        self._troupe.tell(action.actor, **{**_order(action), "kind": "attach"})
        self._troupe.pump(action.after_ms / 1000)
        self._troupe.kill(action.actor)

    def _arm(self, action: Action) -> None:
        """Somebody is killed, and who comes in its place dies at that step."""
        assert self._arms is not None
        self.take_dead()
        party, _, step = action.order.partition(":")
        if party == "coordinator":
            self._arms.arm(party, party, step, action.count)
            self._served.kill()
            self._troupe.outage_begins()
        elif party == "helper":
            self._arms.arm(party, troupe.actor_name(action.actor), step, action.count)
            self._troupe.kill(action.actor)
        else:
            self._arms.arm(party, action.block, step, action.count)
            self._kill_source(action)

    def _await_death(self, action: Action) -> None:
        """Not for ever: what makes the step come may have been done already."""
        assert self._arms is not None
        deadline_s = time.monotonic() + STEP_LIMIT_S
        while self._arms.is_waiting() and time.monotonic() < deadline_s:
            self._troupe.pump(0.02)
        self.disarm()

    def take_dead(self) -> None:
        """Who has died at its step."""
        for one in self._arms.take_dead() if self._arms is not None else ():
            if one.party == "coordinator":
                self._served.has_died()
                self._troupe.outage_begins()
            elif one.party == "helper":
                self._tally.kills += 1
            else:
                self.source_gone(self._servers[one.who], 0)

    def _offend(self, action: Action) -> None:
        """A helper that breaks the protocol, and is cut off."""
        self._hostile("unknown-type", action)

    def _plant(self, action: Action) -> None:
        """A helper that fills a page which nobody has read yet; nobody may read it before it is found."""
        self.planted.add(action.block)
        self._hostile("fallocates", action)

    def _remove(self, action: Action) -> None:
        """A helper that removes pages of a block: what it holds from here on is not the source's."""
        self.scrapped.add(action.block)
        self._hostile("madv-remove", action)

    def _hostile(self, row: str, action: Action) -> None:
        path = self._blocks[action.block].path
        command = [f"--block={action.block}", f"--source={path}", f"--seed={action.seed}", row]
        hostile = crew.Program.start("hostile", self._served.socket, command)
        self.offenders.add(hostile.process.pid)
        deadline_s = time.monotonic() + HOSTILE_LIMIT_S
        while not hostile.ended() and time.monotonic() < deadline_s:
            self._troupe.pump(0.02)
        hostile.close()

    def _kill_coordinator(self, action: Action) -> None:
        self._troupe.pump(action.after_ms / 1000)
        self._served.kill()
        self._troupe.outage_begins()

    def _replace_coordinator(self, action: Action) -> None:
        self._troupe.pump(action.after_ms / 1000)
        if not self._served.is_being_replaced:
            self._served.replace()

    def _kill_source(self, action: Action) -> None:
        """And another one comes, in time or, with poison, too late for some pages."""
        server = self._servers[action.block]
        if not server.is_there:
            return
        self.source_gone(server, action.after_ms)

    def source_gone(self, server: Server, away_ms: int) -> None:
        server.kill()
        self._tally.source_kills += 1
        self._down.add(server)
        self._troupe.may_lose |= self._poison
        self._troupe.later(away_ms, server.start)

    def _stop_somebody(self, action: Action) -> None:
        """SIGSTOP, and SIGCONT a while later."""
        if action.order in ("coordinator", "keeper"):
            self._served.stop(the_keeper=action.order == "keeper")
            self._troupe.later(action.after_ms, self._served.go_on)
        elif action.order == "source":
            for server in self._servers.values():
                server.stop()
                self._troupe.later(action.after_ms, server.go_on)
        else:
            process = self._troupe.somebody(action.actor, a_program=action.order == "program")
            process.send_signal(signal.SIGSTOP)
            self._troupe.later(action.after_ms, lambda: process.send_signal(signal.SIGCONT))

    def _touch(self, action: Action) -> crew.Program:
        from pcshare_helpers.expected import expected_touch

        block = self._blocks[action.block]
        arguments = [f"--block={action.block}", "--pattern=random", f"--seed={action.seed}", f"--count={action.count}"]
        return self._troupe.start(
            "touch",
            arguments,
            None
            if block.plan.writable
            else lambda: expected_touch(block.path, "random", action.seed, action.count, self._page_size),
        )

    def _kill_touch(self, action: Action) -> None:
        program = self._touch(action)
        self._troupe.later(action.after_ms, lambda: self._troupe.kill_program(program))

    def _helper(self, action: Action) -> None:
        from pcshare_helpers import expected

        program = action.order
        if program in NUMPY_PROGRAMS and not crew.has_numpy():
            self._tally.note("numpy is missing: scan instead of random_lookup and numpy_user")
            program = "scan"
        path = self._blocks[action.block].path
        right: dict[str, Callable[[], object]] = {
            "scan": lambda: expected.expected_scan(path),
            "random_lookup": lambda: expected.expected_random(path),
            "forking_pool": lambda: expected.expected_writer(path),
            "numpy_user": lambda: expected.expected_numpy(path),
        }
        self._troupe.start(program, [f"--block={action.block}"], right[program])

    def _stream(self, action: Action) -> None:
        self.order(STREAM_OPS[action.order], action.count if action.order == "rate" else 0)

    def order(self, op: AdminOp, argument: int = 0) -> None:
        """At once if somebody serves, else when somebody does: the plan goes on meanwhile."""
        if self._served.serves():
            self._served.order(op, argument)
        else:
            self._troupe.later(ORDER_AGAIN_MS, lambda: self.order(op, argument))

    def _source_error(self, action: Action) -> None:
        if self._error_file.exists():
            return
        self._error_file.touch()
        self._troupe.may_lose |= self._poison
        self._troupe.later(action.after_ms, self.source_back)

    def source_back(self) -> None:
        self._error_file.unlink(missing_ok=True)
        self.resumes = 0
        self.order(AdminOp.RESUME)

    def _garbage(self, action: Action) -> None:
        """A stranger who speaks no protocol."""
        with contextlib.suppress(OSError), transport.connect(self._served.socket, GARBAGE_TIMEOUT_S) as stranger:
            stranger.send(random.Random(action.seed).randbytes(action.count))

    def disarm(self) -> None:
        """Nobody dies any more of what it was told."""
        if self._arms is not None:
            self._arms.close()
            self.take_dead()


def _order(action: Action) -> dict[str, object]:
    """What an actor is told of an action."""
    told = ("kind", "slot", "block", "mode", "seed", "count", "after_ms")
    return {key: getattr(action, key) for key in told}
