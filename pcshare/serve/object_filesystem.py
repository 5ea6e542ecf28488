"""object_filesystem: an object that fsspec reads: what obstore does not know, and chains (zip://MEMBER::PATH).

Must not pass on bytes of another state of the object. Most of these libraries cannot ask for "this state or nothing":
the object is looked at again after each read; reads that end meanwhile share the next look. Some facts about fsspec:
 - file systems with async_impl may be used from many threads; the others often have one connection, and may not: each
   open file gets an instance of its own, and a chain, whose inner instances are shared, is read by one thread;
 - it keeps instances and listings: both caches must be off for whoever wants to see a change;
 - in a compressed archive each place is reached by unpacking all before it, from where the open file stands or from the
   beginning;
 - an archive knows what it read at the beginning: a change shows at the last link of the chain, where the bytes lie.
"""

from __future__ import annotations

import errno
import importlib
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pcshare.errors import HostError, PcshareError, SourceError
from pcshare.serve.object_reader import (
    INSTALL_HINT,
    OPEN_TIMEOUT_S,
    READS_MAX,
    Content,
    ObjectReader,
    Outage,
    changed,
    empty,
    no_such_object,
    package_missing,
    shorter,
)
from pcshare.sources.grammar import unknown_scheme
from pcshare.sources.shown import shown

FILES_MAX = 4  # open files of a file system without async_impl: servers limit connections

# The names under which file systems tell what makes this state of an object: sizes, sums, versions, times of writing.
_TELLING = re.compile(r"size|etag|md5|sha|crc|digest|checksum|version|generation|modif|mtime|updated|^ino$", re.I)

_T = TypeVar("_T")


class FilesystemReader(ObjectReader):
    """A file of a file system, and the state it was in when it was opened."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = min(OPEN_TIMEOUT_S, timeout_s)
        self._threads = ThreadPoolExecutor(1, "pcshare-read")
        self._files: list[tuple[Any, Any]] = []  # idle ones, each with its file system, whose end would be the file's
        self._lock = threading.Lock()
        self._filesystem, self._path, info = self._in_time(lambda: _look(*_filesystem(url)))
        self.size = self._checked_size(info)
        self._is_async = "::" not in url and bool(self._filesystem.async_impl)
        *_, last_link = _links(url)
        self._last_link, self._last_path, told = self._in_time(lambda: _look(*_filesystem(last_link)))
        self._told = _telling(told)
        self.identity = self._told if info == told else f"{_telling(info)} in {self._told}"
        self.is_vague = "," not in self._told
        if "::" not in url:
            self._threads.shutdown()
            self._threads = ThreadPoolExecutor(READS_MAX if self._is_async else FILES_MAX, "pcshare-read")
        self._looks = _Looks(lambda: self._in_time(self._look_again))
        self._in_time(lambda: self._fetch(0, 1))
        self._timeout_s = timeout_s

    def _checked_size(self, info: dict[str, Any]) -> int:
        size = info.get("size")
        if info.get("type") == "directory":
            raise SourceError(f"{shown(self._url)}: is a directory", errno=errno.EISDIR, hint="name a file in it")
        if not isinstance(size, int):
            raise SourceError(
                f"{shown(self._url)}: its length is not known before it is read",
                errno=errno.ENOTSUP,
                hint="copy it into a file first",
            )
        if size == 0:
            raise empty(self._url)
        return size

    def read(self, offset: int, length: int) -> Content:
        content = self._in_time(lambda: self._fetch(offset, length))
        self._looks.wait_for_next()
        return content

    def _in_time(self, job: Callable[[], _T]) -> _T:
        """job(), in a thread that may be left behind: few of these libraries have limits of their own."""
        future = self._threads.submit(job)
        try:
            return future.result(self._timeout_s)
        except PcshareError:
            raise
        except ImportError as error:
            raise _import_failure(self._url, error) from error
        except FileNotFoundError as error:
            if hasattr(self, "identity"):
                raise changed(self._url, self.identity, "gone") from error
            raise no_such_object(self._url) from error
        except TimeoutError as error:  # of the library's, or here
            future.cancel()
            text = f"{shown(self._url)}: no answer within {self._timeout_s:g} s"
            raise Outage(text, errno=errno.ETIMEDOUT) from error
        except ConnectionError as error:
            raise Outage(f"{shown(self._url)}: {_in_short(error)}", errno=error.errno or errno.EIO) from error
        except Exception as error:
            number = getattr(error, "errno", None)
            raise SourceError(
                f"{shown(self._url)}: {_in_short(error)}", errno=number if isinstance(number, int) else errno.EIO
            ) from error

    # -- in a thread of the pool

    def _fetch(self, offset: int, length: int) -> bytes:
        if self._is_async:
            content: bytes = self._filesystem.cat_file(self._path, start=offset, end=offset + length)
        else:
            content = self._fetch_from_file(offset, length)
        if len(content) != length:
            raise shorter(self._url, offset, length, len(content))
        return content

    def _fetch_from_file(self, offset: int, length: int) -> bytes:
        owner, file = self._take_file(offset)
        try:
            file.seek(offset)
            content = b""
            while len(content) < length and (piece := file.read(length - len(content))):
                content = content + piece if content else piece
        except BaseException:
            file.close()
            raise
        with self._lock:
            self._files.append((owner, file))
        return content

    def _take_file(self, offset: int) -> tuple[Any, Any]:
        """An idle file, best one that stands not far before the place; or a new one: there are no more than threads."""
        with self._lock:
            if self._files:
                places = [file.tell() for _, file in self._files]
                best = min(range(len(places)), key=lambda i: (places[i] > offset, abs(offset - places[i])))
                return self._files.pop(best)
        filesystem, path = _filesystem(self._url)
        return filesystem, filesystem.open(path, "rb", cache_type="none")

    def _look_again(self) -> None:
        self._last_link.invalidate_cache()
        now = _telling(_look(self._last_link, self._last_path)[2])
        if now != self._told:
            raise changed(self._url, self._told, now)


class _Looks:
    """Looks at the object, one at a time: one look answers for every read that ended before it began."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._condition = threading.Condition()
        self._begun = 0
        self._passed = 0  # the last that found nothing
        self._is_looking = False

    def wait_for_next(self) -> None:
        """Returns when a look that began after this call found the object as it was; raises what one found."""
        with self._condition:
            wanted = self._begun + 1
            while self._passed < wanted:
                if self._is_looking:
                    self._condition.wait()
                else:
                    self._look_once()

    def _look_once(self) -> None:
        self._is_looking = True
        self._begun += 1
        number = self._begun
        self._condition.release()
        try:
            self._look()
        finally:
            self._condition.acquire()
            self._is_looking = False
            self._condition.notify_all()
        self._passed = number


