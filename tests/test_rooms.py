"""Who may import whom: each room only rooms below it, the compiled core only its skins; and one file passes fds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From bottom to top. Rooms of one line are neighbours: neither imports the other.
ROOMS = (
    ("errors",),
    ("core",),
    ("units",),
    ("extents",),
    ("signals",),
    ("runtime",),
    ("working_set",),
    ("fds",),
    ("account",),
    ("uffd",),
    ("keeper",),
    ("ramblock",),
    ("page_channel",),
    ("trace",),
    ("fault_thread",),
    ("incoming",),
    ("state",),
    ("notifier",),
    ("probe",),
    ("protocol",),
    ("transport",),
    ("store",),
    ("nbd",),
    ("migration",),
    ("sources",),
    ("status",),
    ("coordinator", "client"),
    ("admin",),
    ("launcher",),
    ("serve",),
    ("views",),
    ("scratch",),
    ("demo", "stress", "bench"),
    ("cli",),
    ("integrations",),
    ("__init__", "__main__"),  # the package's own face
)
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
SKINS = {"fds", "uffd", "keeper", "ramblock", "page_channel", "trace", "fault_thread", "incoming"}
CORE_USERS = {"core", "status", "protocol", "client"} | SKINS
FD_PASSING = {"sendmsg", "recvmsg", "recvmsg_into", "send_fds", "recv_fds"}
FD_PASSER = "transport"


def room_of(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, package: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, also inside functions and for types only. A name that is taken from a
    package counts as one in it: `from pcshare import errors` is pcshare.errors."""
    own = module_name(path, package).split(".")
    folder = own if path.name == "__init__.py" else own[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def room_imported(name: str, package: Path) -> str | None:
    """The room that an import reaches, None for other people's packages and for the version number."""
    parts = name.split(".")
    if parts[0] != package.name or parts[1:] == ["__version__"]:
        return None
    if len(parts) == 1:
        return "__init__"
    is_module = (package / parts[1]).is_dir() or (package / f"{parts[1]}.py").exists()
    return parts[1] if is_module else "__init__"


def import_violation(room: str, other: str) -> str | None:
    if other == room:
        return None
    if other not in LEVELS:
        return f"imports {other}, which is no room"
    if LEVELS[other] >= LEVELS[room]:
        return f"imports {other}, which is not below it"
    if other == "core" and room not in CORE_USERS:
        return "imports core, which only its skins, status, protocol and client may"
    return None


def fd_passing_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in FD_PASSING:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Name) and node.id in FD_PASSING:
            yield node.lineno, node.id


def file_violations(path: Path, package: Path) -> Iterator[str]:
    room = room_of(path, package)
    where = path.relative_to(package.parent)
    if room not in LEVELS:
        yield f"{where}: {room} is no room: give it a place in ROOMS"
        return
    tree = ast.parse(path.read_text(), str(path))
    for line, name in imported_modules(path, package, tree):
        other = room_imported(name, package)
        wrong = import_violation(room, other) if other is not None else None
        if wrong:
            yield f"{where}:{line}: {room} {wrong}"
    if room != FD_PASSER:
        yield from (f"{where}:{line}: calls {call}, which is {FD_PASSER}'s" for line, call in fd_passing_calls(tree))


def violations(package: Path) -> list[str]:
    return [line for path in sorted(package.rglob("*.py")) for line in file_violations(path, package)]


def test_each_room_imports_only_rooms_below_it() -> None:
    assert violations(ROOT / "pcshare") == []


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for top in ("pcshare", "helpers") for path in (ROOT / top).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of the same name with some empty rooms."""
    made = tmp_path / "pcshare"
    for name in ("__init__", "errors", "units", "fds", "transport", "client", "admin", "views/top", "views/__init__"):
        path = made / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for folder in ("core", "coordinator", "cli"):
        (made / folder).mkdir()
        (made / folder / "__init__.py").write_text("")
    return made


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("errors.py", "from pcshare.units import x", "errors imports units, which is not below it"),
        ("errors.py", "import pcshare.units", "errors imports units, which is not below it"),
        ("errors.py", "from pcshare import units", "errors imports units, which is not below it"),
        ("errors.py", "from . import units", "errors imports units, which is not below it"),
        ("errors.py", "def f():\n    from .units import x", "errors imports units, which is not below it"),
        ("views/top.py", "from ..cli import main", "views imports cli, which is not below it"),
        ("views/__init__.py", "from ..cli import main", "views imports cli, which is not below it"),
        ("client.py", "from pcshare.coordinator import x", "client imports coordinator, which is not below it"),
        ("coordinator/a.py", "from pcshare import client", "coordinator imports client, which is not below it"),
        ("admin.py", "from pcshare.core import lib", "admin imports core, which only its skins"),
        ("admin.py", "import pcshare", "admin imports __init__, which is not below it"),
        ("admin.py", "from pcshare import attach", "admin imports __init__, which is not below it"),
        ("client.py", "s.sendmsg([b''])", "calls sendmsg, which is transport's"),
        ("client.py", "from socket import recv_fds\nrecv_fds(s, 1, 1)", "calls recv_fds, which is transport's"),
        ("cellar.py", "", "cellar is no room"),
    ],
)
def test_checker_finds_a_violation(package: Path, file: str, line: str, complaint: str) -> None:
    (package / file).write_text(line)
    (found,) = violations(package)
    assert complaint in found
    assert found.startswith(f"pcshare/{file}:")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("client.py", "from pcshare.core import ffi, lib"),
        ("client.py", "import os\nfrom pcshare import errors, units"),
        ("views/top.py", "from . import other\nfrom pcshare import __version__"),
        ("transport.py", "s.recvmsg(1)"),
        ("__init__.py", "from pcshare.client import attach"),
    ],
)
def test_checker_lets_pass_what_is_right(package: Path, file: str, line: str) -> None:
    (package / file).write_text(line)
    assert violations(package) == []
