"""Sources that are NBD servers, against servers that others wrote: whatever the way to them, the bytes are right."""

from __future__ import annotations

import contextlib
import errno
import getpass
import hashlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from pcshare.coordinator import Options, Server
from pcshare.errors import PcshareError, SourceError
from pcshare.keeper import Keeper
from pcshare.nbd.wire import Option
from pcshare.protocol import AdminOp
from pcshare.sources import StopFlag, child, link, nbd, open_source, parse_argument
from pcshare.sources.child import Child
from support import needs, wait_until
from support_coordinator import die_with_parent
from support_nbd import (
    Handshake,
    Peer,
    ScriptedServer,
    free_port,
    nbdkit,
    never_answer,
    qemu_img,
    qemu_nbd,
    serve_reads,
)
from support_serving import LAZY, PAGE, WAIT_S, make_file, serving

LENGTH = 300 * PAGE + 904  # the last page is not whole, and the size no multiple of a sector


@pytest.fixture
def folder(runtime_dir: Path) -> Iterator[Path]:
    """Short enough for sockets, which some servers leave behind."""
    with tempfile.TemporaryDirectory(prefix="pcs-", dir="/tmp") as made:
        yield Path(made)


def check_served(source: str, content: bytes) -> None:
    """What helpers read is the content, touched page by page and when all of it is there."""
    with serving(f"data={source}", stream_mode=LAZY) as served:
        helper = served.helper()
        helper.do("b = attach()")
        for offset in (len(content) - 1, len(content) // 2, 0):
            assert helper.do(f"read(b, {offset})") == content[offset : offset + 1]
        helper.do("b.ensure()")
        assert helper.do("bytes(b)") == content
        served.wait_for_state("END")


# -- the ways to a server


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_nbdkit_over_a_socket(folder: Path, data_file: Path, content: bytes, tcp: bool) -> None:
    with nbdkit(folder, "file", data_file, tcp=tcp) as server:
        check_served(server.uri("any"), content)


def test_a_host_is_found_by_its_name(folder: Path, data_file: Path, content: bytes) -> None:
    with nbdkit(folder, "file", data_file, tcp=True) as server:
        check_served(f"nbd://localhost:{server.port}/", content)


def test_exec_of_a_command_that_serves_on_its_stdin(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    check_served(f"exec:nbdkit -s file '{data_file}'", content)


def test_several_blocks_from_several_servers(folder: Path, data_file: Path, content: bytes) -> None:
    with (
        nbdkit(folder, "file", data_file) as server,
        serving(f"a={server.uri()}", f"b=exec:nbdkit -s file {data_file}", f"c={data_file}") as served,
    ):
        for name in "abc":
            served.wait_for_state("END", name)
            helper = served.helper()
            assert helper.do(f"bytes(attach({name!r}))") == content


def test_what_qemu_nbd_says_is_a_hole_is_not_read(folder: Path, rng: random.Random) -> None:
    raw, image = folder / "raw", folder / "image.qcow2"
    with raw.open("wb") as file:
        file.truncate(64 << 20)
        for offset in (3 << 20, 40 << 20):
            file.seek(offset)
            file.write(rng.randbytes(1 << 20))
    qemu_img("convert", "-O", "qcow2", raw, image)
    with qemu_nbd(folder, image, image_format="qcow2") as server, serving(f"data={server.uri()}") as served:
        block = served.wait_for_state("END")
        assert block.hole_pages >= (60 << 20) // PAGE
        assert block.received_pages >= (2 << 20) // PAGE
        helper = served.helper()
        assert helper.do("import hashlib; hashlib.sha256(attach()).digest()") == _sha256(raw)


def _sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


@contextlib.contextmanager
def sshd(folder: Path) -> Iterator[str]:
    """An sshd of the test's own on a loopback port; gives the words that PCSHARE_SSH wants."""
    needs(None if Path("/usr/sbin/sshd").exists() else "sshd (package openssh-server)")
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    port = free_port()
    (folder / "authorized_keys").write_text((folder / "user_key.pub").read_text())
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPidFile none\nStrictModes no\n"
        f"UsePAM no\nPasswordAuthentication no\nMaxStartups 100\n"
    )
    separation = Path("/run/sshd")  # a service makes it, where there is one
    if os.geteuid() == 0:
        separation.mkdir(mode=0o755, exist_ok=True)
    with (folder / "sshd.log").open("wb") as log:
        daemon = subprocess.Popen(
            ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")],
            stdin=subprocess.DEVNULL,
            stderr=log,
            preexec_fn=die_with_parent,
        )
    try:
        wait_until(lambda: daemon.poll() is not None or _listens(port), "sshd to listen", WAIT_S)
        assert daemon.poll() is None, (folder / "sshd.log").read_text()
        known = f"-o IdentitiesOnly=yes -o UserKnownHostsFile={folder}/known_hosts"
        yield f"ssh -F none -i {folder}/user_key {known} -p {port}"
    finally:
        daemon.terminate()
        daemon.wait(WAIT_S)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


@pytest.mark.parametrize("form", ["{user}@127.0.0.1:{path}", "ssh://{user}@127.0.0.1{path}"])
def test_ssh_to_a_host_that_has_pcshare(
    folder: Path, tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    data = make_file(tmp_path, rng, LENGTH, "odd=name;'x y.bin")
    with sshd(folder) as words:
        monkeypatch.setenv("PCSHARE_SSH", words)
        monkeypatch.setenv("PCSHARE_REMOTE", f"{sys.executable} -P -m pcshare")
        path = str(data) if form.startswith("{user}") else str(data).replace(" ", "%20")
        check_served(form.format(user=getpass.getuser(), path=path), data.read_bytes())


@pytest.mark.parametrize(
    ("source", "is_here", "cure"),
    [
        ("foo:b.npy", True, "the file of that name here is written ./foo:b.npy or file:foo%3Ab.npy"),
        ("foo:b.npy", False, "a local file is written ./foo:b.npy"),
        ("a:/x,b:y", False, "an equivalent source after a comma needs a scheme: ssh://HOST/PATH"),
        ("ssh://a/x", False, "see that `ssh a` lets you in"),
    ],
)
def test_ssh_that_fails_is_told_with_what_else_may_have_been_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, is_here: bool, cure: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PCSHARE_SSH", "false")
    if is_here:
        (tmp_path / source).touch()
    with pytest.raises(SourceError, match="exit code 1") as refusal:
        open_source(parse_argument(source))
    assert cure in str(refusal.value.hint)


def test_a_host_that_does_not_let_us_in_is_told_at_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sshd(folder) as words:
        (folder / "authorized_keys").write_text("")
        monkeypatch.setenv("PCSHARE_SSH", words)
        with pytest.raises(SourceError, match=r"hung up.*exit code 255"):
            open_source(parse_argument("127.0.0.1:/x"))


# -- what a server is


def test_npy_is_an_array_whatever_the_export_is_called(folder: Path, tmp_path: Path) -> None:
    array = np.arange(5000, dtype="<i4").reshape(50, 100)
    np.save(tmp_path / "a.npy", array)
    with nbdkit(folder, "file", tmp_path / "a.npy") as server, serving(f"data={server.uri('odd')}") as served:
        helper = served.helper()
        assert helper.do("a = attach().asarray(); (a.shape, str(a.dtype), int(a.sum()))") == (
            (50, 100),
            "int32",
            int(array.sum()),
        )


def test_a_broken_npy_header_is_refused_only_where_the_name_promises_one(folder: Path, tmp_path: Path) -> None:
    broken = b"\x93NUMPY\x09\x09" + bytes(5000)
    (tmp_path / "broken").write_bytes(broken)
    with nbdkit(folder, "file", tmp_path / "broken") as server:
        with pytest.raises(SourceError, match=r"\.npy version 9\.9"):
            open_source(parse_argument(server.uri("a.npy")))
        check_served(server.uri("a"), broken)


def test_a_server_that_does_not_tell_holes_is_all_data(folder: Path, data_file: Path) -> None:
    with (
        nbdkit(folder, "--filter=noextents", "file", data_file) as server,
        open_source(parse_argument(server.uri())) as source,
    ):
        assert source.extents == [(0, LENGTH)]


def test_block_sizes_of_a_server_are_respected(folder: Path, tmp_path: Path, rng: random.Random) -> None:
    data = make_file(tmp_path, rng, 40 * 16384)
    policy = [
        "blocksize-minimum=16384",
        "blocksize-preferred=16384",
        "blocksize-maximum=65536",
        "blocksize-error-policy=error",
    ]
    with nbdkit(folder, "--filter=blocksize-policy", "file", data, *policy) as server:
        check_served(server.uri(), data.read_bytes())


def test_a_server_that_serves_one_at_a_time(folder: Path, data_file: Path, content: bytes) -> None:
    with nbdkit(folder, "--filter=noparallel", "file", data_file, "serialize=connections") as server:
        check_served(server.uri(), content)


def test_filters_stand_before_a_server(folder: Path, data_file: Path, content: bytes, tmp_path: Path) -> None:
    fails = tmp_path / "fails"
    fails.touch()
    with (
        nbdkit(folder, "file", data_file) as server,
        serving(f"data={server.uri()}#delay=1ms&error=EIO@{fails}&timeout=5s", stream_mode=LAZY) as served,
    ):
        helper = served.helper()
        helper.do("b = attach()")
        pending = helper.start("read(b, 0)")
        assert "Input/output error" in served.wait_for_state("PAUSED").reason
        fails.unlink()
        served.order(AdminOp.RESUME)
        assert pending.result() == content[:1]


def test_holes_that_are_not_told_in_time_are_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "BLOCK_STATUS_TIMEOUT_S", 0.2)
    data = bytes(range(256)) * 64

    def silent_about_holes(peer: Peer) -> None:
        Handshake(size=len(data)).run(peer)
        serve_reads(peer, data, lambda _, request: request.command == 7)

    with ScriptedServer(silent_about_holes) as server:
        path, _ = server.listen(folder / "s.sock")
        check_served(f"nbd+unix:///?socket={path}", data)


# -- what goes wrong at the start


@pytest.mark.parametrize(
    ("source", "number", "message"),
    [
        ("nbd+unix:///x?socket={folder}/none", errno.ENOENT, "No such file"),
        ("nbd+unix:///x?socket=" + "x" * 200, errno.EINVAL, "too long"),
        ("nbd://127.0.0.1:{port}/x", errno.ECONNREFUSED, "Connection refused"),
        ("nbd://no.such.host.invalid/x", errno.EHOSTUNREACH, "no.such.host.invalid: "),
        ("nbd://no..such.host/x", errno.EHOSTUNREACH, "no..such.host: no name of a host"),
        ("exec:no-such-program-here", errno.ECONNRESET, "hung up.*exit code 127"),
        ("exec:false", errno.ECONNRESET, "hung up.*exit code 1"),
        ("exec:sh -c 'kill -9 $$'", errno.ECONNRESET, "hung up.*ended by SIGKILL"),
        ("exec:sh -c 'kill -40 $$'", errno.ECONNRESET, "hung up.*ended by signal 40"),
        ("exec:echo hello, who is there", errno.EPROTO, "garbled"),
    ],
)
def test_refusal_says_why(folder: Path, source: str, number: int, message: str) -> None:
    text = source.replace("{folder}", str(folder)).replace("{port}", str(free_port()))
    with pytest.raises(SourceError, match=message) as refusal:
        open_source(parse_argument(text))
    assert refusal.value.errno == number
    assert refusal.value.message.startswith(f"{text}: ")
    if source.startswith("exec:"):
        assert "NBD" in (refusal.value.hint or "")


def test_an_unknown_export_is_told_with_those_there_are(folder: Path) -> None:
    with ScriptedServer(lambda peer: Handshake(names=("a", "b")).run(peer)) as server:
        path, _ = server.listen(folder / "s.sock")
        with pytest.raises(SourceError, match=r"no export 'x' \(there are: 'a', 'b'\)"):
            open_source(parse_argument(f"nbd+unix:///x?socket={path}"))


def test_our_own_server_tells_the_exports_there_are_once(folder: Path, data_file: Path) -> None:
    command = f"exec:{sys.executable} -m pcshare serve --stdio big={data_file} image={data_file}"
    with pytest.raises(SourceError, match=r"no export '' \(there are: 'big', 'image'\)") as refusal:
        open_source(parse_argument(command))
    assert str(refusal.value).count("there are") == 1
    assert "no default export" not in str(refusal.value)


def test_a_socket_at_which_too_many_wait_is_told_with_a_cure(folder: Path) -> None:
    with contextlib.ExitStack() as closing:
        listener = closing.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"{folder}/full.sock")
        listener.listen(0)
        full = False
        while not full:
            waiting = closing.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            full = waiting.connect_ex(f"{folder}/full.sock") == errno.EAGAIN
        with pytest.raises(SourceError, match="the server accepts nobody") as refusal:
            open_source(parse_argument(f"nbd+unix:///?socket={folder}/full.sock"))
    assert refusal.value.errno == errno.EAGAIN
    assert refusal.value.hint


