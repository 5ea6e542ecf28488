"""bench: the arithmetic of ratios, contests that run and leave nothing behind, and a check that fails when it must.

How fast anything is here is no test's business.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pcshare import cli
from pcshare.bench import lab as lab_module
from pcshare.bench import run as run_module
from pcshare.bench.contest import OURS, Contest, Figures, Played, Result, Row, median_interval
from pcshare.bench.lab import ANY_CPU, EXECUTABLES, HUGE_PAGE, MIB, PAGE, TOOLS, Lab
from pcshare.cli import bench as command_module
from pcshare.errors import EXIT_DONE, EXIT_FAILED, EXIT_HOST, EXIT_INTERRUPTED, EXIT_USAGE, HostError, PcshareError
from pcshare.launcher import Coordinator
from support import needs

ROOT = Path(__file__).parent.parent
WITH_CONTESTS = sorted(
    path.stem for path in (ROOT / "pcshare" / "bench").glob("*.py") if "\ndef contests(" in path.read_text()
)
SHRINK = 32
PROGRAM_TIMEOUT_S = 60.0
RIVAL = "rival"
LENGTH = 64 * PAGE


@pytest.fixture
def lab(tmp_path: Path, runtime_dir: Path) -> Iterator[Lab]:
    with Lab(tmp_path, shrink=SHRINK) as made:
        yield made


def result(ours: Sequence[float], theirs: Sequence[float] | None = None, **row: Any) -> Result:
    given = Row("what", "p50", RIVAL, **row)
    return Result(contest_of([given]), given, ours, theirs or [1] * len(ours))


def contest_of(
    rows: Sequence[Row], rivals: Mapping[str, Callable[[int], Figures]] | None = None, **more: Any
) -> Contest:
    one = {"p50": 1.0}
    return Contest("contest", "lazy", "none", rivals or {OURS: lambda _: one, RIVAL: lambda _: one}, rows, **more)


# -- what follows from figures


@pytest.mark.parametrize(
    ("count", "low"),
    [
        (1, 0),
        (5, 0),  # 1 - 2/32: less than was asked for, and all there is
        (6, 0),  # 1 - 2/64 = 0.969; without the outermost 1 - 2*7/64 = 0.78
        (8, 0),  # without the outermost 1 - 2*9/256 = 0.93
        (9, 1),  # 1 - 2*10/512 = 0.961
        (11, 1),  # 1 - 2*12/2048 = 0.988; one more off 1 - 2*67/2048 = 0.935
        (12, 2),  # 1 - 2*79/4096 = 0.961
    ],
)
def test_interval_leaves_out_what_the_median_surely_is_between(count: int, low: int) -> None:
    values = [float(value) for value in range(count)]
    assert median_interval(values[::-1]) == (low, count - 1 - low)


def test_ratios_go_round_by_round() -> None:
    found = result([2, 9, 4], [1, 3, 4])
    assert found.ratios == [2, 3, 1]
    assert found.median == 2
    assert found.interval == (1, 3)


def test_ratio_to_nothing_is_infinite_unless_both_are_nothing() -> None:
    found = result([1, 0, 1], [0, 0, 2], at_most=3)
    assert found.ratios == [math.inf, 1, 0.5]
    assert found.to_json()["ratios"] == [None, 1, 0.5]
    json.loads(json.dumps(found.to_json(), allow_nan=False))


@pytest.mark.parametrize(
    ("ours", "row", "met", "beyond"),
    [
        ([1, 2, 3], {"at_most": 2}, True, False),
        ([1, 2.1, 3], {"at_most": 2}, False, False),
        ([2.1, 2.2, 3], {"at_most": 2}, False, True),
        ([2, 3, 4], {"at_most": 2}, False, False),  # the interval touches the limit
        ([0.5, 0.6, 0.7], {"at_least": 0.6}, True, False),
        ([0.5, 0.55, 0.6], {"at_least": 0.6}, False, False),
        ([0.5, 0.55, 0.59], {"at_least": 0.6}, False, True),
        ([0.9, 1.5, 1.6], {"contains": 1}, True, False),
        ([1.1, 1.5, 1.6], {"contains": 1}, False, True),
        ([0.7, 0.8, 0.9], {"contains": 1}, False, True),
        ([9, 9, 9], {}, None, False),
    ],
)
def test_row_is_met_by_the_median_and_beyond_by_the_whole_interval(
    ours: list[float], row: dict[str, Any], met: bool | None, beyond: bool
) -> None:
    found = result(ours, **row)
    assert (found.is_met, found.is_beyond) == (met, beyond)


def test_row_takes_the_figures_it_names() -> None:
    row = Row("what", "a", RIVAL, "b", of="third")
    played = Played(contest_of([row]), {OURS: [], RIVAL: [{"b": 2.0}], "third": [{"a": 8.0, "b": 1.0}]})
    (found,) = played.results()
    assert (found.ours, found.theirs, found.median) == ([8.0], [2.0], 4.0)


def test_optional_figure_is_told_of_the_rounds_that_have_it() -> None:
    ours: list[Figures] = [{"a": 1.0}, {}, {"a": 3.0}, {}]
    theirs: list[Figures] = [{}, {"a": 2.0}, {"a": 2.0}, {}]
    row = Row("what", "a", RIVAL, is_optional=True)
    (found,) = Played(contest_of([row]), {OURS: ours, RIVAL: theirs}).results()
    assert (found.ours, found.theirs, found.ratios) == ([3.0], [2.0], [1.5])
    assert not list(Played(contest_of([row]), {OURS: ours[:2], RIVAL: theirs[:2]}).results())
    with pytest.raises(KeyError):
        list(Played(contest_of([Row("what", "a", RIVAL)]), {OURS: ours, RIVAL: theirs}).results())


# -- rounds


def test_rivals_take_turns_in_being_first() -> None:
    order: list[tuple[str, int]] = []

    def rival(name: str) -> Callable[[int], Figures]:
        def measure(number: int) -> Figures:
            order.append((name, number))
            return {}

        return measure

    played = run_module.play(contest_of([], {name: rival(name) for name in "abc"}), 2, lambda _: None)
    assert order == [("a", 0), ("b", 0), ("c", 0), ("c", 1), ("b", 1), ("a", 1)]
    assert {name: len(figures) for name, figures in played.figures.items()} == {"a": 2, "b": 2, "c": 2}


def test_contest_that_takes_long_has_fewer_rounds_and_never_more() -> None:
    assert [run_module.rounds_of(contest_of([], rounds=3), rounds) for rounds in (1, 3, 7)] == [1, 3, 3]
    assert run_module.rounds_of(contest_of([]), 7) == 7


# -- the contests there are


def test_command_and_room_know_the_same_names() -> None:
    assert list(run_module.NAMES) == list(command_module.NAMES)
    help_text = command_module.command.help or ""
    for name, what in run_module.NAMES.items():
        assert re.search(rf"^ *{name} +{re.escape(what)}$", help_text, re.M), name


def test_whatever_has_contests_can_be_named() -> None:
    assert set(WITH_CONTESTS) <= set(run_module.NAMES)


@pytest.mark.parametrize("name", WITH_CONTESTS)
def test_contests_of_a_name_are_well_formed(name: str, lab: Lab) -> None:
    needs(None if len(lab.cpus) > 1 else "a second CPU")
    contests = run_module.contests_of(name, lab)
    assert contests
    assert len({contest.name for contest in contests}) == len(contests)
    assert run_module.limits_of(name)
    for contest in contests:
        assert contest.rows
        assert set(contest.needs) <= set(TOOLS)
        assert {rival for row in contest.rows for rival in (row.of, row.against)} <= {*contest.rivals, ""}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CONTESTS)
def test_each_contest_yields_the_figures_of_its_rows_and_leaves_nothing(
    name: str, lab: Lab, huge_pages: Callable[[int], None]
) -> None:
    needs(None if len(lab.cpus) > 1 else "a second CPU")
    for contest in run_module.contests_of(name, lab):
        missing = [tool for tool in contest.needs if shutil.which(tool) is None]
        needs(", ".join(missing) if missing else None)
        if contest.huge_bytes:
            huge_pages(contest.huge_bytes // HUGE_PAGE)
        files = {path.name for path in lab.folder.iterdir()}
        played = run_module.play(contest, 1, lambda _: None)
        for found in played.results():
            # Of a block so small the stream may have brought all before anything was demanded.
            is_known = found.row.figure == "demanded" or all(map(math.isfinite, found.ratios))
            assert is_known, found.name
            assert all(ratio >= 0 for ratio in found.ratios), found.name
        left = {path for path in lab.folder.iterdir() if path.name not in files}
        assert all(path.is_file() and path.suffix in (".bin", ".list", ".set") for path in left), left


# -- the command


@pytest.fixture
def bench(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """bench(contests, *arguments): what `pcshare bench fault` would say and return if it had these contests."""
    monkeypatch.setattr(lab_module, "WARM_BYTES", MIB)

    def run(contests: Sequence[Contest], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(run_module, "contests_of", lambda _name, _lab: contests)
        status = cli.main(["bench", "fault", "--folder", str(tmp_path), *arguments])
        return status, *capsys.readouterr()

    return run


def rounds_with(values: Sequence[float], **row: Any) -> Contest:
    rivals: dict[str, Callable[[int], Figures]] = {
        OURS: lambda number: {"p50": values[number]},
        RIVAL: lambda _: {"p50": 1.0},
    }
    return contest_of([Row("median", "p50", RIVAL, number="F9", **row)], rivals, in_check=True)


@pytest.mark.parametrize(
    ("values", "status", "verdict"),
    [
        ([1.0, 1.1, 1.2], EXIT_DONE, "no ratio lies beyond its limit"),
        ([1.9, 2.1, 2.2], EXIT_DONE, "no ratio lies beyond its limit"),
        ([2.1, 2.2, 2.3], EXIT_FAILED, "beyond their limits: F9 contest: median against rival"),
    ],
    ids=["within", "spanning", "beyond"],
)
def test_check_fails_only_if_the_whole_interval_is_beyond(
    bench: Callable[..., tuple[int, str, str]], values: list[float], status: int, verdict: str
) -> None:
    found, out, problems = bench([rounds_with(values, at_most=2)], "--rounds", "3", "--check")
    assert (found, problems.splitlines()[-1]) == (status, f"pcshare: {verdict}")
    assert "F9" in out
    assert bench([rounds_with(values, at_most=2)], "--rounds", "3")[0] == EXIT_DONE  # who only looks is not judged


def test_check_plays_its_own_contests_in_their_shorter_form(bench: Callable[..., tuple[int, str, str]]) -> None:
    def refuse(_: int) -> Figures:
        raise AssertionError("that is not part of the check")

    forms: list[bool] = []
    other = contest_of([], {OURS: refuse})

    class Watched(Lab):
        def warm(self) -> None:
            forms.append(self.is_check)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "Lab", Watched)
        assert bench([other, rounds_with([1.0] * 5, at_most=2)], "--check")[0] == EXIT_DONE
    assert forms == [True]


def test_json_is_one_object_and_all_that_goes_to_stdout(bench: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = bench([rounds_with([1.0, 3.0], at_most=2)], "--rounds", "2", "--json")
    (line,) = out.splitlines()
    told = json.loads(line)
    (row,) = told["results"]
    assert status == EXIT_DONE
    assert {"machine", "rounds", "seconds", "results", "figures"} == set(told)
    assert (row["number"], row["ratios"], row["interval"], row["met"], row["beyond"]) == (
        *("F9", [1.0, 3.0], [1.0, 3.0]),
        *(True, False),
    )
    assert told["figures"] == [
        {"contest": "contest", "rivals": {OURS: [{"p50": 1.0}, {"p50": 3.0}], RIVAL: [{"p50": 1.0}] * 2}}
    ]


def test_missing_tool_is_told_with_its_package_before_anything_is_measured(
    bench: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> Figures:
        raise AssertionError("it was measured")

    monkeypatch.setattr(shutil, "which", lambda _: None)
    contests = [contest_of([], {OURS: refuse}), contest_of([], {OURS: refuse}, needs=["nbdkit", "nbdcopy", "nbdfuse"])]
    status, out, problems = bench(contests, "--json")
    assert status == EXIT_HOST
    assert "not installed: nbdcopy, nbdfuse, nbdkit" in problems
    assert json.loads(out)["hint"] == "Debian, Ubuntu: apt-get install libnbd-bin nbdkit"


def test_interrupt_ends_whatever_runs(bench: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    needs(None if shutil.which("nbdkit") else "nbdkit")
    made: list[Lab] = []

    class Kept(Lab):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    def interrupted(_: int) -> Figures:
        (lab,) = made
        with lab.nbdkit("file", str(lab.file(LENGTH))) as uri, lab.coordinator(uri, "lazy") as serving:
            lab.touch(
                *("walk", ANY_CPU, 1, f"pcshare:{serving.socket}"), at_start=lambda: signal.raise_signal(signal.SIGINT)
            )
        raise AssertionError("it was not interrupted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "Lab", Kept)
        status, _, _ = bench([contest_of([], {OURS: interrupted})], "--rounds", "1")
    assert status == EXIT_INTERRUPTED
    assert not list(tmp_path.glob("pcshare-bench-*"))


# -- the lab


def test_source_is_the_same_in_each_run(tmp_path: Path) -> None:
    with Lab(tmp_path) as one, Lab(tmp_path) as other:
        assert one.file(LENGTH).read_bytes() == other.file(LENGTH).read_bytes()
        assert one.file(LENGTH).stat().st_size == LENGTH
    assert not list(tmp_path.iterdir())


def test_sources_are_not_made_in_memory_unless_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    monkeypatch.setattr(lab_module, "OTHER_FOLDER", tmp_path)
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True
    ).stdout.strip()
    needs(None if kind != "tmpfs" else "a folder for temporary files that is not in memory")
    assert lab_module.usual_folder() == tmp_path
    with Lab(Path("/dev/shm")) as lab:
        assert lab.folder.parent == Path("/dev/shm")
    monkeypatch.setattr(lab_module, "OTHER_FOLDER", Path("/dev/shm"))
    with pytest.raises(HostError) as raised:
        lab_module.usual_folder()
    assert "--folder" in str(raised.value.hint)


def test_lengths_shrink_to_whole_huge_pages(tmp_path: Path) -> None:
    with Lab(tmp_path, is_check=True) as check, Lab(tmp_path, shrink=3) as tiny, Lab(tmp_path) as full:
        assert (full.length(64 * MIB, 8 * MIB), full.count(10)) == (64 * MIB, 10)
        assert (check.length(64 * MIB, 8 * MIB), check.length(64 * MIB), check.count(10)) == (8 * MIB, 64 * MIB, 10)
        assert (tiny.length(64 * MIB, 8 * MIB), tiny.count(10), tiny.length(MIB), tiny.count(1)) == (
            *(20 * MIB, 3),
            *(2 * HUGE_PAGE, 1),
        )


def test_what_is_started_pinned_stays_on_its_cpu_and_nobody_else(lab: Lab) -> None:
    before = os.sched_getaffinity(0)
    with lab.pinned(lab.cpus[-1]), lab.process(["sleep", "60"]) as process:
        assert os.sched_getaffinity(process.pid) == {lab.cpus[-1]}
    with lab.pinned(ANY_CPU):
        assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before


def test_server_that_does_not_start_is_told_at_once(lab: Lab) -> None:
    needs(None if shutil.which("nbdkit") else "nbdkit")
    with pytest.raises(PcshareError, match="nbdkit file /nowhere ended with status 1"), lab.nbdkit("file", "/nowhere"):
        pass


# -- huge pages


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel's folder for huge pages: five there, three free, of which one is promised."""
    folder = tmp_path / "huge"
    folder.mkdir()
    for name, count in (("nr_hugepages", 5), ("free_hugepages", 3), ("resv_hugepages", 1)):
        (folder / name).write_text(f"{count}\n")
    monkeypatch.setattr(lab_module, "HUGE_PAGES", folder)
    monkeypatch.setattr(lab_module, "_touch_huge_pages", lambda _: None)
    return folder


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), PcshareError("failed")], ids=repr)
def test_huge_pages_are_put_back_however_it_ends(pretended: Path, lab: Lab, error: BaseException) -> None:
    number = pretended / "nr_hugepages"

    def use() -> None:
        with lab.huge_pages(6 * HUGE_PAGE):
            assert number.read_text() == "9"
            raise error

    with pytest.raises(type(error)):
        use()
    assert number.read_text() == "5"


