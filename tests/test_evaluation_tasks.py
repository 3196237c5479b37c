"""Published files become examples, from every layout; what is not as published is refused with file and line."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score
from transformers import AutoTokenizer

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.metrics import score
from minilm.orchestrator.evaluation.protocols import PROTOCOLS, protocol_of
from minilm.orchestrator.evaluation.read_tables import find_layout, has_split, read_split, task_folder
from minilm.orchestrator.evaluation.squad import Question, read_questions, windows
from minilm.orchestrator.evaluation.squad_score import exact, f1, normalize_answer, score_squad
from minilm.orchestrator.evaluation.tasks import TASKS, find_tasks
from minilm.orchestrator.verbs.evaluate import PROTOCOL_NAMES
from tests.conftest import WORDS
from tests.eval_data import (
    write_cola,
    write_lines,
    write_mnli,
    write_squad,
    write_sst2,
    write_stsb,
    write_xnli,
)


def test_cola_is_the_same_from_glue_and_from_its_own_files(tmp_path):
    both = [write_cola(tmp_path / str(glue), glue=glue) for glue in (True, False)]
    for split in ("train", "dev"):
        one, other = (read_split(TASKS["cola"], root, split) for root in both)
        assert one.first == other.first and one.second is None
        assert one.labels.tolist() == other.labels.tolist()
    assert len(one) == 24  # in domain and out of domain, as GLUE has them in one file


def test_stsb_is_the_same_from_glue_and_from_its_own_files(tmp_path):
    both = [write_stsb(tmp_path / str(glue), glue=glue) for glue in (True, False)]
    for split in ("train", "dev"):
        one, other = (read_split(TASKS["stsb"], root, split) for root in both)
        assert (one.first, one.second) == (other.first, other.second)
        assert one.labels.tolist() == other.labels.tolist()
    # GLUE's test file has no scores, and is no split
    assert [has_split(TASKS["stsb-embed"], root, "test") for root in both] == [False, True]


def test_quotes_and_a_byte_order_mark_are_text(tmp_path):
    rows = [["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["1", "1", "2", '"a', 'b " c']]
    for name in ("train", "dev"):
        write_lines(tmp_path / "MRPC" / f"{name}.tsv", rows)
    found = read_split(TASKS["mrpc"], tmp_path, "train")
    assert (found.first, found.second) == (['"a'], ['b " c'])


def test_folders_are_found_whatever_case_and_hyphens_they_have(tmp_path):
    for name in ("SST-2", "sst2", "sst_2"):
        (tmp_path / name / name).mkdir(parents=True)
        assert task_folder(TASKS["sst2"], tmp_path / name).name == name


def test_mnli_has_two_dev_splits_and_xnli_learns_from_it(tmp_path):
    write_xnli(write_mnli(tmp_path))
    assert len(read_split(TASKS["mnli"], tmp_path, "mismatched")) == 15
    assert len(read_split(TASKS["xnli"], tmp_path, "train")) == 30
    assert set(read_split(TASKS["xnli"], tmp_path, "dev").languages) == {"en", "de"}


def test_rows_that_nobody_could_label_are_left_out(tmp_path):
    write_mnli(tmp_path)
    path = tmp_path / "MNLI" / "dev_matched.tsv"
    path.write_text(path.read_text() + "9\t0\ta\tb\tx\t-\n")
    assert len(read_split(TASKS["mnli"], tmp_path, "matched")) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("label", r"dev.tsv:2: label '2'; allowed in sst2: 0, 1$"),
        (
            "header",
            r"dev.tsv:1: no column 'label' in its header \(sentence, lable\); expected the published file of sst2",
        ),
        ("columns", r"dev.tsv:2: 1 columns, expected 2 or more \(1 of 1 rows are so\)"),
        ("empty", r"dev.tsv holds no rows; put the published file in its place"),
        (
            "layout",
            r"task sst2: .*SST-2 has another layout \(found: dev.csv, train.csv\); expected train.tsv, dev.tsv$",
        ),
        ("part", r"task sst2: .*SST-2 lacks dev.tsv; add it as it is published"),
        (
            "folder",
            r"task sst2 has no folder in .* \(there: MRPC\); expected .*SST-2 with train.tsv, dev.tsv",
        ),
        ("latin1", r"dev.tsv is not UTF-8 \(.* at byte 18\); convert it"),
    ],
)
def test_what_is_not_as_published_is_refused(tmp_path, change, message):
    folder = write_sst2(tmp_path) / "SST-2"
    dev = folder / "dev.tsv"
    if change == "layout":
        for path in folder.iterdir():
            path.rename(path.with_suffix(".csv"))
    elif change == "part":
        dev.unlink()
    elif change == "folder":
        folder.rename(tmp_path / "MRPC")
    elif change == "latin1":
        dev.write_bytes(b"sentence\tlabel\nwor\xe9\t1\n")
    else:
        text = {
            "label": "sentence\tlabel\na word\t2\n",
            "header": "sentence\tlable\na word\t1\n",
            "columns": "sentence\tlabel\na word\n",
            "empty": "sentence\tlabel\n",
        }
        dev.write_text(text[change])
    with pytest.raises(UserError, match=message):
        find_layout(TASKS["sst2"], tmp_path)
        read_split(TASKS["sst2"], tmp_path, "dev")


def test_a_score_out_of_range_is_refused(tmp_path):
    write_stsb(tmp_path, glue=False)
    path = tmp_path / "stsb" / "sts-dev.csv"
    path.write_text(path.read_text().replace("5.000", "6.000", 1))
    with pytest.raises(
        UserError, match=r"sts-dev.csv:6: score '6.000'; allowed in stsb: a number from 0 to 5"
    ):
        read_split(TASKS["stsb"], tmp_path, "dev")


def test_task_names_are_guessed():
    assert [task.name for task in find_tasks(["SST-2", "STS-B", "sst2"])] == ["sst2", "stsb"]
    with pytest.raises(
        UserError, match=r"no task is called 'colla'; did you mean 'cola'\? there are cola, sst2"
    ):
        find_tasks(["colla"])


def test_a_task_goes_by_its_own_protocol():
    assert set(PROTOCOLS) == set(PROTOCOL_NAMES)
    assert protocol_of(TASKS["cola"], None).name == "glue-fixed"
    assert protocol_of(TASKS["cola"], "glue-minilm").name == "glue-minilm"
    assert protocol_of(TASKS["stsb-embed"], "glue-fixed").name == "embed-fast"
    with pytest.raises(
        UserError, match="protocol embed-fast does not have task cola; it has stsb-embed, nanobeir, and"
    ):
        protocol_of(TASKS["cola"], "embed-fast")


def test_the_grid_is_the_papers():
    protocol = PROTOCOLS["glue-minilm"]
    sst2, cola = (protocol.settings_of(TASKS[name]) for name in ("sst2", "cola"))
    assert {s.learning_rate for s in sst2} == {2e-5, 3e-5, 4e-5, 5e-5}
    assert ({s.epochs for s in sst2}, {s.epochs for s in cola}) == ({3, 4, 5}, {3, 4, 5, 10})
    assert {(s.tokens, s.batch) for s in cola} == {(128, 32)} and protocol.seeds_of(10**6) == 4
    (squad,) = PROTOCOLS["squad2"].settings
    assert (squad.tokens, squad.stride, squad.epochs, squad.learning_rate) == (384, 128, 3, 6e-5)


def test_metrics_are_their_definitions():
    labels, predicted = np.array([1, 1, 0, 0, 1, 0]), np.array([1, 0, 0, 1, 1, 0])  # tp 2, tn 2, fp 1, fn 1
    found = score(("accuracy", "f1", "matthews"), labels, predicted)
    assert found == pytest.approx({"accuracy": 4 / 6, "f1": 4 / 6, "matthews": (2 * 2 - 1) / 9})
    assert found["f1"] == f1_score(labels, predicted)
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 10.0])
    assert score(("spearman",), x, y)["spearman"] == pytest.approx(1.0)
    assert score(("pearson",), x, y)["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_one_prediction_for_all_is_no_better_than_chance():
    labels = np.array([1.0, 2.0, 3.0])
    assert score(("pearson", "spearman"), labels, np.ones(3)) == {"pearson": 0.0, "spearman": 0.0}
    assert score(("matthews", "f1"), np.array([0, 1]), np.zeros(2, dtype=int)) == {"matthews": 0.0, "f1": 0.0}


def test_squad_answers_are_compared_as_the_official_script_does():
    assert normalize_answer("The  Cat's, a (Hat)!") == "cats hat"
    assert exact("the Eiffel Tower", "Eiffel tower.") == 1.0
    assert f1("a blue sky today", "blue sky") == pytest.approx(2 * 1.0 * (2 / 3) / (1 + 2 / 3))
    assert (f1("", ""), f1("", "x"), f1("the", "")) == (1.0, 0.0, 1.0)  # an article alone is nothing
    # the case that the script's documentation gives: one question, answered rightly
    assert score_squad({"q": ["1976"]}, {"q": "1976"}, {"q": 0.0}) == {"f1": 1.0, "exact": 1.0}


def test_squad_threshold_is_the_best_for_each_score():
    answers = {"a": ["red cat", "cat"], "b": [], "c": ["green dog"], "d": []}
    predicted = {"a": "cat", "b": "house", "c": "dog", "d": "tree"}
    # a is surest of its answer, then c, then the two that have none: both kept as "none" at the best threshold
    none = {"a": -3.0, "c": -1.0, "b": 1.0, "d": 2.0}
    assert score_squad(answers, predicted, none) == {"f1": (2 + 1 + 2 / 3) / 4, "exact": 3 / 4}
    # the other way round nothing is worth answering but at the cost of the two
    assert score_squad(answers, predicted, {k: -v for k, v in none.items()}) == {"f1": 0.5, "exact": 0.5}


def test_squad_files_are_checked(tmp_path):
    write_squad(tmp_path)
    questions = read_questions(tmp_path, "dev")
    assert len(questions) == 48 and sum(not question.answers for question in questions) == 24
    path = tmp_path / "SQuAD2" / "dev-v2.0.json"
    path.write_text(path.read_text().replace('"answer_start": ', '"answer_start": 1', 1))
    with pytest.raises(
        UserError, match=r"dev-v2.0.json: question dev0a: its passage has .* and the answer is"
    ):
        read_questions(tmp_path, "dev")
    path.write_text(
        '{"data": [{"paragraphs": [{"context": 5, "qas": [{"id": 1, "question": "?", "answers": []}]}]}]}'
    )
    with pytest.raises(UserError, match="a passage or an answer is no text"):
        read_questions(tmp_path, "dev")
    path.write_text('{"rows": []}')
    with pytest.raises(UserError, match=r"dev-v2.0.json is not SQuAD 2.0's JSON"):
        read_questions(tmp_path, "dev")


@pytest.mark.parametrize("tokens", [384, 32])
def test_windows_share_the_stride_and_have_room_beside_a_long_question(teacher, tokens):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    passage = " ".join(WORDS * 12)
    answer = passage.split()[200]
    asked = [
        Question("q", WORDS[0], passage, (), -1),
        Question("long", " ".join(WORDS * 9), passage, (answer,), 5),
    ]
    found = windows(asked, tokenizer, tokens, 128)
    assert max(len(row.inputs["input_ids"]) for row in found) == tokens
    first, second = ({pair for pair in row.offsets if pair} for row in found[:2])
    assert len(first & second) == min(128, tokens // 3)
    for number in (0, 1):  # every token of the passage is in some window
        pieces = [pair for row in found if row.question == number for pair in row.offsets if pair]
        whole = tokenizer(passage, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert set(pieces) == set(map(tuple, whole))
