"""What a stage needs becomes folders that every worker can read: the data set, and the teacher.

Text becomes shards (once), a registry URI or hub id becomes a folder in the work directory, an earlier student is
the folder that its stage exported. Then teacher, data and students are checked against each other before anything
starts, from the configurations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig

from data.build import BuildProgress, build
from data.errors import DataError
from data.manifest import Manifest, load_manifest
from data.tokenizer import load_tokenizer, vocabulary_fingerprint
from model.encoder import EncoderShape, inspect_encoder, tapped_layer
from model.errors import ModelError
from model.objective import Objective
from orchestrator.errors import UserError
from orchestrator.recipe import Recipe, Stage
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


@dataclass(frozen=True)
class Dataset:
    folder: Path
    manifest: Manifest


def prepare_data(
    recipe: Recipe, workdir: Workdir, progress: Callable[[BuildProgress], None] | None
) -> Dataset:
    """The recipe's data set, built into the work directory first when the recipe names text."""
    data = recipe.data
    if data.shards is not None:
        folder = Path(data.shards)
    else:
        folder = workdir.data
        assert data.text is not None and data.tokenizer_ref is not None  # recipe_types: shards, or these two
        tokenizer = model_folder(data.tokenizer_ref, recipe, workdir)
        build(
            text_inputs(data.text),
            str(tokenizer),
            folder,
            seq_len=data.seq_len,
            packing=data.packing,
            held_out=data.held_out,
            seed=recipe.seed,
            text_field=data.text_field,
            progress=progress,
        )
    manifest = load_manifest(folder)
    if not (folder / "held-out" / "manifest.json").exists():
        raise UserError(
            f"data set {folder} has no held-out split, which every stage is measured on; "
            f"build it again with `minilm data build --held-out 0.01 …` (a recipe: data.held_out)"
        )
    return Dataset(folder.resolve(), manifest)


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
            from orchestrator.mlflow_server import tracking_uri
            from orchestrator.registry import pull_once

            return pull_once(tracking_uri(workdir.root), ref.uri, workdir.teachers).resolve()
        case HubRef(hub_id):
            return download(hub_id, workdir.teachers)


def text_inputs(patterns: Sequence[str]) -> list[str | Path]:
    """What `data.build` is given for paths, folders, globs and `package:NAME/PATH`."""
    return [package_path(p) if p.startswith("package:") else p for p in patterns]


def tokenizer_name(text: str) -> str:
    """A folder or hub id that `data build` can load a tokenizer from, for a reference given on the command line."""
    match parse_reference(text):
        case FolderRef(path):
            return str(path)
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


def check_stages(recipe: Recipe, workdir: Workdir, dataset: Dataset) -> None:
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
                shape = check_stage(stage, model_folder(ref, recipe, workdir), dataset)
        for student in stage.students:
            heads = student.heads or shape.heads
            shapes[student.name] = replace(shape, layers=student.layers, hidden=student.hidden, heads=heads)


def check_stage(stage: Stage, teacher: Path, dataset: Dataset) -> EncoderShape:
    """The teacher's shape, after comparing it with the data and the students. Raises `UserError`."""
    shape = inspect_encoder(str(teacher))
    manifest = dataset.manifest
    where = f"stage {stage.name}"
    if manifest.seq_len > shape.max_tokens:
        raise UserError(
            f"{where}: rows are {manifest.seq_len} tokens long, the teacher takes at most {shape.max_tokens}; "
            f"build the data with a smaller seq_len"
        )
    check_vocabulary(where, teacher, shape, dataset)
    try:
        tapped_layer(AutoConfig.from_pretrained(str(teacher)), stage.teacher_layer)
    except ModelError as error:
        raise UserError(f"{where}: {error}") from error
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


def check_vocabulary(where: str, teacher: Path, shape: EncoderShape, dataset: Dataset) -> None:
    """Token ids must mean the same to the data and the teacher: the commonest silent error."""
    info = dataset.manifest.tokenizer
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
