"""probe: what is found on this host, what is judged missing, and what a host without userfaultfd says."""

from __future__ import annotations

import dataclasses
import errno
import json
import mmap
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pcshare
import support_seccomp
from pcshare import probe, uffd
from pcshare.errors import HostError, PcshareError, UsageError

needs_seccomp = pytest.mark.skipif(not support_seccomp.is_supported(), reason="no filter for this machine")


@pytest.fixture(scope="module")
def report() -> probe.HostReport:
    return probe.examine_host()


def _bad(report: probe.HostReport) -> dict[str, probe.Finding]:
    return {finding.what: finding for finding in probe.judge(report) if finding.state == probe.BAD}


def test_main_job_works_on_this_host(report: probe.HostReport) -> None:
    assert _bad(report) == {}
    assert probe.require_host(mmap.PAGESIZE) == probe.examine_host()


def test_features_are_probed_and_exactly_the_wanted_ones_asked_for(report: probe.HostReport) -> None:
    """A1: a throw-away uffd reports, a fresh one gets exactly what is wanted."""
    wanted = probe.wanted_features(report.features)
    assert set(probe.FEATURES_REQUIRED) <= set(uffd.feature_names(wanted)) <= set(report.features)
    with uffd.Uffd.open() as fresh:
        fresh.api(wanted)
        fresh.inspect(wanted)
        with pytest.raises(PcshareError) as caught:
            fresh.inspect(wanted | uffd.FEATURES["EVENT_FORK"])
    assert caught.value.errno == errno.EPERM


@pytest.mark.parametrize(
    ("free", "reserved", "lacking", "strict", "huge"),
    [
        (3, 0, "", False, True),
        (4, 1, "", False, True),
        (3, 1, "", False, False),  # promised to somebody
        (2, 0, "", False, False),
        (3, 0, "MISSING_HUGETLBFS", False, False),
        (3, 0, "MINOR_HUGETLBFS", False, True),
        (3, 0, "MINOR_HUGETLBFS", True, False),
    ],
)
def test_best_page_size_is_huge_where_all_blocks_have_enough(
    report: probe.HostReport, free: int, reserved: int, lacking: str, strict: bool, huge: bool
) -> None:
    """Two blocks that need three pages of 2 MiB."""
    pages = probe.HugePages(2 << 20, 10, free, reserved)
    known = {*report.features, "MISSING_HUGETLBFS", "MINOR_HUGETLBFS"} - {lacking}
    host = dataclasses.replace(report, huge_pages=(pages,), features=tuple(known))
    lengths = [(2 << 20) + 1, 5]
    assert probe.best_page_size(lengths, host, strict=strict) == (2 << 20 if huge else report.page_size)
    assert probe.best_page_size(lengths, dataclasses.replace(host, huge_pages=()), strict=False) == report.page_size


def test_uffd_is_of_no_use_before_its_handshake() -> None:
    """A1."""
    with uffd.Uffd.open() as fresh, mmap.mmap(-1, mmap.PAGESIZE) as page:
        with uffd.with_host_addr(page) as host_addr, pytest.raises(PcshareError) as caught:
            fresh.register(host_addr, mmap.PAGESIZE)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(PcshareError):
            fresh.inspect(0)


def test_handshake_is_allowed_once() -> None:
    """A1: so features are probed on a throw-away uffd."""
    with uffd.Uffd.open() as fresh:
        fresh.api(0)
        with pytest.raises(PcshareError, match="handshake"):
            fresh.api(0)


def test_feature_that_no_kernel_has_is_refused() -> None:
    with uffd.Uffd.open() as fresh, pytest.raises(PcshareError, match="handshake") as caught:
        fresh.api(1 << 62)
    assert caught.value.errno == errno.EINVAL


def test_required_ioctls_are_there(report: probe.HostReport) -> None:
    """A2: on the uffd, and on a registered page of shared memory."""
    assert set(probe.IOCTLS_REQUIRED) <= set(report.ioctls)
    assert set(probe.PAGE_IOCTLS_REQUIRED) <= set(report.page_ioctls)
    assert report.page_error == ""


@pytest.mark.parametrize("name", [*probe.IOCTLS_REQUIRED, *probe.PAGE_IOCTLS_REQUIRED])
def test_each_missing_ioctl_is_named(report: probe.HostReport, name: str) -> None:
    """A2."""
    field = "ioctls" if name in probe.IOCTLS_REQUIRED else "page_ioctls"
    fewer: dict[str, Any] = {field: tuple(ioctl for ioctl in getattr(report, field) if ioctl != name)}
    finding = _bad(dataclasses.replace(report, **fewer))["ioctls"]
    assert finding.found.removeprefix("missing: ").removesuffix(" on a page of shared memory") == name
    assert finding.mend


