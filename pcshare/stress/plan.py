"""plan: what will happen, drawn from a seed alone: the blocks of each round and the actions on them, in order.

No I/O and no clock. A plan never looks at what came of it: it keeps its own books of who is attached where, so that one
seed always gives one sequence.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

PAGE = 4096
HUGE_PAGE = 2 << 20
ACTIONS_MIN, ACTIONS_MAX = 150, 600  # a round takes some seconds
ATTACHMENTS_MAX = 3  # of one actor at a time
FILE_PAGES_MIN, FILE_PAGES_MAX = 256, 3072
HUGE_FILE_PAGES = 6
ZERO_BYTES = 1 << 20
SLOTS_MAX = 16  # bytes at the start of a page that belong to writers: SLOT_BYTES each
SLOT_BYTES = 8
PAUSE_MAX_MS = 12  # between two actions
KILL_AFTER_MAX_MS = 60
KILL_ATTACH_MAX_MS = 6  # attaching takes two or three
KILL_TOUCH_MAX_MS = 20  # from its exec to its last touch
USE_PAGES_MAX = 64
TOUCHES_MAX = 200
HUGE_TOUCHES_MAX = 6
GARBAGE_BYTES_MAX = 4096
RATE_MIN, RATE_MAX = 1 << 15, 1 << 21  # bytes a second of the stream: nothing may be complete too soon
STOP_MAX_MS = 400
SOURCE_ERROR_MAX_MS = 300
SOURCE_AWAY_MAX_MS = 800  # a server that is the source, from its death until another one listens
SOURCE_TIMEOUT_S = 0.3  # with poison: shorter than that, so that some absences are losses and some are none
FDS_SPARE_MIN, FDS_SPARE_MAX = 24, 48  # above what no helper gets, handshake.FDS_RESERVED; a helper takes two
HELPERS_FEW_MIN, HELPERS_FEW_MAX = 3, 9  # of a coordinator with a low limit: fewer than what wants to attach
REPLAYED_SHARE = 0.3  # of a block's pages, at most: some must be missing for everything else
REPLAYED_RUN_MAX = 24  # pages
CHURN_MAX = 100  # attachments one after the other, for what leaks only a little each time
SEED_MAX = 1 << 32

# What happens how often, in parts. Attaching must outweigh leaving and killing, or nobody is left to do the rest.
WEIGHTS = {
    "attach": 30,
    "leave": 12,
    "check": 40,
    "ensure": 8,
    "prefetch": 6,
    "write": 14,
    "cow": 5,
    "fork": 5,
    "kill": 4,
    "kill_attaching": 6,
    "stop": 5,
    "touch": 12,
    "kill_touch": 10,
    "kill_coordinator": 3,
    "replace": 0.5,
    "kill_source": 3,
    "helper": 1,
    "stream": 6,
    "source_error": 3,
    "churn": 2,
    "garbage": 2,
}
# How the coordinator's life ends, in parts: its helpers leave before; they find out when they leave; it is stopped, or
# killed, while they still need pages, which must then be SIGBUS and nothing else.
ENDINGS = {"leave": 4, "stay": 2, "stopped": 2, "killed": 2}
HELPER_PROGRAMS = ("scan", "random_lookup", "forking_pool", "numpy_user")
STOPPED = ("actor", "actor", "coordinator", "keeper", "source", "program")  # who gets a SIGSTOP
STREAM_ORDERS = ("pause", "resume", "rate", "rate", "lazy", "lazy", "eager")


@dataclass(frozen=True)
class BlockPlan:
    """One block. kind: holes (a sparse file), array (.npy), draft (a file that helpers write), zero. served: its source
    is a server's process."""

    name: str
    kind: str
    pages: int  # of PAGE bytes
    tail: int  # bytes more than whole pages
    delay_us: int
    rate: int  # bytes a second: without, the first ensure or a moment of eager streaming would end all missing
    seed: int
    served: bool

    @property
    def modes(self) -> tuple[str, ...]:
        return ("ro", "rw", "cow") if self.writable else ("ro", "cow")

    @property
    def writable(self) -> bool:
        return self.kind in ("draft", "zero")


@dataclass(frozen=True)
class Action:
    """kind is one of WEIGHTS; pause_ms comes before it."""

    kind: str
    pause_ms: int
    actor: int = 0
    slot: int = 0  # which of the actor's attachments, numbered through the round
    block: str = ""
    mode: str = ""
    seed: int = 0
    count: int = 0
    after_ms: int = 0  # until the kill, the end of the stop, of the source's failure or of its absence
    order: str = ""


