"""round: the life of one coordinator under stress: start, the plan's actions, checks meanwhile, and an orderly end."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil

from pcshare import errors, probe, runtime, trace, working_set
from pcshare.launcher import Coordinator, Event
from pcshare.protocol import AdminOp
from pcshare.status import StatusReport, read_status
from pcshare.stress import crew, resources, servers, stacks, world
from pcshare.stress.actions import Actions
from pcshare.stress.arms import Arms
from pcshare.stress.plan import HUGE_PAGE, PAGE, RoundPlan
from pcshare.stress.resources import Held
from pcshare.stress.served import RESTART_LIMIT_S, Served
from pcshare.stress.tally import Stuck, Tally, Zero
from pcshare.stress.troupe import Troupe

RESOURCES_PERIOD_S = 1.0
LEAVE_LIMIT_S = 20.0
LOSS_LIMIT_S = 2.0  # what a source lost before it was back is known by then
LOOK_AGAIN_S = 0.002
# How long helpers wait for a coordinator: one that is killed is back in time for a child of fork, which must find it.
ORPHAN_TIMEOUT_S, ORPHAN_TIMEOUT_KILLS_S = 1.0, 15.0
LAST_SLOT = -2  # no action of a plan has it
LAST_ORDER = -1  # and no order this number or one below
RESUMES_MAX = 50  # in a row, while no source fails: more means that it never works
CHECK_ALL_PAGES = 64  # of each attachment, in the end


class Round:
    """play() leaves nothing behind, whatever ends it. hold is called at the first failure, while all still runs."""

    def __init__(
        self, plan: RoundPlan, folder: Path, actors: int, tally: Tally, deadline_s: float, hold: Callable[[], None]
    ) -> None:
        self._plan, self._folder, self._actors, self._tally = plan, folder, actors, tally
        self._deadline_s, self._hold = deadline_s, hold
        self._name = f"stress-{os.getpid()}-{plan.number}"
        self._recorded, self._replayed = folder / "recorded.ws", folder / "replayed.ws"
        self._arms = Arms(folder, tally) if plan.dies_at_steps else None
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
        self._check_recorded()

    def _play_and_end(self) -> None:
        self._blocks = world.make_blocks(self._plan, self._folder, with_nbdkit=self._has_nbdkit())
        with contextlib.ExitStack() as closing:
            self._start_servers(closing)
            self._log = closing.enter_context(tempfile.TemporaryFile())
            closing.callback(self._check_log)
            with crew.stderr_to(self._log), crew.environment(self._environment("coordinator")):
                self._coordinator = closing.enter_context(self._make())
            self._served = Served(self._coordinator, self._log, self._tally)
            closing.callback(self._served.close)
            if self._plan.fds_spare is not None:
                self._served.limit_fds(self._plan.fds_spare)
            self._troupe = Troupe(
                self._served.socket,
                world.blocks_argument(self._blocks),
                self._actors,
                self._tally,
                self._look,
                self._arms,
            )
            self._troupe.may_refuse = self._plan.has_low_limit
            closing.callback(self._troupe.close)
            self._actions = Actions(
                self._folder,
                self._blocks,
                self._servers,
                self._served,
                self._troupe,
                self._tally,
                self._arms,
                page_size=self._page_size,
                poison=self._plan.poison,
            )
            self._served.note_deaths = self._actions.take_dead
            try:
                self._act()
                self._end()
            except Stuck:
                self._tally.failures.append(self._diagnosis())
                self._hold()

    def _check_log(self) -> None:
        if hasattr(self, "_served"):
            self._served.check_log()

    # -- start

    def _has_nbdkit(self) -> bool:
        if not self._plan.nbdkit:
            return False
        if self._plan.served and not servers.has_nbdkit():
            self._tally.note("nbdkit is missing: `pcshare serve` as the servers")
        return servers.has_nbdkit()

    def _environment(self, who: str) -> dict[str, str]:
        return {} if self._arms is None else {trace.DIE_VARIABLE: str(self._arms.path(who))}

    def _start_servers(self, closing: contextlib.ExitStack) -> None:
        self._servers = {name: block.server for name, block in self._blocks.items() if block.server is not None}
        for name, server in self._servers.items():
            server.environment |= self._environment(name)
            closing.callback(server.close)
            server.start()
        for server in self._servers.values():
            server.wait_until_listening()

    def _make(self) -> Coordinator:
        huge = self._plan.huge and probe.available_huge_pages(HUGE_PAGE) >= self._huge_pages_needed()
        if self._plan.huge and not huge:
            self._tally.note("not enough free huge pages: 4 KiB pages instead (sysctl vm.nr_hugepages=64)")
        self._page_size = HUGE_PAGE if huge else PAGE
        if self._plan.replay_seed is not None:
            world.write_set(self._replayed, self._plan.replay_seed, self._blocks)
        return Coordinator(
            self._name,
            {name: block.source for name, block in self._blocks.items()},
            stream=self._plan.stream,
            page_size=self._page_size,
            writable=[name for name, block in self._blocks.items() if block.plan.kind == "draft"],
            on_source_loss="poison" if self._plan.poison else "pause",
            on_event=self._hear,
            fault_threads=self._plan.fault_threads,
            source_timeout_s=self._plan.source_timeout_s,
            orphan_timeout_s=ORPHAN_TIMEOUT_KILLS_S if self._plan.keeper else ORPHAN_TIMEOUT_S,
            keeper=self._plan.keeper,
            helpers_max=self._plan.helpers_max,
            record=self._recorded if self._plan.records else None,
            replay=self._replayed if self._plan.replay_seed is not None else None,
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
            self._actions.carry_out(action)
        if self._tally.failures:
            raise Stuck

    # -- looks

    def _look(self) -> None:
        """At the status segment, a few times a second; at resources once a second."""
        self._actions.take_dead()
        self._look_at_servers()
        report = self._report()
        if not self._served.look(report):
            self._troupe.outage_begins()
            return
        self._troupe.outage_ends()
        for helper in report.helpers:
            is_known = (helper.slot, helper.pid) in self._disabled or helper.pid in self._actions.offenders
            if helper.state == "disabled" and not is_known:
                self._disabled.add((helper.slot, helper.pid))
                self._tally.fail(f"helper {helper.pid} on block {helper.block} was cut off and did nothing wrong")
        foreign = sum(block.foreign_pages for block in report.blocks if block.idstr not in self._actions.planted)
        if foreign > self._foreign:
            self._foreign = foreign
            self._tally.fail(f"{foreign} foreign pages, and nobody broke the rules")
        self._resume_if_paused(report)
        if time.monotonic() - self._held_s >= RESOURCES_PERIOD_S:
            self._held_s = time.monotonic()
            self._check_during(report)

    def _report(self) -> StatusReport:
        try:
            return read_status(self._name)
        except errors.NoSuchCoordinator:
            self._tally.fail("its status has gone: it has ended, and nobody told it to")
            raise Stuck from None

    def _look_at_servers(self) -> None:
        """One that ends by itself is no failure of ours: another one comes."""
        for server in self._servers.values():
            code = server.ended_by_itself()
            if code is None:
                continue
            self._actions.take_dead()
            if server.ended_by_itself() is not None:  # else it has died at its step, just now
                self._tally.note(f"a server that is a source ended by itself, with {code}")
                self._actions.source_gone(server, 0)

    def _needs_resume(self, report: StatusReport) -> bool:
        return any(block.state == "PAUSED" or block.lost_pages for block in report.blocks)

    def _resume_if_paused(self, report: StatusReport) -> None:
        """An error that was on its way when the source came back pauses a block again: the operator resumes again."""
        if self._actions.source_fails() or not self._needs_resume(report):
            return
        self._actions.resumes += 1
        if self._actions.resumes > RESUMES_MAX:
            states = [(block.idstr, block.state, block.lost_pages, block.reason) for block in report.blocks]
            self._tally.fail(f"resumed {RESUMES_MAX} times, and the blocks are {states}")
            raise Stuck
        self._actions.order(AdminOp.RESUME)

    def _files(self) -> int:
        return sum(block.plan.kind != "zero" and block.server is None for block in self._blocks.values())

    def _pages_bytes(self) -> int:
        return sum(block.plan.pages * PAGE for block in self._blocks.values()) + HUGE_PAGE

    def _check_during(self, report: StatusReport) -> None:
        n_helpers, n_bytes = len(report.helpers), self._pages_bytes()
        allowed = resources.allowed_during(n_helpers, self._files(), len(self._servers), n_bytes, self._page_size)
        self._served.compare("during", allowed, resources.allowed_keeper(n_helpers, n_bytes))

    # -- the end

    def _end(self) -> None:
        """Everything works again, everybody answers; then the coordinator's life ends in the plan's way."""
        crowd = self._troupe
        self._actions.disarm()
        self._served.go_on()
        crowd.pump_until(self._served.serves, "a coordinator", RESTART_LIMIT_S)
        crowd.settle()
        self._actions.source_back()
        crowd.pump_until(lambda: not self._actions.source_fails(), "the servers", servers.LISTEN_LIMIT_S)
        crowd.all_quiet()
        if self._plan.poison:
            crowd.pump(LOSS_LIMIT_S)
        crowd.pump_until(lambda: not self._needs_resume(read_status(self._name)), "an end of the pauses")
        crowd.may_lose = False
        self._check_all()
        if self._plan.ending in ("stopped", "killed"):
            self._end_under_helpers()
            return
        if self._plan.has_low_limit:
            self._leave()  # who verifies must not be one too many
        self._verify()
        if self._plan.ending == "leave":
            self._leave()
            self._wait_until_alone()
        self._stop_coordinator()
        if self._plan.ending == "stay":
            self._ask_without_coordinator({"kind": "leave_all", "slot": -1})

    def _check_all(self) -> None:
        """Who was there all the time has lost nothing that is not lost any more."""
        for writer in range(self._actors):
            self._troupe.tell(writer, kind="check_all", seed=self._plan.number, count=CHECK_ALL_PAGES)
        self._troupe.all_quiet()

    def _verify(self) -> None:
        """Every byte and every write is looked at."""
        self._actions.order(AdminOp.STREAM_EAGER)
        for index, block in enumerate(self._blocks):
            if block in self._actions.scrapped:
                continue
            writer, written = index % self._actors, self._troupe.ledger.get(block, {})
            self._troupe.tell(writer, kind="verify", block=block, written=written)
            self._troupe.quiet(writer)
            self._tally.writes_checked += len(written)

    def _stop_coordinator(self) -> None:
        self._count(read_status(self._name))
        self._stopping = True
        self._coordinator.stop()

    def _end_under_helpers(self) -> None:
        """Pages that are missing when it has gone are SIGBUS after the orphan timeout. Never zeros, never for ever."""
        self._actions.order(AdminOp.STREAM_LAZY)
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
            self._served.end_by_kill()
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
        waits_s = ORPHAN_TIMEOUT_KILLS_S if self._plan.keeper else ORPHAN_TIMEOUT_S
        deadline = time.monotonic() + LEAVE_LIMIT_S + waits_s
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
                self._tally.fail(f"{order['kind']} takes for ever without the coordinator\n{where}", Zero.STUCK)

    def _wait_until_alone(self) -> None:
        """Everybody has gone: what the coordinator holds must be what it held before."""
        allowed = resources.allowed_after(self._files(), len(self._servers), self._pages_bytes(), self._page_size)
        allowed_keeper = resources.allowed_keeper_after(self._pages_bytes())

        def settled() -> bool:
            now, before = self._served.held(), self._served.before
            grown = now and [
                *resources.grown("", before[0], now[0], allowed),
                *resources.grown("", before[1], now[1], allowed_keeper),
            ]
            return not read_status(self._name).helpers and not grown

        deadline = time.monotonic() + LEAVE_LIMIT_S
        while not settled() and time.monotonic() < deadline:
            self._troupe.pump(0.02)
        left = [(helper.pid, helper.state, helper.block) for helper in read_status(self._name).helpers]
        if left:
            told = f"helpers that have left are still in the tables after {LEAVE_LIMIT_S:g} s: {left}"
            self._tally.fail(told, Zero.LEAKS)
        self._served.compare("after all have left", allowed, allowed_keeper)

    def _count(self, report: StatusReport) -> None:
        self._tally.faults += report.faults
        self._tally.joins += report.helpers_joined
        self._tally.leaves += report.helpers_left

    def _diagnosis(self) -> str:
        """What everybody did when something went wrong."""
        serves, keeper = self._served.pid, self._served.keeper.pid
        parts = [stacks.threads(serves, "coordinator"), stacks.threads(keeper, "keeper")]
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
                told = f"after the round: {resource} of this process grew from {was} to {still}"
                self._tally.fail(told, Zero.LEAKS)
        for path in (runtime.shm_path(self._name), runtime.socket_path(self._name)):
            if path.exists():
                self._tally.fail(f"after the round: {path} is still there", Zero.LEAKS)
        for pid in self._served.left() if hasattr(self, "_served") else ():
            self._tally.fail(f"after the round: process {pid} still runs", Zero.LEAKS)

    def _check_recorded(self) -> None:
        """Whatever happened, the file is a working set, as it was written last."""
        if not self._plan.records or not hasattr(self, "_served"):
            return
        try:
            recorded = working_set.read(str(self._recorded))
        except (OSError, errors.PcshareError) as error:
            self._tally.fail(f"after the round: what was recorded is no working set: {error}")
        else:
            self._tally.recorded_pages += sum(recorded.runs.count)
