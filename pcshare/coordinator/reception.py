"""reception: one main connection of a migration, read from its first byte to its end, in a thread of its own.

What may come when is one table. Pages are the core's; blocks, notifiers and states are the loop's, which is asked. Says
how it ended by returning (over, and the source knows) or by what it raises; decides nothing about what then becomes of
the migration.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from pcshare.errors import MigrationError, PcshareError, SourceError
from pcshare.incoming import FOREVER, Incoming, IncomingStream, StreamLost, StreamStopped, StreamTimeout, Why
from pcshare.migration.reader import (
    PrecopyEnd,
    read_command,
    read_footer,
    read_header,
    read_ram_blocks,
    read_ram_section_start,
    read_section_id,
    read_section_type,
    split_package,
    split_precopy_end,
)
from pcshare.migration.return_path import pong, resume_ack, shut
from pcshare.migration.wire import (
    PACKAGE_LENGTH_MAX,
    RETURN_HEADER,
    U8,
    Announcement,
    Command,
    Header,
    OpenReturnPath,
    Packaged,
    Parser,
    Ping,
    PostcopyAdvise,
    PostcopyResume,
    RamDiscard,
    RecvBitmapWanted,
    SectionType,
    SwitchoverStart,
    T,
    Wrong,
    take,
)

HANDSHAKE_TIMEOUT_S = 30.0  # from a connection's first byte to the blocks, or to the end of a recovery's bitmaps
LAST_WORDS_TIMEOUT_S = 2.0  # for SHUT to arrive: a socket closed with bytes unread in it may take it back
LAST_PAGES_TIMEOUT_S = 10.0  # the main connection has ended, the preempt channel brings nothing: then nothing comes
LAST_PAGES_LOOK_S = 0.5
DEVICE_STATE_READ_BYTES = 1 << 20
DEVICE_STATE_QUIET_S = 0.01  # nothing more has come for so long: that may be its end
DEVICE_STATE_LOOK_SHARE = 10  # a look for its end must not take more than one part in so many of the time
TARGET_PAGE_SIZE = 4096  # of every machine that QEMU migrates today

GOOD, FAILED = 0, 1  # of SHUT


class Stage(Enum):
    """How far the connection is."""

    OPENING = "before RAM is announced"
    PRECOPY = "before LISTEN"
    POSTCOPY = "after LISTEN"
    RECOVERY = "in a recovery, before its RESUME"


@dataclass
class RamSection:
    """What later connections of a migration must know of its first."""

    section_id: int = 0  # the one that START gave it
    has_ended: bool = False


class Loop(Protocol):
    """What the coordinator's loop does for a reception. All but wait_until_complete() may raise what ends it."""

    def source_came(self, header: Header) -> None:
        """A header has come."""

    def announce(self, blocks: tuple[Announcement, ...], advise: PostcopyAdvise | None) -> None:
        """Blocks are made; from now on their pages can be stored."""

    def discard_begins(self) -> None:
        """Once, before the first discard."""

    def listen(self, device_state: bytes, *, is_all: bool) -> None:
        """Blocks are handed out; from now on their pages are placed. is_all: nothing more comes."""

    def run(self) -> None:
        """The source has let go of its machine."""

    def resumed(self) -> None:
        """A recovery has found its migration."""

    def missing_pages(self) -> int:
        """Of all blocks."""

    def wait_until_complete(self, timeout_s: float) -> bool:
        """Whether every page of every block is here, or somebody called for an end."""


