"""probe: what this host offers for userfaultfd, what is missing for the main job, and the command that mends it.

Looks and tries on throw-away fds and one throw-away page; changes nothing on the host, knows no coordinator. Importing
it works everywhere: a host that lacks something says so when it is asked, not before.
"""

from __future__ import annotations

import errno
import mmap
import os
import platform
import resource
import shutil
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pcshare import runtime, uffd
from pcshare.errors import HostError, PcshareError, UsageError
from pcshare.fds import USERFAULTFD_DEVICE
from pcshare.units import format_bytes

FEATURES_REQUIRED = ("MISSING_SHMEM", "THREAD_ID")
FEATURES_OPTIONAL = {
    "MISSING_HUGETLBFS": "blocks with huge pages (--page-size 2M)",
    "POISON": "the policy poison: a touch of a lost page as SIGBUS",
    "MINOR_SHMEM": "finding a foreign page before a helper reads it (--strict)",
    "MINOR_HUGETLBFS": "the same in blocks with huge pages",
    "EVENT_REMOVE": "pages that a writable helper removes staying zeros",
    "EVENT_UNMAP": "following what a writable helper unmaps",
    "EVENT_REMAP": "following what a writable helper moves",
}
FEATURES_ALWAYS = ("MISSING_SHMEM", "THREAD_ID", "MISSING_HUGETLBFS", "POISON")
FEATURES_WRITING = ("EVENT_REMOVE", "EVENT_UNMAP", "EVENT_REMAP")  # not FORK, which needs a privilege
FEATURES_STRICT = ("MINOR_SHMEM", "MINOR_HUGETLBFS")
IOCTLS_REQUIRED = ("REGISTER", "UNREGISTER")
PAGE_IOCTLS_REQUIRED = ("WAKE", "COPY", "ZEROPAGE")
HUGE_PAGE_SIZE_MAX = 2 << 20  # RAMBLOCK_PAGE_SIZE_MAX: what the core has a zero page for
KERNEL_NOWAIT = (6, 10)  # reads of a uffd that cannot block whatever its owner does
SHM_FREE_BYTES_MIN = 4 << 20  # status segments of a few coordinators

CAP_IPC_LOCK = 14
CAP_SYS_PTRACE = 19
SECCOMP_FILTER = 2
KILLED = -1  # in place of an errno: the attempt ended its process

_UNPRIVILEGED = Path("/proc/sys/vm/unprivileged_userfaultfd")
FEATURES_HUGE = frozenset({"MISSING_HUGETLBFS"})
FEATURES_HUGE_STRICT = FEATURES_HUGE | {"MINOR_HUGETLBFS"}
_SHMEM_THP = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_HUGE_PAGES = Path("/sys/kernel/mm/hugepages")


@dataclass(frozen=True)
class Device:
    """/dev/userfaultfd as it lies there."""

    owner_uid: int
    owner_gid: int
    mode: int
    accessible: bool

    def __str__(self) -> str:
        return f"mode {self.mode:04o}, owner uid {self.owner_uid} gid {self.owner_gid}"


@dataclass(frozen=True)
class HugePages:
    """One size of huge pages, in pages."""

    size: int
    total: int
    free: int
    reserved: int = 0  # of the free ones: promised to mappings that have not touched them yet

    @property
    def available(self) -> int:
        return self.free - self.reserved


@dataclass(frozen=True)
class HostReport:
    """What was found. The three errnos say how each way to a uffd ended: 0 it works, KILLED it ended its process."""

    kernel: str
    machine: str
    uid: int
    page_size: int
    device: Device | None
    device_errno: int
    system_call_errno: int
    user_mode_errno: int
    user_mode_only: bool
    features: tuple[str, ...]
    ioctls: tuple[str, ...]
    page_ioctls: tuple[str, ...]
    page_error: str  # why the page could not be tried, or ""
    unprivileged_userfaultfd: bool | None
    seccomp_mode: int
    capabilities: tuple[str, ...]
    thp_shmem: str
    huge_pages: tuple[HugePages, ...]
    memlock_bytes: int | None  # None: no limit
    shm_free_bytes: int | None  # None: not there, or not writable

    @property
    def has_uffd(self) -> bool:
        return 0 in (self.device_errno, self.system_call_errno, self.user_mode_errno)

    def to_json(self) -> dict[str, Any]:
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        device = {**vars(self.device), "mode": f"{self.device.mode:04o}"} if self.device else None
        return {**told, "device": device, "huge_pages": [vars(pages) for pages in self.huge_pages]}


