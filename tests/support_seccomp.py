"""support_seccomp: runs a command on a host without userfaultfd: a seccomp filter refuses every way to one.

As a program: ``python support_seccomp.py ERRNO|kill [--device-works] COMMAND...`` installs the filter and becomes the
command. The filter refuses the system call, and, unless said otherwise, the ioctl by which an open /dev/userfaultfd
makes a uffd. It passes on to children and cannot be taken off.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2

BPF_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
BPF_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
BPF_RETURN = 0x06

OFFSET_NUMBER = 0  # in struct seccomp_data
OFFSET_ARGUMENT_1 = 16 + 8  # the low half on little-endian machines
RETURN_ALLOW = 0x7FFF0000
RETURN_ERRNO = 0x00050000
RETURN_KILL = 0x80000000
DEVICE_NEW = 0xAA00  # USERFAULTFD_IOC_NEW

NUMBERS = {"x86_64": (323, 16), "aarch64": (282, 29)}  # userfaultfd, ioctl


class Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction)))


def is_supported() -> bool:
    return platform.machine() in NUMBERS


def refuse_userfaultfd(answer: int, *, device_works: bool = False) -> None:
    """From now on, for this process and its children, for ever; answer is what the filter returns."""
    userfaultfd, ioctl = NUMBERS[platform.machine()]
    instructions = (
        Instruction(BPF_LOAD_WORD, 0, 0, OFFSET_NUMBER),
        Instruction(BPF_JUMP_EQUAL, 4, 0, userfaultfd),
        Instruction(BPF_JUMP_EQUAL, 0, 2, ioctl),
        Instruction(BPF_LOAD_WORD, 0, 0, OFFSET_ARGUMENT_1),
        Instruction(BPF_JUMP_EQUAL, 0 if device_works else 1, 0, DEVICE_NEW),
        Instruction(BPF_RETURN, 0, 0, RETURN_ALLOW),
        Instruction(BPF_RETURN, 0, 0, answer),
    )
    install(instructions)


def install(instructions: Sequence[Instruction]) -> None:
    """A filter of these, from now on, for this process and its children, for ever."""
    array = (Instruction * len(instructions))(*instructions)
    program = Program(len(instructions), array)
    libc = ctypes.CDLL(None, use_errno=True)
    prctl = libc.prctl
    prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
    for option, argument, pointer in (
        (PR_SET_NO_NEW_PRIVS, 1, None),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program)),
    ):
        if prctl(option, argument, pointer, 0, 0) < 0:
            raise OSError(ctypes.get_errno(), "prctl")


def under_filter(answer: str = "EPERM", *, device_works: bool = False) -> list[str]:
    """Words of a command that runs another one under the filter."""
    words = [sys.executable, str(Path(__file__).resolve()), answer]
    return [*words, "--device-works"] if device_works else words


def run_without_userfaultfd(
    arguments: Sequence[str], answer: str = "EPERM", timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Runs python with these arguments under the filter. answer: the name of an errno, or "kill"."""
    command = [*under_filter(answer), sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


if __name__ == "__main__":
    code, words = sys.argv[1], sys.argv[2:]
    device_works = words[0] == "--device-works"
    refuse_userfaultfd(
        RETURN_KILL if code == "kill" else RETURN_ERRNO | getattr(errno, code), device_works=device_works
    )
    words = words[1:] if device_works else words
    os.execv(words[0], words)
