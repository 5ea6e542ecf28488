"""scratch: a folder for temporary files that is gone in the end, also where Ctrl-C comes as it is made or removed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pcshare.signals import signals_blocked


@contextlib.contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """For as long as the with block lasts. parent: where it lies; None: the usual place for temporary files.

    A signal that comes while it is made or removed is heard after that. For the main thread of a process whose other
    threads block signals.
    """
    with contextlib.ExitStack() as closing:
        with signals_blocked():
            made = tempfile.TemporaryDirectory(prefix=prefix, dir=parent)
            closing.callback(_remove, made)
        yield Path(made.name)


def _remove(made: tempfile.TemporaryDirectory[str]) -> None:
    with signals_blocked():
        made.cleanup()
