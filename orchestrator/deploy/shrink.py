"""A model's folder → a folder with a smaller vocabulary, chosen from a text: an ordinary teacher for everything else.

The old model and the new one compute the same for every text whose tokens have all stayed. `shrink.json` says what was
dropped, and what that does to text that had no say in the choice: every `HELD_OUT_EVERY`-th document.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from minilm.data.builder.enough import no_text
from minilm.data.builder.tokenization import pieces
from minilm.data.errors import DataError
from minilm.data.sources import text
from minilm.data.sources.accounts import Accounts, books_of, check_allowed, counted
from minilm.data.sources.plugin import Plan
from minilm.data.tokenizer import load_tokenizer
from minilm.data.vocabulary import smaller_vocabulary
from minilm.model.encoder.build import count_parameters, load_encoder, quiet_transformers
from minilm.model.encoder.other_vocabulary import cut_vocabulary, special_tokens
from minilm.model.encoder.shape import family_of, load_config, shape_of
from minilm.model.errors import ModelError
from minilm.model.export import weights_digest, whole_folder
from minilm.orchestrator.deploy.beside import copy_beside
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.system.files import check_place, write_json

HELD_OUT_EVERY = 20
BATCH = 256  # texts that are tokenized at a time
BATCH_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class Shrunk:
    """tokens, parameters: (before, after). changed: the share of the held-out text's tokens that were dropped; growth:
    how many times as many tokens it has now. unknown: its unknown tokens, (before, after)."""

    model: str
    weights: str
    tokens: tuple[int, int]
    parameters: tuple[int, int]
    documents: int
    held_out_documents: int
    changed: float
    growth: float
    unknown: tuple[int, int]

    def text(self) -> str:
        (old, new), (before, after) = self.tokens, self.parameters
        others = (
            f"in {self.held_out_documents:,} others {self.changed:.2%} of the tokens were dropped, their text has "
            f"{self.growth:.3f} times as many now, and {self.unknown[1]:,} unknown ones (before: {self.unknown[0]:,})"
        )
        if not self.held_out_documents:
            others = "too few to keep some aside: what it does to other text was not measured"
        return (
            f"{old:,} tokens → {new:,}; {before / 1e6:,.1f} M parameters → {after / 1e6:,.1f} M "
            f"({after / before:.0%})\nchosen from {counted(self.documents, 'document')}; {others}"
        )


def shrink(
    name: str,
    folder: Path,
    out: Path,
    inputs: Sequence[str | Path],
    options: Mapping[str, Any] | None = None,
    *,
    keep: int | None = None,
    min_count: int | None = None,
    allow_skipped: float | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> Shrunk:
    """Write the model in `folder` with a smaller vocabulary to the new folder `out`.

    inputs, options, allow_skipped: text, as a data set is built from, and `warn` is told what that would warn of. keep,
    min_count: see `smaller_vocabulary`. UserError, DataError or ModelError where any of it can't be used; `out` is
    absent then.
    """
    if out.exists():
        raise UserError(f"{out} exists; give a folder that does not exist yet, or remove it first")
    check_place(out)
    check_allowed(allow_skipped)
    config = load_config(folder)
    tokenizer = load_tokenizer(str(folder))
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    old = Tokenizer.from_str(json.dumps(definition | {"truncation": None, "padding": None}))
    if old.get_vocab_size() > config.vocab_size:
        raise UserError(
            f"{name}: its tokenizer has {old.get_vocab_size()} tokens and the model knows {config.vocab_size}; give "
            "the folder of a model with its own tokenizer"
        )
    plan = text.plan(inputs, None, dict(options or {}))
    counts: Counter[int] = Counter()
    accounts, held_out = Accounts(), list[str]()
    for batch in _batches(plan, accounts, held_out):
        for encoded in old.encode_batch_fast(batch, add_special_tokens=False):
            counts.update(encoded.ids)
    books = books_of(accounts.named(plan.files))
    books.refuse(allow_skipped)
    if not books.documents:
        raise DataError(no_text(plan.files))
    for line in books.warnings():
        warn(line)
    always = set(special_tokens(config).values())
    if family_of(config).positions_after_padding:  # the padding's id stays what it is
        always |= set(range(config.pad_token_id + 1))
    smaller = smaller_vocabulary(definition, counts, keep=keep, min_count=min_count, always=always)
    model = _load(folder)
    cut = cut_vocabulary(model, smaller.kept)
    new = Tokenizer.from_str(json.dumps(smaller.definition | {"truncation": None, "padding": None}))
    report = Shrunk(
        model=name,
        weights=weights_digest(folder),
        tokens=(old.get_vocab_size(), len(smaller.kept)),
        parameters=(count_parameters(model), count_parameters(cut)),
        documents=books.documents - len(held_out),
        held_out_documents=len(held_out),
        **_compare(old, new, set(smaller.kept), held_out, tokenizer.unk_token),
    )
    with whole_folder(out.absolute()) as part:
        copy_beside(folder, part, weights=False, tokenizer=False)
        with quiet_transformers():
            cut.save_pretrained(part)
        _write_tokenizer(tokenizer, smaller.definition, part)
        write_json(part / "shrink.json", asdict(report))
        with (part / "README.md").open("a", encoding="utf-8") as card:
            lines = "\n".join(f"    {line}" for line in report.text().splitlines())
            card.write(f"\n\n## A smaller vocabulary\n\n{lines}\n")
    return report


def _batches(plan: Plan, accounts: Accounts, held_out: list[str]) -> Iterator[list[str]]:
    """The text of all but the documents that are added to `held_out` instead, in pieces; what becomes of each record
    goes into `accounts`, as a build keeps them."""
    batch: list[str] = []
    size = number = 0
    file, has_text = -1, False  # of the document under way

    def close() -> None:
        if file >= 0:
            accounts.of(file)["documents" if has_text else "empty"] += 1

    for piece in pieces((item for unit in plan.units for item in text.read(plan.spec, unit)), accounts):
        if not piece.continues:
            close()
            file, has_text = piece.file, False
        content = str(piece.content)
        if not content.strip():
            continue
        if not has_text:
            has_text, number = True, number + 1
            held_out += [""] if number % HELD_OUT_EVERY == 0 else []
        if number % HELD_OUT_EVERY == 0:
            held_out[-1] += content
            continue
        batch.append(content)
        size += len(content)
        if len(batch) == BATCH or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    close()
    yield batch


def _compare(
    old: Tokenizer, new: Tokenizer, kept: set[int], texts: Sequence[str], unknown: str | None
) -> dict[str, Any]:
    """What the cut does to texts: `changed`, `growth` and `unknown` of `Shrunk`."""
    before, after, dropped, unknowns = 0, 0, 0, [0, 0]
    names = [tokenizer.token_to_id(unknown or "") for tokenizer in (old, new)]
    for start in range(0, len(texts), BATCH):
        some = list(texts[start : start + BATCH])
        for one, other in zip(
            old.encode_batch_fast(some, add_special_tokens=False),
            new.encode_batch_fast(some, add_special_tokens=False),
            strict=True,
        ):
            before, after = before + len(one.ids), after + len(other.ids)
            dropped += sum(token not in kept for token in one.ids)
            unknowns = [
                n + sum(token == name for token in ids)
                for n, ids, name in zip(unknowns, (one.ids, other.ids), names, strict=True)
            ]
    return {
        "changed": dropped / max(before, 1),
        "growth": after / before if before else 1.0,
        "unknown": tuple(unknowns),
    }


def _load(folder: Path) -> Any:
    """The model with the head that it was saved with, if any."""
    has_head = shape_of(load_config(folder)).has_head
    if has_head is None:  # a model for pre-training may have it
        try:
            return load_encoder(folder, head=True).model
        except ModelError:
            has_head = False
    return load_encoder(folder, head=has_head).model


def _write_tokenizer(tokenizer: Any, definition: dict[str, Any], part: Path) -> None:
    """Save `tokenizer` with another definition, so that AutoTokenizer loads that. DataError where it does not."""
    tokenizer.save_pretrained(part)
    for name in ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json"):
        (part / name).unlink(missing_ok=True)
    (part / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
    file = part / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in definition["added_tokens"]}
    if "added_tokens_decoder" in values:
        entries = {ids[entry["content"]]: entry for entry in values["added_tokens_decoder"].values()}
        values["added_tokens_decoder"] = {str(number): entries[number] for number in sorted(entries)}
    expected = Tokenizer.from_str(json.dumps(definition)).get_vocab()
    for name in (values.get("tokenizer_class"), "PreTrainedTokenizerFast"):
        values["tokenizer_class"] = name
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if load_tokenizer(str(part)).get_vocab() == expected:
            return
    raise DataError(
        f"a {type(tokenizer).__name__} can't be saved with a smaller vocabulary; give another teacher"
    )
