"""Percent-encoding, for the two places of the grammar that have it: file: paths and the error filter's FILE.

Only %XX for a byte of the path. It does not touch '+' or '?', and no plain path ever comes here.
"""

from __future__ import annotations

import os
import re

from pcshare.errors import UsageError
from pcshare.sources.shown import shown


def decode_percent(text: str) -> str:
    """The path that text stands for; UsageError where a '%' is not followed by two hexadecimal digits."""
    if re.search("%(?![0-9A-Fa-f]{2})", text):
        raise UsageError(
            f"a '%' in {shown(text)!r} is not followed by two hexadecimal digits", hint="write '%' itself as %25"
        )
    check_path(text)
    path = re.sub(rb"%(..)", lambda match: bytes([int(match[1], 16)]), os.fsencode(text))
    return check_path(os.fsdecode(path))


def check_path(path: str) -> str:
    """The path again; UsageError if the system could never open it."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the path {shown(path)!r} is no text that can name a file",
            hint="give it as the bytes that the system uses",
        ) from error
    if "\0" in path:
        raise UsageError(f"the path {shown(path)!r} contains a NUL byte, which no file name can", hint="leave it out")
    return path
