"""source: the file of the show: the user's, or one packed from what every Python brings along.

The made file is an uncompressed tar of the running interpreter's library: real content, different on every page, there
without a download. Writes only into the folder that it is given.
"""

from __future__ import annotations

import io
import os
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from pcshare import errors
from pcshare.sources.npy import NPY_HEAD_MAX, parse_npy

SOURCE_BYTES_MIN = 64 << 10  # less has no page left to arrive while somebody looks
MADE_BYTES_MIN = 1 << 20
DRAFT_BYTES = 512 << 10  # of the writable block: enough pages to be written before they arrive
RATE_MIN = 1
RATE_MAX = 1 << 40  # as the filter's
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}
PATH_SAFE = "/"
US_PER_S = 1_000_000


def given_file(path: Path) -> Path:
    """The user's file, if the show can be made of it."""
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            regular = path.is_file()
            head = file.read(NPY_HEAD_MAX) if regular and path.suffix == ".npy" else b""
    except OSError as error:
        raise errors.SourceError(
            f"cannot read {path}: {error.strerror}", errno=error.errno, hint="--source takes a regular file"
        ) from None
    if not regular:
        raise errors.SourceError(f"{path} is not a regular file", hint="--source takes a regular file")
    if length < SOURCE_BYTES_MIN:
        raise errors.SourceError(
            f"{path} holds {length} bytes; the show needs at least {SOURCE_BYTES_MIN}",
            hint="take a larger file, or leave --source out and one is made",
        )
    parse_npy(head, length, str(path))  # before it is read to know what is right
    return path.resolve()


def make_file(folder: Path, size: int) -> Path:
    """A tar of the interpreter's library, cut at size bytes; several of them if the library is smaller."""
    path = folder / "library.tar"
    with open(path, "wb") as packed:
        while packed.tell() < size:
            before = packed.tell()
            _pack(packed, size)
            if packed.tell() == before:
                raise errors.HostError(
                    f"the interpreter's library at {sysconfig.get_path('stdlib')} cannot be read",
                    hint="give a file with --source",
                )
        packed.truncate(size)
    return path


def _pack(packed: io.BufferedWriter, size: int) -> None:
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in _library_files():
            if packed.tell() >= size:
                return
            try:
                tar.add(path, recursive=False)
            except OSError:  # a file that this user may not read, or that vanished: there are others
                continue


def _library_files() -> Iterator[Path]:
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for name in sorted(files):
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                yield path


def make_draft(folder: Path, path: Path) -> Path:
    """The beginning of the file as a file of its own: the source of the block that is written while it arrives."""
    draft = folder / "draft.bin"
    with open(path, "rb") as file:
        draft.write_bytes(file.read(DRAFT_BYTES))
    return draft


def rate_for(path: Path, rate: int | None, arrival_s: float) -> int:
    """Bytes a second: the given rate, else the one at which the whole file takes arrival_s."""
    if rate is not None:
        return min(rate, RATE_MAX)
    return max(RATE_MIN, min(RATE_MAX, round(path.stat().st_size / arrival_s)))


def slowed(path: Path, delay_s: float, rate: int | None) -> str:
    """The source's text for a coordinator: the file behind the filters that make its arrival visible."""
    filters = []
    if delay_s > 0:
        filters.append(f"delay={max(1, round(delay_s * US_PER_S))}us")
    if rate is not None:
        filters.append(f"rate={rate}")
    return f"file:{quote(os.fsencode(path), safe=PATH_SAFE)}" + ("#" + "&".join(filters) if filters else "")
