"""An encoder with fewer rows in its table of tokens, and in its head's."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from minilm.model.encoder.shape import family_of
from minilm.model.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def cut_vocabulary(model: "PreTrainedModel", kept: Sequence[int]) -> "PreTrainedModel":
    """A copy of `model` whose token i is the token kept[i] of the old one; all else has the same bits.

    Ids of special tokens in the config follow. ModelError where positions begin behind the padding id, and it moves.
    """
    config, size = copy.deepcopy(model.config), model.config.vocab_size
    new = {old: number for number, old in enumerate(kept)}
    pad = config.pad_token_id
    family = family_of(config)
    if family.positions_after_padding and new.get(pad) != pad:
        raise ModelError(
            f"positions of a {config.model_type} begin behind its padding id, {pad}, which would be {new.get(pad)};"
            " keep the tokens before it"
        )
    config.vocab_size = len(kept)
    for key, value in special_tokens(config).items():
        setattr(config, key, new.get(value, value))
    with torch.random.fork_rng(devices=[]):
        cut = type(model)._from_config(config, attn_implementation=family.attention, dtype=torch.float32)
    rows, weights = torch.tensor(list(kept)), cut.state_dict()
    for name, old in model.state_dict().items():
        changes = old.dim() and old.shape[0] == size and weights[name].shape[0] == len(kept)
        weights[name].copy_(old[rows] if changes else old)
    return cut.eval()


def special_tokens(config: object) -> Mapping[str, int]:
    """The ids of tokens that a config names."""
    values = config.to_dict()  # type: ignore[attr-defined]
    return {key: value for key, value in values.items() if key.endswith("_token_id") and type(value) is int}
