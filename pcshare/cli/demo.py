"""demo: `pcshare demo`: the main job as a show, judged.

Here are the options and the exit code; what happens is pcshare.demo's.
"""

from __future__ import annotations

from pathlib import Path

import click

from pcshare import units
from pcshare.cli.options import DURATION, RATE, SIZE, json_option, print_json
from pcshare.errors import EXIT_DONE, EXIT_FAILED
from pcshare.signals import ending_signals_raise

SIZE_DEFAULT = "48M"
ARRIVAL_DEFAULT = "3s"
DELAY_DEFAULT = "1ms"


@click.command(name="demo")
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The file to work on.  [default: one packed from this interpreter's library]",
)
@click.option(
    "--size", type=SIZE, default=SIZE_DEFAULT, show_default=True, metavar="SIZE", help="Of the file that is made."
)
@click.option(
    "--seconds",
    "arrival",
    type=DURATION,
    default=ARRIVAL_DEFAULT,
    show_default=True,
    metavar="TIME",
    help="How long the file shall take to arrive; the whole show takes about three times as long.",
)
@click.option("--rate", type=RATE, metavar="RATE", help="Bytes a second of the slow source, instead of --seconds.")
@click.option(
    "--delay", type=DURATION, default=DELAY_DEFAULT, show_default=True, metavar="TIME", help="Delay of each request."
)
@json_option
def command(source: Path | None, size: int, arrival: float, rate: int | None, delay: float, as_json: bool) -> int:
    """Show helpers computing on memory that has not arrived.

    A coordinator serves a file through a slow source. Helpers start at once: a scan, random look-ups, numpy, a writer
    and a reader on a second block, a forking pool, plain C, one that writes before pages arrive, and one that may not
    write. Each result is compared with the one computed from the file itself. Then the same is done with everything
    copied first, for comparison. Exit status 0 only if every result was right and nothing stayed behind.

    \b
    Examples:
      pcshare demo
      pcshare demo --source big.npy --rate 100M --delay 2ms
      pcshare demo --json | jq '.time_to_first_result_s, .copy_first_s'
    """
    from pcshare.demo import show
    from pcshare.demo.play import Options, Play
    from pcshare.demo.source import MADE_BYTES_MIN

    if rate is None and arrival <= 0:
        raise click.UsageError("--seconds must be more than 0")
    if source is None and size < MADE_BYTES_MIN:
        raise click.UsageError(f"--size must be {units.format_bytes(MADE_BYTES_MIN)} or more")
    console = show.console_for(stderr=as_json)
    with ending_signals_raise(), show.Stagehand(console) as stagehand:
        outcome = Play(Options(source, size, delay, rate, arrival), stagehand).run()
    show.print_outcome(console, outcome)
    if as_json:
        print_json(show.to_json(outcome))
    return EXIT_DONE if outcome.ok else EXIT_FAILED
