"""wire: the numbers, layouts and messages of a migration stream, and how a parser gets its bytes. No I/O.

Integers are big endian, except in the bitmaps of a recovery. Names are u8 length and bytes, without a NUL. No section
says how long it is: whoever does not know its content cannot skip it.

A parser is a generator that yields how many bytes it wants next and returns what they mean; take() runs one against a
stream. It never asks for more than the limits here, and what the format does not allow is one MigrationError that says
what, and at which byte of the stream.
"""

from __future__ import annotations

import errno as errno_codes
import struct
from collections.abc import Generator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Protocol, TypeAlias, TypeVar

from pcshare.errors import MigrationError

STREAM_MAGIC = 0x5145564D  # "QEVM"
MULTIFD_MAGIC = 0x11223344  # how each further connection of multifd begins
STREAM_VERSION = 3
RAM_IDSTR = "ram"
RAM_INSTANCE = 0
RAM_VERSION = 4
BITMAP_END = 0x0123456789ABCDEF  # after the bitmap of a RECV_BITMAP
RESUME_VALUE = 1  # of RESUME_ACK
PACKAGE_PING = 3  # the one in the package: its PONG tells the source that the device state is in

NAME_LENGTH_MAX = 255  # a u8 says how long it is
CAPABILITIES_MAX = 64  # in its list; QEMU has some twenty
BLOCKS_MAX = 4096  # in a RAM START: memory slots and ROMs of a machine are a few dozen
MEMORY_LENGTH_MAX = 1 << 56  # all blocks together: more than any address space
PAGE_SIZE_MIN = 4096  # of a block; below it a number after a block's length is no page size
DISCARD_RANGES_MAX = 12  # in one message
PACKAGE_LENGTH_MAX = 256 << 20  # device state is some hundred KiB, with a graphics card some MiB
DESCRIPTION_LENGTH_MAX = 16 << 20  # a VMDESC, JSON of some ten KiB
RETURN_PAYLOAD_MAX = 512  # a message on the return path

U8 = struct.Struct(">B")
U16 = struct.Struct(">H")
U32 = struct.Struct(">I")
U64 = struct.Struct(">Q")
FILE_HEADER = struct.Struct(">II")  # STREAM_MAGIC, STREAM_VERSION
SECTION_NUMBERS = struct.Struct(">II")  # after a section's name: instance, version
COMMAND_HEADER = struct.Struct(">HH")  # after the type: CommandType, length of the payload
ADVISE = struct.Struct(">QQ")  # OR of the blocks' page sizes, target page size
DISCARD_RANGE = struct.Struct(">QQ")  # start, length, bytes
RETURN_HEADER = struct.Struct(">HH")  # ReturnType, length of the payload
REQUEST = struct.Struct(">QI")  # start, length, bytes


class SectionType(IntEnum):
    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    VMDESC = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class RecordFlag(IntFlag):
    """The low bits of a record's first eight bytes; the others are the page's offset."""

    ZERO = 0x02
    MEM_SIZE = 0x04
    PAGE = 0x08
    EOS = 0x10  # end of payload
    CONTINUE = 0x20  # no name follows: the block of the record before
    XBZRLE = 0x40
    RDMA = 0x80
    COMPRESSED = 0x100
    MULTIFD = 0x200


class CommandType(IntEnum):
    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11  # 10.0 and later


class ReturnType(IntEnum):
    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6


class ConnectionKind(IntEnum):
    """What a new connection is, as its first byte tells."""

    MIGRATION = 0  # a header: a new migration
    RECOVERY = 1  # no header, a command: an old one goes on
    PREEMPT = 2  # bare page records
    MULTIFD = 3  # packets of pages, which nobody here reads


_KIND_OF_FIRST_BYTE = {
    STREAM_MAGIC >> 24: ConnectionKind.MIGRATION,
    SectionType.COMMAND: ConnectionKind.RECOVERY,
    0: ConnectionKind.PREEMPT,  # of an offset: no block reaches MEMORY_LENGTH_MAX
    MULTIFD_MAGIC >> 24: ConnectionKind.MULTIFD,
}


def connection_kind(first_byte: int) -> ConnectionKind | None:
    """None: a peer that speaks something else."""
    return _KIND_OF_FIRST_BYTE.get(first_byte)


# -- what sections say


@dataclass(frozen=True)
class Header:
    """How a stream begins, and the type of the first section, which has been read to find where the header ends.

    target_page_bits, uuid, capabilities: None where the source does not say."""

    machine: str
    capabilities: tuple[str, ...] | None
    uuid: bytes | None
    target_page_bits: int | None
    section_type: SectionType


@dataclass(frozen=True)
class SectionStart:
    """What a START or FULL section says of itself."""

    section_id: int
    idstr: str
    instance: int
    version: int


