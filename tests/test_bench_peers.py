"""bench.peers: nbdfuse and QEMU do in small what they are measured at, and what is made of their figures.

How fast anything is here is no test's business.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pcshare.bench import peer_nbdfuse, peer_qemu, qemu
from pcshare.bench.contest import Contest
from pcshare.bench.lab import HUGE_PAGE, TOOLS, Lab
from pcshare.bench.run import contests_of, play
from pcshare.errors import PcshareError
from support import needs

SHRINK = 64


@pytest.fixture
def lab(tmp_path: Path, runtime_dir: Path) -> Iterator[Lab]:
    with Lab(tmp_path, shrink=SHRINK) as made:
        yield made


def need(*tools: str) -> None:
    for tool in tools:
        needs(None if shutil.which(tool) else f"{tool} (Debian: {TOOLS[tool]})")


def contest_named(lab: Lab, name: str) -> Contest:
    return next(contest for contest in contests_of("peers", lab) if contest.name == name)


def test_each_peer_says_which_programs_it_needs(lab: Lab) -> None:
    for contest in contests_of("peers", lab):
        assert set(contest.needs) == ({"qemu-system-x86_64"} if "QEMU" in contest.name else set(peer_nbdfuse.NEEDS))


# -- nbdfuse


def test_file_that_nbdfuse_shows_is_the_servers_and_goes(lab: Lab) -> None:
    need(*peer_nbdfuse.NEEDS)
    path = lab.file(2 * HUGE_PAGE)
    for _ in range(2):
        with lab.nbdkit("file", str(path)) as uri, peer_nbdfuse._mounted(lab, uri) as target:
            shown = Path(target.removeprefix("file:"))
            assert shown.read_bytes() == path.read_bytes()
            folder = shown.parent
        assert not folder.exists()


def test_mount_goes_when_the_measurement_fails(lab: Lab) -> None:
    need(*peer_nbdfuse.NEEDS)
    with (
        pytest.raises(PcshareError, match="no such program"),
        lab.nbdkit("file", str(lab.file(2 * HUGE_PAGE))) as uri,
        peer_nbdfuse._mounted(lab, uri),
    ):
        raise PcshareError("no such program")
    assert not (lab.folder / "fuse").exists()


@pytest.mark.parametrize("job", ["touches at random", "scan", "fill"])
@pytest.mark.parametrize("server", [peer_nbdfuse.FAST, peer_nbdfuse.SLOW], ids=["fast", "slow"])
def test_nbdfuse_and_pcshare_do_the_same_job(lab: Lab, server: peer_nbdfuse.Server, job: str) -> None:
    need(*peer_nbdfuse.NEEDS)
    played = play(contest_named(lab, f"peers, nbdfuse, {job}, {server.what}"), 1, lambda _: None)
    for found in played.results():
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in found.ratios)


# -- QEMU


def test_reader_of_qemu_touches_the_pages_of_the_other_one() -> None:
    """As bench_common.h computes them."""
    state = 3 * 2654435761 + 88172645463325252
    pages = []
    for _ in range(50):
        for shift in (13, -7, 17):
            state ^= (state << shift if shift > 0 else state >> -shift) % (1 << 64)
        pages.append(state % 1000)
    assert list(peer_qemu.random_pages(50, 3, 1000)) == pages


def test_faults_that_waited_for_the_source_are_told_apart() -> None:
    figures = peer_qemu.fault_figures([100.0] * 96 + [5000.0] + [90_000.0] * 3)
    assert (figures["p50"], figures["p99"], figures["p99_awake"]) == (100.0, 90_000.0, 5000.0)
    assert figures["asleep_percent"] == pytest.approx(3)
    assert "p99_awake" not in peer_qemu.fault_figures([90_000.0])
    with pytest.raises(PcshareError, match="no page was missing"):
        peer_qemu.fault_figures([])


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["Unix socket", "TCP"])
@pytest.mark.parametrize("channel", ["one channel", "preempt"])
def test_qemu_and_pcshare_receive_the_same_migration(lab: Lab, channel: str, transport: str) -> None:
    need("qemu-system-x86_64")
    played = play(contest_named(lab, f"peers, QEMU, {channel}, {transport}"), 1, lambda _: None)
    for found in played.results():
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in found.ratios), found.name


def test_qemu_that_does_not_start_is_told_in_its_words(tmp_path: Path) -> None:
    need("qemu-system-x86_64")
    with (
        pytest.raises(PcshareError, match=r"did not start: .*no-such-option"),
        qemu.Qemu(qemu.Guest(), tmp_path, options=["-no-such-option"]),
    ):
        pytest.fail("it runs")
