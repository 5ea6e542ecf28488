"""device_state: `--device-state FILE`: what the source says of its devices, kept as the bytes that came.

The file is there whole or not at all. Understands none of it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pcshare.errors import PcshareError, UsageError

FILE_MODE = 0o600  # a machine's state is as secret as its memory


class DeviceStateFile:
    """Where device state goes. UsageError: that cannot be."""

    def __init__(self, path: str) -> None:
        self._path = Path(path).absolute()
        if self._path.is_dir() or not os.access(self._path.parent, os.W_OK | os.X_OK):
            raise UsageError(
                f"--device-state {path}: no file can be made there", hint="name a file in a directory you may write"
            )

    def write(self, content: bytes) -> None:
        """PcshareError: it is not there, or as it was before."""
        unfinished = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
            with open(fd, "wb") as file:
                file.write(content)
            unfinished.replace(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise PcshareError(
                f"cannot keep the device state in {self._path}: {error.strerror}", errno=error.errno
            ) from None
