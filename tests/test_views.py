"""views: the picture of the arriving pages and the tables of `pcshare status`, from reports of a status segment."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from pcshare.status import BlockStatus, Blocktime, HelperStatus, StatusReport
from pcshare.views.progress import Kind, PagePicture, ProgressView, bytes_in, count_received, percent_text
from pcshare.views.report import helpers_table, list_table, run_summary, status_report

BLOCK = BlockStatus(
    index=0,
    idstr="data",
    used_length=64 * 4096 - 100,
    page_size=4096,
    writable=False,
    state="RUNNING",
    reason="",
    received_pages=32,
    hole_pages=0,
    page_count=64,
    demand_pages=2,
    stream_pages=30,
    zero_pages=0,
    foreign_pages=0,
    lost_pages=0,
    removed_pages=0,
    bitmap_offset=0,
)
WAITED = Blocktime(p50=12.5, p99=1500.0, max=2_000_000, total=2_100_000, buckets=(0,) * 32)
HELPER = HelperStatus(
    slot=0,
    pid=4711,
    uid=1000,
    state="attached",
    block="data",
    faults=1234,
    waiting=1,
    demand_pages=2,
    blocktime=WAITED,
    exporter=False,
)
REPORT = StatusReport(
    name="weights",
    pid=99,
    restarts=0,
    restarting=False,
    keeper_pid=98,
    alive=True,
    stopped=False,
    state="RUNNING",
    reason="",
    stream="eager",
    stream_rate=0,
    socket="/run/weights.sock",
    faults=1234,
    helpers_joined=1,
    helpers_left=0,
    blocktime=WAITED,
    blocks=(BLOCK,),
    helpers=(HELPER,),
)


def bitmap(*pages: int, page_count: int = 64) -> bytes:
    return sum(1 << page for page in pages).to_bytes(-(-page_count // 8), "little")


def drawn(view: RenderableType, *, plain: bool = True, width: int = 120) -> str:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=not plain, color_system=None if plain else "truecolor").print(view)
    return file.getvalue()


@pytest.mark.parametrize("page_count", [1, 7, 8, 9, 64, 1000])
@pytest.mark.parametrize("cells", [1, 3, 7, 64])
def test_every_received_page_is_counted_in_its_cell(page_count: int, cells: int) -> None:
    pages = [page for page in range(page_count) if page % 3 == 0]
    bounds = [page_count * i // cells for i in range(cells + 1)]
    counted = count_received(bitmap(*pages, page_count=page_count), page_count, cells)
    assert counted == [sum(low <= page < high for page in pages) for low, high in itertools.pairwise(bounds)]


def test_first_look_says_received_and_later_ones_how_pages_came() -> None:
    picture = PagePicture(8)
    picture.update(received=bitmap(0), page_count=64, demand_pages=1, complete=False)
    assert [cell.kind for cell in picture.cells] == [Kind.RECEIVED] + [Kind.MISSING] * 7
    picture.update(received=bitmap(0, 20, *range(32, 48)), page_count=64, demand_pages=2, complete=False)
    kinds = [cell.kind for cell in picture.cells]
    assert kinds == [
        Kind.RECEIVED,
        Kind.MISSING,
        Kind.DEMAND,
        Kind.MISSING,
        Kind.STREAM,
        Kind.STREAM,
        Kind.MISSING,
        Kind.MISSING,
    ]


def test_only_stream_pages_are_never_drawn_as_demanded() -> None:
    picture = PagePicture(8)
    picture.update(received=bitmap(), page_count=64, demand_pages=0, complete=False)
    picture.update(received=bitmap(3, 40), page_count=64, demand_pages=0, complete=False)
    assert {cell.kind for cell in picture.cells} == {Kind.MISSING, Kind.STREAM}


def test_at_the_end_what_is_not_received_is_a_hole() -> None:
    picture = PagePicture(4)
    picture.update(received=bitmap(*range(16)), page_count=64, demand_pages=0, complete=True)
    assert [cell.kind for cell in picture.cells] == [Kind.COMPLETE, Kind.HOLE, Kind.HOLE, Kind.HOLE]


def test_discarded_cell_is_drawn_as_not_received_again() -> None:
    picture = PagePicture(4)
    picture.update(received=bitmap(1), page_count=64, demand_pages=0, complete=False)
    picture.update(received=bitmap(), page_count=64, demand_pages=0, complete=False)
    assert {cell.kind for cell in picture.cells} == {Kind.MISSING}


def test_small_block_has_no_more_cells_than_pages() -> None:
    picture = PagePicture(96)
    picture.update(received=bitmap(2, page_count=3), page_count=3, demand_pages=0, complete=False)
    assert [cell.received for cell in picture.cells] == [0, 0, 1]


def test_picture_without_colours_tells_kinds_by_letters() -> None:
    view = ProgressView(8)
    view.update(REPORT, lambda block: bitmap())
    view.update(replace(REPORT, blocks=(replace(BLOCK, demand_pages=3),)), lambda block: bitmap(0, *range(56, 64)))
    text = drawn(view)
    assert "D......s" in text
    assert "50 %" in text
    assert "not received" in text
    assert "on demand" in text
    assert "by the stream" in text
    assert "hole\n" not in text


def test_picture_with_colours_shades_by_how_much_of_a_cell_is_here() -> None:
    view = ProgressView(2)
    view.update(REPORT, lambda block: bitmap(0, *range(32, 64)))
    text = drawn(view, plain=False)
    assert "▁" in text
    assert "█" in text


def test_narrow_terminal_breaks_the_picture_into_rows_that_fit() -> None:
    view = ProgressView(64)
    view.update(REPORT, lambda block: bitmap())
    assert max(map(len, drawn(view, width=40).splitlines())) <= 40


def test_line_shows_pause_and_waiting_helpers() -> None:
    view = ProgressView(8)
    view.update(replace(REPORT, blocks=(replace(BLOCK, state="PAUSED"),)), lambda block: bitmap(0))
    line = view.line(plain=True).plain
    assert "|#.......|" in line
    assert "paused" in line
    assert "waiting 1" in line


def test_view_is_complete_only_when_every_block_is_at_the_end() -> None:
    view = ProgressView(8)
    assert not view.complete
    end = replace(BLOCK, idstr="other", state="END")
    view.update(replace(REPORT, blocks=(BLOCK, end)), lambda block: bitmap())
    assert not view.complete
    view.update(replace(REPORT, blocks=(end,)), lambda block: bitmap())
    assert view.complete


def test_hundred_per_cent_is_said_only_when_it_is() -> None:
    assert percent_text(1 - 1e-9) == "99 %"
    assert percent_text(1.0) == "100 %"


def test_bytes_in_never_exceed_the_length_of_the_source() -> None:
    assert bytes_in(BLOCK) == 32 * 4096
    assert bytes_in(replace(BLOCK, received_pages=64)) == BLOCK.used_length


def test_status_report_raises_the_alarm_of_foreign_pages_and_says_why_a_block_is_paused() -> None:
    block = replace(BLOCK, foreign_pages=3, state="PAUSED", reason="EIO at byte 4096")
    text = drawn(status_report(replace(REPORT, blocks=(block,), state="PAUSED"), lambda _: bitmap(1)))
    assert "3 foreign pages" in text
    assert "data: EIO at byte 4096" in text
    assert "PAUSED" in text
    assert "4711" in text


@pytest.mark.parametrize(
    ("change", "word"), [({"alive": False}, "dead"), ({"stopped": True}, "stopped by a signal"), ({}, "RUNNING")]
)
def test_heading_says_what_became_of_the_process(change: dict[str, bool], word: str) -> None:
    heading = drawn(status_report(replace(REPORT, **change), lambda _: bitmap())).splitlines()[0]  # type: ignore[arg-type]
    assert word in heading
    assert "pid 99" in heading


def test_helpers_table_gives_blocktimes_with_units() -> None:
    row = drawn(helpers_table([HELPER])).splitlines()[1].split()
    assert row[:4] == ["4711", "1000", "1,234", "1"]
    assert " ".join(row[4:]) == "12.5 us 1.5 ms 2 s"


def test_list_has_a_row_for_each_coordinator_also_for_the_unreadable() -> None:
    lines = drawn(list_table([REPORT, replace(REPORT, name="old", alive=False)], {"secret": "not yours"})).splitlines()
    assert len(lines) == 4
    assert "dead" in lines[2]
    assert lines[3].startswith("secret")
    assert "not yours" in lines[3]


def test_run_summary_counts_pages_of_all_blocks() -> None:
    text = run_summary(replace(REPORT, blocks=(BLOCK, replace(BLOCK, idstr="more"))), 1.5).plain
    assert "4 pages on demand, 60 by the stream" in text
    assert "1.50 s" in text


def test_rows_of_a_picture_are_of_one_length() -> None:
    view = ProgressView(60)
    view.update(REPORT, lambda block: bitmap())
    rows = [line for line in drawn(view, width=50).splitlines() if set(line.strip()) == {"."}]
    assert [len(row.strip()) for row in rows] == [30, 30]


def test_bitmap_of_a_complete_block_is_not_read_again() -> None:
    reads = []

    def read(block: BlockStatus) -> bytes:
        reads.append(block.idstr)
        return bitmap()

    end = replace(REPORT, blocks=(BLOCK, replace(BLOCK, idstr="done", state="END")))
    view = ProgressView(8)
    for _ in range(3):
        view.update(end, read)
    assert reads.count("done") == 1
    assert reads.count("data") == 3


def test_empty_block_has_an_empty_picture() -> None:
    empty = replace(BLOCK, used_length=0, page_count=0, received_pages=0, state="END")
    view = ProgressView(8)
    view.update(replace(REPORT, blocks=(empty,)), lambda block: b"")
    assert "100 %" in drawn(view)
    assert "||" in view.line(plain=True).plain
