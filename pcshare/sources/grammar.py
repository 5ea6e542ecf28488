"""The grammar of sources: what '[BLOCK=]SOURCE[,SOURCE...][#FILTERS]' means. Documented in docs/reference/sources.md.

Text in, SourceSpec out. It opens and stats nothing, and asks no server: whether a source exists is found out by
open_source(). Some sources stand alone (a file, zeros). The others are servers that speak NBD, reached in one way or
another: of those a block can have several, which hold the same bytes. And one kind is where a migration stream comes
in: its blocks come with it, so it has no name here and is all that a coordinator serves.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pcshare.errors import UsageError
from pcshare.nbd.wire import DEFAULT_PORT, NAME_LENGTH_MAX
from pcshare.sources.filters import FilterSpec, parse_filters
from pcshare.sources.percent import check_path, decode_percent
from pcshare.sources.shown import NEXT_EQUIVALENT, shown
from pcshare.units import parse_size

BLOCK_NAME = re.compile(r"[A-Za-z0-9._-]+")
BLOCK_NAME_MAX = 63  # bytes: WIRE_IDSTR_MAX without the final NUL
BLOCK_NAME_FALLBACK = "block"  # where nothing of a file's name fits

# 64 TiB: user addresses have 47 bits on x86-64, and a block is mapped whole beside everything else.
SOURCE_LENGTH_MAX = 1 << 46
EQUIVALENTS_MAX = 16  # servers of one block: each takes its time to be found dead
PORT_MAX = 65535

OBJECT_SCHEME = "object"  # stands for every scheme:// that an object store's library may know

_BLOCK = re.compile(rf"({BLOCK_NAME.pattern})=(.*)", re.DOTALL)
_SCHEME = re.compile(r"([^/#:]+):(.*)", re.DOTALL)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://", re.DOTALL)
_FILTERS_OF_PATH = re.compile(r"#(?=[a-z]+=)")

_USER, _HOST_NAME, _ADDRESS = r"[A-Za-z0-9._][A-Za-z0-9._-]*", r"[A-Za-z0-9_][A-Za-z0-9._-]*", r"[0-9A-Fa-f:.]+"
_AUTHORITY = re.compile(rf"(?:({_HOST_NAME})|\[({_ADDRESS}(?:%25[A-Za-z0-9._-]+)?)\])(?::([0-9]{{1,5}}))?")
_SSH_AUTHORITY = re.compile(rf"((?:{_USER}@)?)(?:({_HOST_NAME})|\[({_ADDRESS})\])(?::([0-9]{{1,5}}))?")
_SSH_PATH = re.compile(rf"((?:{_USER}@)?)(?:({_HOST_NAME})|\[({_ADDRESS})\]):(.+)", re.DOTALL)
_BARE_EQUIVALENT = re.compile(rf",((?:{_USER}@)?(?:{_HOST_NAME}|\[{_ADDRESS}\])):(/[^,]*)")

# No object store: better refused by name than by a library that never heard of them.
_REFUSED = {
    **dict.fromkeys(("nbds", "nbds+unix"), "TLS is not offered: reach the server through ssh, as in ssh://HOST/PATH"),
    **dict.fromkeys(("nbd+vsock", "nbds+vsock", "nbd+ssh"), "use nbd://, nbd+unix:///, exec: or ssh"),
}


@dataclass(frozen=True)
class TcpTarget:
    """nbd://HOST[:PORT]/EXPORT. text, in each of these, is the source as it was given."""

    text: str
    host: str
    port: int
    export: str


@dataclass(frozen=True)
class UnixTarget:
    """nbd+unix:///EXPORT?socket=PATH"""

    text: str
    path: str
    export: str


@dataclass(frozen=True)
class ExecTarget:
    """exec:COMMAND"""

    text: str
    words: tuple[str, ...]
    export: str = ""


