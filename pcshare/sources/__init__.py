"""Sources: how the text a user writes becomes a place that pages come from.

One grammar, one file a kind of source. This room finds out what a source holds and makes page channels; it places no
page, knows no helper and no block in memory.
"""

from __future__ import annotations

from collections.abc import Callable

from pcshare.sources.file import FileSource
from pcshare.sources.filters import FilterSpec
from pcshare.sources.grammar import SourceSpec, parse_argument, parse_arguments, unknown_scheme
from pcshare.sources.npy import ArrayDescription
from pcshare.sources.opened import OpenedSource
from pcshare.sources.zero import ZeroSource

__all__ = [
    "ArrayDescription",
    "FilterSpec",
    "OpenedSource",
    "SourceSpec",
    "open_source",
    "parse_argument",
    "parse_arguments",
]

_KINDS: dict[str, Callable[[SourceSpec], OpenedSource]] = {"file": FileSource, "zero": ZeroSource}


def open_source(spec: SourceSpec) -> OpenedSource:
    """Opens what spec names; the caller closes it. Raises SourceError, or UsageError for a scheme that is not known."""
    if spec.scheme not in _KINDS:
        raise unknown_scheme(spec.scheme, spec.text)
    return _KINDS[spec.scheme](spec)
