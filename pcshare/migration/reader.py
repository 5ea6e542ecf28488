"""reader: what a receiver reads of a migration stream: parsers for everything but page records.

Whatever a peer sends is either what it means or a MigrationError. What is not done here (xbzrle, compression, multifd,
rdma, ignore-shared, COLO) is refused by the name of the capability that the source is to switch off. Whether a message
is right at this moment of a migration is for whoever reads it to say.

Some facts about the format:
 - That the configuration ends, and that a block of RAM START has a page size, shows only in the byte that follows.
   Hence read_header() takes the type of the first section too.
 - The device state of a precopy stream has no length, and with a return path the source waits for an answer before it
   closes: split_precopy_end() finds the end by the description that ends the stream.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass

from pcshare.migration.wire import (
    ADVISE,
    BLOCKS_MAX,
    CAPABILITIES_MAX,
    COMMAND_HEADER,
    DESCRIPTION_LENGTH_MAX,
    DISCARD_RANGE,
    DISCARD_RANGES_MAX,
    FILE_HEADER,
    MEMORY_LENGTH_MAX,
    NAME_LENGTH_MAX,
    PACKAGE_LENGTH_MAX,
    PAGE_SIZE_MIN,
    RAM_IDSTR,
    RAM_INSTANCE,
    RAM_VERSION,
    SECTION_NUMBERS,
    STREAM_MAGIC,
    STREAM_VERSION,
    U8,
    U32,
    Announcement,
    BytesStream,
    Command,
    CommandType,
    Header,
    OpenReturnPath,
    Package,
    Packaged,
    Parser,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamDiscard,
    RecordFlag,
    RecvBitmapWanted,
    SectionStart,
    SectionType,
    SwitchoverStart,
    Unsupported,
    Wrong,
    is_power_of_two,
    take,
    text_of,
)

UUID_LENGTH = 16
TARGET_PAGE_BITS_MIN = 10
TARGET_PAGE_BITS_MAX = 30
OFFSET_MASK = ~(PAGE_SIZE_MIN - 1)

# What a source may announce without sending anything that is not done here.
CAPABILITIES = frozenset(
    {
        "auto-converge",
        "dirty-limit",
        "events",
        "late-block-activate",
        "pause-before-switchover",
        "postcopy-blocktime",
        "postcopy-preempt",
        "postcopy-ram",
        "release-ram",
        "return-path",
        "validate-uuid",
        "zero-blocks",
    }
)
# Flags of records that are not done here: what the source does, and the capability that makes it do it.
_UNSUPPORTED_FLAGS = {
    RecordFlag.XBZRLE: ("the source sends differences between pages (xbzrle)", "xbzrle"),
    RecordFlag.RDMA: ("the source migrates by RDMA", "rdma-pin-all"),
    RecordFlag.COMPRESSED: ("the source compresses pages", "compress"),
    RecordFlag.MULTIFD: ("the source sends pages on several connections (multifd)", "multifd"),
}


# -- pieces


def _number(size: int = 8) -> Parser[int]:
    return int.from_bytes((yield size), "big")


def _named(what: str) -> Parser[str]:
    """u8 length, name."""
    length = yield from _number(1)
    return text_of((yield length) if length else b"", what)


def _section_type(number: int) -> SectionType:
    try:
        return SectionType(number)
    except ValueError:
        raise Wrong(f"{number:#04x} is no type of a section") from None


# -- header and configuration


def read_header() -> Parser[Header]:
    """From a stream's first byte to the type of its first section."""
    magic, version = FILE_HEADER.unpack((yield FILE_HEADER.size))
    if magic != STREAM_MAGIC:
        raise Wrong(f"it begins with {magic:#010x} instead of {STREAM_MAGIC:#010x}: this is no migration")
    if version != STREAM_VERSION:
        raise Wrong(f"its version is {version}, not {STREAM_VERSION}")
    if (yield from _number(1)) != SectionType.CONFIGURATION:
        raise Wrong("it has no configuration", hint="give the source's machine type a version of 2.4 or later")
    length = yield from _number(4)
    if not 0 < length <= NAME_LENGTH_MAX:
        raise Wrong(f"the machine's name has {length} bytes, not 1 to {NAME_LENGTH_MAX}")
    machine = text_of((yield length), "the machine's name")
    found = _Subsections()
    while (number := (yield from _number(1))) == SectionType.SUBSECTION:
        yield from found.read_one()
    return Header(machine, found.capabilities, found.uuid, found.target_page_bits, _section_type(number))


