"""A tokenizer with fewer tokens, chosen by how often a text uses them: WordPiece, BPE and Unigram.

What always stays: special and other added tokens, bytes, single characters, and whatever a kept token is merged from
(BPE). A text without a dropped token is cut as before; what is dropped falls apart into kept pieces, so that a text
without unknown tokens has none afterwards. Where a vocabulary lacks the token of a single character, every token with
that character stays instead.
Works on the definition that a tokenizer.json holds. Left out: reading texts, and the model that goes with it.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from minilm.data.errors import DataError

KINDS = ("WordPiece", "BPE", "Unigram")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Smaller(NamedTuple):
    """definition: of the new tokenizer. kept: the old id of each new one."""

    definition: dict[str, Any]
    kept: list[int]


def smaller_vocabulary(
    definition: Mapping[str, Any],
    counts: Mapping[int, int],
    *,
    keep: int | None = None,
    min_count: int | None = None,
    always: Collection[int] = (),
) -> Smaller:
    """The tokenizer with about the `keep` commonest tokens (never more), or with those that occur `min_count` times.

    counts: by id, in the text. always: further ids that stay. DataError for a kind of tokenizer that can't be cut,
    where more than `keep` have to stay, and where nothing would be dropped.
    """
    model = definition["model"]
    if model["type"] not in KINDS:
        raise DataError(
            f"a vocabulary of kind {model['type']} can't be cut; allowed are tokenizers of kind {', '.join(KINDS)}"
        )
    ids = _ids(model)
    added = {token["content"]: token["id"] for token in definition.get("added_tokens") or ()}
    everything = {**ids, **added}
    known = set(everything.values())
    parts = _merged_from(model, ids)
    kept: set[int] = set()
    around = _put_around(definition.get("post_processor"))
    for token in (*added.values(), *_base(model, ids), *around, *always):
        if token in known:
            kept |= _with_parts(token, parts, kept)
    if len(kept) == len(known):
        raise DataError(
            f"nothing can be dropped: all {len(known)} tokens have to stay (special tokens, single characters, bytes, "
            "and what holds a character without a token of its own); use the model as it is"
        )
    if keep is not None and keep < len(kept):
        raise DataError(
            f"given {keep} tokens to keep; {len(kept)} have to stay (special tokens, single characters and bytes), so "
            f"give {len(kept)} or more"
        )
    ranked = sorted(known, key=lambda token: (-counts.get(token, 0), token))
    for token in ranked:
        if min_count is not None and counts.get(token, 0) < min_count:
            break
        more = _with_parts(token, parts, kept)
        if keep is None or len(kept) + len(more) <= keep:
            kept |= more
    if len(kept) == len(known):
        way = "a larger count" if keep is None else "a smaller number to keep"
        raise DataError(f"nothing is dropped: all {len(known)} tokens would stay; give {way}")
    order = sorted(kept & set(ids.values())) + sorted(kept - set(ids.values()))
    return Smaller(_rebuilt(definition, {old: new for new, old in enumerate(order)}), order)


def _ids(model: Mapping[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _pairs(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model.get("merges") or ():
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _product(model: Mapping[str, Any], left: str, right: str) -> str:
    prefix = model.get("continuing_subword_prefix") or ""
    return left + right.removeprefix(prefix)


def _merged_from(model: Mapping[str, Any], ids: Mapping[str, int]) -> dict[int, list[int]]:
    """The parts of each token that BPE merges, of all its merges: which of them makes it depends on the text."""
    found: dict[int, list[int]] = {}
    for left, right in _pairs(model):
        product = ids.get(_product(model, left, right))
        if product is not None and left in ids and right in ids:
            found.setdefault(product, []).extend((ids[left], ids[right]))
    return found


def _with_parts(token: int, parts: Mapping[int, Sequence[int]], kept: Collection[int]) -> set[int]:
    """The token and all that it is merged from, but for what is kept already."""
    found: set[int] = set()
    todo = [token]
    while todo:
        one = todo.pop()
        if one not in kept and one not in found:
            found.add(one)
            todo += parts.get(one, ())
    return found


def _base(model: Mapping[str, Any], ids: Mapping[str, int]) -> Iterator[int]:
    """Ids of bytes, single characters, the unknown token, and of what holds a character without a token of its own."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        yield model["unk_id"]
    for piece, number in ids.items():
        if piece == model.get("unk_token"):
            yield number
            continue
        bare = piece.removesuffix(suffix) if suffix else piece
        inner = bool(prefix) and bare.startswith(prefix) and len(bare) > len(prefix)
        bare = bare[len(prefix) :] if inner else bare
        single = len(bare) == 1 or _BYTE.fullmatch(bare)
        if single or (model["type"] != "BPE" and not _spelled(bare, inner, prefix, ids)):
            yield number


def _spelled(bare: str, inner: bool, prefix: str, ids: Mapping[str, int]) -> bool:
    """Whether each character of a piece has a token of its own where it stands: first in a word, or further in."""
    return all((f"{prefix}{sign}" if inner or place else sign) in ids for place, sign in enumerate(bare))


def _rebuilt(definition: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """The definition with ids as `new` (new id by old) has them, and nothing of what it lacks."""
    model = dict(definition["model"])
    if model["type"] == "Unigram":
        rows = sorted((new[number], row) for number, row in enumerate(model["vocab"]) if number in new)
        model["vocab"] = [row for _, row in rows]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        vocabulary = sorted((new[number], piece) for piece, number in model["vocab"].items() if number in new)
        model["vocab"] = {piece: number for number, piece in vocabulary}
    if model["type"] == "BPE":
        known = model["vocab"]
        model["merges"] = [
            [left, right]
            for left, right in _pairs(model)
            if left in known and right in known and _product(model, left, right) in known
        ]
    padding = definition.get("padding")
    return {
        **definition,
        "model": model,
        "added_tokens": sorted(
            ({**token, "id": new[token["id"]]} for token in definition.get("added_tokens") or ()),
            key=lambda token: token["id"],
        ),
        "post_processor": _renumbered(definition.get("post_processor"), new),
        "padding": padding and {**padding, "pad_id": new.get(padding["pad_id"], padding["pad_id"])},
    }


def _put_around(processor: Any) -> Iterator[int]:
    """Ids of the special tokens that a post-processor puts around a text, which need not be among the added ones."""
    if isinstance(processor, dict):
        for one in processor.get("processors", ()):
            yield from _put_around(one)
        for token in processor.get("special_tokens", {}).values():
            yield from token["ids"]
        yield from (processor[end][1] for end in ("sep", "cls") if end in processor)


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with the new ids of the special tokens that it puts around."""
    if not isinstance(processor, dict):
        return processor
    if processor["type"] == "Sequence":
        return {**processor, "processors": [_renumbered(one, new) for one in processor["processors"]]}
    if processor["type"] == "TemplateProcessing":
        tokens = {
            name: {**token, "ids": [new[number] for number in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
        return {**processor, "special_tokens": tokens}
    changed = {
        end: [processor[end][0], new[processor[end][1]]] for end in ("sep", "cls") if end in processor
    }  # Bert's and Roberta's
    return {**processor, **changed}
