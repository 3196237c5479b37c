"""What the recipe's stages read becomes a `DataSpec` that every worker can open. Text is built into shards first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from minilm.data.builder.build import import_data
from minilm.data.builder.phases import BuildProgress
from minilm.data.builder.report import BuildReport
from minilm.data.format.files import copy_tree, replacing_folder
from minilm.data.format.manifest import MANIFEST
from minilm.data.storage.remote import is_remote
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.feed.corpora import describe
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.resolve.folders import text_inputs
from minilm.orchestrator.resolve.stages import corpus_spec
from minilm.orchestrator.stage.data import CacheSpec, CorpusSpec, DataSpec, QuarantineSpec


def prepare_data(
    recipe: Recipe,
    workdir: Workdir,
    fetch: Callable[[str], str],
    progress: Callable[[BuildProgress], None] | None,
    built: Callable[[BuildReport], None] = lambda report: None,
) -> DataSpec:
    """What the recipe's stages read, opened once; built into the work directory first when the recipe names text.

    `fetch(reference)`: the folder of a tokenizer. `built` is told what a build has found, unless it was done before.
    """
    data = recipe.data
    if data.text is not None:
        assert data.tokenizer is not None  # recipe.schema: text with a tokenizer
        was_there = (workdir.data / MANIFEST).exists()
        report = import_data(
            text_inputs(data.text),
            fetch(data.tokenizer),
            workdir.data,
            source=data.source,
            options=data.source_options(),
            seq_len=data.seq_len,
            packing=data.packing,
            held_out=data.held_out,
            seed=recipe.seed,
            special_tokens=data.special_tokens,
            language=data.language,
            allow_skipped=data.allow_skipped,
            progress=progress,
        )
        if not was_there:
            built(report)
        corpora = [CorpusSpec("text", str(workdir.data.resolve()))]
    else:
        corpora = [corpus_spec(corpus, recipe, fetch) for corpus in data.corpora or ()]
    cache = CacheSpec(None if data.cache is None else str(data.cache), data.cache_gigabytes)
    spec = describe(corpora, window=data.window, cache=cache)
    if data.on_corrupt == "quarantine":
        path = str(workdir.quarantine.resolve())
        spec = replace(spec, quarantine=QuarantineSpec(path, data.max_quarantined_share))
    if is_remote(corpora[0].place):  # the cache is this node's, the work directory every node's
        copy_whole(Path(spec.tokenizer), workdir.tokenizer)
        spec = replace(spec, tokenizer=str(workdir.tokenizer.resolve()))
    return spec


def copy_whole(folder: Path, to: Path) -> None:
    """Copy a folder; it is there whole or not at all."""
    with replacing_folder(to) as part:
        copy_tree(folder, part)
