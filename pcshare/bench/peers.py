"""peers: the same work by nbdfuse and mmap, and by QEMU as the destination of a migration, beside pcshare.

Two files have the contests: peer_nbdfuse.py and peer_qemu.py; each says what makes it fair.
"""

from __future__ import annotations

from collections.abc import Sequence

from pcshare.bench import peer_nbdfuse, peer_qemu
from pcshare.bench.contest import Contest
from pcshare.bench.lab import Lab

DOES_NOT_MEASURE = f"{peer_nbdfuse.LEFT_OUT}; {peer_qemu.LEFT_OUT}"


def contests(lab: Lab) -> Sequence[Contest]:
    return [*peer_nbdfuse.against_nbdfuse(lab), *peer_qemu.against_qemu(lab)]
