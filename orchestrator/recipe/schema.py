"""The types of a recipe: every key that may stand in the YAML, its default and its bounds.

This file is the reference for recipe authors: recipes/schema.json is made from it, descriptions
included. It leaves out how a file is read (yaml_source.py) and rules that span keys
(rules.py).

Invariant: unknown keys are refused, and everything is frozen once read.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from minilm.model.loss.catalogue import OBJECTIVES, RELATION_FIELDS
from minilm.orchestrator.evaluation.probes.catalogue import PROBES
from minilm.orchestrator.recipe.fields import (
    INITIALIZATIONS,
    Alias,
    Betas,
    CardText,
    CheckpointPlace,
    Count,
    CountFromZero,
    Fraction,
    HeldOutShare,
    LanguageCode,
    LayerNumber,
    Layers,
    LearningRate,
    LocalFolder,
    LocalPath,
    NonNegative,
    Place,
    Positive,
    ReferenceText,
    Seconds,
    SecondsFromZero,
    Seed,
    SequenceLength,
    Share,
    ShareAboveZero,
    Slug,
    Start,
    TextPaths,
    ThreadsOrAuto,
    Width,
    Workers,
)
from minilm.orchestrator.recipe.references import Reference, parse_reference

if TYPE_CHECKING:  # a type checker can't see into the tables that these are made from
    ObjectiveName = str
    ProbeName = str
    RelationField = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]
    ProbeName = Literal[tuple(PROBES)]
    RelationField = Literal[RELATION_FIELDS]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    _as_written: Mapping[str, str] = PrivateAttr(default_factory=dict)  # absolute path → as the file has it

    def model_post_init(self, context: Mapping[str, str] | None) -> None:
        if context:
            self._as_written = context


class Corpus(_Section):
    """One of the data sets that are read, `shards` or `tokens`, with its weight in the mixture."""

    name: Slug = Field(default="corpus")
    """Under which its own held-out divergence is logged; default: corpus-1, corpus-2, …"""
    shards: Place | None = None
    """A built data set (`minilm data build`): a folder, or a URL of s3://, gs://, https://, http:// or file://."""
    tokens: LocalPath | None = None
    """Prefix of a .bin/.idx pair of Megatron or fairseq, read in place: no checksums, rows at its end held out."""
    source_tokenizer: ReferenceText | None = None
    """The tokenizer that made the ids of `tokens`; they are mapped by the tokens' names."""
    fairseq_dict: LocalPath | None = None
    """Or fairseq's dict.txt, for pairs of fairseq …"""
    encoder: LocalPath | None = None
    """… and encoder.json, where that dictionary's symbols are numbers."""
    weight: Positive = 1.0
    """Share of the rows of a step, relative to the other corpora's weights."""

    @model_validator(mode="after")
    def _shards_or_tokens(self) -> "Corpus":
        if (self.shards is None) == (self.tokens is None):
            raise ValueError("shards: FOLDER or URL, or tokens: PREFIX of a .bin/.idx pair")
        of_tokens = [key for key in ("source_tokenizer", "fairseq_dict", "encoder") if getattr(self, key)]
        if self.shards is not None and of_tokens:
            raise ValueError(f"shards without {', '.join(of_tokens)}, because they hold the teacher's ids")
        if self.tokens is not None and ("source_tokenizer" in of_tokens) == ("fairseq_dict" in of_tokens):
            raise ValueError("tokens with either source_tokenizer: REFERENCE or fairseq_dict: FILE")
        return self

    def result_fields(self) -> dict[str, Any]:
        """Everything here that determines the result, as JSON values; paths as the file has them."""
        fields = self.model_dump(mode="json", exclude={"name"})
        for key in CORPUS_PLACES:
            fields[key] = self._as_written.get(fields[key], fields[key])
        return fields


