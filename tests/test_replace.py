"""Upgrade in place: `--replace` puts this program in the place of a living coordinator, and no helper notices."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import pcshare
from pcshare import admin
from pcshare.errors import AccessRefused, LocalProtocolError
from pcshare.launcher import Event
from pcshare.status import read_status
from support import needs, wait_until
from support_coordinator import coordinator, die_with_parent
from support_serving import NOBODY, PAGE, WAIT_S, HelperProcess, make_file
from support_takeover import Restarting, command_line, restarting

N_PAGES = 300
LAZY = ["--stream=lazy"]
PCSHARE = [sys.executable, "-m", "pcshare"]
COMMAND_TIMEOUT_S = 60.0


@pytest.fixture
def data_file(tmp_path: Path, rng: random.Random) -> Path:
    return make_file(tmp_path, rng, N_PAGES * PAGE - 11)


@pytest.fixture
def served(runtime_dir: Path, data_file: Path) -> Iterator[Restarting]:
    with restarting(f"data={data_file}#delay=2ms", options=LAZY) as made:
        yield made


def replace(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PCSHARE, "coordinator", f"--name={name}", "--replace", *options],
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        preexec_fn=die_with_parent,
    )


def test_no_helper_notices(served: Restarting, content: bytes) -> None:
    """Twice in a row, with touches, ranges and an attaching helper under way."""
    helpers = [served.attached() for _ in range(2)]
    touching = helpers[0].start(f"b''.join(read(b, page * {PAGE}, {PAGE}) for page in range({N_PAGES - 1}))")
    ensuring = helpers[1].start(f"[b.ensure(slice(at, at + {PAGE})) for at in range(0, len(b), {3 * PAGE})]")
    for number in range(2):
        before = served.pid
        told = replace(served.name, "--json")
        assert told.returncode == 0, told.stderr
        report = json.loads(told.stdout.splitlines()[-1])
        assert report == {"event": "replaced", "name": served.name, "pid": served.pid, "pid_before": before}
        assert served.pid != before
        wait_until(lambda n=number: served.restarts == n + 1, "the count", WAIT_S)  # type: ignore[misc]
        assert served.attached().do(f"read(b, {100 * PAGE}, 9)") == content[100 * PAGE : 100 * PAGE + 9]
    assert touching.result() == content[: (N_PAGES - 1) * PAGE]
    ensuring.result()
    assert helpers[0].do("bytes(b)") == content
    assert served.block().foreign_pages == 0


def test_options_given_with_it_count_and_go_on(served: Restarting, tmp_path: Path, content: bytes) -> None:
    """Those of the old one stay beside them; and the next one that is started has both."""
    helper = served.attached()
    trace, export = tmp_path / "trace", tmp_path / "x.sock"
    told = replace(served.name, f"--trace={trace}", f"--export={export}", "--helpers-max=1")
    assert told.returncode == 0, told.stderr
    assert is_exported(export)
    assert trace.exists()
    with pytest.raises(pcshare.errors.LimitReached):
        served.attached()
    words = command_line(served.pid)
    assert any(word.startswith("data=") for word in words)
    assert served.status().stream == "lazy"
    exporters = [child.pid for child in psutil.Process(served.pid).children()]
    served.restart()
    wait_until(lambda: not any(map(psutil.pid_exists, exporters)), "the exporter's end", WAIT_S)
    assert command_line(served.pid) == words
    assert is_exported(export)
    assert helper.do("bytes(b)") == content


def is_exported(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(WAIT_S)
        client.connect(str(path))
        return client.recv(8) == b"NBDMAGIC"


@pytest.mark.parametrize(
    "bad",
    [
        "--trace=/nowhere/at/all/trace",
        "--export=/nowhere/at/all.sock",
        "--device-state=x",
        "--allow-uid=65534",
        "--helpers-max=0",
    ],
)
def test_program_that_fails_leaves_the_old_one_serving(
    runtime_dir: Path, data_file: Path, content: bytes, bad: str
) -> None:
    """P5: and says so, with exit code 1; what it was given is forgotten."""
    export = runtime_dir / "x.sock"
    with restarting(f"data={data_file}", options=[*LAZY, f"--export={export}"]) as served:
        helper = served.attached()
        words = command_line(served.pid)
        for _ in range(2):
            told = replace(served.name, bad)
            if bad == "--helpers-max=0":  # is seen at once
                assert told.returncode == 2
                return
            assert told.returncode == 1
            assert "did not come to serve" in told.stderr
            assert command_line(served.pid) == words
            page = served.restarts
            assert helper.do(f"read(b, {page * PAGE}, {PAGE})") == content[page * PAGE : (page + 1) * PAGE]
        assert is_exported(export)
        assert helper.do("bytes(b)") == content


def test_killed_while_it_takes_the_place(served: Restarting, content: bytes) -> None:
    """P5: of either, at any moment; somebody serves in the end."""
    helper = served.attached()
    for tenth in range(6):
        told: list[subprocess.CompletedProcess[str]] = []
        thread = threading.Thread(target=lambda told=told: told.append(replace(served.name)))
        thread.start()
        time.sleep(0.15 * tenth)
        served.kill_child()
        thread.join()
        assert told[0].returncode in (0, 1)
        assert "Traceback" not in told[0].stderr
        wait_until(lambda: served.status().alive, "a coordinator", WAIT_S)
        assert helper.do(f"read(b, {tenth * PAGE}, {PAGE})") == content[tenth * PAGE : (tenth + 1) * PAGE]
    assert replace(served.name).returncode == 0
    assert helper.do("bytes(b)") == content


def test_with_sources_it_means_the_dead(runtime_dir: Path, data_file: Path) -> None:
    """As ever: a living one of that name is in the way."""
    with coordinator(f"data={data_file}") as served:
        told = replace(served.name, f"data={data_file}")
        assert told.returncode == 1
        assert "runs already" in told.stderr
        assert "not kept" not in told.stderr
        assert read_status(served.name).restarts == 0


def test_nobody_there_and_a_dead_one(runtime_dir: Path, data_file: Path) -> None:
    told = replace("nobody")
    assert told.returncode == 1
    assert "nobody" in told.stderr
    with pcshare.Coordinator(blocks={"data": str(data_file)}, keeper=False) as dead:
        assert dead.pid is not None
        os.kill(dead.pid, signal.SIGKILL)
        wait_until(lambda: not read_status(dead.name).alive, "its end")
        told = replace(dead.name)
        assert told.returncode == 1
        assert "is dead" in told.stderr


def test_without_a_keeper_nobody_could_start_the_other(runtime_dir: Path, data_file: Path) -> None:
    with coordinator(f"data={data_file}", options=["--no-keeper"]) as served:
        told = replace(served.name)
        assert told.returncode == 1
        assert "no keeper" in told.stderr
        assert "--no-keeper" in told.stderr
        assert read_status(served.name).alive
        with HelperProcess(served.socket) as helper:
            assert helper.do("b = attach(); bytes(b)") == data_file.read_bytes()


def test_link_to_the_program_that_started_it_stays(runtime_dir: Path, data_file: Path) -> None:
    """And what was told on it goes on: who is told of the restart is told of the end."""
    names: list[str] = []

    def listen(event: Event) -> None:
        names.append(event.name)

    with pcshare.Coordinator(blocks={"data": str(data_file)}, stream="lazy", on_event=listen) as made:
        for number in range(2):
            before = made.pid
            assert replace(made.name).returncode == 0
            wait_until(lambda number=number: names.count("restarted") == number + 1, "the news")  # type: ignore[misc]
            assert made.pid not in (None, before)
        with made.attach("data") as block:
            block.ensure()
        wait_until(lambda: "INBOUND_END" in names, "the end to be told")
    assert "ended" not in names


def test_only_the_one_who_started_it_may(runtime_dir: Path, data_file: Path) -> None:
    """P8: not a user who may attach."""
    needs(None if os.geteuid() == 0 else "root, to be another user")
    with coordinator(f"data={data_file}", options=[f"--allow-uid={NOBODY}"]) as served:
        with HelperProcess(served.socket, uid=NOBODY) as stranger:
            stranger.do("from pcshare import admin")
            with pytest.raises(AccessRefused):
                stranger.do("admin.replace(SOCKET, ['/bin/true'], ['--name=x'])")
            assert stranger.do("b = attach(); len(b)") == len(data_file.read_bytes())
        assert read_status(served.name).restarts == 0


def test_words_that_do_not_fit_are_refused_before_they_are_sent(served: Restarting) -> None:
    for program, options in ((["a" * 4000], []), (["a"], ["b\0c"])):
        with pytest.raises(LocalProtocolError):
            admin.replace(served.socket, program, options)
    assert served.restarts == 0
