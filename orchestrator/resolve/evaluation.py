"""A recipe's `evaluation` section and its stages' probes against the tasks that there are, the files that are here,
and the first teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minilm.data.errors import DataError
from minilm.data.format.manifest import TokenizerInfo
from minilm.data.tokenizer import has_tokenizer
from minilm.model.errors import ModelError
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.check_data import check_data, data_files
from minilm.orchestrator.evaluation.probes.catalogue import PROBES
from minilm.orchestrator.evaluation.protocols import Protocol, protocol_of
from minilm.orchestrator.evaluation.tasks import TASKS, Task, find_tasks
from minilm.orchestrator.recipe.schema import Evaluation, Promotion, Recipe, Stage
from minilm.orchestrator.stage.data import CorpusSpec, DataSpec


def evaluation_tasks(section: Evaluation) -> list[tuple[Task, Protocol]]:
    """Each task with its protocol. UserError for names that there are not."""
    return [(task, protocol_of(task, section.protocol)) for task in find_tasks(section.tasks)]


def evaluation_problems(
    recipe: Recipe, teachers: Sequence[str] = (), *, running: bool = False, rows: bool = True
) -> list[str]:
    """Why the section can't be done, a line or none.

    teachers: those from elsewhere, which are scored too; looked at where they are folders. running: that the tasks'
    folder is not here is a reason too. rows: read all of them, as the evaluation itself does before its first trial.
    """
    promote, given = recipe.promote, recipe.tracking.alias
    if promote and given in (promote.alias, promote.against):
        return [
            f"promote: given {given!r}, which tracking.alias moves to every new version before any score is known; "
            f"give tracking or promote another alias"
        ]
    if promote and "challenger" in (promote.alias, promote.against):
        return [
            "promote: given 'challenger', which moves to every candidate, whether or not its scores hold; give another "
            "alias"
        ]
    if (section := recipe.evaluation) is None:
        why = "promote: the gate needs scores; add an evaluation section (tasks, data), or remove promote"
        return [why] if recipe.promote else []
    look = check_data if rows else data_files
    try:
        tasks = [task for task, _ in evaluation_tasks(section)]
        if missing := tasks_not_run(recipe.promote, tasks):
            return [missing]
        for teacher in map(Path, dict.fromkeys(teachers)):
            if teacher.is_dir():
                check_scored(teacher, tasks)
        if running or Path(section.data).is_dir():
            for task in tasks:
                look(task, Path(section.data))
    except UserError as error:
        return [f"evaluation: {str(error).removeprefix('--data ')}"]
    except ModelError:
        return []  # the teacher's stage says so
    return []


def tasks_not_run(promote: Promotion | None, tasks: list[Task]) -> str:
    """A line where the gate names a task that the evaluation does not run. UserError for a name of no task."""
    asked = find_tasks(promote.tasks) if promote and promote.tasks else []
    run = [task.name for task in tasks]
    other = [task.name for task in asked if task.name not in run]
    return (
        f"promote.tasks: given {other[0]!r}, which evaluation.tasks does not run; allowed: {', '.join(run)}; or add it "
        f"to evaluation.tasks"
        if other
        else ""
    )


def probe_problems(recipe: Recipe, *, running: bool = False, rows: bool = True) -> list[str]:
    """Why a stage's probes can't read what they need, a line for each stage. `running`, `rows`: as above."""
    look = check_data if rows else data_files
    problems, seen = [], set()
    for stage in recipe.stages:
        for item in stage.evaluate:
            name, data = PROBES[item.probe].task, Path(item.data or "")
            if item.data is None or (name, data) in seen or not (running or data.is_dir()):
                continue
            seen.add((name, data))
            try:
                look(TASKS[name], data) if name else other_rows(data)
            except (UserError, DataError) as error:
                text = str(error).removeprefix("--data ")
                problems.append(f"stage {stage.name}: probe {item.probe}: {text}")
    return problems


def other_rows(folder: Path) -> DataSpec:
    """The data set whose held-out rows a probe reads. UserError or DataError where it can't be read."""
    from minilm.orchestrator.feed.corpora import describe

    return describe([CorpusSpec("other", str(folder))])


def other_rows_problems(stage: Stage, seq_len: int, tokenizer: TokenizerInfo | None) -> list[str]:
    """Why the stage's models can't read the rows of other data sets that its probes name, a line for each.

    seq_len, tokenizer: of the stage's own data. What `probe_problems` says is not said again.
    """
    problems = []
    for item in stage.evaluate:
        if not (PROBES[item.probe].rows and item.data and Path(item.data).is_dir()):
            continue
        try:
            other = other_rows(Path(item.data))
        except (UserError, DataError):
            continue
        if other.seq_len > seq_len:
            what = f"has rows of {other.seq_len} tokens, and the stage's have {seq_len}"
            problems.append(
                f"probe {item.probe}: data set {item.data} {what}; build it with --seq-len {seq_len}"
            )
        elif tokenizer and other.vocabulary.vocabulary_fingerprint != tokenizer.vocabulary_fingerprint:
            what = "was made with another tokenizer than the stage's data"
            problems.append(
                f"probe {item.probe}: data set {item.data} {what}, and the same ids would mean other tokens; build it "
                f"with the stage's tokenizer"
            )
    return [f"stage {stage.name}: {problem}" for problem in problems]


def check_scored(teacher: Path, tasks: list[Task]) -> None:
    """UserError where a teacher that can be learned from, and with it its students, can't be scored."""
    if not has_tokenizer(teacher):
        raise UserError(
            f"the teacher has no tokenizer in {teacher}, and it is scored too; save its tokenizer there with "
            f"save_pretrained"
        )
    from minilm.model.encoder.sentence_layout import read_search_texts
    from minilm.model.encoder.shape import load_config  # takes torch along: seconds to import
    from minilm.orchestrator.evaluation.fine_tune import check_head
    from minilm.orchestrator.evaluation.sources import Source, head_of

    for task in tasks:
        check_head(load_config(teacher).model_type, task.kind)
        if not task.is_trained:
            try:
                head_of(Source(str(teacher), "folder", str(teacher)))
                read_search_texts(teacher)
            except ModelError as error:  # of its vectors, which no stage may have read
                raise UserError(f"the teacher is scored too, and {error}") from error
