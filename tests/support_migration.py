"""A source of our own for tests of incoming migration: it plays QEMU's part over a socket and knows its memory.

Makes few claims about receivers: support_migration_link tells them of the return path; and a received bitmap has no
pages that were not sent, and whole host pages only.

Whatever it writes has a place (PLACES), and a test can tamper with it there:

    def script(source: Source) -> None:
        source.connect()
        source.precopy(share=0.5)
        source.enter_postcopy()
        source.main.break_at = source.main.written + 12_345
        with pytest.raises(LinkBroken):
            source.postcopy()
        source.recover()
        source.postcopy()
        source.finish()

    source = Source(to_unix(path), [SourceBlock("pc.ram", 64 << 20)], tamper={"footer:2": instead_of(b"no")})
    with playing(source, script) as play:
        ...                       # what helpers do meanwhile
        play.join()
    source.memory("pc.ram")       # what they must have seen

The script runs in a thread; what goes wrong in it, or on the return path, fails the test when the source is left. Legal
oddities are drawn from the seed: order, names that are repeated, zeros sent as bytes, end marks within a host page.
"""

from __future__ import annotations

import contextlib
import random
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from pcshare.migration.return_path import ReceivedBitmap, ResumeAck, Shut
from support_migration_bytes import (
    DESCRIPTION,
    DEVICE_STATE,
    END_OF_PAYLOAD,
    PLACES,
    RAM_ID,
    TARGET_PAGE,
    Tamper,
    command,
    configuration,
    footer,
    name,
    record,
    section,
)
from support_migration_link import (
    WAIT_TIMEOUT_S,
    Connect,
    HungUp,
    Link,
    LinkBroken,
    Preempt,
    Refused,
    ReturnPath,
    bitmap_length,
    to_tcp,
    to_unix,
)

__all__ = [
    "HUGE_PAGE",
    "HungUp",
    "LinkBroken",
    "Play",
    "Preempt",
    "Refused",
    "Source",
    "SourceBlock",
    "playing",
    "to_tcp",
    "to_unix",
]

HUGE_PAGE = 2 << 20
SECTION_PAGES = 32  # target pages in a PART, unless told
DISCARD_RANGES = 12
SCRIPT_TIMEOUT_S = 90.0


# -- memory