class Reception:
    """Reads one connection. recovers: it takes up a migration whose blocks are there."""

    def __init__(
        self, incoming: Incoming, stream: IncomingStream, loop: Loop, ram: RamSection, *, recovers: bool
    ) -> None:
        self._incoming = incoming
        self._stream = stream
        self._loop = loop
        self._stage = Stage.RECOVERY if recovers else Stage.OPENING
        self._deadline: float | None = time.monotonic() + HANDSHAKE_TIMEOUT_S
        self._next: SectionType | None = None  # a section's type that was read with what came before it
        self._ram = ram
        self._advise: PostcopyAdvise | None = None
        self._discarded = False
        self._can_answer = False
        self._over = False

    # -- what take() reads from

    @property
    def offset(self) -> int:
        return self._stream.offset

    def read(self, count: int) -> bytes:
        left_s = FOREVER if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        return self._stream.read(count, left_s)

    def _take(self, parser: Parser[T]) -> T:
        return take(self, parser)

    # -- from the first byte to the end

    def run(self) -> None:
        """Until the source has been told that all is well. Raises MigrationError, StreamLost, StreamStopped, or what
        the loop raised; where the source can still go on by itself it has been told so."""
        try:
            self._begin()
            while not self._over:
                self._section()
        except StreamStopped:
            raise
        except PcshareError:
            self._refuse()
            raise

    def _begin(self) -> None:
        if self._stage is Stage.RECOVERY:
            self._open_return_path(None)
            return
        header = self._take(read_header())
        if header.target_page_bits is not None:
            _check_target_page(1 << header.target_page_bits)
        self._next = header.section_type
        self._loop.source_came(header)

    def _section(self) -> None:
        offset = self.offset
        found: SectionType | Command
        found = self._take(read_section_type()) if self._next is None else self._next
        self._next = None
        if found is SectionType.COMMAND:
            found = self._take(read_command())
        row = EXPECTED.get(found if isinstance(found, SectionType) else type(found))
        if row is None or self._stage not in row.stages:
            raise Wrong(f"{_name(found)} {self._stage.value}").at(offset)
        row.handle(self, found)

    def _refuse(self) -> None:
        """Before LISTEN the machine goes on where it was, if the source hears that it must. Later only another
        connection helps, and the source waits for that when this one breaks."""
        if self._can_answer and self._stage in (Stage.OPENING, Stage.PRECOPY):
            self._shut(FAILED)

    def _shut(self, status: int) -> None:
        with contextlib.suppress(PcshareError):  # who has gone needs no answer
            self._send(shut(status))
            if self._incoming.flush(LAST_WORDS_TIMEOUT_S):
                self._drain()

    def _drain(self) -> None:
        """Until the source closes, or for a while: what it has on its way is worth nothing."""
        until_s = time.monotonic() + LAST_WORDS_TIMEOUT_S
        while (left_s := until_s - time.monotonic()) > 0 and self._stream.read_some(DEVICE_STATE_READ_BYTES, left_s):
            pass

    def _send(self, message: bytes) -> None:
        """Of a connection that is broken the other direction tells, after what has come on it has been read."""
        try:
            send_message(self._incoming, message)
        except StreamLost as error:
            if error.errno != errno.ENOTCONN:
                raise

    # -- commands

    def _open_return_path(self, _: object) -> None:
        self._incoming.set_return_path(self._stream)
        self._can_answer = True

    def _ping(self, ping: Ping) -> None:
        if self._can_answer:
            self._send(pong(ping.value))

    def _advised(self, advise: PostcopyAdvise) -> None:
        _check_target_page(advise.target_page_size)
        self._advise = advise

    def _discard(self, discard: RamDiscard) -> None:
        self._require_advise("a discard")
        if not self._discarded:
            self._discarded = True
            self._loop.discard_begins()
        for start, length in discard.ranges:
            self._incoming.discard(discard.idstr, start, length)

    def _require_advise(self, what: str) -> None:
        if self._advise is None:
            raise Wrong(f"{what}, and no POSTCOPY_ADVISE came before").at(self.offset)
        if not self._can_answer:
            raise Wrong(f"{what}, and no return path on which pages could be asked for").at(self.offset)

    def _package(self, packaged: Packaged) -> None:
        self._require_advise("a package")
        offset = self.offset
        package = split_package(self.read(packaged.length), offset)
        self._loop.listen(package.device_state, is_all=False)
        self._stage = Stage.POSTCOPY
        self._send(pong(package.ping))
        self._loop.run()

    def _bitmap_wanted(self, wanted: RecvBitmapWanted) -> None:
        self._incoming.send_bitmap(wanted.idstr)

    def _resume(self, _: PostcopyResume) -> None:
        self._stage, self._deadline = Stage.POSTCOPY, None
        self._loop.resumed()
        self._send(resume_ack())
        self._incoming.resend()

    def _nothing(self, _: object) -> None:
        """What says nothing that matters here."""

    # -- sections

    def _ram_start(self, _: SectionType) -> None:
        start = self._take(read_ram_section_start())
        blocks = self._take(read_ram_blocks())
        self._take(read_footer(start.section_id))
        self._loop.announce(blocks, self._advise)
        self._ram.section_id, self._stage, self._deadline = start.section_id, Stage.PRECOPY, None

    def _ram_section(self, section: SectionType) -> None:
        self._take(read_section_id(self._ram.section_id))
        if self._stage is Stage.POSTCOPY:
            self._ram_sections(section)
            return
        if self._stream.records().why is not Why.END_OF_PAYLOAD:
            raise StreamLost("the source hung up in the middle of a section", errno=errno.ECONNRESET)
        self._take(read_footer(self._ram.section_id))
        self._ram.has_ended |= section is SectionType.END

    def _ram_sections(self, section: SectionType) -> None:
        """In post-copy the core goes from section to section: no page waits for Python."""
        end = self._stream.records(section, self._ram.section_id)
        if end.why is Why.EOF:
            raise StreamLost("the source hung up before its end", errno=errno.ECONNRESET)
        self._ram.has_ended |= end.saw_end
        parser = read_section_type()
        next(parser)
        try:
            parser.send(U8.pack(end.section_type))
        except StopIteration as done:
            self._next = done.value
        except Wrong as wrong:
            raise wrong.at(end.offset - 1) from None

    def _device_state(self, full: SectionType) -> None:
        """Precopy only: everything from here on. Its end shows in what it is, and in nothing that says so."""
        if not self._ram.has_ended:
            raise Wrong("device state before the end of RAM").at(self.offset - 1)
        end = self._read_precopy_end(U8.pack(full))
        self._loop.listen(end.device_state, is_all=True)
        self._loop.run()
        self._finish()

    def _read_precopy_end(self, first: bytes) -> PrecopyEnd:
        """Each look for the end is at all that has come: not at every piece, which its sender may make as small as it
        likes, but when there is a quarter more, when it pauses and when it hangs up."""
        came, looked_at, quiet_s = bytearray(first), 0, DEVICE_STATE_QUIET_S
        while True:
            piece = self._read_piece(quiet_s if len(came) > looked_at else FOREVER)
            came += piece or b""
            if len(came) > PACKAGE_LENGTH_MAX:
                raise Wrong(f"more than {PACKAGE_LENGTH_MAX} bytes of device state").at(self.offset)
            if piece and len(came) < looked_at + looked_at // 4:
                continue
            since_s, looked_at = time.monotonic(), len(came)
            end = split_precopy_end(bytes(came), hung_up=piece == b"")
            if end is not None:
                return end
            if piece == b"":
                raise StreamLost("the source hung up in the middle of its device state", errno=errno.ECONNRESET)
            quiet_s = max(DEVICE_STATE_QUIET_S, DEVICE_STATE_LOOK_SHARE * (time.monotonic() - since_s))

    def _read_piece(self, timeout_s: float) -> bytes | None:
        """Empty: the source has closed; None: it pauses."""
        try:
            return self._stream.read_some(DEVICE_STATE_READ_BYTES, timeout_s)
        except StreamTimeout:
            return None

    def _end(self, _: SectionType) -> None:
        if not self._ram.has_ended:
            raise Wrong("the end of the stream before the end of RAM").at(self.offset - 1)
        self._finish()

    # -- the end

    def _finish(self) -> None:
        """The source is told that all is well when every byte is in its place, and not before."""
        self._over = True
        if not self._is_complete():
            missing = self._loop.missing_pages()
            self._shut(FAILED)
            raise SourceIncomplete(f"the source has ended, and {missing} pages never came", errno=errno.ENODATA)
        if self._can_answer:
            self._shut(GOOD)

    def _is_complete(self) -> bool:
        """Pages may still be on their way on the preempt channel."""
        before, since_s = self._loop.missing_pages(), time.monotonic()
        while not self._loop.wait_until_complete(LAST_PAGES_LOOK_S):
            missing = self._loop.missing_pages()
            if missing != before:
                before, since_s = missing, time.monotonic()
            elif time.monotonic() - since_s > LAST_PAGES_TIMEOUT_S:
                return False
        return self._loop.missing_pages() == 0