# --- looking --------------------------------------------------------------------------------------


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _status_field(name: str) -> str:
    for line in _line(Path("/proc/self/status")).splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return value.strip()
    return ""


def _device() -> Device | None:
    try:
        found = os.stat(USERFAULTFD_DEVICE)
    except OSError:
        return None
    accessible = os.access(USERFAULTFD_DEVICE, os.R_OK | os.W_OK, effective_ids=True)
    return Device(found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), accessible)


def _capabilities() -> tuple[str, ...]:
    mask = int(_status_field("CapEff") or "0", 16)
    return tuple(name for name, bit in (("IPC_LOCK", CAP_IPC_LOCK), ("SYS_PTRACE", CAP_SYS_PTRACE)) if mask >> bit & 1)


def _huge_pages() -> tuple[HugePages, ...]:
    found = []
    for path in _HUGE_PAGES.glob("hugepages-*kB"):
        size = int(path.name.removeprefix("hugepages-").removesuffix("kB")) << 10
        counts = [int(_line(path / f"{kind}_hugepages") or 0) for kind in ("nr", "free", "resv")]
        found.append(HugePages(size, *counts))
    return tuple(sorted(found, key=lambda pages: pages.size))


def _chosen(text: str) -> str:
    """The word in brackets of a sysfs choice."""
    return text.partition("[")[2].partition("]")[0] or text


def _shm_free_bytes() -> int | None:
    if not os.access(runtime.SHM_DIR, os.W_OK):
        return None
    return shutil.disk_usage(runtime.SHM_DIR).free


def _memlock_bytes() -> int | None:
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if soft == resource.RLIM_INFINITY else soft


# --- trying ---------------------------------------------------------------------------------------


def _tried(attempt: Callable[[], int], seccomp_mode: int) -> int:
    """The attempt's errno. Under a seccomp filter, which may kill who does what it forbids, a child makes it."""
    if seccomp_mode != SECCOMP_FILTER:
        return attempt()
    child = os.fork()
    if child == 0:
        os._exit(attempt() & 0xFF)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return KILLED if status < 0 else status


def _try_system_call() -> int:
    return uffd.try_system_call(user_mode_only=False)


def _try_user_mode() -> int:
    return uffd.try_system_call(user_mode_only=True)


