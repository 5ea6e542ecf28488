"""build: what the compiled core is made of, and how a header is read once for the compiler and for cffi.

Names sources, headers and flags and makes the cffi description from the headers themselves. Compiles nothing: setup.py
does. cffi runs this file by its path, before pcshare is installed: it must import nothing of pcshare.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

CORE = Path("pcshare/core")  # relative: setuptools takes no other paths
MODULE = "pcshare.core._core"

# What Python may call, each after those it includes. The other headers are the core's own.
HEADERS = (
    "error.h",
    "bitmap.h",
    "uffd.h",
    "status_segment.h",
    "trace.h",
    "wire.h",
    "keeper.h",
    "ramblock.h",
    "page_channel.h",
    "page_channel_nbd.h",
    "channel_meter.h",
    "remote_fd.h",
    "working_set.h",
    "fault_thread.h",
    "wake_cost.h",
    "incoming.h",
    "helper.h",
)

# The helper's side, which C programs link as libpcshare.a; files named helper_*.c belong to it too.
LIBRARY_SOURCES = ("helper.c", "bitmap.c", "uffd.c", "status_segment.c", "trace.c", "fd_message.c")

MAIN_SUFFIX = "_main.c"  # a file with a main(): an executable, not part of the module

COMPILE_FLAGS = ("-O2", "-Wall", "-Wextra", "-std=gnu11", "-pthread", "-fvisibility=hidden", "-fPIC")
LINK_FLAGS = ("-pthread", "-lrt")  # shm_open was in librt before glibc 2.34


def core_sources() -> list[Path]:
    """Every C file of the core but those with a main()."""
    return sorted(path for path in CORE.glob("*.c") if not path.name.endswith(MAIN_SUFFIX) and path.name != "_core.c")


def main_sources() -> list[Path]:
    return sorted(CORE.glob(f"*{MAIN_SUFFIX}"))


def library_sources() -> list[Path]:
    """The files of libpcshare.a."""
    return [path for path in core_sources() if path.name in LIBRARY_SOURCES or path.name.startswith("helper_")]


def sanitizer_flags() -> list[str]:
    """From PCSHARE_SANITIZE: what -fsanitize takes, for instance "address,undefined" or "thread"."""
    sanitizer = os.environ.get("PCSHARE_SANITIZE", "")
    return [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer", "-g"] if sanitizer else []


def compile_flags() -> list[str]:
    error = ["-Werror"] if os.environ.get("PCSHARE_WERROR") == "1" else []
    return [*COMPILE_FLAGS, *error, *sanitizer_flags()]


def link_flags() -> list[str]:
    return [*LINK_FLAGS, *sanitizer_flags()]


def declarations(header: str) -> str:
    """A header without its preprocessor lines and without what only C++ sees: what cffi reads."""
    header = re.sub(r"\\\n", " ", header)
    header = re.sub(r"^\s*#\s*ifdef\s+__cplusplus\b.*?^\s*#\s*endif\b[^\n]*$", "", header, flags=re.M | re.S)
    return re.sub(r"^[ \t]*#[^\n]*$", "", header, flags=re.M)


def make_ffi() -> Any:
    """The description that cffi turns into the module's C; setup.py adds the compiled core when it links."""
    from cffi import FFI  # here, so that setup.py can read the names above without it

    ffi = FFI()
    for name in HEADERS:
        ffi.cdef(declarations((CORE / name).read_text()))
    ffi.set_source(
        MODULE,
        "\n".join(f'#include "{name}"' for name in HEADERS),
        include_dirs=[str(CORE)],
        extra_compile_args=compile_flags(),
        extra_link_args=link_flags(),
    )
    return ffi
