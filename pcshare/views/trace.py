"""trace: prints what `pcshare coordinator --trace FILE` wrote: `python -m pcshare.views.trace FILE`.

One line a step, oldest first: seconds since the first, thread, step, block, subject, page, detail. With --json one
object a line.
"""

from __future__ import annotations

import dataclasses
import json

import click

from pcshare.errors import PcshareError
from pcshare.trace import read_trace


@click.command()
@click.argument("path", metavar="FILE", type=click.Path(exists=True, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def command(path: str, as_json: bool) -> None:
    """Print the steps that a coordinator traced to FILE."""
    first_ns = None
    try:
        for record in read_trace(path):
            first_ns = record.time_ns if first_ns is None else first_ns
            if as_json:
                click.echo(json.dumps(dataclasses.asdict(record)))
            else:
                click.echo(
                    f"{(record.time_ns - first_ns) / 1e9:12.6f} {record.tid:7d} {record.event:<15} "
                    f"block {record.block_index} subject {record.subject:#x} page {record.page} detail {record.detail}"
                )
    except PcshareError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    command()
