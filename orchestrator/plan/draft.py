"""The text of a new recipe: the numbers that `propose` has decided, each with the reason for it beside it."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minilm.orchestrator.plan.wish import MOST_WORKERS, Wish
from minilm.orchestrator.recipe.library import LIBRARY
from minilm.orchestrator.recipe.show import scalar

FEW_STEPS = 4000  # below, settings as those of the quickstart rather than of the papers
EMBEDDINGS_SHARE = 4  # one part of the steps for the relations, so many for the vectors


@dataclass(frozen=True)
class Rows:
    """The data section: how the text becomes rows. longest: tokens that 95 % of its texts have at most, 0 if unknown.
    count: rows to train on, 0 if unknown."""

    seq_len: int
    packing: str
    held_out: float
    longest: int = 0
    count: float = 0.0


@dataclass(frozen=True)
class Draft:
    """A shape and its training. init: how its layers start. steps: of the last stage. assistant: the stage's key.

    pooling: whether the recipe has to say how the teacher's vectors are pooled. why: what limits the steps.
    """

    layers: int
    hidden: int
    init: str = "random"
    batch: int = MOST_WORKERS
    micro_batch: int = 1
    steps: int = 100
    assistant: str = "auto"
    pooling: bool = False
    why: str = ""

    @property
    def first_steps(self) -> int:
        """Of the stage of relations before one of vectors."""
        return max(self.steps // EMBEDDINGS_SHARE, 2)

    @property
    def shape(self) -> str:
        return f"{self.layers} x {self.hidden}"


def write_draft(wish: Wish, rows: Rows, draft: Draft, head: Sequence[str] = ()) -> str:
    """The recipe. head: paragraphs "Key: text" of the comment at its top."""
    lines = [f"# yaml-language-server: $schema={LIBRARY / 'schema.json'}", "#"]
    for paragraph in head:
        key, _, text = paragraph.partition(": ")
        lines += textwrap.wrap(
            text,
            118,
            initial_indent=f"# {key + ':':<10}",
            subsequent_indent="#" + 11 * " ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    teacher = scalar(wish.teacher)
    longest = f"95 % of the texts have at most {rows.longest:,} tokens" if rows.longest else "tokens a row"
    packing = {
        "full": "rows filled to the end, texts one after the other",
        "sentence": "each sentence is a row, as it will be embedded",
    }[rows.packing]
    lines += [
        "",
        f"name: {scalar(wish.name)}",
        "",
        "data:",
        f"  text: {scalar(list(wish.text) if len(wish.text) > 1 else wish.text[0])}",
        f"  tokenizer: {teacher}",
        _beside(f"  seq_len: {rows.seq_len}", longest),
        _beside(f"  packing: {rows.packing}", packing),
        _beside(f"  held_out: {rows.held_out:g}", "of the documents; the divergence is measured on them"),
        "",
        "stages:",
    ]
    student = f"layers: {draft.layers}, hidden: {draft.hidden}"
    init = f", init: {draft.init}" if draft.init != "random" else ""
    if wish.use == "embeddings":
        lines += [
            _beside("  - name: relations", "the layers learn what the teacher's attend to …"),
            *_stage(teacher, f"{{name: start, {student}{init}}}", draft, draft.first_steps, relations=True),
            "",
            _beside("  - name: vectors", "… then all of the student learns the teacher's vectors"),
            f"    teacher: {teacher}",
            "    objective: embedding",
        ]
        if draft.pooling:
            pooled = "the teacher has no modules.json; cls where it was trained so"
            lines.append(_beside("    embedding: {pooling: mean}", pooled))
        lines += _stage("", f"{{name: embedder, {student}, init: start}}", draft, draft.steps)
    else:
        lines += ["  - name: student", *_stage(teacher, f"{{{student}{init}}}", draft, draft.steps, True)]
    lines += [
        "",
        "compute:",
        _beside(f"  micro_batch: {draft.micro_batch}", "rows that a worker computes at once"),
    ]
    if wish.workers > 1:
        lines.append(_beside(f"  workers: {wish.workers}", "any number gives the same student"))
    return "\n".join(lines) + "\n"


def _stage(teacher: str, student: str, draft: Draft, steps: int, relations: bool = False) -> list[str]:
    quick = relations and steps < FEW_STEPS and draft.init != "teacher-layers"
    rate, warmup = 1e-3 if quick else 3e-4, warmup_steps(steps)
    source = "few steps need a larger one than the papers'" if quick else "the papers' at 256 rows"
    lines = [f"    teacher: {teacher}"] if teacher else []
    if relations and draft.assistant != "none":
        rule = "a teacher assistant where the papers' rule asks for one"
        lines.append(_beside(f"    assistant: {draft.assistant}", rule))
    return [
        *lines,
        f"    student: {student}",
        f"    batch: {draft.batch}",
        _beside(f"    steps: {steps}", draft.why),
        _beside(f"    peak_lr: {rate:g}", source),
        f"    warmup_steps: {warmup}",
        f"    eval_every: {max(1, steps // (5 if steps < FEW_STEPS else 20))}",
        f"    held_out_rows: {64 if steps < FEW_STEPS else 256}",
    ]


def warmup_steps(steps: int) -> int:
    """1 % as in the papers, 4,000 of 400,000; a tenth of the steps where these are few."""
    return min(4000, max(steps // 100, min(steps // 10, 400), 1))


def _beside(text: str, comment: str) -> str:
    return f"{text:<40}# {comment}" if comment else text


def head_of(wish: Wish, out: Path, purpose: str, hours: str, others: str) -> list[str]:
    """The paragraphs at the top, as the packaged recipes have them."""
    embeds = wish.use == "embeddings"
    after = (
        "not measured yet. It is used as it is, by sentence-transformers or transformers."
        if embeds
        else "not measured yet. It must be fine-tuned before use: its pooled vectors mean little until then."
    )
    vectors = " for the relations, LEAF (arXiv:2509.12539) for the vectors" if embeds else ""
    return [
        f"Purpose: {purpose}",
        f"Command: minilm run {shlex.quote(str(out))} --workdir runs/{wish.name}",
        "Needs: the teacher and the text that are named below.",
        f"Hours: {hours}",
        f"Expect: {after}",
        *([f"Others: {others}"] if others else []),
        f"Source: MiniLM (Wang et al. 2020, arXiv:2002.10957){vectors}. Written by minilm new.",
    ]
