"""The page of an evaluation: whole in one file, the results' numbers, pictures of the stages, the paper's figures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from minilm.orchestrator.evaluation.comparison import Comparison, Score
from minilm.orchestrator.evaluation.protocols import Setting
from minilm.orchestrator.evaluation.report.page import StageStory, markdown, page
from minilm.orchestrator.evaluation.report.papers import FIGURES, METRICS, Beside
from minilm.orchestrator.evaluation.sources import Source
from minilm.orchestrator.evaluation.speed import Size
from minilm.orchestrator.recipe.library import packaged_recipes

SETTING = Setting(5e-5, 3, 128, 32)
NAN = float("nan")
STORY = StageStory(
    name="small <b>",
    losses={"small": [(10 * i, 2.0 / (1 + i)) for i in range(1000)]},
    divergences={"small attention": [(0, 1.0), (5, NAN), (9990, 0.25)]},
    probes={"small stsb": [(0, 0.25), (9990, 0.5)]},
    tokens=["[CLS]", "##time", "<script>"],
    maps={"teacher": [[0.2, 0.3, 0.5]] * 3, "small": [[1.0, 0.0, 0.0]] * 3},
)


def make_score(model: str, task: str, *scores: float) -> Score:
    return Score(model, task, "glue-fixed", METRICS[task], scores, {}, SETTING, None, "data", 1.0)


def make_comparison() -> tuple[Comparison, dict[str, Size]]:
    scores = [make_score("bert", "cola", 0.60, 0.62), make_score("student", "cola", 0.41, 0.43)]
    scores += [make_score("student", "sst2", 0.9, 0.91)]
    sources = [Source(name, "folder", "") for name in ("bert", "student")]
    sizes = {name: Size(6, 384, 22_700_000, 90.8, 2e7, 4.0, 5.0, 9_000.0) for name in ("bert", "student")}
    return Comparison(scores, sources, "bert"), sizes


def make_page() -> str:
    comparison, sizes = make_comparison()
    beside = Beside(FIGURES["bert-l6-h384"], "student", 120, "./bert", "wiki.txt")
    return page("a & b", comparison, sizes, "a machine", [STORY], beside)


def test_the_page_is_one_file_with_the_numbers_and_the_pictures():
    found = make_page()
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(|src=|href=|https?://", found)
    assert "<td>0.420 ± 0.014</td>" in found and "<td>68.8% [" in found
    assert "small &lt;b&gt;: loss" in found and "small: 0.002" in found  # the last of the curve
    assert "small attention: 0.250" in found and "small stsb: 0.500" in found
    assert found.count("<figure>") == 2 and "&lt;script&gt;" in found
    assert "nan" not in found.lower().replace("nanobeir", "")
    assert len(found) < 60_000


def test_the_papers_figures_stand_beside_ours_with_what_was_not_reproduced():
    comparison, _ = make_comparison()
    beside = Beside(FIGURES["bert-l6-h384"], "student", 120, "./bert", "wiki.txt")
    text = markdown(comparison, {}, "", beside)
    assert "| sst2 (accuracy) | 0.910 | 0.905 ± 0.007 | glue-fixed |" in text
    assert "| mnli (accuracy) | 0.822 | not run | - |" in text
    assert (
        "Not reproduced of MiniLM (arXiv 2002.10957), table 3: 120 steps instead of 400,000; ./bert as the teacher "
        "instead of google-bert/bert-base-uncased; the text is wiki.txt, the paper's Wikipedia and BookCorpus"
    ) in text
    assert "fine-tuned by glue-fixed instead of the paper's grid (glue-minilm)" in text


def test_every_row_of_figures_is_of_a_packaged_recipe():
    assert set(FIGURES) <= {recipe.name for recipe in packaged_recipes()}


def chromium(folder: Path, file: Path, *arguments: str) -> str:
    """What Chromium prints of a page; its net log goes to net.json."""
    name = shutil.which("chromium") or shutil.which("google-chrome")
    if name is None:
        pytest.skip("needs Chromium")
    command = [name, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [
        "--no-first-run",
        f"--user-data-dir={folder / 'profile'}",
        f"--log-net-log={folder / 'net.json'}",
    ]
    done = subprocess.run(
        [*command, *arguments, file.as_uri()], capture_output=True, text=True, timeout=300, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fetched_by_pages(folder: Path) -> list[str]:
    """What a page, and not Chromium for itself, asked the network for, by the net log."""
    text = (folder / "net.json").read_text().rstrip().rstrip(",")
    log = json.loads(text if text.endswith("}") else text + "]}")
    asked = [event.get("params", {}) for event in log["events"]]
    return sorted(
        {
            p["url"]
            for p in asked
            if str(p.get("url", "")).startswith(("http", "ws")) and p.get("initiator") != "not an origin"
            if "initiator" in p
        }
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_browser_shows_it_and_fetches_nothing(tmp_path):
    file = tmp_path / "report.html"
    file.write_text(make_page(), encoding="utf-8")
    shown = chromium(tmp_path, file, "--dump-dom")
    assert re.findall(r"<td>(0\.\d{3} ± 0\.\d{3})</td>", shown)[:3] == [
        "0.610 ± 0.014", "0.420 ± 0.014", "0.905 ± 0.007"
    ]  # fmt: skip
    assert fetched_by_pages(tmp_path) == []
    greedy = tmp_path / "greedy.html"  # so that the look itself can fail
    greedy.write_text('<img src="http://127.0.0.1:9/x.png">')
    chromium(tmp_path, greedy, "--dump-dom")
    assert fetched_by_pages(tmp_path) == ["http://127.0.0.1:9/x.png"]

    narrow = tmp_path / "narrow.html"  # says itself whether anything sticks out of a phone's width
    end = "<script>document.title=document.documentElement.scrollWidth+' of '+innerWidth</script></body>"
    narrow.write_text(file.read_text(encoding="utf-8").replace("</body>", end), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="{narrow.name}" style="width:390px;height:800px;border:0" onload="document.title='
        f'this.contentDocument.title"></iframe>'
    )
    title = re.search(
        r"<title>(\d+) of (\d+)</title>",
        chromium(tmp_path, frame, "--dump-dom", "--allow-file-access-from-files"),
    )
    assert title and int(title[1]) <= int(title[2]) <= 390
    chromium(tmp_path, file, f"--screenshot={tmp_path / 'page.png'}", "--window-size=900,2400")
    assert (tmp_path / "page.png").stat().st_size > 20_000
