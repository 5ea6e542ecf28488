"""Object stores for tests: an S3 server (moto) as a process, a web server that behaves as a test tells it, and the
provider run on a socket.

Starts and ends them; makes no claims. They live on loopback ports that the kernel chooses. The library that the
provider reads with is never imported here: its threads would stay in the test run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.server
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import pytest

from pcshare.errors import SourceError
from pcshare.nbd.client import Session, negotiate
from support import needs, wait_until
from support_coordinator import die_with_parent

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 60.0  # the S3 server imports half the world
STOP_TIMEOUT_S = 15.0
HANDSHAKE_TIMEOUT_S = 30.0
READ_TIMEOUT_S = 60.0
GATHER_TIMEOUT_S = 20.0
BUCKET = "bucket"
_HEADERS = {
    "Content-Type": "application/octet-stream",  # urllib's own makes the server look for a form
    "Authorization": "AWS4-HMAC-SHA256 Credential=test/20000101/us-east-1/s3/aws4_request, SignedHeaders=host, "
    "Signature=0",
}
PROVIDER = ("-P", "-m", "pcshare.serve.objects")
_RUNNING_ON = re.compile(r"Running on http://[\d.]+:(\d+)")
_STORES = ("AWS_", "GOOGLE_", "AZURE_")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def clean_environment(**more: str) -> dict[str, str]:
    """This process's, without what would lead a library to somebody's real store or through a proxy."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_STORES) and name.lower() not in _PROXIES
    }
    return kept | more


# -- S3


@dataclass(frozen=True)
class S3Server:
    """moto, on a port. Buckets and objects are made by plain requests: it wants a signature and checks none."""

    port: int

    @property
    def endpoint(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """How a client finds it, and credentials that it believes."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }

    def put(self, key: str, content: bytes) -> str:
        """Makes or replaces an object; its URL."""
        self._request("PUT", f"/{BUCKET}/{urllib.parse.quote(key)}", content)
        return f"s3://{BUCKET}/{key}"

    def delete(self, key: str) -> None:
        self._request("DELETE", f"/{BUCKET}/{urllib.parse.quote(key)}")

    def make_bucket(self) -> None:
        self._request("PUT", f"/{BUCKET}")

    def _request(self, method: str, path: str, content: bytes | None = None) -> None:
        request = urllib.request.Request(self.endpoint + path, content, _HEADERS, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=STOP_TIMEOUT_S) as answer:
            answer.read()


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """An S3 server with one empty bucket, ended by SIGTERM."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", LOOPBACK, "-p", "0"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=clean_environment(PYTHONUNBUFFERED="1"),
            preexec_fn=die_with_parent,
        )
        try:
            wait_until(
                lambda: process.poll() is not None or _RUNNING_ON.search(_said(log)) is not None,
                "the S3 server to listen",
                START_TIMEOUT_S,
            )
            found = _RUNNING_ON.search(_said(log))
            if found is None:
                pytest.fail(f"the S3 server ended at its start: {_said(log)}")
            server = S3Server(int(found[1]))
            server.make_bucket()
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                pytest.fail(f"the S3 server had to be killed: {_said(log)}")


def _said(log: IO[bytes]) -> str:
    """Without moving the place where the process goes on writing."""
    return os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")


# -- the web


@dataclass
class WebObject:
    """What the web server says, from now on; change it while it serves."""

    content: bytes
    e_tag: str | None = None  # None: 'strong, of the content'; '': none
    modified: str | None = None
    ranges: bool = True
    length: bool = True
    heeds_if_match: bool = True
    fail: Callable[[WebRequest], int] = lambda request: 0  # a status to answer with, or 0
    seen: list[WebRequest] = field(default_factory=list)

    def tag(self) -> str:
        return f'"{hashlib.md5(self.content).hexdigest()}"' if self.e_tag is None else self.e_tag


@dataclass(frozen=True)
class WebRequest:
    method: str
    path: str
    headers: Mapping[str, str]

    @property
    def is_first_look(self) -> bool:
        return self.headers.get("Range") == "bytes=0-0"


class WebServer(http.server.ThreadingHTTPServer):
    """One WebObject under every path; /moved leads to another path."""

    daemon_threads = False

    def __init__(self, served: WebObject) -> None:
        super().__init__((LOOPBACK, 0), _WebHandler)
        self.served = served
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def place(self) -> str:
        return f"{LOOPBACK}:{self.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _WebHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        served = self.server.served
        request = WebRequest(self.command, self.path, {name.title(): value for name, value in self.headers.items()})
        served.seen.append(request)
        wanted = request.headers.get("If-Match")
        if status := served.fail(request):
            self._send(status, b"")
        elif self.path == "/moved":
            self._send(302, b"", Location="/there")
        elif wanted and served.heeds_if_match and wanted != served.tag():
            self._send(412, b"")
        else:
            self._send_range(served, request.headers.get("Range"))

    def _send_range(self, served: WebObject, wanted: str | None) -> None:
        named = {"ETag": served.tag(), "Last-Modified": served.modified or ""}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
        if not match or not served.ranges or not served.content:
            self._send(200, served.content, **named)
            return
        first, last = int(match[1]), min(int(match[2]), len(served.content) - 1)
        total = str(len(served.content)) if served.length else "*"
        named["Content-Range"] = f"bytes {first}-{last}/{total}"
        self._send(206, served.content[first : last + 1], **named)

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


