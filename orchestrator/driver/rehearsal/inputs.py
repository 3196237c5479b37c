"""What a rehearsal reads: the real data set, models and tasks where that needs no writing, else a part of them."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from minilm.data.builder.tokenization import pieces
from minilm.data.format.manifest import MANIFEST
from minilm.data.sources import text
from minilm.data.sources.accounts import Accounts
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.check_data import check_data, data_files
from minilm.orchestrator.evaluation.retrieval import RetrievalSet, find_sets, read_set, write_set
from minilm.orchestrator.evaluation.tasks import find_tasks
from minilm.orchestrator.recipe.changes import text_changed
from minilm.orchestrator.recipe.references import HubRef, RegistryRef, absent_package, parse_reference
from minilm.orchestrator.recipe.schema import Data, Evaluation, Recipe
from minilm.orchestrator.resolve.folders import model_folder, text_inputs
from minilm.orchestrator.stage.folder import RunFolder
from minilm.orchestrator.system.files import read_json

CHARACTERS_A_TOKEN = 6  # more than text has, so that there are rows enough
FEWEST_CHARACTERS, MOST_CHARACTERS = 200_000, 64_000_000
SAMPLE_SECONDS, SAMPLE_UNITS = 30.0, 8
TASK_ROWS = 100


class Inputs:
    """Of `recipe`, whose own work directory is `real`; what has to be made goes to the run folder `scratch`."""

    def __init__(self, recipe: Recipe, real: Workdir, scratch: RunFolder):
        self.recipe, self.real, self.scratch = recipe, real, scratch
        self.shards = self.built()
        self.sample: Path | None = None
        self.tasks: Path | None = None
        self.data = "the recipe's data sets, in place"
        if self.shards:
            self.data = f"the data set in {self.shards}, in place"

    def built(self) -> Path | None:
        """The data set that the real run has built of this very text."""
        record = read_json(self.real.run)
        if not (self.recipe.data.text and record and (self.real.data / MANIFEST).exists()):
            return None
        same = not text_changed(record, {"recipe": self.recipe.result_fields()})
        return self.real.data if same else None

    def place(self, reference: str) -> str:
        """Where a model is read from that is no student of the recipe; a hub's is fetched by the run itself, unless the
        real run has it."""
        if absent_package(reference):
            return reference
        match parse_reference(reference):
            case HubRef(hub_id):
                folder = self.real.teachers / hub_id.replace("/", "--")
                return str(folder) if folder.is_dir() else reference
            case RegistryRef():
                return str(model_folder(parse_reference(reference), self.registry()))
        return reference

    def registry(self) -> RunFolder:
        """Where registered models are pulled to, with a copy of the real run's own registry; a server is asked."""
        own, store = RunFolder(self.scratch.root / "registry"), self.real.root / "mlflow.db"
        copy = own.root / store.name
        if not store.exists() and not os.environ.get("MLFLOW_TRACKING_URI"):
            return self.real  # which says that there is none
        if store.exists() and not copy.exists():
            own.root.mkdir(parents=True, exist_ok=True)
            with (
                closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as source,
                closing(sqlite3.connect(copy)) as target,
            ):
                source.backup(target)
        return own

    def take_sample(self) -> None:
        """Where the text is not built yet, write as much of it as the rehearsal needs. Raises `DataError` for text that
        can't be read."""
        data = self.recipe.data
        if data.text is None or self.shards:
            return
        if data.source != "text":
            self.data = f"all that source {data.source} reads, built in the scratch folder"
            return
        rows = 3 * max(stage.batch for stage in self.recipe.stages)
        wanted = min(max(rows * data.seq_len * CHARACTERS_A_TOKEN, FEWEST_CHARACTERS), MOST_CHARACTERS)
        path = self.scratch.root / "sample.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        size, began = 0, time.monotonic()
        with path.open("w", encoding="utf-8") as file:
            for document in documents(data):
                file.write(json.dumps({"text": document}) + "\n")
                size += len(document)
                if size >= wanted or time.monotonic() - began > SAMPLE_SECONDS:
                    break
        self.sample = path
        self.data = f"{size:,} characters of the text, built in the scratch folder"

    def take_tasks(self) -> None:
        """A folder of the evaluation's tasks with a few rows each."""
        if (section := self.recipe.evaluation) is None:
            return
        with suppress(UserError):  # the run says what is wrong
            self.tasks = few_rows(section, self.scratch.root / "tasks")


def documents(data: Data) -> Iterator[str]:
    """Documents of the text from all over it, long ones in pieces."""
    plan = text.plan(text_inputs(data.text or ()), None, data.source_options())
    count = min(SAMPLE_UNITS, len(plan.units))
    units = [plan.units[i * len(plan.units) // count] for i in range(count)]
    streams = [pieces(text.read(plan.spec, unit), Accounts()) for unit in units]
    while streams:
        for stream in list(streams):
            document = next(stream, None)
            if document is None:
                streams.remove(stream)
            elif len(document.content):
                yield str(document.content)


def few_rows(section: Evaluation, out: Path) -> Path:
    """A copy of each task's folder in `section.data` with the first rows of its files. `UserError` where one lacks, or
    any of its rows is not as published."""
    data = Path(section.data)
    for task in find_tasks(section.tasks):
        check_data(task, data)
        if task.kind == "retrieval":
            for files in find_sets(data)[:2]:
                write_set(few_searches(read_set(files)), out / task.folders[0] / files.name)
            continue
        for file in data_files(task, data):
            to = out / file.relative_to(data)
            to.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".json":
                to.write_text(json.dumps(few_questions(json.loads(file.read_text(encoding="utf-8")))))
                continue
            with file.open("rb") as lines, to.open("wb") as copy:
                for _, line in zip(range(TASK_ROWS + 1), lines, strict=False):
                    copy.write(line)
    return out


def few_searches(found: RetrievalSet) -> RetrievalSet:
    """The first queries, the texts that answer them, and other first texts."""
    grades = found.grades[:4]
    kept = sorted({*range(min(TASK_ROWS, len(found.texts)))}.union(*grades))
    numbers = {number: i for i, number in enumerate(kept)}
    return RetrievalSet(
        found.queries[:4],
        [found.texts[number] for number in kept],
        [{numbers[number]: grade for number, grade in one.items()} for one in grades],
    )


def few_questions(squad: dict[str, Any]) -> dict[str, Any]:
    """Of SQuAD's file those of its first passages that have any."""
    passages = [passage for article in squad["data"] for passage in article["paragraphs"] if passage["qas"]]
    return {**squad, "data": [{"title": "", "paragraphs": passages[:4]}]}
