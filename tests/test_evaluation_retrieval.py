"""Search: sets in every layout that people have, nDCG@10 by its definition, and what is not as published is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from minilm.model.errors import ModelError
from minilm.orchestrator.cli import main
from minilm.orchestrator.driver.rehearsal.inputs import few_rows
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.check_data import check_data, data_fingerprint
from minilm.orchestrator.evaluation.metrics import score
from minilm.orchestrator.evaluation.protocols import PROTOCOLS
from minilm.orchestrator.evaluation.retrieval import find_sets, read_set
from minilm.orchestrator.evaluation.sources import Source
from minilm.orchestrator.evaluation.tasks import TASKS
from minilm.orchestrator.evaluation.trials import plan_trials, run_trial
from minilm.orchestrator.recipe.schema import Evaluation
from tests.eval_data import write_search

NANO = TASKS["nanobeir"]


def test_a_set_is_the_same_in_every_layout(tmp_path):
    found = []
    for layout in ("beir", "hub", "together"):
        (files,) = find_sets(write_search(tmp_path / layout, layout))
        assert files.name == "NanoWords"
        found.append(read_set(files))
    assert found[0] == found[1] == found[2]
    assert (len(found[0].queries), len(found[0].texts)) == (8, 40)
    assert found[0].grades[1] == {1: 1, 5: 1, 9: 1, 13: 1}
    section = Evaluation.model_validate({"tasks": ["nanobeir"], "data": str(tmp_path / "together")})
    (files,) = find_sets(few_rows(section, tmp_path / "few"))  # of a rehearsal
    few = read_set(files)
    assert (few.queries, few.texts, few.grades) == (found[0].queries[:4], found[0].texts, found[0].grades[:4])


def test_sets_of_both_kinds_lie_side_by_side(tmp_path):
    data = write_search(write_search(tmp_path, "together", "NanoB"), "beir", "NanoA")
    (data / "NanoBEIR" / ".cache").mkdir()
    assert [files.name for files in find_sets(data)] == ["NanoA", "NanoB"]
    before = data_fingerprint(NANO, data)
    write_search(data, "hub", "NanoC")
    assert data_fingerprint(NANO, data) != before and check_data(NANO, data) == 0


def test_rows_as_others_publish_them(tmp_path):
    """A title, ids that are numbers, grades, several texts in a judgement, no score, a text without a character."""
    folder = tmp_path / "NanoBEIR" / "S"
    for part, rows in {
        "corpus": [
            {"_id": 1, "title": "Time", "text": "and tide"},
            {"_id": 2, "title": "", "text": "a day"},
            {"_id": 3, "title": None, "text": " "},
        ],
        "queries": [{"id": "q", "text": "when"}, {"id": "unjudged", "text": "why"}],
        "qrels": [{"query-id": "q", "corpus-id": ["1", "3"]}],
    }.items():
        (folder / part).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / part / "test-00000-of-00001.parquet")
    shutil.copy(
        folder / "qrels" / "test-00000-of-00001.parquet", folder / "qrels" / "train-00000-of-00001.parquet"
    )
    (files,) = find_sets(tmp_path)
    assert [path.name for path in files.files["qrels"]] == ["test-00000-of-00001.parquet"]
    found = read_set(files)
    assert (found.queries, found.texts, found.grades) == (
        ["when"],
        ["Time and tide", "a day", ""],
        [{0: 1, 2: 1}],
    )
    qrels = write_search(tmp_path / "b") / "NanoBEIR" / "NanoWords" / "qrels" / "test.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\nq1\td3\t2\nq1\td4\t0\nq2\td5\t0\n")
    assert read_set(find_sets(tmp_path / "b")[0]).grades == [{3: 2}]  # q2 has no answer


def test_ndcg_is_its_definition():
    """Järvelin and Kekäläinen 2002, as trec_eval has it: the gain is the grade, the discount log2(rank + 1)."""
    grades, cosines = np.zeros(30), -np.arange(30.0)
    grades[[0, 4, 20]] = (1, 2, 1)  # the one at rank 21 is not among the ten
    wanted = (1 + 2 / math.log2(6)) / (2 + 1 / math.log2(3) + 1 / 2)
    assert score(("ndcg_at_10",), grades, cosines)["ndcg_at_10"] == pytest.approx(wanted)
    assert (
        score(("ndcg_at_10",), grades, np.ones(30))["ndcg_at_10"] < 0.3
    )  # no order is worth its mean, not its luck


def trial(source, data, out):
    (planned,) = plan_trials(
        [source],
        [(NANO, PROTOCOLS["embed-fast"])],
        data,
        seeds=1,
        train_rows=None,
        device=torch.device("cpu"),
    )
    return planned, run_trial(planned, out)


def test_a_model_searches_as_plain_transformers_does_with_its_prompts(tmp_path, teacher):
    data = write_search(tmp_path, "beir", "NanoA")
    write_search(data, "hub", "NanoB", seed=7)
    corpus = data / "NanoBEIR" / "NanoA" / "corpus.jsonl"
    first, others = corpus.read_text().split("\n", 1)
    corpus.write_text(json.dumps(json.loads(first) | {"text": ""}) + "\n" + others)  # found last
    folder = shutil.copytree(teacher, tmp_path / "m")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    own = folder / "config_sentence_transformers.json"
    own.write_text('{"prompts": {"query": "time ", "passage": "place house "}}')
    planned, result = trial(Source("m", "folder", str(folder)), data, tmp_path / "out")
    assert planned.setting.tokens == 9
    assert replace(planned, prompts=("", "")).key != planned.key != replace(planned, prompts=("a", "b")).key
    model, tokenizer = AutoModel.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)

    def vector(text):
        with torch.inference_mode():
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=9)
            mean = model(**inputs).last_hidden_state[0].mean(dim=0)
        return (mean / mean.norm()).numpy()

    means = {}
    for files in find_sets(data):
        found = read_set(files)
        texts = np.stack([vector("place house " + text) for text in found.texts])
        values = []
        for query, grades in zip(found.queries, found.grades, strict=True):
            scores = np.where(list(map(bool, found.texts)), texts @ vector("time " + query), -2.0)
            order = np.argsort(-scores, kind="stable")[:10]
            gain = sum(grades.get(int(text), 0) / math.log2(rank + 2) for rank, text in enumerate(order))
            values.append(gain / sum(1 / math.log2(rank + 2) for rank in range(min(10, len(grades)))))
        means[files.name] = np.mean(values)
    found = result["metrics"]
    assert found["ndcg_at_10"] == pytest.approx(np.mean(list(means.values())), abs=1e-3)
    assert {name: found[f"ndcg_at_10_{name}"] for name in means} == pytest.approx(means, abs=1e-3)

    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"include_prompt": false}')
    with pytest.raises(
        ModelError, match=r"1_Pooling/config.json pools without the prompt \(include_prompt\); use a"
    ):
        trial(Source("m", "folder", str(folder)), data, tmp_path / "out")


def test_the_command_names_the_sets(tmp_path, teacher, capsys):
    data = write_search(tmp_path / "data")
    given = ["evaluate", str(teacher), f"random:{teacher}", "--data", str(data), "--out", str(tmp_path / "o")]
    given += ["--parallel", "1"]
    assert main([*given, "--json", "--seeds", "1"]) == 0  # it is what --data holds of the protocol
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["task"], line["metric"], line["protocol"]) for line in lines] == [
        ("nanobeir", "ndcg_at_10", "embed-fast")
    ] * 2
    assert lines[0]["others"] == {"ndcg_at_10_NanoWords": lines[0]["score"]}
    assert main([*given, "--seeds", "1"]) == 0
    assert "nanobeir: the mean over 1 set: NanoWords" in capsys.readouterr().out


ROW = {"_id": "d0", "text": "time"}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("corpus.jsonl", "", "corpus.jsonl holds 0 texts, and a ranking needs two or more; put the published"),
        ("corpus.jsonl", "[1]\n", "corpus.jsonl:1 is no JSON object; put the published file in its place"),
        ("corpus.jsonl", '{"_id": "d0"}\n', "corpus.jsonl:1: no 'text' (it has _id); put the published file"),
        ("corpus.jsonl", '{"text": "a"}\n', "corpus.jsonl:1: no '_id' or 'id' (it has text); put the published"),
        (
            "corpus.jsonl",
            '{"_id": "a", "text": "b"}\n{"_id": "a", "text": "c"}\n',
            "corpus.jsonl:2: id 'a' is there before, with another text; bring the file again",
        ),
        ("corpus.jsonl", "version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer, not the file itself"),
        ("queries.jsonl", b'{"_id": "q\xe9"}', "queries.jsonl is not UTF-8 (invalid continuation byte at byte 10)"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "test.tsv names no text that answers a query; put the"),
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nq9\td1\t1\n",
            "test.tsv:2: judges query 'q9', which DATA/NanoBEIR/NanoWords/queries.jsonl does not hold; bring the three "
            "files of NanoWords again, of one version",
        ),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td99\t1\n", "test.tsv:2: judges text 'd99', which DATA/"),
        ("qrels/test.tsv", "q1\td1\t1\nq1\td2\t1\n", "test.tsv:2: no 'query-id' (it has 1, d1, q1); put the"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t0.5\n", "score '0.5'; allowed: a whole number, 0 for"),
        (
            "corpus.jsonl",
            None,
            "task nanobeir: DATA/NanoBEIR/NanoWords has another layout (found: qrels, queries.jsonl); expected a "
            "folder for each set with corpus.jsonl, queries.jsonl, qrels/test.tsv, or with parquet files in corpus/, "
            "queries/, qrels/",
        ),
    ],
)  # fmt: skip
def test_what_is_not_as_published_is_refused(tmp_path, file, text, message):
    data = write_search(tmp_path)
    path = data / "NanoBEIR" / "NanoWords" / file
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=re.escape(message.replace("DATA", str(data)))) as caught:
        check_data(NANO, data)
    assert "\n" not in str(caught.value)


def test_parquet_that_is_not_whole_is_refused(tmp_path, teacher, capsys):
    data = write_search(tmp_path / "data", "together")
    path = data / "NanoBEIR" / "queries" / "NanoWords-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    arguments = [
        "evaluate",
        str(teacher),
        "--tasks",
        "nanobeir",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"'{path}' is damaged or no parquet file" in line
    path.unlink()
    assert main(arguments) == 2
    assert f"{path.parent} lacks NanoWords-00000-of-00001.parquet; add it as" in capsys.readouterr().err
    shutil.rmtree(data / "NanoBEIR")
    (data / "NanoBEIR").mkdir()
    assert main(arguments) == 2
    assert (
        "NanoBEIR has another layout (found: nothing); expected a folder for each" in capsys.readouterr().err
    )
    (data / "NanoBEIR").rename(data / "beir")
    assert main(arguments) == 2
    assert (
        f"task nanobeir has no folder in {data} (there: beir); expected {data}/NanoBEIR with a folder for"
        in (capsys.readouterr().err)
    )
