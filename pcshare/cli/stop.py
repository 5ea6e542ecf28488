"""stop: `pcshare stop NAME`: ends a coordinator and waits until it is gone."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from pcshare import errors
from pcshare.cli.options import DURATION, NAME, json_option, name_of_socket, operator_socket, print_json, socket_option

if TYPE_CHECKING:
    from pcshare.status import StatusReport


@click.command(name="stop")
@click.argument("name", type=NAME)
@click.option(
    "--timeout",
    type=DURATION,
    default="20s",
    show_default=True,
    metavar="TIME",
    help="How long to wait until it is gone.",
)
@socket_option
@json_option
def command(name: str, timeout: float, socket_path: str | None, as_json: bool) -> None:
    """End the coordinator NAME and wait until nothing of it is left.

    Helpers that are attached are told. Where a block is complete they keep it; else a page that has not arrived will
    not come any more. The helpers still attached are named.

    \b
    Examples:
      pcshare stop weights
      pcshare stop weights --timeout 2min
    """
    from pcshare import admin
    from pcshare.protocol import AdminOp
    from pcshare.status import await_restart

    if socket_path is not None:
        name_of_socket(socket_path, name)  # before anything is waited for
    deadline_s = time.monotonic() + timeout
    report = await_restart(name, deadline_s)
    with _process(report) as process_fd:
        admin.send(operator_socket(name, socket_path), AdminOp.STOP, timeout_s=timeout)
        gone = _wait_until_gone(process_fd, max(0.0, deadline_s - time.monotonic()))
    if not gone:
        raise errors.AttachTimeout(
            f"coordinator {name!r} (pid {report.pid}) has not ended within {timeout:g} s{_attached(name)}",
            hint=f"give it more time (--timeout), or end it hard: kill -9 {report.pid}",
        )
    if as_json:
        print_json(
            {
                "name": name,
                "pid": report.pid,
                "stopped": True,
                "helpers": _pids(report),
            }
        )
    elif pids := _pids(report):
        click.echo(f"pcshare: {name} has ended; attached until then: {_named(pids)}", err=True)


@contextlib.contextmanager
def _process(report: StatusReport) -> Iterator[int]:
    """A pidfd of who serves. Made while the status still says that it lives, so it is no reused pid."""
    from pcshare.status import read_status

    try:
        process_fd = os.pidfd_open(report.pid)
    except ProcessLookupError:
        raise _dead(report) from None
    try:
        if not read_status(report.name).alive:
            raise _dead(report)
        yield process_fd
    finally:
        os.close(process_fd)


def _dead(report: StatusReport) -> errors.NoSuchCoordinator:
    return errors.NoSuchCoordinator(
        f"coordinator {report.name!r} (pid {report.pid}) is dead already and left its status behind",
        hint="the next start under that name clears it away, with --replace if helpers of it still live",
    )


def _wait_until_gone(process_fd: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(process_fd, select.POLLIN)  # readable: the process has ended
    return bool(poller.poll(timeout_s * 1000))


def _attached(name: str) -> str:
    from pcshare.status import read_status

    try:
        report = read_status(name)
    except errors.PcshareError:
        return ""
    return f"; still attached: {_named(pids)}" if (pids := _pids(report)) else ""


def _pids(report: StatusReport) -> list[int]:
    """Of the helpers; the exporter is a part of the coordinator."""
    return sorted({helper.pid for helper in report.helpers if not helper.exporter})


def _named(pids: list[int]) -> str:
    return ", ".join(f"pid {pid}" for pid in pids)
