"""What is limited, and what runs out: helpers, fds, /dev/shm, the memory of a control group, huge pages.

Each is made to run out for real: who is over a limit is told which, what has no room is paused and goes on by
`pcshare resume`, and nobody else notices.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from pcshare import admin
from pcshare.errors import HostError, LimitReached, PcshareError
from pcshare.protocol import AdminOp
from support import needs, wait_until
from support_coordinator import Serving as Coordinating
from support_coordinator import coordinator
from support_serving import EAGER, LAZY, NOBODY, PAGE, HelperProcess, Serving, make_file, serving

MIB = 1 << 20
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18
SHM_BYTES = 8 * MIB
FAULTS_AGAIN_S = 0.5  # in which a thread that is woken for nothing faults thousands of times
SPARSE_BYTES = 64 << 30  # the bitmap of such a block has memory only where bits are set
FDS_MAX = 96
GROUPS = Path("/sys/fs/cgroup/memory")  # version 1
GROUP_BYTES, GROUP_BYTES_LATER = 96 * MIB, 512 * MIB
GROUP_FILE_BYTES = 192 * MIB

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def sparse(tmp_path: Path) -> str:
    """Holes but for its first two pages, and so large that its bitmap has memory only where it is needed."""
    path = tmp_path / "sparse.bin"
    path.write_bytes(b"x" * 2 * PAGE)
    os.truncate(path, SPARSE_BYTES)
    return f"data={path}"


@pytest.fixture
def data_file(tmp_path: Path, rng: random.Random) -> Path:
    return make_file(tmp_path, rng, 64 * PAGE)


# ---- helpers ----


def attached(served: Serving, uid: int | None = None) -> HelperProcess:
    helper = served.helper(uid=uid)
    helper.do("b = attach()")
    return helper


def test_user_at_its_limit_is_told_which_and_others_attach(runtime_dir: Path, data_file: Path) -> None:
    """P4: with the limit, its value and the option; and it may come again when one has left."""
    with serving(f"data={data_file}", stream_mode=LAZY, helpers_per_uid=2) as served:
        helper = served.helper()
        helper.do("kept = [attach(), attach()]")
        with pytest.raises(LimitReached) as caught:
            helper.do("attach()")
        assert caught.value.errno == errno.EUSERS
        assert "2 helpers of user 0 are attached" in str(caught.value)
        assert "--helpers-per-uid" in str(caught.value)
        helper.do("kept.pop().close()")
        wait_until(lambda: len(served.status().helpers) == 1, "the place to be free")
        helper.do("kept.append(attach())")


def test_other_user_cannot_take_every_place(runtime_dir: Path, data_file: Path) -> None:
    """P4: unless told otherwise a quarter is kept for the coordinator's own user and root."""
    needs(None if os.geteuid() == 0 else "root, to be somebody else")
    with serving(f"data={data_file}", stream_mode=LAZY, helpers_max=8, allow_uids=(NOBODY,)) as served:
        greedy = served.helper(uid=NOBODY)
        greedy.do("kept = [attach() for _ in range(6)]")
        with pytest.raises(LimitReached, match=f"6 helpers of user {NOBODY} are attached"):
            greedy.do("attach()")
        ours = served.helper()
        ours.do("kept = [attach() for _ in range(2)]; kept[0][0]")
        with pytest.raises(LimitReached, match=r"8 helpers are attached.*--helpers-max"):
            ours.do("attach()")


# ---- fds ----


def test_coordinator_without_fds_serves_who_is_there_and_says_so_to_who_comes(
    runtime_dir: Path, data_file: Path
) -> None:
    """P4, P7: EMFILE; some fds are kept for an operator's orders; when some helpers have left others come."""
    content = data_file.read_bytes()
    options = ["--stream=lazy"]
    with (
        coordinator(
            f"data={data_file}", options=options, within=["prlimit", f"--nofile={FDS_MAX}:{FDS_MAX}"]
        ) as served,
        HelperProcess(served.socket) as first,
        HelperProcess(served.socket) as crowd,
    ):
        first.do("b = attach()")
        with pytest.raises(PcshareError) as caught:
            crowd.do(f"kept = []\nfor _ in range({FDS_MAX}): kept.append(attach(timeout_s=20))")
        n_kept = crowd.do("len(kept)")
        assert n_kept > 5
        assert caught.value.errno == errno.EMFILE, caught.value
        assert "the coordinator has no file descriptor left" in str(caught.value)
        admin.send(served.socket, AdminOp.STREAM_PAUSE)
        assert served.status().stream == "paused"
        assert first.do(f"read(b, 0, {9 * PAGE})") == content[: 9 * PAGE]
        assert crowd.do(f"[read(one, {10 * PAGE}, 9) for one in kept]") == [content[10 * PAGE : 10 * PAGE + 9]] * n_kept
        crowd.do("for one in kept: one.close()")
        wait_until(lambda: len(served.status().helpers) == 1, "the crowd to have gone")
        assert crowd.do(f"b = attach(); read(b, {11 * PAGE}, 9)") == content[11 * PAGE : 11 * PAGE + 9]


