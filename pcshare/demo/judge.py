"""judge: compares what was found with the file itself. Trusts no helper's word about its own result being right."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcshare.client import attach
from pcshare.demo.cast import DATA, Player, Role
from pcshare.demo.stage import Performance

STEP_BYTES = 1 << 20


def expected_results(plan: Sequence[Role], tell: Callable[[str], None]) -> dict[str, object]:
    """What each role must find, computed from the file with read()."""
    results = {}
    for role in plan:
        tell(role.name)
        results[role.name] = role.expected()
    return results


def compare_block(name: str, path: Path) -> tuple[int, int]:
    """Compares the whole block with the file: (bytes compared, bytes that differ)."""
    compared = differing = 0
    with attach(name, DATA, "ro") as block, memoryview(block) as view, open(path, "rb") as file:
        for start in range(0, len(view), STEP_BYTES):
            part, content = view[start : start + STEP_BYTES], file.read(STEP_BYTES)
            if part != content:
                differing += sum(a != b for a, b in zip(part, content, strict=False)) + abs(len(part) - len(content))
            compared += len(part)
            part.release()
    return compared, differing


@dataclass(frozen=True)
class Verdict:
    """One helper's result beside the right one."""

    name: str
    found: object
    expected: object
    complaint: str
    bytes_checked: int

    @property
    def right(self) -> bool:
        return self.found is not None and self.found == self.expected


def judge(player: Player, expected: Mapping[str, object]) -> Verdict:
    report = player.report
    complaint = player.complaint if player.process.returncode else ""
    if player.process.returncode and not complaint:
        complaint = f"exit status {player.process.returncode}"
    checked = int(report.get("bytes_checked") or 0)
    return Verdict(player.name, report.get("result"), expected[player.name], complaint, checked)


def was_refused(player: Player) -> bool:
    """Whether the trespasser got what it deserves: an exception for asking, SIGSEGV for trying."""
    return player.process.returncode == -signal.SIGSEGV and player.report.get("refused_when_asking") is True


def mismatched_bytes(differing: int, verdicts: Sequence[Verdict]) -> int:
    """Bytes of the block that differ from the file's, and all that a helper with a wrong result had looked at."""
    wrong = (verdict for verdict in verdicts if verdict.found is not None and not verdict.right)
    return differing + sum(verdict.bytes_checked for verdict in wrong)


def kept_writes(performance: Performance) -> dict[str, Any]:
    """What the editor says of its writes: how many, how many of them before the page was there."""
    for player in performance.players:
        if player.name == "editor":
            return {key: int(player.report.get(key) or 0) for key in ("stamps", "written_before_arrival")}
    return {"stamps": 0, "written_before_arrival": 0}
