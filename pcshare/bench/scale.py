"""scale: what a fault costs as the block, the crowd of helpers and the number of blocks grow, beside the small case.

The job is the same on both sides: as many touches, of pages that are at hand, by one helper pinned to a CPU, with
nothing read ahead. The large block is a sparse file with the small one's data in it, in pieces of 2 MiB that lie evenly
over all of it, and helpers that touch together have a part of the block each: else page tables would be measured, which
the kernel makes for each process and each 2 MiB.

Many processes on a CPU cost more than few, whoever answers them: Linux on x86 keeps the TLB entries of six address
spaces a CPU. So the smallest server (bench-crowd) is measured with as many helpers.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

from pcshare.bench.contest import Contest, Figures, Rival, Row
from pcshare.bench.crowd import HELPERS_SPARE, idle_helpers, stride, touch_together
from pcshare.bench.lab import HUGE_PAGE, LENGTH_MIN, MIB, ONLY_DEMAND, PAGE, Lab

DOES_NOT_MEASURE = "how long it takes to start with many blocks, to attach many helpers; a source that is not at hand"
TIB = 1 << 40
LENGTH, LENGTH_LARGE = 64 * MIB, TIB
TOUCHES = 16000
HELPERS, BLOCKS = 1000, 1000
LENGTH_TOGETHER, TOUCHES_TOGETHER = 256 * MIB, 60000
ACTIVE_FEW, ACTIVE_MANY = 2, 32
COST_MAX, SPEED_MIN = 1.2, 0.9
READY_TIMEOUT_S = 120.0  # of a thousand blocks
TOUCHED = "touched"  # the block that is, beside others

PINNED = "helper on CPU 0, fault threads as by default"


def contests(lab: Lab) -> Sequence[Contest]:
    return [_of_size(lab), _of_helpers(lab), _of_blocks(lab), _of_faulters(lab)]


def _cost(name: str, many: tuple[str, Rival], few: tuple[str, Rival]) -> Contest:
    return Contest(
        name=f"scale, {name}",
        stream="lazy, nothing read ahead",
        pinning=PINNED,
        rivals=dict([many, few]),
        rows=[
            Row("median", "p50", few[0], of=many[0], number="F8", at_most=COST_MAX),
            Row("p99", "p99", few[0], of=many[0]),
        ],
    )


# -- the size of the block


def _of_size(lab: Lab) -> Contest:
    data_length = lab.length(LENGTH)

    def touches(length: int) -> Rival:
        def measured(_: int) -> Figures:
            source, pages = _spread_out(lab, length, data_length), _walk_of_data(lab, length, data_length)
            with lab.coordinator(source, **ONLY_DEMAND) as serving:
                return lab.touch("list", lab.cpus[0], pages, f"pcshare:{serving.socket}")

        return measured

    large = lab.length(LENGTH_LARGE)
    return _cost("size of the block", ("1 TiB, sparse", touches(large)), ("64 MiB", touches(data_length)))


def _spacing(length: int, data_length: int) -> int:
    """From one piece of data to the next."""
    return length // (data_length // HUGE_PAGE) // HUGE_PAGE * HUGE_PAGE


def _spread_out(lab: Lab, length: int, data_length: int) -> Path:
    """A file of that length with these data in pieces of HUGE_PAGE, holes between them; at hand."""
    data = lab.file(data_length)
    if length == data_length:
        return data
    path = lab.folder / f"sparse-{length}.bin"
    if not path.exists():
        with data.open("rb") as source, path.open("wb") as file:
            for piece in range(data_length // HUGE_PAGE):
                file.seek(piece * _spacing(length, data_length))
                file.write(source.read(HUGE_PAGE))
            file.truncate(length)
    return path  # what was just written is in the page cache


def _walk_of_data(lab: Lab, length: int, data_length: int) -> Path:
    """The pages that hold data, in the order in which `bench-touch walk` goes through a file of nothing else."""
    pages, a_piece = data_length // PAGE, HUGE_PAGE // PAGE
    step, spacing = stride(pages), _spacing(length, data_length) // PAGE
    walk = (i * step % pages for i in range(min(lab.count(TOUCHES), pages)))
    path = lab.folder / f"walk-{length}.list"
    path.write_bytes(array("Q", (at // a_piece * spacing + at % a_piece for at in walk)).tobytes())
    return path


# -- helpers that do nothing


def _of_helpers(lab: Lab) -> Contest:
    def beside(n: int) -> Rival:
        def measured(_: int) -> Figures:
            path = lab.file(lab.length(LENGTH))
            with lab.coordinator(path, **ONLY_DEMAND, helpers_max=n + HELPERS_SPARE) as serving:
                target = f"pcshare:{serving.socket}"
                with idle_helpers(lab, n, target):
                    return lab.touch("walk", lab.cpus[0], lab.count(TOUCHES), target)

        return measured

    many = max(lab.count(HELPERS), 2)
    return _cost("idle helpers", (f"{HELPERS} idle helpers", beside(many)), ("1 idle helper", beside(1)))


# -- blocks that nobody touches


def _of_blocks(lab: Lab) -> Contest:
    def among(n: int) -> Rival:
        def measured(_: int) -> Figures:
            others = {f"b{number}": str(lab.file(LENGTH_MIN)) for number in range(n - 1)}
            sources = {**others, TOUCHED: str(lab.file(lab.length(LENGTH)))}
            with lab.coordinator(sources, **ONLY_DEMAND, ready_timeout_s=READY_TIMEOUT_S) as serving:
                target = f"pcshare:{serving.socket}#{TOUCHED}"
                return lab.touch("walk", lab.cpus[0], lab.count(TOUCHES), target)

        return measured

    many = max(lab.count(BLOCKS), 2)
    return _cost("blocks", (f"{BLOCKS} blocks", among(many)), ("1 block", among(1)))


# -- helpers that all touch


def _of_faulters(lab: Lab) -> Contest:
    length, touches = lab.length(LENGTH_TOGETHER), lab.count(TOUCHES_TOGETHER)

    def together(n: int) -> Rival:
        def measured(_: int) -> Figures:
            with lab.coordinator(lab.file(length), **ONLY_DEMAND) as serving:
                return touch_together(lab, n, touches, f"pcshare:{serving.socket}")

        return measured

    def of_smallest(n: int) -> Rival:
        return lambda _: touch_together(lab, n, touches, f"server:{lab.file(length)}")

    many, few = f"{ACTIVE_MANY} active helpers", f"{ACTIVE_FEW} active helpers"
    smallest_many, smallest_few = (f"{n} helpers of the smallest server" for n in (ACTIVE_MANY, ACTIVE_FEW))
    return Contest(
        name="scale, active helpers",
        stream="lazy, nothing read ahead",
        pinning="helpers not pinned, fault threads as by default; with the smallest server all pinned",
        rivals={many: together(ACTIVE_MANY), few: together(ACTIVE_FEW)}
        | {smallest_many: of_smallest(ACTIVE_MANY), smallest_few: of_smallest(ACTIVE_FEW)},
        rows=[
            Row("faults a second", "faults_per_s", few, of=many, number="F9", at_least=SPEED_MIN),
            Row("faults a second", "faults_per_s", smallest_few, of=smallest_many),
            Row("faults a second", "faults_per_s", smallest_many, of=many),
        ],
    )
