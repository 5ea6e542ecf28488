"""doctor: looks at this host, or at sources, and says what works, for whom, and what mends what does not.

Changes nothing. The looking and judging are probe's and those of the sources; here is only how it is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pcshare import units
from pcshare.cli.options import json_option, print_json
from pcshare.errors import EXIT_DONE, EXIT_HOST, HostError, PcshareError, SourceError

if TYPE_CHECKING:
    from rich.console import Console

    from pcshare.probe import Finding, HostReport
    from pcshare.sources import SourceReport, SourceSpec

STYLES = {"ok": "green", "warn": "yellow", "bad": "red"}


@click.command("doctor")
@click.argument("sources", metavar="[SOURCE]...", nargs=-1)
@json_option
def command(sources: tuple[str, ...], as_json: bool) -> int:
    """Check what this host offers, and for whom; or what sources offer.

    Looks at the kernel, /dev/userfaultfd, sysctl, capabilities, seccomp, huge pages and limits, and tries userfaultfd
    in every way there is. Each finding that is not ok comes with the command that mends it.

    With SOURCEs it looks at these instead: whether each can be reached, how large it is, what its server offers, how
    long a page takes and how fast the rest would come. It reads for about a second.

    Exit status: 0 the main job works for this user here, or every source can be read; 1 a source cannot; 3 the main job
    does not work, or this host lacks what a source needs.

    \b
    Examples:
      pcshare doctor
      sudo pcshare doctor
      pcshare doctor nbd://store/weights
      pcshare doctor --json | jq -r '.findings[] | select(.state != "ok") | .mend'
    """
    return _examine_sources(sources, as_json) if sources else _examine_host(as_json)


# -- sources


def _examine_sources(texts: tuple[str, ...], as_json: bool) -> int:
    from rich.console import Console

    from pcshare.sources import parse_argument, shown

    console = Console(highlight=False, emoji=False)
    told: list[dict[str, Any]] = []
    status = EXIT_DONE
    for spec in [parse_argument(text) for text in texts]:
        report = _examine_source(spec)
        if isinstance(report, PcshareError):
            status = max(status, report.exit_status)
            told.append({"source": shown(spec.text), "ok": False, "error": report.message, "hint": report.hint})
        else:
            told.append({"ok": True, **report.to_json()})
        if not as_json:
            _show_source(console, shown(spec.text), report)
    if as_json:
        print_json({"ok": all(one["ok"] for one in told), "sources": told})
    return status


def _examine_source(spec: SourceSpec) -> SourceReport | PcshareError:
    from pcshare.sources import examine_source, open_source

    try:
        with open_source(spec) as source:
            return examine_source(source)
    except (SourceError, HostError) as error:
        return error


def _show_source(console: Console, text: str, report: SourceReport | PcshareError) -> None:
    from rich.table import Table
    from rich.text import Text

    failed = isinstance(report, PcshareError)
    verdict = Text("bad " if failed else "ok  ", style=STYLES["bad" if failed else "ok"])
    console.print(Text.assemble(verdict, text), soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    if isinstance(report, PcshareError):
        console.print(f"    {report}", markup=False, soft_wrap=True)
        return
    for what, found in _lines_of(report):
        table.add_row("", what, Text(found))
    console.print(table)


def _lines_of(report: SourceReport) -> list[tuple[str, str]]:
    """What is said of a source, line by line."""
    size = f"{report.used_length} bytes ({units.format_bytes(report.used_length)})"
    holes = report.used_length - report.data_length
    lines = [("size", size), ("holes", units.format_bytes(holes) if holes else "none known")]
    if report.array is not None:
        lines.append(("array", f"{report.array.dtype} {report.array.shape}"))
    lines += [(what, str(found)) for what, found in report.facts.items()]
    median, most = units.format_us(report.round_trip_us), units.format_us(report.round_trip_us_max)
    lines.append(("a page takes", f"{median} at the median, {most} at most"))
    if report.throughput:
        lines.append(("the rest comes at", units.format_rate(report.throughput)))
    return lines


# -- this host


def _examine_host(as_json: bool) -> int:
    from pcshare import probe

    report = probe.examine_host()
    findings = probe.judge(report)
    works = all(finding.state != probe.BAD for finding in findings)
    if as_json:
        told = {"ok": works, "access": probe.access(report), "findings": [finding.to_json() for finding in findings]}
        print_json({**told, "host": report.to_json()})
    else:
        _show(report, findings, works)
    return EXIT_DONE if works else EXIT_HOST


def _show(report: HostReport, findings: list[Finding], works: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pcshare import probe

    console = Console(highlight=False, emoji=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "for whom", "finding"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        state = Text(finding.state, style=STYLES[finding.state])
        table.add_row(state, finding.what, finding.for_whom, Text(finding.found))
    console.print(table)
    console.print("\nFaults on missing pages are served for")
    for who, reach in probe.access(report).items():
        console.print(f"  {who.replace('_', ' ')}: {probe.REACH_TEXT[reach]}", markup=False, soft_wrap=True)
    # Below the table and unwrapped, so that a command can be copied whole.
    mends = [finding for finding in findings if finding.mend]
    if mends:
        console.print("\nTo mend")
    for finding in mends:
        console.print(f"  {finding.what}: {finding.mend}", markup=False, soft_wrap=True)
    verdict = "The main job works for this user here." if works else "The main job does not work for this user here."
    console.print(f"\n{verdict}", style=STYLES["ok" if works else "bad"])
