"""Shapes for a student that is wished for, with what each costs by `cost`: the rules behind `minilm new`.

A shape keeps all, three quarters, half, a third or a quarter of the teacher's layers, and all, half or a quarter of
each of its heads. What fits the target is trained for as many steps as the budget, the text and the papers allow. Of
those that see enough tokens for their size the largest stands first; behind them, the most tokens for each weight. A
student of the teacher's width starts from the teacher's layers where steps are few: it needs fewer tokens than others,
and stands before them.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from minilm.data.errors import DataError
from minilm.data.tokenizer import load_tokenizer
from minilm.model.encoder.build import build_student
from minilm.model.encoder.initialize import check_start
from minilm.model.encoder.sentence_layout import read_layout
from minilm.model.encoder.shape import EncoderShape, load_config, shape_of, student_shape
from minilm.model.errors import ModelError
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.plan.advice import FEWEST_TOKENS, MOST_EPOCHS, SMALLEST_HEAD, weights_in_layers
from minilm.orchestrator.plan.cost import Machine, Plan, Work, memory, plan
from minilm.orchestrator.plan.draft import EMBEDDINGS_SHARE, Draft, Rows, head_of, write_draft
from minilm.orchestrator.plan.estimate import works
from minilm.orchestrator.plan.reading import reading
from minilm.orchestrator.plan.report import long
from minilm.orchestrator.plan.wish import HERE, MOST_WORKERS, Wish
from minilm.orchestrator.recipe.language.assistant import asks_for_assistant, known_shape
from minilm.orchestrator.recipe.load import read_recipe
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.resolve.folders import folder_here
from minilm.orchestrator.resolve.stages import check_text
from minilm.orchestrator.system.text import duration

LAYERS, HEADS = (1, 3 / 4, 1 / 2, 1 / 3, 1 / 4), (1, 1 / 2, 1 / 4)
BATCHES = (
    MOST_WORKERS,
    128,
    64,
    32,
    16,
)  # the papers' first; a smaller one where there would be too few steps
ENOUGH_STEPS, FEWEST_STEPS = 2000, 20
MOST_STEPS = {
    "fine-tuning": (400_000, "as many as the papers have"),
    "embeddings": (100_000, "as many as embed-mpnet-l6-h384 has"),
}
ENOUGH_FROM_LAYERS = 200  # steps of the quickstarts' students of the teacher's width (docs/evaluation.md)
SHORT = 40_000  # steps below which layers start from the teacher's
ROWS_AT_ONCE = {"cpu": 16, "cuda": 64}
MEMORY_SHARE = 0.8
SHORTEST, LONGEST = 32, {"fine-tuning": 512, "embeddings": 256}  # tokens a row
HELD_OUT, HELD_OUT_ROWS, USUAL = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3), 256, 0.03
NEARLY = 1.05  # 22M is what the papers print of 22.7 M
SHOWN = 4


@dataclass(frozen=True)
class Proposal:
    """A student with its training. parameters: of all of it; weights: of the matrices in its layers. tokens: that its
    last stage reads. milliseconds: for a text, where the target is of them."""

    draft: Draft
    plans: tuple[Plan, ...]
    parameters: int
    weights: int
    tokens: int
    seconds: float
    milliseconds: float | None

    @property
    def flops(self) -> float:
        return sum(one.flops for one in self.plans)

    def rank(self, use: str) -> tuple[bool, bool, float]:
        from_layers = self.draft.init == "teacher-layers"
        if from_layers or use == "embeddings":  # no rule of tokens is known
            enough = self.draft.steps >= ENOUGH_FROM_LAYERS
        else:
            enough = self.tokens >= FEWEST_TOKENS * self.weights
        return enough, from_layers, self.weights if enough else self.tokens / self.weights


@dataclass(frozen=True)
class Setting:
    """What is known before any shape: the wish, the file that is to be, the teacher, and how its text becomes rows.

    pooling: whether the teacher leaves unsaid how its vectors are pooled. by_rule: whether `assistant: auto` knows it.
    """

    wish: Wish
    out: Path
    config: PreTrainedConfig
    rows: Rows
    pooling: bool = False
    by_rule: bool = True

    @property
    def teacher(self) -> EncoderShape:
        return shape_of(self.config)

    def recipe(self, draft: Draft) -> Recipe:
        return read_recipe(self.out, text=write_draft(self.wish, self.rows, draft))[0]


def look_at(wish: Wish, out: Path) -> Setting:
    """Reads the teacher's config and, where it is here, a little of the text. Raises `UserError`."""
    reference = wish.teacher
    if reference.startswith("."):  # from a folder that need not be there yet
        reference = os.path.abspath(out.parent / reference)  # noqa: PTH100 (resolve follows links)
    try:
        folder = folder_here(reference)
        config = load_config(folder or reference)
        shape = shape_of(config)
        unsaid = bool(folder and wish.use == "embeddings" and read_layout(folder, shape.hidden) is None)
        if folder:
            load_tokenizer(folder)
    except (ModelError, DataError, UserError) as error:
        raise UserError(f"--teacher: {error}") from None
    packing = "sentence" if wish.use == "embeddings" else "full"
    rows = Rows(min(LONGEST[wish.use], shape.max_tokens), packing, USUAL)
    setting = Setting(wish, out, config, rows, unsaid, known_shape(reference) is not None)
    any_shape = Draft(1, shape.hidden, assistant="none")
    try:
        if found := reading(setting.recipe(any_shape)).corpora:
            setting = _that_is_enough(setting, found[0].longest, found[0].rows, any_shape)
    except DataError as error:
        text = str(error).partition("; give more text")
        raise UserError(f"--text: {text[0]}{text[1]}") from None
    return setting


