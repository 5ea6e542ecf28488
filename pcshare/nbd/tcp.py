"""tcp: what both ends of an NBD connection want of TCP. Sets options; for how long is the end's business.

Small messages go out at once; and an idle connection whose other end has vanished without a word is found dead.
"""

from __future__ import annotations

import socket


def tune(connection: socket.socket, idle_s: int, interval_s: int, count: int) -> None:
    """Found dead after idle_s and count probes, one every interval_s."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, count)