@dataclass(frozen=True)
class Announcement:
    """A block of RAM START. page_size, bytes, None: the host's, or nobody wants to know because post-copy is off."""

    idstr: str
    used_length: int
    page_size: int | None


# -- commands


@dataclass(frozen=True)
class OpenReturnPath:
    """The other direction of the socket is open from now on."""


@dataclass(frozen=True)
class Ping:
    """To be answered with a PONG of the same value."""

    value: int


@dataclass(frozen=True)
class PostcopyAdvise:
    """Post-copy may follow. page_sizes: of all blocks, ORed; both in bytes."""

    page_sizes: int
    target_page_size: int


@dataclass(frozen=True)
class PostcopyListen:
    """From here on pages are placed atomically."""


@dataclass(frozen=True)
class PostcopyRun:
    """The machine is to run here; comes at the end of a package."""


@dataclass(frozen=True)
class RamDiscard:
    """Ranges of a block to forget: (start, length) in bytes, at most DISCARD_RANGES_MAX of them, none empty."""

    idstr: str
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Packaged:
    """So many bytes follow, a stream of their own: split_package() knows them."""

    length: int


@dataclass(frozen=True)
class PostcopyResume:
    """A recovery is done with its bitmaps; to be answered with RESUME_ACK."""


@dataclass(frozen=True)
class RecvBitmapWanted:
    """To be answered with the received bitmap of a block."""

    idstr: str


@dataclass(frozen=True)
class SwitchoverStart:
    """The source's machine stands still; device state follows."""


Command: TypeAlias = (
    OpenReturnPath
    | Ping
    | PostcopyAdvise
    | PostcopyListen
    | PostcopyRun
    | RamDiscard
    | Packaged
    | PostcopyResume
    | RecvBitmapWanted
    | SwitchoverStart
)


@dataclass(frozen=True)
class Package:
    """What a PACKAGED holds: the device state's opaque bytes, and the value to PONG."""

    device_state: bytes
    ping: int


# -- how a parser gets its bytes

T = TypeVar("T")
Parser: TypeAlias = Generator[int, bytes, T]


class Stream(Protocol):
    """Where bytes come from."""

    @property
    def offset(self) -> int:
        """Of the next byte, counted from the stream's first."""

    def read(self, count: int) -> bytes:
        """Exactly so many bytes, or raises."""


class Wrong(Exception):
    """What a parser raises at a byte that the format does not allow; take() turns it into a MigrationError."""

    def __init__(self, text: str, *, errno: int = errno_codes.EPROTO, hint: str | None = None) -> None:
        super().__init__(text)
        self.errno = errno
        self.hint = hint

    def at(self, offset: int) -> MigrationError:
        text = f"the migration stream is not as it should be: byte {offset}: {self}"
        return MigrationError(text, errno=self.errno, hint=self.hint, offset=offset)


class Unsupported(Wrong):
    """A stream that uses what is not done here; names the capability that the source is to switch off."""

    def __init__(self, what: str, capability: str) -> None:
        super().__init__(
            f"{what}, which is not done here",
            errno=errno_codes.EPROTONOSUPPORT,
            hint=f"switch off the capability {capability} at the source (migrate_set_capability {capability} off)",
        )


def take(stream: Stream, parser: Parser[T]) -> T:
    """Runs a parser against a stream. MigrationError's offset is where the piece that is wrong begins."""
    offset = stream.offset
    try:
        count = next(parser)
        while True:
            offset = stream.offset
            count = parser.send(stream.read(count))
    except StopIteration as done:
        result: T = done.value
        return result
    except Wrong as wrong:
        raise wrong.at(offset) from None


class BytesStream:
    """Bytes at hand as a stream; offset: of the first of them in the stream that they come from."""

    def __init__(self, data: bytes, offset: int = 0) -> None:
        self._data = memoryview(data)
        self._base = offset
        self._taken = 0

    @property
    def offset(self) -> int:
        return self._base + self._taken

    @property
    def left(self) -> int:
        """Bytes that have not been read."""
        return len(self._data) - self._taken

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise Wrong(f"it ends {count - self.left} bytes too early").at(self.offset + self.left)
        taken = bytes(self._data[self._taken : self._taken + count])
        self._taken += count
        return taken


# -- pieces that all parsers need


def text_of(data: bytes, what: str) -> str:
    """A name of the peer's: UTF-8 that is harmless for a terminal, and not empty."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Wrong(f"{what} is not UTF-8: {data!r}") from None
    if not text.isprintable():
        raise Wrong(f"{what} has characters that cannot be printed: {data!r}")
    if not text:
        raise Wrong(f"{what} is empty")
    return text


def name_bytes(idstr: str) -> bytes:
    """A name with its length in front."""
    encoded = idstr.encode()
    return U8.pack(len(encoded)) + encoded


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
