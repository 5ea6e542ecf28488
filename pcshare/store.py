"""store: fds that are kept for the coordinator after this one, should this one be killed.

Speaks the protocol of systemd's fd store: to the keeper that started us (PCSHARE_STORE_FD), else to whoever
NOTIFY_SOCKET names; what was kept comes back as LISTEN_FDS. Knows names and fds, and not what they are. Some facts:
 - a datagram that was sent is as good as stored, also if its sender dies at once: nothing here waits for an answer;
 - fds of one name come back in the order in which they were put;
 - a uffd reports an error to whoever polls it before its time: a store is told not to poll (FDPOLL=0).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterable, Mapping, Sequence

from pcshare.fds import OwnedFd
from pcshare.transport import FDS_MAX, Datagrams

log = logging.getLogger("pcshare")

STORE_FD_VARIABLE = "PCSHARE_STORE_FD"
SUPERVISOR_VARIABLE = "NOTIFY_SOCKET"
LISTEN_VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
LISTEN_FDS_START = 3

Kept = dict[str, list[OwnedFd]]  # by name, in the order in which they were put


class FdStore:
    """Where fds are kept for the next one; without such a place everything is in vain, and says nothing."""

    def __init__(self, datagrams: Datagrams | None) -> None:
        self._datagrams = datagrams
        self._names: set[str] = set()

    @classmethod
    def found(cls) -> FdStore:
        """The one that the environment names. Children do not inherit it."""
        number, address = os.environ.pop(STORE_FD_VARIABLE, ""), os.environ.get(SUPERVISOR_VARIABLE, "")
        if number:
            os.set_inheritable(int(number), False)
            return cls(Datagrams(socket.socket(fileno=int(number))))
        if address:
            with contextlib.suppress(OSError):
                return cls(Datagrams.connected(address))
        return cls(None)

    @property
    def is_there(self) -> bool:
        return self._datagrams is not None

    def put(self, name: str, fds: Sequence[int]) -> None:
        """Keeps copies, beside those that the name has already."""
        self._names.add(name)
        for first in range(0, len(fds), FDS_MAX):
            self._send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fds[first : first + FDS_MAX])

    def know(self, names: Iterable[str]) -> None:
        """What is kept already: put by another process."""
        self._names.update(names)

    def remove_all(self) -> None:
        for name in tuple(self._names):
            self.remove(name)

    def remove(self, name: str) -> None:
        self._names.discard(name)
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def tell_ready(self) -> None:
        """From here on whoever started us starts us again if we are killed."""
        self._send("READY=1")

    def tell_stopping(self) -> None:
        """We end because we are to."""
        self._send("STOPPING=1")

    def _send(self, text: str, fds: Sequence[int] = ()) -> None:
        if self._datagrams is None:
            return
        try:
            self._datagrams.send(text.encode(), fds)
        except OSError as error:
            if fds:  # what is only removed, or told, is of no use to anybody where nobody listens
                log.warning("not kept for a restart (%s): %s", text.splitlines()[1], error.strerror)

    def close(self) -> None:
        """Nothing is told from here on. Twice is fine."""
        if self._datagrams is not None:
            self._datagrams.close()
        self._datagrams = None


def kept_fds(environment: Mapping[str, str] | None = None) -> Kept:
    """What was kept for this process, each with its owner; taken from the environment, so that it is given once."""
    given = dict(os.environ if environment is None else environment)
    for name in LISTEN_VARIABLES:
        os.environ.pop(name, None)
    if given.get("LISTEN_PID") != str(os.getpid()) or not given.get("LISTEN_FDS", "").isdigit():
        return {}
    count = int(given["LISTEN_FDS"])
    names = given.get("LISTEN_FDNAMES", "").split(":")
    kept: Kept = {}
    for index in range(count):
        fd = OwnedFd(LISTEN_FDS_START + index)
        os.set_inheritable(fd.fileno(), False)
        kept.setdefault(names[index] if index < len(names) else "", []).append(fd)
    return kept
