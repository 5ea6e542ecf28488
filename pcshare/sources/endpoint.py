"""endpoint: how one connection to one of a block's equivalent servers is made: TCP, a Unix socket, a child process.

Gives a connected stream socket on which nothing was said yet; the handshake is nbd/client's, and when to connect and
what to do if it fails is the link's. Every wait has a deadline and can be stopped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

from pcshare.errors import PcshareError, SourceError
from pcshare.nbd import tcp
from pcshare.sources.child import Child
from pcshare.sources.command import command_of
from pcshare.sources.grammar import ExecTarget, ObjectTarget, SshTarget, Target, TcpTarget, UnixTarget
from pcshare.sources.wakeup import StopFlag, shut_down

# An idle connection whose other end has vanished without a word is found dead after these: 10 + 3 * 5 s.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 10, 5, 3

_HINTS = {
    errno.ECONNREFUSED: "is the server running, and does it listen at this address and port?",
    errno.ENOENT: "is the server running, and is the socket's path right?",
    errno.EACCES: "may this user connect to the socket?",
    errno.ETIMEDOUT: "is the host up, and does no firewall drop what is sent to it?",
    errno.EHOSTUNREACH: "is the name right, and the host up?",
}


@dataclass
class Connected:
    """A connection, and the process at its other end if we started it."""

    socket: socket.socket
    child: Child | None = None
    hint: str | None = None  # the cure where nothing better is known

    def end(self) -> str:
        """Closes it; says how the process ended, or nothing if there is none."""
        self.socket.close()
        return self.child.end() if self.child else ""

    def explained(self, error: BaseException) -> BaseException:
        """Ends it because of an error, and gives what is to be raised: with how the process ended, or what that said
        itself if it is why the error came."""
        ending = self.end()
        if not isinstance(error, PcshareError):
            return error
        if self.child is not None and self.child.last_words is not None:
            return self.child.last_words
        if ending:
            error.message = f"{error.message}; {ending}"
        error.hint = error.hint or self.hint
        return error


def connect(target: Target, deadline: float, stop: StopFlag, reply_timeout_s: float) -> Connected:
    """A new connection, by then (time.monotonic()). SourceError with the reason, without the server's name.
    reply_timeout_s: how long an answer may take later, which a process that we start is told."""
    stop.check()
    try:
        if isinstance(target, TcpTarget):
            return Connected(_connect_tcp(target.host, target.port, deadline, stop))
        if isinstance(target, UnixTarget):
            return Connected(_connect_unix(target.path, deadline, stop))
        words = command_of(target, reply_timeout_s)
        return Connected(*Child.spawn(words, is_own=isinstance(target, ObjectTarget)), _hint_of_command(target))
    except TimeoutError:
        raise _refusal(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
    except OSError as error:
        stop.check()
        # A path that is too long for a socket has neither a number nor a text of the system's.
        raise _refusal(error.errno or errno.EINVAL, error.strerror or str(error)) from error


def _refusal(number: int, text: str) -> SourceError:
    return SourceError(text, errno=number, hint=_HINTS.get(number))


def _hint_of_command(target: ExecTarget | SshTarget | ObjectTarget) -> str | None:
    if isinstance(target, SshTarget):
        return _hint_of_ssh(target)
    if isinstance(target, ExecTarget):
        return "the command must speak NBD on its stdin and stdout, as `nbdkit -s ...` and `pcshare serve --stdio` do"
    return None


def _hint_of_ssh(target: SshTarget) -> str:
    """Any text with a ':' goes to ssh, also what was meant to be something else."""
    text = target.text
    hint = f"see that `ssh {target.host}` lets you in without typing, and that pcshare is installed there"
    if text.lower().startswith("ssh:"):
        return hint
    if os.path.exists(text):
        return f"the file of that name here is written ./{text} or file:{quote(text)}"
    if "," in text:
        return f"{hint}; an equivalent source after a comma needs a scheme: ssh://HOST/PATH"
    return f"{hint}; a local file is written ./{text} or file:{quote(text)}"


def _left_s(deadline: float) -> float:
    """Seconds until then; TimeoutError where none are left."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _connect_tcp(host: str, port: int, deadline: float, stop: StopFlag) -> socket.socket:
    """To the first of the host's addresses that answers."""
    failure: OSError | None = None
    for family, _, _, _, address in _addresses(host, port, deadline, stop):
        try:
            connection = _connect_socket(family, address, deadline, stop)
        except OSError as error:
            failure = failure or error
            continue
        tcp.tune(connection, KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
        return connection
    raise failure or OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))


def _connect_unix(path: str, deadline: float, stop: StopFlag) -> socket.socket:
    try:
        return _connect_socket(socket.AF_UNIX, path, deadline, stop)
    except BlockingIOError as error:
        raise SourceError(
            "the server accepts nobody: as many wait at its socket as there is room for",
            errno=error.errno,
            hint="end what else is connected to the server, or start it again if it is stuck",
        ) from error


def _connect_socket(family: int, address: Any, deadline: float, stop: StopFlag) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        with stop.calling(partial(shut_down, connection)):
            connection.settimeout(_left_s(deadline))
            connection.connect(address)
        connection.settimeout(None)
        stop.check()
        return connection
    except BaseException:
        connection.close()
        raise


# -- names of hosts

_Address = tuple[Any, Any, Any, Any, Any]


def _addresses(host: str, port: int, deadline: float, stop: StopFlag) -> Iterable[_Address]:
    with contextlib.suppress(socket.gaierror, UnicodeError):  # a number needs nobody's answer
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    answers: queue.SimpleQueue[list[_Address] | OSError] = queue.SimpleQueue()
    # The resolver cannot be interrupted and has time limits of its own: a thread that nobody waits for asks it.
    threading.Thread(target=_resolve, args=(host, port, answers), name="pcshare-resolve", daemon=True).start()
    with stop.calling(partial(answers.put, OSError(errno.ECANCELED, "stopped"))):
        return _answer(answers, deadline)


def _resolve(host: str, port: int, answers: queue.SimpleQueue[list[_Address] | OSError]) -> None:
    try:
        answers.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    except (OSError, UnicodeError) as error:
        text = error.strerror if isinstance(error, OSError) else "no name of a host"
        answers.put(OSError(errno.EHOSTUNREACH, f"{host}: {text}"))


def _answer(answers: queue.SimpleQueue[list[_Address] | OSError], deadline: float) -> list[_Address]:
    try:
        answer = answers.get(timeout=_left_s(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, OSError):
        raise answer
    return answer


@contextlib.contextmanager
def stoppable(connected: Connected, stop: StopFlag) -> Iterator[None]:
    """While the body waits for the other end, stop ends the wait."""
    with stop.calling(partial(shut_down, connected.socket)):
        yield
