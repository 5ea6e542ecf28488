"""pcshare doctor: run for real, as root or not, with userfaultfd and without."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import support_seccomp
from core_support import compile_c
from pcshare import probe
from pcshare.errors import EXIT_INTERRUPTED
from pcshare.nbd.wire import Command
from pcshare.sources import examine
from support_coordinator import die_with_parent
from support_nbd import Handshake, Peer, Request, ScriptedServer, serve_reads

PAGE = 4096
START_S = 20.0

needs_seccomp = pytest.mark.skipif(not support_seccomp.is_supported(), reason="no filter for this machine")


def _doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pcshare", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _object(stdout: str) -> dict[str, Any]:
    (line,) = stdout.splitlines()  # one object, and nothing else on stdout
    told = json.loads(line)
    assert isinstance(told, dict)
    return told


def test_doctor_finds_that_the_main_job_works_here() -> None:
    done = _doctor()
    assert done.returncode == 0, done.stderr
    assert "The main job works for this user here." in done.stdout
    assert done.stderr == ""
    for what in ("userfaultfd", "features", "ioctls", "seccomp", "kernel", "huge pages", "memlock", "capabilities"):
        assert what in done.stdout


def test_json_is_one_object_with_every_finding() -> None:
    done = _doctor("--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = _object(done.stdout)
    assert told["ok"] is True
    assert told["access"].keys() == {"root", "this_user", "other_users"}
    assert told["host"]["uid"] == os.geteuid()
    assert told["host"]["features"] == list(probe.examine_host().features)
    for finding in told["findings"]:
        assert finding.keys() == {"what", "state", "found", "for_whom", "mend"}
        assert finding["state"] in ("ok", "warn", "bad")
        assert (finding["state"] == "ok") == (finding["mend"] == "")


def test_commands_that_mend_are_printed_whole() -> None:
    """A command that is broken over two lines cannot be copied."""
    mends = [finding["mend"] for finding in _object(_doctor("--json").stdout)["findings"] if finding["mend"]]
    shown = _doctor().stdout
    for mend in mends:
        assert mend in shown


def test_help_shows_examples() -> None:
    done = _doctor("--help")
    assert done.returncode == 0
    assert "pcshare doctor --json" in done.stdout


def test_unknown_option_is_wrong_usage() -> None:
    assert _doctor("--nonsense").returncode == 2


def test_what_is_said_of_a_source_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No smiley for what stands between colons."""
    monkeypatch.setenv("PCSHARE_SSH", "false")
    done = _doctor("data=host:x")
    assert done.returncode == 1
    assert "data=host:x\n    host:x: the NBD server hung up" in done.stdout


@needs_seccomp
@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS", "kill"])
def test_doctor_without_userfaultfd_exits_3_and_names_the_cure(answer: str) -> None:
    """A8."""
    done = support_seccomp.run_without_userfaultfd(["-m", "pcshare", "doctor", "--json"], answer)
    assert (done.returncode, done.stderr) == (3, "")
    told = _object(done.stdout)
    assert told["ok"] is False
    assert told["access"]["this_user"] == "none"
    bad = {finding["what"]: finding for finding in told["findings"] if finding["state"] == "bad"}
    assert bad.keys() == {"userfaultfd", "seccomp"}
    assert "docker run --device /dev/userfaultfd" in bad["seccomp"]["mend"]


@needs_seccomp
def test_doctor_for_people_says_that_it_does_not_work() -> None:
    """A8."""
    done = support_seccomp.run_without_userfaultfd(["-m", "pcshare", "doctor"])
    assert done.returncode == 3
    assert "The main job does not work for this user here." in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
