"""Small made-up task folders in the layouts in which tasks are published."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.conftest import WORDS

TIME, PLACE = WORDS[:20], WORDS[20:40]  # two kinds of words, which a classifier can tell apart


def sentence(rng: random.Random, words: list[str]) -> str:
    return " ".join(rng.choices(words, k=rng.randint(3, 9)))


def labelled(count: int, seed: int) -> list[tuple[str, int]]:
    """Sentences of one kind of words or the other."""
    rng = random.Random(seed)
    return [(sentence(rng, (TIME, PLACE)[i % 2]), i % 2) for i in range(count)]


def pairs(count: int, seed: int) -> list[tuple[str, str, float]]:
    """Pairs with a score of 0 to 5: the share of words that they have in common."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        one = rng.sample(WORDS, 5)
        kept = i % 6
        other = one[:kept] + rng.sample([word for word in WORDS if word not in one], 5 - kept)
        found.append((" ".join(one), " ".join(other), float(kept)))
    return found


def write_lines(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def write_sst2(root: Path, train: int = 64, dev: int = 24) -> Path:
    for name, count, seed in (("train", train, 0), ("dev", dev, 1)):
        rows = [[text + " ", str(label)] for text, label in labelled(count, seed)]
        write_lines(root / "SST-2" / f"{name}.tsv", [["sentence", "label"], *rows])
    return root


def write_cola(root: Path, *, glue: bool, train: int = 64) -> Path:
    """GLUE's two files, or the three of the corpus itself: the same rows."""

    def rows(count: int, seed: int) -> list[list[str]]:
        return [["gj04", str(label), "" if label else "*", text] for text, label in labelled(count, seed)]

    if glue:
        write_lines(root / "CoLA" / "train.tsv", rows(train, 0))
        write_lines(root / "CoLA" / "dev.tsv", rows(16, 1) + rows(8, 2))
    else:
        write_lines(root / "cola" / "in_domain_train.tsv", rows(train, 0))
        write_lines(root / "cola" / "in_domain_dev.tsv", rows(16, 1))
        write_lines(root / "cola" / "out_of_domain_dev.tsv", rows(8, 2))
    return root


def write_stsb(root: Path, *, glue: bool) -> Path:
    for name, count, seed in (("train", 48, 0), ("dev", 24, 1), ("test", 30, 2)):
        found = pairs(count, seed)
        if glue:
            header = [
                "index",
                "genre",
                "filename",
                "year",
                "old_index",
                "source1",
                "source2",
                "sentence1",
                "sentence2",
            ]
            tail = [] if name == "test" else ["score"]
            rows = [
                [
                    str(i),
                    "g",
                    "f",
                    "2012",
                    "0",
                    "none",
                    "none",
                    one,
                    other,
                    *([f"{score:.3f}"] if tail else []),
                ]
                for i, (one, other, score) in enumerate(found)
            ]
            write_lines(root / "STS-B" / f"{name}.tsv", [header + tail, *rows])
        else:
            rows = [
                ["g", "f", "2012", f"{i:04}", f"{score:.3f}", one, other]
                for i, (one, other, score) in enumerate(found)
            ]
            write_lines(root / "stsb" / f"sts-{name}.csv", rows)
    return root


def write_mnli(root: Path) -> Path:
    header = ["index", "promptID", "sentence1", "sentence2", "label1", "gold_label"]
    labels = ("entailment", "neutral", "contradiction")
    for name, count in (("train", 30), ("dev_matched", 12), ("dev_mismatched", 15)):
        rows = [
            [str(i), "0", one, other, "x", labels[i % 3]] for i, (one, other, _) in enumerate(pairs(count, 3))
        ]
        write_lines(root / "MNLI" / f"{name}.tsv", [header, *rows])
    return root


def write_xnli(root: Path) -> Path:
    header = ["language", "gold_label", "sentence1", "sentence2"]
    labels = ("entailment", "neutral", "contradiction")
    rows = [
        [("en", "de")[i % 2], labels[i % 3], one, other] for i, (one, other, _) in enumerate(pairs(24, 4))
    ]
    write_lines(root / "XNLI" / "xnli.test.tsv", [header, *rows])
    return root


def write_squad(root: Path, count: int = 24) -> Path:
    """Questions with a word of the passage; the answer is the word after it, or none where it is not there."""
    rng = random.Random(5)
    for split in ("train", "dev"):
        paragraphs = []
        for number in range(count):
            words = rng.sample(WORDS, 12)
            place = rng.randrange(11)
            start = len(" ".join(words[: place + 1])) + 1
            answers = [{"text": words[place + 1], "answer_start": start}]
            absent = next(word for word in WORDS if word not in words)
            paragraphs.append(
                {
                    "context": " ".join(words),
                    "qas": [
                        {
                            "id": f"{split}{number}a",
                            "question": words[place],
                            "answers": answers,
                            "is_impossible": False,
                        },
                        {"id": f"{split}{number}n", "question": absent, "answers": [], "is_impossible": True},
                    ],
                }
            )
        path = root / "SQuAD2" / f"{split}-v2.0.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return root


SEARCH_TOPICS = (TIME[:10], TIME[10:], PLACE[:10], PLACE[10:])


def write_search(root: Path, layout: str = "beir", name: str = "NanoWords", seed: int = 6) -> Path:
    """Queries of a topic's words, answered by the texts of that topic. layout: "beir", a folder of parquet files for
    the set ("hub"), or a part of a folder of all sets ("together")."""
    rng = random.Random(seed)
    texts = [{"_id": f"d{i}", "text": sentence(rng, SEARCH_TOPICS[i % 4])} for i in range(40)]
    queries = [{"_id": f"q{i}", "text": sentence(rng, SEARCH_TOPICS[i % 4])} for i in range(8)]
    judged = [
        {"query-id": query["_id"], "corpus-id": text["_id"], "score": 1}
        for i, query in enumerate(queries)
        for text in texts[i % 4 :: 4][:4]
    ]
    folder = root / "NanoBEIR"
    parts = {"corpus": texts, "queries": queries, "qrels": judged}
    if layout != "beir":
        import pyarrow as pa
        import pyarrow.parquet as pq

        for part, rows in parts.items():
            if layout == "hub":
                path = folder / name / part / "train-00000-of-00001.parquet"
            else:
                path = folder / part / f"{name}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), path)
        return root
    (folder / name / "qrels").mkdir(parents=True)
    for part in ("corpus", "queries"):
        lines = "".join(json.dumps(row) + "\n" for row in parts[part])
        (folder / name / f"{part}.jsonl").write_text(lines)
    rows = [["query-id", "corpus-id", "score"], *(list(map(str, row.values())) for row in judged)]
    write_lines(folder / name / "qrels" / "test.tsv", rows)
    return root