TEXT_OPTIONS = (
    "text_field",
    "line_documents",
    "invalid_utf8",
    "csv_separator",
    "csv_header",
    "csv_quoting",
    "csv_ragged",
)
BUILT_WITH = (
    *(
        "text",
        "tokenizer",
        "seq_len",
        "packing",
        "language",
        "held_out",
        "special_tokens",
        "allow_skipped",
        "source",
        "options",
    ),
    *TEXT_OPTIONS,
)
NOT_RESULT = {"allow_skipped", "cache", "cache_gigabytes", "on_corrupt", "max_quarantined_share"}
CORPUS_PLACES = ("shards", "tokens", "source_tokenizer", "fairseq_dict", "encoder")


class Data(_Section):
    """What the student reads: built data sets, one (`shards` or `tokens`) or a mixture (`corpora`, or a list in
    place of this section), or `text` that the run builds one from."""

    corpora: Annotated[tuple[Corpus, ...], Field(min_length=1)] | None = None
    """Data sets that are mixed by weight, each with an order, epochs and held-out rows of its own."""
    text: TextPaths | None = None
    """Files, folders or globs: txt, json, jsonl, csv, parquet, plain or gz/xz/zst; `package:NAME/file`
    for a file of an installed package."""
    tokenizer: ReferenceText | None = None
    """Tokenizer with the teacher's vocabulary, for text and tokens: a folder, a hub id, `package:NAME/folder` or a
    registered model."""
    seq_len: SequenceLength = 512
    """Tokens a row."""
    packing: Literal["full", "masked", "document", "sentence"] = "full"
    """full: rows filled to the end, no padding; masked: whole documents side by side in a row, each computed as if it
    were alone; document: a row never crosses documents; sentence: each sentence is a row, cut where it is longer."""
    language: LanguageCode = "en"
    """Of the text: whose rules (of `sentencex`) say where a sentence ends, with packing: sentence. A language without
    rules has those of English."""
    held_out: HeldOutShare = 0.01
    """Share of the documents (of tokens: of the rows) kept out of training and used to measure the divergence."""
    text_field: str | None = None
    """Field or column that holds the text in json, jsonl, csv and parquet; default: found by itself."""
    line_documents: bool | None = None
    """Whether each line of a txt file is a document; default: blank lines end documents, where there are any."""
    invalid_utf8: Literal["stop", "replace"] | None = None
    """Bytes that are not UTF-8: stop (default): an error with their place; replace: by U+FFFD, counted."""
    csv_separator: str | None = None
    """comma, tab, semicolon, bar or one character; default: found from the file, and reported."""
    csv_header: bool | None = None
    """Whether the first row has the columns' names; else they are called 1, 2, …; default: found, or asked for."""
    csv_quoting: Literal["standard", "backslash", "none"] | None = None
    """default: none behind tabs, else standard ('"' quotes, doubled inside)."""
    csv_ragged: bool | None = None
    """Whether rows with more or fewer columns than the header are taken; default: they are errors."""
    special_tokens: Literal["text", "tokens"] = "text"
    """What names of special tokens in the text become: text stays text, and is counted; or their ids."""
    allow_skipped: Share | None = None
    """Share of the records that may give no document, by whatever reason; default: half. The report has the reasons."""
    source: str = "text"
    """What reads the files of `text`: text, or the name of an installed plug-in (entry points `minilm.sources`)."""
    options: dict[str, str | int | float | bool | list[str] | None] | None = None
    """Options of that source's own."""
    window: Count | None = None
    """Shuffle by windows of so many shards, the next of which is fetched ahead; default: fully."""
    cache: LocalFolder | None = None
    """Folder on each node for shards behind URLs; default: ~/.cache/minilm."""
    cache_gigabytes: Positive = 64.0
    """Shards that were not used for longest go when the cache is larger; those in use stay."""
    on_corrupt: Literal["stop", "quarantine"] = "stop"
    """When a block of rows is damaged. stop: the run ends and says how to repair it; quarantine: all workers leave
    its rows out of the loss, and count them."""
    max_quarantined_share: Fraction = 0.001
    """Of a data set's rows; more damage ends the run."""

    def source_options(self) -> dict[str, Any]:
        """What the source of `text` is asked for, by its names of the options."""
        given = dict(self.options or {})
        if self.source != "text":
            return given
        keys = {name: getattr(self, name) for name in TEXT_OPTIONS}
        return keys | given | {name: value for name, value in keys.items() if value is not None}

    @model_validator(mode="before")
    @classmethod
    def _one_data_set_is_short_for_corpora(cls, given: Any) -> Any:
        if isinstance(given, list | tuple):
            return {"corpora": given}
        if not isinstance(given, dict):
            return given
        only = {key: given[key] for key in CORPUS_PLACES if given.get(key) is not None}
        if not only:
            return given
        if given.get("corpora") is not None:
            raise ValueError(f"corpora: (a list), or {next(iter(only))}: (one), not both")
        return {k: v for k, v in given.items() if k not in CORPUS_PLACES} | {"corpora": [only]}

    @model_validator(mode="after")
    def _corpora_or_text(self) -> "Data":
        given = {key for key in self.model_fields_set if getattr(self, key) is not None}
        if ("corpora" in given) == ("text" in given):
            raise ValueError(
                "either shards: FOLDER, tokens: PREFIX or a list of such, or text: FILES with tokenizer: REFERENCE"
            )
        of_text = [name for name in TEXT_OPTIONS if getattr(self, name) is not None]
        if of_text and self.source != "text":
            raise ValueError(
                f"{of_text[0]} with source: text; {self.source} has options of its own, under options"
            )
        if self.language != "en" and "text" in given and self.packing != "sentence":
            raise ValueError("language with packing: sentence; leave language out, or change packing")
        if "text" in given and "tokenizer" not in given:
            raise ValueError("text: FILES with tokenizer: REFERENCE, the teacher's own")
        if "corpora" in given:
            self._check_corpora(given & set(BUILT_WITH) - {"text"})
        return self

    def _check_corpora(self, built_with: set[str]) -> None:
        assert self.corpora is not None
        of_tokens = {"tokenizer", "seq_len", "held_out"}
        if any(corpus.tokens for corpus in self.corpora):
            if "tokenizer" not in built_with:
                raise ValueError("tokens: PREFIX with tokenizer: REFERENCE, the teacher's own")
            built_with -= of_tokens
        if built_with:
            others = ", ".join(sorted(built_with))
            raise ValueError(f"shards alone, because the data set was built with its own; remove {others}")

    @field_validator("corpora")
    @classmethod
    def _name_corpora(cls, given: tuple[Corpus, ...] | None) -> tuple[Corpus, ...] | None:
        named = [
            corpus if "name" in corpus.model_fields_set else corpus.model_copy(update={"name": f"corpus-{i}"})
            for i, corpus in enumerate(given or (), start=1)
        ]
        names = [corpus.name for corpus in named]
        if double := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"a name for each corpus; {double[0]!r} is there twice")
        return tuple(named) or None

    def result_fields(self) -> dict[str, Any]:
        """Everything here that determines the result, as JSON values; paths as the file has them."""
        fields = self.model_dump(mode="json", exclude=NOT_RESULT | {"corpora"})
        fields["tokenizer"] = self._as_written.get(fields["tokenizer"], fields["tokenizer"])
        fields["text"] = fields["text"] and [self._as_written.get(path, path) for path in fields["text"]]
        fields["corpora"] = self.corpora and [corpus.result_fields() for corpus in self.corpora]
        if (
            self.source == "text" and self.options is None
        ):  # as recipes were recorded before there were others
            del fields["source"], fields["options"]
        for name in (*TEXT_OPTIONS[1:], "special_tokens", "language"):
            if fields[name] == type(self).model_fields[name].default:
                del fields[name]
        return fields


