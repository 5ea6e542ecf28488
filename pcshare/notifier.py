"""notifier: who wants to hear of a change of state, and may refuse one. No I/O.

Not to be mixed up with wakers, which end a thread's wait for a page: a notifier is called once a change, in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Change(Enum):
    """What a notifier is told."""

    PROBE = "PROBE"  # may this block be served? Raising refuses it
    INBOUND_ADVISE = "INBOUND_ADVISE"  # it is being made
    INBOUND_LISTEN = "INBOUND_LISTEN"  # faults on it are answered from now on
    INBOUND_END = "INBOUND_END"  # every page is in; nobody is in its path any more


@dataclass(frozen=True)
class Notice:
    change: Change
    block: str | None  # idstr, or None: all of them


Notifier = Callable[[Notice], None]


class NotifierChain:
    """Notifiers in the order in which they were added. What one raises stops the chain and reaches the caller."""

    def __init__(self) -> None:
        self._notifiers: list[Notifier] = []

    def add(self, notifier: Notifier) -> None:
        self._notifiers.append(notifier)

    def remove(self, notifier: Notifier) -> None:
        """ValueError if it is not there."""
        self._notifiers.remove(notifier)

    def notify(self, change: Change, block: str | None = None) -> None:
        notice = Notice(change, block)
        for notifier in tuple(self._notifiers):
            notifier(notice)
