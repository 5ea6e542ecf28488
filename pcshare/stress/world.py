"""world: the sources of a round, made of random bytes in a folder that is given, and what a block must hold where.

In the blocks that helpers write, the first bytes of each page belong to writers, one slot each; everything else must
stay as the source has it. The same rule is used by actors, from the same lines.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pcshare import working_set
from pcshare.stress.plan import (
    PAGE,
    REPLAYED_RUN_MAX,
    REPLAYED_SHARE,
    SLOT_BYTES,
    SLOTS_MAX,
    BlockPlan,
    RoundPlan,
)
from pcshare.stress.servers import Server
from pcshare.working_set import Run, Runs, SetBlock, WorkingSet

HOLE_SHARE = 0.4  # of a sparse file's stretches
STRETCH_PAGES_MAX = 40
SLOT_AREA = SLOT_BYTES * SLOTS_MAX
NPY_MAGIC = b"\x93NUMPY\x01\x00"
NPY_HEADER_BYTES = 118  # with the magic and its length: 128
ERROR_FILE = "source-fails"
SERVER_TIMEOUT = "5s"  # of an answer: a server that is stopped for less is slow, and not away


@dataclass(frozen=True)
class MadeBlock:
    """A block's source. path: the file that holds what must be found (for zero: one that is all hole). server: the
    process that gives it out, if one does."""

    plan: BlockPlan
    path: Path
    source: str
    server: Server | None = None

    def to_json(self) -> dict[str, object]:
        """What an actor must know."""
        slot_area = SLOT_AREA if self.plan.writable else 0
        return {"path": str(self.path), "slot_area": slot_area, "length": self.path.stat().st_size}


def make_blocks(plan: RoundPlan, folder: Path, *, with_nbdkit: bool) -> dict[str, MadeBlock]:
    """The servers among them are not started yet."""
    error = quote(str(folder / ERROR_FILE), safe="/")
    return {block.name: _make_block(block, folder, error, with_nbdkit) for block in plan.blocks}


def _make_block(block: BlockPlan, folder: Path, error: str, with_nbdkit: bool) -> MadeBlock:
    path = folder / (f"{block.name}.npy" if block.kind == "array" else f"{block.name}.bin")
    rng = random.Random(block.seed)
    length = block.pages * PAGE + block.tail
    if block.kind == "zero":
        with open(path, "wb") as file:
            file.truncate(length)
        return MadeBlock(block, path, f"zero:{length}")
    if block.kind == "array":
        _write_npy(path, rng.randbytes(length))
    else:
        _write_sparse(path, rng, length)
    filters = [f"error=EIO@{error}"]
    filters += [f"delay={block.delay_us}us"] if block.delay_us else []
    filters += [f"rate={block.rate}"] if block.rate else []
    if not block.served:
        return MadeBlock(block, path, f"file:{quote(str(path), safe='/')}#{'&'.join(filters)}")
    server = Server(path, folder / f"{block.name}.sock", with_nbdkit=with_nbdkit)
    filters.append(f"timeout={SERVER_TIMEOUT}")
    return MadeBlock(block, path, f"{server.uri}#{'&'.join(filters)}", server)


def write_set(path: Path, seed: int, blocks: Mapping[str, MadeBlock]) -> None:
    """A working set of these blocks, runs of pages in no order, as if a job had touched them."""
    rng = random.Random(seed)
    table = tuple(SetBlock(name, block.path.stat().st_size, PAGE) for name, block in blocks.items())
    runs = [run for place, block in enumerate(table) for run in _random_runs(rng, place, block.page_count)]
    rng.shuffle(runs)
    path.write_bytes(working_set.pack(WorkingSet(table, Runs.of(runs))))


def _random_runs(rng: random.Random, place: int, n_pages: int) -> Iterator[Run]:
    wanted = rng.randrange(int(n_pages * REPLAYED_SHARE))
    while wanted > 0:
        count = rng.randrange(1, REPLAYED_RUN_MAX)
        yield place, rng.randrange(n_pages - count), count
        wanted -= count


def _write_sparse(path: Path, rng: random.Random, length: int) -> None:
    with open(path, "wb") as file:
        file.truncate(length)
        start = 0
        while start < length:
            stretch = min(length - start, PAGE * rng.randrange(1, STRETCH_PAGES_MAX))
            if rng.random() >= HOLE_SHARE:
                os.pwrite(file.fileno(), rng.randbytes(stretch), start)
            start += stretch


def _write_npy(path: Path, content: bytes) -> None:
    described = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({len(content)},), }}"
    header = described.ljust(NPY_HEADER_BYTES - 1).encode() + b"\n"
    path.write_bytes(NPY_MAGIC + len(header).to_bytes(2, "little") + header + content)


def differing(found: bytes, expected: bytes, slot_area: int) -> int:
    """Bytes of one page that are wrong, slots left out."""
    if found[slot_area:] == expected[slot_area:]:
        return 0
    return sum(a != b for a, b in zip(found[slot_area:], expected[slot_area:], strict=True))


# -- which pages an order means, and what a write stores there: an actor does it, and who judges can tell what was meant


def pages_of(page_count: int, seed: int, count: int) -> list[int]:
    """Random ones, or a run of neighbours."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return run_of_pages(page_count, seed, count)
    return [rng.randrange(page_count) for _ in range(count)]


def run_of_pages(page_count: int, seed: int, count: int) -> list[int]:
    """Neighbours."""
    first = random.Random(seed).randrange(page_count)
    return list(range(first, min(first + count, page_count)))


def slot_writes(length: int, writer: int, seed: int, count: int) -> list[tuple[int, bytes]]:
    """What a writer stores into its slots of the pages that are meant: (offset, value)."""
    page_count, writes = -(-length // PAGE), []
    for page in sorted(set(pages_of(page_count, seed, count))):
        offset = page * PAGE + writer * SLOT_BYTES
        if offset + SLOT_BYTES <= length:
            writes.append((offset, random.Random(seed * page_count + page).randbytes(SLOT_BYTES)))
    return writes


def blocks_argument(blocks: dict[str, MadeBlock]) -> str:
    return json.dumps({name: block.to_json() for name, block in blocks.items()})
