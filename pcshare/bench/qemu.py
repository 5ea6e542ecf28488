"""qemu: a real QEMU with a guest of our own that never stops writing, which migrates or is migrated to.

Starts and ends it and speaks QMP; knows no contest and compares no memory. It dies with this process and is ended by
QMP's quit. The guest is a boot sector and nothing else (BOOT_CODE below):

    with Qemu(Guest(ram_mib=64), folder) as source:       # the guest writes when the body starts
        source.set_capabilities(POSTCOPY)
        source.migrate("unix:/tmp/x.sock")
        source.start_postcopy()                           # returns when the guest stands still
        source.wait_for_migration(COMPLETED)

A receiving QEMU has incoming=URI, and paused=True where its guest must not go on writing.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pcshare.bench.lab import HUGE_PAGE, MIB, die_with_parent, wait_for
from pcshare.errors import PcshareError

EXECUTABLE = "qemu-system-x86_64"
BOOT_TIMEOUT_S = 20.0
COMMAND_TIMEOUT_S = 20.0
MIGRATION_TIMEOUT_S = 40.0
STOP_TIMEOUT_S = 15.0
POLL_INTERVAL_S = 0.01
RAM_MIB_MIN, RAM_MIB_MAX = 16, 2048  # room for guest and firmware; RAM without a gap below 4 GiB
ROM_HOLE = range(0xA0000, 0x100000)  # here pmemsave reads the display's memory and the ROMs, not what pc.ram holds
RAM = "pc.ram"  # idstr of the block
UNLIMITED = 0  # as max-bandwidth or max-postcopy-bandwidth, bytes a second
MICROSECONDS = 1e-6

POSTCOPY = "postcopy-ram"
PREEMPT = "postcopy-preempt"

COMPLETED = "completed"
POSTCOPY_ACTIVE = "postcopy-active"
_OVER = {"failed", "cancelled", COMPLETED}

# -- the guest

SECTOR = 512
SIGNATURE = b"\x55\xaa"
FIRST_WRITTEN = MIB  # below live the firmware and the boot sector
END_MARK = b"\x44\x33\x22\x11"  # stands for the address where the guest stops writing

# Loaded by the firmware at 0x7c00. From 1 MiB to END it fills the pages with numbers that depend on their addresses,
# all but one in four; then it counts up the first byte of every page, over and over, and prints a character after each
# round. What lies from END on stays zero.
BOOT_CODE = """
    fa                  # 00            cli
    fc                  # 01            cld
    31 c0               # 02            xor ax, ax
    8e d8               # 04            mov ds, ax
    e4 92               # 06            in al, 0x92
    0c 02               # 08            or al, 2                ; address line 20 on
    e6 92               # 0a            out 0x92, al
    0f 01 16 90 7c      # 0c            lgdt [gdtr]
    0f 20 c0            # 11            mov eax, cr0
    0c 01               # 14            or al, 1                ; protected mode
    0f 22 c0            # 16            mov cr0, eax
    ea 1e 7c 08 00      # 19            jmp 8:flat
    b8 10 00 00 00      # 1e flat:      mov eax, 16
    8e d8               # 23            mov ds, eax
    8e c0               # 25            mov es, eax
    bf 00 00 10 00      # 27            mov edi, 0x100000
    89 f8               # 2c fill:      mov eax, edi
    b9 00 04 00 00      # 2e            mov ecx, 1024
    f7 c7 00 30 00 00   # 33            test edi, 0x3000
    75 08               # 39            jnz number
    81 c7 00 10 00 00   # 3b            add edi, 0x1000         ; one page in four is left as it is
    eb 0e               # 41            jmp next
    69 c0 0d 66 19 00   # 43 number:    imul eax, eax, 1664525
    05 5f f3 6e 3c      # 49            add eax, 1013904223
    ab                  # 4e            stosd
    e2 f2               # 4f            loop number
    81 ff 44 33 22 11   # 51 next:      cmp edi, END
    72 d3               # 57            jb fill
    bf 00 00 10 00      # 59 round:     mov edi, 0x100000
    fe 07               # 5e write:     inc byte [edi]
    81 c7 00 10 00 00   # 60            add edi, 0x1000
    81 ff 44 33 22 11   # 66            cmp edi, END
    72 f0               # 6c            jb write
    b0 2e               # 6e            mov al, '.'
    e6 e9               # 70            out 0xe9, al
    eb e5               # 72            jmp round
    00 00 00 00         # 74
    00 00 00 00 00 00 00 00     # 78 gdt:   none
    ff ff 00 00 00 9a cf 00     # 80        code, 4 GiB
    ff ff 00 00 00 92 cf 00     # 88        data, 4 GiB
    17 00 78 7c 00 00           # 90 gdtr:  23 (the limit), gdt
