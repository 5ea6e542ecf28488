"""takeover: what a coordinator leaves to the one after it, beside its memory: a description of its blocks, and who is
attached with which addresses.

Written while nothing is wrong, in memfds that the store keeps; read once, at a start that finds them. Names of what is
kept are here and nowhere else. Makes no block and registers nobody.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pcshare import protocol, runtime
from pcshare.errors import PcshareError, VersionMismatch
from pcshare.fds import OwnedFd
from pcshare.protocol import Map, Mode
from pcshare.sources import SourceMemory
from pcshare.store import FdStore, Kept
from pcshare.transport import Connection

log = logging.getLogger("pcshare")

STATE_VERSION = 1  # of the description; a coordinator takes over from its own version and from older ones

# What is kept under which name.
LISTENER, SEGMENT, STATE, HELPER_TABLE, PARENT, KEEPER = "listener", "segment", "state", "helpers", "parent", "keeper"
INCOMING = "incoming"  # where a migration's source connects
DEVICE = "device"  # of --user: /dev/userfaultfd, which root had opened
TOUCHED = "touched"  # of --record: what core/working_set.c notes
EVENTS, NEXT_COMMAND = "events", "next"  # the keeper writes the one and reads the other (core/keeper_store.h)
SOURCE, EXPORT = "source.", "export."  # and the block's index, or the address's place
READER, WRITER = "ro.", "rw."  # and the helper's slot: its control socket and its uffd

# A record is struct kept_maps of core/fault_thread.h, which keeps the maps up to date.
_RECORD_HEAD = struct.Struct("<IIII")  # block index, n maps, pid, uid
_MAP = struct.Struct("<QQQ")  # client_addr, offset, length
_MAPS_MAX = 16  # WIRE_MAPS_MAX
_RECORD_BYTES = 512


@dataclass(frozen=True)
class KeptBlock:
    """A block that is served. bitmap_offset: bytes in the status segment."""

    index: int
    idstr: str
    keeper_block: int
    page_size: int
    writable: bool
    bitmap_offset: int
    source: SourceMemory


@dataclass(frozen=True)
class KeptState:
    """What a coordinator cannot find out by itself of the one before it."""

    socket_path: str
    keeper: tuple[int, int]  # its pid and when it was started: it has the blocks, and no other one has
    features: Mapping[Mode, int]  # what helpers' uffds were opened with
    blocks: tuple[KeptBlock, ...]
    ram_section_id: int | None = None  # of a migration that has come to LISTEN and is not over

    def to_memfd(self) -> OwnedFd:
        told = {"version": STATE_VERSION, **asdict(self), "blocks": [asdict(block) for block in self.blocks]}
        fd = OwnedFd(os.memfd_create("pcshare-state", os.MFD_CLOEXEC))
        with open(fd.fileno(), "w", closefd=False) as file:
            json.dump(told, file)
        return fd

    @classmethod
    def from_memfd(cls, fd: OwnedFd) -> KeptState:
        """VersionMismatch: a newer coordinator wrote it."""
        told: dict[str, Any] = json.loads(_whole(fd))
        if told["version"] > STATE_VERSION:
            raise VersionMismatch(
                f"the coordinator before this one described its state in version {told['version']}, this one reads up "
                f"to {STATE_VERSION}",
                errno=errno.EPROTONOSUPPORT,
                hint=VersionMismatch.usual_hint,
            )
        blocks = (KeptBlock(**{**one, "source": SourceMemory.from_json(one["source"])}) for one in told["blocks"])
        pid, start_ticks = told["keeper"]
        features = {Mode(int(mode)): bits for mode, bits in told["features"].items()}
        return cls(told["socket_path"], (pid, start_ticks), features, tuple(blocks), told["ram_section_id"])


def _whole(fd: OwnedFd) -> bytes:
    content, size = b"", os.fstat(fd.fileno()).st_size
    while len(content) < size and (piece := os.pread(fd.fileno(), size - len(content), len(content))):
        content += piece
    return content


@dataclass(frozen=True)
class KeptHelper:
    """An attachment of the status segment's slot, with what was kept of it. fds: its control socket, its uffd."""

    slot: int
    block_index: int
    pid: int
    uid: int
    maps: tuple[Map, ...]
    may_write: bool
    fds: tuple[OwnedFd, OwnedFd]


