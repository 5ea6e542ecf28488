"""object_reader: what the provider wants of a library: ranges of one object that does not change.

Limits, words for what goes wrong, and the two ways in which a read can fail. Imports no library and does no I/O.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from typing import TypeAlias

from pcshare.errors import HostError, SourceError
from pcshare.sources.shown import shown

OPEN_TIMEOUT_S = 8.0  # until the object is known; the other side waits 20 s for the handshake, our start included
READ_TIMEOUT_S = 25.0  # of one read with all its retries, unless we are told another: the other side waits 30 s
READS_MAX = 16  # at once

INSTALL_HINT = "pip install 'pcshare[objects]'"

Content: TypeAlias = bytes | memoryview


class Outage(SourceError):
    """The store could not be asked; it may be back soon. Everything else that a read raises is final."""


class ObjectReader(ABC):
    """One object. size in bytes; identity: what the store says of this state of it, in words, the size among them; has
    it nothing but the size, is_vague."""

    size: int
    identity: str
    is_vague: bool

    @abstractmethod
    def read(self, offset: int, length: int) -> Content:
        """Exactly these bytes of the object as it was at the beginning; from many threads at once. Outage: the library
        has tried again for as long as it may. SourceError: it is another object now, or access was lost."""


def changed(url: str, then: str, now: str) -> SourceError:
    return SourceError(
        f"{shown(url)}: the object changed: it was {then}, and is {now}",
        errno=errno.EIO,
        hint="start again from the new object, and give objects that change new names",
    )


def shorter(url: str, offset: int, length: int, got: int) -> SourceError:
    return SourceError(
        f"{shown(url)}: {length} bytes from {offset} on were asked for and {got} came: "
        "the object changed, or the server knows no ranges",
        errno=errno.EIO,
    )


def empty(url: str) -> SourceError:
    return SourceError(f"{shown(url)}: the object is empty, and a block holds at least one byte", errno=errno.ENODATA)


def no_such_object(url: str) -> SourceError:
    return SourceError(
        f"{shown(url)}: no such object", errno=errno.ENOENT, hint="the name is taken literally, and its case counts"
    )


def package_missing(url: str, package: str) -> HostError:
    return HostError(f"{shown(url)}: needs the Python package {package}", errno=errno.ENOPKG, hint=INSTALL_HINT)
