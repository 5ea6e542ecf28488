"""A real QEMU hands the memory of a running machine over: whole, byte for byte, in each of its ways.

The guest writes all of its memory without end. On the source it stands still once post-copy has begun, so pmemsave says
what the blocks must hold; helpers read them all the time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from support import wait_until
from support_coordinator import Serving, coordinator
from support_qemu import (
    BIOS,
    BIOS_RANGE,
    COMPLETED,
    DOWNTIME_LIMIT_MS,
    MIB,
    PAGE,
    POSTCOPY,
    PREEMPT,
    RAM,
    RETURN_PATH,
    ROM_HOLE,
    UNLIMITED,
    Guest,
    Qemu,
    assert_same_memory,
)
from support_serving import HelperProcess, Pending

WAIT_S = 30.0
N_TOUCHERS = 3
DIGEST_BYTES = 16
STATUS_TIMEOUT_S = 20.0

# What a helper does that touches pages at random until it is told to stop: page -> what it saw there, each time.
TOUCHING = f"""
import hashlib, random, threading
stop = threading.Event()
def touch(seed, n_max):
    rng, seen = random.Random(seed), {{}}
    while n_max > 0 and not (seen and stop.is_set()):
        page = rng.randrange(len(b) // {PAGE})
        digest = hashlib.blake2b(read(b, page * {PAGE}, {PAGE}), digest_size={DIGEST_BYTES}).digest()
        seen.setdefault(page, set()).add(digest)
        n_max -= 1
    return seen
"""
ENDLESS = 1 << 62
PASSES = 64 * MIB  # bytes a second: one pass over the guest's memory a second, in which it always writes
TRICKLE = 32 << 10  # less than a page in each 0.1 s for which the source counts: it sends one, the first that is wanted

with_and_without_preempt = pytest.mark.parametrize(
    "capabilities", [(POSTCOPY,), (POSTCOPY, PREEMPT)], ids=["one channel", "preempt"]
)


class Receiver:
    """A coordinator that listens for a migration, and helpers of its."""

    def __init__(self, served: Serving, path: Path, helpers: contextlib.ExitStack) -> None:
        self.served = served
        self.uri = f"unix:{path}"
        self._helpers = helpers

    def helper(self) -> HelperProcess:
        return self._helpers.enter_context(HelperProcess(self.served.socket))

    def attaching(self) -> tuple[HelperProcess, Pending]:
        """A helper that has been told to attach to the guest's RAM; before LISTEN that takes its time."""
        helper = self.helper()
        return helper, helper.start(f"b = attach({RAM!r}, timeout_s={WAIT_S})")

    def block(self, idstr: str = RAM) -> Any:
        return self.served.block(idstr)

    def received_pages(self) -> int:
        """Of the guest's RAM; 0 where it has not been announced yet."""
        return sum(block.received_pages for block in self.served.status().blocks if block.idstr == RAM)

    def demand_pages(self) -> int:
        return sum(block.demand_pages for block in self.served.status().blocks if block.idstr == RAM)

    def wait_for_state(self, state: str) -> None:
        wait_until(lambda: self.served.status().state == state, f"state {state}: {self.served.status()}", WAIT_S)

    def status(self) -> dict[str, Any]:
        """What `pcshare status --json` says."""
        command = [sys.executable, "-m", "pcshare", "status", self.served.name, "--json"]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=STATUS_TIMEOUT_S)
        report: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
        return report


@contextlib.contextmanager
def receiving(folder: Path, options: Sequence[str] = ()) -> Iterator[Receiver]:
    path = folder / "migration.sock"
    with coordinator(f"qemu+unix:{path}", options=options) as served, contextlib.ExitStack() as helpers:
        yield Receiver(served, path, helpers)


@pytest.fixture
def receiver(runtime_dir: Path) -> Iterator[Receiver]:
    with receiving(runtime_dir) as made:
        yield made


