"""cli: the command `pcshare`. One file a subcommand, each with a click command named `command`.

A file is imported when its subcommand is used and not before, so that `pcshare --help` and `pcshare status` start at
once and a host that lacks something can still be asked what it lacks. This file must know no subcommand's inside. It
turns errors into exit codes: 0 done, 1 it failed at its task, 2 wrong usage, 3 this host cannot, 130 interrupted.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from pcshare import __version__, errors

# What --help lists, without importing anything.
COMMANDS = {
    "run": "Run a command with a coordinator for as long as it lasts.",
    "coordinator": "Serve blocks until told to stop.",
    "status": "Say what a coordinator does, or list them all.",
    "stream": "Steer the background stream of a coordinator.",
    "resume": "Ask a failed source again.",
    "stop": "End a coordinator.",
    "serve": "Give files out over NBD.",
    "doctor": "Check what this host offers, and for whom.",
    "demo": "Show helpers computing on memory that has not arrived.",
    "stress": "Random helpers, joins, leaves and kills, with checks for leaks.",
    "bench": "Measure how fast it is here, beside limits and peers.",
}


class LazyGroup(click.Group):
    """A group that imports a subcommand's file when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"pcshare.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="pcshare")
def group() -> None:
    """Memory you can use before it has arrived.

    A coordinator owns blocks of memory that come from a source; helper processes attach and work at once. Pages they
    touch come first, the rest is brought in the background.

    \b
    Examples:
      pcshare run big.npy -- python job.py
      pcshare coordinator --name weights weights=/data/weights.bin
      pcshare status weights
      pcshare doctor
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = given[: given.index("--")] if "--" in given else given
    try:
        result = group.main(args=given, prog_name="pcshare", standalone_mode=False)
    except click.exceptions.Abort:
        if "--json" in own:
            click.echo(json.dumps({"error": "interrupted", "hint": None, "errno": None}))
        return errors.EXIT_INTERRUPTED
    except BrokenPipeError:  # who read our output has gone; what is still in the buffer must not fail again at exit
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return errors.EXIT_FAILED
    except (click.ClickException, errors.PcshareError, OSError) as error:
        return _report(error, as_json="--json" in own)
    return result if isinstance(result, int) else 0


def _report(error: Exception, as_json: bool) -> int:
    """The message on stderr, with --json also as the last line of stdout."""
    told = _described(error)
    if isinstance(error, click.UsageError):
        error.show(sys.stderr)  # with the usage line and where to get help
    else:
        hint = f"\n  {told['hint']}" if told["hint"] else ""
        click.echo(f"pcshare: {told['error']}{hint}", err=True)
    if as_json:
        click.echo(json.dumps(told))
    return _exit_code(error)


def _described(error: Exception) -> dict[str, Any]:
    if isinstance(error, click.ClickException):
        return {"error": error.format_message(), "hint": None, "errno": None}
    if isinstance(error, errors.PcshareError):
        return {"error": error.message, "hint": error.hint, "errno": error.errno}
    return {"error": str(error), "hint": None, "errno": getattr(error, "errno", None)}


def _exit_code(error: Exception) -> int:
    return errors.EXIT_USAGE if isinstance(error, click.UsageError) else errors.exit_code(error)
