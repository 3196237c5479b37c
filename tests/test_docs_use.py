"""The Python of docs/use.md runs as it stands, on a student that a stage has exported."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.worker.loop import run_stage
from tests.conftest import WORDS
from tests.support import make_spec

PAGE = Path(__file__).resolve().parent.parent / "docs" / "use.md"
LOAD, CLASSIFIER = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def student(tmp_path_factory, shards, teacher):
    folder = tmp_path_factory.mktemp("stage")
    assert run_stage(make_spec(shards, teacher, folder))
    return StageFolder(folder).student("small")


def write_task(path: Path, rows: int, seed: int) -> Path:
    """Sentences that are about time, or about school; label 1 is time."""
    rng = random.Random(seed)
    about = (("school", "student", "study", "book"), ("time", "year", "day", "night"))
    lines = ["sentence\tlabel"]
    for row in range(rows):
        label = row % 2
        words = [rng.choice(WORDS[20:40]) for _ in range(6)] + [rng.choice(about[label]) for _ in range(3)]
        rng.shuffle(words)
        lines.append(f"{' '.join(words)}\t{label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_it_loads(student):
    names = {"STUDENT": str(student)}
    exec(compile(LOAD, str(PAGE), "exec"), names)
    assert names["model"].config.hidden_size == 24


def test_it_is_fine_tuned(student, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification

    train, dev = write_task(tmp_path / "train.tsv", 320, 1), write_task(tmp_path / "dev.tsv", 64, 2)
    names = {"STUDENT": str(student), "TRAIN": train, "DEV": dev, "OUT": str(tmp_path / "out")}
    quick = CLASSIFIER.replace("5e-5", "1e-2")  # 50 steps of a student 24 wide
    assert quick != CLASSIFIER
    exec(compile(quick, str(PAGE), "exec"), names)
    assert names["accuracy"] > 0.8
    assert f"epoch 5: {names['accuracy']:.1%} of 64 right" in capsys.readouterr().out
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert tuned.config.num_labels == 2
