"""What every Python helper shares: options, clock, the one JSON line at the end, and the sequence of "random" places.

Holds no work of its own: a helper's file says all that it does with the block.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import pcshare
from pcshare.errors import PcshareError

STEP_BYTES = 1 << 20  # how much one call looks at: large enough to be cheap, small enough to have a first result soon
ATTACH_TIMEOUT_S = 10.0
WORD_MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the step of splitmix64


def splitmix64(seed: int, index: int) -> int:
    """The index-th number of the sequence that seed starts; the C helper and numpy compute the same one."""
    z = (seed + (index + 1) * GOLDEN) & WORD_MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD_MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD_MASK
    return z ^ (z >> 31)


class Run:
    """One helper's run: its options, and what its JSON line will say."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.bytes_checked = 0
        self.first_result_s: float | None = None
        self.details: dict[str, Any] = {}
        self._start = time.monotonic()

    def attach(self, block: str | None = None, mode: str | None = None) -> pcshare.Block:
        """The block of that name, or the one of --block, attached and ready to be read."""
        return pcshare.attach(
            self.options.name,
            block or self.options.block,
            mode,
            timeout_s=self.options.attach_timeout,
            socket=self.options.socket,
        )

    def computed(self, n_bytes: int) -> None:
        """Counts a value that was computed from n_bytes; the first one stops the clock of first_result_s."""
        self.bytes_checked += n_bytes
        if self.first_result_s is None:
            self.first_result_s = self.elapsed_s()

    def elapsed_s(self) -> float:
        """Seconds since just before the first attach."""
        return time.monotonic() - self._start


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all helpers have."""
    p = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    p.add_argument("--name", help="the coordinator's name (default: the one of PCSHARE_SOCKET, or the only one)")
    p.add_argument("--socket", help="its socket, instead of a name")
    p.add_argument("--block", help="the block (default: the only one)")
    p.add_argument("--seed", type=int, default=1, help="where the random places start (default 1)")
    p.add_argument("--count", type=int, default=1000, help="how many places, pieces or slices (default 1000)")
    p.add_argument("--attach-timeout", type=float, default=ATTACH_TIMEOUT_S, help="seconds to wait for the coordinator")
    return p


def main(helper: str, work: Callable[[Run], object], options: argparse.Namespace) -> int:
    """Runs work and prints its result; 0 if it came to one, 1 if pcshare or the work itself refused."""
    run = Run(options)
    report: dict[str, Any] = {"helper": helper, "ok": False, "result": None}
    try:
        report["result"] = work(run)
        report["ok"] = True
    except (PcshareError, OSError, ValueError) as error:
        report["error"] = f"{type(error).__name__}: {error}"
        print(f"{helper}: {error}", file=sys.stderr)
    report["first_result_s"] = run.first_result_s
    report["total_s"] = run.elapsed_s()
    report["bytes_checked"] = run.bytes_checked
    report["seed"] = options.seed
    report.update(run.details)
    print(json.dumps(report), flush=True)
    return 0 if report["ok"] else 1
