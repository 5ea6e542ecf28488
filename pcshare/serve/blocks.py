"""blocks: the exporter: a process that answers NBD for a coordinator's blocks.

To the coordinator it is a helper like any other: it attaches read-only and asks for the ranges that its readers want
and that are not here yet. It reads them from the memfds that the coordinator gave it and never touches its mapping:
 - reading a hole of a memfd through a fd makes no page real, and cannot wait in the kernel with the GIL held;
 - a page that the source has is read only once it is known to be received: before that it looks like zeros.

Started as `python -P -m pcshare.serve.blocks CONTROL_SOCKET DESCRIPTION_FD LISTENER_FD...`; ends when its standard
input does.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from pcshare.client import Block, attach
from pcshare.errors import AttachTimeout, NoSuchCoordinator
from pcshare.extents import data_within
from pcshare.nbd.server import Export, Exports, FileRange, Server
from pcshare.nbd.wire import ExtentFlag
from pcshare.serve.extents import Ranges, merged, with_holes
from pcshare.signals import stop_signals

log = logging.getLogger("pcshare")

DESCRIPTION_READ_BYTES = 1 << 20


class BlockExport(Export):
    """A block of a coordinator: idstr, used_length, page_size, writable, data (the source's byte ranges), memfd."""

    def __init__(self, control_socket: str, described: dict[str, Any]) -> None:
        self.name = described["idstr"]
        self.size = described["used_length"]
        self.description = described["description"]
        self.block_preferred = described["page_size"]
        self._control_socket = control_socket
        self._memfd: int = described["memfd"]
        self._writable: bool = described["writable"]
        self._data = Ranges(described["data"], described["page_size"])
        self._attaching = threading.Lock()
        self._block: Block | None = None

    def wait(self, offset: int, length: int, timeout_s: float) -> bool:
        """Demands what of the range is not here. SourceLost: a part of it is lost."""
        try:
            block = self._attached()
            for start, end in self._data_within(offset, length):
                if not block.is_received(slice(start, end)):
                    block.ensure(slice(start, end), timeout_s=timeout_s)
        except (AttachTimeout, NoSuchCoordinator):  # stopped, or paused: whoever reads waits; a dead one ends us
            return False
        return True

    def read(self, offset: int, length: int) -> list[FileRange]:
        """After wait(). What lies between the source's data are zeros or what a helper wrote; the memfd has both."""
        return [FileRange(self._memfd, offset, length)]

    def extents(self, offset: int, length: int) -> list[tuple[int, ExtentFlag]]:
        if not self._writable:
            return with_holes(self._data_within(offset, length), offset, length)
        written = data_within(self._memfd, offset, length)  # also what was received, which is data in any case
        return with_holes(merged(self._data_within(offset, length), written), offset, length)

    def is_quick(self, offset: int, length: int) -> bool:
        block = self._block
        return block is not None and all(
            block.is_received(slice(start, end)) for start, end in self._data_within(offset, length)
        )

    def close(self) -> None:
        with self._attaching:
            block, self._block = self._block, None
        if block is not None:
            block.close()

    def _data_within(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        return self._data.within(offset, min(length, self.size - offset))

    def _attached(self) -> Block:
        """Attaches when the first reader comes. What the coordinator says to that (LimitReached ...) is his error."""
        with self._attaching:
            if self._block is None:
                self._block = attach(socket=self._control_socket, block=self.name, mode="ro")
            return self._block


def main(control_socket: str, description_fd: str, *listener_fds: str) -> None:
    logging.basicConfig(level=logging.WARNING, format="pcshare exporter: %(message)s")
    exports = Exports([BlockExport(control_socket, block) for block in _read_description(int(description_fd))])
    listeners = [socket.socket(fileno=int(fd)) for fd in listener_fds]
    with Server(exports, listeners) as server, stop_signals(server):
        threading.Thread(target=_stop_at_end_of_input, args=(server,), daemon=True).start()
        server.run()


def _read_description(fd: int) -> list[dict[str, Any]]:
    """From its beginning: an exporter that was here before has read it too."""
    content = b""
    while piece := os.pread(fd, DESCRIPTION_READ_BYTES, len(content)):
        content += piece
    os.close(fd)
    described: list[dict[str, Any]] = json.loads(content)
    return described


def _stop_at_end_of_input(server: Server) -> None:
    """The coordinator has ended, or wants us to."""
    while os.read(0, 4096):
        pass
    server.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