def test_refusal_of_several_names_each(folder: Path) -> None:
    text = f"nbd+unix:///x?socket={folder}/a,exec:false"
    with pytest.raises(SourceError, match=r"socket=\S+/a: No such file.*; exec:false: .*exit code 1"):
        open_source(parse_argument(text))


def test_the_first_equivalent_that_answers_is_taken(folder: Path, data_file: Path, content: bytes) -> None:
    with nbdkit(folder, "file", data_file) as server:
        check_served(f"nbd+unix:///x?socket={folder}/none,{server.uri()}", content)


def test_a_server_that_never_answers_is_refused_in_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "HANDSHAKE_TIMEOUT_S", 0.2)
    with ScriptedServer(Peer.never_answer) as server:
        path, _ = server.listen(folder / "s.sock")
        with pytest.raises(SourceError, match="did not answer in time") as refusal:
            open_source(parse_argument(f"nbd+unix:///?socket={path}"))
    assert refusal.value.errno == errno.ETIMEDOUT


def test_a_failed_source_leaves_the_others_closed(folder: Path, data_file: Path) -> None:
    """P7: what is left is counted after the test."""
    with (
        nbdkit(folder, "file", data_file) as server,
        pytest.raises(SourceError, match="exit code 1"),
        serving(f"a={server.uri()}", "b=exec:false", "c=exec:sleep 100"),
    ):
        pytest.fail("the coordinator started without its sources")


