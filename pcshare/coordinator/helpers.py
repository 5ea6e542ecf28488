"""helpers: who is attached, from the hand-over to the end of its process.

A helper is told things and let go; its faults are the core's. Its uffd is kept until it has left or its address space
is gone, also when it is cut off or has closed its socket: were ours the last copy to close, the kernel would answer
its faults with zero pages.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from pcshare import protocol, trace
from pcshare.coordinator.blocks import Block, Blocks
from pcshare.coordinator.takeover import HelperTable, KeptHelper, kept_name
from pcshare.errors import LimitReached, PcshareError, RemoteProtocolError
from pcshare.fault_thread import (
    DEMANDS_IN_FLIGHT_MAX,
    REQUESTS_IN_FLIGHT_MAX,
    EventKind,
    FaultEvent,
    FaultThreads,
)
from pcshare.fds import OwnedFd, close_aside
from pcshare.protocol import Map, Mode
from pcshare.status import SegmentWriter
from pcshare.store import FdStore
from pcshare.transport import Connection, PeerCredentials
from pcshare.uffd import Uffd

log = logging.getLogger("pcshare")

HELPERS_KEPT_FOR_OTHERS = 4  # one part in so many of --helpers-max is not for one other user alone
CLIENT_ADDR_MAX = (1 << 47) - 4096  # beyond it the kernel does not tell whether an address space still lives


class SlotState(IntEnum):
    """As STATUS_HELPER_* of the status segment."""

    FREE = 0
    ATTACHED = 1
    DISABLED = 2
    ORPHANED = 3
    LEFT = 4


@dataclass
class Helper:
    """One attachment."""

    remote_id: int
    slot: int
    block: Block
    connection: Connection
    credentials: PeerCredentials
    identity: int  # of its uffd; 0: unknown
    may_write: bool
    state: SlotState = SlotState.ATTACHED


class Helpers:
    """All attachments of a coordinator."""

    def __init__(
        self,
        segment: SegmentWriter,
        fault_threads: FaultThreads,
        features: Mapping[Mode, int],
        helpers_max: int,
        store: FdStore,
        table: HelperTable,
        *,
        strict: bool = False,
    ) -> None:
        self._segment = segment
        self._fault_threads = fault_threads
        self._features = features
        self._helpers_max = helpers_max
        self._helpers_per_uid = 0
        self._store = store
        self._table = table
        self._strict = strict
        self._by_id: dict[int, Helper] = {}
        self._by_identity: dict[int, Helper] = {}
        self._free_slots = deque(range(helpers_max))  # the one that is free longest comes first

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Helper]:
        return iter(tuple(self._by_id.values()))

    def limit_users(self, helpers_per_uid: int) -> None:
        """How many one user may have. 0: any other user than the coordinator's own and root leaves some for others."""
        self._helpers_per_uid = helpers_per_uid

    def _most_of_user(self, uid: int) -> int:
        if self._helpers_per_uid:
            return self._helpers_per_uid
        if uid in (os.geteuid(), 0):
            return self._helpers_max
        return max(1, self._helpers_max - self._helpers_max // HELPERS_KEPT_FOR_OTHERS)

    def check_room(self, uid: int) -> None:
        """LimitReached where one more would be too many, of all or of this user."""
        if len(self._by_id) >= self._helpers_max or not self._free_slots:
            raise LimitReached(
                f"{self._helpers_max} helpers are attached, more are not allowed",
                errno=errno.EUSERS,
                hint="end one, or start the coordinator with a larger --helpers-max",
            )
        most = self._most_of_user(uid)
        if sum(helper.credentials.uid == uid for helper in self._by_id.values()) >= most:
            raise LimitReached(
                f"{most} helpers of user {uid} are attached, more of one user are not allowed",
                errno=errno.EUSERS,
                hint="end one, or start the coordinator with a larger --helpers-per-uid",
            )

    # -- attaching

    def attach(
        self, block: Block, mode: Mode, connection: Connection, uffd_fd: OwnedFd, maps: tuple[Map, ...]
    ) -> Helper:
        """Takes over a helper's uffd. What is wrong with it or its maps is a RemoteProtocolError."""
        self.check_room(connection.credentials().uid)
        check_maps(block, maps)
        with Uffd(uffd_fd.detach()) as uffd:
            return self._register(block, mode, connection, uffd, self._inspect(uffd, mode), maps)

    def _register(
        self, block: Block, mode: Mode, connection: Connection, uffd: Uffd, identity: int, maps: tuple[Map, ...]
    ) -> Helper:
        """Kept first: should we die after that, the one after us answers its ATTACH."""
        credentials, may_write = connection.credentials(), mode is Mode.RW
        self._segment.helper_slot(self._free_slots[0])  # has memory from here on, or there is no room: nothing is taken
        slot = self._free_slots.popleft()
        try:
            self._segment.clear_helper(slot)  # a thread that was at work for the last one may have counted since
            status = self._segment.helper_slot(slot)
            status.block_index, status.pid, status.uid = block.index, credentials.pid, credentials.uid
            self._table.write(slot, block.index, credentials.pid, credentials.uid, maps)
            self._store.put(kept_name(slot, may_write=may_write), [connection.fileno(), uffd.fileno()])
            trace.step("kept", block_index=block.index, subject=slot)
            remote_id = self._serve(block, connection, uffd, maps, slot, may_write)
            trace.step("registered", block_index=block.index, subject=slot)
        except BaseException:
            self._forget(slot, may_write)
            raise
        status.state = SlotState.ATTACHED
        self._segment.header.helpers_joined += 1
        return self._note(Helper(remote_id, slot, block, connection, credentials, identity, may_write))

    def _serve(
        self,
        block: Block,
        connection: Connection,
        uffd: OwnedFd,
        maps: tuple[Map, ...],
        slot: int,
        may_write: bool,
    ) -> int:
        """From here on its faults are answered: its id. uffd is consumed."""
        status = self._segment.helper_slot(slot)
        remote_id = self._fault_threads.add_remote(
            block.ram,
            uffd,
            connection.dup(),
            [(m.client_addr, m.offset, m.length) for m in maps],
            status,
            has_events=may_write,
            strict=self._strict,
            kept_slot=slot,
        )
        if not self._fault_threads.is_alive(remote_id):
            self._fault_threads.remove_remote(remote_id)
            raise RemoteProtocolError(
                "ATTACH: the address space of this userfaultfd has ended, or cannot be looked at", errno=errno.ESRCH
            )
        return remote_id

    def _note(self, helper: Helper) -> Helper:
        self._by_id[helper.remote_id] = helper
        if helper.identity:
            self._by_identity[helper.identity] = helper
        return helper

    # -- taking over

    def take_over(self, kept: Iterable[KeptHelper], blocks: Blocks, events: Iterable[tuple[int, Any]]) -> None:
        """Takes over who was attached to the coordinator before this one, before a fault thread runs. events: what the
        keeper has read meanwhile from the slots' uffds. Who died meanwhile is let go; everybody else is told that
        another one serves, and faults again where it waits."""
        taken: dict[int, Helper] = {}
        for one in kept:
            try:
                taken[one.slot] = self._take_one(one, blocks.by_index(one.block_index))
            except (PcshareError, OSError, KeyError) as error:
                log.info("helper %d has gone meanwhile: %s", one.pid, error)
                self._store.remove(kept_name(one.slot, may_write=one.may_write))
        for slot, message in events:
            if slot in taken:
                self._fault_threads.apply_event(taken[slot].remote_id, message)
        for slot in self._segment.used_helper_slots():
            if slot not in taken:  # it has gone, or its fds were not kept and it comes again by itself
                self._segment.clear_helper(slot)
                self._segment.header.helpers_left += 1
        self._free_slots = deque(slot for slot in self._free_slots if slot not in taken)
        trace.step("helpers_taken")
        for helper in taken.values():
            self._tell_takeover(helper)
        trace.step("helpers_told")

    def _take_one(self, one: KeptHelper, block: Block) -> Helper:
        connection = Connection.of(one.fds[0])
        uffd = Uffd(one.fds[1].detach())
        status = self._segment.helper_slot(one.slot)
        if status.state == SlotState.LEFT:
            raise PcshareError("it has left")
        if status.state == SlotState.FREE:  # it was being attached
            status.block_index, status.pid, status.uid = one.block_index, one.pid, one.uid
            status.state = SlotState.ATTACHED
            self._segment.header.helpers_joined += 1
        status.waiting = 0  # who waits faults again, and is counted again
        with uffd:
            identity = uffd.inspect(self._features[Mode.RW if one.may_write else Mode.RO])
            remote_id = self._serve(block, connection, uffd, one.maps, one.slot, one.may_write)
        helper = Helper(
            remote_id,
            one.slot,
            block,
            connection,
            connection.credentials(),
            identity,
            one.may_write,
            SlotState(status.state),
        )
        return self._note(helper)

    def _tell_takeover(self, helper: Helper) -> None:
        if helper.state is SlotState.DISABLED:
            self._fault_threads.disable_remote(helper.remote_id, errno.ECONNABORTED)
            return
        if helper.state is SlotState.ATTACHED:
            self._fault_threads.forget_requests(helper.remote_id)
            self.tell(helper, protocol.pack_ack(helper.slot))
        self._fault_threads.wake_remote(helper.remote_id)

    def _inspect(self, uffd: Uffd, mode: Mode) -> int:
        try:
            identity = uffd.inspect(self._features[mode])
        except PcshareError as error:
            close_aside(uffd)
            raise RemoteProtocolError(f"ATTACH: {error.message}", errno=error.errno, hint=error.hint) from None
        known = self._by_identity.get(identity)
        if known is not None and known.state is SlotState.DISABLED:
            raise RemoteProtocolError(
                "ATTACH: the helper with this userfaultfd was cut off; the coordinator's log says why",
                errno=errno.EEXIST,
            )
        if known is not None and known.state is not SlotState.ORPHANED:
            raise RemoteProtocolError("ATTACH: this userfaultfd is registered already", errno=errno.EEXIST)
        if known is not None:  # it lost its socket, and has come back
            self.remove(known)
        return identity

    # -- what the core tells

    def handle(self, event: FaultEvent) -> None:
        helper = self._by_id.get(event.remote_id)
        if helper is None:
            return
        if event.kind is EventKind.REMOTE_LEFT:
            self.remove(helper)
        elif event.kind is EventKind.REMOTE_HUNG_UP:
            if self._fault_threads.is_gone(helper.remote_id):
                self.remove(helper)
            else:
                self._set_state(helper, SlotState.ORPHANED)
        else:
            self._cut_off(helper, event)

    def _cut_off(self, helper: Helper, event: FaultEvent) -> None:
        if helper.state is SlotState.DISABLED:  # and was told so, by a coordinator before this one
            return
        where = f" at {event.offset:#x}" if event.offset else ""
        text = f"{_OFFENCES.get(event.error, os.strerror(event.error))}{where}"
        log.warning("helper %d on block %s is cut off: %s", helper.credentials.pid, helper.block.idstr, text)
        self.tell(helper, protocol.pack_error(event.error, f"cut off: {text}"))
        helper.connection.shutdown()
        self._set_state(helper, SlotState.DISABLED)
        if self._fault_threads.is_gone(helper.remote_id):
            self.remove(helper)

    def _set_state(self, helper: Helper, state: SlotState) -> None:
        helper.state = state
        self._segment.helper_slot(helper.slot).state = state

    # -- leaving

    def reap(self) -> None:
        """Removes those without a socket whose address space has ended meanwhile (exit, exec)."""
        for helper in self:
            if helper.state is not SlotState.ATTACHED and self._fault_threads.is_gone(helper.remote_id):
                self.remove(helper)

    def has_unreaped(self) -> bool:
        return any(helper.state is not SlotState.ATTACHED for helper in self._by_id.values())

    def remove(self, helper: Helper) -> None:
        self._fault_threads.remove_remote(helper.remote_id)
        helper.connection.close()
        if self._by_identity.get(helper.identity) is helper:
            del self._by_identity[helper.identity]
        del self._by_id[helper.remote_id]
        self._segment.header.helpers_left += 1  # before it is in the table no more
        self._forget(helper.slot, helper.may_write)
        trace.step("left", block_index=helper.block.index, subject=helper.slot)

    def _forget(self, slot: int, may_write: bool) -> None:
        self._store.remove(kept_name(slot, may_write=may_write))
        self._segment.clear_helper(slot)
        if slot < self._helpers_max:  # a coordinator before this one may have allowed more
            self._free_slots.append(slot)

    # -- telling

    def tell(self, helper: Helper, message: bytes) -> None:
        """A helper that does not read, or is gone, is not waited for: it finds out when its socket closes."""
        try:
            helper.connection.send(message)
        except OSError as error:
            log.debug("helper %d was not told: %s", helper.credentials.pid, error)

    def tell_end(self, block: Block) -> None:
        for helper in self:
            if helper.block is block:
                self.tell(helper, protocol.pack_end())

    def close(self) -> None:
        """Says BYE to whoever is still attached, and lets go. Each keeps a copy of its uffd, and its sentinel answers
        from then on."""
        for helper in self:
            self.tell(helper, protocol.pack_bye())
        for helper in self:
            self.remove(helper)


_OFFENCES = {
    errno.EFAULT: "it faulted outside the addresses it handed over",
    errno.EBADMSG: "its userfaultfd sent an event that it must not ask for",
    errno.EBADFD: "it made its userfaultfd blocking",
    errno.ENOBUFS: "it does not read the answers to its requests",
    errno.EPROTO: "it sent what is no message of an attached helper",
    errno.ERANGE: "it asked for a range outside the block",
    errno.ENOSPC: "its mapping fell into more pieces than are followed (16)",
    errno.EUSERS: f"it waits for more pages at once than a helper may: {DEMANDS_IN_FLIGHT_MAX} "
    "(FAULT_DEMANDS_IN_FLIGHT_MAX; no option changes it: several attachments may have as many each)",
    errno.EDQUOT: f"it asked for more ranges at once than a helper may: {REQUESTS_IN_FLIGHT_MAX} "
    "(FAULT_REQUESTS_IN_FLIGHT_MAX; no option changes it: let the helper wait for answers)",
}


def check_maps(block: Block, maps: tuple[Map, ...]) -> None:
    """Maps of whole pages, inside the block and the address space, that do not overlap in the helper."""
    page_size = block.ram.page_size
    for one in maps:
        if one.length == 0 or (one.client_addr | one.offset | one.length) % page_size:
            raise RemoteProtocolError(
                f"ATTACH: a map of {one.length} bytes at offset {one.offset} is not in whole pages of {page_size}",
                errno=errno.EINVAL,
            )
        if one.offset + one.length > block.ram.map_length or one.client_addr + one.length > CLIENT_ADDR_MAX:
            raise RemoteProtocolError(
                f"ATTACH: a map of {one.length} bytes at offset {one.offset} lies outside block {block.idstr}",
                errno=errno.ERANGE,
            )
    by_addr = sorted(maps, key=lambda one: one.client_addr)
    for low, high in itertools.pairwise(by_addr):
        if low.client_addr + low.length > high.client_addr:
            raise RemoteProtocolError("ATTACH: maps overlap in the helper", errno=errno.EINVAL)
