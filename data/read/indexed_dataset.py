"""Megatron's or fairseq's `.bin`/`.idx` pair as rows, read in place: nothing is converted or copied to disk.

All tokens of the `.bin` in file order are one stream, cut every seq_len - 2; a row is CLS, that cut, SEP, as packing
"full" does. Separators of the source (EOS, end of document) become SEP; where a stream has none, SEP is put between the
documents of the index. Ids are mapped to the teacher's
vocabulary by name, row by row; one that has no namesake is an error. Such files carry no checksums: their identity is
the index, the size and samples of the `.bin`, so unlike in a data set of ours damage inside can pass. `import_data`
gives it checksums, a shuffle of documents and a held-out split.
"""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from minilm.data.errors import DataError
from minilm.data.format.manifest import TokenizerInfo
from minilm.data.format.pack import content_len
from minilm.data.read.address_space import AddressSpace
from minilm.data.read.document_ends import DocumentEnds
from minilm.data.read.rows import Batch, Counters
from minilm.data.sources.indexed import read_index
from minilm.data.sources.vocabulary import (
    DROPPED,
    END,
    Mapper,
    from_fairseq_dict,
    from_tokenizer,
    needs_tokenizer,
)
from minilm.data.tokenizer import load_tokenizer, pipeline_fingerprint, special_ids, vocabulary_fingerprint

_SHARD_ROWS = 1 << 16  # what a window counts in
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


class IndexedRows:
    """Rows of a pair at `prefix`; implements data.stream.Rows, so it can be a `Stream`'s source or a corpus."""

    def __init__(
        self,
        prefix: str | Path,
        *,
        tokenizer: str,
        seq_len: int,
        source_tokenizer: str | None = None,
        fairseq_dict: str | Path | None = None,
        encoder: str | Path | None = None,
    ):
        self._content = content_len(seq_len)
        index = read_index(prefix, "megatron", "fairseq", "fairseq-legacy")
        teacher = load_tokenizer(tokenizer)
        if index.layout != "megatron" and fairseq_dict is not None:
            mapping = from_fairseq_dict(Path(fairseq_dict), teacher, Path(encoder) if encoder else None)
        elif source_tokenizer is not None:
            mapping = from_tokenizer(source_tokenizer, teacher)
        else:
            raise needs_tokenizer(index.layout)
        special = special_ids(teacher)
        if special.cls < 0 or special.sep < 0:
            raise DataError(
                f"tokenizer {tokenizer!r} has no CLS or no SEP token, which rows begin and end with"
            )
        self._file, self._shift = Path(index.prefix + ".bin"), index.shift
        self._mapper = Mapper(mapping.ids, mapping.names, index.prefix)
        width = np.dtype(index.dtype).itemsize
        held = self._file.stat().st_size // width
        if not held:
            raise DataError(f"{str(self._file)!r} has 0 tokens, less than one row of {seq_len}")
        self._space = AddressSpace(held * width)
        with self._file.open("rb") as file:
            self._space.map(file.fileno(), 0, held * width)
        self._tokens = self._space.bytes.view(index.dtype)
        self._ends = DocumentEnds(index, lambda places: self._mapped(places) < 0)
        num_tokens = self._ends.num_tokens
        self.num_rows = num_tokens // self._content
        if not self.num_rows:
            raise DataError(f"{str(self._file)!r} has {num_tokens} tokens, less than one row of {seq_len}")
        self.seq_len, self.shard_rows = seq_len, _SHARD_ROWS
        size = max(teacher.get_vocab().values()) + 1
        pipeline = pipeline_fingerprint(teacher)
        self.tokenizer = TokenizerInfo(vocabulary_fingerprint(teacher), size, *special, pipeline)
        ids = [DROPPED if number == END else number for number in mapping.ids]  # keeps older fingerprints
        self.fingerprint = _fingerprint(index.prefix, seq_len, ids, "separated" if self._ends.inserts else "")
        self.counters = Counters()

    def at_hand(self, row_ids: npt.NDArray[np.int64]) -> bool:
        """Always: the whole file is mapped, and has no checksums to compare."""
        return True

    def announce(self, current: npt.NDArray[np.int64], coming: npt.NDArray[np.int64]) -> None:
        """Windows need no care: the file is local."""

    def read(self, row_ids: npt.ArrayLike) -> Batch:
        """The rows of these numbers, in the order given; rows have no padding. DataError for a token without
        namesake in the teacher's vocabulary, and for a file that was cut since it was opened."""
        wanted = np.array(row_ids, dtype=np.int64).reshape(-1)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.num_rows):
            raise DataError(
                f"rows {wanted.min()} to {wanted.max()} were asked for; there are 0 to {self.num_rows - 1}"
            )
        places = self._ends.places(wanted, self._content)
        mapped = self._mapped(places.tokens)
        mapped[places.inserted] = END
        self._ends.check(wanted, self._content, mapped >= 0)
        ids = np.empty((len(wanted), self.seq_len), dtype=np.int64)
        ids[:, 0], ids[:, -1] = self.tokenizer.cls_id, self.tokenizer.sep_id
        ids[:, 1:-1] = np.where(mapped < 0, self.tokenizer.sep_id, mapped)
        done = self.counters
        self.counters = Counters(
            done.rows + len(wanted), done.row_bytes + mapped.size * self._tokens.itemsize, 0
        )
        return Batch(torch.from_numpy(ids), None, torch.from_numpy(wanted))

    def _mapped(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The teacher's ids of the tokens at these places, DROPPED and END in place."""
        stored = self._tokens[places].astype(np.int64) + self._shift
        if self._space.lost:
            at = self._space.lost[0]
            raise DataError(
                f"{str(self._file)!r}, at byte {at}: its bytes went away while they were read (the file was cut, or "
                "the disk fails); put it back and run the same command again"
            )
        return self._mapper.map_all(stored.ravel()).reshape(stored.shape)


def _fingerprint(prefix: str, seq_len: int, mapping: list[int], how: str) -> str:
    digest = hashlib.sha256(Path(prefix + ".idx").read_bytes())
    digest.update(f"{seq_len} {mapping}{how}".encode())
    with Path(prefix + ".bin").open("rb") as file:
        size = file.seek(0, 2)
        digest.update(str(size).encode())
        for at in np.linspace(0, max(0, size - _SAMPLE_BYTES), _SAMPLES).astype(int):
            file.seek(int(at))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
