"""peer_nbdfuse: pages from an NBD server by mmap of nbdfuse's file, beside pcshare as it starts by default.

Both ask the same nbdkit on a Unix socket, its file in the page cache, without and with a delay of 2 ms. Mounts and
blocks are fresh in each round: nothing is there yet. Both read ahead as they do by default. How pcshare's stream is
set each contest says: for touches at random it is lazy, since else they meet no missing page for long.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pcshare.bench.contest import OURS, Contest, Figures, Row
from pcshare.bench.lab import ANY_CPU, GIB, Lab, wait_for
from pcshare.launcher import Coordinator

LEFT_OUT = "nbdfuse with other options than its defaults, several readers at once"
NBDFUSE = "nbdfuse"
LENGTH = GIB
TOUCHES = 4000  # random pages; those count that were missing
TOUCHES_SLOW = 1000
RATIO_MAX = 0.95
NEEDS = ("nbdkit", "nbdfuse", "fusermount3")
PAUSED_THEN_EAGER = "paused, then eager"


@dataclass(frozen=True)
class Server:
    """An nbdkit of a file."""

    what: str
    touches: int
    filters: Sequence[str] = ()  # nbdkit's options before the plugin
    parameters: Sequence[str] = ()  # and behind it


FAST = Server("server without delay", TOUCHES)
SLOW = Server("server with 2 ms", TOUCHES_SLOW, ("--filter=delay",), ("rdelay=2ms",))

Job = Callable[[str, int], Figures]  # told the target, and the round's number as a seed


def against_nbdfuse(lab: Lab) -> Iterator[Contest]:
    for server in (FAST, SLOW):
        yield _random(lab, server)
        yield _scan(lab, server)
        yield _fill(lab, server)


# -- the jobs


def _random(lab: Lab, server: Server) -> Contest:
    def touch(target: str, number: int) -> Figures:
        return lab.touch("random", ANY_CPU, lab.count(server.touches), number + 1, target)

    def ours(number: int) -> Figures:
        with _nbdkit(lab, server) as uri, lab.coordinator(uri, "lazy") as serving:
            return touch(f"pcshare:{serving.socket}", number)

    rows = [_row("median", "p50"), _row("p99", "p99")]
    return _contest(lab, server, "touches at random", "lazy", ours, touch, rows)


def _scan(lab: Lab, server: Server) -> Contest:
    """One helper reads a byte of each page, in order."""

    def ours(_: int) -> Figures:
        with _paused(lab, server) as serving:
            return lab.touch(
                *("scan", ANY_CPU, f"pcshare:{serving.socket}"), at_start=lambda: lab.start_stream(serving)
            )

    return _contest(lab, server, "scan", PAUSED_THEN_EAGER, ours, _scanner(lab), [_row("time", "seconds")])


def _fill(lab: Lab, server: Server) -> Contest:
    """Until all of it is there, for whoever comes: nbdfuse has it then in the page cache, as far as that goes."""

    def ours(_: int) -> Figures:
        with _paused(lab, server) as serving, serving.attach() as block:
            return {"seconds": lab.fill_seconds(serving, block)}

    return _contest(lab, server, "fill", PAUSED_THEN_EAGER, ours, _scanner(lab), [_row("time", "seconds")])


def _scanner(lab: Lab) -> Job:
    return lambda target, _: lab.touch("scan", ANY_CPU, target)


def _row(what: str, figure: str) -> Row:
    return Row(what, figure, NBDFUSE, number="F13", at_most=RATIO_MAX)


def _contest(
    lab: Lab, server: Server, job: str, stream: str, ours: Callable[[int], Figures], theirs: Job, rows: Sequence[Row]
) -> Contest:
    def by_nbdfuse(number: int) -> Figures:
        with _nbdkit(lab, server) as uri, _mounted(lab, uri) as target:
            return theirs(target, number)

    return Contest(
        name=f"peers, nbdfuse, {job}, {server.what}",
        stream=stream,
        pinning="none",
        rivals={OURS: ours, NBDFUSE: by_nbdfuse},
        rows=rows,
        needs=NEEDS,
    )


# -- the servers


def _nbdkit(lab: Lab, server: Server) -> contextlib.AbstractContextManager[str]:
    return lab.nbdkit(*server.filters, "file", str(lab.file(lab.length(LENGTH))), *server.parameters)


@contextlib.contextmanager
def _paused(lab: Lab, server: Server) -> Iterator[Coordinator]:
    with _nbdkit(lab, server) as uri, lab.coordinator(uri, "paused") as serving:
        yield serving


@contextlib.contextmanager
def _mounted(lab: Lab, uri: str) -> Iterator[str]:
    """The file that nbdfuse shows, as a target of bench-touch."""
    folder = lab.folder / "fuse"
    folder.mkdir()
    try:
        with lab.process(["nbdfuse", str(folder), uri]) as server:
            try:
                wait_for((folder / "nbd").exists, "nbdfuse's file")
                yield f"file:{folder / 'nbd'}"
            finally:
                if folder.is_mount():
                    subprocess.run(["fusermount3", "-u", str(folder)], check=True)
                    server.wait()
    finally:
        folder.rmdir()
