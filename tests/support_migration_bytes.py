"""The bytes of a migration stream, written out for tests with their numbers: one that is wrong elsewhere shows.

Has every place where a source writes something (PLACES), and what is illegal there (ILLEGAL). Sends nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TARGET_PAGE = 4096
RAM_ID = 3  # of the RAM section

PLACES = (
    "header",  # magic, version
    "configuration",  # machine and subsections
    "open-return-path",
    "ping",
    "advise",
    "ram-start",  # type to version
    "ram-length",
    "block",  # one in the list
    "blocks-end",
    "part",  # type and id of a PART
    "record",
    "end-of-payload",
    "footer",
    "switchover-start",  # without post-copy; with it, it is in the package
    "discard",
    "packaged",  # the command; its length is right whatever is in the package
    "listen",  # in the package, as the next three
    "device-state",
    "package-ping",
    "run",
    "ram-end",  # type and id of END
    "eof",
    "description",
    "bitmap-wanted",
    "resume",
    "preempt-record",  # on the preempt channel
    "preempt-end",
)

Tamper = Callable[[bytes], bytes]


def instead_of(data: bytes) -> Tamper:
    return lambda _: data


def before(data: bytes) -> Tamper:
    return lambda right: data + right


def after(data: bytes) -> Tamper:
    return lambda right: right + data


# -- layouts


def name(idstr: str) -> bytes:
    return bytes([len(idstr.encode())]) + idstr.encode()


def command(number: int, payload: bytes = b"") -> bytes:
    return struct.pack(">BHH", 0x08, number, len(payload)) + payload


def section(section_type: int, section_id: int, idstr: str, instance: int, version: int) -> bytes:
    """START or FULL up to its payload."""
    return struct.pack(">BI", section_type, section_id) + name(idstr) + struct.pack(">II", instance, version)


def footer(section_id: int) -> bytes:
    return struct.pack(">BI", 0x7E, section_id)


def subsection(idstr: str, fields: bytes, version: int = 1) -> bytes:
    return b"\x05" + name(idstr) + struct.pack(">I", version) + fields


def capabilities(names: Sequence[str]) -> bytes:
    """The configuration's subsection."""
    return subsection("configuration/capabilities", struct.pack(">I", len(names)) + b"".join(map(name, names)))


def configuration(machine: str, *subsections: bytes) -> bytes:
    return b"\x07" + struct.pack(">I", len(machine)) + machine.encode() + b"".join(subsections)


def record(offset: int, content: bytes, idstr: str | None, fill: int | None = None) -> bytes:
    """A page record; idstr None: of the block of the record before; fill: one byte instead of the content."""
    flags = (0x08 if fill is None else 0x02) | (0x20 if idstr is None else 0)
    head = struct.pack(">Q", offset | flags) + (b"" if idstr is None else name(idstr))
    return head + (content if fill is None else bytes([fill]))


def device_section(section_id: int, idstr: str, payload: bytes) -> bytes:
    return section(0x04, section_id, idstr, 0, 1) + payload + footer(section_id)


END_OF_PAYLOAD = struct.pack(">Q", 0x10)
# With bytes in it that look like an end, a description, a footer.
DEVICE_STATE = device_section(7, "timer", bytes(24)) + device_section(
    9, "cpu", b"\x00\x06\x00\x00\x00\x02{}" + footer(9) + b"\x00" + bytes(range(256)) + b"\x00\x06"
)
DESCRIPTION = b'{"configuration": {"vmsd_name": "configuration"}, "page_size": 4096, "devices": [{"name": "cpu"}]}'


# -- what no receiver may take


@dataclass(frozen=True)
class Illegal:
    """Something to write at a place; words: what a receiver says of it at least, all lower case."""

    place: str
    tamper: Tamper
    words: str
    precopy: bool = True  # can be tried in a migration without post-copy
    postcopy: bool = True


def _u64(number: int) -> bytes:
    return struct.pack(">Q", number)


