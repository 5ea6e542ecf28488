"""PATH and file:PATH: a regular file of this host, raw or .npy.

Finds out what the file is, how long, and where its holes are; reads no more of it than a .npy header. The pages are
read by the core's channel. Some facts about files:
 - opening a pipe without O_NONBLOCK waits for a writer, and opening a device can act on it: look first, and look again
   at the fd;
 - a fd's position is shared by its duplicates: nothing here or in a channel may rely on it.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from pcshare.errors import SourceError
from pcshare.extents import data_within, gathered
from pcshare.fds import OwnedFd
from pcshare.sources.grammar import SOURCE_LENGTH_MAX, SourceSpec
from pcshare.sources.npy import NPY_HEAD_MAX, ArrayDescription, parse_npy
from pcshare.sources.opened import OpenedSource, SourceMemory

# A file with more data ranges than this is all fragments: the rest of it counts as data, which is slower and as right.
EXTENTS_MAX = 1 << 18

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
_CURES = {
    stat.S_IFDIR: "name a file in it, or pack it into one file first",
    stat.S_IFBLK: "copy what you need of it into a regular file first, for example with dd conv=sparse",
}
_CURE_OF_OTHERS = "sources are regular files: write what comes out of it into a file first"
_OPEN_HINTS = {
    errno.ENOENT: "relative paths count from the directory the command was started in",
    errno.ENOTDIR: "a directory of the path is a file",
    errno.ELOOP: "the path is a symbolic link that leads to itself",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class FileSource(OpenedSource):
    """A regular file, kept open from the beginning: what happens to its name afterwards does not matter."""

    def __init__(self, spec: SourceSpec, memory: SourceMemory | None = None, kept: OwnedFd | None = None) -> None:
        """memory: it was open before. kept: it still is; else its path must lead to the same file."""
        self._fd = open_regular(spec.target) if kept is None else kept.detach()
        try:
            if memory is not None:
                super().__init__(spec, memory.used_length, memory.extents, memory.array)
                if kept is None:
                    self._check_same(memory)
                return
            length = _checked_length(self._fd, spec.target)
            array = _read_array(self._fd, spec.target, length)
            super().__init__(spec, length, find_extents(self._fd, length), array)
        except OSError as error:
            self.close()
            raise _source_error(spec.target, error) from error
        except BaseException:
            self.close()
            raise

    def _check_same(self, memory: SourceMemory) -> None:
        if self._details() != memory.details:
            raise SourceError(
                f"{self.spec.target}: is another file than before, or was written since",
                errno=errno.ESTALE,
                hint="a block's source must not change while it is served: put the old file back",
            )

    def _details(self) -> dict[str, Any]:
        found = os.fstat(self._fd)
        return {"device": found.st_dev, "inode": found.st_ino, "size": found.st_size, "mtime_ns": found.st_mtime_ns}

    def kept_fd(self) -> int | None:
        return self._fd if self._fd >= 0 else None

    def _new_channel(self) -> Any:
        if self._fd < 0:
            raise SourceError(f"{self.spec.text}: the source is closed", errno=errno.EBADF)
        from pcshare.page_channel import file_channel  # late: the grammar works without the compiled core

        return file_channel(self._fd, self.used_length)

    def close(self) -> None:
        """Closes the file. Channels have duplicates of their own."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def find_extents(fd: int, length: int) -> list[tuple[int, int]]:
    """The byte ranges of the first length bytes that hold data, sorted, at least HOLE_BYTES_MIN apart."""
    return gathered(data_within(fd, 0, length), length, EXTENTS_MAX)


def open_regular(path: str) -> int:
    """A fd of a regular file, opened without waiting and without touching what is none."""
    try:
        _check_kind(os.stat(path), path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise _source_error(path, error) from error
    try:
        _check_kind(os.fstat(fd), path)
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_kind(status: os.stat_result, path: str) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise SourceError(
            f"{path}: is {_KINDS.get(kind, 'no regular file')}, not a regular file",
            errno=errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL,
            hint=_CURES.get(kind, _CURE_OF_OTHERS),
        )


def _checked_length(fd: int, path: str) -> int:
    length = os.fstat(fd).st_size
    if length == 0:
        raise SourceError(
            f"{path}: the file is empty, and a block holds at least one byte",
            errno=errno.ENODATA,
            hint="use zero:SIZE for an empty block; files of /proc and /sys have no size: copy them first",
        )
    if length > SOURCE_LENGTH_MAX:
        raise SourceError(
            f"{path}: the file has {length} bytes, and a block holds at most {SOURCE_LENGTH_MAX} (64 TiB)",
            errno=errno.EFBIG,
            hint="split it into several blocks",
        )
    return length


def _read_array(fd: int, path: str, length: int) -> ArrayDescription | None:
    """The array of a file that is named .npy and is one."""
    if not path.lower().endswith(".npy"):
        return None
    head = b""
    while len(head) < NPY_HEAD_MAX and (piece := os.pread(fd, NPY_HEAD_MAX - len(head), len(head))):
        head += piece
    return parse_npy(head, length, path)


def _source_error(path: str, error: OSError) -> SourceError:
    hint = _OPEN_HINTS.get(error.errno or 0)
    if error.errno == errno.ENOENT and os.path.isabs(path):
        hint = "see with ls what is there; a file of another host is written HOST:PATH"
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = f"the coordinator runs as uid {os.geteuid()}: let it read the file and search every directory above it"
    return SourceError(f"{path}: {os.strerror(error.errno or errno.EIO)}", errno=error.errno, hint=hint)
