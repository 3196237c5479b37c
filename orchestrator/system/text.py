"""Text for people: durations; one line of an error, and nothing secret (both from the data layer)."""

from __future__ import annotations

from minilm.data.errors import one_line, shown

__all__ = ["duration", "one_line", "shown"]


def duration(seconds: float) -> str:
    """`75` → `1m15s`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
