"""coordinator: the side that serves: blocks, helpers, operators and the loop that ties them to the fault threads.

options (what was asked for) · blocks (a block's life) · helpers (who is attached) · door (who is not yet) · handshake
(a connection until it is attached) · parent (the program that started us) · takeover (what is left to the next one) ·
working_sets (what is recorded and replayed) · server (the loop). No fault passes through any of it: see the
rule of two languages in docs/explanation/architecture.md.
"""

from __future__ import annotations

from pcshare.coordinator.options import Options
from pcshare.coordinator.server import Server
from pcshare.coordinator.takeover import Predecessor

__all__ = ["Options", "Predecessor", "Server"]