class _Subsections:
    """The configuration's subsections, each there once or not at all."""

    def __init__(self) -> None:
        self.capabilities: tuple[str, ...] | None = None
        self.uuid: bytes | None = None
        self.target_page_bits: int | None = None
        self._seen: set[str] = set()
        self._parsers: dict[str, Callable[[], Parser[None]]] = {
            "configuration/capabilities": self._read_capabilities,
            "configuration/uuid": self._read_uuid,
            "configuration/target-page-bits": self._read_target_page_bits,
        }

    def read_one(self) -> Parser[None]:
        name = yield from _named("a subsection's name")
        parser = self._parsers.get(name)
        if parser is None or name in self._seen:
            raise Wrong(f"the configuration has {name} {'twice' if parser else 'which nobody here knows'}")
        self._seen.add(name)
        if (version := (yield from _number(4))) != 1:
            raise Wrong(f"the configuration's {name} has version {version}, not 1")
        yield from parser()

    def _read_capabilities(self) -> Parser[None]:
        count = yield from _number(4)
        if count > CAPABILITIES_MAX:
            raise Wrong(f"{count} capabilities, more than {CAPABILITIES_MAX}")
        names = []
        for _ in range(count):
            name = yield from _named("a capability's name")
            if name not in CAPABILITIES:
                raise Unsupported(f"the source announces the capability {name}", name)
            names.append(name)
        self.capabilities = tuple(names)

    def _read_uuid(self) -> Parser[None]:
        self.uuid = yield UUID_LENGTH

    def _read_target_page_bits(self) -> Parser[None]:
        bits = yield from _number(4)
        if not TARGET_PAGE_BITS_MIN <= bits <= TARGET_PAGE_BITS_MAX:
            raise Wrong(f"target pages of 2^{bits} bytes")
        self.target_page_bits = bits


# -- sections


def read_section_type() -> Parser[SectionType]:
    return _section_type((yield from _number(1)))


def read_section_start() -> Parser[SectionStart]:
    """What follows the type of a START or FULL section."""
    section_id = yield from _number(4)
    idstr = yield from _named("a section's name")
    return SectionStart(section_id, idstr, *SECTION_NUMBERS.unpack((yield SECTION_NUMBERS.size)))


def read_ram_section_start() -> Parser[SectionStart]:
    """The same of a START section: there is only one that means anything here."""
    start = yield from read_section_start()
    if start.idstr != RAM_IDSTR:
        capability = {"dirty-bitmap": "dirty-bitmaps", "block": "block"}.get(start.idstr)
        if capability:
            raise Unsupported(f"the source sends the section {start.idstr!r}", capability)
        raise Wrong(
            f"the source sends the section {start.idstr!r} besides RAM: a device that migrates by itself",
            hint="take that device out of the source's machine",
        )
    if (start.instance, start.version) != (RAM_INSTANCE, RAM_VERSION):
        raise Wrong(f"the RAM section has instance {start.instance}, version {start.version}: not 0, {RAM_VERSION}")
    return start


def read_section_id(expected: int) -> Parser[None]:
    """What follows the type of a PART or END section; expected: the id that START gave to RAM."""
    found = yield from _number(4)
    if found != expected:
        raise Wrong(f"a section has the id {found}; RAM has {expected}, and nothing else comes in parts")


