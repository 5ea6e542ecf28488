"""status: `pcshare status [NAME]`: what a coordinator does, read from its status segment without asking it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pcshare import errors, runtime
from pcshare.cli.options import NAME, json_option, name_of_socket, print_json, socket_option

if TYPE_CHECKING:
    from pcshare.status import StatusReport


@click.command(name="status")
@click.argument("name", type=NAME, required=False)
@socket_option
@json_option
def command(name: str | None, socket_path: str | None, as_json: bool) -> int:
    """Say what the coordinator NAME does; without NAME list all of them.

    Reads shared memory and asks nobody, so it also tells of a coordinator that is stopped or dead. The exit code is 0
    only if the process that serves NAME lives (also if stopped by a signal) and its socket listens; 1 if it is dead,
    or if there is none of that name.

    \b
    Examples:
      pcshare status
      pcshare status weights
      pcshare status weights --json | jq .blocks[].received_pages
      pcshare status --socket /run/pcshare/weights.sock
    """
    if socket_path is not None:
        name = name_of_socket(socket_path, name)
        if not Path(socket_path).is_socket():
            raise errors.NoSuchCoordinator(f"nobody listens on {socket_path}", hint=errors.NoSuchCoordinator.usual_hint)
    return _list_all(as_json) if name is None else _tell_one(name, as_json)


def trouble_of(report: StatusReport) -> errors.PcshareError | None:
    """Why this coordinator does not serve; None if it does."""
    if report.alive:
        return None
    if report.restarting:
        return errors.CoordinatorGone(
            f"coordinator {report.name!r} (pid {report.pid}) was killed, and its keeper (pid {report.keeper_pid}) "
            "starts it again; faults wait meanwhile",
            hint="if it stays so: what the keeper writes to its stderr says why",
        )
    return errors.CoordinatorGone(
        f"coordinator {report.name!r} (pid {report.pid}) is dead and left its status behind",
        hint="the next start under that name clears it away, with --replace if helpers of it still live",
    )


def _tell_one(name: str, as_json: bool) -> int:
    from pcshare.status import StatusReader

    with StatusReader(name) as reader:
        report = reader.report()
        trouble = trouble_of(report)
        if as_json:
            print_json({**report.to_json(), **_told(trouble)})
        else:
            from rich.console import Console

            from pcshare.views.report import status_report

            Console().print(status_report(report, reader.bitmap))
    if trouble is None:
        return errors.EXIT_DONE
    click.echo(f"pcshare: {trouble.message}\n  {trouble.hint}", err=True)
    return errors.EXIT_FAILED


def _told(trouble: errors.PcshareError | None) -> dict[str, Any]:
    return {} if trouble is None else {"error": trouble.message, "hint": trouble.hint, "errno": trouble.errno}


def _list_all(as_json: bool) -> int:
    """Exit code 0: the list itself was not refused."""
    from pcshare.status import read_status

    reports: dict[str, StatusReport] = {}
    troubles: dict[str, str] = {}
    for name in runtime.names():
        try:
            reports[name] = read_status(name)
        except errors.NoSuchCoordinator:  # ended while we looked
            continue
        except errors.PcshareError as error:
            troubles[name] = error.message
    if as_json:
        print_json({"coordinators": [report.to_json() for report in reports.values()], "unreadable": troubles})
    else:
        _print_list(reports, troubles)
    return errors.EXIT_DONE


def _print_list(reports: dict[str, StatusReport], troubles: dict[str, str]) -> None:
    from rich.console import Console

    from pcshare.views.report import list_table

    if reports or troubles:
        Console().print(list_table(reports.values(), troubles))
    else:
        click.echo("no coordinator is running")
