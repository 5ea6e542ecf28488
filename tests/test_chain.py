"""Two coordinators in a chain, each in a network namespace of its own: what one has is the other's source, and the wire
between them may fail (P1, P3, P6)."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pcshare
from support import needs, wait_until
from support_coordinator import Serving, coordinator
from support_serving import PAGE, make_file

N_PAGES = 600
LENGTH = N_PAGES * PAGE - 99
WAIT_S = 60.0  # what was sent in vain is sent again after seconds
NETWORK_BITS = 30


@dataclass(frozen=True)
class Host:
    """A network namespace with one end of a wire."""

    name: str  # of the namespace and of its end
    address: str

    @property
    def within(self) -> list[str]:
        """What runs a command there."""
        return ["ip", "netns", "exec", self.name]

    def set_wire(self, state: str) -> None:
        """ "up" or "down": nobody hears of it but by silence."""
        _ip("-n", self.name, "link", "set", self.name, state)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """With a wire between them, gone afterwards whatever happens."""
    needs(None if os.geteuid() == 0 else "network namespaces (root)")
    needs(None if shutil.which("ip") else "ip (package iproute2)")
    one, other = (Host(f"pcs{os.getpid()}{i}", f"192.0.2.{i}") for i in (1, 2))
    with contextlib.ExitStack() as removing:
        for host in (one, other):
            needs(_lack_of_namespace(host.name))
            removing.callback(_ip, "netns", "delete", host.name)
        _ip("link", "add", one.name, "netns", one.name, "type", "veth", "peer", "name", other.name, "netns", other.name)
        for host in (one, other):
            _ip("-n", host.name, "address", "add", f"{host.address}/{NETWORK_BITS}", "dev", host.name)
            host.set_wire("up")
        yield one, other


def _lack_of_namespace(name: str) -> str | None:
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    return f"network namespaces ({done.stderr.strip()})" if done.returncode else None


def is_away(served: Serving) -> bool:
    block = served.block("data")
    return block.state == "PAUSED" and " is away: " in block.reason


def test_a_chain_of_two_hosts_outlives_its_wire(runtime_dir: Path, tmp_path: Path, rng: random.Random) -> None:
    source = make_file(tmp_path, rng, LENGTH)
    content = source.read_bytes()
    with (
        two_hosts() as (near, far),
        coordinator(
            f"data={source}", options=["--stream=lazy", f"--export={near.address}:10809"], within=near.within
        ) as first,
        coordinator(
            f"data=nbd://{near.address}/data#timeout=3s", options=["--stream=lazy"], within=far.within
        ) as second,
        pcshare.attach(second.name) as block,
        ThreadPoolExecutor(1) as reading,
    ):
        half = LENGTH // 2
        block.ensure(slice(0, half))
        assert memoryview(block)[:half] == content[:half]
        assert N_PAGES // 2 <= first.block("data").received_pages < N_PAGES
        near.set_wire("down")
        pending = reading.submit(block.ensure, slice(half, LENGTH))
        wait_until(lambda: is_away(second), "the second to see that nobody answers", WAIT_S)
        assert not pending.done()
        assert second.status().state == "PAUSED"
        assert first.block("data").state == "RUNNING"
        assert memoryview(block)[:half] == content[:half]  # what is here is here
        near.set_wire("up")
        pending.result(WAIT_S)
        assert bytes(block) == content
        assert second.wait_for_state("END").reason == ""
        assert first.block("data").received_pages == N_PAGES
