"""stress: `pcshare stress`: random helpers, joins, leaves and kills, with every byte and every resource checked.

Here are the options and the exit code; what happens is pcshare.stress's.
"""

from __future__ import annotations

import random
import signal
from typing import TYPE_CHECKING

import click

from pcshare.cli.options import DURATION, json_option, print_json
from pcshare.errors import EXIT_DONE, EXIT_FAILED
from pcshare.signals import ending_signals_raise

if TYPE_CHECKING:
    from pcshare.stress.run import Summary

HELPERS_MAX = 16  # as plan.SLOTS_MAX: each writer has a place of its own in a page
SEED_MAX = 1 << 32


@click.command(name="stress")
@click.option(
    "--seconds", type=DURATION, default="30s", show_default=True, metavar="TIME", help="How long; the last round ends."
)
@click.option(
    "--helpers", type=click.IntRange(1, HELPERS_MAX), default=6, show_default=True, help="How many act at a time."
)
@click.option("--seed", type=click.IntRange(0, SEED_MAX), help="Repeats a sequence of actions.  [default: a new one]")
@click.option(
    "--hold", is_flag=True, help="At the first failure leave everything as it is, for a debugger, until Ctrl-C."
)
@json_option
def command(seconds: float, helpers: int, seed: int | None, hold: bool, as_json: bool) -> int:
    """Random helpers, joins, leaves and kills, with checks for leaks.

    Rounds of some seconds, each with a coordinator of its own: sources with holes, delays, limited rates and failures;
    blocks read, written and copied on write; helpers in Python and C that attach, leave and fork; a stream that is
    steered all the while. Helpers, the coordinator and servers that are a source are stopped and killed at any moment.
    Every byte that a helper reads is compared with the source, every write is looked for in the end, and what
    coordinator and keeper hold is counted before, during and after.

    A seed repeats the sequence of actions. It does not repeat their timing: to see a failure again may take several
    runs of its seed.

    \b
    Examples:
      pcshare stress --seconds 5min
      pcshare stress --seed 1234 --helpers 8
      sudo sysctl vm.nr_hugepages=64 && pcshare stress     # with huge pages too
    """
    from pcshare.stress.run import Options, run

    chosen = random.SystemRandom().randrange(SEED_MAX) if seed is None else seed
    click.echo(f"pcshare: stress with --seed {chosen} --helpers {helpers}", err=True)
    with ending_signals_raise():
        summary = run(
            Options(seconds, helpers, chosen), lambda line: click.echo(line, err=True), _wait if hold else lambda: None
        )
    _say(summary)
    if as_json:
        print_json(summary.to_json())
    return EXIT_DONE if summary.ok else EXIT_FAILED


def _wait() -> None:
    click.echo("pcshare: a failure; everything is left as it is until Ctrl-C", err=True)
    signal.pause()


def _say(summary: Summary) -> None:
    for failure in summary.tally.failures:
        click.echo(f"FAILED {failure}", err=True)
    for note, times in summary.tally.notes.items():
        click.echo(f"pcshare: {note} ({times} times)", err=True)
    told = ", ".join(f"{summary.tally.zeros[zero]:,} {zero.replace('_', ' ')}" for zero in summary.tally.must_be_zero())
    click.echo(f"pcshare: {told}", err=True)
    verdict = "no failure" if summary.ok else f"{len(summary.tally.failures)} failures"
    click.echo(f"pcshare: {verdict} in {summary.seconds:.0f} s", err=True)
