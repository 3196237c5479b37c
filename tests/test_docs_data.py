"""The Python examples of docs/data.md run as they stand, and the links of all pages lead somewhere."""

import re
from pathlib import Path

import pytest

from tests.data_cases import make_data

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "data.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    books, wiki = make_data(folder / "books"), make_data(folder / "wiki", documents=30)
    return {"BOOKS": books, "WIKI": wiki, "RUN": folder / "run"}


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(places, number):
    exec(compile(EXAMPLES[number], f"docs/data.md, example {number}", "exec"), dict(places))


def test_there_are_examples():
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(((?!https?://)[^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
