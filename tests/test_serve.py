"""serve: files over NBD, read by programs that others wrote: their bytes, their holes, and an orderly end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pcshare.nbd.server import Exports
from pcshare.nbd.wire import NBD_MAGIC, ExtentFlag
from pcshare.serve.extents import DATA, EXTENTS_MAX, HOLE, Ranges, merged, with_holes
from pcshare.serve.files import PIECE_BYTES, FileExport
from support import needs
from support_coordinator import die_with_parent
from support_nbd import nbdkit
from support_nbd_server import EIO, RawClient, served

PCSHARE = (sys.executable, "-m", "pcshare")
TIMEOUT_S = 30.0
MIB = 1 << 20


@dataclass
class Ready:
    """A `pcshare serve` that runs."""

    process: subprocess.Popen[bytes]
    told: dict[str, Any]

    def uri(self, name: str) -> str:
        return str(next(one["uris"][0] for one in self.told["exports"] if one["name"] == name))


@contextlib.contextmanager
def serve(*arguments: object, end: signal.Signals = signal.SIGTERM) -> Iterator[Ready]:
    """Ended by a signal, after which its exit status must be 0."""
    process = subprocess.Popen(
        [*PCSHARE, "serve", "--json", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        preexec_fn=die_with_parent,
    )
    assert process.stdout is not None
    with process.stdout:
        try:
            yield Ready(process, json.loads(process.stdout.readline()))
            process.send_signal(end)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
            process.wait()


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """A program of others; it must succeed."""
    needs(None if shutil.which(str(command[0])) else f"{command[0]} (package libnbd-bin or qemu-utils)")
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True, timeout=TIMEOUT_S)


def nbd_map(uri: str) -> list[tuple[int, int, bool]]:
    """(offset, length, whether it is a hole) as nbdinfo tells it."""
    told = json.loads(run("nbdinfo", "--json", "--map", uri).stdout)
    return [(one["offset"], one["length"], one["type"] == int(HOLE)) for one in told]


def sparse_file(path: Path, size: int, data: Sequence[tuple[int, bytes]]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, content in data:
            os.pwrite(file.fileno(), content, offset)
    return path


@pytest.fixture
def big(tmp_path: Path, rng: random.Random) -> Path:
    path = tmp_path / "big.bin"
    path.write_bytes(rng.randbytes(9 * MIB + 123))
    return path


@pytest.fixture
def sparse(tmp_path: Path, rng: random.Random) -> Path:
    return sparse_file(tmp_path / "sparse.img", 64 * MIB, [(MIB, rng.randbytes(MIB)), (40 * MIB, rng.randbytes(8192))])


# -- what others read


def test_nbdcopy_gets_equal_bytes(runtime_dir: Path, big: Path, tmp_path: Path) -> None:
    with serve(big, "--socket", runtime_dir / "a.sock") as ready:
        for options in (["--connections=4"], ["--synchronous"], ["--request-size=33554432"], ["--requests=64"]):
            run("nbdcopy", *options, ready.uri("big"), tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == big.read_bytes()


def test_qemu_img_gets_equal_bytes_and_holes(runtime_dir: Path, sparse: Path, tmp_path: Path) -> None:
    with serve(sparse, "--socket", runtime_dir / "a.sock") as ready:
        uri = ready.uri("sparse")
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, sparse).stdout
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, tmp_path / "copy.qcow2")
        assert "identical" in run("qemu-img", "compare", tmp_path / "copy.qcow2", sparse).stdout
        told = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri).stdout)
        assert [(one["start"], one["length"]) for one in told if one["data"]] == [(MIB, MIB), (40 * MIB, 8192)]


def test_holes_of_a_file_are_holes(runtime_dir: Path, sparse: Path) -> None:
    with serve(sparse, "--socket", runtime_dir / "a.sock") as ready:
        assert nbd_map(ready.uri("sparse")) == [
            (0, MIB, True),
            (MIB, MIB, False),
            (2 * MIB, 38 * MIB, True),
            (40 * MIB, 8192, False),
            (40 * MIB + 8192, 24 * MIB - 8192, True),
        ]


def test_nbdinfo_reads_every_property(runtime_dir: Path, big: Path, sparse: Path) -> None:
    with serve(big, f"other={sparse}", "--socket", runtime_dir / "a.sock") as ready:
        told = json.loads(run("nbdinfo", "--json", "--list", f"nbd+unix:///?socket={runtime_dir}/a.sock").stdout)
        exports = {one["export-name"]: one for one in told["exports"]}
        assert {name: one["export-size"] for name, one in exports.items()} == {
            "big": big.stat().st_size,
            "other": 64 * MIB,
        }
        assert all(one["is_read_only"] and one["can_multi_conn"] and one["can_df"] for one in exports.values())
        assert all("base:allocation" in str(one["contexts"]) for one in exports.values())
        assert exports["big"]["description"] == "big.bin"
        assert {one["name"]: one["size"] for one in ready.told["exports"]} == {
            "big": big.stat().st_size,
            "other": 64 * MIB,
        }


def test_several_clients_copy_at_once_over_tcp(big: Path, sparse: Path, tmp_path: Path) -> None:
    needs(None if shutil.which("nbdcopy") else "nbdcopy (package libnbd-bin)")
    with serve(big, sparse, "--listen", "127.0.0.1:0") as ready:
        copies = [(ready.uri(path.stem), path, tmp_path / f"copy{i}") for i, path in enumerate([big, sparse] * 3)]
        running = [subprocess.Popen(["nbdcopy", uri, copy]) for uri, _, copy in copies]
        assert [one.wait(TIMEOUT_S) for one in running] == [0] * len(running)
        assert all(copy.read_bytes() == path.read_bytes() for _, path, copy in copies)


def test_nbdkit_passes_it_on(runtime_dir: Path, sparse: Path, tmp_path: Path) -> None:
    """Its nbd plugin is a client with many requests in flight, and a picky one."""
    with (
        serve(sparse, "--socket", runtime_dir / "a.sock") as ready,
        nbdkit(tmp_path, "nbd", f"uri={ready.uri('sparse')}") as between,
    ):
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", between.uri(), sparse).stdout
        assert [one for one in nbd_map(between.uri()) if not one[2]] == [
            (MIB, MIB, False),
            (40 * MIB, 8192, False),
        ]


@contextlib.contextmanager
def stdio(path: Path) -> Iterator[tuple[subprocess.Popen[bytes], RawClient]]:
    """`pcshare serve --stdio` at one end of a socket pair, as exec: starts it, and a client at the other."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [*PCSHARE, "serve", "--stdio", str(path)]
        process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(), preexec_fn=die_with_parent)
    client = RawClient(ours)
    try:
        yield process, client
        assert process.wait(TIMEOUT_S) == 0
    finally:
        client.close()
        process.kill()
        process.wait()