def propose(
    setting: Setting,
    device: str,
    precision: str,
    machine_of: Callable[[Recipe, Work], Machine],
    milliseconds: Callable[[PreTrainedModel], float],
) -> tuple[list[Proposal], Machine]:
    """The shapes that fit the target, the best first, and the machine that they are reckoned for.

    machine_of: the hardware; given a stage to measure it with. milliseconds: of a text, by a model. Raises `UserError`
    where no shape fits the target or the budget.
    """
    wish, target, seq_len = setting.wish, setting.wish.target, setting.rows.seq_len
    fitting: list[tuple[Draft, list[Work], float | None]] = []
    smallest = ""
    for layers, hidden in _shapes(setting.teacher):
        draft = _draft(setting, layers, hidden)
        work = works(setting.recipe(draft), seq_len, device, precision)
        if target.milliseconds is not None:
            value = milliseconds(_small_vocabulary(setting, draft))
            fits, smallest = value <= target.milliseconds, f"takes {value:.3g} ms on this machine"
        else:
            value = work[-1].students[0].parameters
            table = setting.teacher.vocab_size * hidden
            fits = value <= NEARLY * (target.parameters or 0)
            smallest = f"has {value / 1e6:.3g} M parameters, {table / 1e6:.3g} M of them its table of tokens"
        smallest = f"the smallest student of this teacher, {draft.shape}, {smallest}"
        if fits:
            fitting.append((draft, work, value if target.milliseconds is not None else None))
    if not smallest:
        size = f"{setting.teacher.layers} x {setting.teacher.hidden}"
        raise UserError(
            f"--teacher: given {wish.teacher!r} ({size}), of which no smaller student can be made"
        )
    if not fitting:
        way = "" if target.milliseconds else ", or a teacher with a smaller vocabulary (minilm shrink)"
        raise UserError(f"--target: given {target.given}; {smallest}; allowed: that or more{way}")
    draft, work, _ = fitting[0]
    machine = machine_of(setting.recipe(draft), work[0])
    settled = [_settled(setting, *one, machine) for one in fitting]
    proposals = [one for one in settled if isinstance(one, Proposal)]
    if not proposals:
        least = min(one for one in settled if isinstance(one, float))
        raise UserError(
            f"--budget: given {wish.budget.given}; the student that is trained soonest takes {rounded_up(least)} "
            f"for {FEWEST_STEPS} steps a stage; allowed: that or more, or faster hardware"
        )
    return sorted(proposals, key=lambda one: one.rank(wish.use), reverse=True)[:SHOWN], machine


def recipe_text(setting: Setting, proposals: Sequence[Proposal], chosen: Proposal, machine: Machine) -> str:
    """The chosen proposal's recipe, with its head."""
    wish, teacher = setting.wish, setting.teacher
    role = "an embedder" if wish.use == "embeddings" else "a student"
    assistant = f" by an assistant of {teacher.layers} x {chosen.draft.hidden}" * (
        chosen.draft.assistant != "none"
    )
    purpose = (
        f"{wish.teacher} ({teacher.layers} x {teacher.hidden}) teaches {role} of {chosen.draft.shape}{assistant}: "
        f"{chosen.parameters / 1e6:.1f} M parameters."
    )
    where = machine.device if wish.hardware == HERE else wish.hardware
    hours = (
        f"about {long(chosen.seconds)} on {wish.workers} x {where}, computed ({machine.source}); tokenizing, measuring "
        f"and saving come on top."
    )
    others = "; ".join(
        f"{one.draft.shape}: {one.parameters / 1e6:.1f} M parameters, {one.draft.steps:,} steps, {long(one.seconds)}"
        for one in proposals
        if one is not chosen
    )
    return write_draft(
        wish, setting.rows, chosen.draft, head_of(wish, setting.out, purpose, hours, others and f"{others}.")
    )