def test_huge_pages_that_are_free_are_taken_as_they_are(pretended: Path, lab: Lab) -> None:
    with lab.huge_pages(2 * HUGE_PAGE):
        assert (pretended / "nr_hugepages").read_text() == "5\n"
    assert (pretended / "nr_hugepages").read_text() == "5\n"


@pytest.mark.parametrize(("meanwhile", "left"), [(12, 8), (9, 5), (7, 5), (3, 3)])
def test_huge_pages_that_others_reserved_or_gave_back_meanwhile_are_theirs(
    pretended: Path, lab: Lab, meanwhile: int, left: int
) -> None:
    with lab.huge_pages(6 * HUGE_PAGE):
        (pretended / "nr_hugepages").write_text(str(meanwhile))
    assert (pretended / "nr_hugepages").read_text() == str(left)


def test_user_who_may_not_reserve_huge_pages_is_told_the_command(
    pretended: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    lab.need_huge_pages(2 * HUGE_PAGE)
    with pytest.raises(HostError) as raised:
        lab.need_huge_pages(6 * HUGE_PAGE)
    assert raised.value.hint == "sudo sysctl vm.nr_hugepages=9"


def test_kernel_without_huge_pages_is_told(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_module, "HUGE_PAGES", tmp_path / "nowhere")
    lab.need_huge_pages(0)
    with pytest.raises(HostError, match="no huge pages"):
        lab.need_huge_pages(HUGE_PAGE)


def test_huge_pages_of_this_kernel_are_put_back(lab: Lab) -> None:
    number = lab_module.HUGE_PAGES / "nr_hugepages"
    needs(None if os.access(number, os.W_OK) else "the right to reserve huge pages")
    before = number.read_text()
    with lab.huge_pages(2 * HUGE_PAGE):
        assert lab_module._lacking_huge_pages(2 * HUGE_PAGE) == 0
    assert number.read_text() == before


# -- the programs


def program(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(EXECUTABLES / name), *map(str, arguments)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("bench-touch", []),
        ("bench-touch", ["-w"]),
        ("bench-touch", ["walk", 0, 1]),
        ("bench-touch", ["scan", 0, 1, "file:FILE"]),
        ("bench-touch", ["stroll", 0, "file:FILE"]),
        ("bench-touch", ["scan", ANY_CPU, "FILE"]),
        ("bench-touch", ["scan", ANY_CPU, "file:SHORT"]),
        ("bench-limit", []),
        ("bench-limit", ["server", "naps", "FILE", -1, -1, 1]),
        ("bench-limit", ["server", "blocks", "SHORT", -1, -1, 1]),
        ("bench-limit", ["chain", "FILE", -1, -1, 1]),
        ("bench-limit", ["nbd", "FILE", -1, -1]),
        ("bench-limit", ["copy", "FILE", 8192]),
        ("bench-limit", ["copy", "SHORT", 4096]),
        ("bench-limit", ["pwrite"]),
    ],
)
def test_wrong_usage_of_a_program_ends_with_2_and_one_line(name: str, arguments: list[object], tmp_path: Path) -> None:
    (tmp_path / "FILE").write_bytes(bytes(LENGTH))
    (tmp_path / "SHORT").write_bytes(b"short")
    named = [re.sub("FILE|SHORT", lambda found: str(tmp_path / found[0]), str(argument)) for argument in arguments]
    done = program(name, *named)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (EXIT_USAGE, "", 1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(2 * HUGE_PAGE))
    return path