@dataclass(frozen=True)
class SshTarget:
    """[USER@]HOST:PATH and ssh://[USER@]HOST[:PORT]/PATH"""

    text: str
    host: str  # with the user, if one was given
    port: int  # 0: ssh's own default
    path: str
    export: str = ""


@dataclass(frozen=True)
class ObjectTarget:
    """SCHEME://..., of an object store"""

    text: str
    url: str
    export: str = ""


Target = TcpTarget | UnixTarget | ExecTarget | SshTarget | ObjectTarget


@dataclass(frozen=True)
class SourceSpec:
    """One block and where its bytes come from."""

    block: str
    scheme: str  # a key of KNOWN_SCHEMES; of several equivalents that of the first
    target: str  # file: the path, decoded; zero: the size as written; else all equivalents as they were given
    filters: FilterSpec
    text: str  # the argument as it was given
    equivalents: tuple[Target, ...] = ()  # none: a source that stands alone

    @property
    def is_incoming(self) -> bool:
        """A migration stream: block is empty, target is where to listen."""
        return self.scheme in INCOMING_SCHEMES


def parse_argument(text: str) -> SourceSpec:
    """Reads 'BLOCK=SOURCE' or 'SOURCE'. Raises UsageError."""
    named = _BLOCK.fullmatch(text)
    block, source = (named[1], named[2]) if named else ("", text)
    if not source:
        raise UsageError(f"the source in {shown(text)!r} is empty", hint=_known())
    if len(block) > BLOCK_NAME_MAX:
        raise UsageError(f"the block name {block!r} is longer than {BLOCK_NAME_MAX} bytes", hint="choose a shorter one")
    scheme = _scheme(source)
    if scheme in INCOMING_SCHEMES:
        return _spec_of_incoming(block, scheme, source, text)
    if scheme in _SERVERS:
        return _spec_of_servers(block, scheme, source, text)
    _refuse_equivalents(source, scheme)
    target, filters, own_name = _ALONE[scheme](source)
    if filters.timeout_ms:
        raise UsageError(f"a {scheme} source has no timeout", hint="timeout= is for sources that a server answers for")
    return SourceSpec(block or own_name, scheme, target, filters, text)


def parse_arguments(texts: Iterable[str]) -> tuple[SourceSpec, ...]:
    """All of them, in order; UsageError if two have the same block name, or one stands beside a migration stream."""
    specs: dict[str, SourceSpec] = {}
    for spec in _checked_incoming([parse_argument(text) for text in texts]):
        text = spec.text
        if spec.block in specs:
            raise UsageError(
                f"{shown(specs[spec.block].text)!r} and {shown(text)!r} are both block {spec.block!r}",
                hint="give each block a name of its own: NAME=SOURCE",
            )
        specs[spec.block] = spec
    return tuple(specs.values())


def _checked_incoming(specs: list[SourceSpec]) -> list[SourceSpec]:
    incoming = [spec for spec in specs if spec.is_incoming]
    if incoming and len(specs) > 1:
        raise UsageError(
            f"{incoming[0].text!r} beside other sources: a migration stream is all that a coordinator serves",
            hint="start another coordinator, under another name, for the other blocks",
        )
    return specs


def unknown_scheme(scheme: str, text: str) -> UsageError:
    """The refusal of a scheme that is not in KNOWN_SCHEMES."""
    return UsageError(
        f"unknown kind of source {scheme!r} in {shown(text)!r}",
        hint=f"{_known()}; a path that contains ':' is written ./PATH or file:PATH",
    )


def _known() -> str:
    return (
        "known sources: PATH, file:PATH, zero:SIZE, nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH, "
        "exec:COMMAND, [USER@]HOST:PATH, ssh://[USER@]HOST[:PORT]/PATH, object stores such as s3://BUCKET/KEY, and "
        "qemu+unix:PATH or qemu+tcp://HOST:PORT for an incoming migration"
    )