# ---- /dev/shm ----


@pytest.fixture
def small_shm() -> Iterator[Path]:
    """A /dev/shm of a few MiB, in a mount namespace of this test and what it starts."""
    needs(None if os.geteuid() == 0 else "root, for a mount namespace")
    before = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.unshare(CLONE_NEWNS):
            needs(f"mount namespaces: {os.strerror(ctypes.get_errno())}")
        try:
            _mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
            _mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={SHM_BYTES}".encode())
            yield Path("/dev/shm")
        finally:
            assert _libc.setns(before, CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(before)


def _mount(source: bytes, target: bytes, kind: bytes | None, flags: int, data: bytes | None) -> None:
    assert _libc.mount(source, target, kind, flags, data) == 0, os.strerror(ctypes.get_errno())


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[None]:
    """No room in there."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(PAGE))
    assert os.statvfs(folder).f_bavail == 0
    try:
        yield
    finally:
        filler.unlink()


def test_hole_of_a_sparse_block_with_dev_shm_full_is_a_pause(runtime_dir: Path, small_shm: Path, sparse: str) -> None:
    """P3: not a SIGBUS in the fault thread, where its bit should go, nor in a helper that asks whether it is there; and
    when there is room it goes on."""
    with serving(sparse, stream_mode=LAZY) as served:
        helper = attached(served)
        assert helper.do("read(b, 0)") == b"x"
        with filled(small_shm):
            pending = helper.start(f"read(b, {SPARSE_BYTES // 2})")
            block = served.wait_for_state("PAUSED")
            assert "/dev/shm has no room" in block.reason
            assert f"offset {SPARSE_BYTES // 2}" in block.reason
            assert helper.do(f"read(b, {2 * PAGE})") == b"\0"  # its bit lies where memory is
            assert not helper.do(f"b.is_received(slice({SPARSE_BYTES // 4}, {SPARSE_BYTES // 4 + 1}))")
            helper.do(f"b.ensure(slice({SPARSE_BYTES // 4}, {SPARSE_BYTES // 4 + 1}))")  # a hole: nothing to bring
            served.wait_for_waiting(1)
            assert not pending.is_done()
        served.order(AdminOp.RESUME)
        assert pending.result() == b"\0"
        block = served.wait_for_state("RUNNING")
        assert block.reason == ""


def test_helper_that_comes_with_dev_shm_full_is_refused_and_takes_no_place(
    runtime_dir: Path, small_shm: Path, data_file: Path
) -> None:
    """P4: with the reason and the cure; the same place is free for the next one."""
    with serving(f"data={data_file}", stream_mode=LAZY, helpers_max=200) as served:
        helper = attached(served)
        crowd = served.helper()
        crowd.do("kept = []")
        with filled(small_shm):
            with pytest.raises(PcshareError, match="/dev/shm has no room"):
                crowd.do("for _ in range(150): kept.append(attach(timeout_s=20))")
            for _ in range(60):
                with pytest.raises(PcshareError, match=r"/dev/shm has no room.*remount"):
                    crowd.do("attach(timeout_s=20)")
            assert helper.do("read(b, 0, 9)") == data_file.read_bytes()[:9]
        crowd.do("while len(kept) < 199: kept.append(attach())")
        with pytest.raises(LimitReached):
            crowd.do("attach()")


def test_start_with_dev_shm_full_is_refused(runtime_dir: Path, small_shm: Path, data_file: Path) -> None:
    """P7: and leaves nothing."""
    with (
        filled(small_shm),
        pytest.raises(PcshareError, match="/dev/shm"),
        serving(f"data={data_file}", f"sparse=zero:{SPARSE_BYTES}"),
    ):
        pass
    assert list(small_shm.iterdir()) == []


# ---- the memory of a control group ----


@pytest.fixture(params=[0, 1], ids=["with the kernel's killer", "without"])
def group(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A control group with a small limit for memory."""
    needs(None if os.access(GROUPS, os.W_OK) and (GROUPS / "memory.limit_in_bytes").exists() else "memory groups v1")
    folder = GROUPS / f"pcshare-test-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(GROUP_BYTES))
        (folder / "memory.oom_control").write_text(str(request.param))
        yield folder
    finally:
        folder.rmdir()


def within(group: Path) -> Sequence[str]:
    return ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]


