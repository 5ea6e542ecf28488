"""Bad input: every refusal has its class, its errno and a message with the cure, and leaves nothing behind (P7)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pcshare
from pcshare import status
from pcshare.coordinator import blocks
from pcshare.errors import HostError, NameInUse, NoSuchCoordinator, PcshareError, SourceError, UsageError
from support import suspend, wait_until
from support_coordinator import coordinator
from support_serving import (
    EAGER,
    HUGE_PAGE,
    LAZY,
    NOBODY,
    PAGE,
    WAIT_S,
    HelperProcess,
    make_file,
    serving,
)

EXIT_FAILED, EXIT_USAGE, EXIT_HOST = 1, 2, 3
LENGTH = 20 * PAGE


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """What is no source, by name."""
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00\x05\x00junk\n")
    return {path.name: path for path in tmp_path.iterdir()}


class Row:
    """Something that is asked for and cannot be: what is raised, and what the command exits with."""

    def __init__(
        self, sources: str, error: type[PcshareError], number: int | None, text: str, exit_code: int, **options: Any
    ) -> None:
        self.sources, self.error, self.number, self.text, self.exit_code = sources, error, number, text, exit_code
        self.options = options

    def arguments(self, places: dict[str, Path]) -> list[str]:
        return self.sources.format(**{name.replace(".", "_"): path for name, path in places.items()}).split()

    def flags(self) -> list[str]:
        """The same on the command line."""
        given = {"page_size": "--page-size={}", "trace": "--trace={}"}
        flags = [given[key].format(value) for key, value in self.options.items() if key in given]
        return flags + [f"--writable={name}" for name in self.options.get("writable", ())]


ROWS = {
    "missing file": Row("data=/no/such/file", SourceError, errno.ENOENT, "/no/such/file", EXIT_FAILED),
    "folder": Row("data={folder}", SourceError, errno.EISDIR, "is a directory.*pack it into one file", EXIT_FAILED),
    "empty file": Row("data={empty}", SourceError, errno.ENODATA, "is empty.*use zero:SIZE", EXIT_FAILED),
    "pipe": Row("data={pipe}", SourceError, errno.EINVAL, "is a pipe, not a regular file", EXIT_FAILED),
    "broken array": Row("data={broken_npy}", SourceError, None, r"broken\.npy: its \.npy header", EXIT_FAILED),
    "second source missing": Row("zero:1M data=/no/such", SourceError, errno.ENOENT, "/no/such", EXIT_FAILED),
    "unknown source": Row("data=gopher://x/y", UsageError, None, "unknown kind of source 'gopher'", EXIT_USAGE),
    "unknown filter": Row("data=zero:1M#speed=9", UsageError, None, "unknown filter 'speed=9'", EXIT_USAGE),
    "no size": Row("data=zero:much", UsageError, None, "for example zero:64M", EXIT_USAGE),
    "size of nothing": Row("data=zero:0", UsageError, None, "between 1 and 70368744177664 bytes", EXIT_USAGE),
    "too large": Row("data=zero:100T", UsageError, None, "between 1 and 70368744177664 bytes", EXIT_USAGE),
    "one name twice": Row("a=zero:1M a=zero:2M", UsageError, None, "both block 'a'", EXIT_USAGE),
    "writable that is not there": Row(
        "data=zero:1M", UsageError, None, "--writable other: no such block; the blocks are data", EXIT_USAGE,
        writable=("other",),
    ),
    "page size of no host": Row(
        "data=zero:1M", HostError, None, "8192 bytes .* this host's 4096.*use one of", EXIT_USAGE, page_size=8192
    ),
    "page size that cannot be": Row(
        "data=zero:1M", UsageError, None, "a power of two, not 5000", EXIT_USAGE, page_size=5000
    ),
    "no huge pages": Row(
        "data=zero:1T", HostError, errno.ENOMEM, "524288 free huge pages.*sudo sysctl vm.nr_hugepages", EXIT_HOST,
        page_size=HUGE_PAGE,
    ),
    "trace nowhere": Row(
        "data=zero:1M", PcshareError, errno.ENOENT, "cannot trace to /no/such/trace", EXIT_FAILED,
        trace="/no/such/trace",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_refusal_has_its_class_errno_and_cure(runtime_dir: Path, places: dict[str, Path], name: str) -> None:
    """A3, P7: when a coordinator is made."""
    row = ROWS[name]
    with (
        pytest.raises(row.error, match=row.text) as caught,
        serving(*row.arguments(places), **row.options),
    ):
        raise AssertionError("it started")
    assert type(caught.value) is row.error
    assert caught.value.errno == row.number


@pytest.mark.parametrize("name", ROWS)
def test_command_says_the_same_and_exits_with_its_code(runtime_dir: Path, places: dict[str, Path], name: str) -> None:
    """0 done, 1 failed, 2 wrong usage, 3 this host cannot."""
    row = ROWS[name]
    done = subprocess.run(
        [sys.executable, "-m", "pcshare", "coordinator", "--name=bad", *row.flags(), "--", *row.arguments(places)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == row.exit_code, done
    assert "Traceback" not in done.stderr
    assert done.stderr
    assert not done.stdout
    with pytest.raises(NoSuchCoordinator):
        status.read_status("bad")


def test_file_without_permission_is_named(runtime_dir: Path, rng: random.Random) -> None:
    runtime_dir.chmod(0o711)
    path = make_file(runtime_dir, rng, LENGTH)
    path.chmod(0o600)
    with HelperProcess("", uid=NOBODY) as nobody:
        nobody.do("from pcshare.sources import open_source, parse_arguments")
        with pytest.raises(SourceError, match=str(path)) as caught:
            nobody.do(f"open_source(parse_arguments(['data={path}'])[0])")
        assert caught.value.errno == errno.EACCES


def test_block_larger_than_memory_is_warned_of_before_anything_is_made(
    runtime_dir: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is no refusal: a lazy stream may bring only what is touched."""
    monkeypatch.setattr(blocks, "memory_at_hand", lambda: LENGTH - 1)
    with serving(f"data={data_file}", stream_mode=LAZY):
        (warning,) = [record.message for record in caplog.records if "of memory" in record.message]
        assert "--stream lazy" in warning


