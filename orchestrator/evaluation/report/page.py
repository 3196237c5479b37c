"""The comparison as one HTML file, without scripts and without anything fetched, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from minilm.orchestrator.evaluation.comparison import Comparison
from minilm.orchestrator.evaluation.report import svg
from minilm.orchestrator.evaluation.report.papers import Beside
from minilm.orchestrator.evaluation.sources import build
from minilm.orchestrator.evaluation.speed import BATCH, TOKENS, Size, machine, measure, this_device
from minilm.orchestrator.system.files import write_atomic

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { border-bottom: 2px solid #222 }
svg { max-width: 100%; height: auto } li, h1, td:first-child { overflow-wrap: anywhere }
.maps { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0 }
@media print { body { margin: 0; max-width: none; font-size: 11px } }
"""


@dataclass(frozen=True)
class StageStory:
    """What a stage's training looks like. losses, divergences, probes: (step, value) by name; maps: attention of the
    tapped layer, the mean over heads, by model, [tokens][tokens]."""

    name: str
    losses: Mapping[str, Sequence[tuple[int, float]]]
    divergences: Mapping[str, Sequence[tuple[int, float]]]
    probes: Mapping[str, Sequence[tuple[int, float]]]
    tokens: Sequence[str] = ()
    maps: Mapping[str, Sequence[Sequence[float]]] | None = None


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


def write_reports(
    folder: Path,
    title: str,
    comparison: Comparison,
    stages: Sequence[StageStory] = (),
    beside: Beside | None = None,
) -> dict[str, Size]:
    """Measure the models on this machine, and write report.html and report.md into `folder`. Their sizes, by name.

    stages: of the run that made them; beside: the paper's figures, where the recipe is one of a paper's.
    """
    names = [source.name for source in comparison.sources]
    measured = measure([build(source, 0) for source in comparison.sources], this_device())
    sizes = dict(zip(names, measured, strict=True))
    write_atomic(folder / "report.html", page(title, comparison, sizes, machine(), stages, beside))
    write_atomic(folder / "report.md", markdown(comparison, sizes, machine(), beside))
    return sizes


def markdown(
    comparison: Comparison, sizes: Mapping[str, Size], machine: str, beside: Beside | None = None
) -> str:
    """The tables, for a model card or a README."""
    parts = []
    for protocol in comparison.protocols():
        parts += [f"### {protocol}", _markdown_table(comparison.table(protocol))]
    parts.append("\n".join(f"- {line}" for line in (*comparison.paired(), *comparison.notes())))
    if beside:
        ours = _ours(comparison, beside.student)
        parts += ["### The paper's figures", _markdown_table(beside.table(ours)), _sentence(beside, ours)]
    if sizes:
        parts += [f"### Size and speed ({_measured(machine)})", _markdown_table(size_table(sizes))]
    return "\n\n".join(parts) + "\n"


def page(
    title: str,
    comparison: Comparison,
    sizes: Mapping[str, Size],
    machine: str,
    stages: Sequence[StageStory] = (),
    beside: Beside | None = None,
) -> str:
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
    if beside:
        ours = _ours(comparison, beside.student)
        parts += ["<h2>The paper's figures</h2>", _html_table(beside.table(ours))]
        parts.append(f"<p>{escape(_sentence(beside, ours))}</p>")
    parts += ["<h2>How it was measured</h2>", _list(comparison.notes())]
    if sizes:
        parts += [
            "<h2>Size and speed</h2>",
            f"<p>{escape(_measured(machine))}.</p>",
            _html_table(size_table(sizes)),
        ]
        parts += [
            _scatter(comparison, sizes, task) for task in dict.fromkeys(s.task for s in comparison.scores)
        ]
    if told := [part for stage in stages for part in _story(stage)]:
        parts += ["<h2>Training</h2>", *told]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _scatter(comparison: Comparison, sizes: Mapping[str, Size], task: str) -> str:
    """The score of a task against the milliseconds of one row."""
    scores = [s for s in comparison.scores if s.task == task and s.model in sizes]
    points = [(sizes[s.model].p50, s.mean, s.model) for s in scores]
    return svg.scatter(task, points, "milliseconds for one row", scores[0].metric) if scores else ""


def _story(stage: StageStory) -> list[str]:
    parts = [
        svg.curves(f"{stage.name}: loss", stage.losses, "nats"),
        svg.curves(f"{stage.name}: divergence on held-out rows", stage.divergences, "nats"),
        svg.curves(f"{stage.name}: probes", stage.probes, "value"),
    ]
    if stage.maps:
        parts += [
            f"<h3>{escape(stage.name)}: attention on one sentence</h3>",
            "<p>Rows attend to columns: the mean over heads of the layer that is imitated; square-root scale.</p>",
            svg.heatmaps(stage.tokens, stage.maps),
        ]
    return [part for part in parts if part]


def _ours(comparison: Comparison, student: str) -> dict[str, tuple[str, str]]:
    """Score and protocol of a student by task."""
    return {s.task: (str(s), s.protocol) for s in comparison.scores if s.model == student}


def _sentence(beside: Beside, ours: Mapping[str, tuple[str, str]]) -> str:
    return beside.sentence(list(dict.fromkeys(protocol for _, protocol in ours.values())))


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
