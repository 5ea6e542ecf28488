"""working_set: the file of a working set. What was packed comes out; all else is the one error, with what is wrong;
what is served today may differ from what was recorded; and a replay keeps the order with neighbours in one request."""

from __future__ import annotations

import itertools
import os
import random
import stat
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_support import WAIT_S, compile_c
from pcshare import working_set
from pcshare.core import lib
from pcshare.errors import UsageError, WorkingSetError
from pcshare.working_set import Packer, Run, Runs, SetBlock, WorkingSet, fit, pack, parse, plan

PAGE, HUGE = 4 << 10, 2 << 20
DATA = SetBlock("data", 1000 * PAGE - 5, PAGE)
INDEX = SetBlock("index", 40 * HUGE, HUGE)


def made(blocks: tuple[SetBlock, ...], *runs: Run) -> WorkingSet:
    return WorkingSet(blocks, Runs.of(runs))


def told(found: WorkingSet) -> tuple[tuple[SetBlock, ...], list[Run]]:
    return found.blocks, list(found.runs)


# ---- packing and parsing ----


@st.composite
def working_sets(draw: st.DrawFn) -> WorkingSet:
    """Blocks of any size, each with runs that never name a page twice, in any order among all."""
    names = draw(st.lists(st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True), max_size=4, unique=True))
    blocks, runs = [], []
    for place, name in enumerate(names):
        page_size = draw(st.sampled_from([PAGE, HUGE]))
        blocks.append(SetBlock(name, draw(st.integers(0, 1 << draw(st.integers(1, 50)))), page_size))
        cuts = sorted(draw(st.sets(st.integers(0, blocks[-1].page_count), max_size=12)))
        runs += [(place, a, min(b - a, working_set.RUN_PAGES_MAX)) for a, b in itertools.pairwise(cuts)]
    return WorkingSet(tuple(blocks), Runs.of(draw(st.permutations(runs))))


@given(working_sets())
def test_what_was_packed_comes_out(chosen: WorkingSet) -> None:
    assert told(parse(pack(chosen))) == told(chosen)


@given(working_sets(), st.integers(0, 30), st.integers(0, 30))
def test_a_set_that_grew_is_the_same_as_one_packed_at_once(chosen: WorkingSet, first: int, second: int) -> None:
    """Also where its last run was packed before and is longer now."""
    runs = list(chosen.runs)
    packer = Packer(chosen.blocks)
    first, second = sorted((min(first, len(runs)), min(second, len(runs))))
    packer.add(runs[:first])
    assert list(parse(packer.packed(runs[first:second])).runs) == runs[:second]
    packer.add(runs[first:second])
    assert packer.packed(runs[second:]) == pack(chosen)


@given(st.binary(max_size=300))
def test_garbage_is_the_one_error(content: bytes) -> None:
    with pytest.raises(WorkingSetError):
        parse(content)


@given(st.binary(max_size=200))
def test_garbage_in_a_right_frame_is_a_set_or_the_one_error(body: bytes) -> None:
    check_parses_or_refuses(framed(body))


