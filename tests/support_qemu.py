"""support_qemu: pcshare.bench.qemu for tests that migrate a QEMU's memory: reads and compares that memory, and breaks
the connection.

Makes no claims about the receiver. QEMU dies with the test run and is ended by QMP's quit: needing SIGKILL is a failure
of the test.

    with Qemu(Guest(ram_mib=64), tmp_path) as source:     # the guest writes when the body starts
        source.set_capabilities(POSTCOPY)
        source.migrate("unix:/tmp/x.sock")
        source.start_postcopy()                           # returns when the guest stands still
        content = source.memory()                         # what the receiver must hold in the end
        source.wait_for_migration("completed")

A receiving QEMU has incoming=URI, and paused=True where its guest must not go on writing.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from pcshare.bench import qemu
from pcshare.bench.lab import HUGE_PAGE, MIB, PAGE
from pcshare.bench.qemu import (
    BOOT_CODE,
    COMPLETED,
    EXECUTABLE,
    MIGRATION_TIMEOUT_S,
    POSTCOPY,
    POSTCOPY_ACTIVE,
    PREEMPT,
    RAM,
    ROM_HOLE,
    UNLIMITED,
    Guest,
    QmpError,
)
from support import needs, wait_until

__all__ = [
    "BOOT_CODE",
    "COMPLETED",
    "HUGE_PAGE",
    "MIB",
    "PAGE",
    "POSTCOPY",
    "PREEMPT",
    "RAM",
    "ROM_HOLE",
    "UNLIMITED",
    "Guest",
    "QmpError",
]

DOWNTIME_LIMIT_MS = 60_000  # of a guest that never stops writing precopy is over after the first pass
BIOS = "pc.bios"  # idstr of another block that pmemsave can read
BIOS_RANGE = range((4 << 30) - (256 << 10), 4 << 30)  # guest addresses
RETURN_PATH = "return-path"
POSTCOPY_PAUSED = "postcopy-paused"
NAMED_THREADS = ("-name", "debug-threads=on")
SENDERS = ("live_migration", "return path", "mig/src/")  # as 7.2 names them, and 10


class Qemu(qemu.Qemu):
    """A QEMU of a test."""

    def __init__(
        self,
        guest: Guest,
        folder: Path,
        name: str = "source",
        *,
        incoming: str | None = None,
        paused: bool = False,
        options: Sequence[str] = (),
    ) -> None:
        needs(None if shutil.which(EXECUTABLE) else f"{EXECUTABLE} (Debian: qemu-system-x86)")
        super().__init__(guest, folder, name, incoming=incoming, paused=paused, options=[*NAMED_THREADS, *options])

    def memory(self) -> bytes:
        """The guest's RAM as it is now, the ROM hole zeroed. Where the guest runs on it is no one moment's."""
        return without_rom_hole(self.read_memory(range(self.guest.ram_size)))

    def read_memory(self, addresses: range) -> bytes:
        """What the guest sees there."""
        path = self._folder / "pmemsave"
        self.execute("pmemsave", val=addresses.start, size=len(addresses), filename=str(path))
        content = path.read_bytes()
        path.unlink()
        assert len(content) == len(addresses)
        return content

    def pause_migration(self) -> None:
        """Breaks the connection of a post-copy. Returns when QEMU has seen that: up to 0.1 s later. Its threads see it
        one after the other, and 7.2 dies of a resume (segmentation fault) that comes before the last."""
        self.execute("migrate-pause")
        self.wait_for_migration(POSTCOPY_PAUSED)
        wait_until(self._senders_wait, "QEMU's threads to wait for a resume")

    def _senders_wait(self) -> bool:
        """Whether no thread of an outgoing migration does anything, or waits for its connection."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # of others: they come and go
                is_sender = (task / "comm").read_text().startswith(SENDERS)
                if is_sender and not (task / "wchan").read_text().startswith("futex"):
                    return False
        return True

    def resume_migration(self, uri: str) -> None:
        """After a pause. Returns when the receiver has acknowledged it. If the connection breaks before that, 7.2 stays
        in postcopy-recover for ever."""
        self.migrate(uri, resume=True)
        self.wait_for_migration(POSTCOPY_ACTIVE, COMPLETED)

    def wait_for_passes(self, n: int) -> None:
        """Until precopy has looked n times for what the guest wrote."""
        wait_until(
            lambda: self.migration().get("ram", {}).get("dirty-sync-count", 0) >= n, f"pass {n}", MIGRATION_TIMEOUT_S
        )


# -- comparing


def without_rom_hole(content: bytes) -> bytes:
    """RAM whose bytes that pmemsave cannot see are zeroed."""
    return content[: ROM_HOLE.start] + bytes(len(ROM_HOLE)) + content[ROM_HOLE.stop :]


def differing_pages(content: bytes, expected: bytes) -> list[int]:
    """The pages in which two memories of one length differ."""
    assert len(content) == len(expected)
    if content == expected:
        return []
    starts = range(0, len(expected), PAGE)
    return [start // PAGE for start in starts if content[start : start + PAGE] != expected[start : start + PAGE]]


def assert_same_memory(content: bytes, expected: bytes) -> None:
    """Byte for byte, less the ROM hole; names the pages that differ."""
    pages = differing_pages(without_rom_hole(content), without_rom_hole(expected))
    assert not pages, f"{len(pages)} pages differ, the first: {[hex(page * PAGE) for page in pages[:8]]}"