def read_footer(section_id: int) -> Parser[None]:
    """A whole footer."""
    data = yield U8.size + U32.size
    if data[0] != SectionType.FOOTER:
        raise Wrong(f"section {section_id} has no footer but {data[0]:#04x}")
    (found,) = U32.unpack(data[1:])
    if found != section_id:
        raise Wrong(f"section {section_id} ends with the footer of section {found}")


# -- RAM START


def read_ram_blocks() -> Parser[tuple[Announcement, ...]]:
    """The payload of RAM START, up to and with its end mark."""
    length_left = yield from _memory_length()
    blocks: dict[str, Announcement] = {}
    name_length = yield from _number(1)
    while True:
        idstr = yield from _block_name(name_length, blocks)
        used_length = yield from _used_length(idstr, length_left)
        length_left -= used_length
        if not length_left:
            page_size = yield from _last_page_size(idstr, used_length)
            blocks[idstr] = Announcement(idstr, used_length, page_size)
            return tuple(blocks.values())
        page_size, name_length = yield from _page_size(idstr, used_length)
        blocks[idstr] = Announcement(idstr, used_length, page_size)


def _memory_length() -> Parser[int]:
    number = yield from _number()
    flags = number & ~OFFSET_MASK
    if flags != RecordFlag.MEM_SIZE:
        raise _unexpected_flags(flags, "the length of memory")
    if not 0 < number & OFFSET_MASK <= MEMORY_LENGTH_MAX:
        raise Wrong(f"the source announces {number & OFFSET_MASK} bytes of memory")
    return number & OFFSET_MASK


def _unexpected_flags(flags: int, expected: str) -> Wrong:
    for flag, (what, capability) in _UNSUPPORTED_FLAGS.items():
        if flags & flag:
            return Unsupported(what, capability)
    return Wrong(f"a record with the flags {flags:#x} where {expected} should be")


def _block_name(length: int, known: dict[str, Announcement]) -> Parser[str]:
    if len(known) >= BLOCKS_MAX:
        raise Wrong(f"more than {BLOCKS_MAX} blocks")
    idstr = text_of((yield length) if length else b"", "a block's name")
    if idstr in known:
        raise Wrong(f"block {idstr} is announced twice")
    return idstr


def _used_length(idstr: str, length_left: int) -> Parser[int]:
    used_length = yield from _number()
    if not used_length or used_length % PAGE_SIZE_MIN:
        raise Wrong(f"block {idstr} has {used_length} bytes: not a multiple of {PAGE_SIZE_MIN}")
    if used_length > length_left:
        raise Wrong(f"block {idstr} has {used_length} bytes; all that is announced leaves {length_left} for it")
    return used_length


def _checked_page_size(idstr: str, used_length: int, page_size: int) -> int:
    if page_size < PAGE_SIZE_MIN or not is_power_of_two(page_size):
        raise Wrong(f"block {idstr} has pages of {page_size} bytes")
    if used_length % page_size:
        raise Wrong(f"block {idstr} has {used_length} bytes, which is not a multiple of its page size {page_size}")
    return page_size


def _page_size(idstr: str, used_length: int) -> Parser[tuple[int | None, int]]:
    """After a block that is not the last: its page size where it has one, and the length of the next one's name."""
    number = yield from _number(1)
    if number:
        return None, number
    page_size = _checked_page_size(idstr, used_length, (yield from _number(7)))  # with the first byte, which is 0
    return page_size, (yield from _number(1))


def _last_page_size(idstr: str, used_length: int) -> Parser[int | None]:
    """After the last block: its page size where it has one, and the end mark."""
    number, page_size = (yield from _number()), None
    if number >= PAGE_SIZE_MIN:
        page_size = _checked_page_size(idstr, used_length, number)
        number = yield from _number()
    if number != RecordFlag.EOS:
        raise _unexpected_flags(number & ~OFFSET_MASK, "the end of the list of blocks")
    return page_size


# -- commands


@dataclass(frozen=True)
class _CommandShape:
    length_min: int
    length_max: int
    parse: Callable[[bytes], Command]