# -- opening


def test_sources_are_opened_side_by_side(folder: Path) -> None:
    """Each server answers only when the other has been asked."""
    both = threading.Barrier(2, timeout=WAIT_S)

    def script(peer: Peer) -> None:
        if peer.number == 0:
            both.wait()
        Handshake(size=PAGE).run(peer)
        serve_reads(peer, bytes(PAGE))

    with ScriptedServer(script) as one, ScriptedServer(script) as other:
        paths = [server.listen(folder / f"{name}.sock")[0] for name, server in (("a", one), ("b", other))]
        with serving(*(f"{name}=nbd+unix:///?socket={path}" for name, path in zip("ab", paths, strict=True))) as served:
            served.wait_for_state("END", "a")


@pytest.mark.parametrize("step", ["hello", Option.GO])
def test_stop_ends_the_opening(folder: Path, step: str | Option) -> None:
    asked = threading.Event()

    def silent(peer: Peer, data: bytes) -> None:
        asked.set()
        never_answer(peer, data)

    with ScriptedServer(lambda peer: Handshake(instead={step: silent}).run(peer)) as server:
        path, _ = server.listen(folder / "s.sock")
        options = Options(name=f"stop-{os.getpid()}", sources=(parse_argument(f"nbd+unix:///?socket={path}"),))
        coordinator = Server(options, Keeper.spawn())

        def stop() -> None:
            assert asked.wait(WAIT_S)
            coordinator.stop()

        stopper = threading.Thread(target=stop)
        stopper.start()
        started_s = time.monotonic()
        with pytest.raises(PcshareError, match="stopped before"):
            coordinator.start()
        stopper.join()
        assert time.monotonic() - started_s < link.HANDSHAKE_TIMEOUT_S


