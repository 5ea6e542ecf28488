"""bench: `pcshare bench`: how fast pcshare is here, as ratios against limits and peers of the same run.

Here are the options and the exit code; what is measured, and how, is pcshare.bench's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pcshare.cli.options import json_option, print_json
from pcshare.errors import EXIT_DONE, EXIT_FAILED, UsageError
from pcshare.signals import ending_signals_raise

if TYPE_CHECKING:
    from pcshare.bench.run import Outcome

FILE_COLUMNS = 160  # of a table that goes to a file or a pipe: a terminal says how many it has

# As in pcshare.bench.run, which is imported late; a test compares them.
NAMES = ("fault", "demand", "fill", "scan", "scale", "after", "peers")


@click.command("bench")
@click.argument("names", metavar="[NAME]...", nargs=-1, type=click.Choice(NAMES))
@click.option("--rounds", type=click.IntRange(1, 1000), help="Runs of each rival.  [default: 7; 5 with --check]")
@click.option("--check", is_flag=True, help="The short form: what must hold, in at most ten minutes on two CPUs.")
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where source files are made; some gigabytes.  [default: /tmp, or /var/tmp where that is in memory]",
)
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Write tables and plots there (extra plots).",
)
@click.option(
    "--from",
    "measured",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Measure nothing: with --report, make tables and plots of the figures.json of an earlier run.",
)
@json_option
def command(
    names: tuple[str, ...],
    rounds: int | None,
    check: bool,
    folder: Path | None,
    report: Path | None,
    measured: Path | None,
    as_json: bool,
) -> int:
    """Measure how fast pcshare is here.

    Every figure is a ratio: against the smallest program that does the work at all, or against another tool, measured
    in the same run and in turns. NAMEs choose what is measured, all without any:

    \b
      fault    one fault, its page at hand, beside the smallest server
      demand   one fault, its page at a server, without and beside the stream
      fill     a whole block, beside one process that does nothing but copy
      scan     one helper that reads a cold block in order
      scale    cost of a fault as size, helpers and blocks grow
      after    a complete block, an idle coordinator, a second start with a working set
      peers    the same work by nbdfuse and by QEMU

    A figure means something only where nothing else runs. Memory is touched before, some gigabytes of it.

    Exit status: 0 done; 1 with --check where a ratio lies beyond its limit in the whole interval over the runs; 3 a
    tool or huge pages that are needed are missing.

    \b
    Examples:
      pcshare bench fault
      pcshare bench --check --json
      pcshare bench --rounds 11 --report docs/performance
      pcshare bench --from docs/performance/figures.json --report docs/performance
    """
    if report is not None:
        from pcshare.bench.report import need_plots

        need_plots()
    if measured is not None:
        return _draw_again(measured, report)
    from pcshare.bench.run import NAMES as ALL
    from pcshare.bench.run import ROUNDS_CHECK, ROUNDS_DEFAULT, run

    chosen = [name for name in ALL if not names or name in names]
    with ending_signals_raise():
        outcome = run(
            chosen,
            rounds or (ROUNDS_CHECK if check else ROUNDS_DEFAULT),
            folder,
            lambda line: click.echo(f"pcshare: {line}", err=True),
            only_check=check,
        )
    _tell(outcome, chosen, as_json)
    if report is not None:
        _write(outcome.to_json(), report)
    return _verdict(outcome) if check else EXIT_DONE


def _draw_again(measured: Path, report: Path | None) -> int:
    if report is None:
        raise UsageError("--from needs --report, the folder for what is made of it")
    try:
        document = json.loads(measured.read_text())
    except ValueError as error:
        raise UsageError(f"{measured} is no figures.json of a run: it is no JSON ({error})") from error
    try:
        _write(document, report)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{measured} is no figures.json of a run: what a run measured is not in it") from error
    return EXIT_DONE


def _write(document: Mapping[str, Any], report: Path) -> None:
    from pcshare.bench.report import write

    for path in write(document, report):
        click.echo(f"pcshare: wrote {path}", err=True)


def _tell(outcome: Outcome, chosen: list[str], as_json: bool) -> None:
    from rich.console import Console

    from pcshare.bench.report import show
    from pcshare.bench.run import limits_of

    console = Console(stderr=as_json, highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(stderr=as_json, highlight=False, emoji=False, width=FILE_COLUMNS)
    show(outcome, console)
    for name in chosen:
        console.print(f"{name} does not measure: {limits_of(name)}")
    if as_json:
        print_json(outcome.to_json())


def _verdict(outcome: Outcome) -> int:
    """In one line, which rows failed the check."""
    beyond = [result.name for result in outcome.results() if result.is_beyond]
    told = f"beyond their limits: {'; '.join(beyond)}" if beyond else "no ratio lies beyond its limit"
    click.echo(f"pcshare: {told}", err=True)
    return EXIT_FAILED if beyond else EXIT_DONE
