"""launcher: starts `pcshare coordinator` as a process and ends it again.

The embedding program is a helper like any other: the coordinator never lives in its process, because a thread of it
that waits for a page holds the GIL (rule of two languages). This room must not serve anything itself and must not
touch the C core: it starts a process, listens to the JSON lines the process writes, answers its notifiers, and ends
it.

What ties the two together is one end of a socket pair: when the creator ends, also by SIGKILL, the kernel closes it
and the coordinator sees the end of file. PR_SET_PDEATHSIG would not do: it follows the thread that started the
process. A copy of that end in a child of fork would hide the creator's death, so children close it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pcshare import errors, runtime, units
from pcshare.signals import EXIT_SIGNAL, signals_blocked, wait_for_event

if TYPE_CHECKING:
    from pcshare.client import Block
    from pcshare.status import StatusReport

STOP_TIMEOUT_S = (
    15.0  # from SIGTERM to SIGKILL: telling every helper BYE and unregistering terabytes takes a few seconds
)
THREAD_JOIN_TIMEOUT_S = 5.0  # the reader ends at the end of file; only a callback of the user can hold it up
DEATH_TIMEOUT_S = 5.0  # from SIGKILL to the end: freeing the memory of a large block takes a while
LINE_BYTES_MAX = 1 << 20  # one JSON line; a thousand blocks in "ready" take a tenth of it
RECEIVE_BYTES = 1 << 16

_BY_EXIT: dict[int, type[errors.PcshareError]] = {
    errors.EXIT_USAGE: errors.UsageError,
    errors.EXIT_HOST: errors.HostError,
}

_links: weakref.WeakSet[_Link] = weakref.WeakSet()


@dataclass(frozen=True)
class Event:
    """What the coordinator tells: a notifier (PROBE, INBOUND_ADVISE, INBOUND_LISTEN, INBOUND_END), or "state"; or
    "restarted": its process was killed, or replaced, and another one goes on; or "ended": it is gone for good, and
    nobody asked for that."""

    name: str
    block: str | None = None
    state: str | None = None
    reason: str | None = None


class _Link:
    """The creator's end of the socket pair: JSON lines both ways."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        _links.add(self)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Messages until the other side closes."""
        pending = b""
        while chunk := self._receive():
            *whole, pending = (pending + chunk).split(b"\n")
            for line in whole:
                message = json.loads(line)
                if isinstance(message, dict):
                    yield message
            if len(pending) > LINE_BYTES_MAX:
                raise errors.PcshareError(f"the coordinator sent a line longer than {LINE_BYTES_MAX} bytes")

    def _receive(self) -> bytes:
        try:
            return self.end.recv(RECEIVE_BYTES)
        except OSError:  # reset or shut down: the same as the end
            return b""

    def send(self, message: Mapping[str, object]) -> None:
        with contextlib.suppress(OSError):  # who does not listen any more needs no answer
            self.end.sendall(json.dumps(message).encode() + b"\n")

    def shutdown(self) -> None:
        """Ends lines() in whichever thread it runs."""
        with contextlib.suppress(OSError):
            self.end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.end.close()


def _close_in_child() -> None:
    """In a child of fork: let go of every coordinator of the parent, which alone decides on their lives."""
    for link in list(_links):
        link.close()


os.register_at_fork(after_in_child=_close_in_child)


