"""client: the helper's side for Python programs: attach to a block and use it as memory.

The mapping, the hand-over and the sentinel are the core's (helper.h); here they get Python's manners: the buffer
protocol, arrays, slices, exceptions, pickling. A touch of a missing page waits inside the kernel with the GIL held;
ensure(), prefetch() and wait() do not.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import mmap
import os
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pcshare import runtime
from pcshare.core import ffi, lib
from pcshare.errors import (
    AttachTimeout,
    CoordinatorGone,
    NoSuchCoordinator,
    PcshareError,
    SourceLost,
    UsageError,
    check,
)

if TYPE_CHECKING:
    import numpy as np

SOCKET_VARIABLE = "PCSHARE_SOCKET"  # set by `pcshare run` for its command
RETRY_S, RETRY_MAX_S = 0.02, 0.2  # between looks for a coordinator that is not there yet, or has nothing yet
LOSS_ANSWER_MS = 1000  # for which pages are lost, which the coordinator knows without asking anybody
MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named in Python 3.13 and later

_MODES = {None: 0, "ro": lib.PCSHARE_RO, "rw": lib.PCSHARE_RW, "cow": lib.PCSHARE_COW}
_MODE_NAMES = {lib.PCSHARE_RO: "ro", lib.PCSHARE_RW: "rw", lib.PCSHARE_COW: "cow"}
_STATES = {
    lib.PCSHARE_ATTACHED: "attached",
    lib.PCSHARE_COMPLETE: "complete",
    lib.PCSHARE_ORPHANED: "orphaned",
    lib.PCSHARE_LOST: "lost",
}
# Nobody is there yet, or was on its way out; the coordinator changed between two looks; a signal came.
_TRY_AGAIN = (
    -errno.ENOENT,
    -errno.ECONNREFUSED,
    -errno.ECONNRESET,
    -errno.EAGAIN,
    -errno.ESTALE,
    -errno.EINTR,
)


@dataclass(frozen=True)
class Handle:
    """What another process needs to attach to the same block: small, picklable, and nothing of it is open."""

    socket: str
    block: str
    mode: str

    def attach(self, *, timeout_s: float = 10.0) -> Block:
        return attach(socket=self.socket, block=self.block, mode=self.mode, timeout_s=timeout_s)


def attach(
    name: str | None = None,
    block: str | None = None,
    mode: str | None = None,
    timeout_s: float = 10.0,
    *,
    socket: str | os.PathLike[str] | None = None,
) -> Block:
    """Attaches to a block of the coordinator NAME, waiting up to timeout_s for both to appear: an incoming migration's
    blocks are handed out when their source has come so far.

    Without name and socket the coordinator of `pcshare run` is meant (PCSHARE_SOCKET). Without block, its only one.
    mode: "ro" (private, read-only), "rw" (shared, of a writable block), "cow" (private: what is written stays here);
    None: "rw" for a writable block, else "ro". Nothing is read yet: a page arrives when it is touched, or with the
    stream.

    Raises NoSuchCoordinator, NoSuchBlock, NotWritable, AccessRefused, LimitReached, AttachTimeout, HostError.
    """
    if mode not in _MODES:
        raise UsageError(f"mode {mode!r}: it is 'ro', 'rw' or 'cow'")
    path = _SocketPath(name, socket)
    idstr = _encoded(block or "", "block's name")
    deadline, pause_s = time.monotonic() + timeout_s, RETRY_S
    waits_for = ""  # what the coordinator said last; the last try may have no time left for an answer
    while True:
        left_ms = max(1, round((deadline - time.monotonic()) * 1000))
        found = path.find()
        rc, attached = -errno.ENOENT, None
        if found is not None:
            rc, attached = _attach_once(found, idstr, _MODES[mode], left_ms)
        if attached is not None:
            return attached
        if rc == -errno.EAGAIN:
            waits_for = _error_text()
        if rc == -errno.ETIMEDOUT and waits_for:
            raise _still_waiting(waits_for, path, timeout_s)
        if rc not in _TRY_AGAIN:
            check(rc, f"attaching to {path}", _error_text())
        if rc != -errno.EINTR and time.monotonic() >= deadline:
            raise _waited_in_vain(rc, path, timeout_s)
        time.sleep(min(pause_s, max(0.0, deadline - time.monotonic())))  # also where a signal's handler runs
        pause_s = min(2 * pause_s, RETRY_MAX_S) if rc == -errno.EAGAIN else RETRY_S


def _encoded(text: str, what: str) -> bytes:
    """For C, where a NUL would end it."""
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise UsageError(f"not a {what}: {text!r}")
    return encoded


def _waited_in_vain(rc: int, path: _SocketPath, timeout_s: float) -> PcshareError:
    if rc == -errno.EAGAIN:  # it is there, and says what it waits for itself
        return _still_waiting(_error_text(), path, timeout_s)
    return NoSuchCoordinator(
        f"{path}: nobody serves there within {timeout_s:g} s", errno=-rc, hint=NoSuchCoordinator.usual_hint
    )


def _still_waiting(what: str, path: _SocketPath, timeout_s: float) -> AttachTimeout:
    return AttachTimeout(
        f"{path}: {timeout_s:g} s over: {what}",
        errno=errno.ETIMEDOUT,
        hint="give it more time (timeout_s); `pcshare status` says how far it is",
    )


class _SocketPath:
    """Where the coordinator listens, or will."""

    def __init__(self, name: str | None, socket: str | os.PathLike[str] | None) -> None:
        self._name = runtime.check_name(name) if name is not None else None
        self._socket = os.fspath(socket) if socket is not None else None
        if self._name is None and self._socket is None:
            self._socket = os.environ.get(SOCKET_VARIABLE)
        if self._name is None and self._socket is None:
            raise UsageError(
                "attach() without a name",
                hint=f"name a coordinator, or run the program under `pcshare run`, which sets {SOCKET_VARIABLE}",
            )

        if self._socket is not None:
            _encoded(self._socket, "path of a socket")

    def find(self) -> str | None:
        if self._socket is not None:
            return self._socket
        assert self._name is not None
        found = runtime.find_socket(self._name)
        return None if found is None else str(found)

    def __str__(self) -> str:
        return self._socket or f"coordinator {self._name!r}"


def _error_text() -> str:
    return str(ffi.string(lib.pcshare_error_text()).decode(errors="replace"))


def _attach_once(socket: str, idstr: bytes, mode: int, timeout_ms: int) -> tuple[int, Block | None]:
    """One try: the core's answer and, where that is 0, the block. First its size, to have a place ready for it."""
    info = ffi.new("struct pcshare_info *")
    rc = lib.pcshare_peek(info, os.fsencode(socket), idstr, mode, timeout_ms)
    if rc < 0:
        return rc, None
    place = Block(info, socket)
    rc = place._fill(timeout_ms)
    return rc, place if rc == 0 else None


