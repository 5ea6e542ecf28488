"""trespasser: a helper program that tries to write into a read-only block, by asking and by force.

Run as `python -m pcshare.demo.trespasser`. It shows promise P8. Asking is refused with an exception. Force is a store
through a plain pointer, as a bug in a C extension would do it: that must end this process by SIGSEGV and nobody else's,
so it prints its report before.
"""

from __future__ import annotations

import json
import resource
import sys

import cffi

from pcshare.errors import NotWritable
from pcshare_helpers import _common


def refused_when_asking(run: _common.Run) -> bool:
    """Whether attaching for writing is refused."""
    try:
        run.attach(mode="rw").close()
    except NotWritable:
        return True
    return False


def trespass(run: _common.Run) -> None:
    """Returns only if the store went through."""
    refused = refused_when_asking(run)
    block = run.attach(mode="ro")
    ffi = cffi.FFI()
    first = ffi.cast("char *", ffi.from_buffer(block))
    byte = first[0]  # has arrived, so that what follows is about writing alone
    print(json.dumps({"helper": "trespasser", "refused_when_asking": refused}), flush=True)
    first[0] = bytes([byte[0] ^ 0xFF])
    raise ValueError("a byte of a read-only block was overwritten")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the end that is meant needs no core dump
    sys.exit(_common.main("trespasser", trespass, _common.parser(__doc__).parse_args()))
