"""scratch: the folder is there, and then it is not, whatever comes between."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pcshare.scratch import scratch_folder


def interrupted(function: Callable[..., Any], when: str) -> Callable[..., Any]:
    """By Ctrl-C, before it has done anything or when it has done all."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if when == "before":
            signal.raise_signal(signal.SIGINT)
        result = function(*arguments, **named)
        if when == "after":
            signal.raise_signal(signal.SIGINT)
        return result

    return wrapped


def test_folder_lasts_as_long_as_the_block(tmp_path: Path) -> None:
    with scratch_folder("pcshare-test-", tmp_path) as folder:
        (folder / "file").write_text("something")
        assert list(tmp_path.iterdir()) == [folder]
        assert folder.name.startswith("pcshare-test-")
    assert list(tmp_path.iterdir()) == []


def test_what_ends_the_block_removes_the_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError), scratch_folder("x", tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupt_while_it_is_made_is_heard_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", interrupted(tempfile.mkdtemp, when))
    with pytest.raises(KeyboardInterrupt), scratch_folder("x", tmp_path):
        pytest.fail("nobody has heard it")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupt_while_it_is_removed_is_heard_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(shutil, "rmtree", interrupted(shutil.rmtree, when))
    with pytest.raises(KeyboardInterrupt), scratch_folder("x", tmp_path) as folder:
        (folder / "file").write_text("something")
    assert list(tmp_path.iterdir()) == []
