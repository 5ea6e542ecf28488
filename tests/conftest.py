"""Fixtures for all tests, and the rules that hold for every one: nothing is left behind, and CI skips nothing."""

from __future__ import annotations

import gc
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import hypothesis
import numpy  # noqa: F401  (here, because its thread pool starts with the first import and no test shall be blamed for it)
import pytest

from support import IN_CI, TAG, Inventory, needs, wait_until

SEED = int(os.environ.setdefault("PCSHARE_TEST_SEED", str(random.SystemRandom().randrange(1 << 32))))
SHORT_TEMPORARY_FOLDER = "/tmp"  # a socket's path takes 107 bytes, and pytest's own folders are long
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
SOCKETS_TIMEOUT_S = 20.0

os.environ[TAG] = str(os.getpid())

hypothesis.settings.register_profile(  # an example takes long where the machine stands still
    "pcshare", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("pcshare")


def pytest_report_header() -> str:
    return f"random seed: PCSHARE_TEST_SEED={SEED}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI must not: {_skip_reason(report.longrepr)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if IN_CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI must not: {_skip_reason(report.longrepr)}"
    return report


def _skip_reason(longrepr: object) -> object:
    return longrepr[2] if isinstance(longrepr, tuple) else longrepr


def _end_servers_of_multiprocessing() -> None:
    """The standard library keeps these for the life of the process; here they would look like leftovers."""
    for name, variable in (("forkserver", "_forkserver"), ("resource_tracker", "_resource_tracker")):
        module = sys.modules.get(f"multiprocessing.{name}")
        if module is not None:
            getattr(module, variable)._stop()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """Counts fds, threads, processes and shared memory before and after each test (promise P7)."""
    before = Inventory.take()
    yield
    _end_servers_of_multiprocessing()
    if not before.leftovers():
        return
    gc.collect()
    left = before.leftovers_after_wait()
    if left:
        before.clear()
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture
def data_file(request: pytest.FixtureRequest, tmp_path: Path, rng: random.Random) -> Path:
    """A file of random bytes, as many as the test's module says with LENGTH."""
    from support_serving import make_file  # here: a broken package must not break the counting

    return make_file(tmp_path, rng, request.module.LENGTH)


@pytest.fixture
def content(data_file: Path) -> bytes:
    """What the module's data_file holds."""
    return data_file.read_bytes()


@pytest.fixture
def seed() -> int:
    """The run's random seed: PCSHARE_TEST_SEED repeats it."""
    return SEED


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of this test's own: the same for the same seed, whatever ran before."""
    return random.Random(f"{SEED}:{request.node.nodeid}")


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty XDG_RUNTIME_DIR of this test's own, with a short path. No socket may be left in it."""
    folder = Path(tempfile.mkdtemp(prefix="pcs-", dir=SHORT_TEMPORARY_FOLDER))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    for name in ("PCSHARE_SOCKET", "PCSHARE_NAME"):
        monkeypatch.delenv(name, raising=False)
    try:
        yield folder
        wait_until(lambda: not list(folder.rglob("*.sock")), f"an end of the sockets in {folder}", SOCKETS_TIMEOUT_S)
    finally:
        shutil.rmtree(folder)


def _huge_pages(name: str) -> int:
    return int((HUGE_PAGES / name).read_text())


def _set_huge_pages(count: int) -> None:
    (HUGE_PAGES / "nr_hugepages").write_text(str(count))


@pytest.fixture
def huge_pages() -> Iterator[Callable[[int], None]]:
    """huge_pages(n): from here to the end of the test at least n huge pages of 2 MiB are free."""
    former = _huge_pages("nr_hugepages") if HUGE_PAGES.exists() else None

    def reserve(count: int) -> None:
        needs(None if former is not None else "huge pages of 2 MiB (a kernel with CONFIG_HUGETLBFS)")
        lacking = count - (_huge_pages("free_hugepages") - _huge_pages("resv_hugepages"))
        if lacking <= 0:
            return
        needs(None if os.geteuid() == 0 else f"{lacking} huge pages: as root, sysctl vm.nr_hugepages={count}")
        wanted = _huge_pages("nr_hugepages") + lacking
        _set_huge_pages(wanted)
        if _huge_pages("nr_hugepages") < wanted:
            Path("/proc/sys/vm/compact_memory").write_text("1")
            _set_huge_pages(wanted)
        got = _huge_pages("nr_hugepages")
        needs(None if got >= wanted else f"memory for {wanted} huge pages of 2 MiB; the kernel found {got}")

    yield reserve
    if former is not None and _huge_pages("nr_hugepages") != former:
        _set_huge_pages(former)
