"""Sources: how the text a user writes becomes a place that pages come from.

One grammar, one file a kind of source. This room finds out what a source holds and makes page channels; it places no
page, knows no helper and no block in memory.
"""

from __future__ import annotations

from collections.abc import Callable

from pcshare.errors import UsageError
from pcshare.fds import OwnedFd
from pcshare.sources.examine import SourceReport, examine_source
from pcshare.sources.file import FileSource
from pcshare.sources.filters import FilterSpec
from pcshare.sources.grammar import SourceSpec, parse_argument, parse_arguments, unknown_scheme
from pcshare.sources.link import SOURCE_TIMEOUT_S, LinkState
from pcshare.sources.nbd import NbdSource
from pcshare.sources.npy import ArrayDescription
from pcshare.sources.opened import CompleteSource, OpenedSource, SourceMemory
from pcshare.sources.shown import shown
from pcshare.sources.wakeup import StopFlag, Wakeup
from pcshare.sources.zero import ZeroSource

__all__ = [
    "SOURCE_TIMEOUT_S",
    "ArrayDescription",
    "CompleteSource",
    "FilterSpec",
    "LinkState",
    "OpenedSource",
    "SourceMemory",
    "SourceReport",
    "SourceSpec",
    "StopFlag",
    "Wakeup",
    "examine_source",
    "open_source",
    "parse_argument",
    "parse_arguments",
    "reopen_source",
    "shown",
]

_KINDS: dict[str, Callable[[SourceSpec], OpenedSource]] = {"file": FileSource, "zero": ZeroSource}


def open_source(spec: SourceSpec, stop: StopFlag | None = None) -> OpenedSource:
    """Opens what spec names; the caller closes it. A source that is reached through others may take seconds: stop ends
    the wait. Raises SourceError, or UsageError for a scheme that is not known."""
    if spec.is_incoming:
        raise UsageError(
            f"{spec.text} is where a migration comes in: nothing can be read there before a source connects",
            hint="it is for `pcshare coordinator` and `pcshare run`",
        )
    if spec.equivalents:
        return NbdSource(spec, stop)
    if spec.scheme not in _KINDS:
        raise unknown_scheme(spec.scheme, spec.text)
    return _KINDS[spec.scheme](spec)


def reopen_source(spec: SourceSpec, memory: SourceMemory, kept: OwnedFd | None = None) -> OpenedSource:
    """Opens what a coordinator before this one had open, and waits for nobody: a server may be away. kept: what its
    kept_fd() was. SourceError: it is there and is not the same any more."""
    if spec.equivalents:
        return NbdSource(spec, memory=memory)
    return FileSource(spec, memory, kept) if spec.scheme == "file" else open_source(spec)
