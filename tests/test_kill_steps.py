"""SIGKILL at named steps: a process dies where it was told to, once; whoever dies, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pcshare import trace
from pcshare.client import Block, attach
from pcshare.errors import PcshareError
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


def test_helper_whose_leave_was_heard_and_not_done_is_forgotten(
    runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P7: nobody says LEAVE twice."""
    path, death = tmp_path / "data.bin", tmp_path / "death"
    path.write_bytes(bytes(PAGE))
    monkeypatch.setenv(trace.DIE_VARIABLE, str(death))
    with coordinator(f"data={path}", options=["--stream=lazy"]) as serving:
        held = serving.held()
        trace.write_death(death, "left", 1)
        kill_and_await_another(serving.name)
        attach(serving.name, "data").close()
        wait_until(lambda: serving.status().restarts == 2, "another coordinator", RESTART_LIMIT_S)
        assert not death.exists()
        serving.pid = serving.status().pid
        serving.wait_until_alone(held)


FD_LIMIT = 128
REFUSAL_TIMEOUT_S = 10.0


def test_coordinator_near_its_limit_of_open_files_is_started_again(runtime_dir: Path, tmp_path: Path) -> None:
    """P5: what a keeper could keep it can pass on."""
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(PAGE))
    limited = ["prlimit", f"--nofile={FD_LIMIT}:{FD_LIMIT}"]
    with coordinator(f"data={path}", options=["--stream=lazy"], within=limited) as serving:
        blocks: list[Block] = []
        with contextlib.suppress(PcshareError):  # it is full
            while len(blocks) < FD_LIMIT:
                blocks.append(attach(serving.name, "data", timeout_s=REFUSAL_TIMEOUT_S))
        blocks.pop().close()  # a little room
        wait_until(lambda: len(serving.status().helpers) == len(blocks), "an end of the last one")
        kill_and_await_another(serving.name)
        assert [helper.state for helper in serving.status().helpers] == ["attached"] * len(blocks)
        for block in blocks:
            with memoryview(block) as view:
                assert view[:PAGE] == bytes(PAGE)
            block.close()
