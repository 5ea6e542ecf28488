"""What a user gets who installs pcshare: names, files, messages; and what the build reads from the headers."""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import pcshare
from pcshare.core import ffi, lib

ROOT = Path(__file__).parent.parent
CORE = ROOT / "pcshare" / "core"
EXECUTABLES = Path(pcshare.__file__).parent / "_bin"


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def build() -> dict[str, Any]:
    return runpy.run_path(str(CORE / "build.py"))


def expected_executables() -> set[str]:
    programs = [*(ROOT / "helpers").rglob("*.c"), *(ROOT / "pcshare" / "bench").glob("*.c")]
    return {path.stem.replace("_", "-") for path in programs} | {"pcshare-keeper"}


def test_version_is_the_installed_one() -> None:
    assert importlib.metadata.version("pcshare") == pcshare.__version__


def test_public_names_are_there_and_no_others_are_made_up() -> None:
    for name in pcshare.__all__:
        assert getattr(pcshare, name) is not None
        assert name in dir(pcshare)
    with pytest.raises(AttributeError, match="attach_all"):
        pcshare.attach_all  # noqa: B018  (looking it up is the test)


def test_importing_the_package_loads_neither_core_nor_commands() -> None:
    source = "import sys, pcshare, pcshare.errors; print([m for m in sys.modules if m.startswith('pcshare.')])"
    assert run(sys.executable, "-c", source).stdout.strip() == "['pcshare.errors']"


@pytest.mark.parametrize("command", [["-m", "pcshare"], None], ids=["module", "script"])
def test_command_says_its_version(command: list[str] | None) -> None:
    prefix = [sys.executable, *command] if command else [Path(sys.executable).parent / "pcshare"]
    done = run(*prefix, "--version")
    assert done.returncode == 0
    assert pcshare.__version__ in done.stdout


def test_executables_are_beside_the_package_and_can_run() -> None:
    assert {path.name for path in EXECUTABLES.iterdir()} == expected_executables() | {"libpcshare.a"}
    assert [name for name in expected_executables() if not os.access(EXECUTABLES / name, os.X_OK)] == []


def test_c_program_links_with_library_and_header_alone(tmp_path: Path) -> None:
    source = tmp_path / "program.c"
    source.write_text('#include "helper.h"\nint main(void) { return pcshare_error_text() == 0; }\n')
    command = ["cc", "-pthread", f"-I{CORE}", source, EXECUTABLES / "libpcshare.a", "-o", tmp_path / "program"]
    linked = run(*command)
    assert linked.returncode == 0, linked.stderr
    assert run(tmp_path / "program").returncode == 0


def test_constants_and_layouts_reach_python() -> None:
    assert lib.UFFD_FEATURE_BIT_MOVE == 1 << 16
    assert lib.RAMBLOCK_PAGE_SIZE_MAX == 2 << 20
    assert ffi.sizeof("struct wire_header") == 16
    assert ffi.offsetof("struct wire_welcome", "header") == 0


def test_every_function_of_the_read_headers_is_linked(build: dict[str, Any]) -> None:
    names = [name for name in dir(lib) if not name[0].isupper()]
    assert {"uffd_open", "keeper_connect", "pcshare_attach", "fault_threads_new"} <= set(names)
    for name in names:
        assert ffi.addressof(lib, name) != ffi.NULL


def test_every_header_that_is_read_exists_and_comes_after_those_it_includes(build: dict[str, Any]) -> None:
    headers: tuple[str, ...] = build["HEADERS"]
    for index, name in enumerate(headers):
        lines = (CORE / name).read_text().splitlines()
        included = {line.split('"')[1] for line in lines if line.startswith('#include "')}
        assert included <= set(headers[:index]), f"{name} includes what cffi has not read by then"


def test_declarations_leave_out_what_only_a_preprocessor_or_cpp_reads(build: dict[str, Any]) -> None:
    header = (
        "#ifndef A_H\n#define A_H\n#define TWO(x) \\\n    ((x) + 1)\n"
        '#ifdef __cplusplus\nextern "C" {\n#endif\nint f(void);\n#ifdef __cplusplus\n}\n#endif\n#endif\n'
    )
    assert build["declarations"](header).split() == ["int", "f(void);"]


