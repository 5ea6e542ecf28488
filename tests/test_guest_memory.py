"""The helper that looks at a guest's memory: what it finds, where the guest has it, and that it need not wait for all.

Against a real QEMU that is on its way, and where only the search matters against a file.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pcshare_helpers import guest_memory
from pcshare_helpers._common import STEP_BYTES
from support_coordinator import Helper, coordinator, run_helper
from support_qemu import BOOT_CODE, COMPLETED, MIB, POSTCOPY, RAM, UNLIMITED, Guest, Qemu

GIB = 1 << 30
BOOT_SECTOR_ADDRESS = 0x7C00
FIRST_CODE = "".join(line.partition("#")[0] for line in BOOT_CODE.splitlines()[1:11]).strip()
PATTERN = b"needle\0in the hay"


def places(offsets: list[int]) -> list[dict[str, int]]:
    return [{"guest_address": offset, "offset": offset} for offset in offsets]


def test_boot_sector_is_found_while_the_memory_is_on_its_way(runtime_dir: Path, tmp_path: Path) -> None:
    path = runtime_dir / "migration.sock"
    with coordinator(f"qemu+unix:{path}") as served, Qemu(Guest(), tmp_path) as source:
        helper = Helper(served, "guest_memory", f"--hex={FIRST_CODE}", "--count=1")
        source.set_capabilities(POSTCOPY)
        source.set_parameters(max_postcopy_bandwidth=MIB)
        source.migrate(f"unix:{path}")
        source.start_postcopy()
        finished = helper.finish()
        assert served.block(RAM).fraction < 1.0
        assert finished.report["result"] == places([BOOT_SECTOR_ADDRESS]), finished
        source.set_parameters(max_postcopy_bandwidth=UNLIMITED)
        source.wait_for_migration(COMPLETED)


@pytest.fixture
def content(rng: random.Random) -> tuple[bytes, list[int]]:
    """Memory with the pattern at its start, in one piece, over the seam of two, twice overlapping, and at its end."""
    length = 3 * STEP_BYTES + 4096
    offsets = [0, 5000, STEP_BYTES - 1, 2 * STEP_BYTES - len(PATTERN), 2 * STEP_BYTES, length - len(PATTERN)]
    memory = bytearray(rng.randbytes(length))
    for offset in offsets:
        memory[offset : offset + len(PATTERN)] = PATTERN
    return bytes(memory), offsets


def test_every_place_is_found_once(runtime_dir: Path, tmp_path: Path, content: tuple[bytes, list[int]]) -> None:
    memory, offsets = content
    path = tmp_path / "ram"
    path.write_bytes(memory)
    with coordinator(f"{RAM}={path}", options=["--stream=lazy"]) as served:
        finished = run_helper(served, "guest_memory", f"--hex={PATTERN.hex()}", "--json")
        assert finished.report["result"] == places(offsets), finished
        assert finished.report["bytes_checked"] == len(memory)
        by_text = run_helper(served, "guest_memory", "--text=in the hay", "--count=2")
        assert by_text.report["result"] == places([offset + 7 for offset in offsets[:2]])


def test_places_may_overlap(runtime_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(b"aaaa".ljust(4096, b"b"))
    with coordinator(f"{RAM}={path}") as served:
        assert run_helper(served, "guest_memory", "--text=aa").report["result"] == places([0, 1, 2])


def test_empty_pattern_is_refused(runtime_dir: Path) -> None:
    with coordinator(f"{RAM}=zero:4K") as served:
        finished = run_helper(served, "guest_memory", "--text=")
    assert finished.returncode == 1
    assert "empty pattern" in finished.stderr


@pytest.mark.parametrize(
    ("machine", "length", "expected"),
    [
        (None, 64 * MIB, {0: 0, 64 * MIB - 1: 64 * MIB - 1}),
        ("pc", 3583 * MIB, {3583 * MIB - 1: 3583 * MIB - 1}),
        ("pc", 3584 * MIB, {3 * GIB - 1: 3 * GIB - 1, 3 * GIB: 4 * GIB, 3584 * MIB - 1: 4 * GIB + 512 * MIB - 1}),
        ("q35", 2815 * MIB, {2815 * MIB - 1: 2815 * MIB - 1}),
        ("q35", 2816 * MIB, {2 * GIB - 1: 2 * GIB - 1, 2 * GIB: 4 * GIB, 2816 * MIB - 1: 4 * GIB + 768 * MIB - 1}),
    ],
)
def test_addresses_leave_out_the_pci_hole(machine: str | None, length: int, expected: dict[int, int]) -> None:
    """As `info mtree -f` of QEMU 7.2 says it of these machines and sizes."""
    found = {
        offset: offset + shift
        for part, shift in guest_memory.regions(length, machine)
        for offset in expected
        if offset in part
    }
    assert found == expected


def test_large_memory_needs_the_machine() -> None:
    with pytest.raises(ValueError, match="--machine"):
        guest_memory.regions(2816 * MIB, None)
