"""A recipe's stages with everything they refer to, checked against each other.

`minilm check`, `plan` and `run` all go through `resolve`, or its parts, so that none of them refuses what
another one takes. They differ in `find`: `run` fetches a teacher that is elsewhere, the others take what is here.
Shapes come from configs; a teacher that is here is loaded once, to see that its weights are those of its config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from minilm.data.builder.enough import check_enough
from minilm.data.builder.sentences import TOKEN_SOURCES, no_sentences
from minilm.data.errors import DataError
from minilm.data.format.manifest import MANIFEST, TokenizerInfo
from minilm.data.sources.plugin import find_source
from minilm.data.storage.remote import is_remote
from minilm.data.tokenizer import (
    has_tokenizer,
    load_tokenizer,
    pipeline_difference,
    pipeline_fingerprint,
    special_ids,
    vocabulary_fingerprint,
)
from minilm.model.compatibility import check_teacher, fit_student
from minilm.model.encoder.initialize import has_table
from minilm.model.encoder.sentence_layout import SentenceLayout, read_layout
from minilm.model.encoder.shape import EncoderShape, load_config, shape_of
from minilm.model.errors import ModelError
from minilm.model.loss.objective import Objective
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.feed.corpora import describe
from minilm.orchestrator.recipe.missing import missing_text
from minilm.orchestrator.recipe.schema import Corpus, Recipe, Stage
from minilm.orchestrator.resolve.evaluation import evaluation_problems, other_rows_problems, probe_problems
from minilm.orchestrator.resolve.folders import text_inputs
from minilm.orchestrator.resolve.starts import start_problem, vocabulary_note, with_tokens_of
from minilm.orchestrator.resolve.vectors import stage_vectors, student_vectors
from minilm.orchestrator.stage.data import CorpusSpec, PairSpec

# From a reference in the recipe to a folder or hub id; None where it is not here.
Find = Callable[[str], str | None]


@dataclass(frozen=True)
class ResolvedStage:
    """A stage, its teacher and the shapes that follow.

    source: the teacher's folder or hub id; None for an earlier student, and for a teacher that is not here.
    teacher: its shape; None where that is not known here. students: a shape for each student, empty without a teacher;
    one that goes on from a model that is not here has none.
    starts: folder or hub id of the model that a student goes on from, by the student's name, where it is here and no
    earlier student. teacher_layout, layouts: how the teacher and each student make their vectors, where the objective
    compares these and the teacher's folder is here.
    """

    stage: Stage
    source: str | None
    teacher: EncoderShape | None
    students: Mapping[str, EncoderShape]
    starts: Mapping[str, str]
    teacher_layout: SentenceLayout | None = None
    layouts: Mapping[str, SentenceLayout] = field(default_factory=dict)


def resolve(
    recipe: Recipe, find: Find, *, built: bool = False, weights: bool = True
) -> tuple[list[ResolvedStage], list[str]]:
    """The stages, and a line for each reason why a run is refused before any text is tokenized.

    built: the recipe's text has been made into a data set before, and is not looked at. weights: load the teachers that
    are folders here, and read the evaluation's rows.
    """
    known, wrong_data = None, []
    try:
        known = known_data(recipe, find)
    except (UserError, DataError) as error:
        raise_passing(error)
        wrong_data = [f"data: {error}"]
    stages, problems = resolve_stages(recipe, find, seq_len=known and known[0], weights=weights)
    scored = [stage.source for stage in stages if stage.source] if weights else []
    problems += evaluation_problems(recipe, scored, rows=weights)
    problems += probe_problems(recipe, rows=weights)
    try:
        problems += check_data(stages, *known) if known else wrong_data
        if not (built or wrong_data):
            check_text(recipe, find)
    except (UserError, DataError) as error:  # of a teacher's tokenizer
        raise_passing(error)
        problems.append(f"data: {error}")
    return stages, problems


def raise_passing(error: Exception) -> None:
    """Raise an error that may pass, such as a hub or a registry that is away: it says nothing about the recipe."""
    if isinstance(error, UserError) and error.exit_code != UserError.exit_code:
        raise error


def resolve_stages(
    recipe: Recipe, find: Find, *, seq_len: int | None = None, weights: bool = False
) -> tuple[list[ResolvedStage], list[str]]:
    """The stages in order, and a line for each reason why a run of them would be refused.

    `find` is asked for every teacher that is no earlier student, and for every model that a student goes on from.
    seq_len: tokens a row, None where that is not known. weights: load what is here of both.
    """
    loaded: set[tuple[str, bool, bool]] = set()
    resolved: list[ResolvedStage] = []
    problems: list[str] = []
    shapes: dict[str, EncoderShape | None] = {}
    known_layouts: dict[str, SentenceLayout] = {}
    for stage in recipe.stages:
        source = teacher = None
        students: dict[str, EncoderShape] = {}
        starts: dict[str, str] = {}
        vectors, layouts = None, dict[str, SentenceLayout]()
        try:
            objective = Objective.named(**stage.objective_fields())
            if stage.teacher in shapes:
                teacher = shapes[stage.teacher]
            elif source := find(stage.teacher):
                teacher = shape_of(load_config(source))
            for student in stage.students:
                if student.starts_from in shapes:
                    continue
                if student.starts_from and (start := find(student.starts_from)):
                    starts[student.name] = start
            start_shapes = {name: shape_of(load_config(start)) for name, start in starts.items()}
            start_shapes |= {
                student.name: shape
                for student in stage.students
                if student.starts_from and (shape := shapes.get(student.starts_from))
            }
            if teacher is not None and objective.embeds:
                for name, start in starts.items():
                    start_shapes[name] = with_tokens_of(teacher, name, start_shapes[name], start)
            if teacher is not None:
                check_teacher(objective, teacher, stage.teacher_layer)
                students = {
                    student.name: fit_student(
                        student.name,
                        objective,
                        teacher,
                        layers=student.layers,
                        hidden=student.hidden,
                        heads=student.heads,
                        ffn=student.ffn,
                        layer=stage.teacher_layer,
                        init="random" if student.starts_from else student.init,
                        start=start_shapes.get(student.name),
                        positions=student.positions,
                        seq_len=seq_len,
                    )
                    for student in stage.students
                    if student.starts_from is None or student.name in start_shapes
                }
            if objective.embeds and teacher is not None and (source is None or Path(source).is_dir()):
                vectors = stage_vectors(stage, objective, source, teacher, known_layouts)
                layouts = student_vectors(stage, objective, vectors, teacher, students, starts, known_layouts)
            head, embeds = objective.needs_head, objective.embeds
            for folder in dict.fromkeys((source, *starts.values())) if weights else ():
                if folder and (folder, head, embeds) not in loaded:
                    load_weights(folder, head=head, vectors=embeds)
                    loaded.add((folder, head, embeds))
        except (UserError, ModelError) as error:
            raise_passing(error)
            problems.append(f"stage {stage.name}: {error}")
        resolved.append(ResolvedStage(stage, source, teacher, students, starts, vectors, layouts))
        known_layouts |= layouts
        shapes |= {student.name: students.get(student.name) for student in stage.students}
    return resolved, problems


def load_weights(source: str, *, head: bool, vectors: bool = False) -> None:
    """Load a model's weights and let go of them, with `vectors` those of its dense layers too. ModelError where they
    are not those of its config."""
    if Path(source).is_dir():
        from minilm.model.encoder.build import load_encoder  # modelling code, which takes seconds to import
        from minilm.model.encoder.sentence_head import load_head

        model = load_encoder(source, head=head).model
        if vectors and (layout := read_layout(source, model.config.hidden_size)):
            load_head(source, layout)


def position_notes(stages: list[ResolvedStage], seq_len: int) -> list[str]:
    """A line for each student some of whose positions stay as they start, at random."""
    return [
        f"stage {resolved.stage.name}: student {student.name!r} keeps positions {seq_len + 1} to {shape.max_tokens} as "
        f"they start, at random, because rows have {seq_len} tokens: longer rows will not be what it learned; "
        f"positions: cut (the default) leaves them out"
        for resolved in stages
        for student in resolved.stage.students
        if (shape := resolved.students.get(student.name))
        and student.positions == "keep"
        and student.init == "random"
        and has_table(shape)
        and shape.max_tokens > seq_len
    ]


def start_notes(stages: list[ResolvedStage], tokenizer: str) -> list[str]:
    """A line for each student that starts from a model with another tokenizer than the data's, in that folder."""
    return [
        f"stage {resolved.stage.name}: {note}"
        for resolved in stages
        if resolved.stage.objective == "embedding"
        for name, start in resolved.starts.items()
        if (shape := resolved.students.get(name))
        and (note := vocabulary_note(name, start, tokenizer, shape.vocab_size))
    ]


