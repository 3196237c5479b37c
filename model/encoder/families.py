"""Encoder families: everything that is known of an architecture by its name, one row each.

To add one, write its row: what its config calls things, how its weight matrices are divided, and an adapter if its
attention does not call transformers' attention interface (mpnet.py is an example). `tests/test_model_encoder.py` and
`tests/test_model_initialize.py` run over every row.

Leaves out: modelling code, which takes seconds to import and is not needed to check a recipe.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minilm.model.encoder import mpnet

PLAIN, HEADS, ROTARY = "plain", "heads", "rotary"  # see `Blocks`


@dataclass(frozen=True)
class Blocks:
    """What the rows (outputs) and columns (inputs) of a weight matrix are, as consecutive blocks of equal kinds.

    PLAIN: one dimension after another. HEADS: heads x head size. ROTARY: the same, where dimensions i and
    i + head size / 2 of a head are rotated as a pair. Several blocks are several matrices kept as one, such as the
    gate and the up projection of a gated feed-forward part.
    """

    rows: tuple[str, ...] = (PLAIN,)
    columns: tuple[str, ...] = (PLAIN,)


def _attention(
    query: str, key: str, value: str, output: str, *, query_key: str = HEADS
) -> Mapping[str, Blocks]:
    return {
        query: Blocks(rows=(query_key,)),
        key: Blocks(rows=(query_key,)),
        value: Blocks(rows=(HEADS,)),
        output: Blocks(columns=(HEADS,)),
    }


_BERT_ATTENTION = _attention(
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"
)
_LLAMA_ATTENTION = _attention(
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", query_key=ROTARY
)


@dataclass(frozen=True)
class Family:
    """One architecture.

    ffn, dropout: the config's names of the feed-forward size and of the dropout rates.
    ffn_ratio: a student's feed-forward size over its hidden size, unless the recipe gives one; None for the teacher's.
    positions_after_padding: position ids begin at pad_token_id + 1 (RoBERTa and its kin).
    padding: the padding id that positions begin behind where that is not pad_token_id but a number in the code (MPNet).
    position_bias: the attention scores have a learned bias of their own.
    attention: the implementation that transformers can build it with; a tapped encoder makes SDPA of either.
    adapt: `adapt(model, attention)` makes every layer call `attention`; None: it calls the attention interface itself.
    weights: how matrices are divided, by the end of the module's name; PLAIN where none fits.
    """

    ffn: str = "intermediate_size"
    dropout: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    ffn_ratio: float | None = 4.0
    positions_after_padding: bool = False
    padding: int | None = None
    position_bias: bool = False
    attention: str = "sdpa"
    adapt: Callable[[Any, Callable[..., Any]], None] | None = None
    weights: Mapping[str, Blocks] = field(default_factory=lambda: _BERT_ATTENTION)

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated in pairs of dimensions, so that a head has an even size."""
        return any(ROTARY in blocks.rows for blocks in self.weights.values())

    def reserved_positions(self, pad_token_id: int | None) -> int:
        """How many positions of the table no token of a row ever has."""
        if not self.positions_after_padding:
            return 0
        padding = pad_token_id if self.padding is None else self.padding
        assert padding is not None, "shape.load_config refuses such a config"
        return padding + 1

    def blocks(self, module: str) -> Blocks:
        """How the weight and bias of this module are divided."""
        return next((blocks for end, blocks in self.weights.items() if module.endswith(f".{end}")), Blocks())


_ROBERTA = Family(positions_after_padding=True)
FAMILIES: dict[str, Family] = {
    "bert": Family(),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": Family(),
    "distilbert": Family(
        ffn="hidden_dim",
        dropout=("dropout", "attention_dropout"),
        weights=_attention("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    ),
    "modernbert": Family(
        dropout=("embedding_dropout", "mlp_dropout", "attention_dropout"),
        ffn_ratio=None,
        weights={
            "attn.Wqkv": Blocks(rows=(ROTARY, ROTARY, HEADS)),
            "attn.Wo": Blocks(columns=(HEADS,)),
            "mlp.Wi": Blocks(rows=(PLAIN, PLAIN)),
        },
    ),
    "eurobert": Family(dropout=("attention_dropout",), ffn_ratio=None, weights=_LLAMA_ATTENTION),
    "nomic_bert": Family(ffn_ratio=None, weights=_LLAMA_ATTENTION),
    "mpnet": Family(
        positions_after_padding=True,
        padding=1,
        position_bias=True,
        attention="eager",
        adapt=mpnet.install,
        weights=_attention("attn.q", "attn.k", "attn.v", "attn.o"),
    ),
}