def test_missing_core_names_the_cure(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("_core*.so", "_bin")
    shutil.copytree(ROOT / "pcshare", tmp_path / "pcshare", ignore=ignored)
    source = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import pcshare.core"
    done = run(sys.executable, "-S", "-c", source)
    assert done.returncode == 1
    assert "pcshare.core.CoreNotBuilt: the compiled core of pcshare does not load" in done.stderr
    assert "`pip install .`" in done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build needs, with nothing built in it."""
    copy = tmp_path / "tree"
    ignored = shutil.ignore_patterns("*.so", "*.o", "_bin", "__pycache__")
    for folder in ("pcshare", "helpers", "scripts"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for path in [*ROOT.glob("*.toml"), *ROOT.glob("*.py"), *ROOT.glob("*.in"), *ROOT.glob("*.md"), ROOT / "LICENSE"]:
        shutil.copy(path, copy)
    return copy


def build_wheel(tree: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    source = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    return run(sys.executable, "-c", source, cwd=tree, env=os.environ | variables)


@pytest.mark.slow
def test_wheel_carries_executables_sources_and_helpers(tree: Path) -> None:
    done = build_wheel(tree)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        modes = {entry.filename: entry.external_attr >> 16 for entry in opened.infolist()}
    for name in expected_executables():
        assert modes[f"pcshare/_bin/{name}"] & stat.S_IXUSR
    helpers = [path for pattern in ("*.py", "*.c") for path in (ROOT / "helpers").rglob(pattern)]
    wanted = {f"pcshare_helpers/{path.relative_to(ROOT / 'helpers')}" for path in helpers}
    wanted |= {f"pcshare/{path.relative_to(ROOT / 'pcshare')}" for path in (ROOT / "pcshare").rglob("*.py")}
    wanted |= {f"pcshare/core/{path.name}" for path in CORE.glob("*.h")}
    wanted.add("pcshare/systemd/pcshare@.service")
    wanted |= {"pcshare/py.typed", "pcshare/core/_core.pyi", "pcshare/core/_core.abi3.so", "pcshare/_bin/libpcshare.a"}
    assert wanted - set(modes) == set()
    assert [name for name in modes if name.startswith(("tests/", "helpers/"))] == []


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"CC": "no-such-compiler"}, "no C compiler: 'no-such-compiler'"),
        ({"CC": "cc -nostdinc"}, "the system's headers"),
    ],
    ids=["compiler", "headers"],
)
def test_build_on_a_host_that_lacks_something_names_the_cure(
    tree: Path, variables: dict[str, str], complaint: str
) -> None:
    done = build_wheel(tree, **variables)
    assert done.returncode != 0
    assert complaint in done.stderr
    assert "apt-get install gcc" in done.stderr
    assert "dnf install gcc" in done.stderr


def test_warning_is_an_error_where_it_is_asked_for(tree: Path) -> None:
    (tree / "pcshare/core/bitmap.c").write_text("void warned(int unused);\nvoid warned(int unused) {}\n")
    done = build_wheel(tree, PCSHARE_WERROR="1")
    assert done.returncode != 0
    assert "unused" in done.stderr


@pytest.mark.parametrize("script", ["demo", "test"])
@pytest.mark.parametrize(
    ("variables", "complaint", "cure"),
    [
        ({"CC": "no-such-compiler"}, "no C compiler: no-such-compiler", "apt-get install gcc libc6-dev"),
        ({"CC": "cc -nostdinc"}, "does not find the system's headers", "dnf install gcc glibc-devel kernel-headers"),
        ({"PCSHARE_PYTHON": "no-python"}, "no Python 3.11 or newer among: no-python", "apt-get install python3"),
        ({"PCSHARE_PYTHON": "false"}, "no Python 3.11 or newer among: false", "dnf install python3"),
    ],
    ids=["compiler", "headers", "python", "python that does not run"],
)
def test_script_on_a_host_that_lacks_something_names_the_cure(
    tree: Path, tmp_path: Path, script: str, variables: dict[str, str], complaint: str, cure: str
) -> None:
    done = run(tree / "scripts" / script, cwd=tmp_path, env=os.environ | variables)
    assert done.returncode == 3
    assert complaint in done.stderr
    assert cure in done.stderr
    assert not (tree / ".venv").exists()


def build_in_place(tree: Path) -> list[str]:
    """Builds and says which C files were compiled."""
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree)
    assert done.returncode == 0, done.stderr
    return sorted(line.removeprefix("compiling ") for line in done.stderr.splitlines() if line.startswith("compiling "))


@pytest.mark.slow
def test_only_what_changed_is_compiled_again(tree: Path) -> None:
    assert "pcshare/core/keeper.c" in build_in_place(tree)
    keeper = (tree / "pcshare/_bin/pcshare-keeper").stat()
    assert build_in_place(tree) == []
    assert (tree / "pcshare/_bin/pcshare-keeper").stat().st_ino == keeper.st_ino

    (tree / "pcshare/core/keeper_main.c").touch()
    assert build_in_place(tree) == ["pcshare/core/keeper_main.c"]
    assert (tree / "pcshare/_bin/pcshare-keeper").stat().st_ino != keeper.st_ino

    (tree / "pcshare/core/keeper.h").touch()
    assert {"pcshare/core/keeper.c", "pcshare/core/keeper_main.c"} <= set(build_in_place(tree))
