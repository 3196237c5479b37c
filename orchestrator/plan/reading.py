"""What a recipe's data mean for its plan, where they are on this machine: rows, epochs, hours of tokenizing.

Rows of a data set are its manifest's. Text has none yet: a second's worth of it is tokenized, and the rest reckoned by
the size of the files.
"""

from __future__ import annotations

import os
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilm.data.builder.clean import Encoder
from minilm.data.builder.sentences import texts_of_rows
from minilm.data.builder.tokenization import pieces
from minilm.data.format import pack
from minilm.data.format.manifest import MANIFEST, load_manifest
from minilm.data.sources import progress, text
from minilm.data.sources.accounts import Accounts
from minilm.data.tokenizer import load_tokenizer
from minilm.orchestrator.recipe.missing import missing_text
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.resolve.folders import folder_here, text_inputs

SAMPLE_FILES, SAMPLE_SECONDS = 4, 1.0


@dataclass(frozen=True)
class Corpus:
    """Rows to train on, exact or `estimated`, and the share of a step's rows that come from here. longest: tokens that
    95 % of the sampled texts have at most, 0 where there is no text."""

    name: str
    rows: float
    share: float
    estimated: bool = False
    longest: int = 0


@dataclass(frozen=True)
class Reading:
    """The corpora that are here, and what tokenizing their text takes on this machine: 0 where there is nothing to."""

    corpora: tuple[Corpus, ...]
    num_bytes: int = 0
    seconds: float = 0.0
    processes: int = 1


def reading(recipe: Recipe) -> Reading:
    """What is here of the recipe's data. Raises `DataError` for text or a tokenizer that can't be read."""
    data = recipe.data
    if data.text is None:
        weights = sum(corpus.weight for corpus in data.corpora or ())
        here = [c for c in data.corpora or () if c.shards and (Path(c.shards) / MANIFEST).is_file()]
        return Reading(
            tuple(Corpus(c.name, load_manifest(Path(str(c.shards))).rows, c.weight / weights) for c in here)
        )
    folder = folder_here(data.tokenizer) if data.tokenizer and data.source == "text" else None
    if folder is None or missing_text(data):
        return Reading(())
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(deepcopy(tokenizer.backend_tokenizer), data.special_tokens)
    plan = text.plan(text_inputs(data.text), tokenizer, data.source_options())
    files = [text.TextFile(*values) for values in plan.spec]
    read, seconds, tokens = 0.0, 0.0, 0
    all_lengths: list[int] = []
    for number in _spread(len(files)):
        began, whole = time.perf_counter(), True
        items = text.read_unit(files[number], text.Unit(number, 0, files[number].num_bytes, 0, 1))
        for piece in pieces(items, Accounts()):
            rows = texts_of_rows(str(piece.content), data.packing, data.language)
            lengths = list(map(len, encoder.encode(rows)))
            tokens += sum(lengths) + 1
            all_lengths += lengths
            if time.perf_counter() - began > SAMPLE_SECONDS / SAMPLE_FILES:
                whole = False
                break
        read += files[number].num_bytes * (1.0 if whole else progress.told())
        seconds += time.perf_counter() - began
    num_bytes = sum(file.num_bytes for file in files)
    scale = num_bytes / max(read, 1.0)
    cut = pack.pieces(np.array([length for length in all_lengths if length]), data.seq_len)
    in_rows: float = len(cut)
    if data.packing == "full":
        in_rows = tokens / pack.content_len(data.seq_len)
    elif data.packing == "masked":
        in_rows = len(pack.fill(cut, data.seq_len)[1])
    processes = len(os.sched_getaffinity(0))
    longest = sorted(all_lengths)[len(all_lengths) * 95 // 100] if all_lengths else 0
    corpus = Corpus("text", scale * in_rows * (1 - data.held_out), 1.0, scale > 1, longest)
    return Reading((corpus,), num_bytes, scale * seconds / processes, processes)


def _spread(num_files: int) -> list[int]:
    """A few of the files, from the first to the last."""
    count = min(SAMPLE_FILES, num_files)
    return [i * num_files // count for i in range(count)]
