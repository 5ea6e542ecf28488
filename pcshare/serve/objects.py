"""objects: the provider: `python -P -m pcshare.serve.objects URL` answers NBD on the socket that is its stdin and
stdout, for one object of a store (s3://, gs://, az://, https://, and whatever fsspec knows).

A process of its own, because the libraries it needs are large, are other people's, and wait where they like. What is
wrong at the start ends it before the first byte of the handshake; its last words say why, to the link that started it
or on one line of stderr. What is wrong later is the answer to the read (EIO: the object changed) or, if the store
cannot be reached, the end of the process and of the connection: whoever reads comes again, and compares the
description, which names the object's state, with the one before.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

from pcshare.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, PcshareError, SourceError
from pcshare.nbd.export import Export, Exports, Piece
from pcshare.nbd.server import serve_stdio
from pcshare.nbd.wire import NAME_LENGTH_MAX
from pcshare.serve import object_filesystem, object_store
from pcshare.serve.object_reader import READ_TIMEOUT_S, READS_MAX, ObjectReader, Outage, package_missing
from pcshare.sources.child import leave_last_words
from pcshare.sources.shown import shown

USAGE = "usage: python -P -m pcshare.serve.objects URL [TIMEOUT_S]   with a socket as standard input and output"
PIECE_BYTES = 4 << 20  # of a longer read: one connection to a store is slower than several


class ObjectExport(Export):
    """An object, under the empty name."""

    name = ""

    def __init__(self, url: str, reader: ObjectReader, on_outage: Callable[[Outage], NoReturn]) -> None:
        self.size = reader.size
        text = f"{shown(url)} ({reader.identity})"
        self.description = text.encode()[:NAME_LENGTH_MAX].decode(errors="ignore")
        self._reader = reader
        self._on_outage = on_outage
        self._pieces = ThreadPoolExecutor(READS_MAX, "pcshare-piece")

    def read(self, offset: int, length: int) -> Iterable[Piece]:
        if length <= PIECE_BYTES:
            return [self._read_piece(offset, length)]
        starts = range(offset, offset + length, PIECE_BYTES)
        lengths = [min(PIECE_BYTES, offset + length - start) for start in starts]
        return self._pieces.map(self._read_piece, starts, lengths)

    def _read_piece(self, offset: int, length: int) -> Piece:
        try:
            return self._reader.read(offset, length)
        except Outage as error:
            self._on_outage(error)  # no answer: an error would be final

    def close(self) -> None:
        self._pieces.shutdown(wait=False, cancel_futures=True)


def open_object(url: str, timeout_s: float = READ_TIMEOUT_S) -> ObjectReader:
    """Through obstore where that knows the URL and is here, else through fsspec. Raises SourceError or HostError."""
    if "://" not in url:
        raise SourceError(f"{shown(url)}: is no URL", errno=errno.EINVAL, hint="write it like s3://BUCKET/KEY")
    if object_store.can_read(url):
        if importlib.util.find_spec("obstore"):
            return object_store.StoreReader(url, timeout_s)
        if not importlib.util.find_spec("fsspec"):
            raise package_missing(url, "obstore")
    return object_filesystem.FilesystemReader(url, timeout_s)


def main(arguments: Sequence[str]) -> int:
    try:
        url, timeout_s = _parse(arguments)
    except ValueError:
        print(USAGE, file=sys.stderr)
        return EXIT_USAGE
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ^C is for the coordinator, which then hangs up
    try:
        reader = open_object(url, timeout_s)
    except PcshareError as error:
        _say_last(error)
        return error.exit_status
    if reader.is_vague:
        _say(f"{shown(url)}: no ETag, no time: a change of the object that keeps its size would not be noticed")
    export = ObjectExport(url, reader, _end)
    serve_stdio(Exports([export]))
    export.close()
    return EXIT_DONE


def _parse(arguments: Sequence[str]) -> tuple[str, float]:
    url, timeout_s = arguments if len(arguments) == 2 else (*arguments, str(READ_TIMEOUT_S))
    if os.isatty(0) or not float(timeout_s) > 0:
        raise ValueError
    return url, float(timeout_s)


def _say(text: str) -> None:
    """On one line, whatever a library put into it."""
    print(" ".join(f"pcshare: {text}".split()), file=sys.stderr, flush=True)


def _say_last(error: PcshareError) -> None:
    if not leave_last_words(error):
        _say(str(error))


def _end(error: Outage) -> NoReturn:
    _say_last(error)
    os._exit(EXIT_FAILED)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # a thread of a library's may still wait for its server
