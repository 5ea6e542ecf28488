"""Builds what setuptools alone cannot: the C core, the module that cffi makes of it, the executables in pcshare/_bin.

One command, build_ext, makes all three, so that wheels, editable installs and `python setup.py build_ext --inplace` get
the same. Each C file is compiled once, two at a time, and again only when it or a header it includes has changed. All
else is in pyproject.toml.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from setuptools import find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

COMPILE_JOBS = 2
EXECUTABLES = Path("pcshare/_bin")
PROGRAM_FOLDERS = (Path("helpers"), Path("helpers/hostile"), Path("pcshare/bench"))
LIBRARY = "libpcshare.a"

NO_COMPILER = """no C compiler: {compiler!r} is not on the PATH
  Debian, Ubuntu: apt-get install gcc libc6-dev
  Fedora, RHEL:   dnf install gcc glibc-devel"""
NO_PYTHON_HEADER = """no Python.h in {folder}: the header that cffi's glue needs
  Debian, Ubuntu: apt-get install python3-dev
  Fedora, RHEL:   dnf install python3-devel"""
NO_SYSTEM_HEADER = """the C compiler does not find the system's headers:
{output}
  Debian, Ubuntu: apt-get install gcc libc6-dev linux-libc-dev
  Fedora, RHEL:   dnf install gcc glibc-devel kernel-headers"""
PROBE = "#include <stdint.h>\n#include <sys/epoll.h>\n#include <linux/userfaultfd.h>\nint main(void) { return 0; }\n"


def load_build() -> ModuleType:
    """pcshare/core/build.py by its path: importing it as a package would ask for the module that is to be built."""
    spec = importlib.util.spec_from_file_location("pcshare_core_build", "pcshare/core/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


core_build = load_build()


def compiler() -> list[str]:
    """The command that compiles: CC, else the one Python was built with if it is here, else cc."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    pythons = shlex.split(sysconfig.get_config_var("CC") or "cc")
    return pythons if shutil.which(pythons[0]) else ["cc"]


def archiver() -> list[str]:
    return shlex.split(os.environ.get("AR", "ar"))


def check_tools() -> None:
    """Raises with the command that mends it if this host cannot compile."""
    cc = compiler()
    if shutil.which(cc[0]) is None:
        raise CompileError(NO_COMPILER.format(compiler=cc[0]))
    folders = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    if not any(Path(folder, "Python.h").exists() for folder in folders):
        raise CompileError(NO_PYTHON_HEADER.format(folder=" or ".join(sorted(folders))))
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch, "probe.c")
        probe.write_text(PROBE)
        tried = subprocess.run([*cc, str(probe), "-o", f"{scratch}/probe"], capture_output=True, text=True)
    if tried.returncode != 0:
        raise CompileError(NO_SYSTEM_HEADER.format(output=tried.stderr.strip()))


def run_tool(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}exit code {done.returncode}")
    if done.stdout:  # warnings
        print(done.stdout, file=sys.stderr, end="")


