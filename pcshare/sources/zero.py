"""zero:SIZE: an empty block, which helpers fill. It is one hole: nothing is ever read from it."""

from __future__ import annotations

from typing import Any

from pcshare.sources.grammar import SourceSpec, zero_length
from pcshare.sources.opened import OpenedSource


class ZeroSource(OpenedSource):
    """SIZE bytes of zeros, writable unless told otherwise."""

    default_writable = True

    def __init__(self, spec: SourceSpec) -> None:
        super().__init__(spec, zero_length(spec.target), extents=[])

    def _new_channel(self) -> Any:
        from pcshare.page_channel import zero_channel  # late: the grammar works without the compiled core

        return zero_channel()

    def close(self) -> None:
        """Nothing is open."""
