"""support_unit: the shipped systemd unit, and a command run under what it restricts, without systemd.

As a program: ``python support_unit.py JSON COMMAND...`` restricts itself and becomes the command. What only systemd can
do (mounts, device lists, address families) is left out. Makes no claims about pcshare.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pcshare
from support import needs
from support_seccomp import (
    BPF_JUMP_EQUAL,
    BPF_LOAD_WORD,
    BPF_RETURN,
    OFFSET_NUMBER,
    RETURN_ALLOW,
    RETURN_ERRNO,
    Instruction,
    install,
)

UNIT = Path(pcshare.__file__).parent / "systemd" / "pcshare@.service"
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_MDWE = 24, 38, 65
CAPABILITIES = {"CAP_CHOWN": 0, "CAP_SETGID": 6, "CAP_SETUID": 7}
EPERM = 1


def needs_systemd() -> None:
    there = any(Path(folder, "systemd-analyze").exists() for folder in os.environ["PATH"].split(os.pathsep))
    needs(None if there else "systemd-analyze (apt-get install systemd)")


def settings(section: str = "Service") -> dict[str, str]:
    """What the unit says in a section."""
    text = UNIT.read_text().partition(f"[{section}]\n")[2].partition("\n[")[0]
    lines = [line.partition("=") for line in text.splitlines() if line and not line.startswith("#")]
    assert len({key for key, _, _ in lines}) == len(lines)
    return {key: value for key, _, value in lines}


@cache
def _sets() -> dict[str, list[str]]:
    """Of system calls, as systemd names them."""
    said = subprocess.run(["systemd-analyze", "syscall-filter"], capture_output=True, text=True, check=True).stdout
    blocks = re.findall(r"^(@[\w-]+)\n((?:    .*\n?)*)", said, re.M)
    return {name: [line.strip() for line in body.splitlines() if "#" not in line] for name, body in blocks}


def _calls(name: str) -> Iterator[str]:
    if not name.startswith("@"):
        yield name
        return
    for member in _sets()[name]:
        yield from _calls(member)


def restrictions() -> str:
    """For this program: what the unit leaves, as JSON."""
    said = subprocess.run(
        [os.environ.get("CC", "cc"), "-E", "-dM", "-include", "asm/unistd.h", "-x", "c", os.devnull],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    numbers = {name: int(number) for name, number in re.findall(r"^#define __NR_(\w+) (\d+)$", said, re.M)}
    told = settings()
    calls = {call for word in told["SystemCallFilter"].split() for call in _calls(word)}
    return json.dumps(
        {
            "calls": sorted(numbers[call] for call in calls if call in numbers),
            "capabilities": [CAPABILITIES[name] for name in told["CapabilityBoundingSet"].split()],
            "umask": int(told["UMask"], 8),
            "files": int(told["LimitNOFILE"]),
        }
    )


def restrict(calls: list[int], capabilities: list[int]) -> None:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for number in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        if number not in capabilities:
            prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    prctl(PR_SET_MDWE, 1, 0, 0, 0)  # Linux 6.3: what MemoryDenyWriteExecute does in newer versions of systemd
    allowed = [
        instruction
        for call in calls
        for instruction in (Instruction(BPF_JUMP_EQUAL, 0, 1, call), Instruction(BPF_RETURN, 0, 0, RETURN_ALLOW))
    ]
    end = Instruction(BPF_RETURN, 0, 0, RETURN_ERRNO | EPERM)
    install([Instruction(BPF_LOAD_WORD, 0, 0, OFFSET_NUMBER), *allowed, end])


def main() -> None:
    told = json.loads(sys.argv[1])
    os.umask(told["umask"])
    files = min(told["files"], resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    restrict(told["calls"], told["capabilities"])
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
