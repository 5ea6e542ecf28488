"""pcshare stress: its plan comes from the seed alone, it finds what it looks for, and it cleans up however it ends."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pcshare import runtime, working_set
from pcshare.launcher import Coordinator
from pcshare.status import read_status
from pcshare.stress import plan, resources, troupe, world
from pcshare.stress.crew import stderr_to
from pcshare.stress.resources import Held
from pcshare.stress.served import Served
from pcshare.stress.tally import Stuck, Tally, Zero
from pcshare.stress.troupe import Troupe
from support import wait_until
from support_coordinator import Serving, coordinator, die_with_parent

ACTORS = 4
STRESS_TIMEOUT_S = 95
RESTART_LIMIT_S = 30
PAGES = 64


def drawn(seed: int, number: int = 0) -> plan.RoundPlan:
    return plan.draw_round(seed, number, ACTORS)


# -- the plan


def test_seed_repeats_the_plan(seed: int) -> None:
    assert drawn(seed, 3) == drawn(seed, 3)
    assert drawn(seed) != drawn(seed + 1)
    assert list(itertools.islice(plan.rounds(seed, ACTORS), 2)) == [drawn(seed, 0), drawn(seed, 1)]


def test_plan_uses_only_attachments_that_are_there(seed: int) -> None:
    for number in range(5):
        attached: dict[int, dict[int, str]] = {actor: {} for actor in range(ACTORS)}
        for action in drawn(seed, number).actions:
            own = attached[action.actor]
            if action.kind == "attach":
                own[action.slot] = action.mode
            elif action.kind in plan.USES:
                assert own[action.slot] == action.mode
                assert action.kind != "write" or action.mode == "rw"
            if action.kind == "leave":
                del own[action.slot]
            elif action.kind in ("kill", "kill_attaching"):
                own.clear()


def test_plan_has_every_kind_of_action(seed: int) -> None:
    kinds = {action.kind for number in range(10) for action in drawn(seed, number).actions}
    assert kinds == set(plan.WEIGHTS)


def test_some_rounds_record_and_some_replay(seed: int, tmp_path: Path) -> None:
    many = [drawn(seed, number) for number in range(60)]
    assert {one.records for one in many} == {one.replay_seed is None for one in many} == {True, False}
    blocks = world.make_blocks(many[0], tmp_path, with_nbdkit=False)
    world.write_set(tmp_path / "a.ws", seed, blocks)
    read = working_set.read(str(tmp_path / "a.ws"))
    assert {block.idstr for block in read.blocks} == set(blocks)
    assert 0 < sum(read.runs.count) < plan.REPLAYED_SHARE * sum(block.plan.pages for block in blocks.values()) + 100


# -- it finds what it looks for


@pytest.fixture
def data_file(tmp_path: Path, rng: random.Random) -> Path:
    path = tmp_path / "draft.bin"
    path.write_bytes(rng.randbytes(PAGES * plan.PAGE))
    return path


@pytest.fixture
def served(runtime_dir: Path, data_file: Path) -> Iterator[Serving]:
    failing = f"error=EIO@{data_file.parent}/{world.ERROR_FILE}"
    with coordinator(f"draft={data_file}#{failing}", options=["--stream=lazy", "--writable=draft"]) as serving:
        yield serving


@pytest.fixture
def crew(served: Serving, data_file: Path) -> Iterator[Troupe]:
    yield from troupe_of(served, data_file)


def troupe_of(served: Serving, path: Path) -> Iterator[Troupe]:
    facts = json.dumps({"draft": {"path": str(path), "slot_area": world.SLOT_AREA, "length": PAGES * plan.PAGE}})
    tally = Tally(seed=1)
    made = Troupe(served.socket, facts, 1, tally, lambda: None)

    try:
        yield made
    finally:
        made.close()


ATTACH = {"kind": "attach", "slot": 0, "block": "draft", "mode": "rw"}
CHECK: dict[str, Any] = {"kind": "check", "slot": 0, "block": "draft", "mode": "rw", "seed": 1, "count": 5}
WRITE = {**CHECK, "kind": "write"}


def test_right_bytes_are_counted(crew: Troupe) -> None:
    crew.tell(0, **ATTACH)
    crew.tell(0, **CHECK)
    crew.all_quiet()
    assert crew.tally.ok
    assert crew.tally.bytes_checked > 0


def test_wrong_byte_is_a_failure(served: Serving, data_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.bin"
    other.write_bytes(bytes(PAGES * plan.PAGE))
    for crew in troupe_of(served, other):
        crew.tell(0, **ATTACH)
        crew.tell(0, **CHECK)
        crew.all_quiet()
        assert crew.tally.zeros[Zero.WRONG_BYTES] > plan.PAGE // 2
        assert not crew.tally.ok
        assert "--seed 1" in crew.tally.failures[0]


def test_acknowledged_write_is_found_again_and_a_lost_one_is_a_failure(crew: Troupe) -> None:
    crew.tell(0, **ATTACH)
    crew.tell(0, **WRITE)
    crew.quiet(0)
    written = crew.ledger["draft"]
    assert written
    crew.tell(0, kind="verify", block="draft", written=written)
    crew.quiet(0)
    assert crew.tally.ok
    lost = next(iter(written))
    crew.tell(0, kind="verify", block="draft", written={**written, lost: ["00" * plan.SLOT_BYTES]})
    crew.quiet(0)
    assert f"1 writes are lost, offsets [{lost}]" in crew.tally.failures[0]
    assert crew.tally.zeros[Zero.LOST_WRITES] == 1


def test_write_that_nobody_knows_of_is_a_failure(crew: Troupe) -> None:
    """P2: where nobody wrote a slot holds what the source has."""
    crew.tell(0, **ATTACH)
    crew.tell(0, **WRITE)
    crew.quiet(0)
    (unknown, _), *known = crew.ledger["draft"].items()
    crew.tell(0, kind="verify", block="draft", written=dict(known))
    crew.quiet(0)
    assert f"1 writes are lost, offsets [{unknown}]" in crew.tally.failures[0]


def test_write_of_a_killed_actor_that_was_not_acknowledged_may_be_there_or_not(crew: Troupe) -> None:
    """P2: what was acknowledged before stays, whoever was killed."""
    crew.tell(0, **ATTACH)
    crew.tell(0, **WRITE)
    crew.quiet(0)
    acknowledged = {offset: list(values) for offset, values in crew.ledger["draft"].items()}
    again = {**WRITE, "count": 2 * int(WRITE["count"])}
    crew.tell(0, **again)
    crew.kill(0)
    assert crew.tally.kills == 1
    may_be = crew.ledger["draft"]
    assert all(values[0] in may_be[offset] for offset, values in acknowledged.items())
    assert {offset for offset, _ in world.slot_writes(PAGES * plan.PAGE, 0, 1, 2 * int(WRITE["count"]))} <= set(may_be)
    crew.tell(0, kind="verify", block="draft", written=may_be)  # the new one works
    crew.quiet(0)
    assert crew.tally.ok


def test_actor_that_waits_for_ever_is_found(
    crew: Troupe, data_file: Path, served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew.tell(0, **ATTACH)
    crew.quiet(0)
    monkeypatch.setattr(troupe, "HANG_LIMIT_S", 3.0)
    (data_file.parent / world.ERROR_FILE).touch()
    crew.tell(0, **CHECK)
    with pytest.raises(Stuck):
        crew.pump(STRESS_TIMEOUT_S)
    assert "actor 0 waits for a page" in crew.tally.failures[0]
    assert "handle_userfault" in crew.tally.failures[0]


def test_actor_that_dies_unasked_is_a_failure(crew: Troupe) -> None:
    crew.actors[0].process.send_signal(signal.SIGABRT)
    crew.pump_until(lambda: bool(crew.tally.failures), "the news of its death")
    assert "SIGABRT" in crew.tally.failures[0]


def test_growth_names_the_resource_and_the_amount() -> None:
    own = psutil.Process()
    before = Held.of(own)
    pipes = [os.pipe() for _ in range(3)]
    now = Held.of(own)
    for ends in pipes:
        for fd in ends:
            os.close(fd)
    memory = {"rss": 1 << 30, "uss": 1 << 30}
    assert resources.grown("coordinator", before, now, {**memory, "fds": 6}) == []
    (growth,) = resources.grown("coordinator", before, now, {**memory, "fds": 5})
    assert str(growth).startswith(f"coordinator: fds grew by 6 from {before.fds} to {now.fds}")


# -- a coordinator that is killed


@pytest.fixture
def watched(runtime_dir: Path, data_file: Path) -> Iterator[Served]:
    """A coordinator as a round has it."""
    with (
        tempfile.TemporaryFile() as log,
        stderr_to(log),
        Coordinator(blocks={"draft": str(data_file)}, stream="lazy", writable=["draft"]) as made,
    ):
        served = Served(made, log, Tally(seed=1))
        yield served
        served.close()


def look_until_it_serves(served: Served) -> None:
    wait_until(lambda: served.look(read_status(served.name)), "another coordinator", RESTART_LIMIT_S)


def test_coordinator_that_was_killed_is_expected_to_come_back(watched: Served) -> None:
    before = watched.pid
    watched.kill()
    assert watched.is_changing()
    look_until_it_serves(watched)
    assert watched.pid != before
    watched.check_log()
    tally = watched._tally
    assert (tally.coordinator_kills, tally.restarts, tally.failures) == (1, 1, [])


def test_coordinator_that_dies_unasked_is_a_failure(watched: Served) -> None:
    os.kill(watched.pid, signal.SIGKILL)
    wait_until(lambda: read_status(watched.name).restarts == 1, "another coordinator", RESTART_LIMIT_S)
    assert watched.look(read_status(watched.name))
    watched.check_log()
    (restarted, killed) = watched._tally.failures
    assert "it was started again 1 times, and killed or replaced 0 times" in restarted
    assert "coordinators were killed, and not by us" in killed


def test_coordinator_is_replaced_in_place(watched: Served) -> None:
    before = watched.pid
    watched.replace()
    wait_until(lambda: watched.look(read_status(watched.name)) and not watched.is_being_replaced, "the other one", 30)
    watched.check_log()
    assert watched.pid != before
    assert (watched._tally.replaces, watched._tally.failures) == (1, [])


# -- the whole


@pytest.mark.slow
def test_stress_finds_no_failure_and_says_what_it_did(runtime_dir: Path, seed: int) -> None:
    seconds = 18  # a slow machine needs them for the kills that are asked for below
    finished = subprocess.run(
        [sys.executable, "-m", "pcshare", "stress", f"--seconds={seconds}", "--helpers=4", f"--seed={seed}", "--json"],
        capture_output=True,
        text=True,
        timeout=STRESS_TIMEOUT_S,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    (line,) = finished.stdout.splitlines()
    told = json.loads(line)
    assert told["ok"] is True
    assert told["seed"] == seed
    assert told["failures"] == []
    for zero in ("wrong_bytes", "lost_writes", "stuck", "leaks"):
        assert told[zero] == 0
    for counted in ("seconds", "faults", "kills", "coordinator_kills", "joins", "leaves", "bytes_checked"):
        assert told[counted] > 0
    assert told["actions"]["attach"] > 0


def test_stress_that_is_interrupted_leaves_nothing(runtime_dir: Path, tmp_path: Path, seed: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pcshare", "stress", "--seconds=60", "--helpers=2", f"--seed={seed}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        preexec_fn=die_with_parent,
        text=True,
    )
    assert process.stderr is not None
    with process.stderr as lines:
        assert any("round 0" in line for line in lines)  # the next has begun or begins now
        process.send_signal(signal.SIGINT)
        lines.read()
        code = process.wait(STRESS_TIMEOUT_S)
    assert code == 128 + signal.SIGINT
    assert list(tmp_path.iterdir()) == []
    assert not [name for name in runtime.names() if name.startswith(f"stress-{process.pid}-")]
