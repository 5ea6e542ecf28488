"""coordinator: `pcshare coordinator`, in the foreground until SIGINT or SIGTERM.

Runs twice: first as what the user started, which checks the arguments and becomes the keeper by exec; then as the
keeper's child, which serves. The keeper must be the parent, and must not have inherited anybody's mappings.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pcshare import errors
from pcshare.cli import options
from pcshare.signals import stop_signals

if TYPE_CHECKING:
    from pcshare.coordinator import Options, Server
    from pcshare.coordinator.parent import ParentLink
    from pcshare.fds import OwnedFd
    from pcshare.keeper import Keeper
    from pcshare.store import FdStore, Kept

PR_SET_DUMPABLE = 4
REPLACE_TIMEOUT_S = 30.0  # from the order to the first served helper: a start takes some tenths of a second
REPLACE_LOOK_S = 0.02
DEBUG_VARIABLE = "PCSHARE_DEBUG"


@click.command()
@click.argument("sources", metavar="[BLOCK=]SOURCE...", nargs=-1)
@click.option("--name", required=True, type=options.NAME, help="What helpers attach to.")
@options.coordinator_options
@click.option(
    "--helpers-max",
    type=click.IntRange(1, 4096),
    default=1024,
    show_default=True,
    metavar="N",
    help="How many attachments at once.",
)
@click.option(
    "--replace",
    is_flag=True,
    help="Take the place of a living coordinator of that name, which no helper notices; name no SOURCE then. Of a dead "
    "one: clear what it left, although helpers of it live.",
)
@click.option(
    "--export",
    "exports",
    multiple=True,
    metavar="PATH|HOST:PORT",
    help="Give the blocks out over NBD, read-only, each under its name: on a Unix socket (a path with a /), or a port "
    "(:PORT: of this host alone). Can be repeated.",
)
@click.option(
    "--trace",
    metavar="FILE",
    help="Write the last 65,536 steps to FILE; `python -m pcshare.views.trace FILE` prints them.",
)
@click.option(
    "--user",
    type=options.USER,
    metavar="USER[:GROUP]",
    help="Started by root: become this user before anything else is started, for good.",
)
@click.option("--debug", is_flag=True, help="Stay dumpable, for debuggers and psutil of the same user, and log more.")
@click.option(
    "--no-keeper",
    is_flag=True,
    help="Be the main process, for a supervisor that starts it again: no keeper does. The supervisor keeps what must "
    "outlive us if it names a NOTIFY_SOCKET with an fd store.",
)
@click.option(
    "--helpers-per-uid",
    type=click.IntRange(1, 4096),
    default=None,
    metavar="N",
    help="How many of them one user may have; other users than your own and root: three quarters of --helpers-max "
    "unless this says otherwise.",
)
@click.option("--parent-fd", type=int, hidden=True)
@click.option("--successor", hidden=True, help="Tells the one that took the place from others.")
@options.json_option
def command(**given: Any) -> int:
    """Serve blocks until told to stop.

    Each SOURCE becomes a RAM block that helper processes attach to and use at once: pages they touch come first, a
    stream brings the rest. The command stays in the foreground; SIGINT, SIGTERM or `pcshare stop` end it.

    \b
    Examples:
      pcshare coordinator --name weights weights=/data/weights.npy
      pcshare coordinator --name job --stream lazy index=big.idx scratch=zero:1G
      pcshare coordinator --name demo 'slow=big.bin#delay=2ms&rate=200M'
      pcshare coordinator --name vm qemu+unix:/run/vm.sock
      pcshare coordinator --name weights --replace     # after an upgrade of pcshare

    With --json one JSON object is printed when the coordinator is ready.
    """
    from pcshare import keeper

    given.pop("successor")
    socket_fd = keeper.inherited_socket()
    if socket_fd is None and given["replace"] and not given["sources"]:
        return _take_place(given["name"], given["as_json"])
    if not given["sources"]:
        raise click.UsageError("Missing argument '[BLOCK=]SOURCE...'.")
    kept = _kept() if socket_fd is not None or given["no_keeper"] else {}
    parent = _link(given.pop("parent_fd"), kept, given["notifier_timeout"])
    try:
        return _run(socket_fd, kept, parent, given)
    except Exception as error:
        if parent is None:
            raise
        parent.tell_failure(error)  # who started us says it, and once
        return errors.exit_code(error)
    finally:
        if parent is not None:
            parent.close()


def _run(socket_fd: OwnedFd | None, kept: Kept, parent: ParentLink | None, given: dict[str, Any]) -> int:
    from pcshare import account, keeper
    from pcshare.coordinator import Predecessor, Server
    from pcshare.store import FdStore

    as_json, debug = given.pop("as_json"), given.pop("debug")
    chosen = _options(given)
    if socket_fd is None and given["user"] is not None:
        account.become(given["user"], [keeper.executable()])
    if socket_fd is None and chosen.keeper_restarts:
        _become_keeper(parent, debug)
        raise AssertionError("exec returned")
    _protect(debug)
    if given["user"] is not None:
        account.verify(given["user"])
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="pcshare: %(message)s")
    store = FdStore.found()
    store.know(kept)
    _inherit_device(kept, by_number=socket_fd is None or not kept)
    before = Predecessor.found(kept, store)
    server = Server(chosen, _keeper(socket_fd, kept, store), parent, store, before)
    with stop_signals(server), _ended(server):
        is_first = server.start()
        if parent is None and is_first:
            _say_ready(server, as_json)
        server.run()
    return 0


def _kept() -> Kept:
    from pcshare.store import kept_fds

    return kept_fds()


def _inherit_device(kept: Kept, *, by_number: bool) -> None:
    """What root had opened. Of a coordinator that is started again it is among what was kept: the number is somebody
    else's by now."""
    from pcshare import fds, uffd
    from pcshare.coordinator.takeover import DEVICE

    found = fds.named_uffd_device() if by_number else None
    if DEVICE in kept:
        found = found or kept.pop(DEVICE)[0]
    if found is not None:
        uffd.inherit_device(found)