def known_data(recipe: Recipe, find: Find) -> tuple[int, TokenizerInfo | None, str, str] | None:
    """Tokens a row, the tokenizer's identity and its folder, and the packing, before any text is tokenized and any row
    is read.

    From the tokenizer where text is read, else from the data sets that are on this machine, which are opened; None
    without either. Raises `UserError` or `DataError` for a source, tokenizer or data set that can't be used.
    """
    data = recipe.data
    if data.text is None:
        here = [spec for corpus in data.corpora or () if (spec := corpus_here(corpus, recipe, find))]
        if not here:
            return None
        described = describe(here, window=data.window)
        return described.seq_len, described.vocabulary, described.tokenizer, described.packing
    find_source(data.source)
    if data.packing == "sentence" and data.source in TOKEN_SOURCES:
        raise no_sentences(data.source)
    assert data.tokenizer is not None  # recipe.schema: text with a tokenizer
    folder = find(data.tokenizer)
    if folder is None or not Path(folder).is_dir():
        return data.seq_len, None, "", data.packing
    loaded = load_tokenizer(folder)
    size = max(loaded.get_vocab().values()) + 1
    ids, pipeline = special_ids(loaded), pipeline_fingerprint(loaded)
    return (
        data.seq_len,
        TokenizerInfo(vocabulary_fingerprint(loaded), size, *ids, pipeline),
        folder,
        data.packing,
    )


