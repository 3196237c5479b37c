"""Which rows a step reads, when a row is read, and what rows and tokens look like.

Each function returns a small object with `.text()` for a person and `.as_dict()` for a program. Nothing is written.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilm.data.errors import DataError
from minilm.data.format.manifest import TOKENIZER, Manifest
from minilm.data.read.reader import RowReader
from minilm.data.read.rows import Corpus
from minilm.data.stream import Stream

_MAX_SAMPLED_BLOCKS = 64


@dataclass(frozen=True)
class RowAddress:
    """One row of a step and where it is stored; `index` counts in the batch, `block` in the data set, `row_in_block`
    in the block, `offset` in bytes of the shard's file."""

    index: int
    corpus: int
    epoch: int
    row: int
    shard: str
    block: int
    row_in_block: int
    offset: int
    words: str


@dataclass(frozen=True)
class Explanation:
    step: int
    rows: list[RowAddress]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        head = ("index", "corpus", "epoch", "row", "shard", "block", "in block", "at byte")
        table = [
            (r.index, r.corpus, r.epoch, r.row, r.shard, r.block, r.row_in_block, r.offset) for r in self.rows
        ]
        cells = [head, *(tuple(map(str, line)) for line in table)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        words = ["first words", *(row.words for row in self.rows)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + f"  {first}"
            for line, first in zip(cells, words, strict=True)
        )


@dataclass(frozen=True)
class RowPosition:
    """When an epoch reads a row (`index` counts in the batch of the step), and where the row is stored."""

    row: int
    epoch: int
    step: int
    index: int
    shard: str
    block: int
    row_in_block: int
    offset: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        return (
            f"row {self.row} is in {self.shard}, block {self.block}, row {self.row_in_block} of the block, at byte "
            f"{self.offset}; epoch {self.epoch} reads it in step {self.step}, index {self.index} of the batch"
        )


def explain(
    source: Path | Sequence[Corpus],
    *,
    step: int,
    batch: int,
    seed: int,
    window: int | None = None,
    num_words: int = 8,
) -> Explanation:
    """The rows of one step, in order, with their locations and first words. DataError if there is no such step."""
    if step < 0:
        raise DataError(f"step {step} does not exist; steps count from 0")
    stream = Stream(source, seed=seed, batch=batch, micro_batch=batch, window=window)
    decoders = [_Decoder(_reader(corpus)) for corpus in stream.corpora]
    rows = []
    for index, address in enumerate(stream.addresses(step, 0)):
        reader = _reader(stream.corpora[address.corpus])
        stored = reader.manifest.locate(address.row)
        rows.append(
            RowAddress(
                index,
                address.corpus,
                address.epoch,
                address.row,
                reader.manifest.shard(stored.shard).name,
                stored.block,
                stored.row,
                stored.offset,
                decoders[address.corpus].words(address.row, num_words),
            )
        )
    return Explanation(step, rows)


def where(
    source: Path | Sequence[Corpus],
    *,
    row: int,
    batch: int,
    seed: int,
    epoch: int = 0,
    window: int | None = None,
) -> RowPosition:
    """The step, and the index in its batch, at which `epoch` of the row's corpus reads row number `row` (counted over
    all corpora)."""
    stream = Stream(source, seed=seed, batch=batch, micro_batch=batch, window=window)
    step, index = stream.position(row, epoch)
    address = stream.addresses(step, 0)[index]
    manifest = _reader(stream.corpora[address.corpus]).manifest
    stored = manifest.locate(address.row)
    name = manifest.shard(stored.shard).name
    return RowPosition(row, epoch, step, index, name, stored.block, stored.row, stored.offset)


def _reader(corpus: Corpus) -> RowReader:
    if not isinstance(corpus.rows, RowReader):
        raise DataError("rows that are read in place have no shards to point at; import them first")
    return corpus.rows


class _Decoder:
    """Decodes rows with the tokenizer that is stored with the data set."""

    def __init__(self, reader: RowReader):
        from tokenizers import Tokenizer

        self._reader = reader
        path = reader.folder / TOKENIZER / "tokenizer.json"
        if not path.exists():
            raise DataError(
                f"{str(path)!r} is missing: the data set's tokenizer; fetch it again from where it came"
            )
        self._tokenizer = Tokenizer.from_file(str(path))

    def row(self, row: int) -> str:
        batch = self._reader.read([row])
        ids = batch.input_ids[0] if batch.mask is None else batch.input_ids[0][batch.mask[0]]
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def words(self, row: int, count: int) -> str:
        words = self.row(row).split()
        return " ".join(words[:count]) + (" …" if len(words) > count else "")

    def token(self, number: int) -> str:
        return self._tokenizer.id_to_token(number) or f"#{number}"


@dataclass(frozen=True)
class Inspection:
    """A page of rows and a histogram of the tokens in (at most 64, evenly chosen) blocks."""

    manifest: dict[str, Any]
    page: int
    rows: dict[int, str]
    sampled_rows: int
    frequent_tokens: dict[str, float]
    distinct_tokens: int
    unknown_fraction: float
    padding_fraction: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        lines = [f"{name:<16}{value}" for name, value in self.manifest.items()]
        lines.append(
            f"{'tokens sampled':<16}{self.sampled_rows:,} rows, {self.distinct_tokens:,} different tokens"
        )
        lines.append(f"{'unknown':<16}{self.unknown_fraction:.3%}    padding {self.padding_fraction:.3%}")
        lines.append("most frequent tokens")
        for token, fraction in self.frequent_tokens.items():
            lines.append(f"  {token:<14}{fraction:7.2%}  {'█' * round(200 * fraction)}")
        lines.append(f"rows, page {self.page}")
        lines += [f"  {row:>8}  {text}" for row, text in self.rows.items()]
        return "\n".join(lines)


def inspect(folder: Path, *, page: int = 0, rows_per_page: int = 10, num_tokens: int = 20) -> Inspection:
    """The rows of page `page`, decoded, and statistics of the tokens. DataError if there is no such page."""
    reader = RowReader(folder)
    manifest, decoder = reader.manifest, _Decoder(reader)
    num_pages = -(-manifest.rows // rows_per_page)
    if not 0 <= page < num_pages:
        raise DataError(
            f"page {page} does not exist; there are pages 0 to {num_pages - 1} of {rows_per_page} rows"
        )
    rows = range(page * rows_per_page, min((page + 1) * rows_per_page, manifest.rows))
    counts, sampled_rows, padding = _count_tokens(reader)
    order = [int(token) for token in np.argsort(-counts, kind="stable")[:num_tokens] if counts[token]]
    total = max(1, int(counts.sum()))
    unknown = manifest.tokenizer.unk_id
    return Inspection(
        manifest=_summary(manifest),
        page=page,
        rows={row: decoder.row(row) for row in rows},
        sampled_rows=sampled_rows,
        frequent_tokens={decoder.token(token): int(counts[token]) / total for token in order},
        distinct_tokens=int(np.count_nonzero(counts)),
        unknown_fraction=int(counts[unknown]) / total if unknown >= 0 else 0.0,
        padding_fraction=padding / (sampled_rows * manifest.seq_len),
    )


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "fingerprint": manifest.fingerprint[:16],
        "rows": f"{manifest.rows:,} of {manifest.seq_len} tokens ({manifest.dtype}, {manifest.packing})",
        "tokens": f"{manifest.tokens:,}",
        "shards": f"{manifest.num_shards:,} with {manifest.num_blocks:,} blocks of {manifest.rows_per_block} rows",
        "vocabulary": f"{manifest.tokenizer.vocab_size:,} tokens, {manifest.tokenizer.vocabulary_fingerprint[:16]}",
    }


def _count_tokens(reader: RowReader) -> tuple[Any, int, int]:
    """Counts by token id (int64 [vocabulary], without padding), the number of sampled rows, and of padding tokens in
    them."""
    manifest = reader.manifest
    chosen = np.unique(np.linspace(0, manifest.num_blocks - 1, _MAX_SAMPLED_BLOCKS).astype(int))
    counts = np.zeros(manifest.tokenizer.vocab_size, dtype=np.int64)
    sampled_rows = padding = 0
    for block in chosen:
        first = int(block) * manifest.rows_per_block
        batch = reader.read(range(first, first + manifest.rows_in_block(int(block))))
        ids = batch.input_ids if batch.mask is None else batch.input_ids[batch.mask]
        counts += np.bincount(ids.numpy().ravel(), minlength=len(counts))
        sampled_rows += len(batch.row_ids)
        padding += batch.input_ids.numel() - ids.numel()
    return counts, sampled_rows, padding