def _keeper(socket_fd: OwnedFd | None, kept: Kept, store: FdStore) -> Keeper:
    """The one that is our parent; the one that a coordinator before us has spawned, if it lives; a new one."""
    from pcshare.coordinator.takeover import KEEPER
    from pcshare.keeper import Keeper

    if socket_fd is None and KEEPER in kept:
        try:
            return Keeper(kept.pop(KEEPER)[0])
        except errors.PcshareError:  # dead, and its blocks with it
            store.remove(KEEPER)
    return Keeper.spawn() if socket_fd is None else Keeper(socket_fd)


@contextlib.contextmanager
def _ended(server: Server) -> Iterator[None]:
    """Clears up at the end, also after an error; but where nobody has ordered an end all is left to the coordinator
    after this one, as if this one had been killed."""
    try:
        yield
    except BaseException as error:
        if server.is_survived:
            logging.getLogger("pcshare").critical("%s", error, exc_info=not isinstance(error, errors.PcshareError))
            os._exit(errors.exit_code(error))
        server.close()
        raise
    if server.makes_way:
        server.leave()
        os._exit(errors.EXIT_DONE)
    server.close()


def _take_place(name: str, as_json: bool) -> int:
    """Has a living coordinator make way for this program, with the options of this command line, and waits for that."""
    import secrets

    from pcshare import admin, status

    token = secrets.token_hex(8)
    before = status.await_restart(name, time.monotonic() + REPLACE_TIMEOUT_S)
    if not before.alive:
        raise errors.NoSuchCoordinator(
            f"coordinator {name!r} (pid {before.pid}) is dead: nothing goes on there",
            hint="name the sources, to start anew under that name",
        )
    admin.replace(before.socket, _program(), [*_own_options(), f"--successor={token}"])
    now = _await_successor(name, before.pid, token)
    if as_json:
        options.print_json({"event": "replaced", "name": name, "pid": now, "pid_before": before.pid})
    else:
        click.echo(f"pcshare: coordinator {name!r} is pid {now} now; it was {before.pid}", err=True)
    return errors.EXIT_DONE


def _program() -> list[str]:
    """What starts this very pcshare, up to its command."""
    from pcshare.launcher import environment_changes

    changes = [f"{variable}={value}" for variable, value in environment_changes().items()]
    return [*(["/usr/bin/env", *changes] if changes else []), sys.executable, "-P", "-m", "pcshare"]


def _own_options() -> list[str]:
    return sys.argv[sys.argv.index("coordinator") + 1 :]