def test_holes_count_for_nothing_when_memory_is_compared(
    runtime_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with serving(f"data={path}", "scratch=zero:1T"):
        assert "of memory" not in caplog.text


def test_memory_at_hand_is_what_the_control_group_leaves_if_that_is_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(blocks, "CGROUP_LIMIT_FILES", (str(tmp_path / "absent"), str(limit)))
    limit.write_text("max\n")
    assert blocks.memory_at_hand() > 1 << 20
    limit.write_text("4096\n")
    assert blocks.memory_at_hand() == 4096


# ---- names ----


def test_name_of_a_living_coordinator_is_refused_and_it_serves_on(runtime_dir: Path, data_file: Path) -> None:
    with serving(f"data={data_file}", stream_mode=LAZY) as served:
        helper = served.helper()
        helper.do("b = attach()")
        for replace in (False, True):
            with (
                pytest.raises(NameInUse, match=f"runs already, pid {os.getpid()}; take another --name") as caught,
                serving(f"data={data_file}", name=served.name, replace=replace),
            ):
                raise AssertionError("it started")
            assert caught.value.errno == errno.EEXIST
        assert helper.do("read(b, 0)") == data_file.read_bytes()[:1]


class Killed:
    """A coordinator that was killed, its helpers, and what it left."""

    def __init__(self, name: str, socket: str) -> None:
        self.name, self.socket = name, socket


@pytest.fixture
def killed(runtime_dir: Path, data_file: Path) -> Iterator[Killed]:
    """Killed with SIGKILL, its keeper too, so that it could clear nothing."""
    name = f"killed-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-m", "pcshare", "coordinator", f"--name={name}", "--json", "--stream=lazy"]
        process = subprocess.Popen([*command, f"data={data_file}"], stdout=subprocess.PIPE)
        stack.callback(process.wait)
        assert process.stdout is not None
        stack.enter_context(process.stdout)
        ready = json.loads(process.stdout.readline())
        socket = status.read_status(name).socket
        suspend(ready["pid"])
        process.kill()
        os.kill(ready["pid"], signal.SIGKILL)
        wait_until(lambda: not status.in_use(name), "the coordinator's death")
        yield Killed(name, socket)
        status.remove_leftovers(name)


