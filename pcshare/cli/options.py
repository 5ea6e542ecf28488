"""options: what several subcommands say in the same words: options, how their values are read, and how JSON is printed.

It must not act on anything, and imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pcshare import errors, runtime, units

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

if TYPE_CHECKING:
    from pcshare.account import Account

    _ParamType = click.ParamType[Any]
else:  # generic for type checkers only, and in older versions of click not even there
    _ParamType = click.ParamType

# As STATUS_STREAM_* in core/status_segment.h, without loading the core; a test compares them.
STREAM_MODES = {"eager": 0, "lazy": 1, "rate": 2, "paused": 3}

PAGE_SIZES = (4 << 10, 2 << 20)
PAGE_SIZE_AUTO = 0  # as in coordinator/options.py, without loading it; a test compares them
READ_AHEAD_MIN, READ_AHEAD_MAX = 4 << 10, 64 << 20  # more is an eager stream
FAULT_THREADS_MAX = 64  # as in core/fault_thread.h


class _Parsed(_ParamType):
    """An option's value read by a function; what the function refuses is wrong usage."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except errors.UsageError as error:
            self.fail(str(error), param, ctx)


def parse_stream(text: str) -> tuple[int, int]:
    """What --stream says (eager, lazy, paused, or a rate such as 200M): STATUS_STREAM_*, and bytes a second or 0."""
    if text in ("eager", "lazy", "paused"):
        return STREAM_MODES[text], 0
    try:
        rate = units.parse_rate(text)
    except errors.UsageError:
        raise errors.UsageError(
            f"not a way to stream: {text!r}", hint="use eager, lazy, paused, or a rate in bytes a second such as 200M"
        ) from None
    return STREAM_MODES["rate"], rate


def parse_page_size(text: str) -> int:
    """Bytes; PAGE_SIZE_AUTO for auto."""
    if text == "auto":
        return PAGE_SIZE_AUTO
    size = units.parse_size(text)
    if size not in PAGE_SIZES:
        raise errors.UsageError(f"page size {text!r} is not offered", hint="use 4K, 2M for huge pages, or auto")
    return size


def parse_read_ahead(text: str) -> int:
    """What --read-ahead says: bytes, or 0 for off."""
    try:
        size = 0 if text == "off" else units.parse_size(text)
    except errors.UsageError:
        size = -1
    if size and not READ_AHEAD_MIN <= size <= READ_AHEAD_MAX:
        raise errors.UsageError(f"not a length to read ahead: {text!r}", hint="use 4K to 64M, or off (0) for none")
    return size


def _parse_user(text: str) -> Account:
    from pcshare.account import parse_account

    return parse_account(text)


STREAM = _Parsed("stream", parse_stream)
RATE = _Parsed("rate", units.parse_rate)
SIZE = _Parsed("size", units.parse_size)
PAGE_SIZE = _Parsed("size", parse_page_size)
READ_AHEAD = _Parsed("size", parse_read_ahead)
DURATION = _Parsed("duration", units.parse_duration)
NAME = _Parsed("name", runtime.check_name)
USER = _Parsed("user", _parse_user)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, the last line of stdout.")
socket_option = click.option(
    "--socket", "socket_path", metavar="PATH", help="Control socket of a coordinator that runs for another user."
)

