"""progress: a picture of the pages of a block as they arrive, and the one-line form of it.

Draws what the status segment says and asks nobody: a view must never slow down what it shows. The received bitmap
tells which pages are here, not why each came; the counters tell how many came on demand and how many by the stream.
Between two looks the few pages that came alone in their cell are taken for the demanded ones, as many as the counter
grew: exact where only one kind came, a good guess else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from pcshare import units

if TYPE_CHECKING:
    from pcshare.status import BlockStatus, StatusReport

STRIP_CELLS = 32  # of the one-line form
PICTURE_COLUMNS_MAX = 96
PICTURE_CELLS = 6 * PICTURE_COLUMNS_MAX
PERCENT_FULL = 100


class Kind(Enum):
    """What a cell stands for: style, letter for terminals without colours or without UTF-8, word for the legend."""

    MISSING = ("dim", ".", "not received")
    RECEIVED = ("cyan", "#", "received")
    DEMAND = ("bold yellow", "D", "on demand")
    STREAM = ("green", "s", "by the stream")
    HOLE = ("dim blue", "o", "hole")
    COMPLETE = ("bold green", "#", "complete")

    @property
    def style(self) -> str:
        return self.value[0]

    @property
    def letter(self) -> str:
        return self.value[1]

    @property
    def word(self) -> str:
        return self.value[2]


_LEVELS = "▁▂▃▄▅▆▇█"
_SYMBOLS = {Kind.MISSING: "·", Kind.HOLE: "○"}


def count_received(received: bytes, page_count: int, cells: int) -> list[int]:
    """How many pages are received in each of so many equal parts of the block. Page p is bit p % 8 of byte p // 8."""
    bounds = [page_count * i // cells for i in range(cells + 1)]
    return [_count_bits(received, low, high) for low, high in itertools.pairwise(bounds)]


def _count_bits(bitmap: bytes, low: int, high: int) -> int:
    part = int.from_bytes(bitmap[low // 8 : (high + 7) // 8], "little") >> (low % 8)
    return (part & ((1 << (high - low)) - 1)).bit_count()


@dataclass
class Cell:
    pages: int
    received: int = 0
    kind: Kind = Kind.MISSING


class PagePicture:
    """A grid of cells, each a few neighbouring pages. It remembers what it saw: one object for one block, over time."""

    def __init__(self, cells: int) -> None:
        self._cells_wanted = max(1, cells)
        self.cells: list[Cell] = []
        self._demand_pages = 0
        self._looked = False
        self.complete = False

    def update(self, *, received: bytes, page_count: int, demand_pages: int, complete: bool) -> None:
        """One look. complete: the block is at END, so what is not received is a hole."""
        cells = min(self._cells_wanted, page_count)
        if len(self.cells) != cells:
            self.cells = [Cell(page_count * (i + 1) // cells - page_count * i // cells) for i in range(cells)]
            self._looked = False
        counts = count_received(received, page_count, cells) if cells else []
        self._attribute([now - cell.received for now, cell in zip(counts, self.cells, strict=True)], demand_pages)
        for cell, now in zip(self.cells, counts, strict=True):
            cell.received = now
            if complete and now == 0:
                cell.kind = Kind.HOLE
            elif complete and cell.kind is Kind.RECEIVED:
                cell.kind = Kind.COMPLETE
            elif now == 0:  # discarded
                cell.kind = Kind.MISSING
        self._demand_pages, self._looked, self.complete = demand_pages, True, complete

    def _attribute(self, fresh: Sequence[int], demand_pages: int) -> None:
        """Says of every cell with fresh pages how they came: the loneliest first on demand."""
        demanded = demand_pages - self._demand_pages
        for index in sorted((i for i, pages in enumerate(fresh) if pages > 0), key=lambda i: fresh[i]):
            cell = self.cells[index]
            if not self._looked:
                cell.kind = Kind.RECEIVED
            elif demanded > 0:
                cell.kind = Kind.DEMAND
                demanded -= fresh[index]
            elif cell.kind is not Kind.DEMAND:
                cell.kind = Kind.STREAM

    def columns_within(self, width: int) -> int:
        """So many that all rows are of about one length."""
        row_count = -(-len(self.cells) // width)
        return -(-len(self.cells) // max(1, row_count))

    def rows(self, columns: int, plain: bool) -> list[Text]:
        """The cells, so many a row. plain: letters instead of blocks and colours."""
        starts = range(0, len(self.cells), max(1, columns))
        return [_row(self.cells[start : start + columns], plain) for start in starts]

    def legend(self, plain: bool) -> Text:
        """Only the kinds that are to be seen."""
        seen = {cell.kind for cell in self.cells}
        text = Text()
        for kind in (kind for kind in Kind if kind in seen):
            full = Cell(pages=1, received=int(kind not in _SYMBOLS), kind=kind)
            text.append("  " if text else "").append(_symbol(full, plain), style=None if plain else kind.style)
            text.append(f" {kind.word}", style="dim")
        return text


def _row(cells: Sequence[Cell], plain: bool) -> Text:
    """Neighbours of one kind in one piece: a terminal is slow."""
    text = Text(no_wrap=True)
    for kind, same in itertools.groupby(cells, key=lambda cell: cell.kind):
        text.append("".join(_symbol(cell, plain) for cell in same), style=None if plain else kind.style)
    return text


def _symbol(cell: Cell, plain: bool) -> str:
    if plain:
        return cell.kind.letter
    if cell.kind in _SYMBOLS:
        return _SYMBOLS[cell.kind]
    return _LEVELS[max(1, cell.received * len(_LEVELS) // cell.pages) - 1]


def is_plain(console: Console) -> bool:
    """Whether blocks and colours would be lost on it."""
    return console.color_system is None or "utf" not in console.encoding.lower()


def percent_text(fraction: float) -> str:
    """Never 100 % before it is."""
    return f"{min(int(fraction * PERCENT_FULL), PERCENT_FULL)} %"


def bytes_in(block: BlockStatus) -> int:
    return min(block.used_length, (block.received_pages + block.hole_pages) * block.page_size)


class ProgressView:
    """Every block of a coordinator over time. line(): one line for all. As a renderable: a picture a block."""

    def __init__(self, cells: int = PICTURE_CELLS) -> None:
        self._cells = cells
        self._pictures: dict[str, PagePicture] = {}
        self._report: StatusReport | None = None

    def update(self, report: StatusReport, bitmap_of: Callable[[BlockStatus], bytes]) -> None:
        """One look; bitmap_of reads a received bitmap, as StatusReader.bitmap does."""
        self._report = report
        for block in report.blocks:
            picture = self._pictures.setdefault(block.idstr, PagePicture(self._cells))
            if picture.complete and block.state == "END":  # nothing changes any more, and a bitmap can be large
                continue
            picture.update(
                received=bitmap_of(block),
                page_count=block.page_count,
                demand_pages=block.demand_pages,
                complete=block.state == "END",
            )

    @property
    def complete(self) -> bool:
        blocks = self._report.blocks if self._report is not None else ()
        return bool(blocks) and all(block.state == "END" for block in blocks)

    def line(self, plain: bool) -> Text:
        text = Text(no_wrap=True, overflow="ellipsis").append("pcshare", style="bold")
        if self._report is None:
            return text
        if not self._report.blocks:
            text.append(f"  {self._report.reason}", style="yellow")
        for block in self._report.blocks:
            text.append(f"  {block.idstr} ").append("▕" if not plain else "|", style="dim")
            for row in self._pictures[block.idstr].rows(self._cells, plain):  # one, or none of an empty block
                text.append_text(row)
            text.append("▏" if not plain else "|", style="dim")
            text.append(f" {percent_text(block.fraction)}")
            if block.state == "PAUSED":
                text.append(" paused", style="bold red")
        waiting = sum(helper.waiting for helper in self._report.helpers)
        return text.append(f"  helpers {len(self._report.helpers)}, waiting {waiting}", style="dim")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._report is None:
            return
        plain = is_plain(console)
        for block in self._report.blocks:
            picture = self._pictures[block.idstr]
            columns = picture.columns_within(min(options.max_width, PICTURE_COLUMNS_MAX))
            yield Group(block_line(block), *picture.rows(columns, plain), picture.legend(plain))


def block_line(block: BlockStatus) -> Table:
    """Name, how much is in, and how it came."""
    table = Table.grid(padding=(0, 2))
    table.add_row(
        Text(block.idstr, style="bold"),
        f"{units.format_bytes(bytes_in(block))} of {units.format_bytes(block.used_length)}",
        percent_text(block.fraction),
        Text(block.state, style="bold red" if block.state == "PAUSED" else "dim"),
        f"demand {block.demand_pages:,}  stream {block.stream_pages:,}  zero {block.zero_pages:,}",
        f"holes {block.hole_pages:,}",
        *([f"lost {block.lost_pages:,}"] if block.lost_pages else []),
    )
    return table
