"""bench_common: what the benchmark scripts share: programs that are compiled when they are needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "pcshare" / "core"
LIBRARY = ROOT / "pcshare" / "_bin" / "libpcshare.a"


def compile_program(name: str, folder: Path) -> str:
    """scripts/NAME.c, linked with the helper's library."""
    if not LIBRARY.exists():
        sys.exit(f"{LIBRARY} is missing: run scripts/test once, it builds everything")
    program = folder / name
    source = Path(__file__).with_name(f"{name}.c")
    subprocess.run(["cc", "-O2", "-pthread", f"-I{CORE}", str(source), str(LIBRARY), "-o", str(program)], check=True)
    return str(program)


def run_for_figures(command: Sequence[str]) -> list[float]:
    """The numbers of the one line that a program prints."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(text) for text in done.stdout.split()]
