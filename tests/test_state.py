"""States of a block: one table, and a cell that holds one."""

from __future__ import annotations

import itertools
import threading

import pytest

from pcshare.core import lib
from pcshare.errors import PcshareError
from pcshare.state import TRANSITIONS, State, StateCell, StateError

LIFE = (State.ADVISE, State.DISCARD, State.LISTENING, State.RUNNING, State.PAUSED, State.RUNNING, State.END)


def cell_in(state: State) -> StateCell:
    cell = StateCell()
    cell._state = state
    return cell


def test_table_has_every_state_and_those_of_the_status_segment() -> None:
    """G1."""
    assert set(TRANSITIONS) == set(State)
    assert {state.name: state.value for state in State} == {
        name.removeprefix("STATUS_STATE_"): getattr(lib, name) for name in dir(lib) if name.startswith("STATUS_STATE_")
    }


def test_exchange_returns_the_state_before() -> None:
    """G1."""
    cell = StateCell()
    assert [cell.exchange(state) for state in LIFE] == [State.NONE, *LIFE[:-1]]
    assert cell.value is State.END


def test_only_the_ways_of_the_table_lead_on() -> None:
    """G1: every other change is refused, named, and changes nothing."""
    for before, after in itertools.product(State, State):
        cell = cell_in(before)
        if after is before or after in TRANSITIONS[before]:
            assert cell.exchange(after) is before
            assert cell.value is after
            continue
        with pytest.raises(StateError, match=f"from {before.name} to {after.name}") as caught:
            cell.exchange(after)
        assert isinstance(caught.value, PcshareError)
        assert cell.value is before


def test_every_state_but_none_can_be_given_up() -> None:
    """G3."""
    assert all(State.NONE in after for state, after in TRANSITIONS.items() if state is not State.NONE)


def test_exchange_is_atomic() -> None:
    """G1: of many threads that would make the same step exactly one made it."""
    for _ in range(50):
        cell, barrier = cell_in(State.RUNNING), threading.Barrier(4)
        before: list[State] = []

        def end(cell: StateCell, before: list[State], barrier: threading.Barrier) -> None:
            barrier.wait()
            before.append(cell.exchange(State.END))

        threads = [threading.Thread(target=end, args=(cell, before, barrier)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(before) == [State.RUNNING, State.END, State.END, State.END]
