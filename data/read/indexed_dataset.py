"""Megatron's or fairseq's `.bin`/`.idx` pair as rows, read in place: nothing is converted or copied to disk.

All tokens of the `.bin` in file order are one sequence, cut every seq_len - 2 tokens; a row is CLS, such a piece, SEP,
as in packing "full". Separators of the source (EOS, end of document) become SEP. Ids are mapped to the teacher's
vocabulary by name; a token that the vocabulary lacks is an error. Such files carry no checksums: their identity is the
index, the size and samples of the `.bin`, so damage inside can pass. `import_data` makes a data set of a pair, with
checksums, a shuffle of documents and a held-out split.
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
from minilm.data.read.positioned import buffer_of, read_at
from minilm.data.read.rows import Batch, Counters, Rows
from minilm.data.sources.indexed import read_index
from minilm.data.sources.vocabulary import DROPPED, Mapper, from_fairseq_dict, from_tokenizer, needs_tokenizer
from minilm.data.tokenizer import load_tokenizer, special_ids, vocabulary_fingerprint

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
        num_tokens = self._file.stat().st_size // self._dtype.itemsize
        self.num_rows = num_tokens // self._content
        if not self.num_rows:
            raise DataError(f"{str(self._file)!r} has {num_tokens} tokens, less than one row of {seq_len}")
        self._descriptor = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self.seq_len, self.shard_rows = seq_len, _SHARD_ROWS
        size = max(teacher.get_vocab().values()) + 1
        self.tokenizer = TokenizerInfo(vocabulary_fingerprint(teacher), size, *special)
        self.fingerprint = _fingerprint(index.prefix, seq_len, mapping.ids)
        self._num_read = 0

    @property
    def counters(self) -> Counters:
        return Counters(self._num_read, self._num_read * self._content * self._dtype.itemsize)

    def read(self, row_ids: npt.ArrayLike) -> Batch:
        """The rows with these numbers, in the order given; rows have no padding. DataError for a token that the
        teacher's vocabulary lacks, and for bytes that cannot be read."""
        wanted = self.checked(row_ids)
        raw = np.empty((len(wanted), self._content), self._dtype)
        row_bytes, out = raw[:1].nbytes, buffer_of(raw)
        try:
            for number, row in enumerate(wanted.tolist()):
                read_at(self._descriptor, row * row_bytes, out[number * row_bytes : (number + 1) * row_bytes])
        except OSError as error:
            raise DataError(
                f"{str(self._file)!r}, at byte {row * row_bytes}: its bytes cannot be read ({error.strerror}); put the "
                "file back and run the same command again"
            ) from error
        stored = raw.astype(np.int64) + self._shift
        mapped = self._mapper.map_all(stored.ravel()).reshape(stored.shape)
        ids = np.empty((len(wanted), self.seq_len), dtype=np.int64)
        ids[:, 0], ids[:, -1] = self.tokenizer.cls_id, self.tokenizer.sep_id
        ids[:, 1:-1] = np.where(mapped == DROPPED, self.tokenizer.sep_id, mapped)
        self._num_read += len(wanted)
        return Batch(torch.from_numpy(ids), None, torch.from_numpy(wanted))


def _fingerprint(prefix: str, seq_len: int, mapping: list[int]) -> str:
    digest = hashlib.sha256(Path(prefix + ".idx").read_bytes())
    digest.update(f"{seq_len} {mapping}".encode())
    with Path(prefix + ".bin").open("rb") as file:
        size = file.seek(0, 2)
        digest.update(str(size).encode())
        for at in np.linspace(0, max(0, size - _SAMPLE_BYTES), _SAMPLES).astype(int):
            file.seek(int(at))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
