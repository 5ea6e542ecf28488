"""pcshare demo: its figures, how it judges wrong results, bad files, and that nothing stays behind however it ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from pcshare import errors, runtime
from pcshare.demo import cast, editor, judge, source
from pcshare.demo.cast import Cast, Player
from pcshare.demo.leftovers import Inventory
from pcshare.sources import parse_argument
from support import wait_until
from support_coordinator import Serving, coordinator, die_with_parent

DEMO_TIMEOUT_S = 90
SMALL = ("--size=3M", "--seconds=2")
HELPERS_MIN = 6
FILE_BYTES = 300_000


def demo(*options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pcshare", "demo", *map(str, options)],
        capture_output=True,
        text=True,
        timeout=DEMO_TIMEOUT_S,
        check=False,
    )


@pytest.fixture
def data_file(tmp_path: Path, rng: random.Random) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(rng.randbytes(FILE_BYTES))
    return path


@pytest.fixture
def served(runtime_dir: Path, data_file: Path) -> Iterator[Serving]:
    with coordinator(f"data={data_file}#delay=1ms", f"draft={data_file}", options=["--writable=draft"]) as serving:
        yield serving


def play(served: Serving, role: cast.Role) -> Player:
    """One role from its start to its end."""
    with Cast(served.socket) as crew:
        crew.start([role])
        (player,) = crew.players
        wait_until(player.poll, f"an end of {role.name}", DEMO_TIMEOUT_S)
        return player


# -- the whole show


@pytest.mark.slow
def test_demo_shows_right_results_sooner_than_copying_and_leaves_nothing(runtime_dir: Path) -> None:
    finished = demo(*SMALL, "--json")
    assert finished.returncode == 0, finished.stderr
    (line,) = finished.stdout.splitlines()
    told = json.loads(line)
    assert told["ok"] is True
    assert told["leaked"] == {"fds": 0, "processes": 0, "threads": 0, "shm": 0}
    assert told["mismatched_bytes"] == told["foreign_pages"] == 0
    assert told["bytes_compared"] == told["source_bytes"] == 3 << 20
    assert told["demand_pages"] > 0
    assert told["stream_pages"] > 0
    assert 0 < told["time_to_first_result_s"] < told["copied_s"] < told["copy_first_s"]
    assert told["copied_s"] >= 1.8  # the source was as slow as it was told to be
    assert told["total_s"] > 0
    assert told["write_to_read_only_refused"] is True
    assert told["writes"]["stamps"] > 0
    assert {block["idstr"]: block["state"] for block in told["blocks"]} == dict.fromkeys(
        ("data", "results", "draft"), "END"
    )
    assert len(told["helpers"]) >= HELPERS_MIN
    assert all(helper["ok"] and helper["result"] == helper["expected"] for helper in told["helpers"])
    assert all(0 < helper["first_result_s"] <= helper["total_s"] for helper in told["helpers"])
    waited = max(told["helpers"], key=lambda helper: helper["faults"])
    assert waited["faults"] > 0
    assert 0 < waited["blocktime_us"]["p50"] <= waited["blocktime_us"]["p99"] <= waited["blocktime_us"]["max"]


@pytest.mark.slow
def test_demo_takes_the_users_array_and_says_in_words_what_it_showed(runtime_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "an array,%#1.npy"
    np.save(path, np.random.default_rng(1).standard_normal((400, 250)))
    finished = demo("--source", path, "--rate=2M", "--delay=500us")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for word in ("scan", "random_lookup", "numpy_user", "writer", "reader", "forking_pool", "touch", "editor"):
        assert word in finished.stdout
    assert finished.stdout.count("kept    P") == 4
    assert "copying everything first" in finished.stdout
    assert "WRONG" not in finished.stdout
    assert "BROKEN" not in finished.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_that_is_interrupted_leaves_nothing(runtime_dir: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pcshare", "demo", "--size=2M", "--seconds=60"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        preexec_fn=die_with_parent,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as lines:
        assert any("waiting" in line and "helpers at work 0" not in line for line in lines)
        process.send_signal(number)
        lines.read()
        code = process.wait(DEMO_TIMEOUT_S)
    assert code == 128 + number
    assert list(tmp_path.iterdir()) == []
    assert not [name for name in runtime.names() if name.startswith(f"demo-{process.pid}-")]


# -- the file


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "directory"),
        (lambda path: path.write_bytes(b"small"), "5 bytes"),
    ],
)
def test_demo_refuses_a_bad_file(runtime_dir: Path, tmp_path: Path, make: object, word: str) -> None:
    path = tmp_path / "given"
    make(path)  # type: ignore[operator]
    finished = demo("--source", path, "--json")
    assert finished.returncode == errors.EXIT_FAILED
    assert word in json.loads(finished.stdout)["error"]
    assert str(path) in finished.stderr


def test_made_file_has_its_size_and_no_two_equal_halves(tmp_path: Path) -> None:
    path = source.make_file(tmp_path, 2 << 20)
    content = path.read_bytes()
    assert len(content) == 2 << 20
    assert content[: 1 << 20] != content[1 << 20 :]


def test_made_file_that_is_too_small_is_refused_before_it_is_made() -> None:
    finished = demo("--size=4K")
    assert finished.returncode == errors.EXIT_USAGE
    assert "--size must be 1 MiB or more" in finished.stderr
    assert "packing" not in finished.stderr


def test_demo_refuses_an_array_that_was_cut_short(runtime_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.npy"
    np.save(path, np.zeros(100_000))
    os.truncate(path, 400_000)
    finished = demo("--source", path)
    assert finished.returncode == errors.EXIT_FAILED
    assert "the file was cut short" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_slow_source_means_the_file_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a b#rate=1,%41=\N{LATIN SMALL LETTER U WITH DIAERESIS}.bin"
    spec = parse_argument("data=" + source.slowed(path, 0.002, 1 << 20))
    assert spec.target == str(path)
    assert (spec.filters.delay_us, spec.filters.rate) == (2000, 1 << 20)


# -- the judgement


def test_every_differing_byte_of_a_block_is_counted(served: Serving, data_file: Path, tmp_path: Path) -> None:
    assert judge.compare_block(served.name, data_file) == (FILE_BYTES, 0)
    content = bytearray(data_file.read_bytes())
    for place in (0, 4096, FILE_BYTES - 1):
        content[place] ^= 1
    other = tmp_path / "other.bin"
    other.write_bytes(content)
    assert judge.compare_block(served.name, other) == (FILE_BYTES, 3)


def test_wrong_result_counts_all_that_its_helper_looked_at(served: Serving, data_file: Path) -> None:
    plan = {role.name: role for role in cast.roles(data_file, data_file)}
    player = play(served, plan["scan"])
    right = judge.judge(player, {"scan": plan["scan"].expected()})
    wrong = judge.judge(player, {"scan": "something else"})
    assert right.right
    assert judge.mismatched_bytes(0, [right]) == 0
    assert not wrong.right
    assert judge.mismatched_bytes(0, [wrong]) == FILE_BYTES


def test_helper_that_fails_is_neither_right_nor_silent(served: Serving, data_file: Path) -> None:
    (scan,) = [role for role in cast.roles(data_file, data_file) if role.name == "scan"]
    role = cast.Role("scan", "", (*scan.command, "--block=nowhere"), lambda: None)
    verdict = judge.judge(play(served, role), {"scan": None})
    assert not verdict.right
    assert "nowhere" in verdict.complaint


def test_trespasser_is_refused_and_only_on_a_read_only_block(served: Serving) -> None:
    """P8"""
    role = cast.trespasser()
    player = play(served, role)
    assert player.process.returncode == -signal.SIGSEGV
    assert judge.was_refused(player)
    allowed = cast.Role(role.name, role.does, (*role.command, "--block=draft"), role.expected)
    assert not judge.was_refused(play(served, allowed))


def test_editor_finds_the_file_with_its_stamps(served: Serving, data_file: Path) -> None:
    """P2"""
    (role,) = [role for role in cast.roles(data_file, data_file) if role.name == "editor"]
    player = play(served, role)
    assert player.report["result"] == editor.edited(data_file)
    assert player.report["result"] != f"{zlib.crc32(data_file.read_bytes()):08x}"
    assert player.report["stamps"] == len(list(editor.places(FILE_BYTES)))


def test_leftovers_are_counted(runtime_dir: Path) -> None:
    """P7"""
    before = Inventory()
    read_end, write_end = os.pipe()
    child = subprocess.Popen(["sleep", "60"], preexec_fn=die_with_parent)
    try:
        leaked = before.leaked([])
        assert (leaked.fds, leaked.processes, leaked.threads, leaked.shm) == (2, 1, 0, 0)
    finally:
        child.kill()
        child.wait()
        os.close(read_end)
        os.close(write_end)
    assert before.leaked([]).nothing


def test_this_process_which_attaches_too_is_no_leftover(runtime_dir: Path) -> None:
    """It waits for everything to be copied first, and may be in the coordinator's list for a moment after that."""
    before = Inventory()
    before.watch([psutil.Process()])
    assert before.leaked([]).nothing
