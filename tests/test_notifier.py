"""Notifiers: who is told of a change, in which order, and who may refuse one."""

from __future__ import annotations

import pytest

from pcshare.errors import Vetoed
from pcshare.notifier import Change, Notice, NotifierChain


def test_notifiers_are_told_in_the_order_in_which_they_were_added() -> None:
    """G2."""
    chain = NotifierChain()
    heard: list[tuple[str, Notice]] = []
    chain.add(lambda notice: heard.append(("first", notice)))
    chain.add(lambda notice: heard.append(("second", notice)))
    chain.notify(Change.INBOUND_ADVISE, "data")
    chain.notify(Change.INBOUND_END)
    advise, end = Notice(Change.INBOUND_ADVISE, "data"), Notice(Change.INBOUND_END, None)
    assert heard == [("first", advise), ("second", advise), ("first", end), ("second", end)]


def test_removed_notifier_hears_no_more() -> None:
    """G2."""
    chain = NotifierChain()
    heard: list[Notice] = []
    chain.add(heard.append)
    chain.notify(Change.PROBE, "data")
    chain.remove(heard.append)
    chain.notify(Change.PROBE, "data")
    assert len(heard) == 1
    with pytest.raises(ValueError, match="not in list"):
        chain.remove(heard.append)


def test_notifier_may_remove_itself_while_it_is_told() -> None:
    """G2: and nobody after it is passed over."""
    chain = NotifierChain()
    heard: list[str] = []

    def once(notice: Notice) -> None:
        heard.append("once")
        chain.remove(once)

    chain.add(once)
    chain.add(lambda notice: heard.append("always"))
    chain.notify(Change.PROBE)
    chain.notify(Change.PROBE)
    assert heard == ["once", "always", "always"]


def test_refusal_stops_the_chain_and_reaches_the_caller() -> None:
    """G2, A7."""
    chain = NotifierChain()
    heard: list[Notice] = []

    def refuse(notice: Notice) -> None:
        raise Vetoed("not today")

    chain.add(heard.append)
    chain.add(refuse)
    chain.add(heard.append)
    with pytest.raises(Vetoed, match="not today"):
        chain.notify(Change.PROBE, "data")
    assert heard == [Notice(Change.PROBE, "data")]
