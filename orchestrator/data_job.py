"""What a stage reads, as plain values: the corpora, how they are mixed and shuffled, and where the tokenizer lies.

Made once by the driver (`corpora.describe`), which pins every fingerprint; travels to the workers in the `StageJob`
and in every checkpoint's ledger, so that a checkpoint alone says what it was trained on. Opened by `corpora`. Holds
no secrets: credentials of a storage come from each node's environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data.manifest import TokenizerInfo


@dataclass(frozen=True)
class PairJob:
    """How a `.bin`/`.idx` pair is read in place. `held_out`: the share of its rows, at its end, that no step reads."""

    tokenizer: str
    seq_len: int
    held_out: float
    source_tokenizer: str | None = None
    fairseq_dict: str | None = None
    encoder: str | None = None


@dataclass(frozen=True)
class CorpusJob:
    """One corpus: a data set in a folder or behind a URL, or with `pair` the prefix of a `.bin`/`.idx` pair.

    `fingerprint`: what it must have when it is opened; empty before the first time.
    """

    name: str
    place: str
    weight: float = 1.0
    fingerprint: str = ""
    pair: PairJob | None = None


@dataclass(frozen=True)
class CacheJob:
    """Where each node keeps shards that lie behind URLs (None: `~/.cache/minilm`), and how much of them at most."""

    folder: str | None = None
    gigabytes: float = 64.0


@dataclass(frozen=True)
class QuarantineJob:
    """Damaged blocks are left out, up to `max_share` of a data set, and listed in the file `path` (on all nodes)."""

    path: str
    max_share: float


@dataclass(frozen=True)
class DataJob:
    """`fingerprint`: of all corpora and weights. `tokenizer`: the folder that students are exported with. `window`:
    shuffled by so many shards, None for fully. `quarantine`: None where damage ends the run."""

    corpora: tuple[CorpusJob, ...]
    fingerprint: str
    seq_len: int
    vocabulary: TokenizerInfo
    tokenizer: str
    window: int | None
    cache: CacheJob
    quarantine: QuarantineJob | None = None

    @property
    def places(self) -> str:
        """In words, for people."""
        return ", ".join(corpus.place for corpus in self.corpora)

    def to_values(self) -> dict[str, Any]:
        return asdict(self) | {"vocabulary": self.vocabulary._asdict()}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> DataJob:
        corpora = [
            CorpusJob(**corpus | {"pair": corpus["pair"] and PairJob(**corpus["pair"])})
            for corpus in values["corpora"]
        ]
        typed = {
            "corpora": tuple(corpora),
            "vocabulary": TokenizerInfo(**values["vocabulary"]),
            "cache": CacheJob(**values["cache"]),
            "quarantine": values["quarantine"] and QuarantineJob(**values["quarantine"]),
        }
        return cls(**{**values, **typed})