class Student(_Section):
    """The shape of one student and how it starts."""

    name: Slug
    """Unique in the recipe: a later stage's `teacher` may be this name. With `student:` the default is
    the stage's name."""
    layers: Layers
    """Transformer layers."""
    hidden: Width
    """Hidden size."""
    ffn: Width | None = None
    """Inner size of the feed-forward part; default: 4 × hidden; in families with gates (ModernBERT,
    EuroBERT, Nomic) the teacher's own ratio to hidden."""
    heads: Width | None = None
    """Attention heads; default: the teacher's."""
    dropout: Fraction = 0.1
    """Dropout of the student while it trains."""
    init: Start = "random"
    """How the weights start: random; teacher-layers: a uniform pick of the teacher's layers, sliced where
    the student is narrower; teacher-pca: the same layers, projected on the principal directions of the teacher's hidden
    states on a sample of the rows; or a model of this very shape that training goes on from: an earlier student's
    name, `models:/NAME@ALIAS`, `models:/NAME/VERSION`, a folder, `package:NAME/folder` or a hub id OWNER/NAME."""
    start_share: Fraction = 0.0
    """How much of its start the student keeps: what is measured and exported is start_share x start + (1 - start_share)
    x trained, weight by weight; losses are of the trained weights. For a start that is good at something: 0.5 is often
    better than both ends (arXiv:2311.13534). Not with init: random."""
    positions: Literal["cut", "teacher", "keep"] = "cut"
    """What becomes of positions behind the rows' length, which nothing trains. cut: the student takes rows of the
    length that it was trained on; teacher: as many as its teacher, whose vectors it gets (needs the teacher's width);
    keep: as many, with vectors that stay as they start. Families that rotate have no vectors: teacher and keep are the
    same."""

    @property
    def starts_from(self) -> str | None:
        """The reference of the model that it goes on from, or an earlier student; None where `init` names a method."""
        return None if self.init in INITIALIZATIONS else self.init