"""


def boot_sector(end: int) -> bytes:
    """The guest that writes every page from 1 MiB to end."""
    code = bytes.fromhex("".join(line.partition("#")[0] for line in BOOT_CODE.splitlines()))
    assert code.count(END_MARK) == 2
    return code.replace(END_MARK, end.to_bytes(4, "little")).ljust(SECTOR - len(SIGNATURE), b"\0") + SIGNATURE


@dataclass(frozen=True)
class Guest:
    """What both ends of a migration must agree about.

    backend: "plain", "memfd", or "hugetlb" (pages of 2 MiB, n_huge_pages of them, which somebody must have reserved).
    The guest writes all of its RAM but the last unwritten_mib, which stay zero."""

    ram_mib: int = 64
    backend: str = "plain"
    unwritten_mib: int = 8
    with_display: bool = False  # a block of 16 MiB more, vga.vram

    def __post_init__(self) -> None:
        assert RAM_MIB_MIN <= self.ram_mib <= RAM_MIB_MAX
        assert self.unwritten_mib < self.ram_mib - RAM_MIB_MIN // 2
        assert self.backend in ("plain", "memfd", "hugetlb")

    @property
    def ram_size(self) -> int:
        return self.ram_mib * MIB

    @property
    def n_huge_pages(self) -> int:
        return self.ram_size // HUGE_PAGE if self.backend == "hugetlb" else 0

    def write_boot_sector(self, path: Path) -> None:
        path.write_bytes(boot_sector((self.ram_mib - self.unwritten_mib) * MIB))

    def arguments(self, boot_sector_path: Path) -> list[str]:
        memory = f"memory-backend-memfd,id={RAM},share=on,size={self.ram_mib}M"
        memory += ",hugetlb=on,hugetlbsize=2M" if self.backend == "hugetlb" else ""
        with_backend = self.backend != "plain"
        return [
            *("-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-m", f"{self.ram_mib}M"),
            *("-machine", f"pc,memory-backend={RAM}" if with_backend else "pc"),
            *(("-object", memory) if with_backend else ()),
            *("-vga", "std" if self.with_display else "none"),
            *("-drive", f"file={boot_sector_path},format=raw,if=ide,snapshot=on"),
        ]


# -- QMP


class QmpError(PcshareError):
    """QEMU refused a command."""


class Qmp:
    """One QMP connection. Not for two threads."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(COMMAND_TIMEOUT_S)
        self._connection = connection
        self._lines = connection.makefile("rb")
        self.events: list[dict[str, Any]] = []

    def greet(self) -> None:
        assert "QMP" in self._read()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Its return value. In the arguments' names _ stands for -."""
        told = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._connection.sendall(json.dumps({"execute": command, "arguments": told}).encode() + b"\n")
        while "event" in (answer := self._read()):
            self.events.append(answer)
        if "error" in answer:
            raise QmpError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise EOFError("QEMU closed its QMP connection")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._lines.close()
        self._connection.close()


# -- the process


