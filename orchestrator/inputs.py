"""What a stage needs becomes folders that every worker can read: the data set, and the teacher.

Text becomes shards (once), a registry URI or hub id becomes a folder in the work directory, an earlier student is
the folder that its stage exported. Then teacher, data and students are checked against each other before anything
starts, from the configurations alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from data.build import BuildProgress, build
from data.errors import DataError
from data.remote import is_remote
from data.tokenizer import load_tokenizer, vocabulary_fingerprint
from model.errors import ModelError
from model.objective import Objective
from model.shape import EncoderShape, load_config, shape_of, tapped_layer
from orchestrator.corpora import describe
from orchestrator.data_job import CacheJob, CorpusJob, DataJob, PairJob, QuarantineJob
from orchestrator.errors import UserError
from orchestrator.recipe import Corpus, Recipe, Stage
from orchestrator.references import (
    FolderRef,
    HubRef,
    Reference,
    RegistryRef,
    StudentRef,
    package_path,
    parse_reference,
)
from orchestrator.workdir import Workdir

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def prepare_data(
    recipe: Recipe, workdir: Workdir, progress: Callable[[BuildProgress], None] | None
) -> DataJob:
    """What the recipe's stages read, opened once; built into the work directory first when the recipe names text."""
    data = recipe.data
    tokenizer = "" if data.tokenizer is None else str(model_folder(data.tokenizer_ref, recipe, workdir))
    if data.text is not None:
        build(
            text_inputs(data.text),
            tokenizer,
            workdir.data,
            seq_len=data.seq_len,
            packing=data.packing,
            held_out=data.held_out,
            seed=recipe.seed,
            text_field=data.text_field,
            progress=progress,
        )
        corpora = [CorpusJob("text", str(workdir.data.resolve()))]
    else:
        corpora = [corpus_job(corpus, recipe, workdir, tokenizer) for corpus in data.corpora or ()]
    cache = CacheJob(None if data.cache is None else str(data.cache), data.cache_gigabytes)
    job = describe(corpora, window=data.window, cache=cache)
    if data.on_corrupt == "quarantine":
        path = str(workdir.quarantine.resolve())
        job = replace(job, quarantine=QuarantineJob(path, data.max_quarantined_share))
    if is_remote(corpora[0].place):  # the cache is this node's, the work directory every node's
        copy_whole(Path(job.tokenizer), workdir.tokenizer)
        job = replace(job, tokenizer=str(workdir.tokenizer.resolve()))
    return job


def corpus_job(corpus: Corpus, recipe: Recipe, workdir: Workdir, tokenizer: str) -> CorpusJob:
    """The corpus as plain values, not opened yet. `tokenizer`: the teacher's, for pairs that are read in place."""
    if corpus.shards is not None:
        return CorpusJob(corpus.name, corpus.shards, corpus.weight)
    source = corpus.source_tokenizer
    pair = PairJob(
        tokenizer=tokenizer,
        seq_len=recipe.data.seq_len,
        held_out=recipe.data.held_out,
        source_tokenizer=source and str(model_folder(parse_reference(source), recipe, workdir)),
        fairseq_dict=corpus.fairseq_dict,
        encoder=corpus.encoder,
    )
    assert corpus.tokens is not None  # recipe_types: shards or tokens
    return CorpusJob(corpus.name, corpus.tokens, corpus.weight, pair=pair)


def copy_whole(folder: Path, to: Path) -> None:
    """Copy a folder; it is there whole or not at all."""
    part = to.with_name(f"{to.name}.part")
    for left in (part, to):
        if left.exists():
            shutil.rmtree(left)
    shutil.copytree(folder, part)
    part.rename(to)


def model_folder(ref: Reference, recipe: Recipe, workdir: Workdir) -> Path:
    """The folder of a teacher or tokenizer. Raises `UserError` when it can't be had."""
    match ref:
        case FolderRef(path):
            if not (path / "config.json").exists() and not (path / "tokenizer.json").exists():
                raise UserError(
                    f"{path} is not a model folder (no config.json in it); give a transformers folder, a hub id, "
                    f"models:/NAME@ALIAS, package:NAME/PATH or an earlier student's name"
                )
            return path.resolve()
        case StudentRef(name):
            stage = next(s for s in recipe.stages if any(student.name == name for student in s.students))
            return workdir.stage(stage.name).student(name).resolve()
        case RegistryRef():
            from orchestrator.mlflow_server import is_missing, tracking_uri
            from orchestrator.registry import pull_once

            store = tracking_uri(workdir.root)
            try:
                return pull_once(store, ref.uri, workdir.teachers).resolve()
            except UserError as error:
                if not is_missing(store):
                    raise
                raise UserError(
                    f"{ref.uri} was to come from this work directory's own registry, and there is no "
                    f"{store.removeprefix('sqlite:///')}; set MLFLOW_TRACKING_URI to where the model is registered, "
                    f"or bring it down (`minilm pull {ref.uri} DIR --workdir OTHER`) and give the folder instead"
                ) from error
        case HubRef(hub_id):
            return download(hub_id, workdir.teachers)


def text_inputs(patterns: Sequence[str]) -> list[str | Path]:
    """What `data.build` is given for paths, folders, globs and `package:NAME/PATH`."""
    return [package_path(p) if p.startswith("package:") else p for p in patterns]


