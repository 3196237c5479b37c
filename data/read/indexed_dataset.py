"""Megatron's or fairseq's `.bin`/`.idx` pair as rows, read in place: nothing is converted or copied to disk.

All tokens of the `.bin` in file order are one sequence, cut every seq_len - 2 tokens; a row is CLS, such a piece, SEP,
as in packing "full". Separators of the source (EOS, end of document) become SEP; where a stream has none, SEP is put
between the documents of the index. Ids are mapped to the teacher's vocabulary by name; a token that the vocabulary
lacks is an error. Such files carry no checksums: their identity is the index, the size and samples of the `.bin`, so
damage inside can pass. `import_data` makes a data set of a pair, with checksums, a shuffle of documents and a held-out
split.
"""

import hashlib
import os
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from minilm.data.errors import DataError
from minilm.data.format.manifest import TokenizerInfo
from minilm.data.format.pack import content_len
from minilm.data.read.document_ends import DocumentEnds
from minilm.data.read.positioned import buffer_of, read_at
from minilm.data.read.rows import Batch, Counters, Rows
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

_SHARD_ROWS = 1 << 16  # the unit of a window
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


class IndexedRows(Rows):
    """The rows of the pair at `prefix`."""

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
        self._dtype = np.dtype(index.dtype)
        if self._file.stat().st_size < self._dtype.itemsize:
            raise DataError(f"{str(self._file)!r} has 0 tokens, less than one row of {seq_len}")
        self._descriptor = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._ends = DocumentEnds(index, lambda places: self._mapped(places[:, None])[:, 0] < 0)
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
        self._num_read = 0

    @property
    def counters(self) -> Counters:
        return Counters(self._num_read, self._num_read * self._content * self._dtype.itemsize)

    def read(self, row_ids: npt.ArrayLike) -> Batch:
        """The rows with these numbers, in the order given; rows have no padding. DataError for a token that the
        teacher's vocabulary lacks, and for bytes that cannot be read."""
        wanted = self.checked(row_ids)
        places = self._ends.places(wanted, self._content)
        mapped = self._mapped(places.tokens)
        mapped[places.inserted] = END
        self._ends.check(wanted, self._content, mapped >= 0)
        ids = np.empty((len(wanted), self.seq_len), dtype=np.int64)
        ids[:, 0], ids[:, -1] = self.tokenizer.cls_id, self.tokenizer.sep_id
        ids[:, 1:-1] = np.where(mapped < 0, self.tokenizer.sep_id, mapped)
        self._num_read += len(wanted)
        return Batch(torch.from_numpy(ids), None, torch.from_numpy(wanted))

    def _mapped(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The teacher's ids of the tokens at `places` [n, m], DROPPED and END in place. What lies between the first
        and last place of a line is read at once."""
        width = self._dtype.itemsize
        stored = np.empty(places.shape, dtype=np.int64)
        for line, wanted in zip(stored, places, strict=True):
            first = int(wanted.min())
            raw = np.empty(int(wanted.max()) + 1 - first, self._dtype)
            try:
                read_at(self._descriptor, first * width, buffer_of(raw))
            except OSError as error:
                raise DataError(
                    f"{str(self._file)!r}, at byte {first * width}: its bytes cannot be read ({error.strerror}); put "
                    "the file back and run the same command again"
                ) from error
            line[:] = raw[wanted - first]
        return self._mapper.map_all((stored + self._shift).ravel()).reshape(stored.shape)


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
