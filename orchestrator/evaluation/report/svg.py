"""Pictures as inline SVG, without scripts: points, curves by step, and maps of attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, MARGIN = 640, 360, 56
COLOURS = ("#0b6e99", "#d1495b", "#3c887e", "#b07d10", "#5c4b8a", "#7a7a7a")
MOST_POINTS = 200  # of a curve: more can't be seen
CELL = 12


def scatter(title: str, points: Sequence[tuple[float, float, str]], across_is: str, up_is: str) -> str:
    """Named points (x, y, name); both axes begin at 0, or below it where a value does."""
    if not points:
        return ""
    most_x = max(x for x, _, _ in points) * 1.15
    low = min(0.0, *(y for _, y, _ in points))
    high = max(y for _, y, _ in points) * 1.1 or 1.0
    marks = []
    lines: list[float] = []  # the labels', none on another
    for x, y, name in points:
        left, top = _place(x / most_x, (y - low) / (high - low))
        line = top - 8
        while any(abs(line - other) < 12 for other in lines):
            line -= 13
        lines.append(line)
        end = ' text-anchor="end"' if left > WIDTH / 2 else ""
        shift = -8 if end else 8
        marks.append(
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="5" fill="{COLOURS[0]}"/>'
            f'<text x="{left + shift:.1f}" y="{line:.1f}" font-size="12"{end}>{escape(name)}</text>'
        )
    return _framed(
        title, f"{across_is} (0 to {most_x:.1f})", f"{up_is} ({low:.2f} to {high:.2f})", "".join(marks)
    )


def curves(title: str, lines: Mapping[str, Sequence[tuple[int, float]]], up_is: str) -> str:
    """A line of (step, value) for each name; values that are not finite leave gaps. Empty where there is nothing."""
    shown = {
        name: [(s, v) for s, v in _thinned(points) if math.isfinite(v)] for name, points in lines.items()
    }
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        return ""
    last = max(step for points in shown.values() for step, _ in points) or 1
    low = min(0.0, *(value for points in shown.values() for _, value in points))
    high = max(value for points in shown.values() for _, value in points) * 1.05 or 1.0
    high = high if high > low else low + 1.0
    marks = []
    for number, (name, points) in enumerate(shown.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [_place(step / last, (value - low) / (high - low)) for step, value in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        marks.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        marks += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places[-1:]]
        marks.append(
            f'<text x="{WIDTH - MARGIN}" y="{MARGIN + 14 * number}" text-anchor="end" font-size="12" fill="{colour}">'
            f"{escape(name)}: {points[-1][1]:.3f}</text>"
        )
    return _framed(title, f"step (0 to {last:,})", f"{up_is} ({low:.2f} to {high:.2f})", "".join(marks))


def heatmaps(tokens: Sequence[str], maps: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """A square for each name: rows are attending tokens, columns attended ones; darker is more, on one scale."""
    top = max(value for grid in maps.values() for row in grid for value in row) or 1.0
    return (
        '<div class="maps">'
        + "".join(_heatmap(name, tokens, grid, top) for name, grid in maps.items())
        + "</div>"
    )


def _heatmap(name: str, tokens: Sequence[str], grid: Sequence[Sequence[float]], top: float) -> str:
    side, label = CELL * len(tokens), 78
    cells = "".join(
        f'<rect x="{label + CELL * column}" y="{label + CELL * row}" width="{CELL}" height="{CELL}" fill="#0b6e99" '
        f'fill-opacity="{math.sqrt(max(0.0, value) / top):.2f}"/>'  # the square root shows small weights
        for row, values in enumerate(grid)
        for column, value in enumerate(values)
    )
    words = "".join(
        f'<text x="{label - 4}" y="{label + CELL * i + 10}" text-anchor="end">{escape(_short(token))}</text>'
        f'<text transform="translate({label + CELL * i + 10} {label - 4}) rotate(-90)">{escape(_short(token))}</text>'
        for i, token in enumerate(tokens)
    )
    return (
        f'<figure><figcaption>{escape(name)}</figcaption><svg viewBox="0 0 {label + side} {label + side}" '
        f'width="{label + side}" font-size="10" role="img" aria-label="attention of {escape(name)}">{cells}{words}'
        f"</svg></figure>"
    )


def _short(token: str) -> str:
    token = token.replace("\u0120", " ").replace("\u2581", " ").strip() or "␣"
    return token if len(token) <= 11 else token[:10] + "…"


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about `MOST_POINTS` of them, the last one among them."""
    every = -(-len(points) // MOST_POINTS) or 1
    return list(points[::-1][::every][::-1])


def _place(across: float, up: float) -> tuple[float, float]:
    """Shares of the axes as coordinates."""
    return MARGIN + (WIDTH - 2 * MARGIN) * across, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * up


def _framed(title: str, across_is: str, up_is: str, marks: str) -> str:
    foot, side = HEIGHT - MARGIN, MARGIN
    return (
        f'<h3>{escape(title)}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(title)}">'
        f'<path d="M{side} {side}V{foot}H{WIDTH - side}" fill="none" stroke="#222"/>'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 16}" text-anchor="middle" font-size="12">{escape(across_is)}</text>'
        f'<text x="16" y="{HEIGHT / 2}" transform="rotate(-90 16 {HEIGHT / 2})" text-anchor="middle" font-size="12">'
        f"{escape(up_is)}</text>{marks}</svg>"
    )