class Gathering:
    """Holds ranges back until so many are asked for at the same time; which never happens if they come one by one."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count)

    def __call__(self, request: WebRequest) -> int:
        if request.is_first_look:
            return 0
        try:
            self._barrier.wait(GATHER_TIMEOUT_S)
        except threading.BrokenBarrierError:
            return 404  # final: nobody asks again
        return 0


@contextlib.contextmanager
def dead_port() -> Iterator[int]:
    """A port at which nobody listens, and nobody else will."""
    with socket.socket() as held:
        held.bind((LOOPBACK, 0))
        yield held.getsockname()[1]


@contextlib.contextmanager
def mute_port() -> Iterator[int]:
    """A port at which connections are accepted and nothing is ever said."""
    with socket.create_server((LOOPBACK, 0), backlog=64) as server:
        yield server.getsockname()[1]


# -- the provider


class Provider:
    """`python -P -m pcshare.serve.objects URL` on a socket pair."""

    def __init__(self, *words: str, env: Mapping[str, str] | None = None, python: Sequence[str] = PROVIDER) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the provider)
        self.end, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, *python, *words],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=self._log,
                env=clean_environment(**(env or {})),
                preexec_fn=die_with_parent,
            )
        self._session: Session | None = None
        self._ending: tuple[int, str] | None = None

    @property
    def session(self) -> Session:
        if self._session is None:
            try:
                self._session = negotiate(self.end, "", time.monotonic() + HANDSHAKE_TIMEOUT_S)
            except SourceError as error:
                pytest.fail(f"no handshake: {error}; the provider said {self.finish()[1]!r}")
        return self._session

    def read(self, offset: int, length: int) -> bytes:
        return self.session.read(offset, length, time.monotonic() + READ_TIMEOUT_S)

    def refusal_of_read(self, offset: int, length: int) -> str:
        """What the answer to a read says, which must be EIO."""
        with pytest.raises(SourceError) as caught:
            self.read(offset, length)
        assert caught.value.errno == errno.EIO
        return str(caught.value)

    def finish(self) -> tuple[int, str]:
        """Waits for its end; its exit code and what it said."""
        if self._ending is None:
            try:
                self._ending = self.process.wait(READ_TIMEOUT_S), _said(self._log)
            except subprocess.TimeoutExpired:
                pytest.fail(f"the provider did not end: {_said(self._log)}")
        return self._ending

    def refusal(self) -> tuple[int, str]:
        """Its exit code and its one line, of a provider that must not begin a handshake."""
        assert self.end.recv(1) == b""
        code, said = self.finish()
        assert said.endswith("\n")
        assert said.count("\n") == 1
        return code, said.rstrip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hangs up, after which it must end by itself."""
        if self._session is not None:
            self._session.close()
        self.end.close()
        try:
            if error is None:
                self.finish()
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._log.close()


class ProviderSocket:
    """A Unix socket at which each client gets a provider of its own, as a super-server has it: for clients that want a
    server to connect to."""

    def __init__(self, path: Path, url: str, env: Mapping[str, str] | None = None) -> None:
        self.uri = f"nbd+unix:///?socket={path}"
        self._command = [sys.executable, *PROVIDER, url]
        self._environment = clean_environment(**(env or {}))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)
        self._started: list[subprocess.Popen[bytes]] = []

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # shut down
                return
            with connection:
                fd = connection.fileno()
                self._started.append(subprocess.Popen(self._command, stdin=fd, stdout=fd, env=self._environment))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Every client has gone by now, and with it its provider."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for process in self._started:
            try:
                assert process.wait(STOP_TIMEOUT_S) == 0
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                pytest.fail("a provider outlived its client")


def copy_by_libnbd(target: Path, url: str, *options: str, env: Mapping[str, str] | None = None) -> None:
    """By somebody else's client, which asks for much at once."""
    needs(None if shutil.which("nbdcopy") else "nbdcopy (package libnbd-bin)")
    with ProviderSocket(target.with_suffix(".sock"), url, env) as server:
        command = ["nbdcopy", *options, server.uri, str(target)]
        subprocess.run(command, preexec_fn=die_with_parent, check=True, timeout=READ_TIMEOUT_S)
