"""What the pages say of the code is so: keys, quoted messages, links into pages, the index."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from minilm.orchestrator.recipe import reference
from minilm.orchestrator.recipe.library import packaged_recipes
from minilm.orchestrator.recipe.load import load_recipe, read_recipe
from minilm.orchestrator.recipe.schema import SECTIONS
from minilm.orchestrator.verbs.library import QUESTIONS
from tests.rooms import PACKAGES, modules

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def test_the_reference_is_made_from_the_types():
    again = "run: python -m minilm.orchestrator.recipe.reference"
    assert reference.PAGE.read_text(encoding="utf-8") == reference.reference_text(), again


def test_the_reference_has_every_key_with_its_meaning():
    rows = [line.split(" | ") for line in reference.reference_text().splitlines() if line.startswith("| ")]
    keys = {row[0].strip("| *`") for row in rows if len(row) == 4 and row[-1].strip("| ")}
    assert {key for kind in SECTIONS.values() for key in kind.model_fields} <= keys


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_into_a_page_finds_its_heading(page):
    for target, anchor in re.findall(
        r"\]\(((?!https?://)[^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")
    ):
        there = page.parent / target if target else page
        assert anchor in slugs(there), f"{target}#{anchor}"


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
    assert {name for name in names if f"]({name})" not in index} == set()


def messages() -> list[str]:
    """Every text of the code, with … for what is put in."""
    found = []
    for path in (path for package in PACKAGES for path in modules(package)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_that_is_explained_is_one_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `(.*?)` \|", page, flags=re.MULTILINE)
    assert len(quoted) > 30
    texts = messages()
    for quote in quoted:
        parts = [re.escape(part) for part in quote.split("…")]
        pattern = re.compile(".*".join(parts))
        assert any(pattern.search(text) for text in texts), quote


def table(page: str, first: str) -> list[list[str]]:
    """The cells of the rows of the table whose header begins with `first`."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = re.search(rf"^\| {re.escape(first)} .*\n\|[-|]+\n((?:\|.*\n)+)", text, flags=re.MULTILINE)[1]
    return [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows.splitlines()]


def test_the_sizes_are_those_of_the_packaged_recipes():
    recipes = {recipe.name: recipe for recipe in packaged_recipes()}
    rows = [row for row in table("sizes.md", "layers x hidden") if row[-1]]
    assert len(rows) == 8
    for shape, _, without, *_, name in rows:
        last = recipes[name].students[-1]
        assert shape.partition(",")[0] == f"{last.layers} x {last.hidden}"
        assert ("assistant" in shape) == (len(recipes[name].students) == 2)
        matrices = last.layers * 12 * last.hidden**2  # 4 of attention, 2 of 4 times the size
        assert matrices / 1e6 == pytest.approx(float(without.removesuffix(" M")), rel=0.01)


def test_the_rates_are_those_of_the_packaged_recipes():
    rows = {int(row[0].replace(",", "")): row[1:] for row in table("sizes.md", "rows a step")}
    seen, others = set(), {"quickstart", "embed-quickstart", "embed-mpnet-l6-h384"}  # not of the papers
    others |= {"modernbert-l7-h256", "modernbert-l10-h384", "eurobert-l6-h384", "domain-adapt", "tiny-cpu"}
    others |= {"embed-mpnet-from-minilm"}
    for packaged in packaged_recipes():
        for stage in load_recipe(packaged.file).stages if packaged.name not in others else ():
            rates, warmup = rows[stage.batch]
            seen.add(stage.batch)
            assert stage.peak_lr in {float(rate) for rate in re.findall(r"\de-\d", rates)}
            assert stage.warmup_steps == int(warmup.replace(",", ""))
    assert seen == set(rows)


def test_the_first_recipe_is_one_and_its_page_asks_the_questions_of_today():
    page = (ROOT / "docs" / "first-recipe.md").read_text(encoding="utf-8")
    assert all(question in page for question in QUESTIONS.values())
    written = re.search(r"```yaml\n(.*?)```", page, flags=re.DOTALL)[1]
    recipe = read_recipe("first.yaml", text=written)[0]
    assert [f"{stage.steps} x {stage.batch}" for stage in recipe.stages] == [
        "122 x 16"
    ] and "122 x 16" in page


def test_the_diagram_of_a_curriculum_names_the_stages_of_the_example():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", page, flags=re.DOTALL)
    example = re.search(r"```yaml\n(.*?)```", page, flags=re.DOTALL)[1]
    for name in re.findall(r"name: ([a-z]+)", example.partition("stages:")[2]):
        assert name in diagram
