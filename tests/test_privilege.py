"""Privilege: who may do what to whom, with how few rights it works, and what is said where it does not (P3, P8)."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import support_seccomp
from pcshare import account, runtime
from pcshare.errors import AccessRefused, NotWritable, UsageError
from pcshare_helpers.expected import expected_touch
from support import has_ended, needs, wait_until
from support_coordinator import EXECUTABLES, Serving, coordinator
from support_serving import NOBODY, PAGE, HelperProcess, make_file
from support_users import DEVICE, UNPRIVILEGED, as_user, needs_root, reachable, run

N_PAGES = 40
LENGTH = N_PAGES * PAGE
OTHER = NOBODY - 1
PCSHARE = (sys.executable, "-m", "pcshare")
EXIT_FAILED, EXIT_USAGE, EXIT_HOST = 1, 2, 3
PR_SET_PDEATHSIG = 1

needs_seccomp = pytest.mark.skipif(not support_seccomp.is_supported(), reason="a filter of ours for this machine")
LAZY = "--stream=lazy"
# A fault inside a system call, which a uffd for user-mode faults only does not serve.
FAULT_INSIDE = "fd = os.memfd_create('copy'); os.write(fd, memoryview(b)[{page} * 4096:][:100])"


@pytest.fixture
def folder(runtime_dir: Path) -> Iterator[Path]:
    """Where others can read; the runtime directory of NOBODY too."""
    needs_root()
    os.chown(runtime_dir, NOBODY, NOBODY)
    runtime_dir.chmod(0o711)
    shared = runtime.SHARED_DIR / str(NOBODY)
    was_there = shared.exists()
    yield runtime_dir
    if shared.exists() and not was_there:
        shared.rmdir()  # nothing may be left in it


@pytest.fixture
def data_file(folder: Path, rng: random.Random) -> Path:
    return make_file(folder, rng, LENGTH)


def needs_narrow_host() -> None:
    """Where an ordinary user gets a userfaultfd for user-mode faults only."""
    needs(None if UNPRIVILEGED.read_text().strip() == "0" else "sysctl vm.unprivileged_userfaultfd=0")
    needs(None if not DEVICE.exists() or DEVICE.stat().st_mode & 0o006 == 0 else f"a {DEVICE} that is root's alone")


def needs_device() -> None:
    needs(None if DEVICE.exists() else str(DEVICE))


def status_of(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}


def processes_of(served: Serving) -> list[int]:
    """Keeper, coordinator and whatever it started."""
    keeper = psutil.Process(served.process.pid)
    return [keeper.pid, *(child.pid for child in keeper.children(recursive=True))]


def touch(served: Serving, path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The C helper within these words; its first three random pages."""
    arguments = [f"--socket={served.socket}", "--pattern=random", "--count=3"]
    done = run(words, EXECUTABLES / "touch", *arguments)
    if done.returncode == 0:
        assert json.loads(done.stdout)["result"] == expected_touch(path, "random", count=3)
    return done


# ---- a coordinator of root, helpers of others ----


def test_user_who_is_allowed_reads_and_cannot_write_a_readonly_block(data_file: Path, content: bytes) -> None:
    """P8: whatever it tries with the fd that it was given."""
    with (
        coordinator(f"data={data_file}", options=[LAZY, f"--allow-uid={NOBODY}"]) as served,
        HelperProcess(served.socket, uid=NOBODY) as helper,
    ):
        helper.do("import mmap; from pathlib import Path; b = attach()")
        assert helper.do(f"read(b, {7 * PAGE}, 100)") == content[7 * PAGE :][:100]
        with pytest.raises(NotWritable) as caught:
            helper.do("attach(mode='rw')")
        assert caught.value.errno == errno.EROFS
        helper.do("fd = hand_over('welcome').fds[0]; again = f'/proc/self/fd/{fd.fileno()}'")
        for attempt in (
            "os.pwrite(fd.fileno(), b'x', 0)",
            "os.pwrite(os.open(again, os.O_RDWR), b'x', 0)",
            "os.ftruncate(fd.fileno(), 1)",
            "mmap.mmap(fd.fileno(), 4096)",
            "mmap.mmap(os.open(again, os.O_RDWR), 4096)",
        ):
            with pytest.raises((PermissionError, OSError)) as refused:
                helper.do(attempt)
            assert refused.value.errno in (errno.EPERM, errno.EACCES, errno.EBADF, errno.EINVAL), attempt
        assert helper.do(f"read(b, {9 * PAGE}, 100)") == content[9 * PAGE :][:100]
        assert touch(served, data_file, *as_user()).returncode == 0