def _add_flags(flags: int) -> Tamper:
    """To the record that is right."""
    return lambda right: _u64(int.from_bytes(right[:8], "big") | flags) + right[8:]


ILLEGAL: dict[str, Illegal] = {
    # header and configuration
    "another magic": Illegal("header", instead_of(b"GET / HT"), "no migration"),
    "another version": Illegal("header", instead_of(b"QEVM\0\0\0\x02"), "version is 2"),
    "no configuration": Illegal("configuration", instead_of(b"\x01"), "no configuration"),
    "a machine without a name": Illegal("configuration", instead_of(b"\x07\0\0\0\0"), "machine's name"),
    "a machine's name without an end": Illegal("configuration", instead_of(b"\x07\xff\xff\xff\xff"), "machine's name"),
    "a machine's name that cannot be printed": Illegal(
        "configuration", instead_of(configuration("a\x1b[2J")), "printed"
    ),
    "an unknown subsection": Illegal("configuration", after(subsection("configuration/x", b"")), "configuration/x"),
    "a subsection twice": Illegal("configuration", after(2 * capabilities([])), "twice"),
    "a subsection's version": Illegal(
        "configuration", after(subsection("configuration/uuid", bytes(16), 2)), "version 2"
    ),
    "too many capabilities": Illegal(
        "configuration", after(subsection("configuration/capabilities", b"\xff\xff\xff\xff")), "4294967295"
    ),
    "multifd announced": Illegal("configuration", after(capabilities(["multifd"])), "capability multifd"),
    "x-ignore-shared announced": Illegal("configuration", after(capabilities(["x-ignore-shared"])), "x-ignore-shared"),
    "target pages of a byte": Illegal(
        "configuration", after(subsection("configuration/target-page-bits", bytes(4))), "2^0"
    ),
    # sections
    "an unknown section": Illegal("ram-start", before(b"\x55"), "0x55"),
    "another section's START": Illegal("ram-start", instead_of(section(1, 3, "slirp", 0, 4)), "slirp"),
    "dirty bitmaps": Illegal("ram-start", instead_of(section(1, 3, "dirty-bitmap", 0, 1)), "dirty-bitmaps"),
    "another version of RAM": Illegal("ram-start", instead_of(section(1, 3, "ram", 0, 3)), "version 3"),
    "another section's PART": Illegal("part", instead_of(b"\x02\0\0\0\x63"), "99"),
    "no footer": Illegal("footer:0", instead_of(b"\x02\0\0\0\x03"), "footer"),
    "another section's footer": Illegal("footer:1", instead_of(footer(4)), "footer"),
    "RAM START twice": Illegal("part:0", before(section(1, 3, "ram", 0, 4)), ""),
    "a subsection where a section should be": Illegal("part:0", before(b"\x05"), ""),
    # blocks
    "memory of no length": Illegal("ram-length", instead_of(_u64(4)), "0 bytes of memory"),
    "blocks longer than all": Illegal("ram-length", instead_of(_u64(4096 | 4)), "leaves 4096"),
    "a page instead of the blocks": Illegal("ram-length", instead_of(_u64(8)), "flags 0x8"),
    "rdma instead of the blocks": Illegal("ram-length", instead_of(_u64(0x80)), "rdma"),
    "a block without a name": Illegal("block:0", instead_of(b"\0"), "empty"),
    "a block twice": Illegal("block:0", lambda right: right + right, ""),
    "a block's odd length": Illegal("block:0", instead_of(name("pc.ram") + _u64(4097)), "4097"),
    "a block of no length": Illegal("block:0", instead_of(name("pc.ram") + _u64(0)), "0 bytes"),
    "a block's page size": Illegal("block:0", after(_u64(12288)), "12288"),
    "a block with a name that is no text": Illegal("block:0", instead_of(b"\x02\xff\xfe"), "utf-8"),
    "no end of the blocks": Illegal("blocks-end", instead_of(_u64(0x20)), "end of the list"),
    # commands
    "an unknown command": Illegal("ping:0", before(command(77)), "command 77"),
    "colo": Illegal("ping:0", before(command(8)), "x-colo"),
    "a ping of two bytes": Illegal("ping:0", before(command(2, b"\0\0")), "2 bytes of payload"),
    "a ping without an end": Illegal("ping:0", instead_of(b"\x08\0\x02\xff\xff"), "65535 bytes"),
    "advise without memory": Illegal("advise", instead_of(command(3)), "dirty-bitmaps", precopy=False),
    "advise of odd pages": Illegal("advise", instead_of(command(3, _u64(4096) + _u64(3))), "3 bytes", precopy=False),
    "advise of pages of no size": Illegal(
        "advise", instead_of(command(3, _u64(0) + _u64(4096))), "(ored)", precopy=False
    ),
    "a discard's version": Illegal("discard:0", before(command(6, b"\1" + bytes(20))), "version 1", precopy=False),
    "a discard of nothing": Illegal(
        "discard:0", before(command(6, b"\0" + name("a" * 30) + b"\0")), "ram_discard", precopy=False
    ),
    "a discard with half a range": Illegal("discard:0", before(command(6, bytes(28))), "ram_discard", precopy=False),
    "a discard of an unknown block": Illegal(
        "discard:0", before(command(6, b"\0" + name("nobody") + b"\0" + _u64(0) + _u64(4096))), "nobody", precopy=False
    ),
    "a discard outside the block": Illegal(
        "discard:0",
        before(command(6, b"\0" + name("pc.ram") + b"\0" + _u64(1 << 40) + _u64(4096))),
        "pc.ram",
        precopy=False,
    ),
    "a discard that wraps around": Illegal(
        "discard:0",
        before(command(6, b"\0" + name("pc.ram") + b"\0" + _u64((1 << 64) - 4096) + _u64(8192))),
        "pc.ram",
        precopy=False,
    ),
    "a discard of half a page": Illegal(
        "discard:0", before(command(6, b"\0" + name("pc.ram") + b"\0" + _u64(0) + _u64(2048))), "pc.ram", precopy=False
    ),
    "a package without an end": Illegal(
        "packaged", instead_of(b"\x08\0\x07\0\x04\xff\xff\xff\xff"), "4294967295", precopy=False
    ),
    "a package of nothing": Illegal("packaged", instead_of(b"\x08\0\x07\0\x04\0\0\0\0"), "too early", precopy=False),
    "a package without LISTEN": Illegal("listen", instead_of(command(5)), "listen", precopy=False),
    "a package without RUN": Illegal("run", instead_of(b""), "package", precopy=False),
    "a package without PING": Illegal("package-ping", instead_of(command(9)), "package", precopy=False),
    # records: of all, the first of the stream
    "a record of an unknown block": Illegal("record:0", before(record(0, bytes(TARGET_PAGE), "nobody")), "nobody"),
    "a record of the block before, of which there is none": Illegal(
        "record:0", before(record(0, bytes(TARGET_PAGE), None)), ""
    ),
    "a record outside its block": Illegal("record:0", before(record(1 << 40, bytes(TARGET_PAGE), "pc.ram")), "pc.ram"),
    "a record without flags": Illegal("record:0", before(_u64(0)), ""),
    "a record that is zero and page": Illegal("record:0", _add_flags(0x0A), ""),
    "a record with an unknown flag": Illegal("record:0", before(_u64(0x400 | 0x08)), ""),
    "memory's length among the records": Illegal("record:0", before(_u64(4096 | 4)), ""),
    "a record of xbzrle": Illegal("record:0", before(_u64(0x40) + name("pc.ram")), "xbzrle"),
    "a record of rdma": Illegal("record:0", before(_u64(0x80)), "rdma"),
    "a compressed record": Illegal("record:0", before(_u64(0x100) + name("pc.ram")), "compress"),
    "a record of multifd": Illegal("record:0", before(_u64(0x200)), "multifd"),
    "an end of payload with an offset": Illegal("end-of-payload:0", instead_of(_u64(0x1010)), ""),
}
