"""support_scene: a coordinator that waits for a migration, with sources and helpers for it; the coordinator may be one
in this process, or one that is to be killed.

Waits and compares; plays no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest

from pcshare.status import BlockStatus
from support import wait_until
from support_migration import Preempt, Source, SourceBlock, to_unix
from support_serving import PAGE, WAIT_S, HelperProcess, Pending, Serving
from support_takeover import Restarting

RAM, ROM = "pc.ram", "/rom@etc/acpi/tables"
RAM_BYTES, ROM_BYTES = 1024 * PAGE, 32 * PAGE
N_PAGES = RAM_BYTES // PAGE

each_preempt = pytest.mark.parametrize("preempt", list(Preempt), ids=lambda one: f"preempt {one.value}")

Served = TypeVar("Served", Serving, Restarting)


class Scene(Generic[Served]):
    """served at path."""

    def __init__(self, served: Served, path: Path, seed: int) -> None:
        self.served: Served = served
        self.path = path
        self._seed = seed
        self.lazily: dict[str, Any] = {"only_requested": True, "in_order": True}

    def source(self, blocks: Sequence[SourceBlock] = (), **given: Any) -> Source:
        made = blocks or (SourceBlock(RAM, RAM_BYTES, seed=self._seed), SourceBlock(ROM, ROM_BYTES, seed=self._seed))
        return Source(to_unix(self.path), made, **{"seed": self._seed, **given})

    def attaching(self, idstr: str = RAM) -> tuple[HelperProcess, Pending]:
        helper = self.served.helper()
        return helper, helper.start(f"b = attach({idstr!r}, timeout_s={WAIT_S})")

    def attached(self, idstr: str = RAM) -> HelperProcess:
        helper, attached = self.attaching(idstr)
        attached.result()
        return helper

    def block(self, idstr: str = RAM) -> BlockStatus:
        return self.served.block(idstr)

    def here(self) -> int:
        """Pages of RAM that are received, or came as zeros."""
        return self.block().received_pages + self.block().hole_pages

    def listens(self) -> bool:
        return str(self.path) in Path("/proc/net/unix").read_text()

    def wait_for_state(self, state: str) -> None:
        wait_until(lambda: self.served.status().state == state, f"{state}: {self.served.status()}", WAIT_S)

    def wait_for_reason(self, text: str) -> str:
        wait_until(lambda: text in self.served.status().reason, f"{text!r}: {self.served.status()}", WAIT_S)
        return self.served.status().reason

    def assert_whole(self, source: Source) -> None:
        """Every byte of every block, in a helper's eyes, and nothing that should not be."""
        for idstr in source.blocks:
            self.served.wait_for_state("END", idstr)
            block = self.block(idstr)
            assert (block.fraction, block.foreign_pages) == (1.0, 0)
            assert self.attached(idstr).do("bytes(b)") == source.memory(idstr)
