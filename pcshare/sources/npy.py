"""The header of a .npy file, versions 1, 2 and 3, read without numpy: the coordinator never needs it.

Bytes in, ArrayDescription out. It does no I/O, makes no array and evaluates nothing but literals. Whatever the bytes
are, the result is a description, None (no .npy) or a SourceError. Some facts about the format:
 - the magic, two bytes of version, the header's length (two bytes in version 1, four after), the header as a Python
   literal of a dict, in Latin-1 before version 3 and UTF-8 in it, and then the data until the end of the file;
 - a plain dtype is a text such as '<f8'; a structured one is a list of (name, dtype) or (name, dtype, shape), with its
   padding spelled out as fields without a name, so that its size is the sum of its fields.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from dataclasses import dataclass

from pcshare.errors import SourceError

NPY_MAGIC = b"\x93NUMPY"
NPY_PREFIX_MAX = 12  # magic, version, and the four bytes of length of versions 2 and 3
NPY_HEADER_MAX = 10_000  # numpy's own limit: a longer literal can exhaust the interpreter's stack
NPY_HEAD_MAX = NPY_PREFIX_MAX + NPY_HEADER_MAX  # so many bytes of a file are enough
NPY_DTYPE_TEXT_MAX = 1023  # bytes: WIRE_DTYPE_MAX without the final NUL
NPY_DIMS_MAX = 32  # WIRE_DIMS_MAX
NPY_DTYPE_DEPTH_MAX = 16  # structures within structures
NPY_EXTENT_MAX = (1 << 63) - 1  # of one dimension, and of all bytes: what numpy counts with

_PLAIN = re.compile(r"[<>|=]?(?:(?P<kind>[?biufcmMSaUV])(?P<size>[0-9]{0,10})(?:\[[A-Za-z0-9/]{1,32}\])?)", re.ASCII)
_OBJECT = re.compile(r"[<>|=]?(O[0-9]*|object)", re.ASCII)
_SIZES: dict[str, tuple[int, ...]] = {
    "?": (0, 1),
    "b": (1,),
    "i": (1, 2, 4, 8),
    "u": (1, 2, 4, 8),
    "f": (2, 4, 8, 12, 16),
    "c": (8, 16, 24, 32),
    "m": (8,),
    "M": (8,),
}
_UCS4_BYTES = 4  # a character of kind U


@dataclass(frozen=True)
class ArrayDescription:
    """The array that a .npy file holds, and where in the file it begins."""

    dtype: str  # as the header has it; a structured one as the text of its list
    shape: tuple[int, ...]
    fortran: bool
    data_offset: int


def parse_npy(head: bytes, file_length: int, path: str) -> ArrayDescription | None:
    """Describes the array of a file of file_length bytes that begins with head (NPY_HEAD_MAX bytes, or all of it).

    None: no .npy file. SourceError: one that is broken, or that no other process could use. path is for the messages.
    """
    if not head.startswith(NPY_MAGIC):
        return None
    header, version, data_offset = _header(head, path)
    fields = _literal(header, version, path)
    descr, fortran, shape = _fields(fields, path)
    try:
        item_bytes = _item_bytes(descr, 0)
    except _Refused as refused:
        raise SourceError(f"{path}: {refused}", hint=refused.hint) from None
    data_bytes = item_bytes * math.prod(shape)
    if max(item_bytes, 1) * math.prod(n for n in shape if n) > NPY_EXTENT_MAX:
        raise SourceError(f"{path}: its .npy header describes an array larger than any memory", hint=_SAVE_AGAIN)
    if data_offset + data_bytes > file_length:
        raise SourceError(
            f"{path}: its .npy header promises {data_bytes} bytes of data, but only {file_length - data_offset} follow",
            hint="the file was cut short: copy or save it again",
        )
    return ArrayDescription(_dtype_text(descr, path), shape, fortran, data_offset)


_SAVE_AGAIN = "save it again with numpy.save, or serve its bytes as they are under a name that does not end in .npy"
_NO_OBJECTS = (
    "pickled objects are addresses of one process and cannot be shared: save the array with a fixed dtype, "
    "for example numpy.save(path, array.astype('float64')) or .astype('U') for texts"
)


class _Refused(Exception):
    """A dtype that is not taken; parse_npy adds the path."""

    def __init__(self, message: str, hint: str = _SAVE_AGAIN) -> None:
        super().__init__(message)
        self.hint = hint


def _header(head: bytes, path: str) -> tuple[bytes, int, int]:
    """The literal's bytes, the version and where the data begins."""
    version = head[6:8]
    if len(version) < 2:
        raise SourceError(f"{path}: the file ends inside its .npy header", hint=_SAVE_AGAIN)
    n_length_bytes = {b"\1\0": 2, b"\2\0": 4, b"\3\0": 4}.get(version)
    if n_length_bytes is None:
        raise SourceError(
            f"{path}: .npy version {version[0]}.{version[1]} is not known (1.0, 2.0 and 3.0 are)", hint=_SAVE_AGAIN
        )
    start = 8 + n_length_bytes
    length = int.from_bytes(head[8:start], "little")
    if length > NPY_HEADER_MAX:
        raise SourceError(f"{path}: its .npy header has {length} bytes, more than {NPY_HEADER_MAX}", hint=_SAVE_AGAIN)
    if len(head) < start + length:
        raise SourceError(f"{path}: the file ends inside its .npy header", hint=_SAVE_AGAIN)
    return head[start : start + length], version[0], start + length


