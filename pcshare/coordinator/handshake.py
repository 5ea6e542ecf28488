"""handshake: one connection from its first message until it is attached, has given its order, or is refused.

HELLO, WELCOME, ATTACH, ACK; or an operator's order and its answer. Every refusal says why before it hangs up, and
disturbs nobody else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import time
from collections.abc import Callable, Mapping

from pcshare import probe, protocol, trace
from pcshare.coordinator.blocks import Block, Blocks
from pcshare.coordinator.helpers import Helpers
from pcshare.coordinator.options import Options
from pcshare.errors import AccessRefused, LimitReached, NotWritable, PcshareError, RemoteProtocolError, VersionMismatch
from pcshare.fds import OwnedFd, close_aside
from pcshare.protocol import Admin, Attach, Hello, Message, Mode, Replace, Welcome, WelcomeFlag
from pcshare.state import State
from pcshare.transport import Connection

OUT_OF_FDS = (errno.EMFILE, errno.ENFILE)
FDS_RESERVED = 16  # no helper gets these: an operator's order, a source's new connection, an export need some
HANDSHAKE_TIMEOUT_S = 10.0  # from accept to ATTACH: a helper maps and registers in between, which takes milliseconds


class Handshake:
    """One connection. step() takes what has come and says whether the connection goes on."""

    def __init__(
        self,
        connection: Connection,
        options: Options,
        blocks: Blocks,
        helpers: Helpers,
        features: Mapping[Mode, int],
        device: OwnedFd | None,
        status_fd: int,
        operator: Callable[[Admin | Replace], None],
    ) -> None:
        self.connection = connection
        self.deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
        self._options = options
        self._blocks = blocks
        self._helpers = helpers
        self._features = features
        self._device = device
        self._status_fd = status_fd
        self._operator = operator
        self._block: Block | None = None  # the one HELLO named
        self._mode = Mode.DEFAULT  # what was granted
        self.attached = False  # the connection is the helper's now

    def step(self) -> bool:
        """True: there is more to come. False: attached, or over (then the connection is closed)."""
        fds: list[OwnedFd] = []
        try:
            self._check_peer()
            data, fds = self.connection.receive_now()
            if not data and not fds:
                return self._end()
            return self._handle(protocol.parse(data, len(fds)), fds)
        except BlockingIOError:
            return True
        except PcshareError as error:
            return self._refuse(error)
        except OSError as error:
            return self._refuse(_out_of_fds(error.errno)) if error.errno in OUT_OF_FDS else self._end()
        finally:
            close_aside(*fds)

    def time_out(self) -> None:
        self._refuse(PcshareError(f"nothing came for {HANDSHAKE_TIMEOUT_S:g} s", errno=errno.ETIMEDOUT))

    def make_room(self) -> None:
        self._refuse(
            PcshareError("too many connections that have not attached yet", errno=errno.EAGAIN, hint="try again")
        )

    def _end(self) -> bool:
        self.connection.close_unread()
        return False

    def _refuse(self, error: PcshareError) -> bool:
        text = f"{error.message} ({error.hint})" if error.hint else error.message
        with contextlib.suppress(OSError):  # it is gone, or does not read: it is hung up on all the same
            self.connection.send(protocol.pack_error(error.errno or errno.EPROTO, text))
        return self._end()

    # -- messages

    def _handle(self, message: Message, fds: list[OwnedFd]) -> bool:
        if isinstance(message, Hello) and self._block is None:
            return self._welcome(message)
        if isinstance(message, Attach) and self._block is not None:
            return self._attach(self._block, message, fds[0])
        if isinstance(message, Admin | Replace) and self._block is None:
            return self._order(message)
        raise RemoteProtocolError(f"{type(message).__name__} out of turn", errno=errno.EPROTO)

    def _check_peer(self) -> None:
        peer = self.connection.credentials()
        if (
            peer.uid in (os.geteuid(), 0)
            or peer.uid in self._options.allow_uids
            or peer.gid in self._options.allow_gids
        ):
            return
        raise AccessRefused(
            f"user {peer.uid} (group {peer.gid}) may not attach to coordinator {self._options.name}",
            errno=errno.EACCES,
            hint=f"start it with --allow-uid {peer.uid} or --allow-gid {peer.gid}",
        )

    def _welcome(self, hello: Hello) -> bool:
        if not hello.version_min <= protocol.VERSION <= hello.version_max:
            raise VersionMismatch(
                f"the helper speaks versions {hello.version_min} to {hello.version_max}, this coordinator "
                f"{protocol.VERSION}",
                errno=errno.EPROTONOSUPPORT,
                hint=VersionMismatch.usual_hint,
            )
        block = self._blocks.find(hello.idstr)
        mode = _grant(block, hello.mode)
        complete = block.state is State.END
        if not complete:
            self._helpers.check_room(self.connection.credentials().uid)
            _check_fds_left(self.connection.fileno())
        self.connection.accept_fds(True)
        fds = [block.ram.helper_memfd(writing=mode is Mode.RW), self._status_fd]
        if self._device is not None and not complete:
            fds.append(self._device.fileno())
        self.connection.send(protocol.pack_welcome(self._describe(block, mode, len(fds) == 3)), fds)
        self._block, self._mode = block, mode
        trace.step("welcomed", block_index=block.index)
        return True

    def _describe(self, block: Block, mode: Mode, with_device: bool) -> Welcome:
        ram, array = block.ram, block.source.array
        flags = WelcomeFlag(0)
        flags |= WelcomeFlag.COMPLETE if block.state is State.END else 0
        flags |= WelcomeFlag.WRITABLE if ram.writable else 0
        flags |= WelcomeFlag.DEVICE if with_device else 0
        flags |= WelcomeFlag.STRICT if probe.is_strict(self._features[mode]) else 0
        if array is not None:
            flags |= WelcomeFlag.ARRAY | (WelcomeFlag.FORTRAN if array.fortran else 0)
        return Welcome(
            flags,
            mode,
            ram.index,
            ram.used_length,
            ram.page_size,
            ram.map_length,
            self._features[mode],
            round(self._options.orphan_timeout_s * 1000),
            ram.idstr,
            array.dtype if array else "",
            array.shape if array else (),
            array.data_offset if array else 0,
        )

    def _attach(self, block: Block, message: Attach, uffd_fd: OwnedFd) -> bool:
        self.connection.accept_fds(False)
        if self.connection.has_unread():  # what came before that may bring fds: not to whom serves faults
            raise RemoteProtocolError("ATTACH: it did not wait for the answer", errno=errno.EPROTO)
        if block.state is State.END:
            self.connection.send(protocol.pack_ack(0, WelcomeFlag.COMPLETE))
            return self._end()
        _check_fds_left(uffd_fd.fileno())
        helper = self._helpers.attach(block, self._mode, self.connection, uffd_fd, message.maps)
        self.attached = True
        self._helpers.tell(helper, protocol.pack_ack(helper.slot))
        trace.step("acked", block_index=block.index, subject=helper.slot)
        return False

    def _order(self, order: Admin | Replace) -> bool:
        if self.connection.credentials().uid not in (os.geteuid(), 0):
            raise AccessRefused("only the user who started a coordinator may give it orders", errno=errno.EACCES)
        self._operator(order)
        self.connection.send(protocol.pack_error(0, ""))
        return self._end()


def _check_fds_left(fd: int) -> None:
    """LimitReached: none is left for helpers. fd is the newest, and the kernel gives out the lowest that is free."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] - fd <= FDS_RESERVED:
        raise _out_of_fds(errno.EMFILE)


def _out_of_fds(error: int) -> PcshareError:
    return LimitReached(
        f"the coordinator has no file descriptor left: {os.strerror(error)}",
        errno=error,
        hint="end a helper, or start it with a larger hard limit (ulimit -Hn; LimitNOFILE= under systemd)",
    )


def _grant(block: Block, wanted: Mode) -> Mode:
    """The mode a helper gets; a read-only block cannot be attached for writing."""
    if wanted is Mode.DEFAULT:
        return Mode.RW if block.ram.writable else Mode.RO
    if wanted is Mode.RW and not block.ram.writable:
        raise NotWritable(
            f"block {block.idstr} is read-only",
            errno=errno.EROFS,
            hint=NotWritable.usual_hint.replace("BLOCK", block.idstr),
        )
    return wanted