class SourceBlock:
    """A block and its content, which is drawn from the seed: some pages are zero, a few one byte over and over.

    unsent: a byte for each target page, 1: it has to be sent. sent: 1: it was, with this content or an older one."""

    def __init__(
        self,
        idstr: str,
        used_length: int,
        page_size: int = TARGET_PAGE,
        *,
        seed: int = 0,
        zero_share: float = 0.25,
        fill_share: float = 0.02,
    ) -> None:
        assert used_length % page_size == 0
        self.idstr = idstr
        self.used_length = used_length
        self.page_size = page_size
        self.page_count = used_length // TARGET_PAGE
        self.memory = bytearray(used_length)
        self.unsent = bytearray(b"\1") * self.page_count
        self.sent = bytearray(self.page_count)
        self._rng = random.Random(f"{seed}/{idstr}")
        self._writes = 0
        for page in range(self.page_count):
            kind = self._rng.random()
            if kind < fill_share:
                self.write(page, bytes([self._rng.randrange(1, 256)]) * TARGET_PAGE)
            elif kind >= fill_share + zero_share:
                self.scribble(page)

    @property
    def host_page_targets(self) -> int:
        return self.page_size // TARGET_PAGE

    def page(self, page: int) -> bytes:
        """The content of a target page."""
        return bytes(self.memory[page * TARGET_PAGE : (page + 1) * TARGET_PAGE])

    def write(self, page: int, content: bytes) -> None:
        """The machine writes: the page has to be sent (again)."""
        self.memory[page * TARGET_PAGE : (page + 1) * TARGET_PAGE] = content
        self.unsent[page] = 1

    def scribble(self, page: int) -> None:
        """Writes something that was never in any page."""
        self._writes += 1
        self.write(page, (struct.pack("<QQ", page, self._writes) + self._rng.randbytes(48)) * (TARGET_PAGE // 64))

    def make_unsent_whole(self) -> None:
        """In units of host pages, as a discard has to be."""
        step = self.host_page_targets
        for first in range(0, self.page_count, step):
            if any(self.unsent[first : first + step]):
                self.unsent[first : first + step] = b"\1" * step

    def unsent_ranges(self) -> Iterator[tuple[int, int]]:
        """(start, length) in bytes."""
        first = self.unsent.find(1)
        while first >= 0:
            end = self.unsent.find(0, first)
            end = self.page_count if end < 0 else end
            yield first * TARGET_PAGE, (end - first) * TARGET_PAGE
            first = self.unsent.find(1, end)


# -- the source


class Source:
    """A source. Its methods are the steps of a migration, to be called in a script in this order:

    connect, precopy (any number of times), then finish_precopy; or enter_postcopy, postcopy, finish. Each may raise
    HungUp, when the receiver goes, or LinkBroken; then recover() and postcopy() again. migrate() is all of it.

    with_postcopy: ADVISE is sent. rate_bytes_s: limits the stream in post-copy, requested pages on the preempt channel
    excepted. only_requested: nothing but requested pages comes in post-copy, until release()."""

    def __init__(
        self,
        connect: Connect,
        blocks: Sequence[SourceBlock],
        *,
        with_postcopy: bool = True,
        with_return_path: bool = True,
        preempt: Preempt = Preempt.NONE,
        with_switchover_start: bool = False,
        with_description: bool = True,
        device_state: bytes = DEVICE_STATE,
        subsections: Sequence[bytes] = (),
        machine: str = "pc-i440fx-7.2",
        section_pages: int = SECTION_PAGES,
        rate_bytes_s: float | None = None,
        only_requested: bool = False,
        in_order: bool = False,
        tamper: Mapping[str, Tamper] | None = None,
        seed: int = 0,
    ) -> None:
        self.blocks = {block.idstr: block for block in blocks}
        self.with_postcopy = with_postcopy
        self.with_return_path = with_return_path or with_postcopy
        self.preempt = preempt
        self.with_switchover_start = with_switchover_start
        self.with_description = with_description
        self.device_state = device_state
        self.subsections = tuple(subsections)
        self.machine = machine
        self.section_pages = section_pages
        self.rate_bytes_s = rate_bytes_s
        self.in_order = in_order
        self.tamper = dict(tamper or {})
        self.return_path = ReturnPath(self.blocks)
        self.links: list[Link] = []  # main, preempt
        self.places: Counter[str] = Counter()  # how often something was written there
        self.dropped_requests = 0  # target pages that were asked for and are on their way already
        self.requested_pages = 0  # target pages that were sent because they were asked for
        self._connect = connect
        self._only_requested = only_requested
        self._rng = random.Random(seed)
        self._in_section = 0  # records in the PART that is open
        self._section_open = False
        self._paced_from: tuple[float, int] | None = None
        self._cursor: tuple[SourceBlock, int] | None = None  # the target page that comes next, if any was asked for
        self._begun: tuple[str, int] | None = None  # block and host page that is under way on the main channel
        self._stream_from: dict[str, int] = {}  # where the stream goes on, in target pages

    def memory(self, idstr: str) -> bytes:
        return bytes(self.blocks[idstr].memory)

    @property
    def main(self) -> Link:
        return self.links[0]

    def migrate(self, precopy_share: float = 0.0) -> None:
        """A whole migration, with post-copy where ADVISE is sent."""
        self.connect()
        if precopy_share:
            self.precopy(precopy_share)
        if self.with_postcopy:
            self.enter_postcopy()
            self.postcopy()
            self.finish()
        else:
            self.finish_precopy()

    def release(self) -> None:
        """From any thread: also what nobody asked for comes now."""
        with self.return_path.changed:
            self._only_requested = False
            self.return_path.changed.notify_all()

    # -- writing

    def say(self, place: str, data: bytes, link: Link | None = None) -> None:
        """Writes at a place, tampered with where the test wants it: at "footer" every time, at "footer:0" once."""
        (link or self.main).write(self.tampered(place, data))

    def tampered(self, place: str, data: bytes) -> bytes:
        assert place in PLACES, place
        number = self.places[place]
        self.places[place] += 1
        tamper = self.tamper.get(f"{place}:{number}", self.tamper.get(place))
        return tamper(data) if tamper else data

    def _open_link(self) -> Link:
        link = Link(self._connect())
        self.links.append(link)
        return link

    def close(self) -> None:
        """Ends the connections; what was said stays."""
        for link in self.links:
            link.hang_up()
        self.return_path.join()
        for link in self.links:
            link.close()
        self.links.clear()

    def abort(self) -> None:
        """From any thread: the script ends with HungUp, if it has not ended."""
        for link in list(self.links):
            link.hang_up()

    # -- the beginning

    def connect(self) -> None:
        """Up to and with RAM START."""
        self._open_main()
        if self.preempt is Preempt.V7_2:
            self._open_link()
        self.say("header", struct.pack(">II", 0x5145564D, 3))
        self.say("configuration", configuration(self.machine, *self.subsections))
        if self.with_return_path:
            self.say("open-return-path", command(1))
            self.say("ping", command(2, struct.pack(">I", 1)))
            self.return_path.is_open = True
        if self.with_postcopy:
            page_sizes = 0
            for block in self.blocks.values():
                page_sizes |= block.page_size
            self.say("advise", command(3, struct.pack(">QQ", page_sizes, TARGET_PAGE)))
        self._ram_start()
        self.main.flush()

    def _open_main(self) -> None:
        assert not self.links, "close() first"
        link = self._open_link()
        self._in_section, self._section_open = 0, False
        self.return_path.begin(link.connection)

    def _ram_start(self) -> None:
        self.say("ram-start", section(0x01, RAM_ID, "ram", 0, 4))
        total = sum(block.used_length for block in self.blocks.values())
        self.say("ram-length", struct.pack(">Q", total | 0x04))
        for block in self.blocks.values():
            announced = name(block.idstr) + struct.pack(">Q", block.used_length)
            if self.with_postcopy and block.page_size != TARGET_PAGE:
                announced += struct.pack(">Q", block.page_size)
            self.say("block", announced)
        self.say("blocks-end", END_OF_PAYLOAD)
        self.say("footer", footer(RAM_ID))

    # -- pages

    def _record_of(self, link: Link, block: SourceBlock, page: int) -> bytes:
        content = block.page(page)
        block.unsent[page], block.sent[page] = 0, 1
        repeat = self._rng.random() < 0.05  # a name where none is needed
        idstr = None if link.last_idstr == block.idstr and not repeat else block.idstr
        link.last_idstr = block.idstr
        fill = content[0] if content == content[:1] * TARGET_PAGE else None
        if self._rng.random() < 0.1:
            fill = None  # zeros as bytes
        return record(page * TARGET_PAGE, content, idstr, fill)

    def send_page(self, block: SourceBlock, page: int) -> None:
        """One target page on the main channel, in a PART."""
        if not self._section_open:
            self.say("part", struct.pack(">BI", 0x02, RAM_ID))
            self._section_open = True
        self.say("record", self._record_of(self.main, block, page))
        self._in_section += 1
        if self._in_section >= self.section_pages:
            self.end_section()

    def end_section(self) -> None:
        """Ends the PART that is open, and lets it go."""
        if self._section_open:
            self.say("end-of-payload", END_OF_PAYLOAD)
            self.say("footer", footer(RAM_ID))
        self._in_section, self._section_open = 0, False
        self.main.flush()

    def _shuffled(self, pages: Iterable[tuple[SourceBlock, int]]) -> list[tuple[SourceBlock, int]]:
        listed = list(pages)
        if not self.in_order:
            self._rng.shuffle(listed)
        return listed

    # -- precopy

    def precopy(self, share: float = 1.0, rewrite_share: float = 0.1) -> None:
        """A pass: sends a share of what there is to send, and writes again to some of what was sent.

        A few pages are sent twice, first with a content that they no longer have."""
        for block, page in self._shuffled(
            (b, p) for b in self.blocks.values() for p in range(b.page_count) if b.unsent[p]
        ):
            if self._rng.random() < share:
                self.send_page(block, page)
                if self._rng.random() < rewrite_share:
                    block.scribble(page)
                    if self._rng.random() < 0.5:
                        self.send_page(block, page)
        self.end_section()

    def finish_precopy(self) -> None:
        """Sends the rest and the device state, and ends as a migration without post-copy does."""
        if self.with_switchover_start:
            self.say("switchover-start", command(11))
        self._ram_end(self._shuffled((b, p) for b in self.blocks.values() for p in range(b.page_count) if b.unsent[p]))
        self.say("device-state", self.device_state)
        self.say("eof", b"\x00")
        if self.with_description:
            self.say("description", b"\x06" + struct.pack(">I", len(DESCRIPTION)) + DESCRIPTION)
        self.main.flush()
        if self.with_return_path:
            self._wait_for_shut()
        self.close()

    def _ram_end(self, pages: Iterable[tuple[SourceBlock, int]]) -> None:
        self.say("ram-end", struct.pack(">BI", 0x03, RAM_ID))
        for block, page in pages:
            self.say("record", self._record_of(self.main, block, page))
        self.say("end-of-payload", END_OF_PAYLOAD)
        self.say("footer", footer(RAM_ID))

    # -- post-copy

    def enter_postcopy(self) -> None:
        """Discards, the package, and what surrounds it."""
        if self.preempt is Preempt.V8_0:
            self._open_link()
        for block in self.blocks.values():
            self._discard(block)
        self.say("ping", command(2, struct.pack(">I", 2)))
        package = self._package()
        self.say("packaged", command(7, struct.pack(">I", len(package))))
        self.main.write(package)
        self.say("ping", command(2, struct.pack(">I", 4)))
        self.main.flush()

    def _discard(self, block: SourceBlock) -> None:
        block.make_unsent_whole()
        ranges = list(block.unsent_ranges())
        for first in range(0, len(ranges), DISCARD_RANGES):
            some = b"".join(struct.pack(">QQ", *pair) for pair in ranges[first : first + DISCARD_RANGES])
            self.say("discard", command(6, b"\0" + name(block.idstr) + b"\0" + some))
        for start, length in ranges:  # the receiver has forgotten them
            block.sent[start // TARGET_PAGE : (start + length) // TARGET_PAGE] = bytes(length // TARGET_PAGE)

    def _package(self) -> bytes:
        switchover = command(11) if self.with_switchover_start else b""
        return switchover + b"".join(
            self.tampered(place, data)
            for place, data in (
                ("listen", command(4)),
                ("device-state", self.device_state),
                ("package-ping", command(2, struct.pack(">I", 3))),
                ("run", command(5)),
            )
        )

    def postcopy(self) -> None:
        """Sends what is left, what is asked for first, until nothing is left."""
        self._paced_from = None
        while True:
            block_page = self._next()
            if block_page is None:
                break
            self._send_host_page(*block_page)
        self.end_section()

    def finish(self) -> None:
        """The end of a post-copy: waits until the receiver says that it has everything."""
        if self.preempt is Preempt.V7_2:
            self.say("preempt-end", END_OF_PAYLOAD, self.links[1])
            self.links[1].flush()
        self._ram_end([])
        self.say("eof", b"\x00")
        self.main.flush()
        self._wait_for_shut()
        self.close()

    def _wait_for_shut(self) -> None:
        (answer, *_) = self.return_path.wait_for(Shut)
        if answer.status:
            raise Refused(f"the receiver ends with {answer}")

    def _has_unsent(self) -> bool:
        return any(1 in block.unsent for block in self.blocks.values())

    def _next(self) -> tuple[SourceBlock, int] | None:
        """The next host page for the main channel, after requests that came were served on the preempt channel."""
        while self._has_unsent():
            self._take_requests()
            if not self._has_unsent():
                break
            if self._cursor and self._cursor[0].unsent[self._cursor[1]]:
                chosen, self._cursor = self._cursor, None
                return chosen
            if not self._only_requested:
                return self._next_of_stream()
            self.end_section()  # what was asked for does not wait for more
            self._wait_for_request(None)
        return None

    def _next_of_stream(self) -> tuple[SourceBlock, int]:
        """The page after the one that was sent last; now and then anywhere."""
        blocks = [block for block in self.blocks.values() if 1 in block.unsent]
        block = next((b for b in blocks if b.idstr == self.main.last_idstr), blocks[0])
        start = self._stream_from.get(block.idstr, 0)
        if not self.in_order and self._rng.random() < 0.02:
            block = self._rng.choice(blocks)
            start = self._rng.randrange(block.page_count)
        page = block.unsent.find(1, start)
        return block, block.unsent.find(1) if page < 0 else page

    def _take_requests(self) -> None:
        """Sends what was asked for on the preempt channel; without one, the first request is what comes next."""
        while True:
            with self.return_path.changed:
                if not self.return_path.requests or (self._cursor and len(self.links) == 1):
                    return
                idstr, first, count = self.return_path.requests.popleft()
            block = self.blocks[idstr]
            wanted = [page for page in range(first, first + count) if block.unsent[page]]
            self.dropped_requests += count - len(wanted)
            self.requested_pages += len(wanted)
            if not wanted:
                continue
            if len(self.links) == 1:
                self._cursor = (block, wanted[0])
                if len(wanted) > block.host_page_targets:  # the rest of a long one after it
                    rest = wanted[0] // block.host_page_targets * block.host_page_targets + block.host_page_targets
                    with self.return_path.changed:
                        self.return_path.requests.appendleft((idstr, rest, first + count - rest))
                    self.requested_pages -= first + count - rest
                return
            self._send_urgently(block, wanted)

    def _send_urgently(self, block: SourceBlock, wanted: Sequence[int]) -> None:
        link = self.links[1]
        for page in wanted:
            if not self._is_begun(block, page):
                self.say("preempt-record", self._record_of(link, block, page), link)
        link.flush()

    def _is_begun(self, block: SourceBlock, page: int) -> bool:
        """Whether the page's host page is on its way on the main channel: it ends there."""
        return self._begun == (block.idstr, page // block.host_page_targets)

    def _send_host_page(self, block: SourceBlock, page: int) -> None:
        """A host page, whole; an end mark, or pages of others on the preempt channel, may fall in between."""
        step = block.host_page_targets
        first = page // step * step
        self._begun = (block.idstr, first // step)
        for target in range(first, first + step):
            assert block.unsent[target], "a host page is sent whole"
            self.send_page(block, target)
            if len(self.links) > 1 and step > 1 and target % 64 == 0:
                self._take_requests()
        self._begun = None
        self._stream_from[block.idstr] = first + step
        self._pace()

    def _pace(self) -> None:
        """Waits until the limit allows more; requests are served meanwhile on the preempt channel."""
        if self.rate_bytes_s is None:
            return
        if self._paced_from is None:
            self._paced_from = (time.monotonic(), self.main.written)
        since, written = self._paced_from
        due = since + (self.main.written - written) / self.rate_bytes_s
        if due > time.monotonic():
            self.end_section()
        while (left_s := due - time.monotonic()) > 0:
            if len(self.links) > 1:
                self._take_requests()
            if not self._wait_for_request(left_s):
                return

    def _wait_for_request(self, timeout_s: float | None) -> bool:
        """False: none came in the time. timeout_s None: until release() too; HungUp if the receiver goes."""
        path = self.return_path
        known = len(path.requests) if len(self.links) == 1 and timeout_s is not None else 0

        def is_over() -> bool:
            return path.hung_up or len(path.requests) > known or (timeout_s is None and not self._only_requested)

        with path.changed:
            came = path.changed.wait_for(is_over, WAIT_TIMEOUT_S if timeout_s is None else timeout_s)
            if path.hung_up:
                raise HungUp("while the source waits for requests")
        assert came or timeout_s is not None, "nobody asks for a page"
        return came

    # -- recovery

    def recover(self) -> None:
        """A new connection after a break, up to where postcopy() goes on: only with what the receiver lacks."""
        self.begin_recovery()
        self.ask_bitmaps()
        if self.preempt is Preempt.V8_0:
            self._open_link()
        self.resume()

    def begin_recovery(self) -> None:
        self.close()
        self._cursor = self._begun = None
        self._open_main()
        if self.preempt is Preempt.V7_2:
            self._open_link()

    def ask_bitmaps(self) -> None:
        for block in self.blocks.values():
            self.say("bitmap-wanted", command(10, name(block.idstr)))
        self.main.flush()
        answers = self.return_path.wait_for(ReceivedBitmap, len(self.blocks))
        assert {answer.idstr for answer in answers} == set(self.blocks), "not one bitmap of each block"
        for answer in answers:
            self._take_bitmap(self.blocks[answer.idstr], answer.bitmap)

    def _take_bitmap(self, block: SourceBlock, bitmap: bytes) -> None:
        assert len(bitmap) == bitmap_length(block), f"a bitmap of {len(bitmap)} bytes for {block.page_count} pages"
        for page in range(block.page_count):
            received = bitmap[page // 8] >> page % 8 & 1
            assert block.sent[page] or not received, f"page {page} of {block.idstr} was received but never sent"
            block.unsent[page] = 1 - received
        whole = bytes(block.unsent)
        block.make_unsent_whole()
        assert whole == block.unsent, f"half a host page of {block.idstr} was received"

    def resume(self) -> None:
        self.say("resume", command(9))
        self.main.flush()
        (answer, *_) = self.return_path.wait_for(ResumeAck)
        assert answer.value == 1, answer

    # -- refusal

    def is_refused(self, action: Callable[[], object]) -> None:
        """Does something that the receiver must not take: it hangs up, and never says that all is well."""
        with contextlib.suppress(HungUp):
            action()
        if self.links:
            with contextlib.suppress(HungUp):
                self.main.flush()
            self.return_path.wait_for_hang_up()
        last = self.return_path.messages(Shut, self.return_path.connection_count)
        assert all(answer.status for answer in last), "the receiver says that all is well"
        self.close()


# -- running it


class Play:
    """A script that runs."""

    def __init__(self, source: Source, script: Callable[[], object]) -> None:
        self._source = source
        self._script = script
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="migration-source", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            self._script()
        except BaseException as error:
            self._error = error

    def join(self, timeout_s: float = SCRIPT_TIMEOUT_S) -> None:
        """Waits for the script and raises what went wrong in it, or on the return path."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"the source's script does not end within {timeout_s:g} s"
        errors = [*self._source.return_path.errors, *([self._error] if self._error else [])]
        if errors:
            raise errors[0]

    def end(self) -> None:
        """Whatever the script does, it ends."""
        self._source.abort()
        self._source.release()
        self._thread.join(SCRIPT_TIMEOUT_S)
        self._source.close()


@contextlib.contextmanager
def playing(source: Source, script: Callable[[Source], object] | None = None) -> Iterator[Play]:
    """Runs a script, or source.migrate(), while the test does something else; at the end it has ended well.

    A test that fails before ends it."""
    play = Play(source, source.migrate if script is None else lambda: script(source))
    play.start()
    try:
        yield play
        play.join()
    finally:
        play.end()
