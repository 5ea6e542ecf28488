"""errors: every exception that pcshare raises on purpose, and the one place where a negative errno becomes one.

A message says what happened and where; the hint says the cure. Nothing here does I/O, and nothing here decides what
to do about an error. All of them can be pickled: they cross process borders in pools.
"""

from __future__ import annotations

import errno as errno_codes
import os
from collections.abc import Mapping
from typing import Any, ClassVar

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_HOST = 3
EXIT_INTERRUPTED = 128 + 2  # what a shell says of a command that SIGINT ended


class PcshareError(Exception):
    """The base of all. ``errno`` is a positive errno where there is one, ``hint`` the cure in the imperative."""

    exit_status: ClassVar[int] = EXIT_FAILED
    usual_hint: ClassVar[str | None] = None  # for check(), where the core has no words of its own

    errno: int | None
    hint: str | None
    message: str

    def __init__(self, message: str, *, errno: int | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.errno = errno
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # OSError keeps errno outside __dict__, and its own __reduce__ knows nothing of ours.
        return _rebuild, (type(self), self.args, self.errno, dict(self.__dict__))


def _rebuild(cls: type[PcshareError], args: tuple[Any, ...], errno: int | None, state: dict[str, Any]) -> PcshareError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    error.errno = errno
    return error


class UsageError(PcshareError):
    """The caller asked for something that makes no sense here."""

    exit_status = EXIT_USAGE


class HostError(PcshareError):
    """This host cannot; the hint is the command that mends it."""

    exit_status = EXIT_HOST


class SourceError(PcshareError):
    """A source cannot be opened or does not hold what it should."""


class SourceLost(SourceError):
    """Pages that the source lost for good: ``length`` bytes from ``offset`` of the block ``block``."""

    def __init__(
        self,
        message: str,
        *,
        offset: int = 0,
        length: int = 0,
        block: str = "",
        errno: int | None = errno_codes.EIO,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, errno=errno, hint=hint)
        self.offset = offset
        self.length = length
        self.block = block


class MigrationError(SourceError):
    """A migration stream that the format does not allow (EPROTO), or that uses what is not done here (EPROTONOSUPPORT).

    ``offset``: the byte of the stream where what is wrong begins."""

    def __init__(
        self, message: str, *, offset: int = 0, errno: int | None = errno_codes.EPROTO, hint: str | None = None
    ) -> None:
        super().__init__(message, errno=errno, hint=hint)
        self.offset = offset


class WorkingSetError(PcshareError):
    """The file of a working set cannot be read or written, or is none."""


class NameInUse(PcshareError):
    """A coordinator of that name lives, or a dead one left things behind; the message says which."""


class NoSuchCoordinator(PcshareError):
    """Nobody listens under that name."""

    usual_hint = "see what runs with `pcshare status`"


class NoSuchBlock(PcshareError):
    """The coordinator has no block of that name."""

    usual_hint = "see its blocks with `pcshare status NAME`"


class NotWritable(PcshareError):
    """A block that is read-only was to be attached for writing."""

    usual_hint = "attach with mode='ro' or mode='cow', or start the coordinator with --writable BLOCK"


class CoordinatorGone(PcshareError):
    """The coordinator went away in the middle."""

    usual_hint = "start it again under the same name; `pcshare status` tells what runs"


class AttachTimeout(PcshareError, TimeoutError):
    """A step took longer than it may."""

    usual_hint = "give it more time, or see with `pcshare status NAME` whether the coordinator is stopped"


class AccessRefused(PcshareError, PermissionError):
    """The other side does not let this user in."""

    usual_hint = "run it as the coordinator's user, or start the coordinator with --allow-uid or --allow-gid"


class LimitReached(PcshareError):
    """A limit of the coordinator's is used up."""

    usual_hint = "end a helper or remove a block first"


class Vetoed(PcshareError):
    """An observer refused at PROBE; the message holds its reason."""


class VersionMismatch(PcshareError):
    """The two sides do not speak the same version."""

    usual_hint = "install the same pcshare on both sides"


class ProtocolError(PcshareError):
    """A message that the protocol does not allow. Always one of the two below: they say who was wrong."""


class LocalProtocolError(ProtocolError):
    """This side was about to break the protocol."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol."""


_CLASS_OF_ERRNO: dict[int, type[PcshareError]] = {
    errno_codes.EPROTO: RemoteProtocolError,
    errno_codes.EPROTONOSUPPORT: VersionMismatch,
    errno_codes.ENODEV: NoSuchBlock,
    errno_codes.EROFS: NotWritable,
    errno_codes.EACCES: AccessRefused,
    errno_codes.EUSERS: LimitReached,
    errno_codes.ECONNRESET: CoordinatorGone,
    errno_codes.ETIMEDOUT: AttachTimeout,
}


_CLASS_OF_EXIT: dict[int, type[PcshareError]] = {EXIT_USAGE: UsageError, EXIT_HOST: HostError}


def exit_code(error: BaseException) -> int:
    """The exit status of a command that ends with this error."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return error.exit_status if isinstance(error, PcshareError) else EXIT_FAILED


def to_json(error: BaseException) -> dict[str, Any]:
    """What from_json() in another process makes the same error of."""
    known = next((cls for cls in type(error).__mro__ if cls.__module__ == __name__), type(error))
    return {
        "type": known.__name__,
        "error": error.message if isinstance(error, PcshareError) else str(error),
        "hint": error.hint if isinstance(error, PcshareError) else None,
        "errno": getattr(error, "errno", None),
        "exit": exit_code(error),
    }


def from_json(told: Mapping[str, Any]) -> PcshareError:
    """The error as the class it had there; by its exit code where the class is not one of these."""
    kind = globals().get(str(told.get("type")))
    if not (isinstance(kind, type) and issubclass(kind, PcshareError)):
        kind = _CLASS_OF_EXIT.get(int(told.get("exit") or 0), PcshareError)
    return kind(str(told.get("error")), errno=told.get("errno"), hint=told.get("hint"))


def check(rc: int, what: str, text: str = "") -> int:
    """Returns an answer of the core that is no failure; raises the exception that a negative errno stands for.

    ``what`` names the attempt; ``text`` is the core's own explanation, which brings its cure along."""
    if rc >= 0:
        return rc
    cls = _CLASS_OF_ERRNO.get(-rc, PcshareError)
    if text:
        raise cls(f"{what}: {text}", errno=-rc)
    raise cls(f"{what}: {os.strerror(-rc)}", errno=-rc, hint=cls.usual_hint)