def read_command() -> Parser[Command]:
    """What follows the type of a COMMAND section; commands have no footer."""
    number, length = COMMAND_HEADER.unpack((yield COMMAND_HEADER.size))
    if number == CommandType.ENABLE_COLO:
        raise Unsupported("the source keeps two machines in step (COLO)", "x-colo")
    if number == CommandType.POSTCOPY_ADVISE and not length:
        raise Unsupported("the source announces a post-copy without memory", "dirty-bitmaps")
    shape = _COMMANDS.get(number)
    if shape is None:
        raise Wrong(f"command {number}, which nobody here knows")
    if not shape.length_min <= length <= shape.length_max:
        raise Wrong(f"command {CommandType(number).name} has {length} bytes of payload")
    return shape.parse((yield length) if length else b"")


def _parse_advise(payload: bytes) -> PostcopyAdvise:
    page_sizes, target_page_size = ADVISE.unpack(payload)
    if not is_power_of_two(target_page_size):
        raise Wrong(f"target pages of {target_page_size} bytes")
    if not page_sizes or page_sizes % target_page_size:
        raise Wrong(
            f"blocks with pages of {page_sizes:#x} bytes (ORed), which target pages of {target_page_size} leave no"
        )
    return PostcopyAdvise(page_sizes, target_page_size)


def _parse_discard(payload: bytes) -> RamDiscard:
    version, name_length = payload[0], payload[1]
    name_end = 2 + name_length
    if version != 0:
        raise Wrong(f"RAM_DISCARD has version {version}, not 0")
    ranges = payload[name_end + 1 :]
    if payload[name_end : name_end + 1] != b"\0" or not ranges or len(ranges) % DISCARD_RANGE.size:
        raise Wrong(f"RAM_DISCARD has {len(payload)} bytes of payload with a name of {name_length}")
    idstr = text_of(payload[2:name_end], "the name of a block to discard")
    found = tuple(DISCARD_RANGE.iter_unpack(ranges))
    if any(not length or start + length > MEMORY_LENGTH_MAX for start, length in found):
        raise Wrong(f"RAM_DISCARD of block {idstr} has an impossible range among {found}")
    return RamDiscard(idstr, found)


def _parse_packaged(payload: bytes) -> Packaged:
    (length,) = U32.unpack(payload)
    if length > PACKAGE_LENGTH_MAX:
        raise Wrong(f"a package of {length} bytes, more than {PACKAGE_LENGTH_MAX}")
    return Packaged(length)


def _parse_bitmap_wanted(payload: bytes) -> RecvBitmapWanted:
    if payload[0] != len(payload) - 1:
        raise Wrong(f"RECV_BITMAP has {len(payload)} bytes of payload with a name of {payload[0]}")
    return RecvBitmapWanted(text_of(payload[1:], "the name of a block whose bitmap is wanted"))


_DISCARD_MIN = 1 + 1 + 1 + 1 + DISCARD_RANGE.size  # version, length, a name of one byte, NUL, a range
_DISCARD_MAX = 1 + 1 + NAME_LENGTH_MAX + 1 + DISCARD_RANGES_MAX * DISCARD_RANGE.size

_COMMANDS: dict[int, _CommandShape] = {
    CommandType.OPEN_RETURN_PATH: _CommandShape(0, 0, lambda _: OpenReturnPath()),
    CommandType.PING: _CommandShape(4, 4, lambda payload: Ping(*U32.unpack(payload))),
    CommandType.POSTCOPY_ADVISE: _CommandShape(ADVISE.size, ADVISE.size, _parse_advise),
    CommandType.POSTCOPY_LISTEN: _CommandShape(0, 0, lambda _: PostcopyListen()),
    CommandType.POSTCOPY_RUN: _CommandShape(0, 0, lambda _: PostcopyRun()),
    CommandType.RAM_DISCARD: _CommandShape(_DISCARD_MIN, _DISCARD_MAX, _parse_discard),
    CommandType.PACKAGED: _CommandShape(4, 4, _parse_packaged),
    CommandType.POSTCOPY_RESUME: _CommandShape(0, 0, lambda _: PostcopyResume()),
    CommandType.RECV_BITMAP: _CommandShape(2, 1 + NAME_LENGTH_MAX, _parse_bitmap_wanted),
    CommandType.SWITCHOVER_START: _CommandShape(0, 0, lambda _: SwitchoverStart()),
}


