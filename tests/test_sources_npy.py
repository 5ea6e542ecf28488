"""The .npy header without numpy: the same answer as numpy's own, and nothing but SourceError for garbage."""

from __future__ import annotations

import ast
import random
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from pcshare.errors import SourceError
from pcshare.sources.npy import (
    NPY_DIMS_MAX,
    NPY_DTYPE_DEPTH_MAX,
    NPY_DTYPE_TEXT_MAX,
    NPY_HEADER_MAX,
    NPY_MAGIC,
    ArrayDescription,
    parse_npy,
)


def npy(literal: str | bytes, data_bytes: int = 0, version: int = 1) -> bytes:
    """The bytes of a .npy file with this header."""
    header = literal if isinstance(literal, bytes) else literal.encode("utf-8" if version == 3 else "latin-1")
    return (
        NPY_MAGIC
        + bytes([version, 0])
        + struct.pack("<H" if version == 1 else "<I", len(header))
        + header
        + bytes(data_bytes)
    )


def header(descr: str = "'<f8'", shape: str = "(2,)", fortran: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


def parse(content: bytes) -> ArrayDescription | None:
    return parse_npy(content, len(content), "x.npy")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_versions_1_2_and_3_are_read(version: int) -> None:
    content = npy(header(shape="(3, 4)", fortran="True"), 96, version)
    assert parse(content) == ArrayDescription("<f8", (3, 4), True, len(content) - 96)


def test_field_names_of_version_3_are_utf8() -> None:
    described = parse(npy(header("[('größe', '<f8')]", "(1,)"), 8, version=3))
    assert described
    assert ast.literal_eval(described.dtype) == [("größe", "<f8")]


def test_scalar_and_empty_arrays_are_arrays() -> None:
    for shape, data_bytes in ((), 8), ((0,), 0), ((0, 1 << 40), 0):
        described = parse(npy(header(shape=repr(shape)), data_bytes))
        assert described
        assert described.shape == shape


def test_bytes_after_the_array_do_no_harm() -> None:
    assert parse(npy(header(), 16 + 100)) is not None


@pytest.mark.parametrize("content", [b"", b"\x93", b"\x93NUMP", b"PK\3\4", bytes(100), b"\x94NUMPY\1\0"])
def test_other_magic_is_no_array(content: bytes) -> None:
    assert parse(content) is None


@pytest.mark.parametrize(
    ("descr", "item_bytes"),
    [
        ("'|b1'", 1),
        ("'<u2'", 2),
        ("'>i8'", 8),
        ("'<f2'", 2),
        ("'<f16'", 16),
        ("'<c16'", 16),
        ("'|S5'", 5),
        ("'<U3'", 12),
        ("'|V7'", 7),
        ("'<M8[ns]'", 8),
        ("'<m8[25s]'", 8),
        ("[('a', '<f4'), ('', '|V4'), ('b', '<i8')]", 16),
        ("[('a', '<f4', (2, 3))]", 24),
        ("[('a', '<f4', 3)]", 12),
        ("[('a', ('<f4', (2,)))]", 8),
        ("[(('title', 'a'), '<f4')]", 4),
        ("[('a', [('b', '|u1'), ('c', '<f8')], (2,))]", 18),
    ],
)
def test_data_must_be_as_long_as_the_header_says(descr: str, item_bytes: int) -> None:
    assert parse(npy(header(descr, "(2,)"), 2 * item_bytes)) is not None
    with pytest.raises(
        SourceError, match=f"promises {2 * item_bytes} bytes of data, but only {2 * item_bytes - 1} follow"
    ):
        parse(npy(header(descr, "(2,)"), 2 * item_bytes - 1))


@pytest.mark.parametrize("descr", ["'|O'", "'O'", "'|O8'", "[('a', '<f8'), ('b', '|O')]", "[('a', [('b', '|O')])]"])
def test_objects_are_refused_with_the_cure(descr: str) -> None:
    with pytest.raises(SourceError, match="holds Python objects") as refusal:
        parse(npy(header(descr), 1000))
    assert "astype" in (refusal.value.hint or "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (NPY_MAGIC, "ends inside its .npy header"),
        (NPY_MAGIC + b"\1", "ends inside its .npy header"),
        (NPY_MAGIC + b"\1\0", "ends inside its .npy header"),
        (NPY_MAGIC + b"\1\0\5\0{}", "ends inside its .npy header"),
        (NPY_MAGIC + b"\2\0\5\0", "ends inside its .npy header"),
        (NPY_MAGIC + b"\4\0\0\0", "version 4.0 is not known"),
        (NPY_MAGIC + b"\1\1\0\0", "version 1.1 is not known"),
        (NPY_MAGIC + b"\2\0\xff\xff\xff\xff", "more than 10000"),
        (npy(" " * (NPY_HEADER_MAX + 1)), "more than 10000"),
        (npy(""), "cannot be read"),
        (npy("{'descr'"), "cannot be read"),
        (npy("\0"), "cannot be read"),
        (npy("__import__('os')"), "cannot be read"),
        (npy("{[]: 1}"), "cannot be read"),
        (npy("(" * NPY_HEADER_MAX), "cannot be read"),
        (npy("-" * (NPY_HEADER_MAX - 1) + "1"), "cannot be read"),
        (npy(header("[" * 4000 + "]" * 4000)), "cannot be read"),
        (npy(header(shape="(" + "9" * 5000 + ",)")), "cannot be read"),
        (npy(b"\xff\xfe", version=3), "cannot be read"),
        (npy("[]"), "does not have just descr"),
        (npy("{'descr': '<f8', 'shape': (2,)}"), "does not have just descr"),
        (npy(header()[:-1] + "'more': 1}"), "does not have just descr"),
        (npy(header(shape="[2]")), "is no tuple of sizes"),
        (npy(header(shape="2")), "is no tuple of sizes"),
        (npy(header(shape="(-1,)")), "is no tuple of sizes"),
        (npy(header(shape="(True,)")), "is no tuple of sizes"),
        (npy(header(shape="(2.0,)")), "is no tuple of sizes"),
        (npy(header(shape="(0x" + "f" * 9000 + ",)")), "is no tuple of sizes"),
        (npy(header(shape=repr((1,) * (NPY_DIMS_MAX + 1)))), "33 dimensions"),
        (npy(header(shape=repr((1 << 62,) * NPY_DIMS_MAX))), "larger than any memory"),
        (npy(header("'|V0'", repr((1 << 62, 4, 0)))), "larger than any memory"),
        (npy(header(fortran="1")), "neither True nor False"),
        (npy(header("'float64'")), "is not known"),
        (npy(header("'<f3'")), "is not known"),
        (npy(header("'<f8[ns]'")), "is not known"),
        (npy(header("'<f\u00b2'")), "is not known"),
        (npy(header("'" + "S" * 9000 + "'")), "is not known"),
        (npy(header("7")), "cannot be read"),
        (npy(header("[]")), "cannot be read"),
        (npy(header("['<f8']")), "is not (name, dtype)"),
        (npy(header("[('a',)]")), "is not (name, dtype)"),
        (npy(header("[(1, '<f8')]")), "has no name"),
        (npy(header("[('a', '<f8', (-1,))]")), "shape of a field"),
        (npy(header("[('a', '<f8', 'x')]")), "shape of a field"),
        (npy(header("[('a', '<f8'), ('a', '<f4')]")), "two fields of its dtype are named 'a'"),
        (npy(header("(" * 40 + "'<f8'" + ", (1,))" * 40)), f"deeper than {NPY_DTYPE_DEPTH_MAX}"),
    ],
)
def test_broken_header_is_a_source_error_that_names_the_file(content: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=re.escape(message)) as refusal:
        parse(content)
    assert refusal.value.message.startswith("x.npy: ")
    assert refusal.value.hint


