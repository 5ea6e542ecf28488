"""What each helper must find, computed from the source file alone: with read(), without pcshare.

The functions take the options that the helper was started with. Only expected_numpy needs numpy.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path

from . import _common, writer

PAGE_SIZE = 4096
NPY_MAGIC = b"\x93NUMPY"


def expected_scan(path: str | Path, hash: str = "sha256") -> str:
    """scan: the digest of the whole file."""
    crc, sha = 0, hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_common.STEP_BYTES):
            crc = zlib.crc32(piece, crc)
            sha.update(piece)
    return f"{crc:08x}" if hash == "crc32" else sha.hexdigest()


def expected_random(path: str | Path, seed: int = 1, count: int = 1000) -> int:
    """random_lookup: the sum of count words, modulo 2**64."""
    n_words = os.path.getsize(path) // 8
    total = 0
    with open(path, "rb") as file:
        for i in range(count):
            word = os.pread(file.fileno(), 8, _common.splitmix64(seed, i) % n_words * 8)
            total += int.from_bytes(word, "little")
    return total & _common.WORD_MASK


def expected_writer(path: str | Path, count: int = 64) -> int:
    """writer, reader and forking_pool: the checksum of the pieces' checksums."""
    values = []
    with open(path, "rb") as file:
        for part in writer.pieces(os.path.getsize(path), count):
            values.append(zlib.crc32(file.read(part.stop - part.start)))
    return writer.checksum(values)


def expected_numpy(path: str | Path) -> dict[str, object]:
    """numpy_user: dtype, shape, max and mean."""
    import numpy as np

    from . import numpy_user

    with open(path, "rb") as file:
        is_array = Path(path).suffix == ".npy" and file.read(len(NPY_MAGIC)) == NPY_MAGIC
    array = np.load(path, mmap_mode="r") if is_array else np.fromfile(path, dtype=np.uint8)
    return numpy_user.describe(np.asarray(array), lambda n_bytes: None)


def expected_touch(
    path: str | Path, pattern: str = "scan", seed: int = 1, count: int = 0, page_size: int = PAGE_SIZE
) -> str:
    """touch: the crc32 over the pages in the order they are touched; count 0 with scan is all of them."""
    length = os.path.getsize(path)
    page_count = -(-length // page_size)
    count = count or page_count
    crc = 0
    with open(path, "rb") as file:
        for i in range(min(count, page_count) if pattern == "scan" else count):
            page = i if pattern == "scan" else _common.splitmix64(seed, i) % page_count
            crc = zlib.crc32(os.pread(file.fileno(), page_size, page * page_size), crc)
    return f"{crc:08x}"
