"""doctor: looks at this host and says what works, for whom, and the command that mends what does not.

Changes nothing. The looking and judging are probe's; here is only how it is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pcshare.cli.options import json_option, print_json
from pcshare.errors import EXIT_DONE, EXIT_HOST

if TYPE_CHECKING:
    from pcshare.probe import Finding, HostReport

STYLES = {"ok": "green", "warn": "yellow", "bad": "red"}


@click.command("doctor")
@json_option
def command(as_json: bool) -> int:
    """Check what this host offers, and for whom.

    Looks at the kernel, /dev/userfaultfd, sysctl, capabilities, seccomp, huge pages and limits, and tries userfaultfd
    in every way there is. Each finding that is not ok comes with the command that mends it.

    Exit status: 0 the main job works for this user here, 3 it does not.

    \b
    Examples:
      pcshare doctor
      sudo pcshare doctor
      pcshare doctor --json | jq -r '.findings[] | select(.state != "ok") | .mend'
    """
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

    console = Console(highlight=False)
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