def test_dtype_that_does_not_fit_a_message_is_refused() -> None:
    fields = [(f"field{i:04}", "|u1") for i in range(60)]
    assert len(repr(fields)) > NPY_DTYPE_TEXT_MAX
    with pytest.raises(SourceError, match=f"more than {NPY_DTYPE_TEXT_MAX}"):
        parse(npy(header(repr(fields), "(1,)"), 60))


def test_limits_are_those_of_the_wire() -> None:
    wire = (Path(__file__).parent.parent / "pcshare" / "core" / "wire.h").read_text()
    limits = {name: int(value) for name, value in re.findall(r"(WIRE_\w+) = (\d+),", wire)}
    assert limits["WIRE_DTYPE_MAX"] - 1 == NPY_DTYPE_TEXT_MAX
    assert limits["WIRE_DIMS_MAX"] == NPY_DIMS_MAX


def _mutated(rng: random.Random, content: bytes) -> bytes:
    bytes_ = bytearray(content)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(6, len(bytes_))
        match rng.randrange(4):
            case 0:
                bytes_[at] = rng.randrange(256)
            case 1:
                del bytes_[at : at + rng.randrange(1, 8)]
            case 2:
                bytes_[at:at] = bytes(
                    rng.choices(b"()[]{}',:0123456789<>|fOSUV\\x\"-+eJL\xff\0", k=rng.randrange(1, 8))
                )
            case 3:
                bytes_[at:at] = bytes_[at : at + rng.randrange(1, 40)]
        if len(bytes_) <= 7:
            break
    return bytes(bytes_)


