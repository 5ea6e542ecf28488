"""object_store: an object that obstore reads: S3, Google Cloud Storage, Azure, and plain HTTP servers.

Credentials and endpoints are the library's business, from its environment variables. Must not let a read outlive its
time limit, nor take bytes of any state of the object but the first. Some facts about obstore:
 - its calls release the GIL; threads are faster than its asyncio half (by a third, 1 MiB ranges);
 - client options that are given replace all that the environment says of the client, so they are read here again;
 - a read is retried until retry_timeout, and the last try begun before it may take timeout: limits are sums of the two;
 - a path has no empty, no '.' and no '..' segments; a URL of its HTTP store is taken as it is, query included.
"""

from __future__ import annotations

import base64
import errno
import os
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from pcshare.errors import SourceError
from pcshare.serve.object_reader import (
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
from pcshare.sources.shown import shown

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ObjectStore

_AWS, _GOOGLE, _AZURE, _HTTP = "AWS", "GOOGLE", "AZURE", ""
PROVIDERS = {  # scheme: what the names of its environment variables begin with
    "s3": _AWS,
    "s3a": _AWS,
    "gs": _GOOGLE,
    "az": _AZURE,
    "azure": _AZURE,
    "adl": _AZURE,
    "abfs": _AZURE,
    "abfss": _AZURE,
    "http": _HTTP,
    "https": _HTTP,
}
_CLIENT_OPTIONS = (
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "http1_only",
    "http2_only",
    "pool_idle_timeout",
    "proxy_ca_certificate",
    "proxy_excludes",
    "proxy_url",
    "root_certificate",
    "timeout",
    "user_agent",
)
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
RETRIES_MAX = 100  # of a read: the time limit ends them, not their number
OPEN_RETRIES_MAX = 3  # somebody waits, or tries again anyway
TRY_SHARE = 0.4  # of a time limit: for one try; the rest is for what begins further ones

_CREDENTIAL_HINTS = {
    _AWS: "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (from a profile: "
    'eval "$(aws configure export-credentials --format env)"), or AWS_SKIP_SIGNATURE=true for a public bucket',
    _GOOGLE: "set GOOGLE_APPLICATION_CREDENTIALS to a key file (gcloud auth application-default login makes one), or "
    "GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    _AZURE: "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_SAS_TOKEN), or "
    "AZURE_SKIP_SIGNATURE=true for a public container",
    _HTTP: "write https://USER:PASSWORD@HOST/..., or a signed URL",
}
_NO_CREDENTIALS = re.compile(r"/latest/api/token|token request|Account must be specified")
_REACH_HINT = "is the address right, the server up, and can this machine reach it?"
_NO_BUCKET = re.compile(r"<Code>(NoSuchBucket|ContainerNotFound)</Code>")
_CODE_AND_MESSAGE = re.compile(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", re.DOTALL)
_STATUS = re.compile(r"status code: (\d{3})")
_FINAL_STATUS = re.compile(r"4(?!08|29)\d\d")  # 408 and 429: ask again later
_CAUSE = re.compile(r'(?:message|error): "([^"]+)"|\b(TimedOut)\b')


class StoreReader(ObjectReader):
    """An object of a store, and the state it was in when it was opened."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        try:
            import obstore
        except ImportError as error:
            raise package_missing(url, "obstore") from error
        self._obstore = obstore
        self._path = path_of(url)
        if not self._path and _provider(url) != _HTTP:
            raise SourceError(f"{shown(url)}: names a bucket and no object in it", errno=errno.EINVAL)
        meta = self._first_look(self._new_store(min(OPEN_TIMEOUT_S, timeout_s), OPEN_RETRIES_MAX))
        self._store = self._new_store(timeout_s, RETRIES_MAX)
        self.size = meta["size"]
        self.identity = identity_of(meta)
        self.is_vague = "," not in self.identity
        self._e_tag = strong_e_tag(meta)

    def _new_store(self, timeout_s: float, retries_max: int) -> ObjectStore:
        options = client_options(self._url, timeout_s * TRY_SHARE)
        retry_timeout = timedelta(seconds=timeout_s * (1 - TRY_SHARE))
        common: Any = {
            "client_options": options,
            "retry_config": {"max_retries": retries_max, "retry_timeout": retry_timeout},
        }
        try:
            if _provider(self._url) == _HTTP:
                return self._obstore.store.HTTPStore.from_url(_without_user(self._url), **common)
            return self._obstore.store.from_url(_container(self._url), **common)
        except (self._obstore.exceptions.BaseError, ValueError) as error:
            raise self._failure(error) from error

    def _first_look(self, store: ObjectStore) -> ObjectMeta:
        """Asks for the first byte: that shows also whether ranges and reading are allowed, and says why if not."""
        try:
            return self._obstore.get(store, self._path, options={"range": (0, 1)}).meta
        except self._obstore.exceptions.NotSupportedError as error:
            raise self._without_ranges(store) from error
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            if "416" in _STATUS.findall(str(error)):
                raise empty(self._url) from error
            raise self._failure(error) from error

    def _without_ranges(self, store: ObjectStore) -> SourceError:
        """What to say of a server that answered with all where a range was asked for."""
        try:
            if self._obstore.head(store, self._path)["size"] == 0:
                return empty(self._url)
        except (self._obstore.exceptions.BaseError, OSError, ValueError):
            pass  # it has no length either
        return SourceError(
            f"{shown(self._url)}: the server knows no ranges: it answers the header Range with all of the object",
            errno=errno.ENOTSUP,
            hint="download it, or put it on a server that answers 206 Partial Content",
        )

    def read(self, offset: int, length: int) -> Content:
        options: GetOptions = {"range": (offset, offset + length)}
        if self._e_tag is not None:
            options["if_match"] = self._e_tag
        try:
            got = self._obstore.get(self._store, self._path, options=options)
            now = identity_of(got.meta)
            content = memoryview(got.bytes()) if now == self.identity else memoryview(b"")
        except self._obstore.exceptions.PreconditionError as error:
            raise changed(self._url, self.identity, "another one") from error
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise self._failure(error, opened=True) from error
        if now != self.identity:
            raise changed(self._url, self.identity, now)
        if len(content) != length:
            raise shorter(self._url, offset, length, len(content))
        return content

    def _failure(self, error: Exception, *, opened: bool = False) -> SourceError:
        """The library's words in ours. They come with pages of its own structures behind the first paragraph."""
        text, url, provider = str(error), shown(self._url), _provider(self._url)
        errors = self._obstore.exceptions
        if isinstance(error, FileNotFoundError) and opened:
            return changed(self._url, self.identity, "gone")
        if _NO_BUCKET.search(text):
            return SourceError(f"{url}: no such bucket: {urlsplit(url).netloc}", errno=errno.ENOENT)
        if isinstance(error, FileNotFoundError):
            return no_such_object(self._url)
        if isinstance(error, errors.PermissionDeniedError | errors.UnauthenticatedError):
            return SourceError(
                f"{url}: access refused ({in_short(text)})", errno=errno.EACCES, hint=_CREDENTIAL_HINTS[provider]
            )
        if _NO_CREDENTIALS.search(text) and not opened:
            return SourceError(f"{url}: no credentials", errno=errno.EACCES, hint=_CREDENTIAL_HINTS[provider])
        if "BadScheme" in text:
            return SourceError(
                f"{url}: leads to an http:// address, and only https:// is allowed",
                errno=errno.EACCES,
                hint=f"set {provider}_ALLOW_HTTP=true to send requests unencrypted" if provider else None,
            )
        if "CONTENT_RANGE" in text:
            return SourceError(f"{url}: the server does not tell the object's length", errno=errno.ENOTSUP)
        status = _STATUS.search(text)
        is_final = (status and _FINAL_STATUS.fullmatch(status[1])) or isinstance(error, ValueError)
        return (SourceError if is_final else Outage)(
            f"{url}: {in_short(text)}", errno=errno.EIO, hint=None if status or opened else _REACH_HINT
        )


def can_read(url: str) -> bool:
    """Whether the URL is one of obstore's, as far as can be seen from it."""
    scheme, separator, _ = url.partition("://")
    if not separator or "::" in url or scheme.lower() not in PROVIDERS:
        return False
    path = path_of(url)
    return not path or not {"", ".", ".."} & set(path.split("/"))


def path_of(url: str) -> str:
    """The object's name in its bucket, as it is written. An HTTP store is one object, whose path is empty."""
    return "" if _provider(url) == _HTTP else url.partition("://")[2].partition("/")[2]


def identity_of(meta: ObjectMeta) -> str:
    """What tells this state of the object from others; the time only where the store has nothing better."""
    named = [f"{meta['size']} bytes"]
    if meta["e_tag"]:
        named.append(f"ETag {meta['e_tag']}")
    elif meta["last_modified"].timestamp():  # 0: the server does not say
        named.append(f"modified {meta['last_modified'].isoformat()}")
    if meta["version"]:
        named.append(f"version {meta['version']}")
    return ", ".join(named)


def strong_e_tag(meta: ObjectMeta) -> str | None:
    """The ETag if If-Match may be sent with it: by definition a weak one never matches."""
    e_tag = meta["e_tag"]
    return e_tag if e_tag and not e_tag.startswith("W/") else None


def client_options(url: str, try_timeout_s: float) -> dict[str, Any]:
    """What the environment says of the HTTP client, and our time limit where it says none."""
    provider = _provider(url)
    options: dict[str, Any] = {"timeout": timedelta(seconds=try_timeout_s), "pool_max_idle_per_host": str(READS_MAX)}
    options["connect_timeout"] = options["timeout"]
    if provider != _HTTP:
        said = ((name, os.environ.get(f"{provider}_{name.upper()}")) for name in _CLIENT_OPTIONS)
        options.update({name: value for name, value in said if value})
        addresses = [os.environ.get(name, "") for name in _ENDPOINTS if name.startswith(provider)]
    else:
        options.update(_authorization(url))
        addresses = [url]
    if any(address.lower().startswith("http://") for address in addresses):
        options.setdefault("allow_http", True)  # who writes http:// means it
    return options


def in_short(text: str) -> str:
    """One line of an error of obstore's: what the server said, else what the client found."""
    told, _, structures = shown(text).partition("\n\nDebug source")
    said, status = _CODE_AND_MESSAGE.search(told), _STATUS.search(told)
    if said:
        return f"{status[1] + ' ' if status else ''}{said[1]}: {said[2]}"
    if status:
        return f"the server answered {told[status.start(1) :].strip().rstrip(':')}"
    causes = ["".join(groups) for groups in _CAUSE.findall(structures)]
    told = " ".join(told.rpartition(" - ")[2].split()).removeprefix("HTTP error: ")
    return f"{told} ({causes[-1]})" if causes else told


def _provider(url: str) -> str:
    return PROVIDERS[url.partition("://")[0].lower()]


def _container(url: str) -> str:
    """The bucket's URL. What comes behind it must not pass through a URL parser: names are literal."""
    scheme, _, rest = url.partition("://")
    return f"{scheme.lower()}://{rest.partition('/')[0]}"


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _authorization(url: str) -> dict[str, Any]:
    """USER:PASSWORD@ of an HTTP URL, which the library would drop."""
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"default_headers": {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}}
