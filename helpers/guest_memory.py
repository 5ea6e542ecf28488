"""Finds a byte pattern in a guest's memory and prints where the guest has it, while the memory is on its way.

For a coordinator that receives a migration (qemu+unix:PATH); attach waits until the source hands the memory over. Each
piece is brought by one request before it is searched, so nothing waits page by page; the next one is asked for ahead.
Touches nothing else of the machine.

Addresses are physical ones, of QEMU's x86 machines without max-ram-below-4g: up to the PCI hole RAM has them 1:1, what
does not fit below it goes on at 4 GiB. Where the hole begins is the machine's business. From 0xa0000 to 0xfffff the
guest itself may see the display and firmware instead of this memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice

import pcshare

from . import _common

GIB = 1 << 30
HIGH = 4 * GIB  # where RAM goes on
PCI_HOLES = {  # machine: RAM from this size on does not fit below the hole; so much of it is then below
    "pc": (7 * GIB // 2, 3 * GIB),
    "q35": (11 * GIB // 4, 2 * GIB),
}


def regions(length: int, machine: str | None) -> list[tuple[range, int]]:
    """Offsets into RAM of that many bytes, and what makes addresses of them when it is added."""
    if machine is None and length >= min(whole for whole, _ in PCI_HOLES.values()):
        raise ValueError(f"with {length} bytes of RAM addresses depend on the machine: give --machine")
    whole, below = PCI_HOLES[machine or "pc"]
    if length < whole:
        return [(range(length), 0)]
    return [(range(below), 0), (range(below, length), HIGH - below)]


def offsets(run: _common.Run, block: pcshare.Block, pattern: bytes, part: range) -> Iterator[int]:
    """Where the pattern is in that part of the block; places may overlap."""
    for start in range(part.start, part.stop, _common.STEP_BYTES):
        stop = min(start + _common.STEP_BYTES, part.stop)
        end = min(stop + len(pattern) - 1, part.stop)  # a place may begin in this piece and end in the next
        block.prefetch(slice(stop, min(stop + _common.STEP_BYTES, part.stop)))
        block.ensure(slice(start, end))
        run.computed(stop - start)
        at = block.find(pattern, start, end)
        while at >= 0:
            yield at
            at = block.find(pattern, at + 1, end)


def guest_memory(run: _common.Run) -> list[dict[str, int]]:
    """The places, at most --count."""
    pattern = run.options.hex or run.options.text
    if not pattern:
        raise ValueError("an empty pattern is everywhere")
    found = []
    with run.attach() as block:
        all_places = (
            {"guest_address": offset + shift, "offset": offset}
            for part, shift in regions(len(block), run.options.machine)
            for offset in offsets(run, block, pattern, part)
        )
        for place in islice(all_places, max(0, run.options.count)):
            found.append(place)
            if not run.options.json:
                print(f"{place['guest_address']:#014x}  {block.idstr} + {place['offset']:#x}", flush=True)
    return found


if __name__ == "__main__":
    parser = _common.parser(__doc__)
    parser.set_defaults(block="pc.ram")
    pattern = parser.add_mutually_exclusive_group(required=True)
    pattern.add_argument("--hex", type=bytes.fromhex, help="the pattern in hexadecimal digits")
    pattern.add_argument("--text", type=str.encode, help="the pattern as text (UTF-8)")
    parser.add_argument("--machine", choices=PCI_HOLES, help="what the guest runs on; only large ones need it")
    parser.add_argument("--json", action="store_true", help="print the last line alone")
    sys.exit(_common.main("guest_memory", guest_memory, parser.parse_args()))