def test_what_a_dead_coordinator_left_is_cleared_with_a_warning(
    killed: Killed, data_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """P7: nobody waits for it, so nobody needs to be asked."""
    with serving(f"data={data_file}", name=killed.name):
        assert f"cleared what a dead coordinator left: coordinator '{killed.name}'" in caplog.text
    assert status.leftovers(killed.name) is None


def test_attach_to_a_dead_coordinator_says_so(killed: Killed) -> None:
    with pytest.raises(NoSuchCoordinator):
        pcshare.attach(killed.name, timeout_s=0.1)


def test_name_with_living_helpers_of_a_dead_coordinator_is_only_replaced_on_request(
    runtime_dir: Path, data_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """P5: they wait for it to come back. Without a keeper nobody starts it again."""
    name = f"killed-{os.getpid()}"
    command = [sys.executable, "-m", "pcshare", "coordinator", f"--name={name}", "--json", "--stream=lazy"]
    command.append("--no-keeper")
    with subprocess.Popen([*command, f"data={data_file}"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        with HelperProcess(status.read_status(name).socket) as helper:
            helper.do("b = attach(); read(b, 0)")
            os.kill(ready["pid"], signal.SIGKILL)
            assert process.wait(WAIT_S) == -signal.SIGKILL
            wait_until(lambda: helper.do("b.state") == "orphaned", "the helper to be without a coordinator")
            with (
                pytest.raises(NameInUse, match=r"1 of its helpers still live.*--replace") as caught,
                serving(f"data={data_file}", name=name),
            ):
                raise AssertionError("it started")
            assert caught.value.errno == errno.EEXIST
            assert helper.do("read(b, 0)") == data_file.read_bytes()[:1]
            with serving(f"data={data_file}", name=name, replace=True, stream_mode=EAGER) as served:
                assert "1 of its helpers still live" in caplog.text
                newcomer = served.helper()
                assert newcomer.do("bytes(attach())") == data_file.read_bytes()


# ---- while it runs ----


def test_attach_with_a_wrong_block_or_mode_leaves_the_others_served(runtime_dir: Path, data_file: Path) -> None:
    """P4, P7: nothing is left of a refused attach in that process either."""
    with serving(f"data={data_file}", stream_mode=LAZY) as served:
        helper, wrong = served.helper(), served.helper()
        helper.do("b = attach()")
        fds = wrong.do("len(os.listdir('/proc/self/fd'))")
        for arguments, name in (("'other'", "NoSuchBlock"), ("mode='rw'", "NotWritable")):
            with pytest.raises(PcshareError) as caught:
                wrong.do(f"attach({arguments})")
            assert type(caught.value).__name__ == name
        assert wrong.do("len(os.listdir('/proc/self/fd'))") == fds
        assert helper.do("read(b, 0)") == data_file.read_bytes()[:1]
        assert len(served.status().helpers) == 1


def test_helper_of_another_version_is_told_what_to_do(runtime_dir: Path, data_file: Path) -> None:
    """By both sides: here the coordinator is the newer one."""
    with serving(f"data={data_file}", stream_mode=LAZY) as served:
        helper = served.helper()
        helper.do(
            "from pcshare import protocol, transport\n"
            "with transport.connect(SOCKET, 20.0) as c:\n"
            "    hello = bytearray(protocol.pack_hello())\n"
            "    hello[4] = 2\n"
            "    c.send(hello)\n"
            "    answer = protocol.parse(c.receive(20.0)[0], 0)"
        )
        error, text = helper.do("answer.error, answer.text")
        assert error == errno.EPROTONOSUPPORT
        assert "the peer speaks version 2, this side version 1 (install the same pcshare on both sides)" in text


def test_noise_on_the_socket_is_answered_and_harms_nobody(
    runtime_dir: Path, data_file: Path, rng: random.Random
) -> None:
    """P4, P7: hundreds of messages that are none, also with fds."""
    with coordinator(f"data={data_file}", options=["--stream=lazy"]) as served, HelperProcess(served.socket) as helper:
        helper.do("b = attach(); from pcshare import transport; import random, errno")
        before = served.held()
        said = helper.do(
            f"rng, said = random.Random({rng.randrange(1 << 30)}), set()\n"
            "for number in range(300):\n"
            "    with transport.connect(SOCKET, 20.0) as c:\n"
            "        fds = [0] * rng.randrange(5)\n"
            "        try:\n"
            "            c.send(rng.randbytes(rng.randrange(1, 6000)), fds)\n"
            "            said.add(c.receive(20.0)[0][4:8])\n"
            "        except PermissionError:  # none are taken before one is due, where the kernel can say so\n"
            "            assert fds\n"
            "said"
        )
        assert said == {b"\x01\0\x0a\0"}  # ERROR, every time
        assert helper.do("read(b, 0)") == data_file.read_bytes()[:1]
        wait_until(lambda: served.held().is_within(before), "the connections to be gone")


def test_closing_a_server_that_serves_is_quick(runtime_dir: Path, data_file: Path) -> None:
    """P7: whatever waits."""
    with serving(f"data={data_file}#delay=60s&rate=1", stream_mode=EAGER) as served:
        helper = HelperProcess(served.socket)
        helper.do("b = attach()")
        pending = helper.start("b.ensure()")
        started = time.monotonic()
    assert time.monotonic() - started < 20.0
    with helper, pytest.raises(PcshareError):
        pending.result()


def test_sources_are_opened_all_or_none(runtime_dir: Path, data_file: Path) -> None:
    """P7, G3."""
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SourceError), serving(f"a={data_file}", f"b={data_file}", "c=/no/such"):
        raise AssertionError("it started")
    assert len(os.listdir("/proc/self/fd")) == fds
