"""wire: the numbers and layouts of NBD, each once. All integers are big-endian. No I/O.

The core's transmission phase has its own copy of the few it needs (core/nbd_connection.c); a test compares them.
"""

from __future__ import annotations

import errno
import struct
from enum import IntEnum, IntFlag

DEFAULT_PORT = 10809

# -- handshake

NBD_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9
OLDSTYLE_MAGIC = 0x00420281861253

HELLO = struct.Struct(">QQH")  # NBD_MAGIC, OPTION_MAGIC, handshake flags; from the server
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")  # OPTION_MAGIC, option, length of what follows
OPTION_REPLY = struct.Struct(">QIII")  # OPTION_REPLY_MAGIC, option, type, length of what follows
INFO_EXPORT = struct.Struct(">HQH")  # Info.EXPORT, size in bytes, transmission flags
INFO_BLOCK_SIZE = struct.Struct(">HIII")  # Info.BLOCK_SIZE, minimum, preferred, maximum payload; bytes
EXPORT_NAME_REPLY = struct.Struct(">QH")  # size, transmission flags; then 124 zeros unless NO_ZEROES
EXPORT_NAME_ZEROES = 124

NAME_LENGTH_MAX = 4096  # bytes of any string of the protocol
OPTION_LENGTH_MAX = 1 << 16  # nobody sends longer ones; a server that is asked to read more hangs up
OPTIONS_MAX = 64  # in one handshake: as many as a client with good manners could need

BASE_ALLOCATION = "base:allocation"

# A client must not send requests longer than this to a server that names no maximum.
PAYLOAD_MAX_DEFAULT = 32 << 20


class HandshakeFlag(IntFlag):
    """Of HELLO and CLIENT_FLAGS."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


ERROR_BIT = 1 << 31  # of an option reply's type


class OptionReply(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = ERROR_BIT + 1
    ERR_POLICY = ERROR_BIT + 2
    ERR_INVALID = ERROR_BIT + 3
    ERR_PLATFORM = ERROR_BIT + 4
    ERR_TLS_REQD = ERROR_BIT + 5
    ERR_UNKNOWN = ERROR_BIT + 6
    ERR_SHUTDOWN = ERROR_BIT + 7
    ERR_BLOCK_SIZE_REQD = ERROR_BIT + 8
    ERR_TOO_BIG = ERROR_BIT + 9


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    ROTATIONAL = 16
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    SEND_DF = 128
    CAN_MULTI_CONN = 256
    SEND_RESIZE = 512
    SEND_CACHE = 1024


# -- transmission

REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

REQUEST = struct.Struct(">IHHQQI")  # REQUEST_MAGIC, flags, Command, cookie, offset, length
SIMPLE_REPLY = struct.Struct(">IIQ")  # SIMPLE_REPLY_MAGIC, error, cookie; then the data of a read
CHUNK = struct.Struct(">IHHQI")  # STRUCTURED_REPLY_MAGIC, flags, Chunk, cookie, length of what follows
OFFSET = struct.Struct(">Q")  # begins OFFSET_DATA and ends ERROR_OFFSET
OFFSET_HOLE = struct.Struct(">QI")
CHUNK_ERROR = struct.Struct(">IH")  # error, length of the message that follows
CONTEXT_ID = struct.Struct(">I")  # begins BLOCK_STATUS
EXTENT = struct.Struct(">II")  # length, ExtentFlag

CHUNK_DONE = 1  # flag: the last chunk of a reply


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    FUA = 1
    NO_HOLE = 2
    DF = 4  # do not fragment
    REQ_ONE = 8


class Chunk(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


class ExtentFlag(IntFlag):
    """Of base:allocation. A reader may count on ZERO alone."""

    HOLE = 1
    ZERO = 2


# The errors that the protocol knows have Linux's numbers; any other number means EINVAL.
ERRORS = frozenset(
    {
        errno.EPERM,
        errno.EIO,
        errno.ENOMEM,
        errno.EINVAL,
        errno.ENOSPC,
        errno.EOVERFLOW,
        errno.ENOTSUP,
        errno.ESHUTDOWN,
    }
)


def error_from_wire(number: int) -> int:
    """The errno that an error number of a peer stands for."""
    return number if number in ERRORS else errno.EINVAL


def error_to_wire(number: int) -> int:
    """What to say for an errno; what the protocol has no number for is EIO."""
    return number if number in ERRORS else errno.EIO
