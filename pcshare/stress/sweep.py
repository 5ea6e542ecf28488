"""sweep: rounds in which every party is killed at every named step, and at random moments beside, until it is enough.

Draws the plans; a round plays them as any other. What a step needs in order to be reached comes after its arming.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pcshare import trace
from pcshare.stress import plan
from pcshare.stress.plan import Action, BlockPlan, Booked, Books, RoundPlan
from pcshare.stress.tally import Tally

ARMS_A_ROUND = 18
PASSINGS_MAX = 3  # a step is passed so often before it is the last
PAGES_MIN, PAGES_MAX = 4000, 6000  # of a block: something must be missing until the end of the round
TINY_PAGES = 24
LARGE = ("holes", "remote", "draft", "zero")  # what everybody uses
SCRAP, SCRAP_PAGES = "scrap", 400  # a block that helpers remove pages from, and nobody else uses
TINY_BLOCKS = 8  # each is complete once
BETWEEN = 4, 12  # actions of anybody after each arming, from the one to the other
SOURCE_TIMEOUT_S = 20.0  # a server that is killed is back in time: what is lost is lost by errors alone
SLOT_BASE = 1 << 20  # attachments of scripts, apart from those of random actions

# Never passed by a coordinator of these sources: new memory has nothing in it to discard.
NOT_REACHED = frozenset({"block_discard"})
# Passed once in a coordinator's life.
ONCE = frozenset({"taking_over", "blocks_taken", "helpers_taken", "helpers_told", "ready"})

# Without orders to the stream: eager, it would bring everything at once.
WEIGHTS = {
    "attach": 30,
    "leave": 14,
    "check": 40,
    "ensure": 8,
    "prefetch": 6,
    "write": 40,
    "cow": 3,
    "fork": 6,
    "touch": 8,
    "kill": 10,
    "kill_attaching": 8,
    "kill_touch": 12,
    "kill_source": 40,
    "kill_coordinator": 1,
    "stop": 1,
}
# What makes a step come that random actions may not bring.
PROVOCATIONS: dict[str, tuple[str, ...]] = {
    "thread_quit": ("replace",),
    "makes_way": ("replace",),
    "poison": ("source_error", "check"),
    "source_error": ("source_error", "check"),
    "block_complete": ("complete",),
    "end_told": ("complete",),
    "end_done": ("complete",),
    "helper_complete": ("complete",),
    "remote_disable": ("offend",),
    "foreign": ("plant", "complete"),
    "place_present": ("plant", "complete"),
    "stream_request": ("prefetch", "ensure"),
    "event": ("remove",),
    "remove": ("remove",),
    "helper_taken_over": ("kill_coordinator",),
    "server_answered": ("ensure",),
}


def all_steps() -> dict[str, list[str]]:
    """Those that are died at, by party."""
    return {party: [step for step in trace.steps_of(party) if step not in NOT_REACHED] for party in trace.PARTIES}


def rounds(
    seed: int, actors: int, steps: Sequence[str] = (), between: tuple[int, int] = BETWEEN
) -> Iterator[RoundPlan]:
    """For ever; over a few of them every step has its turn. steps: others are left out. between: how many random
    actions follow each arming."""
    rng, number = random.Random(f"sweep:{seed}:{actors}"), 0
    chosen = list(steps) or [step for party in all_steps().values() for step in party]
    queue: list[str] = []
    while True:
        armed: list[str] = []
        while len(armed) < min(ARMS_A_ROUND, len(chosen)):
            queue = queue or rng.sample(chosen, len(chosen))
            armed.append(queue.pop())
        yield _draw_round(rng, number, actors, armed, between)
        number += 1


def _draw_round(rng: random.Random, number: int, actors: int, steps: list[str], between: tuple[int, int]) -> RoundPlan:
    drawn = RoundPlan(
        number=number,
        blocks=list(_draw_blocks(rng)),
        stream="lazy",
        huge=False,
        poison=True,
        source_timeout_s=SOURCE_TIMEOUT_S,
        fault_threads=None,
        ending="leave",
        keeper=True,
        helpers_max=None,
        nbdkit=False,  # it passes no step of ours
        dies_at_steps=True,
    )
    drawer = _Drawer(rng, drawn, {actor: [] for actor in range(actors)}, between)
    for step in steps:
        drawer.arm(step)
    return drawn


def _draw_blocks(rng: random.Random) -> Iterator[BlockPlan]:
    for name, kind, served in (("holes", "holes", False), ("remote", "holes", True), ("draft", "draft", True)):
        pages = rng.randrange(PAGES_MIN, PAGES_MAX)
        yield BlockPlan(
            name, kind, pages, rng.randrange(plan.PAGE), rng.choice([0, 300]), 0, rng.randrange(1 << 32), served
        )
    yield BlockPlan("zero", "zero", plan.ZERO_BYTES // plan.PAGE, 0, 0, 0, 0, False)
    yield BlockPlan(SCRAP, "draft", SCRAP_PAGES, 0, 0, 0, rng.randrange(1 << 32), False)
    for index in range(TINY_BLOCKS):
        yield BlockPlan(f"tiny{index}", "array", TINY_PAGES, 0, 0, 0, rng.randrange(1 << 32), False)


@dataclass
class _Drawer:
    """Writes the actions of one round."""

    rng: random.Random
    plan: RoundPlan
    books: Books
    between: tuple[int, int]
    tiny: int = 0

    def arm(self, step: str) -> None:
        party = next(party for party, steps in all_steps().items() if step in steps)
        actor = self.rng.randrange(len(self.books))
        passings = 1 if step in PROVOCATIONS or step in ONCE else self.rng.randrange(1, PASSINGS_MAX + 1)
        block = self.plan.served[0].name
        self._add(Action("arm", 0, actor, block=block, order=f"{party}:{step}", count=passings))
        if party == "helper":
            self.books[actor].clear()
        self._script(actor, PROVOCATIONS.get(step, ()))
        large = replace(self.plan, blocks=[block for block in self.plan.blocks if block.name in LARGE])
        for _ in range(self.rng.randint(*self.between)):
            self._add(plan.draw_action(self.rng, large, self.books, self._number(), WEIGHTS))
        self._add(Action("await_death", 0))

    def _add(self, action: Action) -> None:
        self.plan.actions.append(action)

    def _number(self) -> int:
        return SLOT_BASE + len(self.plan.actions)

    def _script(self, actor: int, provocations: tuple[str, ...]) -> None:
        """What one helper does in its life, with what the step needs in the middle of it."""
        slots = []
        for block, mode in (("holes", "ro"), ("remote", "ro"), ("draft", "rw")):
            booked = Booked(self._number(), block, mode)
            self.books[actor].append(booked)
            slots.append(booked)
            self._add(self._use("attach", actor, booked))
        for kind in ("check", "ensure", "write"):
            for booked in slots:
                if kind != "write" or booked.mode == "rw":
                    self._add(self._use(kind, actor, booked))
        for kind in provocations:
            self._provoke(kind, actor, slots[0])
        self._add(self._use("fork", actor, slots[0]))
        for booked in slots:
            self.books[actor].remove(booked)
            self._add(self._use("leave", actor, booked))

    def _use(self, kind: str, actor: int, booked: Booked) -> Action:
        count = self.rng.randrange(4, plan.USE_PAGES_MAX)
        action = Action(kind, 0, actor, booked.slot, booked.block, booked.mode, count=count)
        return replace(action, seed=self.rng.randrange(plan.SEED_MAX))

    def _provoke(self, kind: str, actor: int, booked: Booked) -> None:
        tiny = f"tiny{self.tiny % TINY_BLOCKS}"
        if kind == "complete":
            self.tiny += 1
            self._add(Action("complete", 0, actor, self._number(), tiny, "ro", count=TINY_PAGES))
        elif kind in ("offend", "plant", "remove"):
            block = {"offend": booked.block, "plant": tiny, "remove": SCRAP}[kind]
            self._add(Action(kind, 0, block=block, seed=self.rng.randrange(plan.SEED_MAX)))
        elif kind in ("check", "ensure", "prefetch"):
            self._add(self._use(kind, actor, booked))
        else:
            self._add(Action(kind, 0, after_ms=self.rng.randrange(1, plan.SOURCE_ERROR_MAX_MS)))


@dataclass(frozen=True)
class Goal:
    """How much is enough. steps: of all steps, those that count; none: all."""

    kills: int  # of each party
    per_step: int
    steps: tuple[str, ...] = ()

    def is_reached(self, tally: Tally) -> bool:
        kills = (tally.kills, tally.coordinator_kills, tally.source_kills)
        steps = self.steps or [step for party in all_steps().values() for step in party]
        return min(kills) >= self.kills and all(tally.step_kills[step] >= self.per_step for step in steps)
