"""An encoder for another vocabulary: with fewer rows in its table of tokens and its head's, or with other ones."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from minilm.model.encoder.shape import family_of
from minilm.model.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def cut_vocabulary(model: "PreTrainedModel", kept: Sequence[int]) -> "PreTrainedModel":
    """A copy of `model` whose token i is the token kept[i] of the old one; all else has the same bits.

    Ids of special tokens in the config follow. ModelError where positions begin behind the padding id, and it moves.
    """
    config = model.config
    new = {old: number for number, old in enumerate(kept)}
    pad = config.pad_token_id
    if family_of(config).positions_after_padding and new.get(pad) != pad:
        raise ModelError(
            f"positions of a {config.model_type} begin behind its padding id, {pad}, which would be {new.get(pad)};"
            " keep the tokens before it"
        )
    special = {key: new.get(value, value) for key, value in special_tokens(config).items()}
    return with_vocabulary(model, [[old] for old in kept], special).eval()


@torch.no_grad()
def with_vocabulary(
    model: "PreTrainedModel", rows: Sequence[Sequence[int]], special: Mapping[str, int]
) -> "PreTrainedModel":
    """A copy of `model` whose token i has the mean of the old tokens rows[i]; all else has the same bits.

    special: ids of special tokens by the config's keys. A table of positions that begins behind the padding id begins
    behind the new one. float32, in train mode.
    """
    config, family = copy.deepcopy(model.config), family_of(model.config)
    config.vocab_size = len(rows)
    for key, value in special.items():
        setattr(config, key, value)
    first, new_first = (family.reserved_positions(c.pad_token_id) for c in (model.config, config))
    config.max_position_embeddings += new_first - first
    with torch.random.fork_rng():
        made = _empty(model, config)
    flat, lengths = torch.tensor([old for few in rows for old in few]), torch.tensor([*map(len, rows)])
    names, weights = _of_vocabulary(model), made.state_dict()
    for name, table in model.state_dict().items():
        if name in names:
            weights[name].copy_(torch.segment_reduce(table[flat], "mean", lengths=lengths, axis=0))
        elif new_first != first and name.endswith("position_embeddings.weight"):
            weights[name].zero_()[new_first:].copy_(table[first:])
        elif (
            weights[name].shape == table.shape
        ):  # ids of positions, a buffer, are as many as their table has rows
            weights[name].copy_(table)
    return made


def special_tokens(config: object) -> Mapping[str, int]:
    """The ids of tokens that a config names."""
    values = config.to_dict()  # type: ignore[attr-defined]
    return {key: value for key, value in values.items() if key.endswith("_token_id") and type(value) is int}


def _empty(model: "PreTrainedModel", config: "PreTrainedConfig") -> "PreTrainedModel":
    attention = family_of(config).attention
    return type(model)._from_config(config, attn_implementation=attention, dtype=torch.float32)


def _of_vocabulary(model: "PreTrainedModel") -> set[str]:
    """Names of the weights with a row a token: those that are longer where there is one token more."""
    config = copy.deepcopy(model.config)
    config.vocab_size += 1
    with torch.device("meta"):
        longer = _empty(model, config).state_dict()
    return {name for name, weight in model.state_dict().items() if longer[name].shape != weight.shape}