def tokenizer_name(text: str) -> str:
    """A folder or hub id that `data build` can load a tokenizer from, for a reference given on the command line."""
    match parse_reference(text):
        case FolderRef(path):
            return str(path.absolute())  # `./name` without its dot would be a hub id
        case HubRef(hub_id):
            return hub_id if not Path(hub_id).is_dir() else str(Path(hub_id).resolve())
        case ref:
            raise UserError(
                f"--tokenizer {text}: a {type(ref).__name__} can't be used here; give a folder, package:NAME/PATH or a "
                f"hub id (`minilm pull` brings a registered model down)"
            )


def download(hub_id: str, teachers: Path) -> Path:
    """A hub model's files as a folder under `teachers`: whole or absent, and not asked for again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import HFValidationError

    folder = teachers / hub_id.replace("/", "--")
    if folder.exists():
        return folder.resolve()
    part = folder.with_name(f"{folder.name}.part")  # kept after a kill: the download goes on in it
    problem = ""
    try:
        snapshot_download(hub_id, local_dir=part, allow_patterns=HUB_FILES)
    except (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        HFValidationError,
        OSError,
    ) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
    except Exception as error:  # the hub's HTTP client has exceptions of its own for a lost connection
        if "http" not in type(error).__module__:
            raise
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if not problem and not ((part / "config.json").exists() and any(part.glob("*.safetensors"))):
        problem = "it has no config.json with a model.safetensors"
    if problem:
        raise UserError(
            f"model {hub_id} cannot be downloaded ({problem}); check the id and the network, "
            f"or give a local folder instead"
        )
    part.rename(folder)
    return folder.resolve()


def check_stages(recipe: Recipe, workdir: Workdir, data: DataJob) -> None:
    """Every stage's teacher, data and students against each other before the first one runs. Raises `UserError`.

    The teacher of a later stage need not exist yet: an earlier student's shape is known from the recipe.
    """
    shapes: dict[str, EncoderShape] = {}
    for stage in recipe.stages:
        match stage.teacher_ref:
            case StudentRef(name):
                shape = shapes[name]
                check_students(stage, shape)
            case ref:
                shape = check_stage(stage, model_folder(ref, recipe, workdir), data)
        shapes |= students_shapes(stage, shape)


def config_problems(recipe: Recipe) -> list[str]:
    """A line for each stage that a run would refuse by the config of its teacher, where that is a folder on this
    machine or an earlier student of such a one. Reads no data and no weights."""
    shapes: dict[str, EncoderShape] = {}
    problems: list[str] = []
    for stage in recipe.stages:
        try:
            if stage.teacher in recipe.student_names:
                shape = shapes.get(stage.teacher)
                if shape is None:
                    continue
                check_students(stage, shape)
            elif (Path(stage.teacher) / "config.json").is_file():
                shape = check_teacher(stage, Path(stage.teacher))
            else:
                continue
        except (UserError, ModelError) as error:
            problems.append(str(error))
        else:
            shapes |= students_shapes(stage, shape)
    return problems


def students_shapes(stage: Stage, teacher: EncoderShape) -> dict[str, EncoderShape]:
    """Of the students, by name, as far as the recipe tells."""
    return {
        student.name: replace(
            teacher, layers=student.layers, hidden=student.hidden, heads=student.heads or teacher.heads
        )
        for student in stage.students
    }


def check_stage(stage: Stage, teacher: Path, data: DataJob) -> EncoderShape:
    """The teacher's shape, after comparing it with the data and the students. Raises `UserError`."""
    shape = check_teacher(stage, teacher)
    where = f"stage {stage.name}"
    if data.seq_len > shape.max_tokens:
        raise UserError(
            f"{where}: rows are {data.seq_len} tokens long, the teacher takes at most {shape.max_tokens}; "
            f"build the data with a smaller seq_len"
        )
    check_vocabulary(where, teacher, shape, data)
    return shape


def check_teacher(stage: Stage, teacher: Path) -> EncoderShape:
    """The teacher's shape, after comparing it with the stage and its students. Raises `UserError`."""
    config = load_config(teacher)
    try:
        tapped_layer(config, stage.teacher_layer)
    except ModelError as error:
        raise UserError(f"stage {stage.name}: {error}") from error
    shape = shape_of(config)
    check_students(stage, shape)
    return shape


def check_students(stage: Stage, teacher: EncoderShape) -> None:
    """The students' sizes against the teacher's, as the objective needs them. Raises `UserError`."""
    try:
        objective = Objective.named(**stage.objective_fields())
        for student in stage.students:
            heads = student.heads or teacher.heads
            if student.hidden % heads:
                raise ModelError(
                    f"student {student.name} has hidden {student.hidden}, which {heads} heads do not divide; "
                    f"give a multiple of {heads}, or other heads"
                )
            objective.check(teacher.heads, teacher.hidden, heads, student.hidden)
    except ModelError as error:
        raise UserError(f"stage {stage.name}: {error}") from error


def check_vocabulary(where: str, teacher: Path, shape: EncoderShape, data: DataJob) -> None:
    """Token ids must mean the same to the data and the teacher: the commonest silent error."""
    info = data.vocabulary
    if info.vocab_size > shape.vocab_size:
        raise UserError(
            f"{where}: the data was made with a vocabulary of {info.vocab_size} tokens, the teacher knows "
            f"{shape.vocab_size}; build the data with the teacher's tokenizer"
        )
    try:
        own = load_tokenizer(str(teacher))
    except DataError:
        return  # a teacher without tokenizer files: the sizes are all there is to compare
    if vocabulary_fingerprint(own) != info.vocabulary_fingerprint:
        raise UserError(
            f"{where}: the data was made with another tokenizer than the teacher's in {teacher} (same ids would mean "
            f"other tokens); build the data with `--tokenizer {teacher}`"
        )
