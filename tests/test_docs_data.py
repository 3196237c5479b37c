"""The Python examples of docs/data.md run as they stand."""

import re
from pathlib import Path

import pytest

from tests.data_cases import make_data

PAGE = Path(__file__).parent.parent / "docs" / "data.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    books, wiki = make_data(folder / "books"), make_data(folder / "wiki", documents=30)
    return {"BOOKS": books, "WIKI": wiki, "RUN": folder / "run"}


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(places, number):
    exec(compile(EXAMPLES[number], f"docs/data.md, example {number}", "exec"), dict(places))


def test_there_are_examples_and_every_link_leads_somewhere():
    assert len(EXAMPLES) == 4
    for target in re.findall(r"\]\((\.\./[^)#]+)\)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / target).exists(), target
