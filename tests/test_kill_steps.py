"""Coordinators that are killed and go on: what they serve afterwards is what they served before."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from pcshare.client import attach
from pcshare.status import read_status
from support import wait_until
from support_coordinator import coordinator

RESTART_LIMIT_S = 30.0
PAGE = 4096


def kill_and_await_another(name: str) -> None:
    before = read_status(name)
    os.kill(before.pid, signal.SIGKILL)
    wait_until(lambda: read_status(name).restarts > before.restarts, "another coordinator", RESTART_LIMIT_S)


def test_complete_block_is_as_writable_after_a_restart_as_before(runtime_dir: Path, tmp_path: Path) -> None:
    """P2, P5: a source that is complete is not asked any more what its blocks are."""
    path = tmp_path / "draft.bin"
    path.write_bytes(bytes(PAGE))
    with coordinator("scratch=zero:4096", f"draft={path}", f"fixed={path}", options=["--writable=draft"]) as serving:
        wait_until(lambda: serving.status().state == "END", "all pages")
        writable = {block.idstr: block.writable for block in serving.status().blocks}
        assert writable == {"scratch": True, "draft": True, "fixed": False}
        kill_and_await_another(serving.name)
        assert {block.idstr: block.writable for block in serving.status().blocks} == writable
        with attach(serving.name, "scratch", mode="rw") as block, memoryview(block) as view:
            view[:5] = b"after"