class Qemu:
    """A QEMU that runs, on a socket pair for QMP and with the guest's characters going to a file."""

    def __init__(
        self,
        guest: Guest,
        folder: Path,
        name: str = "source",
        *,
        incoming: str | None = None,
        paused: bool = False,
        options: Sequence[str] = (),
    ) -> None:
        self.guest = guest
        self.is_receiver = incoming is not None
        self._is_killed = False
        self._boots = incoming is None and not paused
        self._folder = folder
        self._log, self._characters, self._image = (folder / f"{name}.{end}" for end in ("log", "out", "boot"))
        guest.write_boot_sector(self._image)
        self._command = [EXECUTABLE, *guest.arguments(self._image)]
        self._command += ["-debugcon", f"file:{self._characters}", *options]
        self._command += ["-S"] if paused else []
        self._command += ["-incoming", incoming] if incoming is not None else []

    # -- its life

    def start(self) -> None:
        """Returns when the guest has written every page once; a receiver: when it answers."""
        self._characters.unlink(missing_ok=True)  # of one before it in this folder
        ours, theirs = socket.socketpair()
        with theirs, self._log.open("wb") as log:
            monitor = ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
            self.process = subprocess.Popen(
                [*self._command, *monitor],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                preexec_fn=die_with_parent,
            )
        self._qmp = Qmp(ours)
        try:
            self._qmp.greet()
            if self._boots:
                self.wait_for_rounds(1)
        except BaseException as error:
            self._kill()
            if isinstance(error, (EOFError, ConnectionError)):
                raise PcshareError(f"QEMU did not start: {self.said()}") from error
            raise

    def stop(self) -> None:
        """Ends it by quit."""
        try:
            if self.process.poll() is not None:
                raise PcshareError(f"QEMU had ended by itself, with {self.process.returncode}: {self.said()}")
            with contextlib.suppress(EOFError, ConnectionResetError):
                self._qmp.execute("quit")
            if self.process.wait(STOP_TIMEOUT_S) != 0:
                raise PcshareError(f"QEMU ended with {self.process.returncode}: {self.said()}")
        except subprocess.TimeoutExpired:
            raise PcshareError(f"QEMU did not end within {STOP_TIMEOUT_S:g} s of quit: {self.said()}") from None
        finally:
            self._kill()

    def kill(self) -> None:
        """SIGKILL, as when its host dies."""
        self._is_killed = True
        self._kill()

    def _kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._qmp.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._is_killed:
            self.stop()
        else:
            self._kill()

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def execute(self, command: str, **arguments: Any) -> Any:
        """A QMP command's return value; QmpError."""
        return self._qmp.execute(command, **arguments)

    # -- the guest

    def rounds(self) -> int:
        """How often the guest has written all of its pages since it was started or received here."""
        return self._characters.stat().st_size if self._characters.exists() else 0

    def wait_for_rounds(self, n: int) -> None:
        """Until the guest has written all of its pages n times more."""
        wanted = self.rounds() + n
        wait_for(lambda: self.rounds() >= wanted, f"round {wanted} of the guest", BOOT_TIMEOUT_S)

    # -- migrating

    def set_capabilities(self, *names: str) -> None:
        """Switches them on; both ends need the same."""
        self.execute("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in names])

    def set_parameters(self, **values: int) -> None:
        """For instance max_postcopy_bandwidth, in bytes a second (UNLIMITED), or downtime_limit, in milliseconds."""
        self.execute("migrate-set-parameters", **values)

    def migrate(self, uri: str, *, resume: bool = False) -> None:
        """Starts to; resume: goes on after a pause. Returns at once."""
        self.execute("migrate", uri=uri, **({"resume": True} if resume else {}))

    def start_postcopy(self) -> None:
        """Returns when the guest stands still and the switch has been made, or was made and is over."""
        self.execute("migrate-start-postcopy")
        self.wait_for_migration(POSTCOPY_ACTIVE, COMPLETED)

    def migration(self) -> dict[str, Any]:
        """What query-migrate says: status, ram, total-time, and so on."""
        answer: dict[str, Any] = self.execute("query-migrate")
        return answer

    def wait_for_migration(self, *statuses: str, timeout_s: float = MIGRATION_TIMEOUT_S) -> dict[str, Any]:
        """Until query-migrate says one of these. PcshareError: it is over otherwise, or takes too long."""
        deadline = time.monotonic() + timeout_s
        while (now := self.migration()).get("status") not in statuses:
            if now.get("status") in _OVER or time.monotonic() > deadline:
                raise PcshareError(f"waited in vain for {' or '.join(statuses)}: {now} {self.said()}")
            time.sleep(POLL_INTERVAL_S)
        return now

    def completed_at_s(self) -> float:
        """When a source said that its migration was completed; of time.time(). It needs the capability "events"."""
        self.wait_for_migration(COMPLETED)
        while True:
            for event in self._qmp.events:
                if event["event"] == "MIGRATION" and event["data"]["status"] == COMPLETED:
                    at = event["timestamp"]
                    return float(at["seconds"] + at["microseconds"] * MICROSECONDS)
            self.migration()  # a query finds it out before the event is sent
