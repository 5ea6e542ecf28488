"""bench.report, bench.plots: tables and pictures of an outcome that was made up: what they say, that they are there.

Whether a picture is a good one no test can tell.
"""

from __future__ import annotations

import io
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from pcshare import cli
from pcshare.bench import plots, report
from pcshare.bench.contest import OURS, Contest, Figures, Played, Row
from pcshare.bench.lab import Lab
from pcshare.bench.run import NAMES, Outcome, contests_of
from pcshare.errors import EXIT_DONE, EXIT_HOST, EXIT_USAGE, HostError

MACHINE = {
    **{"cpu": "A CPU", "cpus": 2, "virtual": True, "kernel": "6.1", "memory_gib": 8.0},
    **{"load_before": 0.1, "load_after": 0.2},
}
PICTURES = ("faults.svg", "peers.svg", "ratios.svg", "throughput.svg")


def open_fonts() -> None:
    """matplotlib keeps the files of the fonts that it has used open; no test shall be blamed for it."""
    figure = Figure()
    for number, weight in enumerate(("normal", "bold")):
        figure.text(0, number, "text", fontweight=weight)
    figure.savefig(io.BytesIO(), format="svg")


open_fonts()


def played(name: str, rows: Sequence[Row], figures: Mapping[str, Sequence[Figures]]) -> Played:
    contest = Contest(name, "lazy", "none", {rival: lambda _: {} for rival in figures}, rows)
    return Played(contest, {rival: list(rounds) for rival, rounds in figures.items()})


def times(*medians: float) -> list[Figures]:
    return [{"p50": us, "p99": 2 * us, "p99.9": 5 * us} for us in medians]


@pytest.fixture
def outcome() -> Outcome:
    """One contest of each kind of row and picture."""
    return Outcome(MACHINE, 3, 60.0, [
        played("fault, helper on CPU 0", [Row("median", "p50", "limit", number="F1", at_most=0.3)],
               {OURS: times(8, 10, 12), "limit": times(80, 40, 60)}),
        played("fill, pages of 4 KiB", [Row("speed", "bytes_per_s", "copy", number="F5", at_least=0.9)],
               {OURS: [{"bytes_per_s": 1e9}] * 3, "copy": [{"bytes_per_s": 2e9}] * 3}),
        played("after, a complete block", [Row("CPU time in 60 s", "cpu_ms", "", number="F10", at_most=1)],
               {OURS: [{"cpu_ms": 0.0}]}),
        played("after, every byte read", [Row("time", "seconds", "memfd", number="F10", contains=1.0)],
               {OURS: [{"seconds": 1.0}] * 3, "memfd": [{"seconds": one} for one in (0.9, 1.1, 0.8)]}),
        played("peers, nbdfuse, scan", [Row("time", "seconds", "nbdfuse", number="F13", at_most=0.95),
                                        Row("faults", "faults", "nbdfuse")],
               {OURS: [{"seconds": 1.0, "faults": 7.0}] * 3, "nbdfuse": [{"seconds": 2.0, "faults": 0.0}] * 3}),
    ])  # fmt: skip


def lines_of(outcome: Outcome, number: str) -> list[list[str]]:
    """The cells of the table's lines with that number."""
    lines = [line.strip("| ").split(" | ") for line in report.tables(outcome.to_json()).splitlines()]
    return [line for line in lines if line[0] == number]


# -- tables


def test_table_says_number_conditions_figures_ratio_and_verdict(outcome: Outcome) -> None:
    assert lines_of(outcome, "F1") == [
        [*("F1", "helper on CPU 0: median", "lazy", "none", "10 (8-12) us", "limit", "60 (40-80) us"),
         "0.20 (0.10-0.25)", "<= 0.3", "yes"]
    ]  # fmt: skip


def test_throughput_is_told_in_gigabytes_a_second(outcome: Outcome) -> None:
    ((*_, ours, _against, theirs, ratio, bound, met),) = lines_of(outcome, "F5")
    assert (ours, theirs, ratio, bound, met) == ("1 (1-1) GB/s", "2 (2-2) GB/s", "0.50 (0.50-0.50)", ">= 0.9", "no")


def test_figure_that_is_bound_itself_has_no_rival_and_no_ratio(outcome: Outcome) -> None:
    alone, beside = lines_of(outcome, "F10")
    assert alone[4:] == ["0 (0-0) ms", "", "", "", "<= 1 ms", "yes"]
    assert beside[-2:] == ["around 1", "yes"]