def _scheme(source: str) -> str:
    """The kind of a source, or of the first of several equivalent ones: a key of KNOWN_SCHEMES."""
    first = NEXT_EQUIVALENT.split(source, maxsplit=1)[0]
    match = _SCHEME.match(first)
    scheme = match[1].lower() if match else ""
    if scheme in _REFUSED:
        raise UsageError(f"unknown kind of source {scheme!r} in {shown(source)!r}", hint=_REFUSED[scheme])
    if scheme in _NAMED_SCHEMES:
        return scheme
    if _URL.match(first):
        return OBJECT_SCHEME
    if _SSH_PATH.match(first):
        return "ssh"
    if scheme:
        raise unknown_scheme(scheme, source)
    return "file"


# -- sources that stand alone


def _refuse_equivalents(source: str, scheme: str) -> None:
    """A comma separates equivalent sources of one block, which must all be servers."""
    count = source.count(",") + 1
    if count > 1:
        raise UsageError(
            f"{shown(source)!r} names {count} equivalent sources (commas separate them), "
            f"but a {scheme} source stands alone",
            hint="one source a block; a comma that belongs to a path is written %2C after file:, as in file:a%2Cb",
        )


def _parse_path(source: str) -> tuple[str, FilterSpec, str]:
    """A plain path, taken literally up to the first '#' that is followed by a word and '='."""
    path, filters = _split_filters_of_path(source)
    if not path:
        raise UsageError(f"there is no path before the filters in {source!r}", hint=_known())
    return check_path(path), filters, block_name_of(path)


def _parse_file(source: str) -> tuple[str, FilterSpec, str]:
    """PATH, or percent-decoded and with filters from the first '#': file:PATH, file:///PATH, file://localhost/PATH."""
    if not _SCHEME.match(source):
        return _parse_path(source)
    encoded, filters = _split_filters(_after_scheme(source))
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
    size, filters = _split_filters(_after_scheme(source))
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


def _after_scheme(source: str) -> str:
    return source.partition(":")[2]


def _split_filters(source: str) -> tuple[str, FilterSpec]:
    """At the first '#'."""
    target, hash_sign, fragment = source.partition("#")
    return target, parse_filters(fragment) if hash_sign else FilterSpec()


def _split_filters_of_path(source: str) -> tuple[str, FilterSpec]:
    """At the first '#' that is followed by a word and '=': any other belongs to the source."""
    target, *fragment = _FILTERS_OF_PATH.split(source, maxsplit=1)
    return target, parse_filters(fragment[0]) if fragment else FilterSpec()


def block_name_of(path: str) -> str:
    """A block name made from a file's name: without directories and its last suffix, other characters as '_'."""
    stem = os.path.splitext(os.path.basename(path.rstrip("/")))[0]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[:BLOCK_NAME_MAX]
    return name if re.search("[A-Za-z0-9]", name) else BLOCK_NAME_FALLBACK


# -- sources that are servers


def _spec_of_servers(block: str, scheme: str, source: str, text: str) -> SourceSpec:
    split = _split_filters if scheme in ("nbd", "nbd+unix") else _split_filters_of_path
    target, filters = split(check_path(source))
    pieces = NEXT_EQUIVALENT.split(target)
    if len(pieces) > EQUIVALENTS_MAX:
        raise UsageError(
            f"{len(pieces)} equivalent sources are more than {EQUIVALENTS_MAX}", hint="name those that are nearest"
        )
    servers = tuple(_parse_server(piece) for piece in pieces)
    return SourceSpec(block or name_of_server(servers[0]), scheme, target, filters, text, servers)


def _parse_server(piece: str) -> Target:
    scheme = _scheme(piece)
    if scheme not in _SERVERS:
        raise UsageError(
            f"{shown(piece)!r} cannot be one of several equivalent sources: a {scheme} source stands alone",
            hint="equivalent sources are servers: nbd://, nbd+unix:///, exec:, ssh:// and object stores",
        )
    if scheme in ("nbd", "nbd+unix", "ssh"):
        _refuse_bare_equivalent(piece)
    return _SERVERS[scheme](piece)


