"""Two pictures of a stage: what teacher and students attend to, side by side, and how the loss went.

Draws with matplotlib's object interface on its own canvas (Agg): no display, no pyplot, no process-wide
state, so it works in any thread. Needs arrays and points, no models, no MLflow.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from minilm.data.format.files import replacing
from minilm.orchestrator.stage.metrics_file import Point

_COLOURS = ("#0b6e99", "#d1495b", "#3c887e", "#edae49", "#5c4b8a", "#7a7a7a")
_TEACHER_COLOUR = "#222222"
_MAX_TOKENS = 40  # more labels than this can't be read


def attention_maps(
    teacher: NDArray[np.float32],
    students: Mapping[str, NDArray[np.float32]],
    tokens: Sequence[str],
    out: Path,
    *,
    num_heads: int = 2,
    title: str = "Self-attention of the last layer",
) -> Path:
    """Writes a PNG: a column for the teacher and each student, the mean of the heads on top, some below.

    teacher, students[name]: attention probabilities [heads, tokens, tokens], arrays or CPU tensors; rows are
    queries and sum to 1; head counts may differ. tokens: their texts; only the first 40 are drawn. The single
    heads are those in which the teacher differs most from its own mean, the same numbers for everybody. One
    colour scale for all. ValueError: shapes that do not fit.
    """
    named = [("teacher", teacher), *students.items()]
    columns = [(name, np.asarray(maps, dtype=np.float32)) for name, maps in named]
    for name, maps in columns:
        if maps.ndim != 3 or maps.shape[1:] != (len(tokens), len(tokens)):
            wanted = f"[heads, {len(tokens)}, {len(tokens)}]"
            raise ValueError(f"attention of {name!r} is {list(maps.shape)}; for these tokens it is {wanted}")
    shown = min(len(tokens), _MAX_TOKENS)
    labels = [_label(token) for token in tokens[:shown]]
    num_common = min(len(maps) for _, maps in columns)
    heads = _telling_heads(columns[0][1][:num_common], num_heads)
    rows = [("mean of all heads", [maps.mean(0) for _, maps in columns])]
    rows += [(f"head {head + 1}", [maps[head] for _, maps in columns]) for head in heads]

    cell = max(2.6, 0.165 * shown)  # inches
    width, height = cell * len(columns) + 2.0, cell * len(rows) + 1.6
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08))
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    # The square root shows small weights; ending at the 99.5 % quantile keeps one bright cell from ruling.
    top = float(np.quantile(np.stack([grid for _, grids in rows for grid in grids]), 0.995))
    norm = PowerNorm(0.5, vmin=0.0, vmax=max(top, 1e-6))
    for row, (what, grids) in enumerate(rows):
        for column, grid in enumerate(grids):
            axis = axes[row, column]
            axis.imshow(grid[:shown, :shown], cmap="magma", norm=norm, interpolation="nearest")
            axis.set_xticks(range(shown), labels, rotation=90)
            axis.set_yticks(range(shown), labels)
            axis.tick_params(length=0, labelsize=7.5, pad=2)
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(f"{columns[column][0]}\n{what}", fontsize=10)
            else:
                axis.set_title(what, fontsize=9, color="#444444")
    figure.supxlabel("attended token (key)", fontsize=9, color="#444444")
    figure.supylabel("attending token (query)", fontsize=9, color="#444444")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    bar = figure.colorbar(
        ScalarMappable(norm, "magma"), ax=axes, shrink=0.6, aspect=40, pad=0.015, extend="max"
    )
    bar.set_label("attention probability (square-root scale)", fontsize=8)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)
    return _save(figure, out)


def loss_curves(
    points: Sequence[Point], heldout_metrics: Sequence[Point], out: Path, *, title: str = "Loss by step"
) -> Path:
    """Writes a PNG: for each student the training loss and its terms (lines), the held-out terms (dots), below them
    its probes, where there are any, and the learning rate.

    points: metrics "STUDENT/loss", "STUDENT/TERM", "learning_rate"; heldout_metrics: "STUDENT/heldout/TERM" and
    "STUDENT/heldout/probe/NAME". Values by head or corpus are left out.
    Values that are not finite leave a gap and are marked by a cross on the lower edge.
    """
    names = [name for point in [*points, *heldout_metrics] for name in point.metrics]
    students = list(
        dict.fromkeys(name.split("/")[0] for name in names if name.endswith("/loss") or "/heldout/" in name)
    )
    panels = max(1, len(students))
    probed = any(_names(heldout_metrics, f"{student}/heldout/probe/") for student in students)
    heights = [4, 2, 1] if probed else [4, 1]
    figure = Figure(figsize=(5.2 * panels + 0.6, 0.92 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), panels, squeeze=False, sharex=True, height_ratios=heights)
    for column, student in enumerate(students):
        axis = axes[0, column]
        names = _names(points, f"{student}/", leave_out=("gradient_norm",))
        names.sort(key=lambda name: name != f"{student}/loss")
        colours = _colours(names, heldout_metrics, student)
        for name in names:
            term = name.removeprefix(f"{student}/")
            steps, values = _series(points, name)
            whole = term == "loss"
            axis.plot(
                steps,
                values,
                color=colours[term],
                linewidth=1.8 if whole else 1.2,
                alpha=1 if whole else 0.8,
                label="loss (weighted sum)" if whole else f"{term}, training",
            )
            bad = steps[~np.isfinite(values)]
            if len(bad):
                edge = axis.get_xaxis_transform()
                axis.plot(bad, np.zeros(len(bad)), "x", color=colours[term], transform=edge, clip_on=False)
        for name in _names(heldout_metrics, f"{student}/heldout/"):
            term = name.removeprefix(f"{student}/heldout/")
            steps, values = _series(heldout_metrics, name)
            label = f"{term}, held out"
            axis.plot(steps, values, "o--", markersize=4, linewidth=0.8, color=colours[term], label=label)
        axis.set_title(student, fontsize=11)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8, frameon=False)
        for i, name in enumerate(_names(heldout_metrics, f"{student}/heldout/probe/")):
            steps, values = _series(heldout_metrics, name)
            colour, label = _COLOURS[i % len(_COLOURS)], name.rpartition("/")[2]
            axes[1, column].plot(steps, values, "o-", markersize=3, linewidth=1, color=colour, label=label)
        if probed:
            axes[1, column].legend(fontsize=8, frameon=False)
    for column in range(panels):
        steps, rates = _series(points, "learning_rate")
        axes[-1, column].plot(steps, rates, color=_TEACHER_COLOUR, linewidth=1.2)
        axes[-1, column].set_xlabel("step", fontsize=9)
        axes[-1, column].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes[-1, column].yaxis.get_offset_text().set_fontsize(7.5)
        axes[-1, column].set_ylim(bottom=0)
        axes[-1, column].yaxis.set_major_locator(MaxNLocator(2))
        axes[-1, column].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set_ylabel("divergence (nats)", fontsize=9)
    axes[-1, 0].set_ylabel("learning rate", fontsize=9)
    if probed:
        axes[1, 0].set_ylabel("probes", fontsize=9)
    for axis in axes.flat:
        axis.grid(color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return _save(figure, out)


def _save(figure: Figure, out: Path) -> Path:
    """PNG under a temporary name, then renamed: a picture is whole or absent."""
    out.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    # DejaVu Sans comes with matplotlib: the same picture on every machine
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}), replacing(out) as file:
        figure.savefig(file, format="png", dpi=130, facecolor="white")
    return out


def _label(token: str) -> str:
    """Without what matplotlib would take for mathematics, and short enough for an axis."""
    token = token.replace("$", r"\$").replace("\u0120", " ").replace("\u2581", " ").strip() or "␣"
    return token if len(token) <= 12 else token[:11] + "…"


def _telling_heads(maps: NDArray[np.float32], num_heads: int) -> list[int]:
    """The heads farthest from the mean head, in their own order."""
    distance = np.abs(maps - maps.mean(0)).sum((1, 2))
    return sorted(int(head) for head in np.argsort(-distance, kind="stable")[:num_heads])


def _names(points: Sequence[Point], prefix: str, leave_out: tuple[str, ...] = ()) -> list[str]:
    names = dict.fromkeys(name for point in points for name in point.metrics if name.startswith(prefix))
    short = {name: name.removeprefix(prefix) for name in names}
    return [name for name in names if "/" not in short[name] and short[name] not in leave_out]


def _series(points: Sequence[Point], name: str) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Steps, and values with NaN for whatever is not finite: matplotlib leaves a gap there."""
    having = [point for point in points if name in point.metrics]
    values = np.array([point.metrics[name] for point in having], dtype=np.float64)
    steps = np.array([point.step for point in having], dtype=np.int64)
    return steps, np.where(np.isfinite(values), values, np.nan)


def _colours(names: Sequence[str], heldout_metrics: Sequence[Point], student: str) -> dict[str, str]:
    """The same colour for a term in training and held out; the loss, their sum, is dark."""
    terms = [name.removeprefix(f"{student}/") for name in names]
    terms += [n.removeprefix(f"{student}/heldout/") for n in _names(heldout_metrics, f"{student}/heldout/")]
    distinct = [term for term in dict.fromkeys(terms) if term != "loss"]
    return {"loss": _TEACHER_COLOUR} | {t: _COLOURS[i % len(_COLOURS)] for i, t in enumerate(distinct)}
