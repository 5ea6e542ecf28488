"""Objects of stores as sources: equal bytes, many reads at once, one state of the object only, words for failures.

The stores are real servers on loopback: S3 from a package, and a web server that does what a test tells it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pty
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pcshare.errors import EXIT_DONE, EXIT_FAILED, EXIT_HOST, EXIT_USAGE, SourceError
from pcshare.serve.object_filesystem import _Looks
from support import wait_until
from support_coordinator import coordinator, run_helper
from support_objects import (
    BUCKET,
    LOOPBACK,
    PROVIDER,
    Gathering,
    Provider,
    S3Server,
    WebObject,
    WebRequest,
    WebServer,
    clean_environment,
    copy_by_libnbd,
    dead_port,
    mute_port,
    s3_server,
)
from support_serving import LAZY, serving

MIB = 1 << 20
ODD = 3 * MIB + 12345  # not a whole number of pages
MODIFIED = "Sat, 01 Jan 2000 00:00:00 GMT"
LATER = "Sat, 01 Jan 2000 00:00:01 GMT"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def check_equal(provider: Provider, content: bytes, rng: random.Random) -> None:
    assert provider.session.export.size == len(content)
    assert provider.session.export.read_only
    ranges = [(0, len(content)), (len(content) - 1, 1), (0, 1)]
    for _ in range(20):
        offset = rng.randrange(len(content))
        ranges.append((offset, rng.randint(1, min(MIB, len(content) - offset))))
    for offset, length in ranges:
        assert provider.read(offset, length) == content[offset : offset + length], (offset, length)


# -- equal bytes


def test_s3_object_is_served_byte_for_byte(s3: S3Server, rng: random.Random) -> None:
    content = rng.randbytes(ODD)
    with Provider(s3.put("odd.bin", content), env=s3.environment) as provider:
        check_equal(provider, content, rng)
    assert provider.finish() == (EXIT_DONE, "")


@pytest.mark.parametrize("key", ["a b/\u00fc#%.bin", "a%20b", "q?x=1&y", "deep/er/a+b~(1).bin"])
def test_s3_key_is_taken_literally(s3: S3Server, key: str) -> None:
    with Provider(s3.put(key, key.encode()), env=s3.environment) as provider:
        assert provider.read(0, len(key.encode())) == key.encode()


def test_web_object_is_served_byte_for_byte(rng: random.Random) -> None:
    content = rng.randbytes(ODD)
    with WebServer(WebObject(content)) as server, Provider(f"http://{server.place}/x.bin") as provider:
        check_equal(provider, content, rng)


def test_libnbd_gets_the_same_bytes(s3: S3Server, tmp_path: Path, rng: random.Random) -> None:
    content = rng.randbytes(ODD)
    copy_by_libnbd(tmp_path / "copy", s3.put("copied.bin", content), env=s3.environment)
    assert (tmp_path / "copy").read_bytes() == content


def test_redirect_is_followed() -> None:
    with WebServer(WebObject(b"behind a redirect")) as server, Provider(f"http://{server.place}/moved") as provider:
        assert provider.read(0, 6) == b"behind"


def test_query_and_encoding_of_a_web_address_arrive_as_written() -> None:
    path = "/a%20b/%C3%BC+c?signature=a%2Fb&expires=9"
    with WebServer(WebObject(b"signed")) as server, Provider(f"http://{server.place}{path}") as provider:
        assert provider.read(0, 6) == b"signed"
    assert {request.path for request in server.served.seen} == {path}


def test_user_and_password_of_a_web_address_are_sent_and_never_shown() -> None:
    served = WebObject(b"private", fail=lambda request: 0 if "Authorization" in request.headers else 401)
    with WebServer(served) as server, Provider(f"http://user:p%40ss@{server.place}/x") as provider:
        assert provider.read(0, 7) == b"private"
        assert "ss" not in provider.session.export.description
    assert served.seen[0].headers["Authorization"] == "Basic dXNlcjpwQHNz"  # user:p@ss


# -- many at once


def test_reads_are_asked_for_at_the_same_time(tmp_path: Path, rng: random.Random) -> None:
    content = rng.randbytes(8 * MIB)
    with WebServer(WebObject(content, fail=Gathering(8))) as server:
        copy_by_libnbd(tmp_path / "copy", f"http://{server.place}/x", "--connections=1", "--request-size=262144")
    assert (tmp_path / "copy").read_bytes() == content


def test_pieces_of_a_long_read_are_asked_for_at_the_same_time(rng: random.Random) -> None:
    content = rng.randbytes(16 * MIB)
    served = WebObject(content, fail=Gathering(4))
    with WebServer(served) as server, Provider(f"http://{server.place}/x") as provider:
        assert provider.read(0, len(content)) == content


# -- the object must not change (P1)


def test_overwritten_s3_object_is_an_error(s3: S3Server) -> None:
    url = s3.put("changing", b"a" * 8192)
    with Provider(url, env=s3.environment) as provider:
        assert provider.read(0, 4096) == b"a" * 4096
        s3.put("changing", b"b" * 8192)
        assert "the object changed" in provider.refusal_of_read(4096, 4096)


def test_deleted_s3_object_is_an_error(s3: S3Server) -> None:
    url = s3.put("going", b"a" * 8192)
    with Provider(url, env=s3.environment) as provider:
        assert provider.read(0, 4096) == b"a" * 4096
        s3.delete("going")
        assert "the object changed" in provider.refusal_of_read(4096, 4096)


def test_s3_object_put_again_unchanged_is_the_same(s3: S3Server) -> None:
    url = s3.put("again", b"a" * 8192)
    with Provider(url, env=s3.environment) as provider:
        s3.put("again", b"a" * 8192)
        assert provider.read(0, 8192) == b"a" * 8192


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {}),
        ({"heeds_if_match": False}, {}),
        ({"e_tag": 'W/"1"'}, {"e_tag": 'W/"2"'}),
        ({"e_tag": "", "modified": MODIFIED}, {"modified": LATER}),
        ({"e_tag": ""}, {"content": b"b" * 8193}),
        ({}, {"e_tag": ""}),
    ],
    ids=["if-match", "other ETag", "weak ETag", "time", "size", "no ETag any more"],
)
def test_changed_web_object_is_an_error(before: dict[str, object], after: dict[str, object]) -> None:
    served = replace(WebObject(b"a" * 8192), **before)  # type: ignore[arg-type]
    with WebServer(served) as server, Provider(f"http://{server.place}/x") as provider:
        assert provider.read(0, 4096) == b"a" * 4096
        server.served = replace(served, **{"content": b"b" * 8192, **after})  # type: ignore[arg-type]
        assert "the object changed" in provider.refusal_of_read(4096, 4096)


def test_weak_etag_is_never_sent_as_a_condition() -> None:
    served = WebObject(b"a" * 8192, e_tag='W/"1"')
    with WebServer(served) as server, Provider(f"http://{server.place}/x") as provider:
        assert provider.read(0, 4096) == b"a" * 4096
    assert not any("If-Match" in request.headers for request in served.seen)


def test_description_names_the_state_of_the_object(s3: S3Server) -> None:
    def description() -> str:
        with Provider(url, env=s3.environment) as provider:
            return provider.session.export.description

    url = s3.put("described", b"a" * 8192)
    first = description()
    assert first == f'{url} (8192 bytes, ETag "{hashlib.md5(b"a" * 8192).hexdigest()}")'
    assert description() == first
    s3.put("described", b"b" * 8192)
    assert description() != first


# -- a store that is away (P6)


def test_read_is_tried_again(rng: random.Random) -> None:
    content = rng.randbytes(8192)
    failures = iter([0, 503, 500, 0])  # the first look, a read and its two repetitions
    served = WebObject(content, fail=lambda request: next(failures))
    with WebServer(served) as server, Provider(f"http://{server.place}/x") as provider:
        assert provider.read(0, 8192) == content
    assert next(failures, None) is None


@pytest.mark.parametrize("status", [503, 429])
def test_outage_ends_the_connection_and_not_the_read(status: int) -> None:
    served = WebObject(b"a" * 8192)
    with WebServer(served) as server, Provider(f"http://{server.place}/x", "5") as provider:
        assert provider.read(0, 4096) == b"a" * 4096
        served.fail = lambda request: status
        with pytest.raises(SourceError, match="hung up") as caught:
            provider.read(4096, 4096)
        assert caught.value.errno != errno.EIO
        code, said = provider.finish()
    assert code == EXIT_FAILED
    assert said.startswith(f"pcshare: http://{server.place}/x: the server answered {status} ")


def test_refused_read_is_final() -> None:
    served = WebObject(b"a" * 8192)
    with WebServer(served) as server, Provider(f"http://{server.place}/x") as provider:
        assert provider.read(0, 4096) == b"a" * 4096
        served.fail = lambda request: 403
        assert "access refused" in provider.refusal_of_read(4096, 4096)
        served.fail = lambda request: 0
        assert provider.read(4096, 4096) == b"a" * 4096


def test_read_has_a_time_limit() -> None:
    gate = threading.Event()

    def stall(request: WebRequest) -> int:
        if not request.is_first_look:
            gate.wait(60)
        return 0

    with WebServer(WebObject(b"a" * 8192, fail=stall)) as server:
        with Provider(f"http://{server.place}/x", "2") as provider:
            assert provider.session.export.size == 8192
            started_s = time.monotonic()
            with pytest.raises(SourceError, match="hung up"):
                provider.read(0, 4096)
            assert time.monotonic() - started_s < 20
            assert provider.finish()[0] == EXIT_FAILED
        gate.set()


# -- what is said at the start


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"s3://{BUCKET}/nothing", "no such object"),
        ("s3://no-such-bucket/x", "no such bucket: no-such-bucket"),
        (f"s3://{BUCKET}/", "names a bucket and no object in it"),
        (f"s3://{BUCKET}", "names a bucket and no object in it"),
    ],
)
def test_wrong_s3_name_is_refused(s3: S3Server, url: str, said: str) -> None:
    with Provider(url, env=s3.environment) as provider:
        code, line = provider.refusal()
    assert code == EXIT_FAILED
    assert line.startswith(f"pcshare: {url}: {said}")


def test_empty_object_is_refused(s3: S3Server) -> None:
    with Provider(s3.put("empty", b""), env=s3.environment) as provider:
        code, line = provider.refusal()
    assert (code, "the object is empty" in line) == (EXIT_FAILED, True)


def test_missing_credentials_are_named_with_the_cure(s3: S3Server) -> None:
    url = s3.put("private", b"private")
    with dead_port() as port:
        metadata = f"http://{LOOPBACK}:{port}"  # where a machine of the provider's cloud would find some
        env = {"AWS_ENDPOINT_URL": s3.endpoint, "AWS_METADATA_ENDPOINT": metadata}
        with Provider(url, env=env) as provider:
            code, line = provider.refusal()
    assert code == EXIT_FAILED
    assert line.startswith(f"pcshare: {url}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


def test_refused_access_is_named_with_the_cure(s3: S3Server) -> None:
    url = s3.put("private", b"private")
    with Provider(url, env={"AWS_ENDPOINT_URL": s3.endpoint, "AWS_SKIP_SIGNATURE": "true"}) as provider:
        code, line = provider.refusal()
    assert code == EXIT_FAILED
    assert line.startswith(f"pcshare: {url}: access refused (")
    assert "403" in line
    assert "AWS_ACCESS_KEY_ID" in line


@pytest.mark.parametrize(
    ("served", "said"),
    [
        (WebObject(b"a" * 8192, ranges=False), "the server knows no ranges"),
        (WebObject(b"a" * 8192, length=False), "the server does not tell the object's length"),
        (WebObject(b""), "the object is empty"),
        (WebObject(b"a", fail=lambda request: 404), "no such object"),
        (WebObject(b"a", fail=lambda request: 401), "access refused"),
        (WebObject(b"a", fail=lambda request: 410), "the server answered 410 Gone"),
    ],
    ids=["no ranges", "no length", "empty", "404", "401", "410"],
)
def test_unfit_web_object_is_refused(served: WebObject, said: str) -> None:
    with WebServer(served) as server, Provider(f"http://{server.place}/x") as provider:
        code, line = provider.refusal()
    assert code == EXIT_FAILED
    assert line.startswith(f"pcshare: http://{server.place}/x: {said}")


def test_unreachable_server_is_named_with_the_cure() -> None:
    with dead_port() as port, Provider(f"http://{LOOPBACK}:{port}/x") as provider:
        code, line = provider.refusal()
    assert code == EXIT_FAILED
    assert "(Connection refused); is the address right" in line


def test_opening_has_a_time_limit() -> None:
    with mute_port() as port, Provider(f"http://{LOOPBACK}:{port}/x", "2") as provider:
        code, line = provider.refusal()
    assert (code, "TimedOut" in line) == (EXIT_FAILED, True)


def test_server_that_names_no_state_is_warned_of() -> None:
    with WebServer(WebObject(b"a" * 8192, e_tag="")) as server, Provider(f"http://{server.place}/x") as provider:
        assert provider.read(0, 1) == b"a"
    assert "would not be noticed" in provider.finish()[1]


def without(*packages: str) -> list[str]:
    """The provider where these packages are not installed."""
    hide = "; ".join(f"sys.modules[{name!r}] = None" for name in packages)
    code = f"import sys; {hide}; from pcshare.serve.objects import main; sys.exit(main(sys.argv[1:]))"
    return ["-P", "-c", code]


@pytest.mark.parametrize(
    ("url", "missing", "names"),
    [
        ("s3://bucket/x", ("obstore", "fsspec"), "obstore"),
        ("local:///x", ("fsspec",), "fsspec"),
        ("s3://bucket/x", ("obstore", "s3fs"), "s3fs"),
        ("gs://bucket/x", ("obstore", "gcsfs"), "gcsfs"),
        ("zip://a::s3://bucket/x", ("s3fs",), "reads s3:// is missing"),
    ],
)
def test_missing_package_is_named_with_the_cure(url: str, missing: tuple[str, ...], names: str) -> None:
    with Provider(url, python=without(*missing)) as provider:
        code, line = provider.refusal()
    assert code == EXIT_HOST
    assert names in line
    assert "pip install 'pcshare[objects]'" in line


@pytest.mark.parametrize("words", [[], ["http://x/y", "1", "2"], ["http://x/y", "0"], ["http://x/y", "soon"]])
def test_wrong_arguments_get_the_usage(words: list[str]) -> None:
    with Provider(*words) as provider:
        code, line = provider.refusal()
    assert (code, line.startswith("usage: ")) == (EXIT_USAGE, True)


def test_terminal_is_no_socket() -> None:
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, *PROVIDER, "http://x/y"]
        done = subprocess.run(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    assert (done.returncode, done.stderr.startswith(b"usage: ")) == (EXIT_USAGE, True)


def test_terminals_interrupt_is_not_for_the_provider() -> None:
    with WebServer(WebObject(b"a" * 8192)) as server, Provider(f"http://{server.place}/x") as provider:
        assert provider.read(0, 1) == b"a"
        provider.process.send_signal(signal.SIGINT)
        assert provider.read(1, 1) == b"a"


# -- through fsspec


def test_local_file_is_served_byte_for_byte(tmp_path: Path, rng: random.Random) -> None:
    content = rng.randbytes(ODD)
    (tmp_path / "a b.bin").write_bytes(content)
    with Provider(f"local://{tmp_path}/a b.bin") as provider:
        check_equal(provider, content, rng)


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_member_of_an_archive_is_served_byte_for_byte(tmp_path: Path, rng: random.Random, packing: int) -> None:
    content = rng.randbytes(MIB + 1)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", packing) as archive:
        archive.writestr("in/inner.bin", content)
    with Provider(f"zip://in/inner.bin::{tmp_path}/a.zip") as provider:
        check_equal(provider, content, rng)


def test_many_reads_of_a_local_file_at_once(tmp_path: Path, rng: random.Random) -> None:
    content = rng.randbytes(ODD)
    (tmp_path / "a.bin").write_bytes(content)
    copy_by_libnbd(tmp_path / "copy", f"local://{tmp_path}/a.bin", "--request-size=32768")
    assert (tmp_path / "copy").read_bytes() == content


def test_changed_local_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"a" * 8192)
    with Provider(f"local://{path}") as provider:
        assert provider.read(0, 4096) == b"a" * 4096
        path.write_bytes(b"b" * 8192)
        os.utime(path, ns=(0, 0))
        assert "the object changed" in provider.refusal_of_read(4096, 4096)


def test_removed_local_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"a" * 8192)
    with Provider(f"local://{path}") as provider:
        assert provider.read(0, 4096) == b"a" * 4096
        path.unlink()
        assert "the object changed" in provider.refusal_of_read(4096, 4096)


def test_replaced_archive_is_an_error(tmp_path: Path) -> None:
    def pack(name: str, content: bytes) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("inner.bin", content)
        return tmp_path / name

    path = pack("a.zip", b"a" * 8192)
    with Provider(f"zip://inner.bin::{path}") as provider:
        assert provider.read(0, 4096) == b"a" * 4096
        pack("b.zip", b"b" * 8192).rename(path)
        assert "the object changed" in provider.refusal_of_read(4096, 4096)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("local:///no/such/file", "no such object"),
        ("local:///", "is a directory"),
        ("zip://a::/no/such/file.zip", "no such object"),
        ("plain/path", "is no URL"),
    ],
)
def test_what_fsspec_cannot_open_is_refused(url: str, said: str) -> None:
    with Provider(url) as provider:
        code, line = provider.refusal()
    assert code == EXIT_FAILED
    assert line.startswith(f"pcshare: {url}: {said}")


def test_protocol_that_nobody_knows_is_wrong_usage() -> None:
    with Provider("nonsense://a/b") as provider:
        code, line = provider.refusal()
    assert code == EXIT_USAGE
    assert line.startswith("pcshare: unknown kind of source 'nonsense' in 'nonsense://a/b'")


def test_look_that_began_before_a_read_ended_does_not_count() -> None:
    begun: list[threading.Event] = [threading.Event(), threading.Event()]
    gate = threading.Event()
    count = iter(range(10))

    def look() -> None:
        begun[min(next(count), 1)].set()
        assert gate.wait(60)

    looks = _Looks(look)
    readers = [threading.Thread(target=looks.wait_for_next) for _ in range(2)]
    readers[0].start()
    assert begun[0].wait(60)
    readers[1].start()
    gate.set()
    for reader in readers:
        reader.join()
    assert begun[1].is_set()


def test_what_a_look_finds_is_raised_for_each_reader() -> None:
    def look() -> None:
        raise SourceError("changed", errno=errno.EIO)

    looks = _Looks(look)
    for _ in range(2):
        with pytest.raises(SourceError, match="changed"):
            looks.wait_for_next()


# -- as the source of a block


@pytest.mark.usefixtures("runtime_dir")
def test_array_of_a_store_is_a_block(s3: S3Server, monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    array = np.frombuffer(rng.randbytes(2 * MIB), dtype=np.int32).reshape(512, 1024)
    packed = io.BytesIO()
    np.save(packed, array)
    url = s3.put("models/weights.npy", packed.getvalue())
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with coordinator(f"weights={url}") as served:
        finished = run_helper(served, "scan", "--block=weights")
        assert finished.returncode == 0, finished.stderr
        assert finished.report["result"] == hashlib.sha256(packed.getvalue()).hexdigest()
        assert served.block("weights").used_length == len(packed.getvalue())


def start_fails(url: str, **env: str) -> tuple[int, str]:
    """Exit code of a coordinator that cannot start with this source, and what is said of it."""
    command = [sys.executable, "-m", "pcshare", "coordinator", "--name=none", f"data={url}"]
    done = subprocess.run(
        command, env=clean_environment(**env), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


@pytest.mark.usefixtures("runtime_dir")
def test_missing_package_is_what_a_coordinator_says_of_its_start(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['obstore'] = sys.modules['fsspec'] = None\n")
    code, said = start_fails("s3://bucket/key", PYTHONPATH=str(tmp_path))
    assert code == EXIT_HOST
    assert said == "pcshare: s3://bucket/key: needs the Python package obstore\n  pip install 'pcshare[objects]'\n"


@pytest.mark.usefixtures("runtime_dir")
def test_what_the_provider_found_is_all_that_a_coordinator_says(s3: S3Server) -> None:
    code, said = start_fails(f"s3://{BUCKET}/nothing", **s3.environment)
    assert code == EXIT_FAILED
    assert said.startswith(f"pcshare: s3://{BUCKET}/nothing: no such object\n  ")
    assert "hung up" not in said


@pytest.mark.usefixtures("runtime_dir")
def test_doctor_tells_a_missing_package_from_a_source_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['obstore'] = sys.modules['fsspec'] = None\n")
    done = subprocess.run(
        [sys.executable, "-m", "pcshare", "doctor", "--json", "s3://bucket/key", "zero:4K", str(tmp_path / "none")],
        env=clean_environment(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    sources = json.loads(done.stdout)["sources"]
    assert (done.returncode, [one["ok"] for one in sources]) == (EXIT_HOST, [False, True, False])
    assert sources[0]["hint"] == "pip install 'pcshare[objects]'"


@pytest.mark.usefixtures("runtime_dir")
def test_outage_is_told_by_the_provider_while_the_block_is_paused(capfd: pytest.CaptureFixture[str]) -> None:
    """It knows how long the source may take for an answer, and gives a read up before."""
    served = WebObject(b"a" * 8192)
    with WebServer(served) as server, contextlib.ExitStack() as serves:
        source = f"data=http://user:secret@{server.place}/x?sig=secret#timeout=1500ms"
        coordinated = serves.enter_context(serving(source, stream_mode=LAZY))
        helper = coordinated.helper()
        helper.do("b = attach()")
        served.fail = lambda request: 503
        pending = helper.start("read(b, 0)")
        wait_until(lambda: "the server answered 503" in coordinated.block().reason, "the store's own answer", 30)
        assert f"http://user:***@{server.place}/x?sig=*** is away" in coordinated.block().reason
        assert "secret" not in coordinated.block().reason
        served.fail = lambda request: 0
        assert pending.result() == b"a"
    said = capfd.readouterr().err
    assert "pcshare: http://" not in said
    assert "secret" not in said


@pytest.mark.usefixtures("runtime_dir")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_doctor_shows_no_secret(options: tuple[str, ...]) -> None:
    with WebServer(WebObject(b"a" * 8192)) as server:
        sources = [f"http://user:secret@{place}/x?sig=secret" for place in (server.place, f"{LOOPBACK}:{dead_port()}")]
        command = [sys.executable, "-m", "pcshare", "doctor", *options, *sources]
        done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_FAILED
    assert "http://user:***@" in done.stdout
    assert "secret" not in done.stdout + done.stderr


@pytest.mark.usefixtures("runtime_dir")
def test_helper_never_reads_bytes_of_a_changed_object(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = s3.put("block.bin", b"a" * MIB)
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with coordinator(f"data={url}", options=["--stream=lazy", "--on-source-loss=poison"]) as served:
        s3.put("block.bin", b"b" * MIB)
        finished = run_helper(served, "scan", "--block=data")
        assert finished.returncode == -signal.SIGBUS, finished