@pytest.mark.parametrize(
    "arguments",
    [["server", "blocks", "FILE"], ["server", "spins", "FILE"], ["chain", "FILE", ANY_CPU]],
    ids=["blocks", "spins", "chain"],
)
def test_limit_of_a_fault_times_every_touch(arguments: list[object], source: Path, lab: Lab) -> None:
    named = [source if argument == "FILE" else argument for argument in arguments]
    some, whole = (lab.limit(*named, ANY_CPU, ANY_CPU, count) for count in (100, 0))
    assert (some["touches"], some["timed"]) == (100, 100)
    assert whole["timed"] == 2 * HUGE_PAGE // PAGE
    assert 0 < some["p50"] <= some["p99"] <= some["p99.9"] <= some["max"]


def test_limit_of_a_fault_over_nbd_times_every_touch(source: Path, lab: Lab) -> None:
    needs(None if shutil.which("nbdkit") else "nbdkit")
    with lab.nbdkit("file", str(source)) as uri:
        whole = lab.limit("nbd", uri.partition("socket=")[2], ANY_CPU, ANY_CPU, 0)
    assert whole["timed"] == 2 * HUGE_PAGE // PAGE


@pytest.mark.parametrize("arguments", [["copy", "FILE", PAGE], ["pwrite", "FILE"]], ids=["copy", "pwrite"])
def test_limit_of_a_fill_tells_how_fast_it_was(arguments: list[object], source: Path, lab: Lab) -> None:
    told = lab.limit(*(source if argument == "FILE" else argument for argument in arguments))
    assert told["bytes"] == 2 * HUGE_PAGE
    assert told["bytes_per_s"] == pytest.approx(told["bytes"] / told["seconds"], rel=0.01)


