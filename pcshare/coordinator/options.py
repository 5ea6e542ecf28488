"""options: what a coordinator was asked to do. Values only; the command line and the launcher's creator make them."""

from __future__ import annotations

from dataclasses import dataclass

from pcshare.sources import SOURCE_TIMEOUT_S, SourceSpec

ORPHAN_TIMEOUT_S = 30.0  # long enough to start a coordinator again, short enough that nobody thinks of a hang
HELPERS_MAX = 1024  # an fd or two each; the status segment has room for four times as many
PAGE_SIZE_AUTO = 0  # huge pages where there are enough, else the host's own
READ_AHEAD = 1 << 20
STREAM_EAGER, STREAM_LAZY, STREAM_RATE, STREAM_PAUSED = range(4)  # STATUS_STREAM_* of core/status_segment.h


@dataclass(frozen=True)
class Options:
    """Sizes in bytes, rates in bytes a second, times in seconds.

    stream_mode is one of the STREAM_* above; None: eager, but lazy where a first working set is recorded. page_size may
    be PAGE_SIZE_AUTO; fault_threads None: as many as the machine calls for; orphan_timeout_s 0: helpers wait for ever;
    source_timeout_s: with poison, how long a source may be away; fault_timeout_s: how long a page that somebody waits
    for may take, 0: for ever; read_ahead: how far a thread that reads on is kept ahead of at most, 0: a fault brings
    its page alone; helpers_per_uid 0: any
    other user than its own and root has at most three quarters of helpers_max (HELPERS_KEPT_FOR_OTHERS)."""

    name: str
    sources: tuple[SourceSpec, ...]
    stream_mode: int | None = STREAM_EAGER
    stream_rate: int = 0
    page_size: int = 4096
    writable: frozenset[str] = frozenset()
    poison: bool = False
    source_timeout_s: float = SOURCE_TIMEOUT_S
    allow_uids: frozenset[int] = frozenset()
    allow_gids: frozenset[int] = frozenset()
    fault_threads: int | None = None
    helpers_max: int = HELPERS_MAX
    orphan_timeout_s: float = ORPHAN_TIMEOUT_S
    notifier_timeout_s: float = 10.0
    replace: bool = False
    trace: str | None = None
    exports: tuple[str, ...] = ()  # addresses on which the blocks are given out over NBD
    device_state: str | None = None  # the file for what an incoming migration says of its devices
    keeper_restarts: bool = True  # the keeper is our parent and starts us again; else it ends with us
    findable: bool = False  # its socket lies where all look, whoever may attach: it is not its starter's (--user)
    fault_timeout_s: float = 0.0
    read_ahead: int = READ_AHEAD
    helpers_per_uid: int = 0
    strict: bool = False  # helpers register for MINOR faults too
    record: str | None = None  # the file for what helpers touch first
    replay: str | None = None  # the file of what is to come first

    @property
    def takes_migration(self) -> bool:
        """Whether the blocks come with an incoming migration."""
        return any(spec.is_incoming for spec in self.sources)

    @property
    def shared(self) -> bool:
        """Whether others than this user may attach."""
        return bool(self.allow_uids or self.allow_gids)