# -- where device state is


def split_package(data: bytes, offset: int = 0) -> Package:
    """What a PACKAGED holds; offset: of its first byte in the stream, for the error.

    It begins with LISTEN, a SWITCHOVER_START before or after it, and ends with PING, RUN."""
    stream = BytesStream(data, offset)
    while not isinstance(take(stream, _packaged_command()), PostcopyListen):
        pass
    begin, end = len(data) - stream.left, len(data) - _PACKAGE_TAIL
    if data[begin : begin + len(_SWITCHOVER)] == _SWITCHOVER:
        begin += len(_SWITCHOVER)
    if end < begin:
        raise Wrong("the package does not end with PING and RUN").at(offset + begin)
    tail = BytesStream(data[end:], offset + end)
    ping, run = (take(tail, _packaged_command()) for _ in range(2))
    if not isinstance(ping, Ping) or not isinstance(run, PostcopyRun):
        raise Wrong("the package does not end with PING and RUN").at(offset + end)
    return Package(data[begin:end], ping.value)


_SWITCHOVER = U8.pack(SectionType.COMMAND) + COMMAND_HEADER.pack(CommandType.SWITCHOVER_START, 0)
_PACKAGE_TAIL = 2 * (U8.size + COMMAND_HEADER.size) + U32.size  # PING with its value, RUN


def _packaged_command() -> Parser[Command]:
    """A command with its type, of those that stand at a package's ends."""
    if (number := (yield from _number(1))) != SectionType.COMMAND:
        raise Wrong(f"a package with {number:#04x} where LISTEN, or PING and RUN, should be")
    command = yield from read_command()
    if not isinstance(command, PostcopyListen | SwitchoverStart | Ping | PostcopyRun):
        raise Wrong(f"a package with {command} in it")
    return command


@dataclass(frozen=True)
class PrecopyEnd:
    """How a precopy stream ends: the device state's opaque bytes, and the JSON that describes them where it is sent."""

    device_state: bytes
    description: bytes | None


def split_precopy_end(data: bytes, *, hung_up: bool = False) -> PrecopyEnd | None:
    """Whether data, everything from the type of the first FULL section on, is all that comes; None: not yet.

    hung_up: the source has closed. Only that tells the end of a stream without a description."""
    low = max(0, len(data) - DESCRIPTION_LENGTH_MAX)
    end = data.rfind(_EOF_AND_DESCRIPTION, low)
    while end >= 0:
        description = _description(data, end + len(_EOF_AND_DESCRIPTION)) if _ends_a_section(data, end) else None
        if description is not None:
            return PrecopyEnd(data[:end], description)
        end = data.rfind(_EOF_AND_DESCRIPTION, low, end)
    if hung_up and data[-1:] == _EOF and _ends_a_section(data, len(data) - 1):
        return PrecopyEnd(data[:-1], None)
    return None


_EOF = U8.pack(SectionType.EOF)
_FOOTER = U8.pack(SectionType.FOOTER)
_EOF_AND_DESCRIPTION = _EOF + U8.pack(SectionType.VMDESC)
_FOOTER_LENGTH = U8.size + U32.size


def _ends_a_section(data: bytes, end: int) -> bool:
    """Whether a footer stands before end, or nothing."""
    return not end or data[max(0, end - _FOOTER_LENGTH) :][:1] == _FOOTER


def _description(data: bytes, start: int) -> bytes | None:
    """The description whose length stands at start, if it reaches to the end."""
    length_end = start + U32.size
    if data[start:length_end] != U32.pack(len(data) - length_end & 0xFFFFFFFF) or len(data) < length_end:
        return None
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(json.loads(data[length_end:]), dict):
            return data[length_end:]
    return None