def test_limit_of_a_fill_with_huge_pages(source: Path, lab: Lab, huge_pages: Callable[[int], None]) -> None:
    huge_pages(2)
    assert lab.limit("copy", source, HUGE_PAGE)["bytes"] == 2 * HUGE_PAGE


def test_program_that_fails_is_told_in_its_words(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(PcshareError, match=r"bench-limit pwrite .*nowhere failed: .*No such file"):
        lab.limit("pwrite", tmp_path / "nowhere")
    with pytest.raises(PcshareError, match="No such file"):
        lab.touch("scan", ANY_CPU, f"file:{tmp_path / 'nowhere'}", at_start=lambda: pytest.fail("it has begun"))


@pytest.mark.parametrize("kind", ["file", "memfd", "pcshare"])
def test_touches_are_counted_alike_whatever_the_memory_is(kind: str, source: Path, lab: Lab) -> None:
    pages = 2 * HUGE_PAGE // PAGE
    with lab.coordinator(source, "lazy") as serving:
        target = f"pcshare:{serving.socket}#data" if kind == "pcshare" else f"{kind}:{source}"
        walk, whole = lab.touch("walk", ANY_CPU, 10, target), lab.touch("walk", ANY_CPU, 0, target)
        scan = lab.touch("scan", ANY_CPU, target)
        sums = lab.touch("sum", ANY_CPU, 1, target) if kind != "pcshare" else scan
        faults = serving.status().faults
    assert (walk["timed"], whole["timed"]) == (10, pages)
    assert scan["bytes"] == sums["bytes"] == 2 * HUGE_PAGE
    assert faults >= pages if kind == "pcshare" else faults == 0


def test_only_touches_of_missing_pages_are_timed_at_random(source: Path, lab: Lab) -> None:
    with lab.coordinator(source, "lazy") as serving:
        target = f"pcshare:{serving.socket}"
        first, again = (lab.touch("random", ANY_CPU, 200, 7, target) for _ in range(2))
        listed = json.loads(program("bench-touch", "times", ANY_CPU, 200, 8, target).stdout)
    assert first["touches"] == again["touches"] == 200
    assert 150 < first["timed"] <= 200
    assert "p50" not in again
    assert again["timed"] == 0
    assert 0 < len(listed) <= 200


def test_touches_begin_when_they_are_told_to(source: Path, lab: Lab) -> None:
    seen: list[tuple[int, int]] = []

    def look(serving: Coordinator) -> None:
        status = serving.status()
        seen.append((len(status.helpers), status.faults))

    with lab.coordinator(source, "lazy") as serving:
        lab.touch("walk", ANY_CPU, 50, f"pcshare:{serving.socket}", at_start=lambda: look(serving))
        faults = serving.status().faults
    assert seen == [(1, 0)]
    assert faults >= 50
