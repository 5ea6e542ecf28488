"""cast: who takes part: the helper programs, how each is started, and what it must find.

A role is the plan, a player the process. Judges nothing: what a player found is compared in judge. A player that is
still there when the show ends, in whichever way, is killed and waited for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pcshare import errors
from pcshare.demo import editor

EXECUTABLES = Path(__file__).resolve().parent.parent / "_bin"
SEED = 1
LOOKUPS = 512  # pages that are waited for, one after another: half a second at the usual delay
WORKERS = 3
PIECES = 64
READER_TIMEOUT_S = 3600.0  # the reader waits for the writer, who waits for the whole file: the show has its own limit
DATA, RESULTS, DRAFT = "data", "results", "draft"
NUMPY_HINT = "without numpy: no random_lookup and no numpy_user (pip install 'pcshare[numpy]')"


@dataclass(frozen=True)
class Role:
    """One helper program. expected: what it must find in the file; again: it also runs on memory that is ready."""

    name: str
    does: str
    command: tuple[str, ...]
    expected: Callable[[], object]
    again: bool = True


def has_numpy() -> bool:
    return importlib.util.find_spec("numpy") is not None


def _python(module: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-P", "-m", module, *map(str, arguments))


def _on_data(program: str, *arguments: object) -> tuple[str, ...]:
    return _python(f"pcshare_helpers.{program}", f"--block={DATA}", *arguments)


def _touch() -> str:
    path = EXECUTABLES / "touch"
    if not path.exists():
        raise errors.HostError(
            f"the C helper {path} is missing: this pcshare was installed without its compiled programs",
            hint="install it again: pip install --force-reinstall --no-deps pcshare",
        )
    return str(path)


def roles(path: Path, draft: Path) -> list[Role]:
    """Everybody, in the order in which they start: first the one that must be there before its pages. Those that need
    numpy only where it is installed."""
    return [_editor(draft), *_plain_roles(path), *(_numpy_roles(path) if has_numpy() else [])]


def _plain_roles(path: Path) -> list[Role]:
    from pcshare_helpers import expected

    def pieces() -> int:
        return int(expected.expected_writer(path, PIECES))

    touch = (_touch(), f"--block={DATA}", "--pattern=random", f"--count={LOOKUPS}", f"--seed={SEED}")
    timeout = f"--timeout={READER_TIMEOUT_S}"
    return [
        Role("scan", "sha256 of every byte in order", _on_data("scan"), lambda: expected.expected_scan(path)),
        Role("writer", "checksums into a second block", _on_data("writer", f"--count={PIECES}"), pieces),
        Role("reader", "reads what the writer wrote", _on_data("reader", f"--count={PIECES}", timeout), pieces),
        Role(
            "forking_pool",
            f"{WORKERS} forked workers",
            _on_data("forking_pool", f"--workers={WORKERS}", f"--count={PIECES}"),
            pieces,
        ),
        Role(
            "touch",
            "plain C, random pages",
            touch,
            lambda: expected.expected_touch(path, "random", SEED, LOOKUPS),
        ),
    ]


def _numpy_roles(path: Path) -> list[Role]:
    from pcshare_helpers import expected

    lookup = _on_data("random_lookup", f"--seed={SEED}", f"--count={LOOKUPS}")
    return [
        Role("random_lookup", "numpy, random words", lookup, lambda: expected.expected_random(path, SEED, LOOKUPS)),
        Role("numpy_user", "numpy, max and mean", _on_data("numpy_user"), lambda: expected.expected_numpy(path)),
    ]


def _editor(draft: Path) -> Role:
    return Role(
        "editor",
        "writes before pages come",
        _python("pcshare.demo.editor", f"--block={DRAFT}"),
        lambda: editor.edited(draft),
        again=False,
    )


def trespasser() -> Role:
    """The one that must be refused; it finds nothing."""
    command = _python("pcshare.demo.trespasser", f"--block={DATA}")
    return Role("trespasser", "writes to a read-only block", command, lambda: None, again=False)


@dataclass
class Player:
    """A role that runs, and what it said when it ended."""

    role: Role
    process: subprocess.Popen[str]
    report: dict[str, Any] = field(default_factory=dict)
    complaint: str = ""

    @property
    def name(self) -> str:
        return self.role.name

    @property
    def ended(self) -> bool:
        return self.process.returncode is not None

    def poll(self) -> bool:
        """Whether it has ended; reads its last line when it has. A helper says far less than a pipe holds."""
        if not self.ended and self.process.poll() is not None:
            out, err = self.process.communicate()
            self.complaint = err.strip()
            with contextlib.suppress(ValueError, IndexError):
                self.report = json.loads(out.splitlines()[-1])
        return self.ended


class Cast:
    """Players on one coordinator; whoever still runs at the end is killed."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self.players: list[Player] = []

    def start(self, plan: Sequence[Role]) -> None:
        for role in plan:
            process = subprocess.Popen(
                [*role.command, f"--socket={self._socket}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            self.players.append(Player(role, process))

    def running(self) -> Iterator[Player]:
        return (player for player in self.players if not player.poll())

    def kill(self) -> list[str]:
        """Ends all who still run; their names."""
        left = list(self.running())
        for player in left:
            player.process.kill()
        for player in left:
            player.process.communicate()
        return [player.name for player in left]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
