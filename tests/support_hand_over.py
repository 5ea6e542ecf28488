"""Hand-overs with mutations, to a coordinator that runs: what it says of each must be a message, and it must go on.

Speaks the control protocol as a helper in another language would: by a socket, without the library.
"""

from __future__ import annotations

import mmap
import os
import random
import socket
from collections import Counter
from contextlib import ExitStack, suppress

from core_support import open_uffd
from pcshare import protocol
from pcshare.core import ffi, lib
from pcshare.errors import RemoteProtocolError, VersionMismatch
from pcshare.protocol import Ack, ErrorMessage, Map, Message, Mode, Welcome

ANSWER_TIMEOUT_S = 30.0  # a coordinator that says nothing for so long has failed
FDS_TOO_MANY = 6
ORDERS = (lib.WIRE_ADMIN, lib.WIRE_REPLACE)  # no mistakes in these: they would be obeyed


class Hand:
    """A helper's things, right and wrong, for one hand-over after the other."""

    def __init__(self, path: str, rng: random.Random, length: int) -> None:
        self._path, self._rng, self._length = path, rng, length
        self._stack = ExitStack()
        self._memory = self._stack.enter_context(mmap.mmap(-1, length))
        self._addr = int(ffi.cast("uintptr_t", ffi.from_buffer(self._memory)))
        self._uffd = -1  # made when WELCOME says with which features
        self._odd_fds = [os.open("/dev/null", os.O_RDONLY), os.open("/", os.O_RDONLY), *os.pipe(), open_uffd(0)]
        for fd in self._odd_fds:
            self._stack.callback(os.close, fd)

    def close(self) -> None:
        if self._uffd >= 0:
            lib.uffd_unregister(self._uffd, self._addr, self._length)
        self._stack.close()

    def _register(self, features: int) -> None:
        self._uffd = open_uffd(features)
        self._stack.callback(os.close, self._uffd)
        ioctls = ffi.new("uint64_t *")
        assert lib.uffd_register(self._uffd, self._addr, self._length, lib.UFFD_MODE_MISSING, ioctls) == 0

    def _mutated(self, message: bytes) -> bytes:
        changed = bytearray(message)
        for _ in range(self._rng.randint(1, 3)):
            where, size = self._rng.randrange(len(changed)), self._rng.choice((1, 2, 4, 8))
            where -= where % size
            edge = self._rng.choice((0, 1, 1 << 8 * size - 1, (1 << 8 * size) - 1, self._length, self._addr))
            changed[where : where + size] = (edge % (1 << 8 * size)).to_bytes(size, "little")
        how = self._rng.random()
        if how < 0.1:
            return bytes(changed[: self._rng.randrange(len(changed) + 1)])
        return bytes(changed) + self._rng.randbytes(self._rng.randrange(20)) if how < 0.2 else bytes(changed)

    def _send(self, end: socket.socket, message: bytes, fds: list[int]) -> None:
        """Mutated or not, with these fds or others; what cannot be sent is an end."""
        if self._rng.random() < 0.4:
            message = self._mutated(message)
        if self._rng.random() < 0.2:
            fds = self._rng.choices([*fds, *self._odd_fds], k=self._rng.randint(0, FDS_TOO_MANY))
        is_order = len(message) >= 8 and int.from_bytes(message[6:8], "little") in ORDERS
        with suppress(OSError):  # it has hung up, or takes no fds
            if not is_order and socket.send_fds(end, [message], fds) == len(message):
                return
        with suppress(OSError):
            end.shutdown(socket.SHUT_WR)

    def _hear(self, end: socket.socket) -> Message | None:
        """Its answer; None: it hung up."""
        try:
            data, fds, _, _ = socket.recv_fds(end, protocol.LENGTH_MAX + 1, protocol.FDS_MAX)
        except ConnectionError:
            return None
        for fd in fds:
            os.close(fd)
        try:
            return protocol.parse(data, len(fds)) if data else None
        except (RemoteProtocolError, VersionMismatch) as error:
            raise AssertionError(f"the coordinator says what is no message: {error}") from error

    def _attach(self, end: socket.socket, welcome: Welcome) -> str:
        if self._uffd < 0:
            self._register(welcome.features)
        pages = welcome.map_length // welcome.page_size
        first = self._rng.randrange(pages) * welcome.page_size if self._rng.random() < 0.3 else 0
        maps = [Map(self._addr + first, first, welcome.map_length - first)] * self._rng.choice((1, 1, 1, 2, 16))
        self._send(end, protocol.pack_attach(maps), [self._uffd])
        answer = self._hear(end)
        if not isinstance(answer, Ack):
            return _outcome(answer)
        with suppress(OSError):
            end.send(protocol.pack_leave())
        while self._hear(end) is not None:
            pass
        return "attached"

    def over(self) -> str:
        """One hand-over, as far as it gets."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
            end.settimeout(ANSWER_TIMEOUT_S)
            end.connect(self._path)
            self._send(end, protocol.pack_hello("data", self._rng.choice((Mode.DEFAULT, Mode.RO, Mode.COW))), [])
            answer = self._hear(end)
            return self._attach(end, answer) if isinstance(answer, Welcome) else _outcome(answer)


def _outcome(answer: Message | None) -> str:
    assert answer is None or isinstance(answer, ErrorMessage), answer
    return "hung up" if answer is None else "refused"


def hand_over(path: str, rng: random.Random, count: int, length: int) -> Counter[str]:
    hand = Hand(path, rng, length)
    try:
        return Counter(hand.over() for _ in range(count))
    finally:
        hand.close()
