"""opening: all sources of a coordinator at once, since those that others serve may take seconds each.

Opens, and closes again if one fails, or when nobody wants them any more; makes no block and knows no policy.
"""

from __future__ import annotations

import contextlib
import errno
import select
import threading
from collections.abc import Iterable, Sequence
from typing import Protocol

from pcshare.errors import PcshareError
from pcshare.signals import signals_blocked
from pcshare.sources import OpenedSource, SourceSpec, StopFlag, Wakeup, open_source


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


class _Opening:
    """One source, opened by a thread of its own. error or source: over."""

    def __init__(self, spec: SourceSpec, stop: StopFlag, told: Wakeup) -> None:
        self.source: OpenedSource | None = None
        self.error: BaseException | None = None
        self._spec, self._stop, self._told = spec, stop, told
        self._thread = threading.Thread(target=self._run, name="pcshare-opening")
        with signals_blocked():
            self._thread.start()

    def _run(self) -> None:
        try:
            self.source = open_source(self._spec, self._stop)
        except BaseException as error:
            self.error = error
        self._told.set()

    def is_over(self) -> bool:
        return self.source is not None or self.error is not None

    def take(self) -> OpenedSource:
        """The source, which is the caller's now."""
        self.join()
        assert self.source is not None
        return self.source

    def join(self) -> None:
        self._thread.join()


def open_sources(specs: Sequence[SourceSpec], stopped: _HasFileno) -> list[OpenedSource]:
    """Opens every source, or none and raises what one of them raised; PcshareError when stopped becomes readable."""
    with contextlib.ExitStack() as undoing, contextlib.closing(Wakeup()) as told:
        stop = StopFlag()
        openings: list[_Opening] = []
        undoing.callback(_undo, openings)
        undoing.callback(stop.set)  # first
        for spec in specs:
            openings.append(_Opening(spec, stop, told))
        _wait_for(openings, told, stopped)
        undoing.pop_all()
        return [opening.take() for opening in openings]


def close_sources(sources: Iterable[OpenedSource]) -> None:
    """All at once, too: a process behind one may take seconds to end. Twice is fine."""
    with signals_blocked():
        threads = [threading.Thread(target=source.close, name="pcshare-closing") for source in sources]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()


def _undo(openings: list[_Opening]) -> None:
    for opening in openings:
        opening.join()
    close_sources(opening.source for opening in openings if opening.source is not None)


def _wait_for(openings: list[_Opening], told: Wakeup, stopped: _HasFileno) -> None:
    while True:
        told.clear()
        for opening in openings:
            if opening.error is not None:
                raise opening.error
        if all(opening.is_over() for opening in openings):
            return
        if stopped in select.select([told, stopped], [], [])[0]:
            raise PcshareError("stopped before the sources were open", errno=errno.ECANCELED)