def test_ratio_to_nothing_is_told_as_infinite(outcome: Outcome) -> None:
    assert "| infinite (infinite-infinite) |" in report.tables(outcome.to_json())


def test_each_sub_benchmark_that_ran_has_a_table_and_what_it_does_not_measure(outcome: Outcome) -> None:
    text = report.tables(outcome.to_json())
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("## ")] == [
        "## fault", "## fill", "## after", "## peers"
    ]  # fmt: skip
    assert text.count("Does not measure: ") == 4
    assert "A CPU, 2 CPUs, virtual, 8 GiB, Linux 6.1; load 0.1 before and 0.2 after; 60 s; 3 rounds." in text


def test_terminal_says_the_same_cells(outcome: Outcome) -> None:
    ((number, what, ours, *_),) = report.rows(outcome.played[0])
    assert (number, what, ours) == ("F1", "median", "10 (8-12) us")


@pytest.mark.parametrize("name", NAMES)
def test_name_of_each_contest_begins_with_its_sub_benchmark(name: str, tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        for contest in contests_of(name, lab):
            assert report.benchmark_of(contest.name) == name
            assert contest.stream
            assert contest.pinning


# -- pictures


def texts_of(picture: Path) -> Iterator[str]:
    """What a picture says."""
    for element in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text"):
        yield "".join(element.itertext())


def test_report_is_figures_tables_and_pictures(outcome: Outcome, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    written = list(report.write(outcome.to_json(), folder))
    assert sorted(path.name for path in written) == sorted([report.FIGURES, report.TABLES, *PICTURES])
    assert {path for path in written} == set(folder.iterdir())
    for picture in PICTURES:
        assert ElementTree.parse(folder / picture).getroot().tag.endswith("svg")
    ratios, faults = set(texts_of(folder / "ratios.svg")), set(texts_of(folder / "faults.svg"))
    assert {"F1  helper on CPU 0: median / limit", "F5  pages of 4 KiB: speed / copy"} <= ratios
    assert {"p50", "p99", "p99.9", OURS, "limit", "fault, helper on CPU 0"} <= faults


def test_pictures_are_the_same_each_time(outcome: Outcome, tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "other"):
        list(report.write(outcome.to_json(), folder))
    for picture in PICTURES:
        assert (tmp_path / "one" / picture).read_bytes() == (tmp_path / "other" / picture).read_bytes()


def test_picture_of_what_was_not_measured_is_left_out(outcome: Outcome, tmp_path: Path) -> None:
    outcome.played = outcome.played[:1]
    assert [path.name for path in plots.draw(outcome.to_json(), tmp_path)] == ["ratios.svg", "faults.svg"]
    outcome.played = []
    assert list(plots.draw(outcome.to_json(), tmp_path)) == []


# -- the command


def test_report_is_made_again_without_measuring(
    outcome: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = tmp_path / "figures.json"
    measured.write_text(json.dumps(outcome.to_json()))
    assert cli.main(["bench", "--from", str(measured), "--report", str(tmp_path / "again")]) == EXIT_DONE
    assert json.loads((tmp_path / "again" / report.FIGURES).read_text()) == outcome.to_json()
    assert (tmp_path / "again" / report.TABLES).read_text() == report.tables(outcome.to_json())
    assert "wrote" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"machine": 1, "results": []}'])
def test_file_that_is_no_run_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text(content)
    assert cli.main(["bench", "--from", str(other), "--report", str(tmp_path / "report")]) == EXIT_USAGE
    assert "is no figures.json of a run" in capsys.readouterr().err


def test_figures_without_a_folder_for_the_report_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "figures.json").write_text("{}")
    assert cli.main(["bench", "--from", str(tmp_path / "figures.json")]) == EXIT_USAGE
    assert "--report" in capsys.readouterr().err


def test_missing_matplotlib_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*_: Any, **__: Any) -> Outcome:
        pytest.fail("something was measured")

    monkeypatch.setattr("pcshare.bench.run.run", measure)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", "fault", "--report", str(tmp_path / "report")]) == EXIT_HOST
    assert "pip install 'pcshare[plots]'" in capsys.readouterr().err
    with pytest.raises(HostError):
        list(report.write({}, tmp_path / "report"))
    assert not (tmp_path / "report").exists()