@dataclass
class RoundPlan:
    number: int
    blocks: list[BlockPlan]
    stream: str
    huge: bool  # 2 MiB pages, where the host has some free
    poison: bool
    fault_threads: int | None  # None: the default
    ending: str  # one of ENDINGS
    keeper: bool  # a coordinator that is killed is started again
    helpers_max: int | None  # a low limit: who is too many is told so
    fds_spare: int | None = None  # another one: so many fds more than coordinator and keeper have at the start
    source_timeout_s: float = SOURCE_TIMEOUT_S
    records: bool = False  # what is touched first
    replay_seed: int | None = None  # of a working set that it brings first; None: there is none
    nbdkit: bool = True  # is the server, where it is installed
    dies_at_steps: bool = False  # processes are told at which step to die
    actions: list[Action] = field(default_factory=list)

    @property
    def has_low_limit(self) -> bool:
        return self.helpers_max is not None or self.fds_spare is not None

    @property
    def served(self) -> list[BlockPlan]:
        return [block for block in self.blocks if block.served]


def rounds(seed: int, actors: int) -> Iterator[RoundPlan]:
    """The rounds of a seed, for ever. Each has its own random numbers, so that it can be drawn alone."""
    number = 0
    while True:
        yield draw_round(seed, number, actors)
        number += 1


def draw_round(seed: int, number: int, actors: int) -> RoundPlan:
    rng = random.Random(f"{seed}:{number}:{actors}")
    huge = rng.random() < 0.2
    few = rng.randrange(HELPERS_FEW_MIN, HELPERS_FEW_MAX) if rng.random() < 0.15 else None
    spare = rng.randrange(FDS_SPARE_MIN, FDS_SPARE_MAX) if not few and rng.random() < 0.15 else None
    ending = "leave" if few or spare else rng.choices(list(ENDINGS), list(ENDINGS.values()))[0]
    plan = RoundPlan(
        number=number,
        blocks=_draw_blocks(rng, huge),
        stream=rng.choice(["eager", "lazy", "lazy", "lazy", "paused", str(rng.randrange(RATE_MIN, RATE_MAX))]),
        huge=huge,
        poison=rng.random() < 0.3,
        fault_threads=rng.choice([None, None, 1, 3]),
        ending=ending,
        keeper=ending != "killed" or rng.random() < 0.5,
        helpers_max=few,
        fds_spare=spare,
        records=rng.random() < 0.3,
        replay_seed=rng.randrange(SEED_MAX) if rng.random() < 0.3 else None,
    )
    books: Books = {actor: [] for actor in range(actors)}
    for number in range(rng.randrange(ACTIONS_MIN, ACTIONS_MAX)):
        plan.actions.append(draw_action(rng, plan, books, number, WEIGHTS))
    return plan


@dataclass(frozen=True)
class Booked:
    """One attachment in the plan's books."""

    slot: int
    block: str
    mode: str


Books = dict[int, list[Booked]]  # by actor


def _draw_blocks(rng: random.Random, huge: bool) -> list[BlockPlan]:
    names = ["holes", "draft", "zero"] + (["array"] if rng.random() < 0.5 else [])
    return [_draw_block(rng, name, huge) for name in names]


def _draw_block(rng: random.Random, name: str, huge: bool) -> BlockPlan:
    pages = HUGE_FILE_PAGES * HUGE_PAGE // PAGE if huge else rng.randrange(FILE_PAGES_MIN, FILE_PAGES_MAX)
    if name == "zero":
        pages = HUGE_PAGE // PAGE if huge else ZERO_BYTES // PAGE
    return BlockPlan(
        name=name,
        kind=name,
        pages=pages,
        tail=0 if name == "zero" else rng.randrange(PAGE),
        delay_us=rng.choice([0, 100, 300, 1000]),
        rate=rng.choice([2 << 20, 4 << 20, 8 << 20]) * (4 if huge else 1),
        seed=rng.randrange(SEED_MAX),
        served=name in ("holes", "draft") and rng.random() < 0.4,
    )


