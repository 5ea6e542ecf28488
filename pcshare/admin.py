"""admin: the operator's side of the control socket: steer the stream, resume, stop.

One short connection an order. Reads no status and decides nothing: what is allowed is the coordinator's business.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from pcshare import errors, protocol, transport
from pcshare.protocol import AdminOp

ANSWER_TIMEOUT_S = 10.0  # a coordinator answers at once; one that is stopped by a signal never does


def send(socket_path: str | Path, op: AdminOp, argument: int = 0, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    """Gives one order and waits until it is carried out; raises what the coordinator refuses."""
    with transport.connect(str(socket_path), timeout_s) as connection:
        with contextlib.suppress(ConnectionError):  # who refuses us hangs up at once; the reason waits to be read
            connection.send(protocol.pack_admin(op, argument))
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
