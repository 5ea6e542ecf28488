"""round: the life of one coordinator under stress: start, the plan's actions, checks meanwhile, and an orderly end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil

from pcshare import admin, errors, runtime, transport
from pcshare.launcher import Coordinator, Event
from pcshare.protocol import AdminOp
from pcshare.status import StatusReport, read_status
from pcshare.stress import crew, resources, stacks, world
from pcshare.stress.plan import HUGE_PAGE, PAGE, Action, RoundPlan
from pcshare.stress.resources import Held
from pcshare.stress.tally import Stuck, Tally
from pcshare.stress.troupe import Troupe

RESOURCES_PERIOD_S = 1.0
LEAVE_LIMIT_S = 20.0
LOOK_AGAIN_S = 0.002
ORPHAN_TIMEOUT_S = 1.0
LAST_SLOT = -2  # no action of a plan has it
LAST_ORDER = -1  # and no order this number or one below
RESUMES_MAX = 50  # in a row, while no source fails: more means that it never works
GARBAGE_TIMEOUT_S = 5.0
NUMPY_PROGRAMS = {"random_lookup", "numpy_user"}
STREAM_OPS = {
    "pause": AdminOp.STREAM_PAUSE,
    "resume": AdminOp.STREAM_RESUME,
    "rate": AdminOp.STREAM_RATE,
    "lazy": AdminOp.STREAM_LAZY,
    "eager": AdminOp.STREAM_EAGER,
}


class Round:
    """play() leaves nothing behind, whatever ends it. hold is called at the first failure, while all still runs."""

    def __init__(
        self, plan: RoundPlan, folder: Path, actors: int, tally: Tally, deadline_s: float, hold: Callable[[], None]
    ) -> None:
        self._plan, self._folder, self._actors, self._tally = plan, folder, actors, tally
        self._deadline_s, self._hold = deadline_s, hold
        self._name = f"stress-{os.getpid()}-{plan.number}"
        self._error_file = folder / world.ERROR_FILE
        self._resumes = 0
        self._held_s = 0.0
        self._disabled: set[tuple[int, int]] = set()
        self._foreign = 0
        self._stopping = False

    def play(self) -> None:
        own = psutil.Process()
        before = Held.of(own)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", RuntimeWarning)
            self._play_and_end()
        for warning in warned:
            self._tally.fail(str(warning.message))
        self._check_nothing_left(own, before)

    def _play_and_end(self) -> None:
        self._blocks = world.make_blocks(self._plan, self._folder)
        with contextlib.ExitStack() as closing:
            self._log = closing.enter_context(tempfile.TemporaryFile())
            with crew.stderr_to(self._log):
                self._coordinator = closing.enter_context(self._make())
            report = self._coordinator.status()
            self._processes = (psutil.Process(report.pid), psutil.Process(report.keeper_pid))
            self._before = tuple(Held.of(process) for process in self._processes)
            assert self._coordinator.socket is not None
            self._socket = self._coordinator.socket
            self._troupe = Troupe(
                self._socket, world.blocks_argument(self._blocks), self._actors, self._tally, self._look
            )
            closing.callback(self._troupe.close)
            try:
                self._act()
                self._end()
            except Stuck:
                self._tally.failures.append(self._diagnosis())
                self._hold()

    # -- start

    def _make(self) -> Coordinator:
        huge = self._plan.huge and world.free_huge_pages() >= self._huge_pages_needed()
        if self._plan.huge and not huge:
            self._tally.note("not enough free huge pages: 4 KiB pages instead (sysctl vm.nr_hugepages=64)")
        self._page_size = HUGE_PAGE if huge else PAGE
        return Coordinator(
            self._name,
            {name: block.source for name, block in self._blocks.items()},
            stream=self._plan.stream,
            page_size=self._page_size,
            writable=[name for name, block in self._blocks.items() if block.plan.kind == "draft"],
            on_source_loss="poison" if self._plan.poison else "pause",
            on_event=self._hear,
            fault_threads=self._plan.fault_threads,
            orphan_timeout_s=ORPHAN_TIMEOUT_S,
        )

    def _huge_pages_needed(self) -> int:
        return sum(-(-block.path.stat().st_size // HUGE_PAGE) for block in self._blocks.values())

    def _hear(self, event: Event) -> None:
        """In the launcher's thread."""
        if event.name == "ended" and not self._stopping:
            self._tally.fail(f"the coordinator ended by itself: {event.reason}")

    # -- the plan

    def _act(self) -> None:
        for action in self._plan.actions:
            if time.monotonic() > self._deadline_s or self._tally.failures:
                break
            self._troupe.pump(action.pause_ms / 1000)
            self._tally.actions[action.kind] += 1
            self._carry_out(action)
        if self._tally.failures:
            raise Stuck

    def _carry_out(self, action: Action) -> None:
        single: dict[str, Callable[[Action], object]] = {
            "kill": self._kill,
            "kill_attaching": self._kill_attaching,
            "stop": self._stop_actor,
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

    def _stop_actor(self, action: Action) -> None:
        actor = self._troupe.actors[action.actor]
        crew.stop(actor)
        self._troupe.later(action.after_ms, lambda: crew.go_on(actor))

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
        self._order(STREAM_OPS[action.order], action.count if action.order == "rate" else 0)

    def _order(self, op: AdminOp, argument: int = 0) -> None:
        try:
            admin.send(self._socket, op, argument)
        except errors.PcshareError as error:
            self._tally.fail(f"the order {op.name} failed: {error}")

    def _source_error(self, action: Action) -> None:
        if self._error_file.exists():
            return
        self._error_file.touch()
        self._troupe.may_lose |= self._plan.poison
        self._troupe.later(action.after_ms, self._source_back)

    def _source_back(self) -> None:
        self._error_file.unlink(missing_ok=True)
        self._resumes = 0
        self._order(AdminOp.RESUME)

    def _garbage(self, action: Action) -> None:
        """A stranger who speaks no protocol."""
        with contextlib.suppress(OSError), transport.connect(self._socket, GARBAGE_TIMEOUT_S) as stranger:
            stranger.send(random.Random(action.seed).randbytes(action.count))

    # -- looks

    def _look(self) -> None:
        """At the status segment, a few times a second; at resources once a second."""
        report = read_status(self._name)
        if not report.alive:
            self._tally.fail("the coordinator is dead")
            raise Stuck
        for helper in report.helpers:
            if helper.state == "disabled" and (helper.slot, helper.pid) not in self._disabled:
                self._disabled.add((helper.slot, helper.pid))
                self._tally.fail(f"helper {helper.pid} on block {helper.block} was cut off and did nothing wrong")
        foreign = sum(block.foreign_pages for block in report.blocks)
        if foreign > self._foreign:
            self._foreign = foreign
            self._tally.fail(f"{foreign} foreign pages, and nobody broke the rules")
        self._resume_if_paused(report)
        if time.monotonic() - self._held_s >= RESOURCES_PERIOD_S:
            self._held_s = time.monotonic()
            self._check_during(report)

    def _needs_resume(self, report: StatusReport) -> bool:
        return any(block.state == "PAUSED" or block.lost_pages for block in report.blocks)

    def _resume_if_paused(self, report: StatusReport) -> None:
        """An error that was on its way when the source came back pauses a block again: the operator resumes again."""
        if self._error_file.exists() or not self._needs_resume(report):
            return
        self._resumes += 1
        if self._resumes > RESUMES_MAX:
            states = [(block.idstr, block.state, block.lost_pages, block.reason) for block in report.blocks]
            self._tally.fail(f"resumed {RESUMES_MAX} times, and the blocks are {states}")
            raise Stuck
        self._order(AdminOp.RESUME)

    def _files(self) -> int:
        return sum(block.plan.kind != "zero" for block in self._blocks.values())

    def _pages_bytes(self) -> int:
        return sum(block.plan.pages * PAGE for block in self._blocks.values()) + HUGE_PAGE

    def _check_during(self, report: StatusReport) -> None:
        serves, keeper = self._processes
        allowed = resources.allowed_during(len(report.helpers), self._files(), self._pages_bytes(), self._page_size)
        self._compare("during", (Held.of(serves), Held.of(keeper)), allowed)

    def _compare(self, when: str, now: tuple[Held, Held], allowed: dict[str, int]) -> None:
        for whose, before, held, may in zip(
            ("coordinator", "keeper"),
            self._before,
            now,
            (allowed, resources.allowed_keeper(self._pages_bytes())),
            strict=True,
        ):
            for resource, was in vars(before).items():
                self._tally.see_growth(f"{when}: {whose}", resource, vars(held)[resource] - was)
            for growth in resources.grown(whose, before, held, may):
                self._tally.fail(f"{when}: {growth}")

    # -- the end

    def _end(self) -> None:
        """Everything works again, everybody answers; then the coordinator's life ends in the plan's way."""
        troupe = self._troupe
        troupe.settle()
        self._source_back()
        troupe.all_quiet()
        troupe.pump_until(lambda: not self._needs_resume(read_status(self._name)), "an end of the pauses")
        if self._plan.ending in ("stopped", "killed"):
            self._end_under_helpers()
            return
        self._verify()
        if self._plan.ending == "leave":
            self._leave()
            self._wait_until_alone()
        self._stop_coordinator()
        if self._plan.ending == "stay":
            self._ask_without_coordinator({"kind": "leave_all", "slot": -1})

    def _verify(self) -> None:
        """Every byte and every write is looked at."""
        self._order(AdminOp.STREAM_EAGER)
        for index, block in enumerate(self._blocks):
            writer = index % self._actors
            self._troupe.tell(writer, kind="verify", block=block, written=self._troupe.ledger.get(block, {}))
            self._troupe.quiet(writer)

    def _stop_coordinator(self) -> None:
        self._count(read_status(self._name))
        self._stopping = True
        self._coordinator.stop()

    def _end_under_helpers(self) -> None:
        """Pages that are missing when it has gone are SIGBUS after the orphan timeout. Never zeros, never for ever."""
        self._order(AdminOp.STREAM_LAZY)
        last = {
            "kind": "check",
            "slot": LAST_SLOT,
            "block": "holes",
            "mode": "ro",
            "seed": self._plan.number,
            "count": 64,
        }
        for writer in range(self._actors):
            self._troupe.tell(writer, **{**last, "kind": "attach"})
        self._troupe.all_quiet()
        if self._plan.ending == "killed":
            self._count(read_status(self._name))
            self._stopping = True
            self._processes[0].kill()
        else:
            self._stop_coordinator()
        self._ask_without_coordinator(last)

    def _leave(self) -> None:
        for writer in range(self._actors):
            self._troupe.tell(writer, kind="leave_all")
        self._troupe.all_quiet()

    def _ask_without_coordinator(self, order: dict[str, object]) -> None:
        """Every actor, with the coordinator gone: it answers, or dies of a page that did not come."""
        actors = self._troupe.actors
        for number, actor in enumerate(actors):
            actor.tell(LAST_ORDER - number, {**order, "seed": number})
        deadline = time.monotonic() + LEAVE_LIMIT_S
        for actor in actors:
            while actor.pending and actor.died() is None and time.monotonic() < deadline:
                self._troupe.hear_one(actor)
                time.sleep(LOOK_AGAIN_S)
            self._troupe.hear_one(actor)
            code = actor.died()
            if code is not None and not (code == -signal.SIGBUS and order["kind"] == "check"):
                self._tally.fail(f"actor {actor.writer} died ({code}) at {order['kind']} without the coordinator")
            elif code is None and actor.pending:
                where = stacks.threads(actor.pid, f"actor {actor.writer}")
                self._tally.fail(f"{order['kind']} takes for ever without the coordinator\n{where}")

    def _wait_until_alone(self) -> None:
        """Everybody has gone: what the coordinator holds must be what it held before."""
        allowed = resources.allowed_after(self._files(), self._pages_bytes(), self._page_size)
        serves, keeper = self._processes

        def settled() -> bool:
            return not read_status(self._name).helpers and not resources.grown(
                "", self._before[0], Held.of(serves), allowed
            )

        deadline = time.monotonic() + LEAVE_LIMIT_S
        while not settled() and time.monotonic() < deadline:
            self._troupe.pump(0.02)
        left = [(helper.pid, helper.state, helper.block) for helper in read_status(self._name).helpers]
        if left:
            self._tally.fail(f"helpers that have left are still in the tables after {LEAVE_LIMIT_S:g} s: {left}")
        self._compare("after all have left", (Held.of(serves), Held.of(keeper)), allowed)

    def _count(self, report: StatusReport) -> None:
        self._tally.faults += report.faults
        self._tally.joins += report.helpers_joined
        self._tally.leaves += report.helpers_left

    def _diagnosis(self) -> str:
        """What everybody did when something went wrong."""
        serves, keeper = self._processes
        parts = [stacks.threads(serves.pid, "coordinator"), stacks.threads(keeper.pid, "keeper")]
        with contextlib.suppress(errors.PcshareError):
            report = read_status(self._name)
            parts += [f"{block}" for block in report.blocks]
            parts += [
                f"helper {h.pid} {h.state} on {h.block}: waiting {h.waiting}, faults {h.faults}" for h in report.helpers
            ]
        return "\n".join([*parts, "the coordinator wrote:", crew.tail(self._log)])

    def _check_nothing_left(self, own: psutil.Process, before: Held) -> None:
        """P7: nothing of the round in this process, below it, in /dev/shm or among the sockets."""
        now = Held.of(own)
        for resource in ("fds", "threads", "children"):
            was, still = vars(before)[resource], vars(now)[resource]
            if still > was:
                self._tally.fail(f"after the round: {resource} of this process grew from {was} to {still}")
        for path in (runtime.shm_path(self._name), runtime.socket_path(self._name)):
            if path.exists():
                self._tally.fail(f"after the round: {path} is still there")
        for process in getattr(self, "_processes", ()):
            if process.is_running():
                self._tally.fail(f"after the round: process {process.pid} still runs")


def _order(action: Action) -> dict[str, object]:
    """What an actor is told of an action."""
    told = ("kind", "slot", "block", "mode", "seed", "count", "after_ms")
    return {key: getattr(action, key) for key in told}
