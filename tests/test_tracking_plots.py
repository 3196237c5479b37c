"""The pictures are whole PNGs with the right contents, drawn without a display and without pyplot."""

import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from minilm.orchestrator.stage.metrics_file import Point
from minilm.orchestrator.tracking import plots as pictures
from minilm.orchestrator.tracking.plots import attention_maps, loss_curves


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.rstrip().endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def maps(heads: int, tokens: int, seed: int = 0) -> np.ndarray:
    scores = np.exp(np.random.default_rng(seed).normal(size=(heads, tokens, tokens)))
    return (scores / scores.sum(-1, keepdims=True)).astype(np.float32)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved, to look into."""
    saved: list[Figure] = []
    real = pictures._save

    def save(figure: Figure, out: Path) -> Path:
        saved.append(figure)
        return real(figure, out)

    monkeypatch.setattr(pictures, "_save", save)
    return saved


def test_attention_of_everybody_is_drawn_with_one_scale(tmp_path: Path, figures: list[Figure]) -> None:
    tokens = ["[CLS]", "a", "$x$", "##ing", "Ġword", "[SEP]"]
    students = {"assistant": maps(4, 6, 1), "teacher": maps(3, 6, 2)}  # a student may have any name
    out = attention_maps(maps(4, 6), students, tokens, tmp_path / "deep" / "maps.png")
    assert png_size(out) > (500, 500)
    assert [path.name for path in out.parent.iterdir()] == ["maps.png"]
    grids = [axis for axis in figures[0].axes if axis.get_images()]
    assert len(grids) == 3 * 3  # mean and two heads; teacher and two students
    assert len({axis.get_images()[0].norm for axis in grids}) == 1
    np.testing.assert_allclose(grids[0].get_images()[0].get_array(), maps(4, 6).mean(0))
    np.testing.assert_allclose(grids[1].get_images()[0].get_array(), maps(4, 6, 1).mean(0))
    assert grids[1].get_title() == "assistant\nmean of all heads"
    head = int(grids[3].get_title().removeprefix("head ")) - 1
    np.testing.assert_allclose(grids[4].get_images()[0].get_array(), maps(4, 6, 1)[head])
    labels = [label.get_text() for label in grids[0].get_yticklabels()]
    assert labels == ["[CLS]", "a", r"\$x\$", "##ing", "word", "[SEP]"]


def test_long_sequences_are_cut_and_one_head_is_enough(tmp_path: Path, figures: list[Figure]) -> None:
    attention_maps(maps(1, 60), {"s": maps(1, 60, 1)}, ["averyverylongtoken"] * 60, tmp_path / "m.png")
    grid = figures[0].axes[0].get_images()[0].get_array()
    assert grid is not None and grid.shape == (40, 40)
    assert figures[0].axes[0].get_yticklabels()[0].get_text() == "averyverylo…"


def test_tensors_are_taken_and_wrong_shapes_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    attention_maps(torch.tensor(maps(2, 3)), {"s": torch.tensor(maps(2, 3))}, list("abc"), tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"'s' is \[2, 4, 4\]; for these tokens it is \[heads, 3, 3\]"):
        attention_maps(maps(2, 3), {"s": maps(2, 4)}, list("abc"), tmp_path / "n.png")
    assert not (tmp_path / "n.png").exists()


def test_loss_curves_show_every_term_and_mark_what_is_not_finite(
    tmp_path: Path, figures: list[Figure]
) -> None:
    points = [
        Point(
            step,
            0,
            {
                "a/loss": 2.0 / (step + 1),
                "a/attention": math.nan if step == 3 else 1.0,
                "a/gradient_norm": 9.0,
                "a/attention/head-01": 2.0,
                "data/rows_read": 8.0,
                "b/loss": math.inf if step == 4 else 1.0,
                "learning_rate": 1e-3,
                "rows_per_second": 10.0,
            },
        )
        for step in range(6)
    ]
    values = {"a/heldout/attention": 1.5, "a/heldout/attention/books": 1.0}
    heldout = [Point(step, 0, values) for step in (0, 5)]
    assert png_size(loss_curves(points, heldout, tmp_path / "loss.png")) > (500, 300)
    left, right, *_ = figures[0].axes
    assert (left.get_title(), right.get_title()) == ("a", "b")
    lines = {str(line.get_label()): line for line in left.get_lines()}
    named = {label for label in lines if not label.startswith("_")}
    assert named == {"loss (weighted sum)", "attention, training", "attention, held out"}
    assert list(lines["loss (weighted sum)"].get_ydata()) == [2.0 / (step + 1) for step in range(6)]
    assert lines["attention, held out"].get_color() == lines["attention, training"].get_color()
    crosses = [line for line in left.get_lines() if line.get_marker() == "x"]
    assert [list(cross.get_xdata()) for cross in crosses] == [[3]]
    crosses = [line for line in right.get_lines() if line.get_marker() == "x"]
    assert [list(cross.get_xdata()) for cross in crosses] == [[4]]


def test_probes_have_an_axis_of_their_own(tmp_path: Path, figures: list[Figure]) -> None:
    values = {
        "a/heldout/attention": 1.5,
        "a/heldout/probe/knn": 0.25,
        "a/heldout/probe/knn/share-of-teacher": 0.3,
    }
    points = [Point(1, 0, {"a/loss": 1.0, "learning_rate": 1e-3})]
    loss_curves(points, [Point(step, 0, values) for step in (0, 5)], tmp_path / "loss.png")
    terms, probes, rates = figures[0].axes
    assert probes.get_ylabel() == "probes" and rates.get_ylabel() == "learning rate"
    (line,) = probes.get_lines()
    assert line.get_label() == "knn" and list(line.get_ydata()) == [0.25, 0.25]
    assert not any("knn" in str(line.get_label()) for line in terms.get_lines())


def test_no_points_give_an_empty_picture(tmp_path: Path) -> None:
    assert png_size(loss_curves([], [], tmp_path / "loss.png")) > (300, 300)


def test_no_display_and_no_pyplot_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, threading, numpy\n"
        "from minilm.orchestrator.tracking.plots import attention_maps\n"
        "m = numpy.full((1, 2, 2), 0.5)\n"
        f"out = pathlib.Path({str(tmp_path / 'm.png')!r})\n"
        "draw = lambda: attention_maps(m, {'s': m}, ['a', 'b'], out)\n"
        "thread = threading.Thread(target=draw); thread.start(); thread.join()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert not {'torch', 'mlflow', 'ray'} & sys.modules.keys()\n"
    )
    no_display = {
        key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=no_display)
    assert png_size(tmp_path / "m.png") > (100, 100)
