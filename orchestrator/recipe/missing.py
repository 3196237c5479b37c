"""What a recipe names that this machine lacks."""

import glob
from pathlib import Path

from minilm.orchestrator.recipe.references import (
    FolderRef,
    HubRef,
    RegistryRef,
    absent_package,
    parse_reference,
)
from minilm.orchestrator.recipe.schema import (
    Corpus,
    Data,
    Recipe,
)


def missing_inputs(recipe: Recipe) -> list[str]:
    """One line for each file or folder that the recipe names and this machine lacks.

    Hub ids and registered models are not looked up: that needs the network.
    """
    notes: list[str] = []
    data = recipe.data
    for corpus in data.corpora or ():
        notes += _missing_corpus(corpus, data)
    notes += missing_text(data)
    if recipe.evaluation and not Path(recipe.evaluation.data).is_dir():
        given = recipe.evaluation.data
        notes.append(
            f"evaluation.data: given {given!r}, but there is no such folder; --set evaluation.data=DIR"
        )
    for stage in recipe.stages:
        for i, item in enumerate(stage.evaluate):
            own = item.data and not (recipe.evaluation and item.data == recipe.evaluation.data)
            if own and not Path(str(item.data)).is_dir():
                key = f"stages.{stage.name}.evaluate.{i}.data"
                notes.append(f"{key}: given {item.data!r}, but there is no such folder; --set {key}=DIR")
    for key, text in _references(recipe):
        if absent := absent_package(text):
            notes.append(f"{key}: {absent}, or give another{_override(key)}")
            continue
        reference = parse_reference(text)
        if isinstance(reference, FolderRef) and not reference.path.is_dir():
            notes.append(f"{key}: given {text!r}, but there is no such folder; give yours{_override(key)}")
    return notes


def missing_text(data: Data) -> list[str]:
    """One line for each of `data.text` that is not on this machine."""
    notes: list[str] = []
    for pattern in data.text or ():
        if absent := absent_package(pattern):
            notes.append(f"data.text: {absent}, or give yours: --set data.text=FILES")
        elif not Path(pattern).exists() and not glob.glob(pattern, recursive=True):  # noqa: PTH207 (absolute)
            what = "no such file, or none that matches"
            notes.append(f"data.text: given {pattern!r}, but there is {what}; --set data.text=FILES")
    return notes


def unseen_inputs(recipe: Recipe) -> list[str]:
    """One line for each model of a hub or registry, which nobody looks at before a run fetches it."""
    notes = []
    for key, text in _references(recipe):
        if not absent_package(text):
            reference = parse_reference(text)
            if isinstance(reference, HubRef | RegistryRef):
                notes.append(
                    f"{key}: {text} is fetched by a run; to have it looked at, give a folder{_override(key)}"
                )
    return notes


def _references(recipe: Recipe) -> list[tuple[str, str]]:
    """Tokenizers, the models that students start from, and the teachers that are no students, each with its key."""
    data = recipe.data
    references = [("data.tokenizer", data.tokenizer)] if data.tokenizer else []
    references += [
        (f"{_place(corpus, data)}source_tokenizer", corpus.source_tokenizer)
        for corpus in data.corpora or ()
        if corpus.source_tokenizer
    ]
    references += [
        (f"stages.{stage.name}.teacher", stage.teacher)
        for stage in recipe.stages
        if stage.teacher not in recipe.student_names
    ]
    return references + [
        (f"stage {stage.name}, student {student.name}: init", student.starts_from)
        for stage in recipe.stages
        for student in stage.students
        if student.starts_from and student.starts_from not in recipe.student_names
    ]


def _place(corpus: Corpus, data: Data) -> str:
    """What stands before a corpus's key: of several, whose path depends on how the file writes them, the name."""
    return "data." if len(data.corpora or ()) == 1 else f"corpus {corpus.name}: "


def _override(key: str) -> str:
    return "" if " " in key else f": --set {key}=FOLDER"


def _missing_corpus(corpus: Corpus, data: Data) -> list[str]:
    where, shards = _place(corpus, data), corpus.shards
    if shards is not None and "://" not in shards and not (Path(shards) / "manifest.json").is_file():
        return [
            f"{where}shards: given {shards!r}, but there is no data set (no manifest.json): "
            f"make one with `minilm data build`, or give another{_override(where + 'shards')}"
        ]
    files = [f"{corpus.tokens}.bin", f"{corpus.tokens}.idx"] if corpus.tokens else []
    files += [file for file in (corpus.fairseq_dict, corpus.encoder) if file]
    return [
        f"{where}tokens: given {corpus.tokens!r}, but there is no file {file!r}; give the prefix of a pair"
        for file in files
        if not Path(file).is_file()
    ]