def test_stdio_serves_one_client_and_ends_with_it(big: Path) -> None:
    with stdio(big) as (_, client):
        client.go()
        assert client.read(0, big.stat().st_size) == big.read_bytes()
        client.close()


def test_stdio_over_pipes_ends_with_its_client(big: Path) -> None:
    """As ssh may connect it."""
    with subprocess.Popen(
        [*PCSHARE, "serve", "--stdio", str(big)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        ours, theirs = socket.socketpair()
        assert process.stdin is not None
        assert process.stdout is not None
        pump = subprocess.Popen(["cat"], stdin=ours.fileno(), stdout=process.stdin)
        back = subprocess.Popen(["cat"], stdin=process.stdout, stdout=ours.fileno())
        process.stdin.close()
        ours.close()
        client = RawClient(theirs)
        client.go()
        assert client.read(MIB - 7, 3 * MIB) == big.read_bytes()[MIB - 7 : 4 * MIB - 7]
        theirs.shutdown(socket.SHUT_WR)
        assert process.wait(TIMEOUT_S) == 0
        client.close()
        assert (pump.wait(TIMEOUT_S), back.wait(TIMEOUT_S)) == (0, 0)


def test_stdio_of_which_only_the_input_is_a_socket_is_answered_at_the_output(big: Path) -> None:
    ours, theirs = socket.socketpair()
    with subprocess.Popen(
        [*PCSHARE, "serve", "--stdio", str(big)], stdin=theirs.fileno(), stdout=subprocess.PIPE
    ) as process:
        theirs.close()
        assert process.stdout is not None
        with ours:
            assert process.stdout.read(8) == NBD_MAGIC.to_bytes(8, "big")
        assert process.wait(TIMEOUT_S) == 0


# -- its life


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_it_cleanly_also_with_clients(runtime_dir: Path, big: Path, end: signal.Signals) -> None:
    with serve(big, "--socket", runtime_dir / "a.sock", end=end), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(runtime_dir / "a.sock"))
        client = RawClient(connection)
        client.go()
        assert client.read(0, 5) == big.read_bytes()[:5]
    assert not (runtime_dir / "a.sock").exists()


def test_signal_ends_stdio_cleanly(big: Path) -> None:
    with stdio(big) as (process, client):
        client.go()
        process.terminate()


def test_killed_one_is_started_again_at_its_socket(runtime_dir: Path, big: Path) -> None:
    with serve(big, "--socket", runtime_dir / "a.sock") as killed, serve_after(killed, big, runtime_dir) as ready:
        run("nbdinfo", ready.uri("big"))


@contextlib.contextmanager
def serve_after(killed: Ready, path: Path, folder: Path) -> Iterator[Ready]:
    killed.process.kill()
    killed.process.wait()
    with serve(path, "--socket", folder / "a.sock") as ready:
        killed.process.returncode = 0  # it has been waited for: nothing more is expected of it
        yield ready


def refused(*arguments: object) -> tuple[int, str]:
    """Exit status and the error it told."""
    done = subprocess.run([*PCSHARE, "serve", "--json", *map(str, arguments)], capture_output=True, timeout=TIMEOUT_S)
    return done.returncode, str(json.loads(done.stdout.splitlines()[-1])["error"])


def test_what_makes_no_sense_is_refused(runtime_dir: Path, big: Path) -> None:
    sock = runtime_dir / "a.sock"
    assert refused(big)[0] == 2
    assert refused(big, "--socket", sock, "--listen", ":0")[0] == 2
    assert refused(big, "--stdio")[0] == 2
    assert refused(big, "--listen", "nonsense")[0] == 2
    assert refused(big, big, "--socket", sock) == (2, "two files are to be called 'big'")
    assert refused(f"{big}.no", "--socket", sock)[0] == 1
    assert refused(runtime_dir, "--socket", sock)[0] == 1
    assert not sock.exists()


def test_socket_of_another_one_that_runs_is_refused(runtime_dir: Path, big: Path) -> None:
    with serve(big, "--socket", runtime_dir / "a.sock") as ready:
        assert refused(big, "--socket", runtime_dir / "a.sock")[0] == 1
        run("nbdinfo", ready.uri("big"))


# -- a file's export


def test_file_that_becomes_shorter_answers_eio_for_what_is_gone(tmp_path: Path, rng: random.Random) -> None:
    content = rng.randbytes(4 * PIECE_BYTES)
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with served(FileExport("a", str(path))) as here:
        client = here.client()
        client.go()
        os.truncate(path, PIECE_BYTES + 10)
        reply = client.request(0, 0, len(content))
        assert (reply.error, reply.data) == (EIO, content[:PIECE_BYTES])
        assert "shorter" in reply.text
        assert client.read(PIECE_BYTES, 10) == content[PIECE_BYTES : PIECE_BYTES + 10]


def test_file_that_is_replaced_is_served_as_it_was(tmp_path: Path) -> None:
    path, other = tmp_path / "a.bin", tmp_path / "b.bin"
    path.write_bytes(b"old")
    other.write_bytes(b"new!")
    with served(FileExport("a", str(path))) as here:
        other.replace(path)
        client = here.client()
        client.go()
        assert client.read(0, 3) == b"old"


def test_empty_file_is_an_export_of_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with served(FileExport("a", str(tmp_path / "a"))) as here:
        client = here.client()
        client.go()
        assert client.request(0, 0, 1).error == 22


def test_name_of_an_export_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    export = FileExport("a" * 4097, str(tmp_path / "a"))
    with contextlib.closing(export), pytest.raises(ValueError, match="at most 4096"):
        Exports([export])


# -- extents


def flatten(extents: list[tuple[int, ExtentFlag]], offset: int) -> list[tuple[int, int]]:
    """The data ranges that extents mean."""
    data = []
    for length, flags in extents:
        if flags == DATA:
            data.append((offset, offset + length))
        offset += length
    return data


def test_extents_mean_what_a_bytewise_look_finds(rng: random.Random) -> None:
    for _ in range(200):
        marks = [rng.random() < 0.4 for _ in range(60)]
        ranges = [(i, i + 1) for i in range(60) if marks[i]]
        offset = rng.randrange(60)
        length = rng.randint(1, 60 - offset)
        some, others = ranges[::2], ranges[1::2]
        found = with_holes(
            merged(Ranges(some).within(offset, length), Ranges(others).within(offset, length)), offset, length
        )
        assert sum(one for one, _ in found) == length
        inside = {i for start, end in flatten(found, offset) for i in range(start, end)}
        assert inside == {i for i in range(offset, offset + length) if marks[i]}
        assert all(a[1] != b[1] for a, b in itertools.pairwise(found))


def test_ranges_are_widened_to_pages_and_merged() -> None:
    ranges = Ranges([(5, 6), (4095, 4097), (9000, 9001), (20000, 20001)], 4096)
    assert list(ranges.within(0, 1 << 20)) == [(0, 12288), (16384, 20480)]
    assert list(ranges.within(8192, 8192)) == [(8192, 12288)]
    assert list(ranges.within(12288, 4096)) == []


def test_very_many_extents_are_told_in_part() -> None:
    data = ((i, i + 1) for i in range(0, 1 << 40, 2))
    told = with_holes(data, 0, 1 << 40)
    assert EXTENTS_MAX <= len(told) <= EXTENTS_MAX + 2
    assert sum(length for length, _ in told) < 1 << 40
