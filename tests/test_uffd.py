"""The verbs of userfaultfd, against this kernel: what the answers mean once its oddities are taken out."""

from __future__ import annotations

import errno
import mmap
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core_support import WAIT_S, Memory, child, memory, open_uffd
from pcshare.core import ffi, lib
from support import needs

PAGE = mmap.PAGESIZE
QUIET_S = 0.1  # long enough for a wake that must not come to be seen
DEVICE = "/dev/userfaultfd"
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")


def needs_root() -> None:
    needs(None if os.geteuid() == 0 else "root")


@pytest.fixture
def sixteen() -> Iterator[Memory]:
    with memory(16) as made:
        yield made


def done() -> Any:
    return ffi.new("uint64_t *")


def run_python(code: str, *arguments: str, pass_fds: tuple[int, ...] = ()) -> str:
    """Runs code in a process of its own and returns what it prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        pass_fds=pass_fds, env=env, capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


# Opening and the handshake


def test_probe_names_features_and_a_second_uffd_is_given_exactly_those_wanted() -> None:
    """A1."""
    features, ioctls, user_mode_only = done(), done(), ffi.new("int *")
    assert lib.uffd_probe(-1, features, ioctls, user_mode_only) == 0
    wanted = lib.UFFD_FEATURE_BIT_MISSING_SHMEM | lib.UFFD_FEATURE_BIT_THREAD_ID
    assert features[0] & wanted == wanted
    assert ioctls[0] & (1 << lib.UFFD_IOCTL_REGISTER)
    assert ioctls[0] & (1 << lib.UFFD_IOCTL_UNREGISTER)
    uffd = open_uffd(wanted)
    assert lib.uffd_inspect(uffd, wanted, done()) == 0
    os.close(uffd)


def test_new_uffd_is_non_blocking_and_closed_on_exec() -> None:
    """B4."""
    uffd = open_uffd(0)
    assert not os.get_blocking(uffd)
    assert not os.get_inheritable(uffd)
    os.close(uffd)


def test_handshake_is_made_once() -> None:
    uffd = open_uffd(0)
    assert lib.uffd_api(uffd, 0, ffi.NULL, ffi.NULL) == -errno.EINVAL
    os.close(uffd)


def test_handshake_with_a_feature_that_no_kernel_has_is_refused() -> None:
    uffd = lib.uffd_open(-1, ffi.new("int *"))
    assert lib.uffd_api(uffd, 1 << 62, ffi.NULL, ffi.NULL) == -errno.EINVAL
    os.close(uffd)


def test_registered_page_offers_what_is_needed(sixteen: Memory) -> None:
    """A2."""
    for bit in (lib.UFFD_IOCTL_WAKE, lib.UFFD_IOCTL_COPY, lib.UFFD_IOCTL_ZEROPAGE):
        assert sixteen.ioctls[0] & (1 << bit)


def test_no_fd_left_is_an_error_that_says_so() -> None:
    printed = run_python(
        "import resource\nfrom pcshare.core import ffi, lib\nuser_mode_only = ffi.new('int *')\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\nprint(lib.uffd_open(-1, user_mode_only))"
    )
    assert int(printed) == -errno.EMFILE


OPEN_AS_NOBODY = """
import os, sys
from pcshare.core import ffi, lib
user_mode_only = ffi.new("int *")
os.setgroups([]); os.setgid(65534); os.setuid(65534)
uffd = lib.uffd_open(int(sys.argv[1]), user_mode_only)
print("open" if uffd >= 0 else uffd, user_mode_only[0])
"""


def test_who_may_nothing_gets_a_full_uffd_from_a_device_that_was_handed_over() -> None:
    needs_root()
    needs(None if os.path.exists(DEVICE) else DEVICE)
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    assert run_python(OPEN_AS_NOBODY, str(device), pass_fds=(device,)) == "open 0"
    os.close(device)


def test_who_may_nothing_gets_a_uffd_for_user_mode_and_is_told() -> None:
    needs_root()
    device_is_for_all = os.path.exists(DEVICE) and os.stat(DEVICE).st_mode & 0o006
    is_for_all = SYSCTL.read_text().strip() != "0" or device_is_for_all
    assert run_python(OPEN_AS_NOBODY, "-1") == ("open 0" if is_for_all else "open 1")


# Placing


def test_copy_places_whole_pages(sixteen: Memory) -> None:
    sixteen.place(3, b"a" * PAGE + b"b" * PAGE)
    assert os.pread(sixteen.memfd, 2 * PAGE, 3 * PAGE) == b"a" * PAGE + b"b" * PAGE


def test_copy_of_a_present_page_leaves_it_and_says_so(sixteen: Memory) -> None:
    """E5, P2: "nothing copied" is 0 bytes and -EEXIST."""
    count = done()
    sixteen.place(3, b"a" * PAGE)
    count[0] = 99
    assert lib.uffd_copy(sixteen.uffd, sixteen.page_addr(3), b"b" * PAGE, PAGE, count) == -errno.EEXIST
    assert count[0] == 0
    assert os.pread(sixteen.memfd, PAGE, 3 * PAGE) == b"a" * PAGE


@pytest.mark.parametrize("verb", ["copy", "zeropage"])
def test_partial_work_is_told_apart_from_its_reason(sixteen: Memory, verb: str) -> None:
    """16 pages, page 5 present: EAGAIN with 5 pages done; from there EEXIST with none; beyond it the rest."""

    def place(page: int, n_pages: int) -> int:
        if verb == "copy":
            bytes_ = b"c" * (n_pages * PAGE)
            return int(lib.uffd_copy(sixteen.uffd, sixteen.page_addr(page), bytes_, len(bytes_), count))
        return int(lib.uffd_zeropage(sixteen.uffd, sixteen.page_addr(page), n_pages * PAGE, count))

    count = done()
    sixteen.place(5, b"a" * PAGE)
    assert (place(0, 16), count[0]) == (-errno.EAGAIN, 5 * PAGE)
    assert (place(5, 11), count[0]) == (-errno.EEXIST, 0)
    assert (place(6, 10), count[0]) == (0, 10 * PAGE)
    fill = b"c" if verb == "copy" else b"\0"
    assert os.pread(sixteen.memfd, 16 * PAGE, 0) == fill * (5 * PAGE) + b"a" * PAGE + fill * (10 * PAGE)


def test_copy_where_nothing_is_registered_is_enoent(sixteen: Memory) -> None:
    count = done()
    assert lib.uffd_unregister(sixteen.uffd, sixteen.addr, sixteen.length) == 0
    assert lib.uffd_copy(sixteen.uffd, sixteen.addr, b"a" * PAGE, PAGE, count) == -errno.ENOENT
    assert count[0] == 0


def test_copy_beyond_the_mapping_copies_nothing(sixteen: Memory) -> None:
    count = done()
    last = sixteen.page_addr(15)
    assert lib.uffd_copy(sixteen.uffd, last, b"a" * 2 * PAGE, 2 * PAGE, count) == -errno.ENOENT
    assert count[0] == 0
    assert os.lseek(sixteen.memfd, 0, os.SEEK_HOLE) == 0


def test_copy_into_a_process_that_is_gone_is_esrch(sixteen: Memory) -> None:
    with child(sixteen.memfd, sixteen.length) as helper:
        helper.process.kill()
        helper.process.wait()
        count = done()
        assert lib.uffd_copy(helper.uffd, helper.addr, b"a" * PAGE, PAGE, count) == -errno.ESRCH
        assert count[0] == 0


def test_continue_of_an_absent_page_is_efault(sixteen: Memory) -> None:
    with child(sixteen.memfd, sixteen.length) as helper:
        count = done()
        assert lib.uffd_continue(helper.uffd, helper.addr, PAGE, count) == -errno.EFAULT
        assert count[0] == 0
        sixteen.place(0, b"a" * PAGE)
        assert lib.uffd_continue(helper.uffd, helper.addr, PAGE, count) == 0
        assert count[0] == PAGE


# Messages and waking


def test_read_tells_where_and_who_and_never_waits(sixteen: Memory) -> None:
    """C4: nothing waiting is no error."""
    features = lib.UFFD_FEATURE_BIT_THREAD_ID
    with child(sixteen.memfd, sixteen.length, features=features) as helper:
        messages = ffi.new("struct uffd_message[16]")
        assert lib.uffd_read(helper.uffd, messages, 16) == 0
        helper.tell(f"touch {2 * PAGE + 17}")
        message = helper.message()
        assert message.event == lib.UFFD_MESSAGE_PAGEFAULT
        assert message.fault_addr // PAGE == (helper.addr + 2 * PAGE) // PAGE
        assert (message.tid, message.fork_fd) == (helper.process.pid, -1)
        assert lib.uffd_read(helper.uffd, messages, 16) == 0
        assert lib.uffd_read(helper.uffd, messages, 1000) == 0


def test_copy_wakes_nobody_and_wake_does(sixteen: Memory) -> None:
    with child(sixteen.memfd, sixteen.length) as helper:
        helper.tell("touch 0")
        helper.message()
        assert lib.uffd_copy(helper.uffd, helper.addr, b"a" * PAGE, PAGE, done()) == 0
        assert not helper.has_answered(QUIET_S)
        assert lib.uffd_wake(helper.uffd, helper.addr, PAGE) == 0
        assert helper.answer() == b"a"


def test_page_placed_elsewhere_needs_a_wake_here(sixteen: Memory) -> None:
    """E4: the page is in the memfd for all, the waiting helper must be told."""
    with child(sixteen.memfd, sixteen.length) as helper:
        helper.tell("touch 0")
        helper.message()
        sixteen.place(0, b"a" * PAGE)
        assert not helper.has_answered(QUIET_S)
        assert lib.uffd_wake(helper.uffd, helper.addr, PAGE) == 0
        assert helper.answer() == b"a"


def test_wake_of_everything_brings_a_lost_message_back(sixteen: Memory) -> None:
    """T9."""
    with child(sixteen.memfd, sixteen.length) as helper:
        helper.tell("touch 0")
        helper.message()  # and forgotten
        assert lib.uffd_wake_all(helper.uffd) == 0
        assert helper.message().fault_addr // PAGE == helper.addr // PAGE


def test_helper_that_clears_o_nonblock_cannot_block_the_reader(sixteen: Memory) -> None:
    """T5."""
    with child(sixteen.memfd, sixteen.length) as helper:
        helper.tell("blocking")
        assert helper.answer() == b"done"
        assert os.get_blocking(helper.uffd)
        assert lib.uffd_read(helper.uffd, ffi.new("struct uffd_message[1]"), 1) == 0


# A real old kernel is not at hand: a seccomp filter answers preadv2 as one does.
READ_WITHOUT_NOWAIT = """
import ctypes, fcntl, struct, sys
from pcshare.core import ffi, lib
PREADV2 = {"x86_64": 327, "aarch64": 286}[__import__("os").uname().machine]
uffd = int(sys.argv[1])
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, PREADV2), (0x06, 0, 0, 0x50000 | 95), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(program)), 0, 0) == 0
messages = ffi.new("struct uffd_message[4]")
print(lib.uffd_read(uffd, messages, 4), lib.uffd_read(uffd, messages, 4))
fcntl.fcntl(uffd, fcntl.F_SETFL, 0)
print(lib.uffd_read(uffd, messages, 4))
"""


def test_kernel_without_nowait_is_read_only_while_the_fd_does_not_block(sixteen: Memory) -> None:
    """T5 on older kernels: one message, none, and -EBADFD once O_NONBLOCK is gone."""
    with child(sixteen.memfd, sixteen.length) as helper:
        helper.tell("touch 0")
        assert select.select([helper.uffd], [], [], WAIT_S)[0]
        printed = run_python(READ_WITHOUT_NOWAIT, str(helper.uffd), pass_fds=(helper.uffd,))
        assert printed.split() == ["1", "0", str(-errno.EBADFD)]


def test_removed_range_is_told_with_its_length(sixteen: Memory) -> None:
    """B5, T8: the helper goes on once the message was read."""
    features = lib.UFFD_FEATURE_BIT_EVENT_REMOVE
    with child(sixteen.memfd, sixteen.length, features=features) as helper:
        helper.tell(f"dontneed {2 * PAGE} {3 * PAGE}")
        message = helper.message()
        assert message.event == lib.UFFD_MESSAGE_REMOVE
        assert (message.fault_addr, message.length) == (helper.addr + 2 * PAGE, 3 * PAGE)
        assert helper.answer() == b"done"


def test_unmapped_range_is_told_with_its_length(sixteen: Memory) -> None:
    """T8."""
    with child(sixteen.memfd, sixteen.length, features=lib.UFFD_FEATURE_BIT_EVENT_UNMAP) as helper:
        helper.tell("unmap")
        message = helper.message()
        assert message.event == lib.UFFD_MESSAGE_UNMAP
        assert (message.fault_addr, message.length) == (helper.addr, sixteen.length)
        assert helper.answer() == b"done"


def test_fork_brings_the_new_uffd_to_the_reader(sixteen: Memory) -> None:
    needs_root()
    features = lib.UFFD_FEATURE_BIT_EVENT_FORK
    with child(sixteen.memfd, sixteen.length, features=features) as helper:
        helper.tell("fork")
        message = helper.message()
        assert message.event == lib.UFFD_MESSAGE_FORK
        ours, theirs = done(), done()
        assert lib.uffd_inspect(message.fork_fd, features, ours) == 0
        assert lib.uffd_inspect(helper.uffd, features, theirs) == 0
        assert ours[0] != theirs[0]
        assert helper.answer() == b"done"
        os.close(message.fork_fd)


# Poison


def test_poisoned_page_is_sigbus_in_that_process_only(sixteen: Memory) -> None:
    """T10, P3."""
    with child(sixteen.memfd, sixteen.length) as victim, child(sixteen.memfd, sixteen.length) as other:
        count = done()
        assert lib.uffd_poison(victim.uffd, victim.addr, PAGE, count) == 0
        assert count[0] == PAGE
        victim.tell("touch 0")
        assert victim.process.wait(WAIT_S) == -signal.SIGBUS
        sixteen.place(0, b"a" * PAGE)
        other.tell("touch 0")
        assert other.answer() == b"a"


def test_poison_of_a_mapped_page_is_eexist(sixteen: Memory) -> None:
    """T10."""
    with child(sixteen.memfd, sixteen.length) as helper:
        sixteen.place(0, b"a" * PAGE)
        helper.tell("touch 0")
        assert helper.answer() == b"a"
        assert lib.uffd_poison(helper.uffd, helper.addr, PAGE, done()) == -errno.EEXIST


def test_continue_lifts_the_poison_of_a_page_that_was_placed(sixteen: Memory) -> None:
    """T10."""
    with child(sixteen.memfd, sixteen.length) as helper:
        assert lib.uffd_poison(helper.uffd, helper.addr, PAGE, done()) == 0
        sixteen.place(0, b"a" * PAGE)
        assert lib.uffd_continue(helper.uffd, helper.addr, PAGE, done()) == 0
        helper.tell("touch 0")
        assert helper.answer() == b"a"


# Looking at what a stranger handed over


def test_identity_is_the_same_for_copies_of_one_uffd_only() -> None:
    wanted = lib.UFFD_FEATURE_BIT_THREAD_ID
    one, other = open_uffd(wanted), open_uffd(wanted)
    copy = os.dup(one)
    identities = []
    for uffd in (one, copy, other):
        identity = done()
        assert lib.uffd_inspect(uffd, wanted, identity) == 0
        identities.append(identity[0])
        os.close(uffd)
    needs(None if identities[0] else "a kernel that gives each uffd an inode of its own")
    assert identities[0] == identities[1] != identities[2] != 0


def test_fd_that_is_no_uffd_is_ebadf(tmp_path: Path) -> None:
    """An eventfd, a pipe, a file, a link with a uffd's name, a closed fd."""
    decoy = tmp_path / "anon_inode:[userfaultfd]"
    decoy.touch()
    reading, writing = os.pipe()
    fds = [os.eventfd(0), reading, writing, os.open(decoy, os.O_RDONLY), os.memfd_create("x")]
    for fd in fds:
        assert lib.uffd_inspect(fd, 0, done()) == -errno.EBADF
        os.close(fd)
    assert lib.uffd_inspect(fds[0], 0, done()) == -errno.EBADF


