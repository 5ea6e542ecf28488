"""admin: the operator's side of the control socket: steer the stream, resume, stop, replace.

One short connection an order. Reads no status and decides nothing: what is allowed is the coordinator's business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from pcshare import errors, protocol, transport
from pcshare.protocol import AdminOp

ANSWER_TIMEOUT_S = 10.0  # a coordinator answers at once; one that is stopped by a signal never does


def send(socket_path: str | Path, op: AdminOp, argument: int = 0, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    """Gives one order and waits until it is carried out; raises what the coordinator refuses."""
    _order(socket_path, protocol.pack_admin(op, argument), timeout_s)


def replace(
    socket_path: str | Path, program: Sequence[str], options: Sequence[str], *, timeout_s: float = ANSWER_TIMEOUT_S
) -> None:
    """Orders it to make way for another program. Returns when it is about to; whether the other one comes to serve
    shows in the status."""
    _order(socket_path, protocol.pack_replace(program, options), timeout_s)


def _order(socket_path: str | Path, message: bytes, timeout_s: float) -> None:
    with transport.connect(str(socket_path), timeout_s) as connection:
        with contextlib.suppress(ConnectionError):  # who refuses us hangs up at once; the reason waits to be read
            connection.send(message)
        data, fds = connection.receive(timeout_s)
    for fd in fds:
        fd.close()
    answer = protocol.parse(data, len(fds))
    if not isinstance(answer, protocol.ErrorMessage):
        raise errors.RemoteProtocolError(
            f"the coordinator at {socket_path} answered {type(answer).__name__} to an order",
            hint=errors.VersionMismatch.usual_hint,
        )
    errors.check(-answer.error, f"coordinator at {socket_path}", answer.text)