def test_user_who_is_allowed_reads_the_status_and_gives_no_orders(data_file: Path) -> None:
    """P8: with the commands, as that user."""
    with coordinator(f"data={data_file}", options=[LAZY, f"--allow-uid={NOBODY}"]) as served:
        done = run(as_user(), *PCSHARE, "status", "--json", served.name)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["name"] == served.name
        for order in (["stop"], ["stream", "pause"], ["resume"]):
            command = [*PCSHARE, order[0], served.name, *order[1:]]
            done = run(as_user(), *command)
            assert done.returncode == EXIT_FAILED, done
            assert "only the user who started a coordinator may give it orders" in done.stderr
        assert served.status().alive


def test_user_who_is_not_allowed_is_told_the_option_that_lets_him_in(data_file: Path) -> None:
    """P8."""
    with coordinator(f"data={data_file}", options=[LAZY, f"--allow-uid={NOBODY}"]) as served:
        done = touch(served, data_file, *as_user(OTHER))
        assert done.returncode == EXIT_FAILED
        assert f"user {OTHER} (group {OTHER}) may not attach" in done.stderr
        assert f"--allow-uid {OTHER} or --allow-gid {OTHER}" in done.stderr
        assert touch(served, data_file, *as_user(NOBODY)).returncode == 0


# ---- a coordinator without any privilege ----


def test_coordinator_without_privileges_serves_helpers_of_its_user(data_file: Path, content: bytes) -> None:
    """P1, P3: and root's. Faults outside system calls wait for their page; one inside is EFAULT, and ensure() first
    makes it work."""
    needs_narrow_host()
    with (
        coordinator(f"data={data_file}#delay=1ms", options=[LAZY], within=as_user()) as served,
        HelperProcess(served.socket, uid=NOBODY) as helper,
        HelperProcess(served.socket) as root,
    ):
        for pid in processes_of(served):
            told = status_of(pid)
            assert (told["Uid"], told["CapEff"]) == ([str(NOBODY)] * 4, ["0" * 16])
        helper.do("b = attach()")
        assert helper.do(f"read(b, {3 * PAGE}, 100)") == content[3 * PAGE :][:100]
        with pytest.raises(OSError, match="Bad address") as caught:
            helper.do(FAULT_INSIDE.format(page=4))
        assert caught.value.errno == errno.EFAULT
        helper.do(f"b.ensure(slice({4 * PAGE}, {5 * PAGE}));" + FAULT_INSIDE.format(page=4))
        assert helper.do("os.pread(fd, 100, 0)") == content[4 * PAGE :][:100]
        root.do("b = attach();" + FAULT_INSIDE.format(page=5))
        assert root.do("os.pread(fd, 100, 0)") == content[5 * PAGE :][:100]
        assert served.block("data").foreign_pages == 0


def test_doctor_tells_a_user_without_privileges_what_is_limited_and_what_mends_it(folder: Path) -> None:
    needs_narrow_host()
    told = json.loads(run(as_user(), *PCSHARE, "doctor", "--json").stdout)
    assert told["ok"] is True
    assert told["access"] == {"root": "full", "this_user": "user_mode", "other_users": "user_mode"}
    (where,) = [finding for finding in told["findings"] if finding["what"] == "where faults are served"]
    assert "EFAULT" in where["found"]
    assert "sysctl -w vm.unprivileged_userfaultfd=1" in where["mend"]


def test_page_about_other_users_says_what_is_limited() -> None:
    page = (Path(__file__).parent.parent / "docs/how-to/other-users.md").read_text()
    assert "EFAULT" in page
    assert "ensure()" in page


# ---- a host without the device, or without the system call ----


def test_helper_without_the_device_uses_the_one_that_is_offered(data_file: Path, content: bytes) -> None:
    """P3: its faults are served inside system calls too."""
    needs_device()
    reader = (
        "import os, sys, pcshare\nb = pcshare.attach(socket=sys.argv[1])\n"
        f"{FAULT_INSIDE.format(page=2)}\nsys.stdout.buffer.write(os.pread(fd, 100, 0))"
    )
    with coordinator(f"data={data_file}", options=[LAZY, f"--allow-uid={NOBODY}"]) as served:
        command = [*as_user(without_device=True), sys.executable, "-c", reader, served.socket]
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (0, content[2 * PAGE :][:100]), done.stderr