def test_uffd_without_handshake_is_einval() -> None:
    """A1: the handshake is made before it is used."""
    uffd = lib.uffd_open(-1, ffi.new("int *"))
    assert lib.uffd_inspect(uffd, 0, done()) == -errno.EINVAL
    os.close(uffd)


def test_uffd_with_other_features_is_eperm() -> None:
    """T8: one that asks for events nobody reads would hang; one with fewer lacks what is needed."""
    wanted = lib.UFFD_FEATURE_BIT_MISSING_SHMEM | lib.UFFD_FEATURE_BIT_THREAD_ID
    more, fewer = open_uffd(wanted | lib.UFFD_FEATURE_BIT_EVENT_REMOVE), open_uffd(lib.UFFD_FEATURE_BIT_THREAD_ID)
    for uffd in (more, fewer):
        assert lib.uffd_inspect(uffd, wanted, done()) == -errno.EPERM
        os.close(uffd)


INSPECT_UNDUMPABLE = """
import ctypes, os
from pcshare.core import ffi, lib
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
assert ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) == 0
uffd = lib.uffd_open(-1, ffi.new("int *"))
assert lib.uffd_api(uffd, 0, ffi.NULL, ffi.NULL) == 0
print(lib.uffd_inspect(uffd, 0, ffi.new("uint64_t *")))
"""


def test_inspect_works_in_a_process_that_nobody_may_look_into() -> None:
    """T14: with PR_SET_DUMPABLE 0, and without privileges, our own /proc entries are still ours."""
    assert run_python(INSPECT_UNDUMPABLE) == "0"
