"""`minilm data verify-run`: the ledger of a finished run against the order it should have followed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minilm.data.read.quarantine import Blocks, Quarantine
from minilm.orchestrator.checkpoint.format import read_meta
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.feed.corpora import close, describe
from minilm.orchestrator.feed.ledger import Expected, advance
from minilm.orchestrator.stage.data import CacheSpec, DataSpec


@dataclass(frozen=True)
class RunCheck:
    """`verify_run`'s answer: the checkpoint's running digest and the one recomputed from the data."""

    step: int
    rows: int
    digest: str
    expected: str

    @property
    def sound(self) -> bool:
        return self.digest == self.expected

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sound": self.sound}

    def text(self) -> str:
        verdict = "are exactly" if self.sound else "are NOT"
        return (
            f"the {self.rows:,} rows of {self.step:,} steps {verdict} those that seed and data give "
            f"(ledger {self.digest}" + (")" if self.sound else f", recomputed {self.expected})")
        )


def verify_run(
    place: str | Path,
    places: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    *,
    cache: CacheSpec | None = None,
    micro_batch: int = 256,
) -> RunCheck:
    """Recompute the ledger of the checkpoint `place` (a folder or URL) from the data that it names.

    `places`: where the run's corpora lie now, in its order, if they have moved. `cache`: for data behind URLs, if not
    the run's own. Reads every row that the run has read, in rounds of about `micro_batch` rows. `progress(done, steps)`
    is called after each step. Raises `UserError` where the checkpoint is damaged or belongs to other data, `DataError`
    for damaged data.
    """
    meta = read_meta(str(place))
    ledger = meta["ledger"]
    steps, batch = int(meta["step"]), int(ledger["batch"])
    data = DataSpec.from_values(ledger["data"])
    data = replace(data, cache=cache or data.cache)
    if places:
        data = _moved(str(place), data, places)
    at_once = next(n for n in range(min(micro_batch, batch), 0, -1) if batch % n == 0)
    order: dict[str, Any] = {"seed": int(ledger["seed"]), "batch": batch, "micro_batch": at_once}
    running = 0
    for first, last, quarantine in _spans(steps, ledger["quarantine"]):
        expected = Expected(data, **order, quarantine=quarantine)
        try:
            for step in range(first, last):
                running = advance(running, expected.digest(step))
                if progress:
                    progress(step + 1, steps)
        finally:
            close(expected.stream.corpora)
    return RunCheck(steps, steps * batch, str(ledger["digest"]), f"{running:032x}")


def _spans(steps: int, history: Sequence[tuple[int, Blocks]]) -> list[tuple[int, int, Quarantine]]:
    """(first step, step behind the last, blocks left out) of a run whose list grew at the steps of `history`."""
    begins: list[tuple[int, Blocks]] = [(0, {}), *((step, blocks) for step, blocks in history)]
    ends = [*(step for step, _ in begins[1:]), steps]
    return [(first, end, Quarantine.of(blocks)) for (first, blocks), end in zip(begins, ends, strict=True)]


def _moved(place: str, data: DataSpec, places: Sequence[str]) -> DataSpec:
    """The same data at other places. Raises `UserError` when they are not the same."""
    if len(places) != len(data.corpora):
        raise UserError(
            f"checkpoint {place} was made from {len(data.corpora)} data sets ({data.places}), {len(places)} are given; "
            f"give as many, in this order"
        )
    corpora = [replace(c, place=place, fingerprint="") for c, place in zip(data.corpora, places, strict=True)]
    found = describe(corpora, window=data.window, cache=data.cache)
    if found.fingerprint != data.fingerprint:
        raise UserError(
            f"checkpoint {place} belongs to other data ({data.fingerprint[:12]}) than {', '.join(places)} "
            f"({found.fingerprint[:12]}); give what the run has read ({data.places})"
        )
    return found
