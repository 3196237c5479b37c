"""The books of a build: every record of every input ends in exactly one account.

A record is a document, empty, or left out with a reason; whatever else a reader cannot use is an error that names file
and place. A source yields documents and `LeftOut`s as it reads; `Noticed` are things that were put right or seen on the
way and change no account. The tasks count them by input, the build adds up, the report prints.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from minilm.data.errors import DataError

WARN_SKIPPED = 0.01
MAX_SKIPPED = 0.5


class LeftOut(NamedTuple):
    """A record of input number `file` that gives no document; `place` is where it stands, as "line 7"."""

    file: int
    place: str
    reason: str


class Noticed(NamedTuple):
    """Something that was put right, or seen, so many `times` from `place` on; its record has an account besides."""

    file: int
    place: str
    what: str
    times: int = 1


class Accounts:
    """Counts by input number; travels as JSON. `left_out` and `noticed`: what → [count, first place]."""

    def __init__(self) -> None:
        self.inputs: dict[int, dict[str, Any]] = {}

    def of(self, file: int) -> dict[str, Any]:
        return self.inputs.setdefault(file, {"documents": 0, "empty": 0, "left_out": {}, "noticed": {}})

    def add(self, item: LeftOut | Noticed) -> None:
        account = self.of(item.file)
        if isinstance(item, LeftOut):
            _count(account["left_out"], item.reason, 1, item.place)
        else:
            _count(account["noticed"], item.what, item.times, item.place)

    def as_json(self) -> list[list[Any]]:
        return [[file, account] for file, account in sorted(self.inputs.items())]

    @classmethod
    def sum_of(cls, parts: Iterable[list[list[Any]]]) -> "Accounts":
        """The sum of what tasks counted; first places are those of the first part."""
        total = cls()
        for part in parts:
            for file, counted in part:
                account = total.of(file)
                account["documents"] += counted["documents"]
                account["empty"] += counted["empty"]
                for kind in ("left_out", "noticed"):
                    for name, (count, place) in counted[kind].items():
                        _count(account[kind], name, count, place)
        return total

    def named(self, names: list[str]) -> list[dict[str, Any]]:
        """The accounts of every input, with its name, for a report."""
        return [
            {
                "input": names[file] if file < len(names) else f"input {file}",
                "records": _records(self.of(file)),
                **self.of(file),
            }
            for file in sorted({*range(len(names)), *self.inputs})
        ]


class Books(NamedTuple):
    """The accounts of a build, summed over its inputs; `first`: where each reason or thing was first met."""

    files: int
    records: int
    documents: int
    empty: int
    left_out: dict[str, int]
    noticed: dict[str, int]
    first: dict[str, str]
    without: list[str]  # inputs with records and no document

    @property
    def skipped_share(self) -> float:
        return sum(self.left_out.values()) / max(1, self.records)

    def lines(self) -> list[str]:
        """The books in words: the sum, then a line for each reason and thing noticed."""
        told = f"{counted(self.files, 'file')}, {counted(self.records, 'record')}: "
        told += f"{counted(self.documents, 'document')}, {self.empty:,} empty"
        if self.left_out:
            told += f", {sum(self.left_out.values()):,} left out"
        found = [told, *(f"left out: {reason}" for reason in self._reasons())]
        found += [f"{count:,} {what} (first: {self.first[what]})" for what, count in self.noticed.items()]
        return found

    def warnings(self) -> list[str]:
        found = []
        if self.skipped_share > WARN_SKIPPED:
            found.append(
                f"{self.skipped_share:.1%} of the records gave no document (below {WARN_SKIPPED:.0%} is usual): "
                f"{'; '.join(self._reasons()[:3])}"
            )
        if self.without:
            more = f" and {len(self.without) - 3} more" if len(self.without) > 3 else ""
            found.append(
                f"no document came from {', '.join(self.without[:3])}{more}, though they hold records"
            )
        return found

    def _reasons(self) -> list[str]:
        named = sorted(self.left_out.items(), key=lambda item: -item[1])
        return [f"{count:,} {reason} (first: {self.first[reason]})" for reason, count in named]

    def refuse(self, allowed: float | None) -> None:
        """DataError when a larger share of the records was left out than is allowed (None: the usual bound)."""
        bound = MAX_SKIPPED if allowed is None else allowed
        if self.skipped_share > bound:
            why = "; ".join(self._reasons()[:3])
            raise DataError(
                f"{self.skipped_share:.1%} of {self.records:,} records gave no document, more than the {bound:.0%} "
                f"that are allowed: {why}; mend the input, name the text's field, or allow it with "
                "--allow-skipped SHARE (recipe: data.allow_skipped)"
            )


def check_allowed(share: float | None) -> None:
    """DataError unless `share` can be given to `Books.refuse`."""
    if share is not None and not 0 <= share <= 1:
        raise DataError(f"allow_skipped {share} is outside 0 … 1; it is a share of the records")


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def books_of(inputs: list[dict[str, Any]]) -> Books:
    """The sum of the accounts of all inputs, as `Accounts.named` gives them."""
    sums: dict[str, dict[str, int]] = {"left_out": {}, "noticed": {}}
    first: dict[str, str] = {}
    for account in inputs:
        for kind, total in sums.items():
            for name, (count, place) in account[kind].items():
                total[name] = total.get(name, 0) + count
                first.setdefault(name, f"{account['input']}, {place}")
    return Books(
        files=len(inputs),
        records=sum(account["records"] for account in inputs),
        documents=sum(account["documents"] for account in inputs),
        empty=sum(account["empty"] for account in inputs),
        left_out=sums["left_out"],
        noticed=sums["noticed"],
        first=first,
        without=[a["input"] for a in inputs if a["records"] > a["empty"] and not a["documents"]],
    )


def _records(account: dict[str, Any]) -> int:
    left_out = sum(count for count, _ in account["left_out"].values())
    return int(account["documents"] + account["empty"] + left_out)


def _count(counts: dict[str, list[Any]], name: str, count: int, place: str) -> None:
    if name in counts:
        counts[name][0] += count
    else:
        counts[name] = [count, place]