class Touchers:
    """Helpers that touch pages of the guest's RAM at random, from LISTEN on. They attach before the source comes."""

    def __init__(self, receiver: Receiver, n: int, seed: int) -> None:
        self._attaching = [receiver.attaching() for _ in range(n)]
        self._seed = seed
        self._touching: list[tuple[HelperProcess, Pending]] = []
        self._seen: list[dict[int, set[bytes]]] = []

    def assert_waiting_for_listen(self) -> None:
        """A page that is present is read without any fault: nobody may have the memory yet."""
        assert not any(attached.is_done() for _, attached in self._attaching)

    def start(self, n_max: int = ENDLESS) -> None:
        for number, (helper, attached) in enumerate(self._attaching):
            attached.result()
            helper.do(TOUCHING)
            self._touching.append((helper, helper.start(f"touch({self._seed + number}, {n_max})")))

    def wait(self) -> list[dict[int, set[bytes]]]:
        """What each saw, when they have touched as often as they were told to."""
        self._seen = self._seen or [touching.result() for _, touching in self._touching]
        return self._seen

    def finish(self) -> list[dict[int, set[bytes]]]:
        for helper, _ in self._touching:
            helper.do("stop.set()")
        return self.wait()

    @property
    def helper(self) -> HelperProcess:
        return self._attaching[0][0]


