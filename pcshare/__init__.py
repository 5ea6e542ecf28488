"""pcshare: memory you can use before it has arrived.

A coordinator owns RAM blocks, helpers map them and start to work at once; pages that are touched come first, a stream
brings the rest. What a program needs is here::

    with pcshare.attach("weights") as block:
        array = block.asarray()

The names below are imported when they are used, so that a host without userfaultfd, or a checkout that is not built
yet, can still import the package and be told what it lacks.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pcshare import errors
    from pcshare.client import Block, Handle, attach
    from pcshare.launcher import Coordinator

__all__ = ["Block", "Coordinator", "Handle", "__version__", "attach", "errors"]

_MODULE_OF_NAME = {
    "Block": "pcshare.client",
    "Handle": "pcshare.client",
    "attach": "pcshare.client",
    "Coordinator": "pcshare.launcher",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("pcshare.errors")
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
    globals()[name] = value  # from now on without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
