"""stream: `pcshare stream NAME pause|resume|rate RATE|lazy|eager`."""

from __future__ import annotations

import click

from pcshare.cli.options import NAME, RATE, json_option, operator_socket, print_json, socket_option

ACTIONS = ("pause", "resume", "rate", "lazy", "eager")


@click.command(name="stream")
@click.argument("name", type=NAME)
@click.argument("action", type=click.Choice(ACTIONS))
@click.argument("rate", type=RATE, required=False)
@socket_option
@json_option
def command(name: str, action: str, rate: int | None, socket_path: str | None, as_json: bool) -> None:
    """Steer the background stream of the coordinator NAME.

    Pages that a helper waits for always come, and come first; this says how the others do: eager (at full speed),
    lazy (never), rate RATE (bytes a second); pause stops the stream and resume lets it go on as before.

    \b
    Examples:
      pcshare stream weights pause
      pcshare stream weights resume
      pcshare stream weights rate 200M
      pcshare stream weights lazy
    """
    if (action == "rate") != (rate is not None):
        takes = "needs a" if action == "rate" else "takes no"
        raise click.UsageError(f"{action} {takes} RATE, as in: pcshare stream {name} rate 200M")
    from pcshare import admin
    from pcshare.protocol import AdminOp

    op = AdminOp[f"STREAM_{action.upper()}"]
    admin.send(operator_socket(name, socket_path), op, rate or 0)
    if as_json:
        print_json({"name": name, "stream": action, "rate": rate})