def _refuse_bare_equivalent(piece: str) -> None:
    """',HOST:/PATH' belongs to what it follows, which is hardly what is meant. Kinds that cannot say it in another way,
    a command and an object's key, keep it."""
    bare = _BARE_EQUIVALENT.search(piece)
    if bare:
        raise _bad_server(
            piece,
            f"what follows a comma needs a scheme to be an equivalent source, and {bare[0][1:]!r} has none",
            f"write it as ssh://{bare[1]}{bare[2]}; a comma that belongs to a path is written %2C after ssh://HOST/",
        )


def name_of_server(target: Target) -> str:
    """A block name made from what a server was asked for."""
    return block_name_of(path_of_server(target))


def path_of_server(target: Target) -> str:
    """The part of the source that is like a file's path; empty for a command, which may be anything."""
    if isinstance(target, SshTarget):
        return target.path
    if isinstance(target, ObjectTarget):
        place = target.url.partition("://")[2].partition("?")[0]
        return place.partition("/")[2] or place.rpartition("@")[2]  # a password makes no name
    return target.export


def _parse_nbd(piece: str) -> TcpTarget:
    authority, path, _ = _split_uri(piece, "nbd://HOST[:PORT]/EXPORT")
    match = _AUTHORITY.fullmatch(authority)
    if not match:
        place = shown(f"nbd://{authority}").removeprefix("nbd://")
        hint = "write it as nbd://HOST[:PORT]/EXPORT, with [...] around IPv6"
        raise _bad_server(piece, f"{place!r} is no HOST[:PORT]", hint)
    host = match[1] or match[2].replace("%25", "%")
    return TcpTarget(piece, host, _port(match[3], DEFAULT_PORT, piece), _export(path, piece))


def _parse_nbd_unix(piece: str) -> UnixTarget:
    wanted = "nbd+unix:///EXPORT?socket=PATH"
    authority, path, query = _split_uri(piece, wanted)
    if authority:
        raise _bad_server(piece, "a Unix socket has no host", f"write it as {wanted}")
    values = [value for key, _, value in (item.partition("=") for item in query.split("&")) if key == "socket"]
    if len(values) != 1 or not values[0]:
        raise _bad_server(piece, "it does not name one socket", f"write it as {wanted}")
    return UnixTarget(piece, decode_percent(values[0]), _export(path, piece))


def _split_uri(piece: str, wanted: str) -> tuple[str, str, str]:
    """Authority, path without its first '/', query; as they were given."""
    rest = _after_scheme(piece)
    if not rest.startswith("//") or "#" in rest:
        raise _bad_server(piece, "it is no URI of that form", f"write it as {wanted}; '#' in it is written %23")
    place, _, query = rest[2:].partition("?")
    authority, _, path = place.partition("/")
    return authority, path, query


def _port(text: str | None, default: int, piece: str) -> int:
    port = int(text) if text else default
    if text and not 0 < port <= PORT_MAX:
        raise _bad_server(piece, f"there is no port {text}", f"ports are numbers between 1 and {PORT_MAX}")
    return port


def _export(encoded: str, piece: str) -> str:
    export = decode_percent(encoded)
    try:
        length = len(export.encode())
    except UnicodeEncodeError:
        raise _bad_server(piece, "its export name is no UTF-8", "give the name as the server lists it") from None
    if length > NAME_LENGTH_MAX:
        raise _bad_server(piece, f"its export name has {length} bytes", f"a name has at most {NAME_LENGTH_MAX}")
    return export


def _parse_exec(piece: str) -> ExecTarget:
    try:
        words = tuple(shlex.split(check_path(_after_scheme(piece))))
    except ValueError as error:
        raise _bad_server(piece, f"the command cannot be read ({error})", "quote its words as in a shell") from None
    if not words:
        raise _bad_server(piece, "there is no command", "write exec:COMMAND, as in exec:'nbdkit -s memory 1G'")
    return ExecTarget(piece, words)


