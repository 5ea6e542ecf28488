"""address: where an NBD server listens: "PATH | HOST:PORT | :PORT" to listening sockets. A path contains a "/".

Listens on loopback unless a host is given: what is served is for whoever can connect. Accepts nobody.
 - A socket's file outlives a server that was killed: one on which nobody listens is replaced, one in use is refused.
 - bind() takes the file's mode from the socket, so that it is never open to others, not even for a moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from pcshare.errors import NameInUse, PcshareError, UsageError
from pcshare.fds import OwnedFd
from pcshare.nbd.wire import DEFAULT_PORT
from pcshare.runtime import SOCKET_PATH_BYTES_MAX

SOCKET_MODE = 0o600
BACKLOG = 128
PORT_MAX = 65535
LOOPBACK = ("127.0.0.1", "::1")

_HINT = f"write a path with a '/' in it, HOST:PORT, or :PORT for this host alone (the usual port is {DEFAULT_PORT})"


@dataclass(frozen=True)
class Address:
    """Where to listen: a path, or a port of hosts (their names or numbers)."""

    path: str = ""
    hosts: tuple[str, ...] = ()
    port: int = 0

    def __str__(self) -> str:
        return self.path or host_port(self.hosts[0], self.port)


def parse_address(text: str) -> Address:
    """Raises UsageError. Port 0: one that is free."""
    if "/" in text:
        if len(os.fsencode(text)) > SOCKET_PATH_BYTES_MAX:
            raise UsageError(
                f"{text}: a Unix socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes",
                hint="take a shorter one, or a relative one",
            )
        if "\0" in text or text.endswith("/"):
            raise UsageError(f"{text!r} is no path of a socket", hint=_HINT)
        return Address(path=text)
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise UsageError(f"not an address to listen on: {text!r}", hint="put an IPv6 address in brackets: [::1]:10809")
    if not colon or not re.fullmatch("0*[0-9]{1,5}", port, re.ASCII) or int(port[-5:]) > PORT_MAX:
        raise UsageError(f"not an address to listen on: {text!r}", hint=_HINT)
    return Address(hosts=(host,) if host else LOOPBACK, port=int(port[-5:]))


def host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Listening:
    """Sockets that listen on an address; owns them, and the socket's file.

    addresses: as bound, in the form that parse_address reads."""

    def __init__(self, address: Address, taken: Sequence[OwnedFd] = ()) -> None:
        """taken: the sockets themselves, which listen there already."""
        self.sockets: list[socket.socket] = []
        self.addresses: list[str] = []
        self._path = ""
        self._inode: tuple[int, int] | None = None
        try:
            if taken:
                self._take(address, taken)
            elif address.path:
                self._listen_on_path(address.path)
            else:
                self._listen_on_hosts(address)
        except OSError as error:
            self.close()
            raise _cannot(address, error) from None
        except BaseException:
            self.close()
            raise

    def uris(self, export_name: str) -> list[str]:
        """NBD URIs by which clients find an export here."""
        name = quote(export_name, safe="")
        if self._path:
            return [f"nbd+unix:///{name}?socket={quote(self._path)}"]
        return [f"nbd://{address}/{name}" for address in self.addresses]

    def _take(self, address: Address, taken: Sequence[OwnedFd]) -> None:
        self.sockets = [socket.socket(fileno=one.detach()) for one in taken]
        if address.path:
            self.addresses.append(os.path.abspath(address.path))
            with contextlib.suppress(FileNotFoundError):  # somebody removed it: who is connected stays so
                self._note_path(address.path)
        else:
            self.addresses = [host_port(*one.getsockname()[:2]) for one in self.sockets]

    # -- a path

    def _note_path(self, path: str) -> None:
        found = os.stat(path)
        self._path, self._inode = os.path.abspath(path), (found.st_dev, found.st_ino)

    def _listen_on_path(self, path: str) -> None:
        _clear_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sockets.append(listener)
        os.fchmod(listener.fileno(), SOCKET_MODE)
        listener.bind(path)
        self._note_path(path)
        listener.listen(BACKLOG)
        self.addresses.append(self._path)

    # -- hosts

    def _listen_on_hosts(self, address: Address) -> None:
        """On all addresses of the host; of loopback's two, on those that this machine has."""
        port, trouble = address.port, None
        for family, where in _resolve(address):
            if port != address.port:
                where = (where[0], port, *where[2:])  # one that was free for the first serves all
            try:
                port = self._listen_on(family, where)
            except OSError as error:
                if address.hosts != LOOPBACK or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                trouble = error
        if not self.sockets and trouble is not None:
            raise trouble

    def _listen_on(self, family: int, where: tuple[Any, ...]) -> int:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(where)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        self.sockets.append(listener)
        host, port, *_ = listener.getsockname()
        self.addresses.append(host_port(host, port))
        return int(port)

    def close(self, *, and_remove: bool = True) -> None:
        """Closes, and removes the file if it is still ours, unless others listen there yet. Twice is fine."""
        for listener in self.sockets:
            listener.close()
        self.sockets.clear()
        inode, self._inode = self._inode, None
        if not and_remove:
            return
        with contextlib.suppress(OSError):
            found = os.stat(self._path)
            if inode == (found.st_dev, found.st_ino):
                os.unlink(self._path)

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def listen_on(texts: Iterable[str], taken: Mapping[int, Sequence[OwnedFd]] | None = None) -> list[Listening]:
    """On every address, or on none. taken: sockets that listen there already, by the address's place in texts."""
    listening: list[Listening] = []
    try:
        for number, address in enumerate([parse_address(text) for text in texts]):
            listening.append(Listening(address, (taken or {}).get(number, ())))
    except BaseException:
        for one in listening:
            one.close(and_remove=not taken)
        raise
    return listening


def _resolve(address: Address) -> list[tuple[int, tuple[Any, ...]]]:
    found: dict[tuple[int, tuple[Any, ...]], None] = {}  # each once, in order
    try:
        for host in address.hosts:
            for family, _, _, _, where in socket.getaddrinfo(
                host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            ):
                found[family, where] = None
    except (socket.gaierror, UnicodeError) as error:
        text = error.strerror if isinstance(error, socket.gaierror) else "no name of a host"
        raise UsageError(f"{address}: {text}", hint=_HINT) from None
    return list(found)


def _clear_stale(path: str) -> None:
    """Removes the socket of a server that is gone; NameInUse if it is not gone, or if it is no socket."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise NameInUse(f"{path} is there and is no socket", errno=errno.EEXIST, hint="name another path, or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise NameInUse(
                f"somebody listens on {path} already",
                errno=errno.EADDRINUSE,
                hint="end that server, or name another path",
            )
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _cannot(address: Address, error: OSError) -> PcshareError:
    hint = None
    if error.errno == errno.EADDRINUSE:
        return NameInUse(
            f"somebody listens on {address} already", errno=error.errno, hint="end that server, or name another address"
        )
    if error.errno == errno.ENOENT:
        hint = "make the directory first"
    elif error.errno == errno.EADDRNOTAVAIL:
        hint = "name an address of this host (ip address), or [::] for all of them"
    elif error.errno in (errno.EACCES, errno.EPERM) and address.port:
        hint = "ports below 1024 are for root"
    return PcshareError(f"cannot listen on {address}: {error.strerror}", errno=error.errno, hint=hint)