def test_several_missing_ioctls_are_all_named(report: probe.HostReport) -> None:
    """A2."""
    finding = _bad(dataclasses.replace(report, ioctls=(), page_ioctls=()))["ioctls"]
    for name in (*probe.IOCTLS_REQUIRED, *probe.PAGE_IOCTLS_REQUIRED):
        assert name in finding.found


@pytest.mark.parametrize("name", probe.FEATURES_REQUIRED)
def test_each_missing_feature_is_named(report: probe.HostReport, name: str) -> None:
    fewer = tuple(feature for feature in report.features if feature != name)
    finding = _bad(dataclasses.replace(report, features=fewer))["features"]
    assert finding.found == f"missing: {name}"
    assert finding.mend


def test_missing_optional_feature_is_a_warning_that_says_what_is_lost(report: probe.HostReport) -> None:
    poor = dataclasses.replace(report, features=probe.FEATURES_REQUIRED)
    assert _bad(poor) == {}
    warned = {finding.what for finding in probe.judge(poor) if finding.state == probe.WARN}
    assert {f"feature {name}" for name in probe.FEATURES_OPTIONAL} <= warned


def test_page_size_that_the_host_has_not_is_refused_with_both_numbers(report: probe.HostReport) -> None:
    """A3."""
    larger = report.page_size * 2
    with pytest.raises(HostError) as caught:
        probe.check_page_size(larger, report)
    assert f"{larger} bytes is larger than this host's {report.page_size}" in caught.value.message
    assert str(report.page_size) in (caught.value.hint or "")
    with pytest.raises(HostError, match=f"4096 bytes is smaller than this host's {1 << 16}"):
        probe.check_page_size(4096, dataclasses.replace(report, page_size=1 << 16))


@pytest.mark.parametrize("page_size", [0, -4096, 3000])
def test_page_size_that_is_no_power_of_two_is_wrong_usage(report: probe.HostReport, page_size: int) -> None:
    with pytest.raises(UsageError, match=str(page_size)):
        probe.check_page_size(page_size, report)


def test_gigantic_pages_are_refused_even_where_the_host_has_them(report: probe.HostReport) -> None:
    rich = dataclasses.replace(report, huge_pages=(probe.HugePages(1 << 30, 4, 4),))
    with pytest.raises(HostError, match=str(1 << 30)):
        probe.check_page_size(1 << 30, rich)


def test_huge_pages_need_their_feature(report: probe.HostReport) -> None:
    """A5."""
    rich = dataclasses.replace(report, huge_pages=(probe.HugePages(2 << 20, 4, 4),))
    probe.check_page_size(2 << 20, rich)
    fewer = tuple(feature for feature in report.features if feature != "MISSING_HUGETLBFS")
    with pytest.raises(HostError, match="MISSING_HUGETLBFS"):
        probe.check_page_size(2 << 20, dataclasses.replace(rich, features=fewer))
    probe.check_page_size(report.page_size, dataclasses.replace(rich, features=fewer))


def test_every_finding_that_is_not_ok_has_a_cure(report: probe.HostReport) -> None:
    bare = dataclasses.replace(
        report,
        kernel="5.4.0",
        device=None,
        device_errno=errno.ENOENT,
        system_call_errno=errno.EPERM,
        user_mode_only=True,
        features=probe.FEATURES_REQUIRED,
        capabilities=(),
        thp_shmem="force",
        huge_pages=(probe.HugePages(2 << 20, 0, 0),),
        shm_free_bytes=None,
    )
    wanting = [finding for finding in probe.judge(bare) if finding.state != probe.OK]
    assert len(wanting) >= 6
    assert [finding.what for finding in wanting if not finding.mend] == []


def test_what_works_is_told_for_root_for_this_user_and_for_others(report: probe.HostReport) -> None:
    user = dataclasses.replace(
        report,
        uid=1000,
        device=probe.Device(0, 0, 0o600, accessible=False),
        device_errno=errno.EACCES,
        system_call_errno=errno.EPERM,
        user_mode_errno=0,
        user_mode_only=True,
        unprivileged_userfaultfd=False,
    )
    assert probe.access(user) == {"root": probe.FULL, "this_user": probe.USER_MODE, "other_users": probe.USER_MODE}
    opened = dataclasses.replace(user, unprivileged_userfaultfd=True, system_call_errno=0, user_mode_only=False)
    assert set(probe.access(opened).values()) == {probe.FULL}
    none = dataclasses.replace(user, user_mode_errno=errno.ENOSYS, system_call_errno=errno.ENOSYS, seccomp_mode=0)
    assert set(probe.access(none).values()) == {probe.NONE}
    assert "CONFIG_USERFAULTFD" in _bad(none)["userfaultfd"].mend