class RelationTerm(_Section):
    """One term of the loss: softmax(x yᵀ / √d) of teacher and student compared by KL."""

    name: Slug
    """Under which it is logged."""
    x: RelationField
    """q, k, v, or hidden: the tapped layer's output."""
    y: RelationField
    """What x is multiplied by: q, k, v or hidden."""
    weight: Positive = 1.0
    """Of this term in the loss."""


class Measurement(_Section):
    """What is measured while a stage trains, beside the divergence, which always is."""

    probe: ProbeName
    """divergence: the objective on held-out rows; knn, cka: how far teacher and student agree which of these rows are
    alike; stsb-embed: how well the cosine of two sentences orders pairs that people judged; linear-TASK: a linear
    classifier on frozen vectors, from 1,024 labels."""
    every: Count | None = None
    """Steps between measurements; default: eval_every."""
    data: LocalPath | None = None
    """Folder that holds the task's folder, for stsb-embed and linear-TASK; default: evaluation.data. For knn and cka:
    another data set, as `minilm data build` makes it, whose held-out rows are compared; default: the stage's own."""


class Until(_Section):
    """When a stage is good enough, so that it ends before its `steps`: all students have the share, or have stopped
    getting better. Measurements during the warm-up do not count."""

    probe: ProbeName
    """One of the stage's `evaluate`, or divergence."""
    share_of_teacher: ShareAboveZero | None = None
    """A student is good enough with this share of the teacher's own value."""
    patience: Count | None = None
    """A student has stopped getting better after so many measurements in a row without a gain."""
    min_gain: Share = 0.01
    """Share of its best value by which a measurement must be better to be a gain."""