def kills(group: Path) -> int:
    words = (group / "memory.oom_control").read_text().split()
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


def wait_for_pause(served: Coordinating) -> str:
    wait_until(lambda: served.block("data").state == "PAUSED", "the pause", 30.0)
    return served.block("data").reason


@pytest.fixture
def large_file(tmp_path: Path, rng: random.Random) -> Path:
    """More than the group has memory for."""
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        for _ in range(GROUP_FILE_BYTES // MIB):
            file.write(rng.randbytes(MIB))
    return path


def test_thread_that_reads_on_waits_where_no_memory_is_left(runtime_dir: Path, large_file: Path, group: Path) -> None:
    """P3: not woken for what was to be read ahead of it, to fault again at once; and it goes on when there is room."""
    options = ["--stream=lazy"]
    with (
        coordinator(f"data={large_file}", options=options, within=within(group)) as served,
        HelperProcess(served.socket) as helper,
    ):
        helper.do("b = attach()")
        pending = helper.start(f"read(b, 0, {GROUP_FILE_BYTES}) == open({str(large_file)!r}, 'rb').read()")
        assert "no memory is left for the page at offset" in wait_for_pause(served)
        wait_until(lambda: sum(one.waiting for one in served.status().helpers) == 1, "the fault to wait")
        faults = served.status().faults
        time.sleep(FAULTS_AGAIN_S)
        assert served.status().faults == faults
        (group / "memory.limit_in_bytes").write_text(str(GROUP_BYTES_LATER))
        admin.send(served.socket, AdminOp.RESUME)
        assert pending.result()
        assert kills(group) == 0


def test_full_memory_group_is_a_pause_and_kills_nobody(runtime_dir: Path, large_file: Path, group: Path) -> None:
    """P3: coordinator and keeper in a group that is too small for the block; when it has more room it goes on."""
    path = large_file
    with coordinator(f"data={path}", within=within(group)) as served, HelperProcess(served.socket) as helper:
        helper.do("b = attach()")
        assert "no memory is left for the page at offset" in wait_for_pause(served)
        pending = helper.start(f"read(b, 0, {GROUP_FILE_BYTES}) == open({str(path)!r}, 'rb').read()")
        wait_until(lambda: sum(one.waiting for one in served.status().helpers) == 1, "the fault to wait")
        admin.send(served.socket, AdminOp.RESUME)
        wait_for_pause(served)  # again, for there is no more room than before
        (group / "memory.limit_in_bytes").write_text(str(GROUP_BYTES_LATER))
        admin.send(served.socket, AdminOp.RESUME)
        served.wait_for_state("END")
        assert pending.result()
        assert kills(group) == 0


# ---- huge pages ----


def test_block_for_which_huge_pages_are_missing_is_refused(
    runtime_dir: Path, data_file: Path, huge_pages: Callable[[int], None]
) -> None:
    """P7: at the start, with the cure: the kernel sets them aside when the block is made, so that none is missing
    later."""
    huge_pages(1)
    free = int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    with (
        pytest.raises(HostError, match="nr_hugepages"),
        serving(f"data=zero:{(free + 1) * 2 * MIB}", page_size=2 * MIB),
    ):
        pass
    with serving(f"data=zero:{free * 2 * MIB}", page_size=2 * MIB, stream_mode=EAGER) as served:
        helper = attached(served)
        assert helper.do(f"[read(b, page * {2 * MIB}) for page in range({free})]") == [b"\0"] * free