def _that_is_enough(setting: Setting, longest: int, count: float, any_shape: Draft) -> Setting:
    """With rows as long as most texts, shorter where the text is too little for these, and a held-out share that gives
    rows. Raises DataError. longest, count: see `Corpus`, of rows as the setting has them."""
    given, share = setting.rows.seq_len, setting.rows.held_out
    total = count / (1 - share)
    length = min(given, max(64, 1 << max(longest - 1, 0).bit_length()))
    first = next(share for share in HELD_OUT if share * total >= HELD_OUT_ROWS or share == USUAL)
    while True:
        for share in HELD_OUT[HELD_OUT.index(first) :]:
            rows = replace(setting.rows, seq_len=length, held_out=share, longest=longest)
            tried = replace(setting, rows=rows)
            recipe = tried.recipe(any_shape)
            try:
                check_text(recipe, folder_here)
            except DataError:
                if share == HELD_OUT[-1] and length <= SHORTEST:
                    raise
                continue
            return replace(tried, rows=replace(rows, count=reading(recipe).corpora[0].rows))
        length //= 2


def _shapes(teacher: EncoderShape) -> Iterator[tuple[int, int]]:
    """Layers and hidden sizes from the largest to the smallest, each smaller than the teacher."""
    own = teacher.hidden // teacher.heads
    sizes = {own, *(int(own * part) for part in HEADS if own * part >= SMALLEST_HEAD)}
    found = set()
    for layers in {max(1, round(teacher.layers * part)) for part in LAYERS}:
        for size in sizes:
            with suppress(ModelError):  # heads of an odd size where they are rotated
                found.add((layers, student_shape(teacher, layers=layers, hidden=size * teacher.heads).hidden))
    found.discard((teacher.layers, teacher.hidden))
    yield from sorted(found, key=lambda one: one[0] * one[1] ** 2, reverse=True)


def _draft(setting: Setting, layers: int, hidden: int) -> Draft:
    """Batch and steps are decided later."""
    teacher = setting.teacher
    init = "teacher-layers" if hidden == teacher.hidden else "teacher-pca"
    try:
        check_start(teacher, student_shape(teacher, layers=layers, hidden=hidden), init)
    except ModelError:
        init = "random"
    asks = asks_for_assistant((teacher.layers, teacher.hidden), (layers, hidden))
    assistant = "none" if not asks else "auto" if setting.by_rule else str(teacher.layers)
    return Draft(layers, hidden, init, assistant=assistant, pooling=setting.pooling)


def _settled(
    setting: Setting, draft: Draft, found: list[Work], milliseconds: float | None, machine: Machine
) -> Proposal | float:
    """With batch and steps by the budget, the text and the papers; or the seconds that the fewest steps take, where the
    budget has no room for them."""
    wish = setting.wish
    share = 1 / EMBEDDINGS_SHARE if wish.use == "embeddings" else 1.0
    shares = [share] * (len(found) - 1) + [1.0]
    for batch in [size for size in BATCHES if size >= wish.workers]:
        size = _micro_batch(batch // wish.workers, found, machine)
        own = [replace(work, batch=batch, micro_batch=size, steps=1) for work in found]
        seconds = [plan(work, machine, [wish.workers]).seconds(wish.workers) or 0.0 for work in own]
        a_step = sum(part * one for part, one in zip(shares, seconds, strict=True))
        passes = MOST_EPOCHS * setting.rows.count / batch
        limits = [
            (wish.budget.seconds / a_step, f"what the budget of {wish.budget.given} allows"),
            MOST_STEPS[wish.use],
            *([(passes, f"{MOST_EPOCHS} passes over the text")] if passes else []),
        ]
        most, why = min(limits)
        if most >= ENOUGH_STEPS:
            break
    least = int(FEWEST_STEPS / share)
    if wish.budget.seconds < least * a_step:
        return least * a_step
    steps = max(int(most), least)
    init = draft.init if steps < SHORT else "random"
    draft = replace(draft, batch=batch, micro_batch=size, steps=steps, init=init, why=why)
    stages = setting.recipe(draft).stages
    plans = tuple(
        plan(replace(work, steps=stage.steps), machine, [wish.workers])
        for work, stage in zip(own, stages, strict=True)
    )
    student = found[-1].students[0]
    return Proposal(
        draft,
        plans,
        student.parameters,
        weights_in_layers(student.layers, student.hidden, student.ffn),
        plans[-1].tokens,
        sum(one.seconds(wish.workers) or 0.0 for one in plans),
        milliseconds,
    )


def rounded_up(seconds: float) -> str:
    """As `--budget` takes it, and no less: hours are told without seconds."""
    unit = 1 if seconds < 3600 else 60
    return duration(unit * math.ceil(seconds / unit))


def _micro_batch(rows: int, found: Sequence[Work], machine: Machine) -> int:
    """A power of two, at most `rows`, that the device's memory has room for, as far as that is known."""
    size = 1 << (min(rows, ROWS_AT_ONCE[machine.device]).bit_length() - 1)
    while size > 1 and any(
        0 < MEMORY_SHARE * machine.memory < memory(replace(work, micro_batch=size)).total for work in found
    ):
        size //= 2
    return size


def _small_vocabulary(setting: Setting, draft: Draft) -> PreTrainedModel:
    """A student of this shape; its table of tokens, which costs no time, is small."""
    config = copy.deepcopy(setting.config)
    config.vocab_size, config.pad_token_id = 1000, 1
    return build_student(config, layers=draft.layers, hidden=draft.hidden, seed=0).eval()