def test_interrupt_at_the_terminal_ends_a_coordinator_that_is_opening(folder: Path) -> None:
    with ScriptedServer(Peer.never_answer) as server:
        path, _ = server.listen(folder / "s.sock")
        command = [sys.executable, "-m", "pcshare", "coordinator", "--name=opening", f"a=nbd+unix:///?socket={path}"]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent
        )
        wait_until(lambda: server.connection_count == 1, "the coordinator to connect", WAIT_S)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=link.HANDSHAKE_TIMEOUT_S)
        assert process.returncode == 1
        assert "stopped before the sources were open" in said


def test_a_source_can_be_stopped_before_it_is_opened() -> None:
    stop = StopFlag()
    stop.set()
    with pytest.raises(SourceError, match="stopped") as refusal:
        open_source(parse_argument("exec:sleep 100"), stop)
    assert refusal.value.errno == errno.ECANCELED


def test_a_source_that_no_block_was_made_of_leaves_nothing(folder: Path, data_file: Path) -> None:
    """P7: what is left is counted after the test."""
    with nbdkit(folder, "file", data_file) as server:
        for text in (server.uri(), f"exec:nbdkit -s file {data_file}"):
            source = open_source(parse_argument(text))
            source.retry_now()
            source.close()
            source.close()
            source.retry_now()
            with pytest.raises(SourceError, match="closed"):
                source.make_channel()


