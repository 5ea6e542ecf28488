"""serve: `pcshare serve`: files over NBD, in the foreground until SIGINT or SIGTERM, or for one client on stdio.

Needs no coordinator and no userfaultfd: what it gives out is a source for coordinators, here or on other hosts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from pcshare import errors
from pcshare.cli.options import json_option, print_json
from pcshare.signals import ending_signals_raise, stop_signals

if TYPE_CHECKING:
    from pcshare.nbd.address import Listening
    from pcshare.nbd.server import Exports


@click.command()
@click.argument("files", metavar="[NAME=]FILE...", nargs=-1, required=True)
@click.option("--socket", "socket_path", metavar="PATH", help="Listen on a Unix socket, for this user alone.")
@click.option("--listen", metavar="HOST:PORT", help="Listen on a port; :PORT: for this host alone.")
@click.option("--stdio", is_flag=True, help="Serve one client on standard input and output.")
@json_option
def command(files: Sequence[str], socket_path: str | None, listen: str | None, stdio: bool, as_json: bool) -> int:
    """Give files out over NBD, read-only, each as an export under its NAME.

    NAME is the file's name without its last suffix, unless given. The empty export name means the only file. There is
    no encryption and no password: whoever can connect can read, so let it listen on a Unix socket or on this host
    alone, and go through ssh from elsewhere.

    \b
    Examples:
      pcshare serve big.npy --socket ./big.sock
      pcshare serve weights=/data/weights.bin index=/data/index.bin --listen :10809
      ssh store pcshare serve --stdio /data/weights.bin

    With --json one JSON object is printed when clients can connect. SIGINT and SIGTERM end it.
    """
    if sum((socket_path is not None, listen is not None, stdio)) != 1:
        raise click.UsageError("say where to listen, once: --socket PATH, --listen HOST:PORT, or --stdio")
    if stdio and as_json:
        raise click.UsageError("--stdio and --json both want standard output")
    if socket_path is not None and "/" not in socket_path:
        socket_path = f"./{socket_path}"
    logging.basicConfig(level=logging.WARNING, format="pcshare: %(message)s")
    return _serve(files, socket_path or listen, as_json)


def _serve(files: Sequence[str], address: str | None, as_json: bool) -> int:
    """address None: on standard input and output."""
    from pcshare.nbd.address import Listening, parse_address
    from pcshare.nbd.server import Server, stdio_stream

    with contextlib.ExitStack() as closing:
        closing.enter_context(ending_signals_raise())  # before there is a server to stop, and after
        exports = _exports(files)
        closing.callback(exports.close)
        listening = None if address is None else closing.enter_context(Listening(parse_address(address)))
        server = closing.enter_context(Server(exports, listening.sockets if listening else ()))
        closing.enter_context(stop_signals(server))
        if listening is None:
            server.adopt(stdio_stream())
        else:
            _say_ready(exports, listening, as_json)
        server.run()
    return 0


def _exports(files: Sequence[str]) -> Exports:
    """A FileExport for each argument, or none at all."""
    from pcshare.nbd.server import Exports
    from pcshare.serve.files import FileExport
    from pcshare.sources.grammar import BLOCK_NAME, block_name_of

    opened: dict[str, FileExport] = {}
    try:
        for argument in files:
            name, equals, path = argument.partition("=")
            if not equals or not BLOCK_NAME.fullmatch(name):
                name, path = block_name_of(argument), argument
            if name in opened:
                raise errors.UsageError(
                    f"two files are to be called {name!r}", hint="give each a name of its own: NAME=FILE"
                )
            opened[name] = FileExport(name, path)
    except BaseException:
        for export in opened.values():
            export.close()
        raise
    return Exports(opened.values())


def _say_ready(exports: Exports, listening: Listening, as_json: bool) -> None:
    if as_json:
        told = [{"name": one.name, "size": one.size, "uris": listening.uris(one.name)} for one in exports.all()]
        print_json({"event": "ready", "pid": os.getpid(), "addresses": listening.addresses, "exports": told})
        sys.stdout.flush()
    elif sys.stderr.isatty():
        for one in exports.all():
            click.echo(f"pcshare: serves {' and '.join(listening.uris(one.name))}", err=True)
        click.echo("pcshare: Ctrl-C ends it", err=True)
