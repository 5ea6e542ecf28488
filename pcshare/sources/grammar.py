"""The grammar of sources: what '[BLOCK=]SOURCE[#FILTERS]' means. Documented in docs/reference/sources.md.

Text in, SourceSpec out. It opens and stats nothing: whether a source exists is found out by open_source().
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pcshare.errors import UsageError
from pcshare.sources.filters import FilterSpec, parse_filters
from pcshare.sources.percent import check_path, decode_percent
from pcshare.units import parse_size

BLOCK_NAME = re.compile(r"[A-Za-z0-9._-]+")
BLOCK_NAME_MAX = 63  # bytes: WIRE_IDSTR_MAX without the final NUL
BLOCK_NAME_FALLBACK = "block"  # where nothing of a file's name fits

# 64 TiB: user addresses have 47 bits on x86-64, and a block is mapped whole beside everything else.
SOURCE_LENGTH_MAX = 1 << 46

_BLOCK = re.compile(rf"({BLOCK_NAME.pattern})=(.*)", re.DOTALL)
_SCHEME = re.compile(r"([^/#:]+):(.*)", re.DOTALL)
_FILTERS_OF_PATH = re.compile(r"#(?=[a-z]+=)")


@dataclass(frozen=True)
class SourceSpec:
    """One block and where its bytes come from."""

    block: str
    scheme: str  # a key of KNOWN_SCHEMES
    target: str  # file: the path, decoded; zero: the size as written
    filters: FilterSpec
    text: str  # the argument as it was given


def parse_argument(text: str) -> SourceSpec:
    """Reads 'BLOCK=SOURCE' or 'SOURCE'. Raises UsageError."""
    named = _BLOCK.fullmatch(text)
    block, source = (named[1], named[2]) if named else ("", text)
    if not source:
        raise UsageError(f"the source in {text!r} is empty", hint=_known())
    if len(block) > BLOCK_NAME_MAX:
        raise UsageError(f"the block name {block!r} is longer than {BLOCK_NAME_MAX} bytes", hint="choose a shorter one")
    scheme, parse = _scheme(source)
    _refuse_equivalents(source, scheme)
    target, filters, own_name = parse(source)
    return SourceSpec(block or own_name, scheme, target, filters, text)


def parse_arguments(texts: Iterable[str]) -> tuple[SourceSpec, ...]:
    """All of them, in order; UsageError if two have the same block name."""
    specs: dict[str, SourceSpec] = {}
    for text in texts:
        spec = parse_argument(text)
        if spec.block in specs:
            raise UsageError(
                f"{specs[spec.block].text!r} and {text!r} are both block {spec.block!r}",
                hint="give each block a name of its own: NAME=SOURCE",
            )
        specs[spec.block] = spec
    return tuple(specs.values())


def unknown_scheme(scheme: str, text: str) -> UsageError:
    """The refusal of a scheme that is not in KNOWN_SCHEMES."""
    return UsageError(
        f"unknown kind of source {scheme!r} in {text!r}",
        hint=f"{_known()}; a path that contains ':' is written ./PATH or file:PATH",
    )


def _known() -> str:
    return "known sources: PATH, file:PATH, zero:SIZE"


def _scheme(source: str) -> tuple[str, Callable[[str], tuple[str, FilterSpec, str]]]:
    match = _SCHEME.match(source)
    if not match:
        return "file", _parse_path
    scheme = match[1].lower()
    if scheme not in _PARSERS:
        raise unknown_scheme(scheme, source)
    return scheme, _PARSERS[scheme]


def _refuse_equivalents(source: str, scheme: str) -> None:
    """A comma separates equivalent sources of one block, and no source of today can have an equivalent."""
    count = source.count(",") + 1
    if count > 1:
        raise UsageError(
            f"{source!r} names {count} equivalent sources (commas separate them), but a {scheme} source stands alone",
            hint="one source a block; a comma that belongs to a path is written %2C after file:, as in file:a%2Cb",
        )


def _parse_path(source: str) -> tuple[str, FilterSpec, str]:
    """A plain path, taken literally up to the first '#' that is followed by a word and '='."""
    path, *fragment = _FILTERS_OF_PATH.split(source, maxsplit=1)
    if not path:
        raise UsageError(f"there is no path before the filters in {source!r}", hint=_known())
    filters = parse_filters(fragment[0]) if fragment else FilterSpec()
    return check_path(path), filters, block_name_of(path)


def _parse_file(source: str) -> tuple[str, FilterSpec, str]:
    """file:PATH, file:///PATH, file://localhost/PATH: percent-decoded, and '#' always begins the filters."""
    encoded, filters = _split_filters(source)
    if encoded.startswith("//"):
        host, slash, rest = encoded[2:].partition("/")
        if host not in ("", "localhost") or not slash:
            raise UsageError(
                f"{source!r} names the host {host!r}, but a file source is local",
                hint="write file:///ABSOLUTE/PATH",
            )
        encoded = slash + rest
    path = decode_percent(encoded)
    if not path:
        raise UsageError(f"there is no path in {source!r}", hint=_known())
    return path, filters, block_name_of(path)


def _parse_zero(source: str) -> tuple[str, FilterSpec, str]:
    size, filters = _split_filters(source)
    zero_length(size)
    return size, filters, "zero"


def zero_length(size: str) -> int:
    """Bytes of 'zero:SIZE'. Raises UsageError."""
    try:
        length = parse_size(size)
    except (UsageError, ValueError) as error:  # ValueError: more digits than Python reads
        raise UsageError(f"the size in 'zero:{size}' is not right", hint="for example zero:64M or zero:4096") from error
    if not 1 <= length <= SOURCE_LENGTH_MAX:
        raise UsageError(
            f"zero:{size} asks for {length} bytes",
            hint=f"a block holds between 1 and {SOURCE_LENGTH_MAX} bytes (64 TiB)",
        )
    return length


def _split_filters(source: str) -> tuple[str, FilterSpec]:
    target, hash_sign, fragment = source.partition(":")[2].partition("#")
    return target, parse_filters(fragment) if hash_sign else FilterSpec()


def block_name_of(path: str) -> str:
    """A block name made from a file's name: without directories and its last suffix, other characters as '_'."""
    stem = os.path.splitext(os.path.basename(path.rstrip("/")))[0]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[:BLOCK_NAME_MAX]
    return name if re.search("[A-Za-z0-9]", name) else BLOCK_NAME_FALLBACK


_PARSERS: dict[str, Callable[[str], tuple[str, FilterSpec, str]]] = {"file": _parse_file, "zero": _parse_zero}
KNOWN_SCHEMES = tuple(_PARSERS)