def draw_action(rng: random.Random, plan: RoundPlan, books: Books, number: int, weights: Mapping[str, float]) -> Action:
    """One that is possible by the books, and booked."""
    pause_ms = rng.randrange(PAUSE_MAX_MS) if rng.random() < 0.5 else 0
    while True:
        kind = rng.choices(list(weights), list(weights.values()))[0]
        actor = rng.randrange(len(books))
        draw = _draw_use if kind in USES else _draw_join if kind in JOINS else _draw_event
        action = draw(rng, plan, Action(kind, pause_ms, actor, seed=rng.randrange(SEED_MAX)), books[actor], number)
        if action is not None:
            return action


USES = {"leave", "check", "ensure", "prefetch", "write", "cow", "fork"}
JOINS = {"attach", "churn", "kill", "kill_attaching"}


def _draw_use(
    rng: random.Random, plan: RoundPlan, action: Action, attached: list[Booked], number: int
) -> Action | None:
    """Something that is done with an attachment, if the actor has one that it can be done with."""
    wanted = {"write": "rw", "cow": "cow"}.get(action.kind)
    fitting = [one for one in attached if wanted in (None, one.mode)]
    if not fitting or (action.kind == "fork" and plan.has_low_limit):  # a child that is too many waits, and gives up
        return None
    one = rng.choice(fitting)
    if action.kind == "leave":
        attached.remove(one)
    # a child of fork is killed by its parent in one of four cases
    after_ms = rng.randrange(KILL_AFTER_MAX_MS) if rng.random() < 0.25 else 0
    count = rng.randrange(1, USE_PAGES_MAX)
    return replace(action, slot=one.slot, block=one.block, mode=one.mode, count=count, after_ms=after_ms)


def _draw_join(
    rng: random.Random, plan: RoundPlan, action: Action, attached: list[Booked], number: int
) -> Action | None:
    """An actor attaches, often, or until it is killed."""
    block = rng.choice(plan.blocks)
    modes = [mode for mode in block.modes if not (plan.huge and mode == "cow")]  # each would take huge pages of its own
    action = replace(action, slot=number, block=block.name, mode=rng.choice(modes))
    if action.kind == "attach":
        if len(attached) >= ATTACHMENTS_MAX:
            return None
        attached.append(Booked(number, action.block, action.mode))
        return action
    if action.kind == "churn":
        return replace(action, count=rng.randrange(1, CHURN_MAX))
    attached.clear()
    return replace(action, after_ms=rng.randrange(KILL_AFTER_MAX_MS if action.kind == "kill" else KILL_ATTACH_MAX_MS))


def _draw_event(
    rng: random.Random, plan: RoundPlan, action: Action, attached: list[Booked], number: int
) -> Action | None:
    """Something that happens to the coordinator, its source, or an actor; or a program that comes and goes."""
    kind = action.kind
    if kind in ("kill_coordinator", "replace"):
        return replace(action, after_ms=rng.randrange(KILL_AFTER_MAX_MS)) if plan.keeper else None
    if kind == "kill_source":
        return _draw_absence(rng, plan, action)
    if kind == "stop":
        return replace(action, after_ms=rng.randrange(STOP_MAX_MS), order=rng.choice(STOPPED))
    if kind == "source_error":
        return replace(action, after_ms=rng.randrange(1, SOURCE_ERROR_MAX_MS))
    if kind == "stream":
        return replace(action, count=rng.randrange(RATE_MIN, RATE_MAX), order=rng.choice(STREAM_ORDERS))
    if kind == "garbage":
        return replace(action, count=rng.randrange(GARBAGE_BYTES_MAX))
    block = rng.choice([block for block in plan.blocks if not block.writable or kind != "helper"])
    if kind == "helper":
        # a pool of the standard library waits for ever for a worker that died of a lost page
        forks = not plan.poison and not plan.has_low_limit
        programs = [program for program in HELPER_PROGRAMS if forks or program != "forking_pool"]
        return replace(action, block=block.name, order=rng.choice(programs))
    count = rng.randrange(1, HUGE_TOUCHES_MAX if plan.huge else TOUCHES_MAX)
    return replace(action, block=block.name, count=count, after_ms=rng.randrange(KILL_TOUCH_MAX_MS))


def _draw_absence(rng: random.Random, plan: RoundPlan, action: Action) -> Action | None:
    """A server that is a source dies, and another one comes."""
    if not plan.served:
        return None
    return replace(action, block=rng.choice(plan.served).name, after_ms=rng.randrange(SOURCE_AWAY_MAX_MS))