def _filesystem(url: str) -> tuple[Any, str]:
    """A file system that keeps nothing from before, and the path in it."""
    _check_known(url)
    core = importlib.import_module("fsspec.core")
    filesystem, path = core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
    return filesystem, path


def _check_known(url: str) -> None:
    """UsageError for a protocol that fsspec has never heard of. One whose package is missing is another matter."""
    registry = importlib.import_module("fsspec.registry")
    for link in url.split("::"):
        protocol, separator, _ = link.partition("://")
        if separator and protocol not in registry.registry and protocol not in registry.known_implementations:
            raise unknown_scheme(protocol, url)


def _links(url: str) -> Iterator[str]:
    """a::b::c, b::c, c: a chain's file, and those it lies in."""
    while url:
        yield url
        url = url.partition("::")[2]


def _look(filesystem: Any, path: str) -> tuple[Any, str, dict[str, Any]]:
    return filesystem, path, filesystem.info(path)


def _telling(info: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(info.items()) if value and _TELLING.search(name))


def _import_failure(url: str, error: ImportError) -> HostError:
    if (error.name or "").partition(".")[0] == "fsspec":
        return package_missing(url, "fsspec")
    return HostError(
        f"{shown(url)}: the package that reads {_protocol_without_package(url)}:// is missing: {_in_short(error)}",
        errno=errno.ENOPKG,
        hint=f"{INSTALL_HINT}, and the package that this names",
    )


def _protocol_without_package(url: str) -> str:
    """The one of a chain's protocols that fsspec cannot load."""
    registry = importlib.import_module("fsspec.registry")
    protocols = [link.partition("://")[0] for link in url.split("::") if "://" in link]
    for protocol in protocols:
        try:
            registry.get_filesystem_class(protocol)
        except ImportError:
            return protocol
        except ValueError:  # not known at all
            continue
    return protocols[0]


def _in_short(error: BaseException) -> str:
    """One line of a library's error, which may hold the URL as it was asked for."""
    return shown(" ".join(str(error).split())) or type(error).__name__