def _parse_ssh(piece: str) -> SshTarget:
    if not _URL.match(piece):
        match = _SSH_PATH.fullmatch(piece)
        if not match or piece.lower().startswith("ssh:"):
            hint = "write it as [USER@]HOST:PATH or ssh://[USER@]HOST[:PORT]/PATH"
            raise _bad_server(piece, "it is no place on a host", hint)
        return SshTarget(piece, match[1] + (match[2] or match[3]), 0, check_path(match[4]))
    authority, slash, path = _after_scheme(piece)[2:].partition("/")
    match = _SSH_AUTHORITY.fullmatch(authority)
    if not match or not path:
        raise _bad_server(piece, "it names no host, or no path", "write it as ssh://[USER@]HOST[:PORT]/PATH")
    host = match[1] + (match[2] or match[3])
    return SshTarget(piece, host, _port(match[4], 0, piece), decode_percent(slash + path))


def _parse_object(piece: str) -> ObjectTarget:
    if not check_path(piece).partition("://")[2].strip("/"):
        raise _bad_server(piece, "it names no object", "write it as SCHEME://BUCKET/KEY")
    return ObjectTarget(piece, piece)


def _bad_server(piece: str, problem: str, hint: str) -> UsageError:
    return UsageError(f"the source {shown(piece)!r} is not right: {problem}", hint=hint)


# -- a migration stream


def _spec_of_incoming(block: str, scheme: str, source: str, text: str) -> SourceSpec:
    """target: PATH or HOST:PORT, as where to listen."""
    if block:
        raise UsageError(
            f"{text!r} names the block {block!r}, but the blocks of a migration stream come with it",
            hint=f"name none: {source}",
        )
    _refuse_equivalents(source, scheme)
    if "#" in source:
        raise UsageError(
            f"{source!r} has filters, or a '#': a migration stream takes no filters",
            hint="slow the source down with max-postcopy-bandwidth; a '#' that belongs to a path is written %23",
        )
    target = _incoming_path(source) if scheme == "qemu+unix" else _incoming_port(source)
    return SourceSpec("", scheme, target, FilterSpec(), text)


def _incoming_path(source: str) -> str:
    path = decode_percent(_after_scheme(source))
    if path.startswith("//") or not path.strip("/"):
        raise _bad_server(source, "it names no socket", "qemu+unix:PATH")
    return path if "/" in path else f"./{path}"


def _incoming_port(source: str) -> str:
    authority, path, query = _split_uri(source, "qemu+tcp://HOST:PORT")
    match = _AUTHORITY.fullmatch(authority)
    if path or query or not match or not match[3] or int(match[3]) > PORT_MAX:
        raise _bad_server(source, "it is no place to listen", "qemu+tcp://HOST:PORT, with [...] around IPv6")
    host = f"[{match[2].replace('%25', '%')}]" if match[2] else match[1]
    return f"{host}:{int(match[3])}"


_ALONE: dict[str, Callable[[str], tuple[str, FilterSpec, str]]] = {"file": _parse_file, "zero": _parse_zero}
_SERVERS: dict[str, Callable[[str], Target]] = {
    "nbd": _parse_nbd,
    "nbd+unix": _parse_nbd_unix,
    "exec": _parse_exec,
    "ssh": _parse_ssh,
    OBJECT_SCHEME: _parse_object,
}
INCOMING_SCHEMES = ("qemu+unix", "qemu+tcp")
KNOWN_SCHEMES = (*_ALONE, *_SERVERS, *INCOMING_SCHEMES)
_NAMED_SCHEMES = frozenset(KNOWN_SCHEMES) - {OBJECT_SCHEME}  # those that a user writes in so many letters