def assert_saw(seen: list[dict[int, set[bytes]]], expected: bytes) -> None:
    """P1: what was read was there, at any time."""
    assert all(seen), "a helper touched nothing"
    hole = range(ROM_HOLE.start // PAGE, ROM_HOLE.stop // PAGE)
    for pages in seen:
        for page, digests in pages.items():
            content = expected[page * PAGE : (page + 1) * PAGE]
            right = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
            assert page in hole or digests == {right}, f"page {page:#x} was read wrong"


def assert_whole(receiver: Receiver, helper: HelperProcess, expected: bytes) -> None:
    """Every byte of RAM, by way of a helper that is attached as b."""
    receiver.wait_for_state("END")
    assert receiver.block().fraction == 1.0
    assert receiver.block().foreign_pages == 0
    assert_same_memory(helper.do("bytes(b)"), expected)


def assert_all_came(receiver: Receiver, source: Qemu, touchers: Touchers, content: bytes) -> dict[str, Any]:
    """The end of every post-copy; what the source says of it."""
    said = source.wait_for_migration(COMPLETED)
    assert_saw(touchers.finish(), content)
    assert_whole(receiver, touchers.helper, content)
    return said


# -- precopy


@pytest.mark.parametrize("capabilities", [(), (RETURN_PATH,), (POSTCOPY,)], ids=["bare", "return path", "post-copy"])
def test_precopy_alone_hands_over_a_machine(receiver: Receiver, tmp_path: Path, capabilities: tuple[str, ...]) -> None:
    """E3, G1: pages that come many times; the last one counts. Nobody has the memory before all is there."""
    helper, attached = receiver.attaching()
    with Qemu(Guest(), tmp_path) as source:
        source.set_capabilities(*capabilities)
        source.set_parameters(downtime_limit=1, max_bandwidth=PASSES)
        source.migrate(receiver.uri)
        source.wait_for_passes(3)
        assert not attached.is_done()
        source.set_parameters(downtime_limit=DOWNTIME_LIMIT_MS, max_bandwidth=UNLIMITED)
        source.wait_for_migration(COMPLETED)
        attached.result()
        assert_whole(receiver, helper, source.memory())


def test_source_that_dies_before_listen_is_forgotten(receiver: Receiver, tmp_path: Path) -> None:
    """B1: nothing of what it sent survives; another one is taken."""
    helper, attached = receiver.attaching()
    with Qemu(Guest(), tmp_path, "first") as first:
        first.set_parameters(max_bandwidth=16 * MIB)
        first.migrate(receiver.uri)
        wait_until(lambda: first.migration().get("ram", {}).get("transferred", 0) > 2 * MIB, "a part of its memory")
        first.kill()
    assert not attached.is_done()
    with Qemu(Guest(ram_mib=32), tmp_path, "second") as second:
        second.set_parameters(downtime_limit=DOWNTIME_LIMIT_MS, max_bandwidth=UNLIMITED)
        second.migrate(receiver.uri)
        second.wait_for_migration(COMPLETED)
        attached.result()
        assert_whole(receiver, helper, second.memory())


# -- post-copy


@with_and_without_preempt
def test_postcopy_at_once(receiver: Receiver, tmp_path: Path, capabilities: tuple[str, ...], seed: int) -> None:
    """P1, D1, D3."""
    touchers = Touchers(receiver, N_TOUCHERS, seed)
    with Qemu(Guest(), tmp_path) as source:
        source.set_capabilities(*capabilities)
        source.set_parameters(max_postcopy_bandwidth=4 * MIB)
        source.migrate(receiver.uri)
        source.start_postcopy()
        touchers.start()
        wait_until(lambda: receiver.demand_pages() > 0, "a page that was asked for", WAIT_S)
        source.set_parameters(max_postcopy_bandwidth=32 * MIB)
        said = assert_all_came(receiver, source, touchers, source.memory())
        assert said["ram"]["postcopy-requests"] > 0


@with_and_without_preempt
def test_postcopy_after_precopy_passes(
    receiver: Receiver, tmp_path: Path, capabilities: tuple[str, ...], seed: int
) -> None:
    """B3, F1: what the guest wrote again is discarded, or helpers would read what it was."""
    touchers = Touchers(receiver, N_TOUCHERS, seed)
    with Qemu(Guest(), tmp_path) as source:
        source.set_capabilities(*capabilities)
        source.set_parameters(downtime_limit=1, max_bandwidth=PASSES, max_postcopy_bandwidth=32 * MIB)
        source.migrate(receiver.uri)
        source.wait_for_passes(3)
        touchers.assert_waiting_for_listen()
        source.start_postcopy()
        touchers.start()
        said = assert_all_came(receiver, source, touchers, source.memory())
        assert said["ram"]["precopy-bytes"] > source.guest.ram_size / 2


@with_and_without_preempt
def test_source_memory_in_huge_pages(
    receiver: Receiver,
    tmp_path: Path,
    huge_pages: Callable[[int], None],
    capabilities: tuple[str, ...],
    seed: int,
) -> None:
    """E1: host pages of 2 MiB are put together from target pages of 4 KiB."""
    guest = Guest(backend="hugetlb")
    huge_pages(2 * guest.n_huge_pages)
    touchers = Touchers(receiver, N_TOUCHERS, seed)
    with Qemu(guest, tmp_path) as source:
        source.set_capabilities(*capabilities)
        source.set_parameters(max_postcopy_bandwidth=32 * MIB)
        source.migrate(receiver.uri)
        source.start_postcopy()
        touchers.start()
        assert receiver.block().page_size == 2 * MIB
        assert_all_came(receiver, source, touchers, source.memory())


def test_huge_pages_after_precopy_passes(
    receiver: Receiver, tmp_path: Path, huge_pages: Callable[[int], None], seed: int
) -> None:
    """B3, E1, F3."""
    guest = Guest(backend="hugetlb", unwritten_mib=33)  # so that a host page is written in its first half only
    huge_pages(2 * guest.n_huge_pages)
    touchers = Touchers(receiver, N_TOUCHERS, seed)
    with Qemu(guest, tmp_path) as source:
        source.set_capabilities(POSTCOPY, PREEMPT)
        # Slow enough that no pass is over in the tenth of a second that the source takes for its measure.
        source.set_parameters(downtime_limit=1, max_bandwidth=100 * MIB, max_postcopy_bandwidth=32 * MIB)
        source.migrate(receiver.uri)
        source.wait_for_passes(3)
        source.start_postcopy()
        touchers.start()
        assert_all_came(receiver, source, touchers, source.memory())


def test_every_block_comes_with_its_name(receiver: Receiver, tmp_path: Path) -> None:
    """The firmware too is what the source has."""
    helper = receiver.helper()
    attached = helper.start(f"b = attach({RAM!r}, timeout_s={WAIT_S}); rom = attach({BIOS!r}, timeout_s={WAIT_S})")
    with Qemu(Guest(ram_mib=32, with_display=True), tmp_path) as source:
        source.set_capabilities(POSTCOPY)
        source.migrate(receiver.uri)
        source.start_postcopy()
        attached.result()
        source.wait_for_migration(COMPLETED)
        assert_whole(receiver, helper, source.memory())
        assert helper.do("bytes(rom)") == source.read_memory(BIOS_RANGE)
    idstrs = {block["idstr"] for block in receiver.status()["blocks"]}
    assert {RAM, BIOS, "pc.rom", "/rom@etc/acpi/tables"} <= idstrs


@pytest.mark.slow
@with_and_without_preempt
def test_most_pages_come_by_request_where_bandwidth_is_limited(
    receiver: Receiver, tmp_path: Path, capabilities: tuple[str, ...], seed: int
) -> None:
    """D3, D4: who waits is served, however little the stream may send."""
    touchers = Touchers(receiver, N_TOUCHERS, seed)
    with Qemu(Guest(), tmp_path) as source:
        source.set_capabilities(*capabilities)
        source.set_parameters(max_bandwidth=MIB, max_postcopy_bandwidth=TRICKLE)
        source.migrate(receiver.uri)
        source.start_postcopy()
        receiver.wait_for_state("RUNNING")
        before = receiver.block()
        touchers.start(n_max=25)
        content = source.memory()
        assert_saw(touchers.wait(), content)
        block = receiver.block()
        unasked = (block.stream_pages - block.zero_pages) - (before.stream_pages - before.zero_pages)
        assert block.demand_pages - before.demand_pages > unasked  # zeros take next to no bandwidth
        assert block.fraction < 1.0
        source.set_parameters(max_postcopy_bandwidth=UNLIMITED)
        said = assert_all_came(receiver, source, touchers, content)
        assert said["ram"]["postcopy-requests"] >= block.demand_pages / 2


@pytest.mark.slow
@with_and_without_preempt
def test_paused_and_recovered_three_times(
    receiver: Receiver, tmp_path: Path, capabilities: tuple[str, ...], seed: int
) -> None:
    """G4, D3, P3, P6: who waits goes on waiting, visibly; what was received is kept."""
    touchers = Touchers(receiver, N_TOUCHERS, seed)
    with Qemu(Guest(), tmp_path) as source:
        source.set_capabilities(*capabilities)
        source.set_parameters(max_postcopy_bandwidth=4 * MIB)
        source.migrate(receiver.uri)
        source.start_postcopy()
        touchers.start()
        content = source.memory()
        for _ in range(3):
            _wait_for_pages(receiver, 100)
            source.pause_migration()
            _wait_until_paused_with_waiters(receiver, N_TOUCHERS)
            source.resume_migration(receiver.uri)
            receiver.wait_for_state("RUNNING")
        source.set_parameters(max_postcopy_bandwidth=UNLIMITED)
        assert_all_came(receiver, source, touchers, content)


def _wait_for_pages(receiver: Receiver, n: int) -> None:
    wanted = receiver.received_pages() + n
    wait_until(lambda: receiver.received_pages() >= wanted, f"{n} more pages", WAIT_S)


def _wait_until_paused_with_waiters(receiver: Receiver, n_waiting: int) -> None:
    receiver.wait_for_state("PAUSED")
    assert receiver.block().reason
    wait_until(
        lambda: sum(helper.waiting for helper in receiver.served.status().helpers) == n_waiting,
        "every helper to wait for a page",
        WAIT_S,
    )


def test_mostly_zeros(receiver: Receiver, tmp_path: Path, seed: int) -> None:
    """E2: pages that nobody ever wrote."""
    guest = Guest(ram_mib=256, unwritten_mib=224)
    touchers = Touchers(receiver, N_TOUCHERS, seed)
    with Qemu(guest, tmp_path) as source:
        source.set_capabilities(POSTCOPY)
        source.migrate(receiver.uri)
        source.start_postcopy()
        touchers.start()
        assert_all_came(receiver, source, touchers, source.memory())


# -- what these tests rest on


@with_and_without_preempt
def test_qemu_receives_what_qemu_sends(tmp_path: Path, runtime_dir: Path, capabilities: tuple[str, ...]) -> None:
    """Where this fails the fault is not the coordinator's: the receiver is another QEMU."""
    uri = f"unix:{runtime_dir}/migration.sock"
    with Qemu(Guest(), tmp_path) as source, Qemu(Guest(), tmp_path, "sink", incoming=uri, paused=True) as sink:
        for end in (source, sink):
            end.set_capabilities(*capabilities)
        source.migrate(uri)
        source.start_postcopy()
        source.wait_for_migration(COMPLETED)
        sink.wait_for_migration(COMPLETED)
        assert_same_memory(sink.memory(), source.memory())
        sink.execute("cont")
        sink.wait_for_rounds(2)
