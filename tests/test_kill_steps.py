"""SIGKILL at named steps: a process dies where it was told to, once; whoever dies, nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pcshare import trace
from pcshare.client import attach
from pcshare.status import read_status
from pcshare.stress import sweep
from pcshare.stress.run import Options, run
from support import wait_until
from support_coordinator import coordinator

RESTART_LIMIT_S = 30.0
PAGE = 4096
STEPS_A_TEST = 6
SWEEP_LIMIT_S = 75.0  # it ends before, as soon as somebody has died at each of its steps
SWEEP_HELPERS = 3


def _batches(steps: list[str]) -> list[tuple[str, ...]]:
    return [tuple(steps[at : at + STEPS_A_TEST]) for at in range(0, len(steps), STEPS_A_TEST)]


GROUPS = [steps for party in sweep.all_steps().values() for steps in _batches(party)]


# -- dying at a step


def pass_steps(death: Path, *steps: str) -> int:
    """Exit code of a process that passes these steps."""
    script = f"from pcshare import trace\nfor step in {steps!r}: trace.step(step)"
    environment = {**os.environ, trace.DIE_VARIABLE: str(death)}
    return subprocess.run([sys.executable, "-c", script], env=environment, timeout=30, check=False).returncode


def test_process_dies_when_it_passes_the_step_so_often(tmp_path: Path) -> None:
    death = tmp_path / "death"
    trace.write_death(death, "kept", 2)
    assert pass_steps(death, "kept", "acked", "acked") == 0
    assert death.exists()
    assert pass_steps(death, "kept", "acked", "kept") == -signal.SIGKILL
    assert not death.exists()


def test_one_file_is_one_death(tmp_path: Path) -> None:
    death = tmp_path / "death"
    trace.write_death(death, "kept", 1)
    assert [pass_steps(death, "kept") for _ in range(2)] == [-signal.SIGKILL, 0]


def test_whose_file_was_taken_away_lives(tmp_path: Path) -> None:
    death = tmp_path / "death"
    trace.write_death(death, "kept", 1)
    script = "import os, sys\nfrom pcshare import trace\nos.unlink(sys.argv[1])\ntrace.step('kept')"
    environment = {**os.environ, trace.DIE_VARIABLE: str(death)}
    assert subprocess.run([sys.executable, "-c", script, str(death)], env=environment, check=False).returncode == 0


@pytest.mark.parametrize("text", ["", "41", "41 0", "kept 1", "\0" * 100])
def test_file_that_says_no_step_kills_nobody(tmp_path: Path, text: str) -> None:
    death = tmp_path / "death"
    death.write_text(text)
    assert pass_steps(death, *trace.EVENT_NAMES.values()) == 0
    assert death.exists()


def test_step_belongs_to_one_party() -> None:
    told = [step for party in trace.PARTIES for step in trace.steps_of(party)]
    assert sorted(told) == sorted(trace.EVENT_NAMES.values())


# -- every step


@pytest.mark.slow
@pytest.mark.parametrize("steps", GROUPS, ids=lambda steps: f"{steps[0]} to {steps[-1]}")
def test_nothing_is_lost_whoever_dies_at_whichever_step(runtime_dir: Path, seed: int, steps: tuple[str, ...]) -> None:
    """P1, P2, P3, P5, P6, P7."""
    goal = sweep.Goal(kills=0, per_step=1, steps=steps)
    plans = sweep.rounds(seed, SWEEP_HELPERS, steps, between=(0, 2))
    tally = run(Options(SWEEP_LIMIT_S, SWEEP_HELPERS, seed), print, lambda: None, plans, goal.is_reached).tally
    assert tally.failures == []
    assert [step for step in steps if not tally.step_kills[step]] == []
    assert tally.writes_checked > 0
    assert tally.bytes_checked > 0


# -- what is served after a restart


def kill_and_await_another(name: str) -> None:
    before = read_status(name)
    os.kill(before.pid, signal.SIGKILL)
    wait_until(lambda: read_status(name).restarts > before.restarts, "another coordinator", RESTART_LIMIT_S)


def test_complete_block_is_as_writable_after_a_restart_as_before(runtime_dir: Path, tmp_path: Path) -> None:
    """P2, P5: a source that is complete is not asked any more what its blocks are."""
    path = tmp_path / "draft.bin"
    path.write_bytes(bytes(PAGE))
    with coordinator("scratch=zero:4096", f"draft={path}", f"fixed={path}", options=["--writable=draft"]) as serving:
        wait_until(lambda: serving.status().state == "END", "all pages")
        writable = {block.idstr: block.writable for block in serving.status().blocks}
        assert writable == {"scratch": True, "draft": True, "fixed": False}
        kill_and_await_another(serving.name)
        assert {block.idstr: block.writable for block in serving.status().blocks} == writable
        with attach(serving.name, "scratch", mode="rw") as block, memoryview(block) as view:
            view[:5] = b"after"