def _literal(header: bytes, version: int, path: str) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a field's name is nobody's concern here
            return ast.literal_eval(header.decode("utf-8" if version >= 3 else "latin-1").strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise SourceError(f"{path}: its .npy header cannot be read", hint=_SAVE_AGAIN) from None


def _fields(fields: object, path: str) -> tuple[object, bool, tuple[int, ...]]:
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise SourceError(
            f"{path}: its .npy header does not have just descr, fortran_order and shape", hint=_SAVE_AGAIN
        )
    shape, fortran = fields["shape"], fields["fortran_order"]
    if not _is_shape(shape):
        raise SourceError(f"{path}: the shape in its .npy header is no tuple of sizes", hint=_SAVE_AGAIN)
    if len(shape) > NPY_DIMS_MAX:
        raise SourceError(
            f"{path}: its array has {len(shape)} dimensions, more than {NPY_DIMS_MAX}",
            hint="reshape it and save it again",
        )
    if not isinstance(fortran, bool):
        raise SourceError(f"{path}: fortran_order in its .npy header is neither True nor False", hint=_SAVE_AGAIN)
    return fields["descr"], fortran, shape


def _is_shape(shape: object) -> bool:
    return isinstance(shape, tuple) and all(type(n) is int and 0 <= n <= NPY_EXTENT_MAX for n in shape)


def _item_bytes(descr: object, depth: int) -> int:
    """The size of one item of a dtype description."""
    if depth > NPY_DTYPE_DEPTH_MAX:
        raise _Refused(f"its dtype is nested deeper than {NPY_DTYPE_DEPTH_MAX} levels")
    if isinstance(descr, str):
        return _plain_bytes(descr)
    if isinstance(descr, tuple) and len(descr) == 2:
        return _item_bytes(descr[0], depth + 1) * _count(descr[1])
    if isinstance(descr, list) and descr:
        return _structure_bytes(descr, depth)
    raise _Refused("the dtype in its .npy header cannot be read")


def _plain_bytes(descr: str) -> int:
    if _OBJECT.fullmatch(descr):
        raise _Refused("its dtype holds Python objects ('|O')", _NO_OBJECTS)
    match = _PLAIN.fullmatch(descr)
    kind, size = (match["kind"], int(match["size"] or 0)) if match else ("", 0)
    if not match or size not in _SIZES.get(kind, (size,)) or ("[" in descr and kind not in "mM"):
        raise _Refused(f"its dtype {descr[:64]!r} is not known")
    if kind == "?":
        return 1
    return size * _UCS4_BYTES if kind == "U" else size


def _structure_bytes(fields: list[object], depth: int) -> int:
    total, names = 0, set()
    for field in fields:
        if not isinstance(field, tuple) or len(field) not in (2, 3):
            raise _Refused("a field of the dtype in its .npy header is not (name, dtype) or (name, dtype, shape)")
        for name in _field_names(field[0]):
            if name in names:
                raise _Refused(f"two fields of its dtype are named {name[:64]!r}")
            names.add(name)
        total += _item_bytes(field[1], depth + 1) * (_count(field[2]) if len(field) == 3 else 1)
    return total


def _field_names(name: object) -> list[str]:
    """A field's name and, if it has one, its title; none for padding."""
    names = list(name) if isinstance(name, tuple) and len(name) == 2 else [name]
    if not all(isinstance(n, str) for n in names):
        raise _Refused("a field of the dtype in its .npy header has no name")
    return [str(n) for n in names if n]


def _count(shape: object) -> int:
    """Items in a field's shape: a tuple, or one number."""
    shape = (shape,) if type(shape) is int else shape
    if not isinstance(shape, tuple) or not _is_shape(shape) or len(shape) > NPY_DIMS_MAX:
        raise _Refused("the shape of a field in its .npy header is no tuple of sizes")
    return math.prod(shape)


def _dtype_text(descr: object, path: str) -> str:
    text = descr if isinstance(descr, str) else repr(descr)
    n_bytes = len(text.encode("utf-8", "surrogatepass"))
    if n_bytes > NPY_DTYPE_TEXT_MAX:
        raise SourceError(
            f"{path}: its dtype takes {n_bytes} bytes to describe, more than {NPY_DTYPE_TEXT_MAX}",
            hint="save it with fewer fields or shorter names",
        )
    return text