class Coordinator:
    """A coordinator process that lives as long as this object is in use, and never longer than its creator.

        with pcshare.Coordinator(blocks={"data": "big.npy"}) as coordinator:
            array = coordinator.attach("data").asarray()

    blocks: {block: source}, or "BLOCK=SOURCE" or "SOURCE" texts as on the command line. stream: "eager", "lazy",
    "paused", or bytes a second such as "200M"; None: eager, but lazy where a first working set is recorded. record,
    replay: files for what helpers touch first, and of what is to come first. page_size: "4K", "2M", "auto", or bytes.
    exports: addresses on which the blocks are given out over NBD, a path with a "/", HOST:PORT, or :PORT of this host
    alone; the attribute has them as bound. keeper: whether a coordinator that is killed is started again. read_ahead:
    how far a thread that reads on is kept ahead of, bytes or "1M", 0 or "off": not at all. strict: each page is looked
    at before a helper reads it. on_event is called in a thread of its own; for PROBE a text it returns, or an
    exception, is a veto with that reason.
    Errors: what the coordinator refused, as the class of pcshare.errors that fits.
    """

    def __init__(
        self,
        name: str | None = None,
        blocks: Mapping[str, str] | Sequence[str] | str = (),
        *,
        stream: str | None = None,
        page_size: str | int = "4K",
        writable: Iterable[str] = (),
        on_source_loss: str = "pause",
        source_timeout_s: float = 30.0,
        on_event: Callable[[Event], str | None] | None = None,
        notifier_timeout_s: float = 10.0,
        ready_timeout_s: float = 30.0,
        fault_threads: int | None = None,
        orphan_timeout_s: float | None = None,
        device_state: str | os.PathLike[str] | None = None,
        allow_uid: Iterable[int] = (),
        allow_gid: Iterable[int] = (),
        exports: Iterable[str] | str = (),
        keeper: bool = True,
        helpers_max: int | None = None,
        fault_timeout_s: float = 0.0,
        read_ahead: str | int = "1M",
        strict: bool = False,
        record: str | os.PathLike[str] | None = None,
        replay: str | os.PathLike[str] | None = None,
    ) -> None:
        self.name = _unique_name() if name is None else runtime.check_name(name)
        self.pid: int | None = None
        self.socket: str | None = None
        self.exports: tuple[str, ...] = ()
        self._sources = _source_arguments(blocks)
        self._options = [
            f"--page-size={page_size}",
            f"--on-source-loss={on_source_loss}",
            f"--source-timeout={source_timeout_s:f}s",
            f"--notifier-timeout={notifier_timeout_s:f}s",
            f"--fault-timeout={fault_timeout_s:f}s",
            f"--read-ahead={read_ahead}",
            *(f"--writable={block}" for block in _each(writable)),
            *(f"--allow-uid={uid}" for uid in allow_uid),
            *(f"--allow-gid={gid}" for gid in allow_gid),
            *(f"--export={address}" for address in _each(exports)),
        ]
        if stream is not None:
            _check_stream(stream)
            self._options.append(f"--stream={stream}")
        if not keeper:
            self._options.append("--no-keeper")
        if helpers_max is not None:
            self._options.append(f"--helpers-max={helpers_max}")
        if strict:
            self._options.append("--strict")
        if fault_threads is not None:
            self._options.append(f"--fault-threads={fault_threads}")
        if orphan_timeout_s is not None:
            self._options.append(f"--orphan-timeout={orphan_timeout_s:f}s")
        files = {"device-state": device_state, "record": record, "replay": replay}
        self._options += [f"--{option}={os.fspath(path)}" for option, path in files.items() if path is not None]
        self._on_event = on_event
        self._ready_timeout_s = ready_timeout_s
        self._creator_pid = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._link: _Link | None = None
        self._reader: threading.Thread | None = None
        self._settled = threading.Event()  # ready, failed, or the process is gone
        self._stopping = threading.Event()
        self._failure: errors.PcshareError | None = None

    # -- life

    def start(self) -> Coordinator:
        """Starts the process; returns when attach would succeed. Of an incoming migration: when a source can come."""
        if self._process is not None:
            raise errors.PcshareError(f"coordinator {self.name!r} is started already")
        self._creator_pid = os.getpid()
        self._settled.clear()
        self._stopping.clear()
        self._failure = None
        try:
            self._spawn()
            self._wait_until_ready()
        except BaseException:
            self._end()
            raise
        return self

    def stop(self) -> None:
        """Ends the process and waits until it is gone. Can be called twice; does nothing in a child of fork."""
        if os.getpid() != self._creator_pid or self._process is None:
            return
        self._end()

    def __enter__(self) -> Coordinator:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # -- use

    def status(self) -> StatusReport:
        """What the status segment says now; the coordinator is not asked."""
        from pcshare.status import read_status

        return read_status(self.name)

    def attach(self, block: str | None = None, **options: Any) -> Block:
        """pcshare.attach to this coordinator; the options are its own."""
        from pcshare.client import attach

        return attach(self.name, block, **options)

    # -- the process

    def _command(self, parent_fd: int) -> list[str]:
        return [
            *(sys.executable, "-P", "-m", "pcshare", "coordinator"),
            f"--name={self.name}",
            f"--parent-fd={parent_fd}",
            *self._options,
            "--",
            *self._sources,
        ]

    def _spawn(self) -> None:
        """A session of its own: a Ctrl-C on the terminal is for the program that uses the coordinator."""
        ours, theirs = socket.socketpair()
        self._link = _Link(ours)
        with theirs:
            self._process = subprocess.Popen(
                self._command(theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **environment_changes()},
                start_new_session=True,
            )
        self._reader = threading.Thread(
            target=self._read_events, args=(self._link, self._process), name=f"pcshare-events-{self.name}", daemon=True
        )
        with signals_blocked():  # the program's signals belong to the program's threads
            self._reader.start()

    def _wait_until_ready(self) -> None:
        if not wait_for_event(self._settled, self._ready_timeout_s):
            raise errors.AttachTimeout(
                f"coordinator {self.name!r} was not ready within {self._ready_timeout_s:g} s",
                errno=errno.ETIMEDOUT,
                hint="a slow source or a large block needs a larger ready_timeout_s",
            )
        if self._failure is not None:
            raise self._failure

    def _end(self) -> None:
        process, link, reader = self._process, self._link, self._reader
        self._process = self._link = self._reader = None
        self._stopping.set()
        if process is not None:
            self._end_process(process)
            self._clear_after(process)
        if link is not None:
            link.shutdown()
        if reader is not None and reader is not threading.current_thread():
            reader.join(THREAD_JOIN_TIMEOUT_S)
            if reader.is_alive():
                warnings.warn(f"on_event of coordinator {self.name!r} has not returned", RuntimeWarning, stacklevel=3)
        if link is not None:
            link.close()
        self.pid = self.socket = None
        self.exports = ()

    def _end_process(self, process: subprocess.Popen[bytes]) -> None:
        """What was started is the keeper by now: it passes SIGTERM on to its child, the coordinator, and ends after."""
        process.terminate()  # tests for a process that has ended and been waited for: never hits a reused pid
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            warnings.warn(
                f"coordinator {self.name!r} (pid {self.pid}) outlived SIGTERM by {STOP_TIMEOUT_S:g} s: killed",
                RuntimeWarning,
                stacklevel=4,
            )
            os.killpg(process.pid, signal.SIGKILL)  # keeper and coordinator: the session is theirs alone
            process.wait()

    def _clear_after(self, process: subprocess.Popen[bytes]) -> None:
        """A coordinator that was killed could not clear away its socket and status segment, and nobody will start under
        this name again to do it. Only what that very process left: the name may be somebody else's."""
        from pcshare import status

        with contextlib.suppress(errors.PcshareError):
            report = status.read_status(self.name)  # NoSuchCoordinator, if it did its duty
            if process.pid in (report.keeper_pid, report.pid):
                _await_end(report.pid)
                status.remove_leftovers(self.name)

    # -- its events (reader thread)

    def _read_events(self, link: _Link, process: subprocess.Popen[bytes]) -> None:
        try:
            for message in link.lines():
                self._handle(link, message)
        except (ValueError, KeyError, TypeError, errors.PcshareError) as error:
            self._settle(errors.PcshareError(f"coordinator {self.name!r} sent what cannot be read: {error!r}"))
        if not self._settled.is_set():
            self._settle(self._died(process))
        elif self._failure is None and not self._stopping.is_set():
            self._notify(Event("ended", reason=_ending(_wait_a_little(process))))

    def _handle(self, link: _Link, message: Mapping[str, Any]) -> None:
        kind = str(message.get("event"))
        if kind == "ready":
            is_first = self.pid is None
            self.pid, self.socket, self.exports = message["pid"], message["socket"], tuple(message["exports"])
            self._settle(None)
            if not is_first:
                self._notify(Event("restarted", reason=f"pid {self.pid} goes on"))
        elif kind == "failed":
            self._settle(errors.from_json(message))
        else:
            refusal = self._notify(_event(kind, message))
            if "id" in message:
                link.send({"id": message["id"], "ok": refusal is None, "reason": refusal or ""})

    def _notify(self, event: Event) -> str | None:
        """The user's callback. A text: refused, for that reason."""
        if self._on_event is None:
            return None
        try:
            answer = self._on_event(event)
        except Exception as error:  # the user's code: whatever it raises is the reason
            if event.name != "PROBE":
                warnings.warn(f"on_event failed at {event.name}: {error!r}", RuntimeWarning, stacklevel=2)
            return str(error) or repr(error)
        return answer if isinstance(answer, str) and answer else None

    def _settle(self, failure: errors.PcshareError | None) -> None:
        if not self._settled.is_set():
            self._failure = failure
            self._settled.set()

    def _died(self, process: subprocess.Popen[bytes]) -> errors.PcshareError:
        """The process closed its end without a word; a wrong option ends it before it can say one."""
        code = _wait_a_little(process)
        return _BY_EXIT.get(code or 0, errors.CoordinatorGone)(
            f"coordinator {self.name!r} ended before it was ready ({_ending(code)})",
            hint="what it wrote to stderr says more",
        )