def test_garbage_gives_a_description_none_or_a_source_error() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    good = [
        npy(header(), 16),
        npy(header("[('a', '<f4', (2, 3)), (('t', 'b'), [('c', '<U3')])]", "(2, 1)"), 100, version=2),
        npy(header("'<M8[ns]'", "()", "True"), 8, version=3),
    ]
    outcomes = {"array": 0, "none": 0, "error": 0}
    for _ in range(20_000):
        content = rng.randbytes(rng.randrange(64)) if rng.random() < 0.1 else _mutated(rng, rng.choice(good))
        try:
            outcome = "none" if parse(content) is None else "array"
        except SourceError:
            outcome = "error"
        outcomes[outcome] += 1
    assert all(outcomes.values()), outcomes


def _literal(rng: random.Random, depth: int) -> object:
    """Any literal: now and then one that belongs into a header."""
    kinds = ["'<f8'", "'|O'", "'|V0'", "'a'", "''", "b''", "True", "None", "-1", "0", "3", "1e999", "2j", "9" * 4000]
    kind = rng.randrange(6) if depth else 0
    if kind < 2:
        return rng.choice(kinds)
    items = [str(_literal(rng, depth - 1)) for _ in range(rng.randrange(4))]
    if kind == 2:
        return "[" + ", ".join(items) + "]"
    if kind == 3:
        return "(" + "".join(f"{item}, " for item in items) + ")"
    if kind == 4:
        return "{" + ", ".join(f"{item}: 1" for item in items) + "}"
    return "[" + ", ".join(f"('f{n}', {item})" for n, item in enumerate(items)) + "]"


def test_any_literals_in_a_header_give_a_description_or_a_source_error() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    outcomes = {True: 0, False: 0}
    for _ in range(10_000):
        descr, shape = str(_literal(rng, 4)), str(_literal(rng, 2)) if rng.random() < 0.5 else "(2, 1)"
        try:
            outcomes[parse(npy(header(descr, shape)[:NPY_HEADER_MAX], 4096)) is not None] += 1
        except SourceError:
            outcomes[False] += 1
    assert outcomes[True] > 50, outcomes


def _saved(path: Path, array: Any) -> ArrayDescription | None:
    numpy = pytest.importorskip("numpy")
    numpy.save(path, array, allow_pickle=True)
    return parse(path.read_bytes())


def test_what_numpy_saves_is_described_as_numpy_reads_it(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    kinds: list[Any] = [*"?bBhHiIlLqQefdgFDG", "S5", "U4", "V9", "M8[us]", "m8[D]", "M8", ">f8"]
    kinds += [numpy.dtype([("a", "u1"), ("b", "f8")], align=True), [("a", "f4", (2, 3)), ("n", [("x", "U2")])]]
    for dtype in kinds:
        for order in "CF":
            array = numpy.zeros((3, 2), dtype=dtype, order=order)
            described = _saved(tmp_path / "a.npy", array)
            assert described is not None, dtype
            descr = ast.literal_eval(described.dtype) if described.dtype.startswith("[") else described.dtype
            assert numpy.lib.format.descr_to_dtype(descr) == array.dtype
            assert (described.shape, described.fortran) == ((3, 2), order == "F")
            assert (tmp_path / "a.npy").stat().st_size == described.data_offset + array.nbytes


def test_what_numpy_pickles_is_refused(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    with pytest.raises(SourceError, match="holds Python objects"):
        _saved(tmp_path / "a.npy", numpy.array([None, {}], dtype=object))
