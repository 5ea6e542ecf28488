"""report: what `pcshare status` and the end of `pcshare run` print for people.

Tables from a StatusReport and nothing else: no file, no socket, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pcshare import units
from pcshare.views.progress import PICTURE_COLUMNS_MAX, ProgressView, bytes_in, percent_text

if TYPE_CHECKING:
    from pcshare.status import BlockStatus, Blocktime, HelperStatus, StatusReport

STATE_STYLES = {"RUNNING": "green", "END": "bold green", "PAUSED": "bold red"}
FOREIGN = "somebody put them there outside the protocol"
PICTURE_CELLS = 2 * PICTURE_COLUMNS_MAX  # two rows: it stands still


def state_text(state: str) -> Text:
    return Text(state, style=STATE_STYLES.get(state, "yellow"))


def status_report(report: StatusReport, bitmap_of: Callable[[BlockStatus], bytes]) -> RenderableType:
    """One coordinator: a heading, its blocks with their pictures, its helpers."""
    view = ProgressView(PICTURE_CELLS)
    view.update(report, bitmap_of)
    parts: list[RenderableType] = [_heading(report), view]
    if report.reason and not any(block.reason for block in report.blocks):
        parts.append(Text(report.reason, style="yellow"))
    parts += [Text(f"{block.idstr}: {block.reason}", style="red") for block in report.blocks if block.reason]
    alarms = [block for block in report.blocks if block.foreign_pages]
    parts += [
        Text(f"{block.idstr}: {block.foreign_pages:,} foreign pages: {FOREIGN}", style="bold red") for block in alarms
    ]
    parts.append(helpers_table(report.helpers) if report.helpers else Text("no helpers", style="dim"))
    return Group(*parts)


def life_text(report: StatusReport) -> Text:
    """The state, or what has become of the process."""
    if not report.alive:
        return Text("restarting" if report.restarting else "dead", style="bold red")
    return Text("stopped by a signal", style="bold red") if report.stopped else state_text(report.state)


def _heading(report: StatusReport) -> Text:
    text = Text.assemble((report.name, "bold"), "  ", life_text(report), f"  pid {report.pid}")
    text.append(f"  stream {report.stream}", style="dim")
    if report.stream == "rate":
        text.append(f" {units.format_rate(report.stream_rate)}", style="dim")
    if report.source is not None:
        text.append(f"  from a machine {report.source.machine}", style="dim")
    return text


def helpers_table(helpers: Iterable[HelperStatus]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("helper", "uid", "faults", "waiting", "p50", "p99", "max"):
        table.add_column(column, justify="right", no_wrap=True)
    for helper in helpers:
        table.add_row(
            f"exporter {helper.pid}" if helper.exporter else str(helper.pid),
            str(helper.uid),
            f"{helper.faults:,}",
            str(helper.waiting),
            *_blocktime_cells(helper.blocktime),
        )
    return table


def _blocktime_cells(blocktime: Blocktime) -> list[str]:
    return [units.format_us(us) for us in (blocktime.p50, blocktime.p99, blocktime.max)]


def list_table(reports: Iterable[StatusReport], troubles: Mapping[str, str]) -> Table:
    """All coordinators, a row each. troubles: those whose status cannot be read, and why."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("name", "state", "pid", "blocks", "here", "helpers", ""):
        table.add_column(column, no_wrap=bool(column))
    for report in reports:
        counts = (str(len(report.blocks)), _here(report), str(len(report.helpers)))
        table.add_row(report.name, life_text(report), str(report.pid), *counts, Text(report.reason, style="red"))
    for name, trouble in troubles.items():
        table.add_row(name, "", "", "", "", "", Text(trouble, style="red"))
    return table


def _here(report: StatusReport) -> str:
    whole = sum(block.used_length for block in report.blocks)
    here = sum(bytes_in(block) for block in report.blocks)
    return f"{units.format_bytes(here)} of {units.format_bytes(whole)}"


def run_summary(report: StatusReport, total_s: float) -> Text:
    """The last line of `pcshare run`."""
    parts = [
        f"{block.idstr} {percent_text(block.fraction)} ({units.format_bytes(bytes_in(block))})"
        for block in report.blocks
    ]
    demand = sum(block.demand_pages for block in report.blocks)
    stream = sum(block.stream_pages for block in report.blocks)
    return Text(
        f"pcshare: {', '.join(parts)} in {total_s:.2f} s; {demand:,} pages on demand, {stream:,} by the stream",
        style="dim",
    )