EXAMINE_AS_NOBODY = """
import json, os
from pcshare import probe
os.setgroups([]), os.setgid(65534), os.setuid(65534)  # after the imports, which that user may not be able to read
print(json.dumps(probe.examine_host().to_json()))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
def test_unprivileged_user_is_told_what_he_gets() -> None:
    """For whom: this user, found by trying as that user."""
    command = [sys.executable, "-c", EXAMINE_AS_NOBODY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["uid"] == 65534
    assert found["capabilities"] == []
    device = Path("/dev/userfaultfd")
    open_to_all = device.exists() and device.stat().st_mode & 0o006 == 0o006
    full = open_to_all or found["unprivileged_userfaultfd"]
    assert found["user_mode_only"] == (not full)
    assert found["page_ioctls"] != []


@pytest.mark.skipif(os.geteuid() != 0, reason="locking all memory needs root")
def test_process_that_locks_its_memory_is_told_so() -> None:
    """T4: under mlockall a page is there before it can be registered."""
    locked = "import ctypes; from pcshare import probe; ctypes.CDLL(None).mlockall(2)"
    code = f"{locked}; print(probe.examine_host().page_error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "mlockall" in done.stdout, done.stderr


# --- a host without userfaultfd ---------------------------------------------------------------------------


@needs_seccomp
@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS", "kill"])
def test_seccomp_is_named_as_the_likely_cause(answer: str) -> None:
    """A8: found by trying, whatever the filter does."""
    code = f"import json; from pcshare import probe; report = probe.examine_host(); {_JUDGED}"
    done = support_seccomp.run_without_userfaultfd(["-c", code], answer)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["access"] == {"root": "none", "this_user": "none", "other_users": "none"}
    assert told["bad"].keys() == {"userfaultfd", "seccomp"}
    assert "likely cause" in told["bad"]["seccomp"]["found"]
    assert "seccomp" in told["bad"]["userfaultfd"]["mend"]


_JUDGED = (
    "bad = {f.what: f.to_json() for f in probe.judge(report) if f.state == 'bad'};"
    "print(json.dumps({'access': probe.access(report), 'bad': bad}))"
)


@needs_seccomp
@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS"])
def test_uffd_without_userfaultfd_is_an_error_with_errno(answer: str) -> None:
    """A8."""
    code = (
        "from pcshare import uffd, errors\n"
        "for attempt in (uffd.probe, uffd.Uffd.open):\n"
        "    try: attempt()\n"
        "    except errors.PcshareError as error: print(error.errno)\n"
    )
    done = support_seccomp.run_without_userfaultfd(["-c", code], answer)
    assert done.stdout.split() == [str(getattr(errno, answer))] * 2, done.stderr


@needs_seccomp
@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS", "kill"])
def test_required_host_is_refused_with_what_is_missing_and_the_cure(answer: str) -> None:
    """A8."""
    code = (
        "import sys; from pcshare import errors, probe\n"
        "try: probe.require_host()\n"
        "except errors.HostError as error: print(error); sys.exit(errors.exit_code(error))\n"
    )
    done = support_seccomp.run_without_userfaultfd(["-c", code], answer)
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("this host cannot: userfaultfd: ")
    assert "seccomp" in done.stdout


@needs_seccomp
def test_nothing_crashes_at_import_without_userfaultfd() -> None:
    """A8: every module of the package."""
    modules = [
        info.name
        for info in pkgutil.walk_packages(pcshare.__path__, "pcshare.")
        if not info.name.endswith("__main__") and not info.name.startswith("pcshare.core.")
    ]
    assert "pcshare.probe" in modules
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    done = support_seccomp.run_without_userfaultfd(["-c", code])
    assert done.returncode == 0, done.stderr


@needs_seccomp
@pytest.mark.parametrize(
    "arguments",
    [
        ["coordinator", "--name", "test-no-userfaultfd", "a=zero:1M"],
        ["run", "zero:1M", "--", "true"],
        ["demo"],
        ["stress", "--seconds", "1"],
        ["doctor"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_that_needs_userfaultfd_says_so(arguments: list[str]) -> None:
    """A8: exit code 3, what is missing and what mends it, no trace."""
    done = support_seccomp.run_without_userfaultfd(["-m", "pcshare", *arguments])
    told = done.stdout + done.stderr
    assert done.returncode == 3, told
    assert "userfaultfd" in told
    assert "seccomp" in told
    assert "Traceback" not in told


@needs_seccomp
def test_commands_that_need_no_userfaultfd_work_without() -> None:
    """A8."""
    for arguments in (["--help"], ["status", "--json"]):
        done = support_seccomp.run_without_userfaultfd(["-m", "pcshare", *arguments])
        assert done.returncode == 0, done.stderr
