"""Text for people: durations, tables, one line of an error, nothing secret."""

from __future__ import annotations

import re
from collections.abc import Sequence

_USERINFO = re.compile(r"(?<=://)(?:[^\s/?#:@]*:\S*|[^\s/?#]*)@")  # user:password@ or user@
_PASSWORD = re.compile(r"((?:password|passwd|pwd)=)[^&\s'\"]*", re.IGNORECASE)  # as SQL drivers take it


def duration(seconds: float) -> str:
    """`75` → `1m15s`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as aligned columns, two spaces apart; a rule follows the first row, the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *body = rows
    lines = [header, ["-" * width for width in widths], *body]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def one_line(error: Exception) -> str:
    """An error's text for a log line: no newlines, no passwords of addresses, at most 200 characters."""
    text = shown(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"


def shown(text: str) -> str:
    """An address, or a text with addresses in it, as it may be printed and stored: without user and password.

    Takes too much rather than too little: `http://host:80/a@b` loses its host, since a password may hold a "/".
    """
    return _PASSWORD.sub(r"\1…", _USERINFO.sub("", text))
