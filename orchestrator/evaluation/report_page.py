"""The comparison as one HTML file, without scripts and without anything fetched, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from minilm.orchestrator.evaluation.comparison import Comparison
from minilm.orchestrator.evaluation.sources import build
from minilm.orchestrator.evaluation.speed import BATCH, TOKENS, Size, machine, measure, this_device
from minilm.orchestrator.system.files import write_atomic

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { border-bottom: 2px solid #222 }
svg { max-width: 100%; height: auto } @media print { body { margin: 0; max-width: none; font-size: 11px } }
"""
WIDTH, HEIGHT, MARGIN = 640, 360, 56


def size_table(sizes: Mapping[str, Size]) -> list[list[str]]:
    """Rows of text, the header first; `sizes` by model."""
    header = [
        "model", "layers x hidden", "parameters", "float32", "MFLOPs a token", "p50, one row", "p99, one row",
        f"tokens/s, {BATCH} rows",
    ]  # fmt: skip
    return [header] + [
        [
            name,
            f"{size.layers} x {size.hidden}",
            f"{size.parameters / 1e6:.1f} M",
            f"{size.megabytes:.1f} MB",
            f"{size.flops / 1e6:.1f}",
            f"{size.p50:.1f} ms",
            f"{size.p99:.1f} ms",
            f"{size.tokens_per_second:,.0f}",
        ]
        for name, size in sizes.items()
    ]


def write_reports(folder: Path, title: str, comparison: Comparison) -> dict[str, Size]:
    """Measure the models on this machine, and write report.html and report.md into `folder`. Their sizes, by name."""
    names = [source.name for source in comparison.sources]
    measured = measure([build(source, 0) for source in comparison.sources], this_device())
    sizes = dict(zip(names, measured, strict=True))
    write_atomic(folder / "report.html", page(title, comparison, sizes, machine()))
    write_atomic(folder / "report.md", markdown(comparison, sizes, machine()))
    return sizes


def markdown(comparison: Comparison, sizes: Mapping[str, Size], machine: str) -> str:
    """The tables, for a model card or a README."""
    parts = []
    for protocol in comparison.protocols():
        parts += [f"### {protocol}", _markdown_table(comparison.table(protocol))]
    parts.append("\n".join(f"- {line}" for line in (*comparison.paired(), *comparison.notes())))
    if sizes:
        parts += [f"### Size and speed ({_measured(machine)})", _markdown_table(size_table(sizes))]
    return "\n\n".join(parts) + "\n"


def page(title: str, comparison: Comparison, sizes: Mapping[str, Size], machine: str) -> str:
    """The HTML file."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for protocol in comparison.protocols():
        parts += [f"<h2>{escape(protocol)}</h2>", _html_table(comparison.table(protocol))]
    if paired := comparison.paired():
        parts += [
            "<h2>Against no distillation</h2>",
            "<p>Seed by seed, with the 95 % interval.</p>",
            _list(paired),
        ]
    parts += ["<h2>How it was measured</h2>", _list(comparison.notes())]
    if sizes:
        parts += [
            "<h2>Size and speed</h2>",
            f"<p>{escape(_measured(machine))}.</p>",
            _html_table(size_table(sizes)),
        ]
        parts += [
            scatter(comparison, sizes, task) for task in dict.fromkeys(s.task for s in comparison.scores)
        ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def scatter(comparison: Comparison, sizes: Mapping[str, Size], task: str) -> str:
    """An SVG picture: score of a task against the milliseconds of one row."""
    points = [
        (sizes[s.model].p50, s.mean, s.model)
        for s in comparison.scores
        if s.task == task and s.model in sizes
    ]
    if not points:
        return ""
    most_x = max(x for x, _, _ in points) * 1.15
    low = min(0.0, *(y for _, y, _ in points))
    high = max(y for _, y, _ in points) * 1.1 or 1.0
    across, up = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    marks = []
    for x, y, name in points:
        left, top = MARGIN + across * x / most_x, HEIGHT - MARGIN - up * (y - low) / (high - low)
        end = ' text-anchor="end"' if left > WIDTH / 2 else ""
        shift = -8 if end else 8
        marks.append(
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="5" fill="#0b6e99"/>'
            f'<text x="{left + shift:.1f}" y="{top - 8:.1f}" font-size="12"{end}>{escape(name)}</text>'
        )
    metric = next(s.metric for s in comparison.scores if s.task == task)
    foot, side = HEIGHT - MARGIN, MARGIN
    return (
        f'<h3>{escape(task)}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(task)} against latency">'
        f'<path d="M{side} {side}V{foot}H{WIDTH - side}" fill="none" stroke="#222"/>'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 16}" text-anchor="middle" font-size="12">'
        f"milliseconds for one row (0 to {most_x:.1f})</text>"
        f'<text x="16" y="{HEIGHT / 2}" transform="rotate(-90 16 {HEIGHT / 2})" text-anchor="middle" font-size="12">'
        f"{escape(metric)} ({low:.2f} to {high:.2f})</text>{''.join(marks)}</svg>"
    )


def _measured(machine: str) -> str:
    return f"rows of {TOKENS} tokens or the model's most, float32, on {machine}"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    header, *body = rows
    lines = line(header, "th") + "".join(line(row, "td") for row in body)
    return f'<div class="wide"><table>{lines}</table></div>'


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])
