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

from pcshare import errors, probe, runtime, trace, transport, working_set
from pcshare.launcher import Coordinator, Event
from pcshare.protocol import AdminOp
from pcshare.status import StatusReport, read_status
from pcshare.stress import crew, resources, servers, stacks, troupe, world
from pcshare.stress.arms import Arms
from pcshare.stress.plan import HUGE_PAGE, PAGE, Action, RoundPlan
from pcshare.stress.resources import Held
from pcshare.stress.served import RESTART_LIMIT_S, Served
from pcshare.stress.servers import Server
from pcshare.stress.tally import Stuck, Tally, Zero
from pcshare.stress.troupe import Troupe

RESOURCES_PERIOD_S = 1.0
LEAVE_LIMIT_S = 20.0
LOOK_AGAIN_S = 0.002
# How long helpers wait for a coordinator: one that is killed is back in time for a child of fork, which must find it.
ORPHAN_TIMEOUT_S, ORPHAN_TIMEOUT_KILLS_S = 1.0, 15.0
ORDER_AGAIN_MS = 50
LAST_SLOT = -2  # no action of a plan has it
LAST_ORDER = -1  # and no order this number or one below
RESUMES_MAX = 50  # in a row, while no source fails: more means that it never works
GARBAGE_TIMEOUT_S = 5.0
STEP_LIMIT_S = 6.0  # until somebody has died at its step, counted from the last thing that was done for it
HOSTILE_LIMIT_S = 20.0  # a helper that breaks the rules takes that long at most, or is killed
CHECK_ALL_PAGES = 64  # of each attachment, in the end
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
        self._recorded, self._replayed = folder / "recorded.ws", folder / "replayed.ws"
        self._sources_down = 0
        self._scrapped: set[str] = set()  # blocks from which a helper removed pages
        self._planted: set[str] = set()  # blocks in which somebody broke the rules
        self._arms = Arms(folder, tally) if plan.dies_at_steps else None
        self._resumes = 0
        self._held_s = 0.0
        self._offenders: set[int] = set()
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
            self._carry_out(action)
        if self._tally.failures:
            raise Stuck

    def _carry_out(self, action: Action) -> None:
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
        self._take_dead()
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
        self._disarm()

    def _take_dead(self) -> None:
        """Who has died at its step."""
        for one in self._arms.take_dead() if self._arms is not None else ():
            if one.party == "coordinator":
                self._served.has_died()
                self._troupe.outage_begins()
            elif one.party == "helper":
                self._tally.kills += 1
            else:
                self._source_gone(self._servers[one.who], 0)

    def _offend(self, action: Action) -> None:
        """A helper that breaks the protocol, and is cut off."""
        self._hostile("unknown-type", action)

    def _plant(self, action: Action) -> None:
        """A helper that fills a page which nobody has read yet; nobody may read it before it is found."""
        self._planted.add(action.block)
        self._hostile("fallocates", action)

    def _remove(self, action: Action) -> None:
        """A helper that removes pages of a block: what it holds from here on is not the source's."""
        self._scrapped.add(action.block)
        self._hostile("madv-remove", action)

    def _hostile(self, row: str, action: Action) -> None:
        path = self._blocks[action.block].path
        command = [f"--block={action.block}", f"--source={path}", f"--seed={action.seed}", row]
        hostile = crew.Program.start("hostile", self._served.socket, command)
        self._offenders.add(hostile.process.pid)
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
        self._source_gone(server, action.after_ms)

    def _source_gone(self, server: Server, away_ms: int) -> None:
        server.kill()
        self._tally.source_kills += 1
        self._sources_down += 1
        self._troupe.may_lose |= self._plan.poison
        self._troupe.later(away_ms, lambda: self._server_back(server))

    def _server_back(self, server: Server) -> None:
        server.start()
        self._sources_down -= 1
        self._resumes = 0

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
        self._order(STREAM_OPS[action.order], action.count if action.order == "rate" else 0)

    def _order(self, op: AdminOp, argument: int = 0) -> None:
        """At once if somebody serves, else when somebody does: the plan goes on meanwhile."""
        if self._served.serves():
            self._served.order(op, argument)
        else:
            self._troupe.later(ORDER_AGAIN_MS, lambda: self._order(op, argument))

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
        with contextlib.suppress(OSError), transport.connect(self._served.socket, GARBAGE_TIMEOUT_S) as stranger:
            stranger.send(random.Random(action.seed).randbytes(action.count))

    # -- looks

    def _look(self) -> None:
        """At the status segment, a few times a second; at resources once a second."""
        self._take_dead()
        self._look_at_servers()
        report = self._report()
        if not self._served.look(report):
            self._troupe.outage_begins()
            return
        self._troupe.outage_ends()
        for helper in report.helpers:
            is_known = (helper.slot, helper.pid) in self._disabled or helper.pid in self._offenders
            if helper.state == "disabled" and not is_known:
                self._disabled.add((helper.slot, helper.pid))
                self._tally.fail(f"helper {helper.pid} on block {helper.block} was cut off and did nothing wrong")
        foreign = sum(block.foreign_pages for block in report.blocks if block.idstr not in self._planted)
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
            if code is not None:
                self._tally.note(f"a server that is a source ended by itself, with {code}")
                self._source_gone(server, 0)

    def _needs_resume(self, report: StatusReport) -> bool:
        return any(block.state == "PAUSED" or block.lost_pages for block in report.blocks)

    def _resume_if_paused(self, report: StatusReport) -> None:
        """An error that was on its way when the source came back pauses a block again: the operator resumes again."""
        if self._error_file.exists() or self._sources_down or not self._needs_resume(report):
            return
        self._resumes += 1
        if self._resumes > RESUMES_MAX:
            states = [(block.idstr, block.state, block.lost_pages, block.reason) for block in report.blocks]
            self._tally.fail(f"resumed {RESUMES_MAX} times, and the blocks are {states}")
            raise Stuck
        self._order(AdminOp.RESUME)

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
        self._disarm()
        self._served.go_on()
        crowd.pump_until(self._served.serves, "a coordinator", RESTART_LIMIT_S)
        crowd.settle()
        self._source_back()
        crowd.all_quiet()
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

    def _disarm(self) -> None:
        """Nobody dies any more of what it was told."""
        if self._arms is not None:
            self._arms.close()
            self._take_dead()

    def _check_all(self) -> None:
        """Who was there all the time has lost nothing that is not lost any more."""
        for writer in range(self._actors):
            self._troupe.tell(writer, kind="check_all", seed=self._plan.number, count=CHECK_ALL_PAGES)
        self._troupe.all_quiet()

    def _verify(self) -> None:
        """Every byte and every write is looked at."""
        self._order(AdminOp.STREAM_EAGER)
        for index, block in enumerate(self._blocks):
            if block in self._scrapped:
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


def _order(action: Action) -> dict[str, object]:
    """What an actor is told of an action."""
    told = ("kind", "slot", "block", "mode", "seed", "count", "after_ms")
    return {key: getattr(action, key) for key in told}