@needs_seccomp
@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS"])
def test_helper_that_a_filter_keeps_from_userfaultfd_is_told_what_blocks_and_what_mends(
    data_file: Path, answer: str
) -> None:
    """P4: nobody else is disturbed."""
    with coordinator(f"data={data_file}", options=[LAZY], within=as_user()) as served:
        before = served.held()
        done = touch(served, data_file, *as_user(), *support_seccomp.under_filter(answer))
        assert done.returncode == EXIT_FAILED
        assert json.loads(done.stdout)["errno"] == getattr(errno, answer)
        for words in ("seccomp filter", "allow userfaultfd", "docker run --device /dev/userfaultfd"):
            assert words in done.stderr
        served.wait_until_alone(before)
        assert touch(served, data_file, *as_user()).returncode == 0


@needs_seccomp
def test_helper_under_a_filter_that_lets_the_device_pass_is_served(data_file: Path) -> None:
    """P3: the offered device does not go through the system call."""
    needs_device()
    with coordinator(f"data={data_file}", options=[LAZY, f"--allow-uid={NOBODY}"]) as served:
        words = [*as_user(without_device=True), *support_seccomp.under_filter("ENOSYS", device_works=True)]
        done = touch(served, data_file, *words)
        assert done.returncode == 0, done.stderr


@needs_seccomp
def test_coordinator_under_a_filter_works_by_the_device(data_file: Path) -> None:
    needs_device()
    words = support_seccomp.under_filter("EPERM", device_works=True)
    with coordinator(f"data={data_file}", options=[LAZY], within=words) as served:
        assert status_of(served.pid)["Seccomp"] == ["2"]
        assert touch(served, data_file, *words).returncode == 0


@needs_seccomp
@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS"])
def test_coordinator_under_a_filter_without_the_device_exits_3_with_the_cure(data_file: Path, answer: str) -> None:
    filtered = support_seccomp.under_filter(answer, device_works=True)
    done = run([*as_user(), *filtered], *PCSHARE, "coordinator", "--name=filtered", f"data={data_file}")
    assert done.returncode == EXIT_HOST, done.stderr
    assert "seccomp" in done.stderr
    assert "docker run --device /dev/userfaultfd" in done.stderr
    assert "Traceback" not in done.stderr


# ---- --user ----


def as_nobody(*options: str) -> list[str]:
    return [LAZY, f"--user={NOBODY}:{NOBODY}", *options]


