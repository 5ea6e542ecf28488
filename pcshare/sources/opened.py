"""A source that is open: what every kind of source gives to whoever makes a block of it.

Knows lengths, extents and filters, and hands out page channels. It reads no page itself and knows no helper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from pcshare.sources.filters import wrap_channel
from pcshare.sources.grammar import SourceSpec
from pcshare.sources.npy import ArrayDescription

if TYPE_CHECKING:
    from pcshare.sources.link import LinkState


@dataclass(frozen=True)
class SourceMemory:
    """What a coordinator must know of a source that the one before it had opened: it may be away by now, and it must
    still be the same. details are its kind's own; all of it goes through JSON."""

    used_length: int
    extents: list[tuple[int, int]]
    array: ArrayDescription | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> SourceMemory:
        array = told["array"] and ArrayDescription(**{**told["array"], "shape": tuple(told["array"]["shape"])})
        return cls(told["used_length"], [(start, end) for start, end in told["extents"]], array, told["details"])


class OpenedSource(ABC):
    """One open source.

    used_length is its exact size in bytes. extents are the byte ranges [start, end) that hold data, sorted and apart;
    everything between them is holes and reads as zeros. array describes the array of a .npy file. default_writable says
    what a block of it is unless the user says otherwise.
    """

    default_writable = False

    def __init__(
        self, spec: SourceSpec, used_length: int, extents: list[tuple[int, int]], array: ArrayDescription | None = None
    ) -> None:
        self.spec = spec
        self.used_length = used_length
        self.extents = extents
        self.array = array
        self._filters = spec.filters.with_absolute_path()

    def make_channel(self) -> Any:
        """A new struct page_channel * behind the source's filters; the caller ends it with page_channel_free."""
        return wrap_channel(self._new_channel(), self._filters)

    @abstractmethod
    def _new_channel(self) -> Any:
        """A page channel without filters."""

    @abstractmethod
    def close(self) -> None:
        """Gives up what the source holds open. Channels that were made live on; twice is fine."""

    def memory(self) -> SourceMemory:
        """What reopen_source() needs."""
        return SourceMemory(self.used_length, self.extents, self.array, self._details())

    def _details(self) -> dict[str, Any]:
        return {}

    def kept_fd(self) -> int | None:
        """What is open and must be the same the next time; None: nothing."""
        return None

    def facts(self) -> dict[str, str | int | bool]:
        """What else there is to say of it, for people: what, and how it was found."""
        return {}

    # What a source whose server may go away has to say; the others are always there.

    def watch(self, on_change: Callable[[LinkState], None], lost_after_s: float | None) -> None:  # noqa: B027
        """Before make_channel(). on_change hears, in a thread of the source's, when it is away and when it is back.
        lost_after_s: when it has been away for so long, reading fails; None: never."""

    def retry_now(self) -> None:  # noqa: B027
        """If the source is away: tries at once to reach it."""

    def let_go(self) -> None:
        """Nothing is read any more: begins to close, and waits for nobody."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CompleteSource(OpenedSource):
    """Of a block of which every page is here: what it was is remembered, and nothing of it is open."""

    def __init__(self, spec: SourceSpec, memory: SourceMemory) -> None:
        super().__init__(spec, memory.used_length, memory.extents, memory.array)

    def _new_channel(self) -> Any:
        from pcshare.page_channel import zero_channel  # late: the grammar works without the compiled core

        return zero_channel()

    def close(self) -> None:
        """Nothing is open."""