def send_message(incoming: Incoming, message: bytes) -> None:
    """On the return path. StreamLost: there is none."""
    kind, length = RETURN_HEADER.unpack_from(message)
    incoming.send(kind, message[RETURN_HEADER.size : RETURN_HEADER.size + length])


class SourceIncomplete(SourceError):
    """The source says that it has sent everything, and it has not."""


@dataclass(frozen=True)
class _Row:
    """When something may come, and who reads on from there."""

    stages: frozenset[Stage]
    handle: Callable[[Reception, object], None]


def _row(handle: Callable[..., None], *stages: Stage) -> _Row:
    return _Row(frozenset(stages), handle)


EXPECTED: dict[SectionType | type[Command], _Row] = {
    OpenReturnPath: _row(Reception._open_return_path, Stage.OPENING, Stage.RECOVERY),
    Ping: _row(Reception._ping, *Stage),
    PostcopyAdvise: _row(Reception._advised, Stage.OPENING),
    RamDiscard: _row(Reception._discard, Stage.PRECOPY),
    Packaged: _row(Reception._package, Stage.PRECOPY),
    SwitchoverStart: _row(Reception._nothing, Stage.PRECOPY),
    RecvBitmapWanted: _row(Reception._bitmap_wanted, Stage.RECOVERY),
    PostcopyResume: _row(Reception._resume, Stage.RECOVERY),
    SectionType.START: _row(Reception._ram_start, Stage.OPENING),
    SectionType.PART: _row(Reception._ram_section, Stage.PRECOPY, Stage.POSTCOPY),
    SectionType.END: _row(Reception._ram_section, Stage.PRECOPY, Stage.POSTCOPY),
    SectionType.FULL: _row(Reception._device_state, Stage.PRECOPY),
    SectionType.EOF: _row(Reception._end, Stage.POSTCOPY),
}


def _name(found: SectionType | Command) -> str:
    return f"a section {found.name}" if isinstance(found, SectionType) else f"the command {type(found).__name__}"


def _check_target_page(size: int) -> None:
    if size != TARGET_PAGE_SIZE:
        raise MigrationError(
            f"the source's target pages have {size} bytes; only those of {TARGET_PAGE_SIZE} are taken here",
            errno=errno.EPROTONOSUPPORT,
        )