def _await_successor(name: str, pid_before: int, token: str) -> int:
    """The pid of the one that serves in the place of the other."""
    from pcshare import status

    deadline_s = time.monotonic() + REPLACE_TIMEOUT_S
    while time.monotonic() < deadline_s:
        report = status.read_status(name)
        words = _command_line(report.pid) if report.pid != pid_before and report.alive else b""
        if token.encode() in words:
            return report.pid
        if words:
            raise errors.PcshareError(
                f"the new coordinator {name!r} did not come to serve; the old program (pid {report.pid}) goes on",
                hint="what it wrote to the stderr of the old one says why",
            )
        time.sleep(REPLACE_LOOK_S)
    raise errors.AttachTimeout(
        f"coordinator {name!r} was not replaced within {REPLACE_TIMEOUT_S:g} s", errno=errno.ETIMEDOUT
    )


def _command_line(pid: int) -> bytes:
    """Nothing of one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _options(given: dict[str, Any]) -> Options:
    from pcshare.coordinator import Options
    from pcshare.sources import parse_arguments

    mode, rate = given["stream"] or (None, 0)
    more = {} if given["orphan_timeout"] is None else {"orphan_timeout_s": given["orphan_timeout"]}
    return Options(
        name=given["name"],
        sources=parse_arguments(given["sources"]),
        stream_mode=mode,
        stream_rate=rate,
        page_size=given["page_size"],
        writable=frozenset(given["writable"]),
        poison=given["on_source_loss"] == "poison",
        source_timeout_s=given["source_timeout"],
        allow_uids=frozenset(given["allow_uid"]),
        allow_gids=frozenset(given["allow_gid"]),
        fault_threads=given["fault_threads"],
        helpers_max=given["helpers_max"],
        notifier_timeout_s=given["notifier_timeout"],
        replace=given["replace"],
        trace=given["trace"],
        exports=given["exports"],
        device_state=given["device_state"],
        keeper_restarts=not given["no_keeper"],
        findable=given["user"] is not None,
        fault_timeout_s=given["fault_timeout"],
        read_ahead=given["read_ahead"],
        helpers_per_uid=given["helpers_per_uid"] or 0,
        strict=given["strict"],
        record=given["record"],
        replay=given["replay"],
        **more,
    )


def _become_keeper(parent: ParentLink | None, debug: bool) -> None:
    """Becomes the keeper, which runs this same command line as its child."""
    from pcshare import keeper

    if debug:
        os.environ[DEBUG_VARIABLE] = "1"
    if parent is not None:
        os.set_inheritable(parent.fileno(), True)
    keeper.exec_under_keeper([sys.executable, "-P", "-m", "pcshare", *sys.argv[1:]])


def _protect(debug: bool) -> None:
    """Others of the same user must not reach into our memory and fds."""
    if not debug and not os.environ.get(DEBUG_VARIABLE):
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def _link(number: int | None, kept: Kept, notifier_timeout_s: float) -> ParentLink | None:
    """A coordinator that was started again finds it among what was kept: the number is somebody else's by now."""
    from pcshare.coordinator.parent import ParentLink
    from pcshare.coordinator.takeover import PARENT

    was_kept = PARENT in kept
    if was_kept:
        number = kept.pop(PARENT)[0].detach()
    return None if number is None else ParentLink(number, notifier_timeout_s, is_patient=not was_kept)


def _say_ready(server: Server, as_json: bool) -> None:
    blocks = [
        {"idstr": block.idstr, "used_length": block.ram.used_length, "writable": block.ram.writable}
        for block in server.blocks
    ]
    incoming = server.incoming.addresses if server.incoming is not None else []
    if as_json:
        options.print_json(
            {
                "event": "ready",
                "name": server.options.name,
                "pid": os.getpid(),
                "blocks": blocks,
                "exports": server.exports.addresses,
                "incoming": incoming,
            }
        )
    elif sys.stderr.isatty():
        names = ", ".join(str(block["idstr"]) for block in blocks)
        if incoming:
            names = f"what a source brings to {' or '.join(incoming)}"
        where = "".join(f"; over NBD on {address}" for address in server.exports.addresses)
        click.echo(f"pcshare: coordinator {server.options.name!r} serves {names}{where}; Ctrl-C ends it", err=True)
