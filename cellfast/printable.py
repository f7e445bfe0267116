"""What may be shown or written of a text: without secrets, and with nothing in it that a terminal obeys."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO
from urllib.parse import unquote

MASK = "***"

# Control characters, format characters (bidirectional marks, zero width, tags), line separators and lone surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

# Names of values that are secret wherever they stand; in a URL the shorter ones are as well.
_SECRET = (
    r"secret|passw(?:or)?d|passwd|passphrase|pwd|token|signature|credentials?|api[_-]?key|access[_-]?key|account[_-]?key"
    r"|private[_-]?key|connection[_-]?string"
)
# One of these is in every text that the patterns below find something in.
_SECRET_WORDS = ("secret", "pass", "pwd", "token", "signature", "credential", "key", "connection", "bearer", "authorization")
_SECRET_NAME = re.compile(rf"(?i)(?:{_SECRET}|authorization|^x-(?:amz|goog)-|^(?:key|sig|sas|auth|pass|user|username|code)$)")
# One slash is what is left of two where a URL was taken for a path.
_USER = re.compile(r"(?P<before>\b[A-Za-z][A-Za-z0-9+.-]{1,20}:/{1,3}[^\s/:@'\"]{0,256}):(?P<secret>[^\s]{0,2048})@")
_TOKEN_USER = re.compile(r"(?P<before>\b(?:https?|ftps?|webdavs?|git\+https?):/{1,3})(?P<secret>[^\s/:@?'\"]{8,2048})@")
_URL = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]{1,20}:/{1,3}[^\s'\"<>]*")
_PAIR = re.compile(r"(?P<before>[?&;#,/:!](?P<name>[\w.%-]+)=)(?P<value>[^&;#,\s'\"<>]*)")
_ORDINARY = re.compile(r"\d{1,9}|[\w.%-]{1,60}\.(?:tiff?|png|npy|csv|gz|h5|hdf5|parquet|pt|zip)", re.IGNORECASE)
_NAMED = re.compile(rf"(?i)(?P<before>(?:{_SECRET})[\w-]{{0,64}}[\"']?\s?[=:]\s?[\"']?)(?P<value>[^\s\"'&,;<>)}}\]]{{4,}})")
_BEARER = re.compile(
    r"(?i)(?P<before>\b(?:authorization[\"']?\s?[=:]\s?[\"']?(?:basic |bearer )?|bearer ))(?!basic |bearer )[\w.~+/=:-]{6,}"
)
_ELEMENT = re.compile(
    r"<(?P<tag>AWSAccessKeyId|SignatureProvided|StringToSign|StringToSignBytes|CanonicalRequest|CanonicalRequestBytes)>.*?</(?P=tag)>",
    re.DOTALL,
)
_KEY_ID = re.compile(r"\b(?P<before>AKIA|ASIA)[A-Z0-9]{12,}\b")

# Secrets of URLs that were opened: a file system's error may repeat them without the URL around them.
_known: dict[str, str] = {}


def remember_secrets(url: str) -> None:
    """Mask, from now on, the user, password and secret values of ``url`` wherever they turn up."""
    for match in (*_USER.finditer(url), *_TOKEN_USER.finditer(url)):
        user = match["before"].rpartition("/")[2]
        between = match[0][len(match["before"]) : match.start("secret") - match.start()]
        # With what stands around it even a short one is no other word.
        _known[f"{user}{between}{match['secret']}@"] = f"{user}{between}{MASK}@"
        _known.update((one, MASK) for one in (match["secret"], unquote(match["secret"])) if len(one) >= 6)
    for pair in _PAIR.finditer(url):
        if _SECRET_NAME.search(pair["name"]) and len(pair["value"]) >= 6:
            _known.update({pair["value"]: MASK, unquote(pair["value"]): MASK})


def masked(text: str, *, opaque: bool = True) -> str:
    """``text`` with passwords, keys, tokens and signatures as ``***``; masking twice changes nothing more.

    Masked are ``user:PASSWORD@`` of a URL, values of its query unless they look like a number or a file's name, values that
    are called secret, token, password, signature or the like, access keys, and the secrets of URLs that were opened.
    ``opaque=False`` leaves query values of unsuspicious names: what tells two files apart stays.
    """
    for secret in sorted(_known, key=len, reverse=True):
        if secret in text:
            text = text.replace(secret, _known[secret])
    # Most texts have none of it, and every line that is printed comes through here.
    if ":/" in text:
        text = _USER.sub(rf"\g<before>:{MASK}@", text)
        text = _TOKEN_USER.sub(rf"\g<before>{MASK}@", text)
        text = _URL.sub(lambda url: _masked_url(url, opaque), text)
    lower = text.lower()
    if any(word in lower for word in _SECRET_WORDS):
        text = _BEARER.sub(rf"\g<before>{MASK}", text)
        text = _NAMED.sub(rf"\g<before>{MASK}", text)
    if "</" in text:
        text = _ELEMENT.sub(rf"<\g<tag>>{MASK}</\g<tag>>", text)
    return _KEY_ID.sub(rf"\g<before>{MASK}", text)


def _masked_url(url: re.Match[str], opaque: bool) -> str:
    query = url[0].find("?") if opaque else -1

    def value(pair: re.Match[str]) -> str:
        secret = bool(_SECRET_NAME.search(pair["name"]))
        # Of a path only what calls itself secret: plate=P1 is a folder.
        unknown = -1 < query <= pair.start() and not _ORDINARY.fullmatch(pair["value"])
        return pair["before"] + (MASK if pair["value"] and (secret or unknown) else pair["value"])

    return _PAIR.sub(value, url[0])


def masked_values(value: Any) -> Any:
    """A JSON-able value with every text in it masked."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {masked_values(key): masked_values(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked_values(one) for one in value]
    return value


def escaped(text: str, keep: str = "") -> str:
    r"""``text`` with control, format and bidirectional characters as ``\n``, ``\x1b``, ``\u202e``, except those in ``keep``."""

    def one(match: re.Match[str]) -> str:
        c = match[0]
        if c in keep:
            return c
        number = ord(c)
        return _SHORT.get(c) or (
            f"\\x{number:02x}" if number < 0x80 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
        )

    return _UNPRINTABLE.sub(one, text)


def has_unprintable(text: str) -> bool:
    """Whether `escaped` would change ``text``."""
    return bool(_UNPRINTABLE.search(text))


def printable(text: object, keep: str = "") -> str:
    """``text`` masked and escaped: one line, for people."""
    return escaped(masked(str(text)), keep)


class Shown:
    """What is shown at the Python prompt and in a notebook is ``__str__``, printable."""

    def __repr__(self) -> str:
        return printable(self, keep="\n")

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"


class _PrintableStream:
    """A text stream that masks and escapes what is written; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._stream.write(printable(text, keep="\n\r\t"))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """Within the block everything printed is masked and escaped: the last line of defence behind `CellfastError` and the
    reports."""
    import sys

    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _PrintableStream(sys.stdout), _PrintableStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
