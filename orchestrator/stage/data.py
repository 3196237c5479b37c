"""What a stage reads, as plain values: the corpora, how they are mixed and shuffled, and where the tokenizer lies.

Made once by the driver (`corpora.describe`), which pins every fingerprint; travels to the workers in the `StageSpec`
and in every checkpoint's ledger, so that a checkpoint alone says what it was trained on. Opened by `corpora`. Holds
no secrets: credentials of a storage come from each node's environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from minilm.data.format.manifest import TokenizerInfo


@dataclass(frozen=True)
class PairSpec:
    """How a `.bin`/`.idx` pair is read in place. `held_out`: the share of its rows, at its end, that no step reads."""

    tokenizer: str
    seq_len: int
    held_out: float
    source_tokenizer: str | None = None
    fairseq_dict: str | None = None
    encoder: str | None = None


@dataclass(frozen=True)
class CorpusSpec:
    """One corpus: a data set in a folder or behind a URL, or with `pair` the prefix of a `.bin`/`.idx` pair.

    `fingerprint`: what it must have when it is opened; empty before the first time.
    """

    name: str
    place: str
    weight: float = 1.0
    fingerprint: str = ""
    pair: PairSpec | None = None


@dataclass(frozen=True)
class CacheSpec:
    """Where each node keeps shards that lie behind URLs (None: `~/.cache/minilm`), and how much of them at most."""

    folder: str | None = None
    gigabytes: float = 64.0


@dataclass(frozen=True)
class QuarantineSpec:
    """Damaged blocks are left out, up to `max_share` of a data set, and listed in the file `path` (on all nodes)."""

    path: str
    max_share: float


@dataclass(frozen=True)
class DataSpec:
    """`fingerprint`: of all corpora and weights. `tokenizer`: the folder that students are exported with. `window`:
    shuffled by so many shards, None for fully. `quarantine`: None where damage ends the run. `tokenizer_files`: the
    sha256 of each file in `tokenizer` that an export copies. `packing`: full where any corpus is."""

    corpora: tuple[CorpusSpec, ...]
    fingerprint: str
    seq_len: int
    vocabulary: TokenizerInfo
    tokenizer: str
    window: int | None
    cache: CacheSpec
    quarantine: QuarantineSpec | None = None
    tokenizer_files: dict[str, str] = field(default_factory=dict)
    packing: str = ""

    @property
    def places(self) -> str:
        """In words, for people."""
        return ", ".join(corpus.place for corpus in self.corpora)

    def to_values(self) -> dict[str, Any]:
        return asdict(self) | {"vocabulary": self.vocabulary._asdict()}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> DataSpec:
        corpora = [
            CorpusSpec(**corpus | {"pair": corpus["pair"] and PairSpec(**corpus["pair"])})
            for corpus in values["corpora"]
        ]
        typed = {
            "corpora": tuple(corpora),
            "vocabulary": TokenizerInfo(**values["vocabulary"]),
            "cache": CacheSpec(**values["cache"]),
            "quarantine": values["quarantine"] and QuarantineSpec(**values["quarantine"]),
        }
        return cls(**{**values, **typed})
