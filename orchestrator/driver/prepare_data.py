"""What a stage needs becomes folders that every worker can read: the data set, and the teacher.

Text becomes shards (once), a registry URI or hub id becomes a folder in the work directory, an earlier student is
the folder that its stage exported. Then teacher, data and students are checked against each other before anything
starts, from the configurations alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from minilm.data.builder.build import import_data
from minilm.data.builder.phases import BuildProgress
from minilm.data.format.files import copy_tree, replacing_folder
from minilm.data.storage.remote import is_remote
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.feed.corpora import describe
from minilm.orchestrator.recipe.references import (
    parse_reference,
)
from minilm.orchestrator.recipe.schema import Corpus, Recipe
from minilm.orchestrator.resolve.folders import model_folder, text_inputs
from minilm.orchestrator.stage.data import CacheSpec, CorpusSpec, DataSpec, PairSpec, QuarantineSpec


def prepare_data(
    recipe: Recipe, workdir: Workdir, progress: Callable[[BuildProgress], None] | None
) -> DataSpec:
    """What the recipe's stages read, opened once; built into the work directory first when the recipe names text."""
    data = recipe.data
    tokenizer = "" if data.tokenizer is None else str(model_folder(data.tokenizer_ref, recipe, workdir))
    if data.text is not None:
        import_data(
            text_inputs(data.text),
            tokenizer,
            workdir.data,
            source=data.source,
            options={
                **(data.options or {}),
                **({"text_field": data.text_field} if data.source == "text" else {}),
            },
            seq_len=data.seq_len,
            packing=data.packing,
            held_out=data.held_out,
            seed=recipe.seed,
            progress=progress,
        )
        corpora = [CorpusSpec("text", str(workdir.data.resolve()))]
    else:
        corpora = [corpus_job(corpus, recipe, workdir, tokenizer) for corpus in data.corpora or ()]
    cache = CacheSpec(None if data.cache is None else str(data.cache), data.cache_gigabytes)
    spec = describe(corpora, window=data.window, cache=cache)
    if data.on_corrupt == "quarantine":
        path = str(workdir.quarantine.resolve())
        spec = replace(spec, quarantine=QuarantineSpec(path, data.max_quarantined_share))
    if is_remote(corpora[0].place):  # the cache is this node's, the work directory every node's
        copy_whole(Path(spec.tokenizer), workdir.tokenizer)
        spec = replace(spec, tokenizer=str(workdir.tokenizer.resolve()))
    return spec


def corpus_job(corpus: Corpus, recipe: Recipe, workdir: Workdir, tokenizer: str) -> CorpusSpec:
    """The corpus as plain values, not opened yet. `tokenizer`: the teacher's, for pairs that are read in place."""
    if corpus.shards is not None:
        return CorpusSpec(corpus.name, corpus.shards, corpus.weight)
    source = corpus.source_tokenizer
    pair = PairSpec(
        tokenizer=tokenizer,
        seq_len=recipe.data.seq_len,
        held_out=recipe.data.held_out,
        source_tokenizer=source and str(model_folder(parse_reference(source), recipe, workdir)),
        fairseq_dict=corpus.fairseq_dict,
        encoder=corpus.encoder,
    )
    assert corpus.tokens is not None  # recipe_types: shards or tokens
    return CorpusSpec(corpus.name, corpus.tokens, corpus.weight, pair=pair)


def copy_whole(folder: Path, to: Path) -> None:
    """Copy a folder; it is there whole or not at all."""
    with replacing_folder(to) as part:
        copy_tree(folder, part)
