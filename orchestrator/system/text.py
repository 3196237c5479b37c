"""Text for people: durations, tables; one line of an error, and nothing secret (both from the data layer)."""

from __future__ import annotations

from collections.abc import Sequence

from minilm.data.errors import one_line, shown

__all__ = ["duration", "one_line", "shown", "text_table"]


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