def _try_page() -> tuple[int, str]:
    """Registers a page of shared memory and copies into it: the mask of ioctls it offers, and what went wrong."""
    size = mmap.PAGESIZE
    memfd = os.memfd_create("pcshare-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memfd, size)
        with mmap.mmap(memfd, size) as page, uffd.Uffd.open() as tried:
            tried.api(0)
            with uffd.with_host_addr(page) as host_addr:
                ioctls = tried.register(host_addr, size)
                content = b"p" * size
                failure = tried.copy(host_addr, content)[1] if ioctls & uffd.IOCTLS["COPY"] else 0
                tried.unregister(host_addr, size)
            if failure == 0 and ioctls & uffd.IOCTLS["COPY"] and page[:] != content:
                return ioctls, "a page that was copied does not read as it should"
            return ioctls, _copy_failure(failure)
    except (PcshareError, OSError) as error:
        return 0, str(error)
    finally:
        os.close(memfd)


def _copy_failure(code: int) -> str:
    if code == errno.EEXIST:  # made real while it was mapped
        return "a fresh page was there before it was placed: this process locks its memory (mlockall)"
    return f"copying a page failed: {os.strerror(code)}" if code else ""


def examine_host() -> HostReport:
    """Looks at everything and tries what can be tried."""
    seccomp_mode = int(_status_field("Seccomp") or 0)
    device_errno, system_call_errno, user_mode_errno = (
        _tried(attempt, seccomp_mode) for attempt in (uffd.try_device, _try_system_call, _try_user_mode)
    )
    offer = uffd.Offer(0, 0, True)
    page_ioctls, page_error = 0, ""
    killed = KILLED in (device_errno, system_call_errno, user_mode_errno)
    # The core tries the ways in this order, so one that works keeps it from one that kills.
    if 0 in (device_errno, system_call_errno, user_mode_errno) and not (killed and device_errno != 0):
        offer = uffd.probe()
        page_ioctls, page_error = _try_page()
    return HostReport(
        kernel=platform.release(),
        machine=platform.machine(),
        uid=os.geteuid(),
        page_size=mmap.PAGESIZE,
        device=_device(),
        device_errno=device_errno,
        system_call_errno=system_call_errno,
        user_mode_errno=user_mode_errno,
        user_mode_only=offer.user_mode_only,
        features=uffd.feature_names(offer.features),
        ioctls=uffd.ioctl_names(offer.ioctls),
        page_ioctls=uffd.ioctl_names(page_ioctls),
        page_error=page_error,
        unprivileged_userfaultfd={"0": False, "1": True}.get(_line(_UNPRIVILEGED)),
        seccomp_mode=seccomp_mode,
        capabilities=_capabilities(),
        thp_shmem=_chosen(_line(_SHMEM_THP)),
        huge_pages=_huge_pages(),
        memlock_bytes=_memlock_bytes(),
        shm_free_bytes=_shm_free_bytes(),
    )


# --- judging --------------------------------------------------------------------------------------

OK = "ok"
WARN = "warn"  # the main job works; something else does not
BAD = "bad"  # the main job does not work

THIS_USER = "this user"
OTHERS = "other users"
ALL = "everybody"

# How far faults are served.
FULL = "full"
USER_MODE = "user_mode"
NONE = "none"
REACH_TEXT = {
    FULL: "everywhere, inside system calls too",
    USER_MODE: "outside system calls only (read() or write() of a missing page gives EFAULT)",
    NONE: "not at all",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, how it stands, for whom, and the command that mends it ("": nothing to mend)."""

    what: str
    state: str
    found: str
    for_whom: str
    mend: str = ""

    def to_json(self) -> dict[str, str]:
        return dict(vars(self))


def _allow_all() -> str:
    return "sudo sysctl -w vm.unprivileged_userfaultfd=1"


def _errno_text(code: int) -> str:
    return "works" if code == 0 else "ends the process (seccomp)" if code == KILLED else os.strerror(code)


def _seccomp_is_likely(report: HostReport) -> bool:
    """Whether a filter, not the kernel, keeps the system call away: user-mode uffds need no privilege."""
    refused = report.user_mode_errno in (errno.EPERM, errno.EACCES, errno.ENOSYS, KILLED)
    return refused and report.seccomp_mode == SECCOMP_FILTER


def _mend_uffd(report: HostReport) -> str:
    if _seccomp_is_likely(report):
        return f"docker run --device {USERFAULTFD_DEVICE} IMAGE, or a seccomp profile that allows userfaultfd"
    if report.user_mode_errno == errno.ENOSYS:
        return "boot a kernel built with CONFIG_USERFAULTFD=y (5.11 or later); see: zgrep USERFAULTFD /proc/config.gz"
    return _allow_all()


def _find_uffd(report: HostReport) -> Finding:
    ways = (
        f"{USERFAULTFD_DEVICE}: {_errno_text(report.device_errno)}; "
        f"system call: {_errno_text(report.system_call_errno)}; "
        f"system call, user mode: {_errno_text(report.user_mode_errno)}"
    )
    if not report.has_uffd:
        return Finding("userfaultfd", BAD, ways, THIS_USER, _mend_uffd(report))
    if not report.features:
        ways += "; left untried, since one of the ways ends the process"
        return Finding("userfaultfd", BAD, ways, THIS_USER, _mend_uffd(report))
    return Finding("userfaultfd", OK, ways, THIS_USER)


def _find_system_calls(report: HostReport) -> Finding:
    if not report.user_mode_only:
        return Finding("where faults are served", OK, REACH_TEXT[FULL], THIS_USER)
    mend = f"sudo setfacl -m u:{report.uid}:rw {USERFAULTFD_DEVICE}, or for everybody: " if report.device else ""
    return Finding("where faults are served", WARN, REACH_TEXT[USER_MODE], THIS_USER, mend + _allow_all())


def _find_device(report: HostReport) -> Finding:
    if report.device is None:
        return Finding(USERFAULTFD_DEVICE, OK, "not there (Linux 6.1 or later has it); the system call serves", ALL)
    reach = "can be opened" if report.device.accessible else "cannot be opened"
    return Finding(USERFAULTFD_DEVICE, OK, f"{report.device}; {reach} by uid {report.uid}", THIS_USER)


def _find_others(report: HostReport) -> Finding:
    reach = access(report)["other_users"]
    what = "vm.unprivileged_userfaultfd"
    setting = {True: "1", False: "0", None: "not there"}[report.unprivileged_userfaultfd]
    if reach == FULL:
        return Finding(what, OK, f"{setting}; faults are served {REACH_TEXT[FULL]}", OTHERS)
    state = OK if report.device and report.device.accessible else WARN
    found = f"{setting}; on their own, faults are served {REACH_TEXT[reach]}"
    if state == OK:
        return Finding(what, state, f"{found}; a coordinator of this user offers its helpers the device", OTHERS)
    return Finding(what, state, found, OTHERS, _allow_all())


def _find_seccomp(report: HostReport) -> Finding:
    if report.seccomp_mode != SECCOMP_FILTER:
        return Finding("seccomp", OK, "no filter", THIS_USER)
    if not _seccomp_is_likely(report):
        return Finding("seccomp", OK, "a filter is installed and lets userfaultfd through", THIS_USER)
    state = WARN if report.has_uffd else BAD
    refusal = _refusal(report.user_mode_errno)
    found = f"a filter is installed, and the system call userfaultfd {refusal}: the filter is the likely cause"
    return Finding("seccomp", state, found, THIS_USER, _mend_uffd(report))


def _refusal(code: int) -> str:
    return "ends the process" if code == KILLED else f"is refused ({errno.errorcode.get(code, code)})"


def _find_kernel(report: HostReport) -> Finding:
    numbers = tuple(int(part) for part in report.kernel.split("-")[0].split(".")[:2] if part.isdigit())
    if numbers >= KERNEL_NOWAIT:
        return Finding("kernel", OK, f"{report.kernel} {report.machine}", ALL)
    found = f"{report.kernel}: before 6.10 a helper that makes its uffd blocking can hold a fault thread up"
    return Finding("kernel", WARN, found, ALL, "boot Linux 6.10 or later, or let only trusted helpers in")


def missing_features(report: HostReport) -> tuple[str, ...]:
    return tuple(name for name in FEATURES_REQUIRED if name not in report.features)


def missing_ioctls(report: HostReport) -> tuple[str, ...]:
    return tuple(name for name in IOCTLS_REQUIRED if name not in report.ioctls)


def missing_page_ioctls(report: HostReport) -> tuple[str, ...]:
    return tuple(name for name in PAGE_IOCTLS_REQUIRED if name not in report.page_ioctls)


_NEWER_KERNEL = "boot a kernel with CONFIG_USERFAULTFD=y and CONFIG_SHMEM=y, 5.11 or later"


def _find_features(report: HostReport) -> list[Finding]:
    """Of a host that gives a uffd at all: what the uffd can."""
    found = []
    missing = missing_features(report)
    text = f"missing: {', '.join(missing)}" if missing else ", ".join(report.features)
    found.append(Finding("features", BAD if missing else OK, text, ALL, _NEWER_KERNEL if missing else ""))
    for name, use in FEATURES_OPTIONAL.items():
        if name not in report.features:
            found.append(
                Finding(f"feature {name}", WARN, f"missing; without it there is no: {use}", ALL, _mend_feature(name))
            )
    lacking = (*missing_ioctls(report), *(f"{name} on a page of shared memory" for name in missing_page_ioctls(report)))
    text = report.page_error or (
        f"missing: {', '.join(lacking)}" if lacking else "all that are needed, and a page was placed"
    )
    found.append(
        Finding("ioctls", BAD if lacking or report.page_error else OK, text, ALL, _NEWER_KERNEL if lacking else "")
    )
    return found


def _mend_feature(name: str) -> str:
    return {
        "POISON": "boot Linux 6.6 or later",
        "MINOR_SHMEM": "boot Linux 5.14 or later",
        "MINOR_HUGETLBFS": "boot Linux 5.13 or later",
    }.get(name, "boot Linux 4.11 or later")


def _find_huge_pages(report: HostReport) -> Finding:
    pages = next((pages for pages in report.huge_pages if pages.size == HUGE_PAGE_SIZE_MAX), None)
    if pages is None:
        return Finding("huge pages", WARN, "this kernel has none of 2 MiB; --page-size 2M is refused", ALL)
    text = f"{pages.free} free of {pages.total}, {format_bytes(pages.size)} each"
    if pages.free:
        return Finding("huge pages", OK, text, ALL)
    return Finding(
        "huge pages", WARN, f"{text}; --page-size 2M has nothing to take", ALL, "sudo sysctl -w vm.nr_hugepages=64"
    )


def _find_thp(report: HostReport) -> Finding:
    if report.thp_shmem != "force":
        return Finding(
            "transparent huge pages", OK, f"{report.thp_shmem or 'not there'}; switched off for each block", ALL
        )
    found = "force: stays on also for blocks, which switch it off"
    return Finding("transparent huge pages", WARN, found, ALL, f"echo never | sudo tee {_SHMEM_THP}")


def _find_limits(report: HostReport) -> list[Finding]:
    memlock = "no limit" if report.memlock_bytes is None else format_bytes(report.memlock_bytes)
    held = ", ".join(report.capabilities) or "neither SYS_PTRACE nor IPC_LOCK held"
    found = [
        Finding("memlock", OK, f"{memlock}; pcshare locks no memory", THIS_USER),
        Finding("capabilities", OK, f"{held}; none is needed", THIS_USER),
    ]
    free = report.shm_free_bytes
    mend = f"sudo mount -t tmpfs -o mode=1777,size=64m tmpfs {runtime.SHM_DIR}"
    if free is None:
        found.append(Finding(str(runtime.SHM_DIR), BAD, "not there, or not writable", THIS_USER, mend))
    elif free < SHM_FREE_BYTES_MIN:
        mend = f"sudo mount -o remount,size=64m {runtime.SHM_DIR}"
        found.append(Finding(str(runtime.SHM_DIR), BAD, f"only {format_bytes(free)} free", THIS_USER, mend))
    else:
        found.append(Finding(str(runtime.SHM_DIR), OK, f"{format_bytes(free)} free", THIS_USER))
    return found


def _find_runtime_dir() -> Finding:
    try:
        path = runtime.runtime_dir()
    except HostError as error:
        return Finding("runtime directory", BAD, error.message, THIS_USER, error.hint or "")
    if path.exists() or os.access(path.parent, os.W_OK | os.X_OK):
        return Finding("runtime directory", OK, str(path), THIS_USER)
    return Finding(
        "runtime directory",
        BAD,
        f"{path} cannot be made",
        THIS_USER,
        f"mkdir -p {path.parent}, or unset XDG_RUNTIME_DIR",
    )


def access(report: HostReport) -> dict[str, str]:
    """How far faults are served (FULL, USER_MODE, NONE), for root, this_user and other_users."""
    this_user = NONE if not report.has_uffd else USER_MODE if report.user_mode_only else FULL
    if _seccomp_is_likely(report):
        return {"root": this_user, "this_user": this_user, "other_users": this_user}
    if not report.has_uffd and report.user_mode_errno == errno.ENOSYS:
        return {"root": NONE, "this_user": NONE, "other_users": NONE}
    open_to_all = report.unprivileged_userfaultfd or (report.device is not None and report.device.mode & 0o006 == 0o006)
    return {"root": FULL, "this_user": this_user, "other_users": FULL if open_to_all else USER_MODE}


def judge(report: HostReport) -> list[Finding]:
    """All findings, in the order in which they matter."""
    found = [_find_uffd(report)]
    if report.features:
        found += [_find_system_calls(report), *_find_features(report)]
    found += [_find_device(report), _find_others(report), _find_seccomp(report), _find_kernel(report)]
    found += [_find_huge_pages(report), _find_thp(report), *_find_limits(report), _find_runtime_dir()]
    return found


def wanted_features(offered: tuple[str, ...], *, writing: bool = False, strict: bool = False) -> int:
    """The features that a helper's uffd is opened with: what is used, as far as this kernel has it.

    Events only for who may write: a helper hangs in madvise, munmap or mremap until somebody reads them. Without
    POISON a helper whose coordinator is lost maps over its own pages, and would wait for itself with UNMAP."""
    wanted = {*FEATURES_ALWAYS, *(FEATURES_WRITING if writing else ()), *(FEATURES_STRICT if strict else ())}
    if "POISON" not in offered:
        wanted.discard("EVENT_UNMAP")
    return sum(uffd.FEATURES[name] for name in wanted.intersection(offered))


def is_strict(features: int) -> bool:
    """Whether helpers' uffds opened with these are registered for MINOR faults too."""
    return any(features & uffd.FEATURES[name] for name in FEATURES_STRICT)


def check_strict(page_size: int, report: HostReport) -> None:
    """Refuses --strict where this kernel cannot tell that a page is there before a helper reads it."""
    name = "MINOR_SHMEM" if page_size == report.page_size else "MINOR_HUGETLBFS"
    if name not in report.features:
        raise HostError(
            f"--strict needs the userfaultfd feature {name}, which this kernel does not offer",
            hint=f"{_mend_feature(name)}, or leave --strict out",
        )


def check_page_size(page_size: int, report: HostReport) -> None:
    """Refuses a block's page size that this host cannot serve."""
    if page_size <= 0 or page_size & page_size - 1:
        raise UsageError(f"a page size is a power of two, not {page_size}", hint="use 4K, or 2M for huge pages")
    if page_size == report.page_size:
        return
    sizes = [report.page_size, *(pages.size for pages in report.huge_pages if pages.size <= HUGE_PAGE_SIZE_MAX)]
    if page_size not in sizes:
        relation = "larger" if page_size > report.page_size else "smaller"
        raise HostError(
            f"a page size of {page_size} bytes is {relation} than this host's {report.page_size},"
            " and no size of huge pages here",
            hint=f"use one of {', '.join(map(str, sorted(sizes)))}",
        )
    if "MISSING_HUGETLBFS" not in report.features:
        raise HostError(
            f"pages of {page_size} bytes need the userfaultfd feature MISSING_HUGETLBFS,"
            " which this kernel does not offer",
            hint=f"use pages of {report.page_size} bytes, or {_mend_feature('MISSING_HUGETLBFS')}",
        )


def available_huge_pages(size: int = HUGE_PAGE_SIZE_MAX) -> int:
    """How many of that size are free now and promised to nobody; 0 where there are none."""
    return sum(pages.available for pages in _huge_pages() if pages.size == size)


def best_page_size(lengths: Iterable[int], report: HostReport, *, strict: bool) -> int:
    """For blocks of these lengths in bytes: huge pages where there are enough for all of them, else the host's own."""
    size, needed = HUGE_PAGE_SIZE_MAX, FEATURES_HUGE_STRICT if strict else FEATURES_HUGE
    available = sum(pages.available for pages in report.huge_pages if pages.size == size)
    enough = sum(-(-length // size) for length in lengths) <= available
    return size if enough and needed.issubset(report.features) else report.page_size


def require_host(page_size: int | None = None) -> HostReport:
    """What was found, on a host where the main job works; else HostError with what is missing and what mends it."""
    report = examine_host()
    bad = [finding for finding in judge(report) if finding.state == BAD]
    if bad:
        what = "; ".join(f"{finding.what}: {finding.found}" for finding in bad)
        mends = dict.fromkeys(finding.mend for finding in bad if finding.mend)
        raise HostError(f"this host cannot: {what}", hint="; ".join(mends) or None)
    if page_size is not None:
        check_page_size(page_size, report)
    return report
