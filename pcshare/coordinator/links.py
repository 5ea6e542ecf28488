"""links: what the threads of sources say of their servers, queued for the coordinator's loop.

Decides nothing: blocks does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from pcshare.sources import LinkState, Wakeup


class LinkReports:
    """One queue for all blocks; readable when something waits in it."""

    def __init__(self) -> None:
        self._wakeup = Wakeup()
        self._reports: deque[tuple[int, LinkState]] = deque()

    def fileno(self) -> int:
        return self._wakeup.fileno()

    def of_block(self, index: int) -> Callable[[LinkState], None]:
        """What the source of a block is to call, in any thread."""

        def report(state: LinkState) -> None:
            self._reports.append((index, state))
            self._wakeup.set()

        return report

    def take(self) -> Iterator[tuple[int, LinkState]]:
        """The block's index and what is said of its link, in order."""
        self._wakeup.clear()
        while self._reports:
            yield self._reports.popleft()

    def close(self) -> None:
        self._wakeup.close()