def test_doctor_as_an_unprivileged_user_tells_what_he_gets() -> None:
    code = (
        "import os, sys; from pcshare.cli import main; from pcshare import probe; from pcshare.cli import doctor\n"
        "import rich.console, rich.table, rich.text\n"  # what he may not read is loaded before
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "os.environ['XDG_RUNTIME_DIR'] = ''\n"
        "sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told = _object(done.stdout)
    findings = {finding["what"]: finding for finding in told["findings"]}
    served = findings["where faults are served"]
    assert told["access"]["this_user"] == (probe.FULL if served["state"] == "ok" else probe.USER_MODE)
    if served["state"] == "warn":
        assert "vm.unprivileged_userfaultfd=1" in served["mend"]


# -- sources


@pytest.fixture
def data_file(tmp_path: Path, rng: random.Random) -> Path:
    """3 MiB and a bit, with a hole of 1 MiB."""
    path = tmp_path / "data.bin"
    with path.open("wb") as file:
        file.write(rng.randbytes(1 << 20))
        file.seek(2 << 20)
        file.write(rng.randbytes((1 << 20) + 5))
    return path


def test_source_is_measured_and_its_holes_are_told(data_file: Path) -> None:
    done = _doctor("--json", str(data_file))
    assert (done.returncode, done.stderr) == (0, "")
    (told,) = _object(done.stdout)["sources"]
    assert told["ok"] is True
    assert (told["kind"], told["used_length"], told["data_length"]) == ("file", (3 << 20) + 5, (2 << 20) + 5)
    assert 0 < told["round_trip_us"] <= told["round_trip_us_max"]
    assert told["throughput"] > 0


def test_delay_of_a_source_is_found(data_file: Path) -> None:
    (told,) = _object(_doctor("--json", f"{data_file}#delay=20ms").stdout)["sources"]
    assert told["round_trip_us"] >= 20_000


def test_server_is_examined_with_what_it_offers(data_file: Path) -> None:
    source = f"exec:nbdkit -s --filter=blocksize-policy file {data_file} blocksize-preferred=64k blocksize-maximum=1M"
    done = _doctor("--json", source)
    (told,) = _object(done.stdout)["sources"]
    assert told["ok"] is True, done
    assert told["used_length"] == (3 << 20) + 5
    assert told["facts"]["server"] == source
    assert told["facts"]["largest read"] == "1048576 bytes"
    shown = _doctor(source).stdout
    assert "65536 preferred" in shown
    assert "the rest comes at" in shown


def test_source_that_cannot_be_read_is_told_with_the_others(data_file: Path, tmp_path: Path) -> None:
    fails = tmp_path / "fails"
    fails.touch()
    sources = (str(data_file), str(tmp_path / "nothing.bin"), f"{data_file}#error=EIO@{fails}")
    done = _doctor("--json", *sources)
    assert done.returncode == 1
    told = _object(done.stdout)
    assert (told["ok"], [one["ok"] for one in told["sources"]]) == (False, [True, False, False])
    assert "nothing.bin: No such file" in told["sources"][1]["error"]
    assert "reading at offset 0: Input/output error" in told["sources"][2]["error"]
    shown = _doctor(*sources)
    assert shown.returncode == 1
    assert [line.split()[0] for line in shown.stdout.splitlines() if line[0] != " "] == ["ok", "bad", "bad"]


def test_source_that_makes_no_sense_is_wrong_usage() -> None:
    assert _doctor("nbd://").returncode == 2


def test_server_that_is_silent_after_the_handshake_is_given_up(data_file: Path) -> None:
    """It answers the head of the file and its holes, and from then on nothing in time."""
    source = f"exec:nbdkit -s --filter=delay file {data_file} delay-read=2s#timeout=200ms"
    begin = time.monotonic()
    done = _doctor("--json", source)
    assert done.returncode == 1
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("late_waits", [False, True], ids=["while it waits", "just before it waits"])
def test_interrupt_ends_a_measurement_at_once(tmp_path: Path, late_waits: bool) -> None:
    """The server answers what is asked at the start, and from then on nothing."""
    data, asked = bytes(256 * PAGE), threading.Event()
    environment = dict(os.environ)
    if late_waits:
        library = compile_c(tmp_path / "late_waits.so", "late_waits.c", [], to_preload=True)
        environment["LD_PRELOAD"] = str(library)

    def never_again(peer: Peer, request: Request) -> bool:
        if request.command == Command.READ and request.length == PAGE:
            asked.set()
            peer.never_answer()
        return False

    def script(peer: Peer) -> None:
        Handshake(size=len(data)).run(peer)
        serve_reads(peer, data, never_again)

    with ScriptedServer(script) as server:
        host, port = server.listen()
        command = [sys.executable, "-m", "pcshare", "doctor", f"nbd://{host}:{port}/"]
        with subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent
        ) as process:
            assert asked.wait(START_S)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=examine.READ_TIMEOUT_S * 2 / 3)
    assert process.returncode == EXIT_INTERRUPTED
    assert "Traceback" not in said
