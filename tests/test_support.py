"""The rules of conftest.py and the counting of support.py are tried themselves: each must notice what it is for."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from support import SHM, Inventory, own_processes

TESTS = Path(__file__).parent


@pytest.fixture
def before() -> Inventory:
    return Inventory.take()


def test_open_fd_is_noticed(before: Inventory) -> None:
    fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert before.leftovers() == [f"fd {fd} -> /dev/null"]
    finally:
        os.close(fd)
    assert before.leftovers() == []


def test_thread_is_noticed(before: Inventory) -> None:
    quit_now = threading.Event()
    thread = threading.Thread(target=quit_now.wait)
    thread.start()
    try:
        (line,) = before.leftovers()
        assert line.startswith(f"thread {thread.native_id} (")
    finally:
        quit_now.set()
        thread.join()
    assert before.leftovers_after_wait() == []


def test_shared_memory_entry_is_noticed_and_cleared(before: Inventory) -> None:
    entry = SHM / f"pcshare-test-{os.getpid()}"
    entry.touch()
    try:
        assert before.leftovers() == [str(entry)]
        before.clear()
        assert not entry.exists()
    finally:
        entry.unlink(missing_ok=True)


# Its parent ends at once; it says its pid and waits for the end of its standard input.
ORPHAN = """
import os, sys
if os.fork() == 0:
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def orphan() -> Iterator[int]:
    """The pid of a process whose parent has ended."""
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.wait()
        yield pid


def test_orphan_is_noticed_and_ended(before: Inventory, orphan: int) -> None:
    assert orphan not in {child.pid for child in psutil.Process().children(recursive=True)}
    assert orphan in {process.pid for process in own_processes()}
    assert any(line.startswith(f"process {orphan} ") for line in before.leftovers())
    before.clear()
    assert orphan not in {process.pid for process in own_processes()}


RunPytest = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_pytest(tmp_path: Path) -> RunPytest:
    """Runs one test file under this folder's conftest.py, in a process of its own."""
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "support.py").write_text((TESTS / "support.py").read_text())

    def run(source: str, **variables: str) -> subprocess.CompletedProcess[str]:
        test_file = tmp_path / "test_inner.py"
        test_file.write_text(textwrap.dedent(source))
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(test_file)]
        environment = {name: value for name, value in os.environ.items() if name != "PCSHARE_CI"} | variables
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_a_leaking_test_fails_and_the_next_is_not_blamed(run_pytest: RunPytest) -> None:
    done = run_pytest(
        """
        import subprocess

        def test_leaks():
            global child
            child = subprocess.Popen(["sleep", "100"])

        def test_next():
            pass
        """
    )
    assert "2 passed, 1 error" in done.stdout
    assert "sleep 100" in done.stdout
    assert done.returncode == 1


@pytest.mark.parametrize(
    "source",
    [
        "from support import needs\ndef test_it(): needs('a dragon')",
        "import pytest\ndef test_it(): pytest.skip('a dragon')",
        "import pytest\n@pytest.mark.skipif(True, reason='a dragon')\ndef test_it(): pass",
        "import pytest\npytest.skip('a dragon', allow_module_level=True)",
    ],
    ids=["needs", "skip", "skipif", "module"],
)
def test_skip_is_a_failure_in_ci(run_pytest: RunPytest, source: str) -> None:
    assert "1 skipped" in run_pytest(source).stdout
    done = run_pytest(source, PCSHARE_CI="1")
    assert done.returncode not in (0, 5)
    assert "a dragon" in done.stdout


def test_random_numbers_repeat_with_the_seed_that_is_printed(run_pytest: RunPytest) -> None:
    source = "def test_it(rng, seed): print('drawn', seed, rng.random())"
    drawn = [run_pytest(source, PCSHARE_TEST_SEED="7", PYTEST_ADDOPTS="-s").stdout for _ in range(2)]
    assert "PCSHARE_TEST_SEED=7" in drawn[0]
    lines = [[line for line in output.splitlines() if "drawn 7" in line] for output in drawn]
    assert lines[0]
    assert lines[0] == lines[1]


def test_huge_pages_are_put_back(run_pytest: RunPytest, huge_pages: Callable[[int], None]) -> None:
    count = Path("/proc/sys/vm/nr_hugepages")
    huge_pages(1)
    former = count.read_text()
    assert int(former) >= 1
    done = run_pytest(
        """
        from pathlib import Path

        def test_it(huge_pages):
            free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
            wanted = int(free.read_text()) + 1
            huge_pages(wanted)
            assert int(free.read_text()) >= wanted
        """
    )
    assert "1 passed" in done.stdout
    assert count.read_text() == former