class HelperTable:
    """Who is attached, by slot: what the coordinator after this one must know to serve it."""

    def __init__(self, taken: OwnedFd | None = None) -> None:
        self._fd = taken or OwnedFd(os.memfd_create("pcshare-helpers", os.MFD_CLOEXEC))

    def fileno(self) -> int:
        return self._fd.fileno()

    def write(self, slot: int, block_index: int, pid: int, uid: int, maps: Sequence[Map]) -> None:
        record = _RECORD_HEAD.pack(block_index, len(maps), pid, uid)
        record += b"".join(_MAP.pack(one.client_addr, one.offset, one.length) for one in maps)
        os.pwrite(self._fd.fileno(), record.ljust(_RECORD_BYTES, b"\0"), slot * _RECORD_BYTES)

    def read(self, kept: Kept, store: FdStore) -> Iterator[KeptHelper]:
        """Everybody whose fds were kept; takes these out of kept. What belongs to nobody goes out of the store."""
        for name in [name for name in kept if name.startswith((READER, WRITER))]:
            fds, slot = kept.pop(name), int(name.removeprefix(READER).removeprefix(WRITER))
            if len(fds) == 2:
                yield self._read_one(slot, name.startswith(WRITER), (fds[0], fds[1]))
            else:
                log.warning("%d fds named %s are not kept any longer: a helper has two", len(fds), name)
                store.remove(name)

    def _read_one(self, slot: int, may_write: bool, fds: tuple[OwnedFd, OwnedFd]) -> KeptHelper:
        record = os.pread(self._fd.fileno(), _RECORD_BYTES, slot * _RECORD_BYTES)
        block_index, n_maps, pid, uid = _RECORD_HEAD.unpack_from(record)
        places = range(_RECORD_HEAD.size, _RECORD_HEAD.size + n_maps * _MAP.size, _MAP.size)
        maps = tuple(Map(*_MAP.unpack_from(record, place)) for place in places)
        return KeptHelper(slot, block_index, pid, uid, maps, may_write, fds)

    def close(self) -> None:
        self._fd.close()


def kept_name(slot: int, *, may_write: bool) -> str:
    """Under which a helper's fds are kept."""
    return f"{WRITER if may_write else READER}{slot}"


class Predecessor:
    """The coordinator that died, or made way, as far as it is known."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self.state = KeptState.from_memfd(self.take_all(STATE)[-1])  # each later one replaces those before
        self.helpers = HelperTable(self.take(HELPER_TABLE))

    @classmethod
    def found(cls, kept: Kept, store: FdStore) -> Predecessor | None:
        """None: there was none that served. What one has left that died before that is in the way, and goes."""
        if STATE in kept:
            return cls(kept)
        for name, fds in kept.items():
            store.remove(name)
            _end_use(name, fds)
            for fd in fds:
                fd.close()
        kept.clear()
        return None

    def take(self, name: str) -> OwnedFd:
        """What is kept under the name, and is the caller's from now on."""
        found = self.take_all(name)
        if len(found) != 1:
            raise PcshareError(
                f"the coordinator before this one left {len(found)} fds named {name!r}, not one", errno=errno.EPROTO
            )
        return found[0]

    def take_all(self, name: str) -> list[OwnedFd]:
        return self._kept.pop(name, [])

    def take_numbered(self, prefix: str) -> dict[int, list[OwnedFd]]:
        """All whose names are this and a number, by number."""
        names = [name for name in self._kept if name.startswith(prefix)]
        return {int(name.removeprefix(prefix)): self._kept.pop(name) for name in names}

    def kept_helpers(self, store: FdStore) -> list[KeptHelper]:
        return list(self.helpers.read(self._kept, store))

    def dismiss(self, name: str, store: FdStore) -> None:
        """Its blocks are gone with its keeper, and only a supervisor's store has kept these fds: who waits is told that
        no page will come, and the name is free."""
        for helper in self.kept_helpers(store):
            with contextlib.suppress(OSError), Connection.of(helper.fds[0]) as connection:
                connection.send(protocol.pack_bye())
                connection.shutdown()
            store.remove(kept_name(helper.slot, may_write=helper.may_write))
        for kept_as, fds in self._kept.items():
            _end_use(kept_as, fds)
        for kept_as in (*self._kept, STATE, HELPER_TABLE):
            store.remove(kept_as)
        for path in (runtime.shm_path(name), Path(self.state.socket_path)):
            path.unlink(missing_ok=True)
        self._kept.clear()
        self.helpers.close()


def _end_use(name: str, fds: Sequence[OwnedFd]) -> None:
    """Addresses and the name are free at once, whoever else holds a copy: the store closes its own when it comes to
    it."""
    for fd in fds:
        if name in (LISTENER, INCOMING) or name.startswith(EXPORT):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd.fileno())) as listener:
                listener.shutdown(socket.SHUT_RDWR)
        elif name == SEGMENT:
            fcntl.flock(fd.fileno(), fcntl.LOCK_UN)
