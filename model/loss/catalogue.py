"""The objectives that a recipe can name, as plain values for `Objective.named`. Imports nothing: the recipe's schema
is made from this table, and reading a recipe must stay quick.

    minilm            attention Q-K and value relation V-V of the last layers (MiniLM, 2002.10957, eq. 6-10)
    minilmv2          Q-Q, K-K, V-V on re-split relation heads (MiniLMv2, 2012.15828, section 3.1)
    attention-only    minilm without the value relation (MiniLM, table 5)
    value-mse         values by squared error, not their relation, through a projection (MiniLM, table 6)
    layer-to-layer    minilm's terms, the mean over the student's layers, mapped uniformly (MiniLM, table 7)
    soft-label-mlm    the teacher's predictions for masked tokens, no relation (the baseline of MiniLM, table 3)
    embedding         the pooled vectors of both, student trained to its end (LEAF, 2509.12539)
    hidden-relation   the relation of the last hidden states instead of the values' (MiniLM, section 3.2)

`term`: a key of `objective.TERMS`, "relation" unless given; the other keys are that term's fields.
"""

from typing import Any

RELATION_FIELDS = ("q", "k", "v", "hidden")  # the fields of `Taps` that a relation can be made of

_ATTENTION = {"name": "attention", "x": "q", "y": "k"}
_VALUE = {"name": "value", "x": "v", "y": "v"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "minilm": {"relations": (_ATTENTION, _VALUE)},
    "minilmv2": {
        "relations": ({"name": "query", "x": "q", "y": "q"}, {"name": "key", "x": "k", "y": "k"}, _VALUE)
    },
    "attention-only": {"relations": (_ATTENTION,)},
    "value-mse": {"relations": (_ATTENTION, {"term": "squared_error", "name": "value", "field": "v"})},
    "layer-to-layer": {"relations": (_ATTENTION, _VALUE), "layer_to_layer": True},
    "soft-label-mlm": {"relations": ({"term": "soft_labels", "name": "soft_labels"},)},
    "embedding": {"relations": ({"term": "cosine_distance", "name": "cosine_distance"},)},
    "hidden-relation": {"relations": (_ATTENTION, {"name": "hidden", "x": "hidden", "y": "hidden"})},
}
