"""resume: `pcshare resume NAME`."""

from __future__ import annotations

import click

from pcshare.cli.options import NAME, json_option, operator_socket, print_json, socket_option


@click.command(name="resume")
@click.argument("name", type=NAME)
@socket_option
@json_option
def command(name: str, socket_path: str | None, as_json: bool) -> None:
    """Ask the source of the coordinator NAME again, after it failed.

    With --on-source-loss pause a block whose source fails for good is paused, and who waits for its pages goes on
    waiting. Once the source is well again, this asks for what is missing; nothing that was received is asked for
    twice.

    \b
    Examples:
      pcshare status weights     # PAUSED, and why
      pcshare resume weights
    """
    from pcshare import admin
    from pcshare.protocol import AdminOp

    admin.send(operator_socket(name, socket_path), AdminOp.RESUME)
    if as_json:
        print_json({"name": name, "resumed": True})