_SERVING = (
    click.option(
        "--stream",
        type=STREAM,
        default=None,
        metavar="eager|lazy|paused|RATE",
        help="How pages nobody asked for come: at once, never, not before `pcshare stream` says so, or so fast.  "
        "[default: eager; lazy where a first working set is recorded]",
    ),
    click.option(
        "--record",
        metavar="FILE",
        help="Write down which pages are touched first, in that order. Only what is waited for can be seen: without "
        "--stream, and with nothing to replay, the stream is lazy.",
    ),
    click.option(
        "--replay",
        metavar="FILE",
        help="Bring first what was recorded there, in every mode of the stream. With --record of the same FILE the "
        "first start records, and later ones replay and add to it.",
    ),
    click.option(
        "--page-size",
        type=PAGE_SIZE,
        default="4K",
        show_default=True,
        metavar="4K|2M|auto",
        help="Pages of the blocks; 2M: huge pages; auto: huge pages if enough are reserved for all blocks.",
    ),
    click.option("--writable", multiple=True, metavar="BLOCK", help="Let helpers write this block. Can be repeated."),
    click.option(
        "--on-source-loss",
        type=click.Choice(["pause", "poison"]),
        default="pause",
        show_default=True,
        help="A page whose source failed for good: its readers wait and the block is paused, or a touch is SIGBUS.",
    ),
    click.option(
        "--source-timeout",
        type=DURATION,
        default="30s",
        show_default=True,
        metavar="TIME",
        help="With --on-source-loss poison: how long a server may be away before what is missing is lost.",
    ),
    click.option("--allow-uid", multiple=True, type=int, metavar="UID", help="Who else may attach. Can be repeated."),
    click.option(
        "--allow-gid", multiple=True, type=int, metavar="GID", help="Groups that may attach. Can be repeated."
    ),
    click.option(
        "--fault-threads",
        type=click.IntRange(1, FAULT_THREADS_MAX),
        default=None,
        metavar="N",
        help="How many fault threads; several are pinned to a CPU each.",
    ),
    click.option(
        "--orphan-timeout",
        type=DURATION,
        default=None,
        metavar="TIME",
        help="How long helpers wait for a coordinator that went away; 0: for ever.",
    ),
    click.option(
        "--device-state",
        metavar="FILE",
        help="Of an incoming migration: keep what it says of the machine's devices, as it came.",
    ),
    click.option(
        "--notifier-timeout",
        type=DURATION,
        default="10s",
        show_default=True,
        metavar="TIME",
        help="How long an answer to PROBE is waited for.",
    ),
    click.option(
        "--fault-timeout",
        type=DURATION,
        default="0",
        show_default=True,
        metavar="TIME",
        help="How long a page that somebody waits for may take before the block is paused or, with --on-source-loss "
        "poison, the page is lost; 0: for ever.",
    ),
    click.option(
        "--read-ahead",
        type=READ_AHEAD,
        default="1M",
        show_default=True,
        metavar="SIZE|off",
        help="How far a thread that reads on is kept ahead of at most; off or 0: a fault brings its page alone.",
    ),
    click.option(
        "--strict",
        is_flag=True,
        help="Look at each page before a helper reads it: finds foreign pages in time, costs a fault for each page.",
    ),
)


def coordinator_options(function: Decorated) -> Decorated:
    """The options of whoever starts a coordinator: stream, record, replay, page_size, writable, on_source_loss,
    source_timeout (s), allow_uid, allow_gid, fault_threads, orphan_timeout (s), device_state, notifier_timeout (s),
    fault_timeout (s), read_ahead (bytes), strict."""
    for option in reversed(_SERVING):
        function = option(function)
    return function


def print_json(told: Mapping[str, Any]) -> None:
    """One object on one line."""
    click.echo(json.dumps(told))


def operator_socket(name: str, socket_path: str | None) -> str:
    """Where orders for that coordinator go: the named socket, else the one found for the name."""
    if socket_path is not None:
        name_of_socket(socket_path, name)
        return socket_path
    found = runtime.find_socket(name)
    if found is None:
        raise errors.NoSuchCoordinator(f"no coordinator {name!r} is running", hint=errors.NoSuchCoordinator.usual_hint)
    return str(found)


def name_of_socket(socket_path: str, name: str | None) -> str:
    """A socket is called after its coordinator. UsageError: it is called otherwise, or after another one than name."""
    path = Path(socket_path)
    if path.suffix != runtime.SOCKET_SUFFIX or name not in (None, path.stem):
        wanted = f"{name or 'NAME'}{runtime.SOCKET_SUFFIX}"
        raise click.UsageError(f"--socket {socket_path} does not end with /{wanted}, as a coordinator's socket does")
    return runtime.check_name(path.stem)
