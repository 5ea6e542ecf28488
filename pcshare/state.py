"""state: the states of an incoming block as one table, and a cell that holds one. No I/O.

The diagram in docs/explanation/architecture.md is drawn from TRANSITIONS.
"""

from __future__ import annotations

import threading
from enum import IntEnum

from pcshare.errors import PcshareError


class State(IntEnum):
    """As STATUS_STATE_* of the status segment."""

    NONE = 0
    ADVISE = 1
    DISCARD = 2
    LISTENING = 3
    RUNNING = 4
    PAUSED = 5
    END = 6


TRANSITIONS: dict[State, frozenset[State]] = {
    State.NONE: frozenset({State.ADVISE}),
    State.ADVISE: frozenset({State.DISCARD, State.NONE}),
    State.DISCARD: frozenset({State.LISTENING, State.NONE}),
    State.LISTENING: frozenset({State.RUNNING, State.PAUSED, State.END, State.NONE}),
    State.RUNNING: frozenset({State.PAUSED, State.END, State.NONE}),
    State.PAUSED: frozenset({State.RUNNING, State.END, State.NONE}),
    State.END: frozenset({State.NONE}),
}


class StateError(PcshareError):
    """A change of state that the table does not have."""


class StateCell:
    """One block's state, read and exchanged atomically by any thread."""

    def __init__(self, state: State = State.NONE) -> None:
        self._lock = threading.Lock()
        self._state = state

    @property
    def value(self) -> State:
        return self._state

    def exchange(self, new: State) -> State:
        """Goes to the new state and returns the one before; StateError where no such way leads. Staying is allowed."""
        with self._lock:
            before = self._state
            if new is not before and new not in TRANSITIONS[before]:
                raise StateError(f"a block does not go from {before.name} to {new.name}")
            self._state = new
            return before
