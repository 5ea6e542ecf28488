"""troupe: the crew of one round: gives orders, hears answers and judges them, and finds who waits for ever.

Everything that takes time happens in pump(): answers, ends of programs, what is due later, looks at the coordinator.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import select
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

from pcshare import trace
from pcshare.stress import stacks
from pcshare.stress.arms import Arms
from pcshare.stress.crew import ActorProcess, Order, Program
from pcshare.stress.plan import SLOT_BYTES
from pcshare.stress.tally import Stuck, Tally, Zero
from pcshare.stress.world import slot_writes

# An order takes milliseconds; behind a slow source or across restarts on a loaded machine, some seconds.
HANG_LIMIT_S = 30.0
PROGRAM_LIMIT_S = 90.0  # a scan of a whole block, page by page
ATTACH_LIMIT_S = 30  # of a program, across restarts
PENDING_MAX = 6  # orders that an actor has not answered: its pipes never fill
LOOK_PERIOD_S = 0.2
# What a program is told that is one too many.
TOO_MANY = ("more are not allowed", "the coordinator has no file descriptor left")

# block: offset: what may be found there, as hex: what was written last and acknowledged and, where a writer died before
# it said more, what it was told to write
Ledger = dict[str, dict[int, list[str]]]


class Troupe:
    """Actors and programs on one coordinator."""

    def __init__(
        self,
        socket: str,
        world: str,
        actors: int,
        tally: Tally,
        look: Callable[[], None],
        arms: Arms | None = None,
    ) -> None:
        self._socket, self._world, self._look = socket, world, look
        self._arms = arms
        self._facts: dict[str, Any] = json.loads(world)
        self._outage: int | None = None
        self.tally = tally
        self._ids = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._programs: list[Program] = []
        self._looked_s = 0.0
        self.ledger: Ledger = {}
        self.may_lose = False  # the source has lost pages at this time: SIGBUS is right
        self.may_refuse = False  # there is a low limit: who is too many is told so
        self.actors: list[ActorProcess] = []
        for writer in range(actors):
            self.actors.append(self._start(writer))

    def close(self) -> None:
        for actor in self.actors:
            actor.close()
        for program in self._programs:
            program.close()
        self.actors, self._programs = [], []

    # -- time

    def later(self, after_ms: int, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + after_ms / 1000, next(self._ids), act))

    def somebody(self, writer: int, *, a_program: bool) -> subprocess.Popen[Any]:
        """A program that runs, if one is wanted and there is one; else that actor."""
        programs: list[subprocess.Popen[Any]] = [program.process for program in self._programs]
        return programs[0] if a_program and programs else self.actors[writer].process

    def settle(self) -> None:
        """Does at once what was due later."""
        while self._due:
            heapq.heappop(self._due)[2]()

    def pump(self, timeout_s: float) -> None:
        """Lets time pass and notices what happens."""
        end_s = time.monotonic() + timeout_s
        while True:
            self._do_due()
            now = time.monotonic()
            next_s = min([end_s, self._looked_s + LOOK_PERIOD_S, *(self._due[0][:1] if self._due else ())])
            self._hear(max(0.0, next_s - now))
            self._reap_programs()
            if time.monotonic() - self._looked_s >= LOOK_PERIOD_S:
                self._looked_s = time.monotonic()
                self._look()
                self._check_stuck()
            if time.monotonic() >= end_s:
                return

    def pump_until(self, condition: Callable[[], bool], what: str, limit_s: float = HANG_LIMIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                self.tally.fail(f"waited {limit_s:g} s in vain for {what}", Zero.STUCK)
                raise Stuck
            self.pump(0.005)

    def _do_due(self) -> None:
        while self._due and self._due[0][0] <= time.monotonic():
            heapq.heappop(self._due)[2]()

    # -- actors

    def tell(self, writer: int, **content: Any) -> None:
        """Gives an order; first waits until the actor has room for one more."""
        self.pump_until(lambda: len(self.actors[writer].pending) < PENDING_MAX, f"answers of actor {writer}")
        order = self.actors[writer].tell(next(self._ids), {"slot": -1, **content})
        if self._outage is not None:
            order.outages.add(self._outage)

    def quiet(self, writer: int) -> None:
        """Until the actor has answered everything."""
        self.pump_until(lambda: not self.actors[writer].pending, f"answers of actor {writer}")

    def all_quiet(self) -> None:
        for writer in range(len(self.actors)):
            self.quiet(writer)
        self.pump_until(lambda: not self._programs, "an end of the helper programs", PROGRAM_LIMIT_S)

    def outage_begins(self) -> None:
        """The coordinator has gone: whoever waits now waits for another one."""
        if self._outage is None:
            self._outage = self.tally.new_outage()
        for actor in self.actors:
            for order in actor.pending.values():
                order.outages.add(self._outage)

    def outage_ends(self) -> None:
        self._outage = None

    def kill(self, writer: int) -> None:
        """SIGKILL at this moment, and a new actor in its place."""
        self.actors[writer].kill()
        self.tally.kills += 1
        self._replace(writer)

    def _replace(self, writer: int) -> None:
        """A new actor; what the dead one had been told to write may be there or not."""
        old = self.actors[writer]
        for order, answer in old.hear():  # said before it died
            self._take(old, order, answer)
        for order in old.pending.values():
            if order.content["kind"] == "write":
                self._doubt(order.content, writer)
        old.close()
        self.actors[writer] = self._start(writer)

    def _start(self, writer: int) -> ActorProcess:
        changes = {} if self._arms is None else {trace.DIE_VARIABLE: str(self._arms.path(actor_name(writer)))}
        return ActorProcess.start(self._socket, writer, self._world, changes)

    def _doubt(self, order: dict[str, Any], writer: int) -> None:
        """What was there, or what it was about to write."""
        facts, written = self._facts[order["block"]], self.ledger.setdefault(order["block"], {})
        with open(facts["path"], "rb") as source:
            for offset, value in slot_writes(facts["length"], writer, order["seed"], order["count"]):
                source.seek(offset)
                may_be = written.setdefault(offset, [source.read(SLOT_BYTES).hex()])
                may_be.append(value.hex())

    def hear_one(self, actor: ActorProcess) -> None:
        """What it has said by now, judged."""
        for order, answer in actor.hear():
            self._take(actor, order, answer)

    def _hear(self, timeout_s: float) -> None:
        poller = select.poll()
        by_fd = {actor.fileno(): actor for actor in self.actors}
        for fd in by_fd:
            poller.register(fd, select.POLLIN)
        for fd, _ in poller.poll(timeout_s * 1000):
            actor = by_fd[fd]
            self.hear_one(actor)
            code = actor.died()
            if code is not None:
                self._bury(actor, code)

    def _bury(self, actor: ActorProcess, code: int) -> None:
        """Nobody killed it: right only if it touched a page that is lost."""
        if code == -signal.SIGBUS and self.may_lose:
            self.tally.lost_deaths += 1
        elif code == -signal.SIGKILL and self._arms is not None and self._arms.has_died(actor_name(actor.writer)):
            pass  # at its step
        else:
            doing = next(iter(actor.pending.values()), None)
            told = f"actor {actor.writer} died ({_ending(code)}) at {doing.content if doing else 'nothing'}"
            self.tally.fail(f"{told}: {actor.complaint()}")
        self._replace(actor.writer)
        self.actors[actor.writer].excused = True

    def _take(self, actor: ActorProcess, order: Order, answer: dict[str, Any]) -> None:
        """Judges an answer."""
        content = order.content
        what = f"actor {actor.writer} at {content['kind']} of block {content.get('block')} ({content.get('mode')})"
        self.tally.bytes_checked += answer.get("checked", 0)
        for outage in order.outages:
            self.tally.see_wait(outage, answer.get("slowest_ms", 0.0))
        if answer.get("wrong"):
            told = f"{what}: {answer['wrong']} bytes differ from the source, pages {answer['pages'][:8]}"
            self.tally.fail(told, Zero.WRONG_BYTES, answer["wrong"])
        if answer.get("lost_writes"):
            lost = answer["lost_writes"]
            self.tally.fail(f"{what}: {len(lost)} writes are lost, offsets {lost[:8]}", Zero.LOST_WRITES, len(lost))
        if answer.get("refused"):
            self._refused(actor, what)
        if "error" in answer:
            self.tally.fail(f"{what}: {answer['error']}")
        if answer.get("lost") and not self.may_lose:
            self.tally.fail(f"{what}: told of lost pages, and the source has lost none")
        if answer.get("absent") and not actor.excused:
            self.tally.fail(f"{what}: the attachment is not there")
        for offset, value in answer.get("written", ()):
            self.ledger.setdefault(content["block"], {})[offset] = [value]

    def _refused(self, actor: ActorProcess, what: str) -> None:
        """It is one too many: the plan's attachment is not there."""
        self.tally.refusals += 1
        actor.excused = True
        if not self.may_refuse:
            self.tally.fail(f"{what}: refused, and there was room")

    # -- programs

    def start(self, name: str, arguments: list[str], expected: Callable[[], object] | None) -> Program:
        program = Program.start(name, self._socket, [*arguments, f"--attach-timeout={ATTACH_LIMIT_S}"], expected)
        self._programs.append(program)
        return program

    def kill_program(self, program: Program) -> None:
        program.kill()
        self.tally.kills += program.killed

    def _reap_programs(self) -> None:
        for program in [program for program in self._programs if program.ended()]:
            self._programs.remove(program)
            report, complaint = program.report()
            self._judge(program, report, complaint)

    def _judge(self, program: Program, report: dict[str, Any], complaint: str) -> None:
        code = program.process.returncode
        if (program.killed and code == -signal.SIGKILL) or (code == -signal.SIGBUS and self.may_lose):
            return
        if code and self.may_refuse and any(text in complaint for text in TOO_MANY):
            self.tally.refusals += 1
        elif code or not report.get("ok"):
            self.tally.fail(f"{program.name} ended with {_ending(code)}: {complaint or report}")
        elif program.expected is not None and report["result"] != (right := program.expected()):
            told = f"{program.name} found {report['result']}, right is {right}; {program.process.args!r}"
            self.tally.fail(told, Zero.WRONG_BYTES, report["bytes_checked"])
        else:
            self.tally.bytes_checked += report["bytes_checked"]

    # -- who waits for ever

    def _check_stuck(self) -> None:
        stuck = [(actor.pid, f"actor {actor.writer}", actor.waits_s()) for actor in self.actors]
        found = [(pid, who) for pid, who, waits_s in stuck if waits_s > HANG_LIMIT_S]
        found += [(p.process.pid, p.name) for p in self._programs if p.runs_s() > PROGRAM_LIMIT_S]
        for pid, who in found:
            where = "waits for a page" if stacks.wait_channel(pid) == stacks.WAITING_FOR_A_PAGE else "hangs"
            told = f"{who} {where}, too long, at {self._doing(pid)}\n{stacks.threads(pid, who)}"
            self.tally.fail(told, Zero.STUCK)
        if found:
            raise Stuck

    def _doing(self, pid: int) -> str:
        orders = (order for actor in self.actors if actor.pid == pid for order in actor.pending.values())
        return next((json.dumps(order.content) for order in orders), "its work")


def actor_name(writer: int) -> str:
    return f"actor-{writer}"


def _ending(code: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return f"exit status {code}"