def check_text(recipe: Recipe, find: Find) -> None:
    """`DataError` where text and tokenizer are here, and the text is too little for a row of each split."""
    data = recipe.data
    folder = find(data.tokenizer) if data.text and data.tokenizer and data.source == "text" else None
    if folder is None or not Path(folder).is_dir() or missing_text(data):
        return
    check_enough(
        text_inputs(data.text or ()),
        load_tokenizer(folder),
        options=data.source_options(),
        special_tokens=data.special_tokens,
        seq_len=data.seq_len,
        packing=data.packing,
        held_out=data.held_out,
        seed=recipe.seed,
    )


def corpus_here(corpus: Corpus, recipe: Recipe, find: Find) -> CorpusSpec | None:
    """The corpus as plain values; None where a file or tokenizer of it is not on this machine."""
    if corpus.shards is not None:
        here = not is_remote(corpus.shards) and (Path(corpus.shards) / MANIFEST).is_file()
        return CorpusSpec(corpus.name, corpus.shards, corpus.weight) if here else None
    files = [f"{corpus.tokens}.bin", f"{corpus.tokens}.idx", corpus.fairseq_dict, corpus.encoder]
    if not all(Path(file).is_file() for file in files if file is not None):
        return None
    tokenizers = [find(name) for name in (recipe.data.tokenizer, corpus.source_tokenizer) if name is not None]
    if not all(folder is not None and Path(folder).is_dir() for folder in tokenizers):
        return None
    return corpus_spec(corpus, recipe, lambda reference: str(find(reference)))


def corpus_spec(corpus: Corpus, recipe: Recipe, find: Callable[[str], str]) -> CorpusSpec:
    """The corpus as plain values, not opened yet."""
    if corpus.shards is not None:
        return CorpusSpec(corpus.name, corpus.shards, corpus.weight)
    assert corpus.tokens is not None and recipe.data.tokenizer is not None  # recipe.schema: one of the two
    pair = PairSpec(
        tokenizer=find(recipe.data.tokenizer),
        seq_len=recipe.data.seq_len,
        held_out=recipe.data.held_out,
        source_tokenizer=corpus.source_tokenizer and find(corpus.source_tokenizer),
        fairseq_dict=corpus.fairseq_dict,
        encoder=corpus.encoder,
    )
    return CorpusSpec(corpus.name, corpus.tokens, corpus.weight, pair=pair)


