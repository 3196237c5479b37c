"""What a recipe's data mean for its plan, where they are on this machine: rows, epochs, hours of tokenizing.

Rows of a data set are its manifest's. Text has none yet: a second's worth of it is tokenized, and the rest reckoned by
the size of the files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from minilm.data.format.manifest import MANIFEST, load_manifest
from minilm.data.format.pack import content_len
from minilm.data.sources import progress, text
from minilm.data.tokenizer import load_tokenizer
from minilm.orchestrator.recipe.missing import missing_text
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.resolve.folders import folder_here, text_inputs

SAMPLE_FILES, SAMPLE_SECONDS = 4, 1.0


@dataclass(frozen=True)
class Corpus:
    """Rows to train on, exact or `estimated`, and the share of a step's rows that come from here."""

    name: str
    rows: float
    share: float
    estimated: bool = False


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
    coder = deepcopy(load_tokenizer(folder).backend_tokenizer)
    coder.no_truncation()
    coder.no_padding()
    files = text.find_files(text_inputs(data.text))
    sizes = [file.stat().st_size for file in files]
    read, seconds, tokens, pieces = 0.0, 0.0, 0, 0
    for file in _spread(files):
        described = text.describe(file, data.text_field)
        began = time.perf_counter()
        whole = True
        for document in text.read_unit(described, text.Unit(0, 0, described.num_bytes, 0, 1)):
            length = len(coder.encode(document.content, add_special_tokens=False).ids)
            tokens += length + 1
            pieces += -(-length // content_len(data.seq_len))
            if time.perf_counter() - began > SAMPLE_SECONDS / SAMPLE_FILES:
                whole = False
                break
        read += described.num_bytes * (1.0 if whole else progress.told())
        seconds += time.perf_counter() - began
    scale = sum(sizes) / max(read, 1.0)
    in_rows = tokens / content_len(data.seq_len) if data.packing == "full" else pieces
    processes = len(os.sched_getaffinity(0))
    corpus = Corpus("text", scale * in_rows * (1 - data.held_out), 1.0, estimated=scale > 1)
    return Reading((corpus,), sum(sizes), scale * seconds / processes, processes)


def _spread(files: Sequence[Path]) -> list[Path]:
    """A few of the files, from the first to the last."""
    count = min(SAMPLE_FILES, len(files))
    return [files[i * len(files) // count] for i in range(count)]
