"""shown: a source's text as people may see it, in messages, logs and `pcshare status`: HIDDEN stands for passwords and
for the values of a query, which may be a signature.

One function, for sources and for any text with URLs in it. It knows nothing else of the grammar and refuses nothing.
"""

from __future__ import annotations

import re

HIDDEN = "***"

NEXT_EQUIVALENT = re.compile(r",(?=[A-Za-z][A-Za-z0-9+.-]*://|(?:exec|file|zero):)", re.IGNORECASE)

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PASSWORD = re.compile(r"(?<=://)([^/?#:@\s]*):[^/?#\s]*@")
_QUERY = re.compile(r"(?<=\?)(?:(?!#[a-z]+=)[^\s'\"])+")  # as far as the filters
_ITEM = re.compile(r"([^&;=]+=)?[^&;]+")
_WITHOUT_QUERY = frozenset(("nbd", "nbd+unix", "ssh", "file"))  # a '?' there is followed by nothing secret
_WEB = frozenset(("http", "https"))  # a '?' elsewhere may belong to a name


def shown(text: str) -> str:
    """The text without what is nobody's business."""
    return ",".join(_shown_one(piece) for piece in NEXT_EQUIVALENT.split(text))


def _shown_one(piece: str) -> str:
    schemes = {scheme.lower() for scheme in _SCHEME.findall(piece)}
    piece = _PASSWORD.sub(rf"\1:{HIDDEN}@", piece)
    if schemes <= _WITHOUT_QUERY:
        return piece
    return _QUERY.sub(lambda query: _ITEM.sub(lambda item: _hidden(item, bool(schemes & _WEB)), query[0]), piece)


def _hidden(item: re.Match[str], is_web: bool) -> str:
    if item[1]:
        return f"{item[1]}{HIDDEN}"
    return HIDDEN if is_web else item[0]
