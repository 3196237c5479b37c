"""Sources of other distributions: found by entry point, used in every process, refused when incomplete."""

import subprocess
import sys

import pytest

from minilm.data.builder.build import import_data
from minilm.data.errors import DataError
from minilm.data.sources import plugin
from tests.data_cases import make_documents, make_tokenizer

PLUGIN = '''
"""A source of one file with documents between lines of dashes."""
from pathlib import Path
from minilm.data.sources.plugin import Document, Plan


def plan(inputs, tokenizer, options):
    paths = [str(Path(path)) for path in inputs]
    return Plan(paths, list(range(len(paths))), paths, ["documents between dashes"])


def read(spec, unit):
    for position, text in enumerate(Path(spec[unit]).read_text().split("\\n---\\n")):
        yield Document(unit, position, text)
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution on sys.path, as an installed one would be."""
    site = tmp_path / "site"
    info = site / "dashes-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "dashes_source.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dashes\nVersion: 1.0\n")
    points = "dashes = dashes_source\nbroken = dashes_source:PLUGIN_THAT_IS_NONE\n"
    (info / "entry_points.txt").write_text(f"[minilm.sources]\n{points}")
    with (site / "dashes_source.py").open("a") as file:
        file.write("\n\nPLUGIN_THAT_IS_NONE = object()\n")
    monkeypatch.syspath_prepend(site)
    plugin.find_source.cache_clear()
    yield site
    plugin.find_source.cache_clear()
    sys.modules.pop("dashes_source", None)


def test_a_source_of_another_distribution_is_used_in_worker_processes_too(installed, tmp_path):
    documents = make_documents(30)
    for i in range(3):
        (tmp_path / f"{i}.dashes").write_text("\n---\n".join(documents[10 * i : 10 * i + 10]))
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    files = sorted(tmp_path.glob("*.dashes"))
    one = import_data(files, tokenizer, tmp_path / "one", source="dashes", seq_len=16, processes=1)
    two = import_data(files, tokenizer, tmp_path / "two", source="dashes", seq_len=16, processes=2)
    assert one.documents == 30 and one.fingerprint == two.fingerprint
    assert one.notes == ["documents between dashes"]


def test_an_incomplete_source_is_refused(installed, tmp_path):
    with pytest.raises(
        DataError, match=r"source 'broken' \(dashes_source:PLUGIN_THAT_IS_NONE\) lacks plan\(\) or read"
    ):
        plugin.find_source("broken")
    with pytest.raises(DataError, match="there are: broken, dashes, fairseq"):
        plugin.find_source("other")


def test_worker_processes_import_no_torch_and_no_transformers():
    code = "import sys, minilm.data.builder.tasks, minilm.data.builder.local_pool, minilm.data.sources.text; "
    code += "print([m for m in ('torch', 'transformers', 'pyarrow', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
