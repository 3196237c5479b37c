"""What a build says at its end: counts and shares, as an object, text, JSON and a picture of document lengths."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from minilm.data.builder.work import Work
from minilm.data.format.files import replacing, write_whole
from minilm.data.format.pack import content_len
from minilm.data.sources.accounts import Books, books_of

REPORT = "report"
REPORT_FILES = ("report.json", "report.txt", "lengths.png")
MAX_UNKNOWN_SHARE = 0.01


@dataclass(frozen=True)
class BuildReport:
    """Counts of a build. `tokens` are those of the text, without CLS, SEP and padding; shares lie in 0..1.

    `inputs`: of every input its records, documents, empty ones, those left out and what was noticed, by reason;
    `files_left_out`: of what lies in folders, counts by reason.
    `truncated_share`: tokens that stand in no row (what is left behind the last whole row of packing "full").
    `split_share`: documents longer than one row. `length_histogram[i]`: documents of 2^(i/2) … 2^((i+1)/2)
    tokens; with packing "sentence" both are of sentences, as `counted` says. `tokens_per_second` is that of
    tokenizing, by all processes together.
    """

    documents: int
    empty_documents: int
    held_out_documents: int
    rows: int
    held_out_rows: int
    tokens: int
    unknown_share: float
    truncated_share: float
    split_share: float
    tokens_per_second: float
    seconds: float
    fingerprint: str
    length_histogram: list[int]
    notes: list[str]
    inputs: list[dict[str, Any]] = field(default_factory=list)
    files_left_out: dict[str, int] = field(default_factory=dict)
    counted: str = "documents"

    @property
    def books(self) -> Books:
        """What became of all records: the sum over `inputs`."""
        return books_of(self.inputs)

    @property
    def warnings(self) -> list[str]:
        """What a person should look at: many unknown tokens (the tokenizer is probably the wrong one), many records
        without a document."""
        found = self.books.warnings()
        if self.unknown_share > MAX_UNKNOWN_SHARE:
            found.append(
                f"{self.unknown_share:.1%} of the tokens are unknown to the tokenizer (below "
                f"{MAX_UNKNOWN_SHARE:.0%} is usual): is it made for this text's language and alphabet?"
            )
        return found

    def text(self) -> str:
        """A few aligned lines for a person."""
        documents = f"{self.documents:,}"
        if self.empty_documents:
            documents += f"  ({self.empty_documents:,} more were empty)"
        rows = f"{self.rows:,}"
        if self.held_out_rows:
            rows += f"  (held out: {self.held_out_rows:,} rows of {self.held_out_documents:,} documents)"
        lines = {
            "documents": documents,
            "rows": rows,
            "tokens": f"{self.tokens:,}",
            "unknown": f"{self.unknown_share:.3%} of the tokens",
            "left over": f"{self.truncated_share:.3%} of the tokens, less than a row",
            "split": f"{self.split_share:.1%} of the {self.counted} are longer than a row",
            "speed": f"{self.tokens_per_second:,.0f} tokens/s, {self.seconds:.1f} s in all",
            "fingerprint": self.fingerprint[:16],
        }
        told = [f"{name:<12}{value}" for name, value in lines.items()]
        told += [f"{'read':<12}{line}" for line in [*self.books.lines(), *self.notes]]
        told += [f"{'WARNING':<12}{warning}" for warning in self.warnings]
        return "\n".join(told)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_report(
    work: Work,
    total: dict[str, int],
    buckets: dict[str, list[dict[str, Any]]],
    rows_and_tokens: dict[str, tuple[int, int]],
    fingerprint: str,
    tokenize_seconds: float,
    seconds: float,
    notes: list[str],
    inputs: list[dict[str, Any]],
    files_left_out: dict[str, int],
) -> BuildReport:
    """Add up the counts of all tasks."""
    every = [bucket for split in buckets.values() for bucket in split]
    rows = {split: num_rows for split, (num_rows, _) in rows_and_tokens.items()}
    dropped = 0
    if work.packing == "full":
        content = content_len(work.layout.seq_len)
        dropped = sum(bucket["stream"] for bucket in every) - sum(rows.values()) * content
    return BuildReport(
        documents=total["documents"],
        empty_documents=sum(account["empty"] for account in inputs),
        held_out_documents=total["held_out"],
        rows=rows["train"],
        held_out_rows=rows.get("held-out", 0),
        tokens=total["tokens"],
        unknown_share=total["unknown"] / total["tokens"],
        truncated_share=dropped / total["tokens"],
        split_share=sum(bucket["longer_than_row"] for bucket in every)
        / sum(bucket["documents"] for bucket in every),
        tokens_per_second=total["tokens"] / max(tokenize_seconds, 1e-9),
        seconds=seconds,
        fingerprint=fingerprint,
        length_histogram=[sum(column) for column in zip(*(b["histogram"] for b in every), strict=True)],
        notes=notes,
        inputs=inputs,
        files_left_out=files_left_out,
        counted="sentences" if work.packing == "sentence" else "documents",
    )


def save_report(report: BuildReport, seq_len: int, folder: Path) -> None:
    """Write `report.json`, `report.txt` and `lengths.png` into `folder`."""
    folder.mkdir(exist_ok=True)
    told = {**report.as_dict(), "books": report.books._asdict(), "warnings": report.warnings}
    write_whole(folder / "report.json", (json.dumps(told, indent=2) + "\n").encode())
    write_whole(folder / "report.txt", (report.text() + "\n").encode("utf-8", "backslashreplace"))
    with replacing(folder / "lengths.png") as picture:
        _draw_lengths(report, seq_len, picture)


def _draw_lengths(report: BuildReport, seq_len: int, file: IO[bytes]) -> None:
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    bins = report.length_histogram
    used = [i for i, count in enumerate(bins) if count]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    left = [2 ** (i / 2) for i in range(used[0], used[-1] + 1)]
    width = [edge * (2**0.5 - 1) for edge in left]
    axes.bar(left, bins[used[0] : used[-1] + 1], width=width, align="edge", edgecolor="white")
    axes.axvline(content_len(seq_len), color="black", linestyle=":", label=f"a row of {seq_len}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"tokens of a {report.counted[:-1]}")
    axes.set_ylabel(report.counted)
    axes.set_title(f"{report.documents:,} documents, {report.tokens:,} tokens")
    axes.legend(frameon=False)
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