def test_coordinator_that_becomes_another_user_has_nothing_of_root_left(data_file: Path, folder: Path) -> None:
    """P8: keeper, coordinator, exporter: no ids, no groups, no capability, nothing to look into."""
    options = as_nobody(f"--export={folder}/export.sock")
    with coordinator(f"data={data_file}", options=options, within=reachable()) as served:
        pids = processes_of(served)
        assert len(pids) == 3
        for pid in pids:
            told = status_of(pid)
            assert (told["Uid"], told["Gid"]) == ([str(NOBODY)] * 4, [str(NOBODY)] * 4)
            assert set(told["Groups"]) <= {str(NOBODY)}
            assert {told[name][0] for name in ("CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
        for pid in pids[:2]:
            assert os.stat(f"/proc/{pid}/maps").st_uid == 0, "dumpable: another process of the user could look into it"
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            assert not [line for line in environment if line.startswith(b"XDG_RUNTIME_DIR=")]


def test_coordinator_that_became_a_user_is_that_users(data_file: Path, content: bytes) -> None:
    """P8: he attaches by name and gives orders, as root may; nobody else. He gets the device that root had opened."""
    needs_device()
    with coordinator(f"data={data_file}", options=as_nobody(), within=reachable()) as served:
        assert served.socket == f"/run/pcshare/{NOBODY}/{served.name}.sock"
        for path, mode in ((Path(served.socket), 0o600), (runtime.shm_path(served.name), 0o600)):
            assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (NOBODY, mode)
        with HelperProcess(served.socket, uid=NOBODY) as helper:
            helper.do(f"b = pcshare.attach({served.name!r});" + FAULT_INSIDE.format(page=6))
            assert helper.do("os.pread(fd, 100, 0)") == content[6 * PAGE :][:100]
        by_name = [EXECUTABLES / "touch", f"--name={served.name}"]
        assert run(as_user(NOBODY), *by_name).returncode == run([], *by_name).returncode == 0
        assert run(as_user(OTHER), *PCSHARE, "stop", served.name).returncode == EXIT_FAILED
        for words in (as_user(NOBODY), []):
            done = run(words, *PCSHARE, "stream", served.name, "pause")
            assert done.returncode == 0, done.stderr
    assert not Path(served.socket).exists()
    assert not runtime.shm_path(served.name).exists()


def test_others_whom_it_allows_attach_by_name(data_file: Path) -> None:
    with coordinator(f"data={data_file}", options=as_nobody(f"--allow-uid={OTHER}"), within=reachable()) as served:
        assert run(as_user(OTHER), EXECUTABLES / "touch", f"--name={served.name}").returncode == 0
        with HelperProcess(served.socket, uid=OTHER) as helper:
            helper.do(f"b = pcshare.attach({served.name!r})")
        with HelperProcess(served.socket, uid=OTHER - 1) as refused, pytest.raises(AccessRefused):
            refused.do(f"pcshare.attach({served.name!r})")


@needs_seccomp
def test_device_that_root_opened_serves_where_the_system_call_is_refused(data_file: Path) -> None:
    """As in a container that is given the device: keeper, coordinator and helpers have no other way."""
    needs_device()
    words = [*reachable(), *support_seccomp.under_filter("EPERM", device_works=True)]
    with coordinator(f"data={data_file}", options=as_nobody(), within=words) as served:
        assert status_of(served.pid)["Uid"] == [str(NOBODY)] * 4
        done = touch(served, data_file, *as_user(), *support_seccomp.under_filter("EPERM", device_works=True))
        assert done.returncode == 0, done.stderr
        assert served.status().faults >= 1


def test_sources_are_opened_as_that_user(data_file: Path) -> None:
    data_file.chmod(0o600)
    done = run(reachable(), *PCSHARE, "coordinator", "--name=unreadable", *as_nobody(), f"data={data_file}")
    assert done.returncode == EXIT_FAILED
    assert f"{data_file}" in done.stderr
    assert "Permission denied" in done.stderr


def test_coordinator_that_became_a_user_dies_with_who_asked_for_that(data_file: Path, folder: Path) -> None:
    """P7: the kernel forgets a parent-death signal when ids change."""
    name = f"orphan-{os.getpid()}"
    command = [*reachable(), *PCSHARE, "coordinator", f"--name={name}", "--json", *as_nobody(), f"data={data_file}"]
    starter = (
        "import ctypes, subprocess, sys, time\n"
        f"tie = lambda: ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGTERM)})\n"
        "with subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, preexec_fn=tie) as one:\n"
        "    print(one.stdout.readline().decode(), one.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", starter, *command], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = json.loads(parent.stdout.readline())["pid"]
        keeper = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    wait_until(lambda: has_ended(keeper), "the keeper's end")
    wait_until(lambda: not psutil.pid_exists(pid), "the coordinator's end")
    wait_until(lambda: not runtime.shm_path(name).exists(), "an end in order")


def test_restarted_with_the_same_name_it_finds_the_way_open(data_file: Path) -> None:
    """Its folder is there already, and is still that user's."""
    for _ in range(2):
        with coordinator(f"data={data_file}", name="again", options=as_nobody(), within=reachable()) as served:
            assert run(as_user(), EXECUTABLES / "touch", f"--name={served.name}").returncode == 0
    folder = runtime.SHARED_DIR / str(NOBODY)
    assert (folder.stat().st_uid, folder.stat().st_mode & 0o777, list(folder.iterdir())) == (NOBODY, 0o755, [])


def test_folder_that_somebody_else_owns_is_refused(data_file: Path) -> None:
    """P8: he could answer in the coordinator's place."""
    folder = runtime.SHARED_DIR / str(NOBODY)
    folder.mkdir(parents=True, exist_ok=True)
    os.chown(folder, OTHER, OTHER)
    done = run(reachable(), *PCSHARE, "coordinator", "--name=elsewhere", *as_nobody(), f"data={data_file}")
    shutil.rmtree(folder)
    assert done.returncode == EXIT_HOST
    assert f"{folder} belongs to uid {OTHER}" in done.stderr


REFUSED = {
    "unknown user": ("no-such-user-here", "no user 'no-such-user-here' on this host"),
    "unknown group": ("nobody:no-such-group", "no group 'no-such-group' on this host"),
    "root": ("root", "it is root who is given up"),
    "root by number": ("0:100", "it is root who is given up"),
    "number without a group": ("54321", "say its group too: 54321:GROUP"),
    "no name": (":100", "use USER or USER:GROUP"),
    "no group": ("nobody:", "use USER or USER:GROUP"),
    "too large": (f"{(1 << 32) - 1}:1", "the largest is 4294967294"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_user_that_is_none_is_wrong_usage(runtime_dir: Path, case: str) -> None:
    text, said = REFUSED[case]
    done = run([], *PCSHARE, "coordinator", "--name=nobodys", f"--user={text}", "zero:1M")
    assert done.returncode == EXIT_USAGE
    assert said in " ".join(done.stderr.replace("│", " ").split())


def test_only_root_becomes_another_user(folder: Path) -> None:
    done = run(as_user(), *PCSHARE, "coordinator", "--name=nobodys", "--user=54321:54321", "zero:1M")
    assert done.returncode == EXIT_USAGE
    assert f"--user needs root, and this is uid {NOBODY}" in done.stderr
    assert "use sudo, or leave --user out" in done.stderr


def test_names_and_numbers_of_one_user_are_the_same() -> None:
    named = account.parse_account("nobody")
    assert account.parse_account(str(named.uid)) == named
    assert account.parse_account(f"nobody:{named.gid}") == named
    assert account.parse_account("54321:54322") == account.Account("54321", 54321, 54322, (54322,), "/")
    with pytest.raises(UsageError):
        account.parse_account("54321")


def test_capability_that_is_kept_is_found_out(folder: Path) -> None:
    """P8: securebits can make the kernel keep them."""
    words = [*reachable(), "setpriv", "--securebits=+no_setuid_fixup"]
    done = run(words, *PCSHARE, "coordinator", "--name=keeps", *as_nobody(), "zero:1M")
    assert done.returncode == EXIT_HOST, done
    assert "kept capabilities" in done.stderr


def test_user_who_cannot_reach_the_program_is_told_so(folder: Path) -> None:
    path = Path(account.__file__)
    hidden = f"install -m 600 {path} /mnt/account.py; mount --bind /mnt/account.py {path}"
    done = run(reachable(then=[hidden]), *PCSHARE, "coordinator", "--name=far", *as_nobody(), "zero:1M")
    assert done.returncode == EXIT_HOST, done
    assert f"cannot reach {path}" in done.stderr
    assert "/opt/pcshare" in done.stderr


def where_only_the_device_works() -> list[str]:
    return [*reachable(), *support_seccomp.under_filter("EPERM", device_works=True)]


@needs_seccomp
def test_coordinator_without_a_keeper_above_it_becomes_the_user_too(data_file: Path, content: bytes) -> None:
    """And the keeper that it starts, which gets the device."""
    needs_device()
    options = as_nobody("--no-keeper")
    with (
        coordinator(f"data={data_file}", options=options, within=where_only_the_device_works()) as served,
        HelperProcess(served.socket, uid=NOBODY) as helper,
    ):
        assert [status_of(pid)["Uid"] for pid in processes_of(served)] == [[str(NOBODY)] * 4] * 2
        helper.do("b = attach();" + FAULT_INSIDE.format(page=1))
        assert helper.do("os.pread(fd, 100, 0)") == content[PAGE:][:100]


@needs_seccomp
def test_killed_coordinator_is_started_again_as_that_user_and_has_the_device(data_file: Path, content: bytes) -> None:
    """P5: the device is among what is kept; there is no other way to a userfaultfd here."""
    needs_device()
    with (
        coordinator(f"data={data_file}", options=as_nobody(), within=where_only_the_device_works()) as served,
        HelperProcess(served.socket, uid=NOBODY) as helper,
        HelperProcess(served.socket, uid=NOBODY) as newcomer,
    ):
        helper.do("b = attach();" + FAULT_INSIDE.format(page=1))
        os.kill(served.pid, signal.SIGKILL)
        wait_until(lambda: served.status().alive and served.status().pid != served.pid, "another coordinator")
        assert status_of(served.status().pid)["Uid"] == [str(NOBODY)] * 4
        helper.do(FAULT_INSIDE.format(page=2))
        assert helper.do("os.pread(fd, 100, 0)") == content[2 * PAGE :][:100]
        newcomer.do("b = attach();" + FAULT_INSIDE.format(page=3))
        assert newcomer.do("os.pread(fd, 100, 0)") == content[3 * PAGE :][:100]
        assert served.block("data").foreign_pages == 0


def test_coordinator_that_became_a_user_makes_way_for_one_of_that_user(data_file: Path, content: bytes) -> None:
    """By root's order; the options of the first command line hold, and it has nothing of root either."""
    needs_device()
    with (
        coordinator(f"data={data_file}", options=as_nobody(), within=reachable()) as served,
        HelperProcess(served.socket, uid=NOBODY) as helper,
    ):
        helper.do("b = attach(); read(b, 0)")
        done = run(reachable(), *PCSHARE, "coordinator", f"--name={served.name}", "--replace", "--json")
        assert done.returncode == 0, done.stderr
        now = served.status().pid
        assert now != served.pid
        assert (status_of(now)["Uid"], status_of(now)["CapEff"]) == ([str(NOBODY)] * 4, ["0" * 16])
        helper.do(FAULT_INSIDE.format(page=8))
        assert helper.do("os.pread(fd, 100, 0)") == content[8 * PAGE :][:100]