def check_data(
    stages: list[ResolvedStage], seq_len: int, tokenizer: TokenizerInfo | None, folder: str, packing: str = ""
) -> list[str]:
    """A line for each stage where a model can't read rows of `seq_len` tokens, or means other tokens by their ids.

    `tokenizer`, `folder`, `packing`: the data's, None and "" where they are not known yet.
    """
    problems = []
    for resolved in stages:
        where = f"stage {resolved.stage.name}"
        problems += other_rows_problems(resolved.stage, seq_len, tokenizer)
        if packing in ("full", "masked") and resolved.stage.objective == "embedding":
            problems.append(
                f"{where}: objective embedding compares the vectors of whole texts, and the data's rows hold several "
                f"(packing {packing}); make the data from the text with --packing sentence, or document"
            )
        for name, start in resolved.starts.items():
            if (shape := resolved.students.get(name)) is None:
                continue
            what = f"the model that student {name!r} starts from"
            if seq_len > shape.max_tokens:
                problems.append(
                    f"{where}: rows are {seq_len} tokens long, {what} takes at most {shape.max_tokens}; "
                    f"give a smaller seq_len"
                )
            if resolved.stage.objective == "embedding":
                if tokenizer is not None and (
                    problem := start_problem(name, start, tokenizer, folder, shape.vocab_size)
                ):
                    problems.append(f"{where}: {problem}")
            elif tokenizer is not None and (difference := _difference(tokenizer, folder, start)):
                problems.append(
                    f"{where}: the data's tokenizer is another one than that of {what}, in {start} ({difference}); "
                    f"start from a model with the teacher's tokenizer"
                )
        if resolved.teacher is None or resolved.source is None:
            continue  # not here, or a student, which takes the rows and the ids of its teacher
        shape = resolved.teacher
        if seq_len > shape.max_tokens:
            problems.append(
                f"{where}: rows are {seq_len} tokens long, the teacher takes at most {shape.max_tokens}; "
                f"give a smaller seq_len"
            )
        if tokenizer is None:
            continue
        if tokenizer.vocab_size > shape.vocab_size:
            added = tokens_added(folder, shape.vocab_size)
            problems.append(
                f"{where}: the data's vocabulary has {tokenizer.vocab_size} tokens, the teacher knows "
                f"{shape.vocab_size}; "
                + (
                    f"tokens were added to the tokenizer in {folder} ({added}) and the model was not resized: give the "
                    f"tokenizer without them, or resize the teacher (resize_token_embeddings), train it, and save both"
                    if added
                    else f"make the data with the teacher's tokenizer (data.tokenizer: {resolved.source})"
                )
            )
        elif difference := _difference(tokenizer, folder, resolved.source):
            problems.append(
                f"{where}: the data's tokenizer is another one than the teacher's in {resolved.source} ({difference}); "
                f"give that as data.tokenizer, or make the data with `--tokenizer {resolved.source}`"
            )
        needs_head = Objective.named(**resolved.stage.objective_fields()).needs_head
        if needs_head and tokenizer.mask_id < 0:
            problems.append(
                f"{where}: objective {resolved.stage.objective} masks tokens, and the tokenizer of the data has no "
                f"mask token; choose an objective of relations, such as minilm"
            )
    return problems


def tokens_added(folder: str, vocab_size: int) -> str:
    """The first tokens that a tokenizer has beyond `vocab_size`, if all of these were added to it; else ""."""
    if not Path(folder).is_dir():
        return ""
    loaded = load_tokenizer(folder)
    added = {number: token for token, number in loaded.get_added_vocab().items()}
    beyond = sorted(number for number in loaded.get_vocab().values() if number >= vocab_size)
    if not set(beyond) <= set(added):
        return ""
    return ", ".join(repr(added[number]) for number in beyond[:3]) + (", …" if len(beyond) > 3 else "")


def _difference(tokenizer: TokenizerInfo, folder: str, teacher: str) -> str:
    """How the teacher's tokenizer differs from the data's, "" if it does not. A teacher without one can't be compared.

    Older data do not pin how text becomes tokens, and another version of `tokenizers` may write the same otherwise:
    then the data's own tokenizer, in `folder`, is compared.
    """
    if not Path(teacher).is_dir() or not has_tokenizer(Path(teacher)):
        return ""
    own = load_tokenizer(teacher)
    if vocabulary_fingerprint(own) != tokenizer.vocabulary_fingerprint:
        return "the same ids would mean other tokens"
    if pipeline_fingerprint(own) == tokenizer.pipeline_fingerprint or not Path(folder).is_dir():
        return ""
    made_with = load_tokenizer(folder)
    if pipeline_fingerprint(own) == pipeline_fingerprint(made_with):
        return ""
    example = pipeline_difference(made_with, own)
    return "another lower-casing, normalization or pre-tokenization" + (f": {example}" if example else "")
