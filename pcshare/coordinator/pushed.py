"""pushed: the source of a block that a migration brings: its pages come asked for or not.

Knows the block's size and its page channel; who sends, and whether somebody does, is incoming's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from pcshare.sources import OpenedSource, SourceSpec


class PushedSource(OpenedSource):
    """One block of the stream that spec names. take_channel: gives its page channel, once."""

    def __init__(
        self,
        spec: SourceSpec,
        idstr: str,
        used_length: int,
        take_channel: Callable[[], Any],
        extents: list[tuple[int, int]] | None = None,
    ) -> None:
        """extents: what is no hole, where that is known: after LISTEN."""
        super().__init__(
            dataclasses.replace(spec, block=idstr), used_length, [(0, used_length)] if extents is None else extents
        )
        self._take_channel = take_channel

    def _new_channel(self) -> Any:
        return self._take_channel()

    def close(self) -> None:
        """The migration ends with all its blocks."""
