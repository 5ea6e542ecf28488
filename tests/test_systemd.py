"""The shipped systemd unit: systemd finds nothing wrong with it, and under what it restricts a coordinator works.

systemd itself does not run here.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

from pcshare.cli.coordinator import command
from pcshare.core import lib
from support import needs
from support_coordinator import EXECUTABLES, coordinator
from support_serving import NOBODY, PAGE, make_file
from support_unit import UNIT, needs_systemd, restrictions, settings
from support_users import as_user, needs_root, reachable, run

EXPOSURE_MAX = 3.5  # of 10, as systemd counts; a unit without any hardening has 9.6
NEWER = {"FileDescriptorStorePreserve": 254}  # and since when


def systemd_version() -> int:
    said = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    return int(said.split()[1])


def analyze(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """systemd-analyze of an instance of the unit whose program is there."""
    needs_systemd()
    text = UNIT.read_text().replace("/opt/pcshare/bin/pcshare", "/bin/true")
    for key, version in NEWER.items():
        if systemd_version() < version:
            text = re.sub(rf"^{key}=.*\n", "", text, flags=re.M)
    path = folder / "pcshare@weights.service"
    path.write_text(text)
    return run([], "systemd-analyze", *words, path)


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    done = analyze(tmp_path, "verify")
    assert (done.returncode, [line for line in done.stderr.splitlines() if "weights" in line]) == (0, [])


def test_unit_is_as_little_exposed_as_was_meant(tmp_path: Path) -> None:
    done = analyze(tmp_path, "security", "--offline=true", f"--threshold={round(EXPOSURE_MAX * 10)}", "--no-pager")
    assert done.returncode == 0, done.stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found
    assert float(found[1]) <= EXPOSURE_MAX


def test_unit_keeps_fds_over_a_restart_and_ends_its_processes_in_order() -> None:
    """The keeper is its main process, the coordinator tells of readiness, and SIGTERM goes to the keeper alone."""
    told = settings()
    assert (told["Type"], told["NotifyAccess"], told["KillMode"]) == ("notify", "all", "mixed")
    assert int(told["FileDescriptorStoreMax"]) >= 2 * lib.STATUS_HELPERS_MAX
    assert told["FileDescriptorStorePreserve"] == "restart"
    assert (told["Restart"], told["RestartPreventExitStatus"]) == ("on-failure", "2 3")


def test_unit_runs_a_command_line_that_there_is() -> None:
    words = settings()["ExecStart"].split()
    assert words[1] == "coordinator"
    known = {option for param in command.params for option in param.opts}
    assert {word for word in words if word.startswith("--") and word != "--"} <= known


def test_coordinator_works_under_what_the_unit_restricts(runtime_dir: Path, rng: random.Random) -> None:
    """System calls, capabilities, executable memory, umask, fds: from root to the end, with an exporter."""
    needs_root()
    needs_systemd()
    needs(None if os.uname().machine == "x86_64" else "x86_64, for the numbers of its system calls")
    runtime_dir.chmod(0o711)
    path = make_file(runtime_dir, rng, 100 * PAGE)
    within = [*reachable(), sys.executable, str(Path(__file__).with_name("support_unit.py")), restrictions()]
    options = ["--stream=lazy", f"--user={NOBODY}:{NOBODY}", "--allow-uid=65533", "--export=127.0.0.1:0"]
    with coordinator(f"data={path}", options=options, within=within) as served:
        told = Path(f"/proc/{served.pid}/status").read_text()
        assert re.search(r"^Seccomp:\t2$", told, re.M)
        assert re.search(r"^NoNewPrivs:\t1$", told, re.M)
        assert re.search(r"^CapBnd:\t00000000000000c1$", told, re.M)
        for uid in (NOBODY, 65533):
            done = run(as_user(uid), EXECUTABLES / "touch", f"--name={served.name}", "--block=data")
            assert done.returncode == 0, done.stderr
        served.wait_for_state("END")