@dataclass(frozen=True)
class Progress:
    """How much of a block is here, in pages. state and stream are the words of `pcshare status`."""

    received_pages: int
    hole_pages: int
    lost_pages: int
    page_count: int
    state: str
    stream: str

    @property
    def fraction(self) -> float:
        """0.0 to 1.0; holes of the source count as here."""
        return (self.received_pages + self.hole_pages) / self.page_count if self.page_count else 1.0

    def __float__(self) -> float:
        return self.fraction


def _placeholder(info: Any) -> tuple[int, int]:
    """(fd, flags) of a mapping that Python makes and the core then replaces: it only has to lie right."""
    flags = mmap.MAP_PRIVATE | MAP_NORESERVE
    if info.page_size <= mmap.PAGESIZE:
        return -1, flags | mmap.MAP_ANONYMOUS
    size_bits = int(info.page_size).bit_length() - 1
    fd = os.memfd_create("pcshare-place", os.MFD_CLOEXEC | os.MFD_HUGETLB | size_bits << os.MFD_HUGE_SHIFT)
    os.ftruncate(fd, info.map_length)
    return fd, flags


class Block(mmap.mmap):
    """An attached block: bytes that arrive when they are touched.

    len(block) and memoryview(block) have the source's exact size in bytes; memoryview and asarray() are read-only in
    mode "ro". Views and arrays keep the mapping alive: close() gives the block up at once and never fails because of
    them. A subclass of mmap for its buffer protocol, which Python 3.11 leaves to C types.
    """

    _attachment: Any

    def __new__(cls, info: Any, socket: str) -> Self:
        fd, flags = _placeholder(info)
        protection = 0 if info.mode == lib.PCSHARE_RO else mmap.PROT_READ | mmap.PROT_WRITE
        try:
            return super().__new__(cls, fd, info.used_length, flags, protection)
        except OSError as error:
            raise PcshareError(
                f"no room in the address space for {info.used_length} bytes: {error.strerror}", errno=error.errno
            ) from None
        finally:
            if fd >= 0:
                os.close(fd)

    def __init__(self, info: Any, socket: str) -> None:
        self._info = info
        self._socket = socket
        self._attachment = ffi.NULL
        self._closed = False

    def _fill(self, timeout_ms: int) -> int:
        """Puts the block where the placeholder is. Once."""
        info, attachment = self._info, ffi.new("struct pcshare_attachment **")
        with ffi.from_buffer(self) as here:
            address = int(ffi.cast("uintptr_t", here))
        rc = lib.pcshare_attach(
            attachment,
            os.fsencode(self._socket),
            bytes(ffi.string(info.idstr)),
            info.mode,
            timeout_ms,
            ffi.cast("void *", address),
            info.map_length,
        )
        if rc < 0:
            return int(rc)
        self._attachment = attachment[0]
        lib.pcshare_get_info(self._attachment, info)
        # At exit the kernel takes everything at once; detaching under arrays that are still in use would be a fault.
        self._end = weakref.finalize(self, lib.pcshare_detach, self._attachment, 1)
        self._end.atexit = False
        return 0

    # -- what it is

    @property
    def idstr(self) -> str:
        """The block's name."""
        return str(ffi.string(self._info.idstr).decode(errors="replace"))

    @property
    def mode(self) -> str:
        """ "ro", "rw" or "cow"."""
        return _MODE_NAMES[self._info.mode]

    @property
    def page_size(self) -> int:
        return int(self._info.page_size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array of a .npy source; else (len(block),)."""
        info = self._info
        return tuple(info.dims[i] for i in range(info.ndim)) if info.has_array else (len(self),)

    @property
    def state(self) -> str:
        """ "attached", "complete" (all is here: said a moment after wait() has returned), "orphaned" (the coordinator
        went away, missing pages wait) or "lost" (they are SIGBUS)."""
        return _STATES[lib.pcshare_state(self._living())]

    @property
    def closed(self) -> bool:  # type: ignore[override]
        return self._closed

    def __repr__(self) -> str:
        if self._closed:
            return f"<pcshare.Block {self.idstr!r} closed>"
        return f"<pcshare.Block {self.idstr!r} {self.mode}, {len(self)} bytes, {self.progress.fraction:.1%} here>"

    def _living(self) -> Any:
        if self._closed:
            raise ValueError(f"block {self.idstr!r} was closed")
        return self._attachment

    # -- using it

    def asarray(self) -> np.ndarray[Any, Any]:
        """A numpy view, nothing read yet: the array of a .npy source (its dtype and shape), else uint8 of shape
        (len(block),)."""
        self._living()
        import numpy as np

        info = self._info
        if not info.has_array:
            return np.frombuffer(self, dtype=np.uint8)
        # By way of frombuffer, which locks the mapping against close(): from a memoryview numpy keeps only its base.
        whole = np.frombuffer(self, dtype=np.uint8)
        return _array_on(whole, bytes(ffi.string(info.dtype)), self.shape, info.data_offset, bool(info.fortran))

    def _range(self, part: slice | None) -> tuple[int, int]:
        """(offset, length) in bytes."""
        start, stop, step = (slice(None) if part is None else part).indices(len(self))
        if step != 1:
            raise UsageError(f"a range of bytes without steps is meant, not {part}")
        return start, max(0, stop - start)

    def ensure(self, part: slice | None = None, *, timeout_s: float | None = None) -> None:
        """Brings a range of bytes (a slice; None: all) with one request, and returns when it is here. The GIL is free
        meanwhile.

        SourceLost: the source lost a part of it; AttachTimeout; CoordinatorGone."""
        offset, length = self._range(part)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        lost_offset, lost_length = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        while True:
            rc = lib.pcshare_ensure(self._living(), offset, length, _left_ms(deadline), lost_offset, lost_length)
            if rc != -errno.EINTR:
                break
        if rc == -errno.EIO:
            raise self._lost(lost_offset[0], lost_length[0])
        if rc == -errno.ETIMEDOUT:
            raise AttachTimeout(
                f"block {self.idstr}: bytes {offset} to {offset + length} did not arrive within {timeout_s:g} s",
                errno=errno.ETIMEDOUT,
                hint="see with `pcshare status` whether it is paused, and why",
            )
        check(rc, "cannot bring a range", _error_text() if rc < 0 else "")

    def prefetch(self, part: slice | None = None) -> None:
        """Asks for a range of bytes (a slice; None: all) ahead of the rest and does not wait. A hint: where too many
        are under way it is dropped."""
        offset, length = self._range(part)
        rc = lib.pcshare_prefetch(self._living(), offset, length)
        if rc not in (-errno.EINTR, -errno.EAGAIN):
            check(rc, "cannot bring a range", _error_text() if rc < 0 else "")

    def is_received(self, part: slice | None = None) -> bool:
        """Whether every page of a range of bytes (a slice; None: all) has been placed: touching it waits for nobody.
        Asks nobody."""
        offset, length = self._range(part)
        return bool(lib.pcshare_is_received(self._living(), offset, length))

    @property
    def progress(self) -> Progress:
        """How much is here; read from the status segment, without asking the coordinator."""
        return self._progress()[0]

    def _progress(self) -> tuple[Progress, int]:
        from pcshare.status import STATE_NAMES, STREAM_NAMES, named

        now = ffi.new("struct pcshare_progress *")
        lib.pcshare_get_progress(self._living(), now)
        progress = Progress(
            now.received_pages,
            now.hole_pages,
            now.lost_pages,
            now.page_count,
            named(STATE_NAMES, now.state),
            named(STREAM_NAMES, now.stream_mode),
        )
        return progress, now.seq

    def wait(self, fraction: float = 1.0, timeout_s: float | None = None) -> None:
        """Waits until so much of the block is here (0.0 to 1.0). The GIL is free meanwhile.

        AttachTimeout; CoordinatorGone; SourceLost where lost pages make it impossible; PcshareError where nothing
        streams (lazy): it would be for ever."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            progress, seq = self._progress()
            if progress.fraction >= fraction or self.state == "complete":
                return
            if self._check_comes(progress, fraction):
                continue
            rc = lib.pcshare_wait_progress(self._living(), seq, _left_ms(deadline))
            if rc == -errno.ETIMEDOUT:
                raise AttachTimeout(
                    f"block {self.idstr}: {timeout_s:g} s over: {self.progress.fraction:.1%} here, not {fraction:.1%}",
                    errno=errno.ETIMEDOUT,
                    hint="see with `pcshare status` whether it is paused, and why",
                )
            if rc != -errno.EINTR:
                check(rc, "cannot wait for a block", _error_text() if rc < 0 else "")

    def _check_comes(self, progress: Progress, fraction: float) -> bool:
        """Raises where waiting would be for ever. True: it would have been, and something has changed since."""
        if self.state == "lost":
            raise CoordinatorGone(
                f"block {self.idstr}: the coordinator ended before all was here", hint=CoordinatorGone.usual_hint
            )
        left = progress.page_count - progress.lost_pages
        if progress.lost_pages and left < fraction * progress.page_count:
            self._raise_first_lost(progress.lost_pages)
            return True
        if progress.stream == "lazy":
            raise PcshareError(
                f"block {self.idstr}: nothing streams (lazy), so waiting for {fraction:.1%} would be for ever",
                hint="use ensure() for a range, or `pcshare stream NAME eager`",
            )
        return False

    def _raise_first_lost(self, lost_pages: int) -> None:
        """Asks which pages are the first of them; returns if none is lost any more."""
        offset, length = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        rc = lib.pcshare_ensure(self._living(), 0, len(self), LOSS_ANSWER_MS, offset, length)
        if rc == -errno.EIO:
            raise self._lost(offset[0], length[0], f"{lost_pages} pages")
        if rc not in (0, -errno.ETIMEDOUT, -errno.EINTR):
            check(rc, "cannot wait for a block", _error_text())

    def _lost(self, offset: int, length: int, how_much: str = "") -> SourceLost:
        name = os.path.basename(self._socket).removesuffix(runtime.SOCKET_SUFFIX)
        return SourceLost(
            f"the source lost {how_much or 'a part'} of block {self.idstr}, bytes {offset} to {offset + length}",
            offset=int(offset),
            length=int(length),
            block=self.idstr,
            hint=f"see why with `pcshare status {name}`; what a server that was away still has comes when it is back, "
            f"all else is asked for again by `pcshare resume {name}`",
        )

    # -- sharing and ending it

    def handle(self) -> Handle:
        """For other processes: picklable, attaches there with handle.attach()."""
        return Handle(os.path.abspath(self._socket), self.idstr, self.mode)

    def __reduce__(self) -> Any:
        raise TypeError("a Block is not picklable; pass block.handle() and call its attach() there")

    def resize(self, newsize: int) -> None:
        raise TypeError("a block has the size of its source")

    def _has_views(self) -> bool:
        try:
            super().resize(-1)  # refused in any case, and first of all where views live
        except BufferError:
            return True
        except (TypeError, ValueError, SystemError):
            return False
        return False

    def close(self) -> None:
        """Leaves the coordinator. With views or arrays alive the mapping goes when the last of them does. Twice is
        fine."""
        if self._closed:
            return
        self._closed = True
        if self._has_views():
            return
        self._end()
        with contextlib.suppress(BufferError):  # a view taken at this very moment; it keeps an inaccessible mapping
            super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_NO_ARRAY = (ArithmeticError, LookupError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError)


def _array_on(
    whole: np.ndarray[Any, Any], described: bytes, shape: tuple[int, ...], offset: int, is_fortran: bool
) -> np.ndarray[Any, Any]:
    """The array that a coordinator says lies in these bytes. PcshareError: there can be none."""
    import numpy as np

    order: Any = "F" if is_fortran else "C"
    try:
        text: Any = described.decode()
        dtype: Any = np.lib.format.descr_to_dtype(ast.literal_eval(text) if text[:1] in ("[", "(") else text)
        if dtype.hasobject:
            raise ValueError("its bytes would be taken for addresses of objects")
        return np.ndarray(shape, dtype, whole, offset, order=order)
    except _NO_ARRAY as error:
        raise PcshareError(
            f"no array of shape {shape} and type {described[:80]!r} fits the block: {error}",
            errno=errno.EPROTO,
            hint="memoryview(block) has its bytes",
        ) from None


def _left_ms(deadline: float | None) -> int:
    return -1 if deadline is None else max(0, round((deadline - time.monotonic()) * 1000))