class Embedding(_Section):
    """How the vectors of `objective: embedding` are made and compared."""

    pooling: Literal["mean", "cls"] | None = None
    """How the student's vector is made of its last layer: the mean over tokens, or the first token; default: as the
    model does that it starts from, else its teacher. Of a teacher that says nothing itself (no modules.json) too."""
    dense: bool | None = None
    """Whether a linear layer follows that maps to the teacher's width; default: where the widths differ. Of a student
    that does not start at random, it first turns the vectors towards the teacher's, which keeps their cosines where the
    teacher's are no narrower."""
    similarity: Positive | None = None
    """Weight of a second term: the cosines between the rows that are computed together, compared; default: none."""
    dims: Annotated[tuple[Width, ...], Field(min_length=1)] | None = None
    """Prefixes of the vectors that are compared each on its own, the whole among them, as [384, 256, 128] (Matryoshka);
    default: the whole alone."""

    def terms(self) -> list[dict[str, Any]]:
        """The terms of the loss, for `Objective.named`. The largest of `dims`, the whole, comes first."""
        sizes: list[int | None] = [*sorted(set(self.dims or ()), reverse=True)] or [None]
        found: list[dict[str, Any]] = [
            {
                "term": "cosine_distance",
                "name": f"cosine_distance_{size}" if number else "cosine_distance",
                "weight": 1 / len(sizes),
                "dims": size,
            }
            for number, size in enumerate(sizes)
        ]
        if self.similarity is not None:
            found.append({"term": "similarity", "name": "similarity", "weight": self.similarity})
        return found