def is_older(target: Path, inputs: Sequence[Path]) -> bool:
    """Whether target is missing or older than one of inputs, or one of them has gone."""
    try:
        made_ns = target.stat().st_mtime_ns
        return any(path.stat().st_mtime_ns > made_ns for path in inputs)
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def one_build_at_a_time() -> Iterator[None]:
    """Two installs from one checkout would write into each other's objects."""
    Path("build").mkdir(exist_ok=True)
    with open("build/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_copy(target: Path, source: Path) -> bool:
    """Whether target is what replace_file made of source. Younger is no answer: other flags' files have other times."""
    if not target.exists():
        return False
    there, wanted = target.stat(), source.stat()
    return (there.st_mtime_ns, there.st_size) == (wanted.st_mtime_ns, wanted.st_size)


def replace_file(target: Path, source: Path) -> None:
    """Puts a copy of source in target's place, never writing into a file that may be running."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(source, fresh)
    fresh.replace(target)


class Workshop:
    """A folder with the objects, the library and the executables that one set of flags gives."""

    def __init__(self) -> None:
        self.compile_command = [*compiler(), *core_build.compile_flags(), f"-I{core_build.CORE}", "-I."]
        key = hashlib.sha256(shlex.join([*self.compile_command, *core_build.link_flags()]).encode()).hexdigest()[:12]
        self.folder = Path("build") / f"core-{key}"

    def object_path(self, source: Path) -> Path:
        return self.folder / source.with_suffix(".o")

    def compile_all(self, sources: Sequence[Path]) -> None:
        stale = [source for source in sources if self._is_stale(source)]
        with ThreadPoolExecutor(COMPILE_JOBS) as pool:
            list(pool.map(self._compile, stale))  # the list raises what a job raised

    def _is_stale(self, source: Path) -> bool:
        made = self.object_path(source)
        try:
            rule = made.with_suffix(".d").read_text()
        except FileNotFoundError:
            return True
        read = rule.partition(":")[2].replace("\\\n", " ").split()
        return is_older(made, [Path(path) for path in read])

    def _compile(self, source: Path) -> None:
        made = self.object_path(source)
        made.parent.mkdir(parents=True, exist_ok=True)
        sys.stderr.write(f"compiling {source}\n")  # one call: another thread writes too
        fresh = made.with_suffix(".fresh.o")
        depends = made.with_suffix(".d")
        command = [*self.compile_command, "-MMD", "-MF", str(depends), "-MT", str(made), "-c", str(source)]
        run_tool([*command, "-o", str(fresh)])
        fresh.replace(made)

    def make_library(self) -> Path:
        made = self.folder / LIBRARY
        objects = [self.object_path(source) for source in core_build.library_sources()]
        listed = made.with_suffix(".list")  # a file that left the library leaves no younger input behind
        names = "\n".join(str(path) for path in objects)
        if is_older(made, objects) or not listed.exists() or listed.read_text() != names:
            made.unlink(missing_ok=True)
            run_tool([*archiver(), "rcsD", str(made), *map(str, objects)])
            listed.write_text(names)
        return made

    def link(self, source: Path, inputs: Sequence[Path]) -> Path:
        """The executable of one C file with a main(), linked with inputs."""
        made = self.folder / "bin" / executable_name(source)
        objects = [self.object_path(source), *inputs]
        if is_older(made, objects):
            made.parent.mkdir(parents=True, exist_ok=True)
            run_tool([*compiler(), "-o", str(made), *map(str, objects), *core_build.link_flags()])
        return made


def program_sources() -> list[Path]:
    """Each is a program of its own, linked with libpcshare.a."""
    return sorted(path for folder in PROGRAM_FOLDERS for path in folder.glob("*.c"))


def executable_name(source: Path) -> str:
    """keeper_main.c is pcshare-keeper; helpers/flood_requests.c is flood-requests."""
    if source.name.endswith(core_build.MAIN_SUFFIX):
        return "pcshare-" + source.name.removesuffix(core_build.MAIN_SUFFIX).replace("_", "-")
    return source.stem.replace("_", "-")


def check_names(sources: Sequence[Path]) -> None:
    taken: dict[str, Path] = {LIBRARY: core_build.CORE}
    for source in sources:
        name = executable_name(source)
        if name in taken:
            raise CompileError(f"{source} and {taken[name]} would both become {EXECUTABLES / name}: rename one")
        taken[name] = source


class BuildAll(build):
    """build that starts from an empty folder: a module that was deleted must not travel on in the next wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildCore(build_ext):
    """build_ext that compiles the core first, links it into the module, and makes the executables."""

    def run(self) -> None:
        check_tools()
        with one_build_at_a_time():
            self._build(Workshop())

    def _build(self, workshop: Workshop) -> None:
        core = core_build.core_sources()
        mains = core_build.main_sources()
        programs = program_sources()
        check_names([*mains, *programs])
        workshop.compile_all([*core, *mains, *programs])
        objects = [workshop.object_path(source) for source in core]
        for extension in self.extensions:
            extension.extra_objects = [str(path) for path in objects]
        self.force = True  # the objects may be another set of flags', older than the module that is there
        super().run()
        library = workshop.make_library()
        made = [library, *(workshop.link(source, objects) for source in mains)]
        made += [workshop.link(source, [library]) for source in programs]
        self._install(made)

    def _install(self, made: Sequence[Path]) -> None:
        for folder in self._executable_folders():
            for old in folder.glob("*"):
                if old.name not in {path.name for path in made}:
                    old.unlink()
            for path in made:
                if not is_copy(folder / path.name, path):
                    replace_file(folder / path.name, path)

    def _executable_folders(self) -> list[Path]:
        return [Path(self.build_lib) / EXECUTABLES, *([EXECUTABLES] if self.inplace else [])]

    def _executables(self) -> list[str]:
        sources = [*core_build.main_sources(), *program_sources()]
        return [str(EXECUTABLES / name) for name in [LIBRARY, *map(executable_name, sources)]]

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), *(str(Path(self.build_lib) / name) for name in self._executables())]

    def get_output_mapping(self) -> dict[str, str]:
        mapping = super().get_output_mapping()
        if self.inplace:
            mapping.update({str(Path(self.build_lib) / name): name for name in self._executables()})
        return mapping


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["pcshare", "pcshare.*"]), "pcshare_helpers", "pcshare_helpers.hostile"],
        package_dir={"pcshare_helpers": "helpers"},
        package_data={
            "pcshare": ["py.typed", "systemd/*.service"],
            "pcshare.core": ["*.h", "*.pyi"],
            "pcshare.bench": ["*.c", "*.h"],
            "pcshare_helpers": ["*.c", "*.h"],
            "pcshare_helpers.hostile": ["*.c", "*.h"],
        },
        include_package_data=False,
        zip_safe=False,
        cffi_modules=["pcshare/core/build.py:make_ffi"],
        cmdclass={"build": BuildAll, "build_ext": BuildCore},
    )
