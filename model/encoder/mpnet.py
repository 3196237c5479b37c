"""An adapter for MPNet, whose attention does not call transformers' attention interface.

MPNet adds one learned relative position bias, shared by all layers, to the scaled scores. The adapter
replaces the forward of each attention module by one that calls an attention function with q, k, v and that
bias, on SDPA instead of whole maps. Weights, names and results stay MPNet's. Leaves out `output_attentions`.
"""

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minilm.model.encoder.taps import active_blocks

if TYPE_CHECKING:  # families.py, which imports this file, loads no modelling code
    from transformers import PreTrainedModel


def install(model: "PreTrainedModel", attention: Callable[..., Any]) -> None:
    """Make every attention module of this MPNet call `attention(module, q, k, v, mask, bias=…, …)`. Idempotent."""
    encoder: Any = model.base_model.encoder

    def position_bias_of_one_row(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[1, heads, tokens, tokens]; transformers makes a copy for each row: 400 MB at 32 rows of 512. Where documents
        lie end to end, that of the widest."""
        blocks = active_blocks()
        tokens = hidden_states.shape[1] if blocks is None else blocks.widest
        return type(self).compute_position_bias(self, hidden_states[:1, :tokens], *args, **kwargs)

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Any = None,
        **_: Any,
    ) -> tuple[Tensor]:
        heads = self.num_attention_heads
        q, k, v = (
            p(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        bias = position_bias.to(q.dtype)
        if attention_mask is not None:
            scores_mask = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
        else:
            scores_mask = bias
        dropout = self.dropout.p if self.training else 0.0
        output, _weights = attention(self, q, k, v, scores_mask, bias=bias, dropout=dropout, is_causal=False)
        return (self.o(output.flatten(-2)),)

    encoder.compute_position_bias = types.MethodType(position_bias_of_one_row, encoder)
    for layer in encoder.layer:
        module: nn.Module = layer.attention.attn
        module.forward = types.MethodType(forward, module)