# -- processes


def test_server_and_process_are_let_go_when_the_block_is_complete(runtime_dir: Path, data_file: Path) -> None:
    with serving(f"data=exec:nbdkit -s file '{data_file}'") as served:
        served.wait_for_state("END")
        wait_until(lambda: not _commands("nbdkit"), f"an end of {psutil.Process().children(recursive=True)}", WAIT_S)


def _commands(name: str) -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name() == name:
                found.append(process.pid)
    return found


def test_a_command_is_out_of_reach_of_the_terminal_and_blocks_no_signal() -> None:
    ours, process = Child.spawn(["sleep", "100"])
    try:
        assert os.getsid(process.pid) == process.pid
        wait_until(lambda: "sleep" in Path(f"/proc/{process.pid}/comm").read_text(), "the command to run")
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"SigBlk:\s*0+\n", status)
        assert not int(_field(status, "SigIgn"), 16) & 1 << signal.SIGPIPE - 1
    finally:
        ours.close()
        assert "SIGTERM" in process.end()
    assert process.end() == process.end()


def _field(status: str, name: str) -> str:
    match = re.search(rf"{name}:\s*(\S+)", status)
    assert match
    return match[1]


def test_a_command_that_wants_no_end_is_killed_with_all_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """P7."""
    monkeypatch.setattr(child, "LINGER_S", 0.05)
    monkeypatch.setattr(child, "TERMINATE_S", 0.05)
    ours, process = Child.spawn(["sh", "-c", "trap '' TERM; sleep 1000 & echo ready; while :; do sleep 1000; done"])
    assert ours.recv(6) == b"ready\n"
    ours.close()
    assert "SIGKILL" in process.end()


def test_a_command_dies_with_a_coordinator_that_is_killed() -> None:
    """P7: also one that does not care for the end of its stdin."""
    program = (
        "import os, sys, signal; from pcshare.sources.child import Child\n"
        "ours, child = Child.spawn(['sleep', '1000'])\n"
        "comm = lambda: open(f'/proc/{child.pid}/comm').read().strip()\n"
        "while comm() != 'sleep': pass\n"
        "os.write(1, str(child.pid).encode()); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=WAIT_S, check=False)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    wait_until(lambda: not _lives(pid), "the command to end", WAIT_S)


def _lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False
