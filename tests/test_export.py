"""coordinator.exports, serve.blocks: a coordinator's blocks over NBD: pages are brought for whoever reads them, holes
are holes, and the exporter may die."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import pcshare
from pcshare import admin
from pcshare.errors import NameInUse, UsageError
from pcshare.nbd.wire import Command
from pcshare.protocol import AdminOp
from support import suspended, wait_until
from support_coordinator import Serving, coordinator, die_with_parent
from support_nbd import nbdkit
from support_nbd_server import EIO, HOLE, RawClient
from test_serve import MIB, PCSHARE, TIMEOUT_S, nbd_map, run, sparse_file

SIZE = 6 * MIB + 777
IDLE_THREADS = 3  # of an exporter without clients: main, end of input, sentinel
END_S = 5.0  # less than it takes before the exporter is sent a signal


@pytest.fixture
def big(tmp_path: Path, rng: random.Random) -> Path:
    path = tmp_path / "big.bin"
    path.write_bytes(rng.randbytes(SIZE))
    return path


@contextlib.contextmanager
def exporting(folder: Path, *sources: str, options: tuple[str, ...] = ("--stream=lazy",)) -> Iterator[Serving]:
    with coordinator(*sources, options=[*options, f"--export={folder}/x.sock"]) as serving:
        yield serving


def uri(folder: Path, block: str = "data") -> str:
    return f"nbd+unix:///{block}?socket={folder}/x.sock"


@contextlib.contextmanager
def client_of(folder: Path, block: str = "data") -> Iterator[RawClient]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(f"{folder}/x.sock")
        client = RawClient(connection)
        client.go(block)
        yield client


def exporter_of(serving: Serving) -> psutil.Process:
    """The process behind the sockets."""

    def found() -> list[psutil.Process]:
        return [one for one in psutil.Process(serving.pid).children() if "pcshare.serve.blocks" in one.cmdline()]

    wait_until(lambda: bool(found()), "an exporter")
    return found()[0]


# -- bytes


def test_copies_of_a_lazy_block_have_its_bytes(runtime_dir: Path, big: Path, tmp_path: Path) -> None:
    with exporting(runtime_dir, f"data={big}") as serving:
        run("nbdcopy", "--connections=4", uri(runtime_dir), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == big.read_bytes()
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri(runtime_dir), big).stdout
        assert serving.block("data").demand_pages == -(-SIZE // 4096)


def test_copy_while_the_stream_runs_has_its_bytes(runtime_dir: Path, big: Path, tmp_path: Path) -> None:
    with exporting(runtime_dir, f"data={big}", options=("--stream=20M",)):
        run("nbdcopy", uri(runtime_dir), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == big.read_bytes()


def test_complete_block_is_served_to_several_at_once(runtime_dir: Path, big: Path, tmp_path: Path) -> None:
    with exporting(runtime_dir, f"data={big}", options=()) as serving:
        serving.wait_for_state("END")
        copies = [tmp_path / f"copy{i}" for i in range(4)]
        running = [subprocess.Popen(["nbdcopy", uri(runtime_dir), copy]) for copy in copies]
        assert [one.wait(TIMEOUT_S) for one in running] == [0] * 4
        assert {hashlib.sha256(copy.read_bytes()).digest() for copy in copies} == {
            hashlib.sha256(big.read_bytes()).digest()
        }


def test_reader_of_a_lazy_block_gets_its_pages_demanded_and_no_others(runtime_dir: Path, big: Path) -> None:
    content = big.read_bytes()
    with exporting(runtime_dir, f"data={big}") as serving, client_of(runtime_dir) as client:
        assert serving.block("data").received_pages == 0
        assert client.read(8192, 4096) == content[8192:12288]
        assert client.read(100 * 4096 + 5, 4096) == content[100 * 4096 + 5 : 101 * 4096 + 5]
        assert client.read(SIZE - 3, 3) == content[-3:]
        assert serving.block("data").received_pages == 4


def test_huge_pages_are_exported_too(runtime_dir: Path, big: Path, huge_pages: object, tmp_path: Path) -> None:
    huge_pages(8)  # type: ignore[operator]
    with exporting(runtime_dir, f"data={big}", options=("--stream=lazy", "--page-size=2M")):
        run("nbdcopy", uri(runtime_dir), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == big.read_bytes()


def test_coordinators_chain(runtime_dir: Path, big: Path, tmp_path: Path) -> None:
    """One's export is the other's source; what is touched at the end is demanded at the beginning."""
    (tmp_path / "b").mkdir()
    with (
        exporting(runtime_dir, f"data={big}") as first,
        coordinator(f"data={uri(runtime_dir)}", options=["--stream=lazy", f"--export={tmp_path}/b/x.sock"]),
    ):
        with client_of(tmp_path / "b") as client:
            assert client.read(MIB + 5, 4096) == big.read_bytes()[MIB + 5 : MIB + 4101]
        assert first.block("data").received_pages < first.block("data").page_count
        run("nbdcopy", uri(tmp_path / "b"), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == big.read_bytes()


def test_export_passes_through_nbdkit(runtime_dir: Path, big: Path, tmp_path: Path) -> None:
    with (
        exporting(runtime_dir, f"data={big}"),
        nbdkit(tmp_path, "nbd", f"uri={uri(runtime_dir)}") as between,
    ):
        run("nbdcopy", between.uri(), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == big.read_bytes()


# -- holes


def test_holes_of_the_source_are_holes_and_cost_nothing(runtime_dir: Path, tmp_path: Path, rng: random.Random) -> None:
    some = rng.randbytes(MIB)
    path = sparse_file(tmp_path / "sparse.img", 64 * MIB, [(8 * MIB, some)])
    with exporting(runtime_dir, f"data={path}") as serving:
        assert nbd_map(uri(runtime_dir)) == [
            (0, 8 * MIB, True),
            (8 * MIB, MIB, False),
            (9 * MIB, 55 * MIB, True),
        ]
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri(runtime_dir), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == path.read_bytes()
        with client_of(runtime_dir) as client:
            assert client.read(7 * MIB, 3 * MIB) == bytes(MIB) + some + bytes(MIB)
        assert serving.block("data").received_pages == MIB // 4096


@pytest.mark.parametrize("part", ["a file's holes", "an empty block"])
def test_what_helpers_write_into_holes_is_told_and_read(
    runtime_dir: Path, tmp_path: Path, rng: random.Random, part: str
) -> None:
    """The empty one is complete from its beginning: nobody hears of a write to it."""
    some = rng.randbytes(10000)
    path = sparse_file(tmp_path / "sparse.img", 8 * MIB, [(MIB, some)])
    source = f"data={path}" if part == "a file's holes" else "data=zero:8M"
    with exporting(runtime_dir, source, options=("--stream=lazy", "--writable=data")) as serving:
        expected = bytearray(path.read_bytes() if part == "a file's holes" else bytes(8 * MIB))
        with client_of(runtime_dir) as client:
            assert client.request(Command.BLOCK_STATUS, 5 * MIB, 3 * MIB).extents == ((3 * MIB, HOLE),)
            with pcshare.attach(serving.name, "data", "rw") as block:
                block.ensure(slice(5 * MIB, 5 * MIB + 8192))
                memoryview(block)[5 * MIB : 5 * MIB + 5000] = some[:5000]
            expected[5 * MIB : 5 * MIB + 5000] = some[:5000]
            extents = client.request(Command.BLOCK_STATUS, 5 * MIB, 3 * MIB).extents
            assert extents == ((8192, 0), (3 * MIB - 8192, HOLE))
            assert client.read(0, 8 * MIB) == expected
        run("nbdcopy", uri(runtime_dir), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == expected


# -- several blocks, several addresses


def test_every_block_is_an_export_on_every_address(runtime_dir: Path, big: Path) -> None:
    command = [*PCSHARE, "coordinator", "--json", "--name=several", f"--export={runtime_dir}/x.sock", "--export=:0"]
    with subprocess.Popen(
        [*command, f"data={big}", "other=zero:1M"], stdout=subprocess.PIPE, preexec_fn=die_with_parent, text=True
    ) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        first, *loopback = ready["exports"]
        assert first == f"{runtime_dir}/x.sock"
        for server in (f"nbd+unix:///?socket={first}", *(f"nbd://{address}" for address in loopback)):
            told = json.loads(run("nbdinfo", "--json", "--list", server).stdout)
            assert {one["export-name"]: one["export-size"] for one in told["exports"]} == {"data": SIZE, "other": MIB}
            assert all(one["is_read_only"] and one["can_multi_conn"] for one in told["exports"])
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0
    assert not (runtime_dir / "x.sock").exists()


def test_address_that_is_wrong_or_taken_ends_the_start(runtime_dir: Path, big: Path) -> None:
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(f"{runtime_dir}/taken")
        living.listen()
        for address, code in (("nonsense", UsageError.exit_status), (f"{runtime_dir}/taken", NameInUse.exit_status)):
            command = [*PCSHARE, "coordinator", "--name=wrong", "--export", address, f"data={big}"]
            done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S)
            assert (done.returncode, address.encode() in done.stderr) == (code, True)


# -- failure


def test_exporter_that_is_killed_is_replaced(runtime_dir: Path, big: Path) -> None:
    content = big.read_bytes()
    with exporting(runtime_dir, f"data={big}") as serving:
        for turn in range(3):
            killed = exporter_of(serving)
            with client_of(runtime_dir) as client:
                assert client.read(turn * MIB, 9) == content[turn * MIB : turn * MIB + 9]
                killed.send_signal(signal.SIGKILL)
                assert client.is_hung_up_on()
            with client_of(runtime_dir) as client:  # waits in the sockets' backlog for the next
                assert client.read(turn * MIB, 5000) == content[turn * MIB : turn * MIB + 5000]
            assert exporter_of(serving).pid != killed.pid


def test_exporter_ends_with_a_coordinator_that_is_killed(runtime_dir: Path, big: Path) -> None:
    name = f"killed-{os.getpid()}"
    command = [*PCSHARE, "coordinator", "--json", f"--name={name}", f"--export={runtime_dir}/x.sock", f"data={big}"]
    command.append("--no-keeper")
    with subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=die_with_parent) as process:
        assert process.stdout is not None
        process.stdout.readline()
        serving = Serving(name, pcshare.status.read_status(name).pid, "", process)
        exporter = exporter_of(serving)
        with client_of(runtime_dir) as client:
            assert client.read(0, 9) == big.read_bytes()[:9]
            os.kill(serving.pid, signal.SIGKILL)
            assert client.is_hung_up_on()
        exporter.wait(TIMEOUT_S)
        process.wait(TIMEOUT_S)
    with coordinator(f"data={big}", name=name, options=["--replace", f"--export={runtime_dir}/x.sock"]):
        run("nbdinfo", uri(runtime_dir))


def test_client_that_hangs_up_while_it_waits_disturbs_nobody(runtime_dir: Path, big: Path) -> None:
    content = big.read_bytes()
    with exporting(runtime_dir, f"data={big}#delay=300ms") as serving:
        with client_of(runtime_dir) as client:
            assert client.read(0, 4096) == content[:4096]
        exporter = exporter_of(serving)
        wait_until(lambda: exporter.num_threads() <= IDLE_THREADS, "an end of the first client's threads")
        fds = exporter.num_fds()
        for _ in range(5):
            with client_of(runtime_dir) as client:
                for page in range(100, 180):
                    client.ask(Command.READ, page * 4096, 4096)
        with client_of(runtime_dir) as client:
            assert client.read(MIB, 4096) == content[MIB : MIB + 4096]
        wait_until(lambda: exporter.num_threads() <= IDLE_THREADS, "an end of the threads of those who went")
        wait_until(lambda: exporter.num_fds() == fds, "an end of their connections")


def test_lost_page_is_eio_for_who_reads_it_until_it_is_back(runtime_dir: Path, big: Path, tmp_path: Path) -> None:
    content, failing = big.read_bytes(), tmp_path / "failing"
    source = f"data={big}#error=EIO@{failing}"
    with (
        exporting(runtime_dir, source, options=("--stream=lazy", "--on-source-loss=poison")) as serving,
        client_of(runtime_dir) as client,
    ):
        assert client.read(0, 4096) == content[:4096]
        failing.touch()
        reply = client.request(Command.READ, MIB, 4096)
        assert (reply.error, "lost" in reply.text) == (EIO, True)
        assert client.read(100, 3996) == content[100:4096]
        failing.unlink()
        assert client.read(2 * MIB, 4096) == content[2 * MIB : 2 * MIB + 4096]
        admin.send(serving.socket, AdminOp.RESUME)
        assert client.read(MIB, 4096) == content[MIB : MIB + 4096]


def test_readers_wait_while_a_block_is_paused_and_then_get_its_bytes(
    runtime_dir: Path, big: Path, tmp_path: Path
) -> None:
    content, failing = big.read_bytes(), tmp_path / "failing"
    with exporting(runtime_dir, f"data={big}#error=EIO@{failing}") as serving, client_of(runtime_dir) as client:
        assert client.read(0, 4096) == content[:4096]
        failing.touch()
        waiting = client.ask(Command.READ, 2 * MIB, 4096)
        wait_until(lambda: serving.block("data").state == "PAUSED", "the block to be paused")
        assert client.read(0, 4096) == content[:4096]
        failing.unlink()
        admin.send(serving.socket, AdminOp.RESUME)
        assert client.answer(waiting).data == content[2 * MIB : 2 * MIB + 4096]


def test_readers_wait_while_the_coordinator_is_stopped(runtime_dir: Path, big: Path) -> None:
    content = big.read_bytes()
    with exporting(runtime_dir, f"data={big}") as serving, client_of(runtime_dir) as client:
        assert client.read(0, 4096) == content[:4096]
        with suspended(serving.pid):
            waiting = client.ask(Command.READ, MIB, 4096)
            assert client.read(100, 100) == content[100:200]  # is here: nobody is asked
        assert client.answer(waiting).data == content[MIB : MIB + 4096]


def test_end_waits_for_no_client_that_waits(runtime_dir: Path, big: Path, tmp_path: Path) -> None:
    (tmp_path / "failing").touch()
    with contextlib.ExitStack() as later:
        with exporting(runtime_dir, f"data={big}#error=EIO@{tmp_path}/failing") as serving:
            client = later.enter_context(client_of(runtime_dir))
            client.ask(Command.READ, 2 * MIB, 4096)
            wait_until(lambda: serving.block("data").state == "PAUSED", "the block to be paused")
            started_s = time.monotonic()
        assert time.monotonic() - started_s < END_S
        assert client.is_hung_up_on()


def test_exporter_is_shown_as_what_it_is_and_counts_as_no_helper_at_the_end(runtime_dir: Path, big: Path) -> None:
    address = f"{runtime_dir}/x.sock"
    with pcshare.Coordinator(blocks={"data": str(big)}, stream="lazy", exports=address) as served:
        with client_of(runtime_dir) as client:
            assert len(client.read(0, 9)) == 9
            (helper,) = served.status().helpers
            assert helper.exporter
            with served.attach("data"):
                assert [one.pid for one in served.status().helpers if not one.exporter] == [os.getpid()]
            wait_until(lambda: all(one.exporter for one in served.status().helpers), "the helper to have left")
            assert f"exporter {helper.pid}" in run(*PCSHARE, "status", served.name).stdout
            done = run(*PCSHARE, "stop", served.name, "--json")
        assert json.loads(done.stdout)["helpers"] == []