@given(working_sets(), st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_mutated_body_is_a_set_or_the_one_error(chosen: WorkingSet, changes: list[tuple[int, int]]) -> None:
    body = bytearray(zlib.decompress(pack(chosen)[16:]))
    for place, value in changes:
        body[place % len(body)] = value
    check_parses_or_refuses(framed(bytes(body)))


@given(working_sets(), st.integers(0, 1 << 20), st.integers(1, 255))
def test_a_mutated_file_is_refused(chosen: WorkingSet, place: int, change: int) -> None:
    content = bytearray(pack(chosen))
    content[place % len(content)] ^= change
    with pytest.raises(WorkingSetError):
        parse(bytes(content))


@given(working_sets(), st.integers(0, 1 << 20))
def test_a_truncated_file_is_refused(chosen: WorkingSet, length: int) -> None:
    content = pack(chosen)
    with pytest.raises(WorkingSetError):
        parse(content[: length % len(content)])


def framed(body: bytes, version: int = working_set.VERSION) -> bytes:
    packed = zlib.compress(body)
    return working_set.MAGIC + struct.pack("<II", version, len(packed)) + packed


def check_parses_or_refuses(content: bytes) -> None:
    """What parses is in bounds: pages that the blocks have."""
    try:
        found = parse(content)
    except WorkingSetError:
        return
    for place, page, count in found.runs:
        assert 0 <= page < page + count <= found.blocks[place].page_count
        assert count <= working_set.RUN_PAGES_MAX


def numbers(*values: int) -> bytes:
    column = bytearray()
    for value in values:
        working_set._put_varint(column, value)
    return bytes(column)


ONE_BLOCK = numbers(1, 4) + b"data" + numbers(10 * PAGE, PAGE)  # a table
BAD_BODIES = {
    "a table of too many blocks": (numbers(1025), "the number of blocks is 1025"),
    "a name that leads elsewhere": (numbers(1, 5) + b"../up" + numbers(1, PAGE), "is no name of a block"),
    "a name that is no text": (numbers(1, 1) + b"\xff" + numbers(1, PAGE), "is no name of a block"),
    "a name without letters": (numbers(1, 0), "the length of a block's name is 0"),
    "two blocks of one name": (numbers(2, 1) + b"a" + numbers(1, PAGE, 1) + b"a" + numbers(1, PAGE, 0), "same name"),
    "a page size of zero": (numbers(1, 1) + b"a" + numbers(1, 0), "the page size of block a is 0"),
    "a page size that is no power of two": (numbers(1, 1) + b"a" + numbers(1, 5000), "no power of two"),
    "a block without end": (numbers(1, 1) + b"a" + numbers((1 << 56) + 1, PAGE), "the length of block a is"),
    "a number without end": (numbers(1, 1) + b"a" + b"\xff" * 40, "is no number"),
    "more runs than there may be": (ONE_BLOCK + numbers((4 << 20) + 1), "the number of runs is 4194305"),
    "columns that are not there": (ONE_BLOCK + numbers(5), "it ends in the middle"),
    "a column that is too long": (ONE_BLOCK + numbers(1, 10, 1, 1), "the length of a column is 10"),
    "a column of one number too few": (
        ONE_BLOCK + numbers(2, 2, 2, 2) + b"\0\0" + b"\x80\0" + b"\0\0", "more or fewer numbers",
    ),
    "a column that ends in the middle of a number": (
        ONE_BLOCK + numbers(1, 1, 2, 1) + b"\0" + b"\x80\x80" + b"\0", "more or fewer numbers",
    ),
    "a block that is not in the table": (ONE_BLOCK + numbers(1, 1, 1, 1, 1, 0, 0), "a run is of block 1"),
    "a page before the first": (ONE_BLOCK + numbers(1, 1, 1, 1, 0, 1, 0), "block data has no pages -1"),
    "a page behind the last": (ONE_BLOCK + numbers(1, 1, 1, 1, 0, 2 * 10, 0), "block data has no pages 10 to 10"),
    "a run over the end": (ONE_BLOCK + numbers(1, 1, 1, 1, 0, 2 * 9, 1), "block data has no pages 9 to 10"),
    "more pages than there are": (
        ONE_BLOCK + numbers(2, 2, 2, 2, 0, 0, 0, 11, 5, 5), "more pages of block data than there are",
    ),
    "something behind": (ONE_BLOCK + numbers(0, 0, 0, 0, 7), "something follows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BODIES)
def test_hostile_value_is_named(name: str) -> None:
    body, text = BAD_BODIES[name]
    with pytest.raises(WorkingSetError, match=text):
        parse(framed(body))


def test_bomb_is_not_unpacked() -> None:
    """What would unpack to more than any set needs is refused before it takes the memory."""
    content = framed(bytes(working_set.BODY_BYTES_MAX + 1))
    assert len(content) < 1 << 20
    with pytest.raises(WorkingSetError, match="does not end where it should"):
        parse(content)


def test_other_version_is_named() -> None:
    with pytest.raises(WorkingSetError, match="of version 2, this pcshare reads version 1"):
        parse(framed(b"", version=2))


def test_limits_are_those_of_the_core() -> None:
    assert working_set.RUNS_MAX == lib.WORKING_SET_RUNS_MAX
    assert working_set.BLOCKS_MAX == lib.STATUS_BLOCKS_MAX
    longest = Packer([SetBlock(f"{n}".rjust(63, "x"), 1 << 56, PAGE) for n in range(working_set.BLOCKS_MAX)])
    assert len(longest._table) <= working_set.BLOCKS_MAX * 128
    columns = (bytearray(), bytearray(), bytearray())
    working_set._put_runs(columns, [(1 << 44) - 1] * 1024, [(1023, 0, working_set.RUN_PAGES_MAX)])
    assert sum(map(len, columns)) <= working_set.RUN_BYTES_MAX


def test_file_is_small(rng: random.Random) -> None:
    """A page touched at random takes 3 bytes, and one in a row next to nothing."""
    n_pages = 1 << 17
    block = SetBlock("data", n_pages * PAGE, PAGE)
    pages = list(range(n_pages))
    rng.shuffle(pages)
    assert len(pack(made((block,), *((0, page, 1) for page in pages)))) < 3 * n_pages
    assert len(pack(made((block,), (0, 0, n_pages)))) < 100
    steps = [(0, page, 1) for page in range(0, n_pages, 2)]
    assert len(pack(made((block,), *steps))) < len(steps) // 50


# ---- what is served today ----


def fitted(chosen: WorkingSet, *served: SetBlock) -> tuple[list[Run], list[str]]:
    """The runs that are left, by the index of the block, 10 for the first; and the remarks."""
    runs, remarks = fit(chosen, {10 + number: block for number, block in enumerate(served)})
    return list(runs), remarks


def test_the_same_blocks_are_found_by_name_in_any_order() -> None:
    chosen = made((DATA, INDEX), (0, 7, 2), (1, 3, 1), (0, 2, 1))
    assert fitted(chosen, INDEX, DATA) == ([(11, 7, 2), (10, 3, 1), (11, 2, 1)], [])


def test_block_that_is_not_served_is_left_out_with_a_remark() -> None:
    runs, remarks = fitted(made((DATA, INDEX), (0, 7, 2), (1, 3, 1)), INDEX)
    assert runs == [(10, 3, 1)]
    assert remarks == ["block data is not served, and what is said of it is ignored"]


@pytest.mark.parametrize(
    ("pages_now", "wanted"), [(2000, [(10, 995, 5), (10, 7, 2)]), (998, [(10, 995, 3), (10, 7, 2)]), (8, [(10, 7, 1)])]
)
def test_pages_that_exist_of_a_source_of_another_size_are_used(pages_now: int, wanted: list[Run]) -> None:
    runs, remarks = fitted(made((DATA,), (0, 995, 5), (0, 7, 2)), SetBlock("data", pages_now * PAGE, PAGE))
    assert runs == wanted
    assert len(remarks) == 1
    assert f"had {DATA.used_length} bytes and has {pages_now * PAGE}" in remarks[0]


def test_small_pages_become_the_huge_ones_that_they_lie_in() -> None:
    then, now = SetBlock("data", 10 * HUGE, PAGE), SetBlock("data", 10 * HUGE, HUGE)
    runs, remarks = fitted(made((then,), (0, 511, 1), (0, 510, 1), (0, 511 + 512, 2), (0, 4000, 9)), now)
    assert (runs, remarks) == ([(10, 0, 1), (10, 1, 2), (10, 7, 1)], [])


def test_huge_pages_become_all_the_small_ones_in_them() -> None:
    then, now = SetBlock("data", 10 * HUGE - 5 * PAGE, HUGE), SetBlock("data", 10 * HUGE - 5 * PAGE, PAGE)
    runs, remarks = fitted(made((then,), (0, 9, 1), (0, 2, 2)), now)
    assert (runs, remarks) == ([(10, 9 * 512, 507), (10, 1024, 1024)], [])


# ---- the plan of a replay ----


def planned(*runs: Run, piece: int = 64) -> list[Run]:
    """The requests in their order: block, first page, how many."""
    return plan(Runs.of(runs), {block: piece for block, _, _ in runs}).runs


def test_pages_far_apart_are_asked_for_in_the_order_of_their_touches() -> None:
    touched = [(0, 700, 1), (1, 5, 1), (0, 20, 2), (0, 300, 1), (1, 900, 1)]
    assert planned(*touched) == touched


def test_neighbours_are_one_request_in_the_place_of_the_earliest() -> None:
    """With a gap of a 32nd of a piece, 2 pages here, and no more."""
    assert planned((0, 500, 1), (0, 12, 1), (0, 502, 1), (0, 10, 1), (0, 505, 1), (0, 509, 1), (0, 498, 1)) == [
        (0, 498, 8),
        (0, 10, 3),
        (0, 509, 1),
    ]


def test_request_is_no_larger_than_a_piece_where_it_is_made_of_several() -> None:
    assert planned((0, 0, 60), (0, 60, 4), (0, 64, 1)) == [(0, 0, 64), (0, 64, 1)]
    assert planned((0, 0, 1000)) == [(0, 0, 1000)]


def test_page_that_is_named_twice_is_counted_once() -> None:
    chosen = Runs.of([(0, 10, 10), (0, 15, 10), (0, 12, 2), (0, 40, 1)])
    assert plan(chosen, {0: 64}).n_pages == 16


@given(working_sets())
def test_plan_names_every_page_once_and_no_page_beyond(chosen: WorkingSet) -> None:
    small = Runs.of((place, page, min(count, 50)) for place, page, count in chosen.runs)
    wanted = {(place, at) for place, page, count in small for at in range(page, page + count)}
    made_plan = plan(small, dict.fromkeys(small.block, 64))
    asked = [(place, at) for place, page, count in made_plan.runs for at in range(page, page + count)]
    assert len(asked) == len(set(asked))
    assert wanted <= set(asked)
    assert made_plan.n_pages == len(wanted)
    last = {place: max(page + count for of, page, count in small if of == place) for place in set(small.block)}
    assert all(at < last[place] for place, at in asked)


# ---- files ----


def test_file_is_read_as_it_was_written_and_is_its_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "ws"
    path.write_text("anything")
    path.chmod(0o666)
    chosen = made((DATA,), (0, 3, 1))
    working_set.write(str(path), pack(chosen), "somebody")
    assert told(working_set.read(str(path))) == told(chosen)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["ws"]


def test_link_that_lies_in_the_way_is_replaced_and_never_written_through(tmp_path: Path) -> None:
    secret, path, way = tmp_path / "secret", tmp_path / "ws", tmp_path / ".ws.somebody"
    secret.write_text("mine")
    path.symlink_to(secret)
    way.symlink_to(secret)
    working_set.write(str(path), b"content", "somebody")
    assert secret.read_text() == "mine"
    assert not path.is_symlink()
    assert path.read_bytes() == b"content"


def test_file_that_cannot_be_written_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ws"
    path.mkdir()
    with pytest.raises(WorkingSetError, match=r"cannot write the working set .*ws: Is a directory"):
        working_set.write(str(path), b"content", "somebody")
    assert os.listdir(tmp_path) == ["ws"]


def test_bad_file_is_named_with_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "ws"
    path.write_bytes(b"something else")
    with pytest.raises(
        WorkingSetError, match=r"cannot use .*/ws as a working set: it is no working set; record it anew"
    ):
        working_set.read(str(path))
    path.write_bytes(b"")
    with pytest.raises(WorkingSetError, match="it is empty"):
        working_set.read(str(path))
    with path.open("wb") as file:
        file.truncate(working_set.FILE_BYTES_MAX + 1)
    with pytest.raises(WorkingSetError, match="it has more than"):
        working_set.read(str(path))


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WorkingSetError, match="is no file"):
        working_set.read(str(tmp_path / "pipe"))
    with pytest.raises(WorkingSetError, match="is no file"):
        working_set.read(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        working_set.read(str(tmp_path / "nothing"))


def test_only_a_working_set_is_ever_overwritten(tmp_path: Path) -> None:
    old, data, empty = tmp_path / "old", tmp_path / "data", tmp_path / "empty"
    old.write_bytes(pack(made((DATA,))))
    data.write_text("a user's own")
    empty.touch()
    (tmp_path / "link").symlink_to(old)
    for fine in (old, empty, tmp_path / "new"):
        working_set.check_target(str(fine))
    with pytest.raises(WorkingSetError, match="is no working set: it is not overwritten"):
        working_set.check_target(str(data))
    with pytest.raises(UsageError, match="that is a symbolic link"):
        working_set.check_target(str(tmp_path / "link"))
    with pytest.raises(UsageError, match="that is no file"):
        working_set.check_target(str(tmp_path))
    with pytest.raises(UsageError, match="no file can be made there"):
        working_set.check_target("/no/such/folder/ws")


# ---- what the core notes ----


SANITIZERS = {"plain": None, "asan": "address,undefined", "tsan": "thread"}
CASES = (
    "each_page_once_in_the_order_of_the_touches",
    "range_is_what_is_new_of_it",
    "what_was_kept_goes_on_and_is_not_noted_again",
    "no_more_than_there_may_be",
    "nothing_is_noted_where_nothing_is_recorded",
    "each_page_once_between_threads",
)


@pytest.fixture(scope="module", params=sorted(SANITIZERS))
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("c") / f"working_set_test_{request.param}"
    return compile_c(target, "working_set_test.c", ["working_set.c", "bitmap.c"], SANITIZERS[request.param])


@pytest.mark.parametrize("case", CASES)
def test_notes_of_the_core(program: Path, case: str) -> None:
    """c/working_set_test.c, a case a run, also under the sanitizers."""
    done = subprocess.run(
        ["setarch", "-R", str(program), case], capture_output=True, text=True, timeout=WAIT_S * 2, check=False
    )
    assert done.returncode == 0, done.stderr