def _wait_a_little(process: subprocess.Popen[bytes]) -> int | None:
    """Its exit code: the end of file comes a moment before the end of the process."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(THREAD_JOIN_TIMEOUT_S)
    return None


def _unique_name() -> str:
    return f"run-{os.getpid()}-{secrets.token_hex(4)}"


def _each(texts: Iterable[str] | str) -> Iterable[str]:
    """One text alone stands for itself, not for its characters."""
    return [texts] if isinstance(texts, str) else texts


def _check_stream(stream: str) -> None:
    """Here, because the coordinator's own refusal of an option is words for a terminal."""
    if stream not in ("eager", "lazy", "paused"):
        units.parse_rate(stream)


def _source_arguments(blocks: Mapping[str, str] | Sequence[str] | str) -> list[str]:
    if isinstance(blocks, str | os.PathLike):
        blocks = [os.fspath(blocks)]
    if isinstance(blocks, Mapping):
        arguments = [f"{runtime.check_block_name(block)}={os.fspath(source)}" for block, source in blocks.items()]
    else:
        arguments = [os.fspath(source) for source in blocks]
    if not arguments:
        raise errors.UsageError("a coordinator needs at least one block", hint='for example blocks={"data": "big.npy"}')
    return arguments


def environment_changes() -> dict[str, str]:
    """So that a process finds this very package, also where it is used from a source tree; -P keeps the working
    directory, in which anything may lie, out of its search path."""
    root = str(Path(__file__).resolve().parent.parent)
    if root in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def _event(kind: str, message: Mapping[str, Any]) -> Event:
    return Event(kind, message.get("block"), message.get("state"), message.get("reason"))


def _await_end(pid: int) -> None:
    """Of a process that is no child of ours and dies at this moment."""
    with contextlib.suppress(ProcessLookupError):
        process_fd = os.pidfd_open(pid)
        try:
            select.select([process_fd], [], [], DEATH_TIMEOUT_S)  # readable: it has ended
        finally:
            os.close(process_fd)


def _ending(code: int | None) -> str:
    if code is None:
        return "still running"
    number = -code if code < 0 else code - EXIT_SIGNAL  # the keeper says it as shells do
    return f"killed by {signal.Signals(number).name}" if number in signal.valid_signals() else f"exit code {code}"