class Stage(_Section):
    """One teacher and the student, or students, that learn from it."""

    name: Slug
    """Unique in the recipe."""
    teacher: ReferenceText
    """An earlier student's name, a folder, a hub id, `package:NAME/folder`, `models:/NAME@ALIAS` or
    `models:/NAME/VERSION`."""
    teacher_layer: LayerNumber = "last"
    """The teacher's layer that is imitated, counted from 1."""
    students: Annotated[tuple[Student, ...], Field(min_length=1)]
    """Students that share the teacher's forward pass; `student:` is the short form for one."""
    objective: ObjectiveName = "minilm"
    """minilm: Q-K and V-V relations; minilmv2: Q-Q, K-K and V-V relations; the papers' ablation arms:
    attention-only, value-mse, layer-to-layer, hidden-relation; soft-label-mlm: the teacher's predictions for masked
    tokens, of a teacher that has a masked-language-model head; embedding: the vectors of whole texts, for a student
    that is used as it is."""
    embedding: Embedding | None = None
    """How the vectors of objective: embedding are made and compared."""
    relations: Annotated[tuple[RelationTerm, ...], Field(min_length=1)] | None = None
    """A list of terms instead of the objective's own."""
    relation_heads: Width | None = None
    """Split both sides into so many heads before they are compared; default: into their own, which must
    then be equally many."""
    reduction: Literal["sequence", "token"] = "sequence"
    """sequence: the mean over sequences of each one's mean (the paper's); token: the mean over all tokens."""
    batch: Count
    """Rows a step, over all workers."""
    micro_batch: Count = Field(default=None)  # type: ignore[assignment]  # a Recipe's stages have it filled in
    """Rows computed at once; default: compute.micro_batch."""
    steps: Count
    """Optimiser updates."""
    peak_lr: LearningRate
    """Learning rate at the end of the warm-up."""
    warmup_steps: CountFromZero
    """Steps in which the learning rate rises from 0 to its peak."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """How the learning rate falls to 0 after the warm-up; constant: it stays at its peak; wsd (warm-up, stable, decay):
    it stays there until the last `decay_steps`, in which it falls linearly."""
    decay_steps: Count | None = None
    """With schedule wsd: steps of the decay; with `until` they begin where that is met."""
    adam_betas: Betas = (0.9, 0.999)
    """Decay rates of Adam's two averages."""
    adam_eps: Positive = 1e-6
    """Adam's epsilon."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay (none on biases and norms)."""
    max_gradient_norm: Positive | None = None
    """Gradients of a greater norm are scaled down to it; default: never."""
    eval_every: Count | None = None
    """Steps between measurements on held-out rows; default: before and after only."""
    held_out_rows: Count = 256
    """Held-out rows that a measurement reads at most."""
    evaluate: tuple[Measurement, ...] = ()
    """Probes that are measured as well, before, after and in between."""
    until: Until | None = None
    """When the stage is good enough; `steps` are the most that it makes. Needs schedule wsd or constant."""

    @model_validator(mode="before")
    @classmethod
    def _student_is_short_for_students(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "student" not in given:
            return given
        if "students" in given:
            raise ValueError("student: (one) or students: (a list), not both")
        student, rest = given["student"], {key: value for key, value in given.items() if key != "student"}
        if isinstance(student, dict) and "name" in given:
            student = {"name": given["name"], **student}
        return rest | {"students": [student]}

    def every(self, probe: str) -> int | None:
        """Steps between a probe's measurements, None for before and after only."""
        own = [one.every for one in self.evaluate if one.probe == probe and one.every]
        return own[0] if own else self.eval_every

    def objective_fields(self) -> dict[str, Any]:
        """The objective as plain values, for `Objective.named`."""
        fields: dict[str, Any] = {
            "name": self.objective,
            "reduction": self.reduction,
            "relation_heads": self.relation_heads,
        }
        if self.objective == "embedding":
            own = self.embedding or Embedding()
            fields |= {"pooling": own.pooling, "dense": own.dense, "relations": own.terms()}
        elif self.relations is not None:
            fields["relations"] = [relation.model_dump() for relation in self.relations]
        return fields

    def result_fields(self) -> dict[str, Any]:
        """Everything here that determines the result, as JSON values; paths as the file has them."""
        fields = self.model_dump(mode="json", exclude={"eval_every", "evaluate"})
        for key in ("decay_steps", "until"):
            if fields[key] is None:  # as recipes were recorded before there were such keys
                del fields[key]
        if self.until:
            fields["until"]["every"] = self.every(self.until.probe)
        if self.objective == "embedding":
            fields["embedding"] = (self.embedding or Embedding()).model_dump(mode="json")
        else:  # as recipes were recorded before there were embeddings
            del fields["embedding"]
        for student in fields[
            "students"
        ]:  # the digest of a stage has the size that the teacher's family gives
            student["ffn"] = student["ffn"] or 4 * student["hidden"]
            for key, before in (("positions", "keep"), ("start_share", 0.0)):
                if student[key] == before:  # as recipes were recorded before there was anything else
                    del student[key]
            student["init"] = self._as_written.get(student["init"], student["init"])
        fields["teacher"] = self._as_written.get(self.teacher, self.teacher)
        return fields


OPEN_SCHEDULES = ("wsd", "constant")  # before a decay their rates do not depend on the stage's end


def trunk_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of a stage's `result_fields` those that determine its steps before a decay; empty for other schedules."""
    if fields["schedule"] not in OPEN_SCHEDULES:
        return {}
    end = ("steps", "schedule", "decay_steps", "until")
    return {key: value for key, value in fields.items() if key not in end}


class Compute(_Section):
    """Where and how it is computed. Only `micro_batch` and `precision` change the result by more than rounding."""

    workers: Workers = (1, 1)
    """Processes that share a step's micro-batches, one device each: a number; [LEAST, MOST] for a run that
    takes the places which the cluster has to give, and gives them back; auto: one for each GPU of this machine, or,
    without any, for each NUMA node, and as many as a cluster that is joined has GPUs or `trainer`s."""
    micro_batch: Count = 32
    """Rows computed at once, the unit of determinism; divides every stage's batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward and backward pass; auto: bfloat16 where the GPU or CPU has units for it. A stage keeps to what it
    began with."""
    threads: ThreadsOrAuto = None
    """CPU threads a worker; auto (the default): its share of the machine's."""
    checkpoint_every_steps: Count | None = None
    """Steps between checkpoints, beside the time between them; default: by time alone."""
    checkpoint_every_seconds: Seconds = 60.0
    """Seconds between checkpoints."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept for each stage."""
    checkpoints: CheckpointPlace | None = None
    """Folder or URL (s3://BUCKET/PREFIX, gs://BUCKET/PREFIX) for checkpoints, under the recipe's and the stage's name;
    credentials come from the environment. Default: the work directory."""
    keep_every_steps: Count | None = None
    """A checkpoint of every so many steps is made, and kept for good; default: none."""
    gradient_sum: Literal["exact", "fast"] = "exact"
    """How gradients are added. exact: as 64-bit integers, so that any number of workers gives the same
    bits; fast: in float32, with less memory."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is not finite. stop: the run ends and names the rows; skip: that update is
    left out. No weight moves by it either way."""
    max_skipped_steps: CountFromZero = 10
    """Updates of a student that on_nonfinite: skip may leave out; one more ends the run."""
    stall_seconds: Seconds = 600.0
    """A worker that makes no step for so long ends itself, with its stacks in its log, to be replaced;
    start-up, measuring and saving may take ten times as long."""
    wait_seconds: SecondsFromZero = 600.0
    """How long a run waits for places for its fewest workers that a cluster hasn't got or others hold, at the
    start and after it has lost them. 0: not at all."""


class Tracking(_Section):
    """How the run shows in MLflow."""

    experiment: Annotated[str, Field(min_length=1)]
    """MLflow experiment; default: the recipe's name."""
    log_every: Count = 10
    """Steps between points."""
    per_head: bool = False
    """Log each relation's divergence by head too, as STUDENT/TERM/head-01 and so on; at the steps of points, that is
    one forward pass of the loss more."""
    alias: Alias = "newest"
    """Alias that the registered students get; MLflow keeps latest, v1, v2 and so on for itself."""


class Evaluation(_Section):
    """What the models are worth, measured after the last stage on tasks with labels."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, squad2, xnli are fine-tuned; stsb-embed is the similarity of
    the models' own vectors, or mean-pooled ones, without training, and nanobeir a search with them."""
    data: LocalPath
    """Folder that holds a folder for each task, with its files as they are published."""
    protocol: Literal["glue-minilm", "glue-fixed"] = "glue-fixed"
    """How GLUE's tasks are trained: the papers' grid, or one setting for all."""
    seeds: Count | None = None
    """Trainings of each model on each task; default: the protocol's."""
    train_rows: Count | None = None
    """Training rows that are used at most, the same for every model; default: all."""
    controls: bool = True
    """Score, for each student, random weights of its shape and the teacher's layers cut to it as well."""


class Promotion(_Section):
    """When the last stage's students become champion: once their scores in the evaluation hold."""

    alias: Alias = "champion"
    """Alias that moves when every line holds; `challenger` moves in any case."""
    against: Alias | None = None
    """Alias of the version that they are compared with, which is scored too; default: the one that `alias` names."""
    min_share_of_teacher: Positive | None = None
    """Of the first teacher's score, to be kept on each task, as 0.97; default: no such demand."""
    max_drop: NonNegative = 0.005
    """By how much a score may lie below that of the version which they are compared with."""
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Of the evaluation's, those that count; default: all of them."""


class Card(_Section):
    """What the model cards say and no file of the run tells. Nothing in them is guessed."""

    license: CardText | None = None
    """Licence of the students, as the hub calls it (apache-2.0); default: their teacher's, by its card."""
    license_name: CardText | None = None
    """Where `license` is other: its name …"""
    license_link: CardText | None = None
    """… and where it can be read."""
    data_license: CardText | None = None
    """Licence of the text, which `check` looks at; default: as README.md in its folder says."""
    language: Annotated[tuple[CardText, ...], Field(min_length=1)] | None = None
    """Languages of the students, as [en, de]; default: their teacher's, by its card."""
    datasets: Annotated[tuple[CardText, ...], Field(min_length=1)] | None = None
    """The data by their ids on the hub, as [wikimedia/wikipedia]; default: those that `data` names itself."""
    base_model: CardText | None = None
    """The first teacher by its id on the hub; default: where the recipe names it so."""


class Recipe(_Section):
    """What to distil: data, then stages in order, each with one teacher and its students."""

    name: Slug
    """Registered models are called NAME-STUDENT."""
    seed: Seed = 0
    """Fixes the rows of every step, the first weights and dropout."""
    data: Data
    """What the students read: text with a tokenizer, or data sets that exist."""
    compute: Compute = Field(default_factory=Compute)
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    """In order; a stage's student may teach a later stage."""
    evaluation: Evaluation | None = None
    """What the models are worth afterwards; it changes nothing in training."""
    promote: Promotion | None = None
    """When the last stage's students become champion; needs `evaluation`."""
    card: Card | None = None
    """What the model cards say and no file of the run tells."""
    tracking: Tracking

    @model_validator(mode="before")
    @classmethod
    def _experiment_defaults_to_name(cls, given: Any) -> Any:
        tracking = given.get("tracking") if isinstance(given, dict) else None
        if not isinstance(given, dict) or not isinstance(tracking, dict | None):
            return given
        experiment = str(given.get("name") or "unnamed")  # a name that is wrong is complained about by itself
        return given | {"tracking": {"experiment": experiment, **(tracking or {})}}

    @model_validator(mode="before")
    @classmethod
    def _probes_read_where_the_evaluation_does(cls, given: Any) -> Any:
        evaluation = given.get("evaluation") if isinstance(given, dict) else None
        stages = given.get("stages") if isinstance(evaluation, dict) else None
        if not isinstance(evaluation, dict) or not isinstance(stages, list) or not evaluation.get("data"):
            return given

        def filled(item: Any) -> Any:
            probe = PROBES.get(str(item.get("probe"))) if isinstance(item, dict) else None
            return {"data": evaluation["data"], **item} if probe and probe.task else item

        def with_data(stage: Any) -> Any:
            listed = stage.get("evaluate") if isinstance(stage, dict) else None
            return stage | {"evaluate": [filled(i) for i in listed]} if isinstance(listed, list) else stage

        return given | {"stages": [with_data(stage) for stage in stages]}

    @field_validator("stages")
    @classmethod
    def _fill_in_micro_batches(cls, given: tuple[Stage, ...], info: ValidationInfo) -> tuple[Stage, ...]:
        """Fill in the stages' micro-batches, since `compute` is read before."""
        compute: Compute | None = info.data.get("compute")
        if compute is None:
            return given
        size = {"micro_batch": compute.micro_batch}
        return tuple(s.model_copy(update=size) if s.micro_batch is None else s for s in given)

    def teacher_ref(self, stage: Stage) -> Reference:
        """A StudentRef where the teacher is a student of an earlier stage.

        Raises UserError when a package that the reference names is not installed.
        """
        return parse_reference(stage.teacher, self.student_names)

    @property
    def stated(self) -> Card:
        """What the recipe says for the cards."""
        return self.card or Card()

    @property
    def student_names(self) -> tuple[str, ...]:
        """All students in the order of their stages."""
        return tuple(student.name for stage in self.stages for student in stage.students)

    def registered_name(self, student: str) -> str:
        """What a student is called in the model registry."""
        return f"{self.name}-{student}"

    def result_fields(self) -> dict[str, Any]:
        """Everything in the recipe that determines the result, as JSON values in canonical form.

        Two spellings of the same recipe (defaults written out, `student:` for `students:`) give the same
        value. Left out: workers, device, threads, checkpointing, tracking, how often is measured. Local
        paths stand as the file has them, so that moving recipe and data together changes nothing.
        """
        return {
            "name": self.name,
            "seed": self.seed,
            "data": self.data.result_fields(),
            "compute": {"precision": self.compute.precision},
            "stages": [stage.result_fields() for stage in self.stages],
        }


SECTIONS: dict[str, type[_Section]] = {
    "": Recipe,
    "data": Data,
    "corpora": Corpus,
    "stages": Stage,
    "students": Student,
    "relations": RelationTerm,
    "embedding": Embedding,
    "evaluate": Measurement,
    "until": Until,
    "compute": Compute,
    "evaluation": Evaluation,
    "promote": Promotion,
    "card": Card,
    "tracking": Tracking,
}
