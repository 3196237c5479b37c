"""The errors that users of the data layer see: `DataError`, and the two kinds of it that the code tells apart.

A `DataError` is a single line: what was given, what is allowed, what to do next. The command line prints it
as `minilm: error: …` and exits with code 2. Any other exception is a defect of this package
(or `read.quarantine.QuarantineGrew`, which asks for a new start).

    DataError
    ├── DamageError    a shard is damaged
    └── OriginError    an object behind a URL is missing, or is not what the manifest pins
"""

import re

_USERINFO = re.compile(r"(?<=://)(?:[^\s/?#:@]*:\S*|[^\s/?#]*)@")  # user:password@ or user@
_PASSWORD = re.compile(r"((?:password|passwd|pwd)=)[^&\s'\"]*", re.IGNORECASE)  # as SQL drivers take it


class DataError(Exception):
    """A text, tokenizer, shard or argument cannot be used; the message says what to do next."""


class DamageError(DataError):
    """`shard` (its number) is damaged."""

    def __init__(self, text: str, shard: int):
        super().__init__(text, shard)
        self.shard = shard

    def __str__(self) -> str:
        return str(self.args[0])


class OriginError(DataError):
    """Fetching the object again would not help."""


def one_line(error: BaseException, limit: int = 200, *, keep_end: bool = False) -> str:
    """An error's text for a message or a log: no newlines, no passwords of addresses, at most `limit` characters.

    A longer one loses its end, with `keep_end` its beginning; an error without text is called by its type.
    """
    text = shown(" ".join(str(error).split())) or type(error).__name__
    if len(text) <= limit:
        return text
    if keep_end:
        return "… " + (text[-limit:].partition(" ")[2] or text[-limit:])
    return text[:limit] + "…"


def shown(text: str) -> str:
    """An address, or a text with addresses in it, as it may be printed and stored: without user and password.

    Takes too much rather than too little: `http://host:80/a@b` loses its host, since a password may hold a "/".
    """
    return _PASSWORD.sub(r"\1…", _USERINFO.sub("", text))
