"""A transformers encoder that stops at the q/k/v projections of one layer and hands them out.

How a forward is stopped is in attention_hook.py. Layers before the tap run plain SDPA. An objective may `watch` more:
earlier layers (they run to their end), or the hidden states that leave the tapped layer.

Leaves out: decoders; architectures that do not call the attention interface and have no adapter (see families.py).

Invariants: the wrapped model stays an ordinary transformers model (called directly, it runs to its end); no tensor
outlives a forward but the taps and their autograd graph; no host sync.
"""

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from minilm.model.encoder.attention_hook import (
    SDPA,
    TAP,
    Collector,
    Discovery,
    only_at,
    run,
    stop_after,
    tapped_attention,
)
from minilm.model.encoder.sentence_head import SentenceHead
from minilm.model.encoder.shape import family_of
from minilm.model.encoder.taps import END_TO_END, EVERY_LAYER, Blocks, Taps
from minilm.model.errors import ModelError
from minilm.model.kernels import dropout, shared_cast


class TappedEncoder(nn.Module):
    """`model` cut at the q/k/v projections of layer `layer` (1 is the layer after the embeddings)."""

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        super().__init__()
        num_layers = model.config.num_hidden_layers
        if not 1 <= layer <= num_layers:
            raise ModelError(
                f"layer {layer} does not exist: {model.config.model_type} has layers 1 to {num_layers}"
            )
        dropout.install(model)
        shared_cast.install(model)
        self.model = model
        self.training = model.training
        self.layer = layer
        self.head: SentenceHead | None = None  # what pooled vectors are made by, if these are watched
        family = family_of(model.config)
        if family.adapt is not None:
            family.adapt(model, tapped_attention)
        model.config._attn_implementation = TAP
        discovery = Discovery(layer)
        with _quietly(model), torch.no_grad():
            run(model, discovery, _probe_ids(model), None)
        model.config._attn_implementation = SDPA
        if len(discovery.modules) < layer:
            raise ModelError(
                f"architecture {model.config.model_type} does not call the attention interface: no tap"
            )
        self._attentions = tuple(discovery.modules)  # a tuple: they are already registered inside `model`
        self.watch()

    def watch(self, *, layers: Sequence[int] = (), fields: Collection[str] = EVERY_LAYER) -> None:
        """Set what an objective reads: the taps of `layers` too (ascending, before the tap), and which `fields`.

        fields: of `Taps`. With "hidden" the tapped layer runs to its end and its output is handed out; with
        "logits" or "pooled" all of the model runs.
        """
        if list(layers) != sorted(set(layers)) or any(not 1 <= layer < self.layer for layer in layers):
            raise ModelError(
                f"layers {list(layers)} cannot be watched; use ascending ones from 1 to {self.layer - 1}"
            )
        self._earlier, self._fields = tuple(layers), frozenset(fields)
        for layer in (*layers, self.layer):
            # A config of its own: layers that are not tapped never meet the tap, so they can be compiled.
            attention = self._attentions[layer - 1]
            config = copy.copy(self.model.config)
            config._attn_implementation = TAP
            setattr(attention, "config", config)  # noqa: B010  (a plain assignment does not type-check)

    @property
    def stops_at_tap(self) -> bool:
        """Whether a forward ends at the tapped projections; otherwise the tapped layer's attention runs too."""
        return self._fields <= EVERY_LAYER

    def blocks(self) -> list[nn.Module]:
        """The layers 1 to `layer` as modules."""
        for stack in self.model.modules():
            if isinstance(stack, nn.ModuleList) and len(stack) >= self.layer:
                found = list(stack)[: self.layer]
                pairs = zip(found, self._attentions, strict=True)
                if all(attention in set(block.modules()) for block, attention in pairs):
                    return found
        raise ModelError(f"architecture {self.model.config.model_type} keeps its layers in no list")

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the layers before the tap, one by one; the tapped layer itself stays as it is.

        Off unless called: on a CPU it changes 5 % either way (docs/benchmarks-log.md). ModelError where inductor
        finds no C++ compiler for a model on a CPU.
        """
        if backend == "inductor" and self.model.device.type == "cpu":
            _need_compiler()
        for block in self.blocks()[:-1]:
            block.compile(backend=backend)

    def compute_in(self, dtype: torch.dtype) -> None:
        """For a frozen encoder that runs under autocast to `dtype`: be a model of that dtype.

        The weights of linear layers and of the tokens' embedding are kept in it, so that no forward casts them and
        they take half the memory, and hidden states between layers are of it. Normalisation, its weights, and the
        position bias on scores (which as bfloat16 would move relations by 2 % of a student's divergence) stay float32.
        """
        for module in self.model.modules():
            if isinstance(module, nn.Linear) or module is self.model.get_input_embeddings():
                module.to(dtype)

        def cast(_block: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, *others = arguments
            return hidden.to(dtype), *others

        self.blocks()[0].register_forward_pre_hook(cast)

    def forward(
        self, input_ids: Tensor, mask: Tensor | Blocks | None = None, positions: Tensor | None = None
    ) -> Taps:
        """input_ids int64 [batch, tokens]; mask bool [batch, tokens], True where a token is valid, None: all.

        With blocks for a mask, input_ids are [1, tokens], the blocks' documents end to end, and so are the taps;
        a bias is of the widest block. positions: int64 [batch, k], where logits are wanted, if these are watched.
        """
        within = None
        if isinstance(mask, Blocks):
            if not self._fields <= END_TO_END:
                raise ModelError("logits are of whole rows: give each document a row")
            within = self._positions(input_ids, mask)
        elif mask is not None and (mask.dtype != torch.bool or mask.shape != input_ids.shape):
            raise ModelError(
                f"mask is {mask.dtype} {list(mask.shape)}; for input_ids {list(input_ids.shape)} it must be"
                " torch.bool of the same shape"
            )
        wanted = [self._attentions[layer - 1] for layer in (*self._earlier, self.layer)]
        collector = Collector(wanted, stop_at_last=self.stops_at_tap)
        logits = pooled = None
        if "pooled" in self._fields:
            if self.head is None:
                raise ModelError("pooled vectors need a sentence head; set `head` of the encoder")
            pooled = self.head(run(self.model, collector, input_ids, mask, within).last_hidden_state, mask)
        elif positions is not None and "logits" in self._fields:
            with only_at(positions, self.model.base_model):
                logits = run(self.model, collector, input_ids, mask).logits
        elif collector.stop_at_last:
            run(self.model, collector, input_ids, mask, within)
        else:
            with stop_after(self.blocks()[-1], collector):
                run(self.model, collector, input_ids, mask, within)
        if len(collector.taps) < len(wanted):
            raise ModelError(
                f"{self.model.config.model_type} ended without reaching the tap of layer {self.layer}"
            )
        *earlier, last = collector.taps
        return last._replace(earlier=tuple(earlier), hidden=collector.hidden, logits=logits, pooled=pooled)

    def _positions(self, input_ids: Tensor, blocks: Blocks) -> Tensor:
        """[1, tokens]: the position of every token in its document, as the model numbers it."""
        config = self.model.config
        family = family_of(config)
        if not family.positions_after_padding:
            numbers = [torch.arange(b.width, device=input_ids.device).repeat(b.rows) for b in blocks]
        else:  # as transformers does
            padding = family.reserved_positions(config.pad_token_id) - 1
            counted = [ids != padding for ids in blocks.split(input_ids, 1)]
            numbers = [(own.cumsum(dim=1) * own + padding).flatten() for own in counted]
        together = torch.cat(numbers)
        return pad(together, (0, input_ids.shape[1] - len(together)))[None]

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that require gradients and that the watched fields depend on.

        Named as in model.state_dict(): all before and at the tap, unless more is watched.
        Read off the autograd graph of a two-token forward, so it is right for every architecture; no gradient
        is computed and no random number drawn.
        """
        with _quietly(self.model), torch.enable_grad():
            ids = _probe_ids(self.model)
            taps = self(ids, None, ids[:, :1] if "logits" in self._fields else None)
        reached: set[int] = set()
        seen: set[Any] = set()
        nodes = [tensor.grad_fn for tensor in taps.tensors(self._fields)]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                reached.add(id(node.variable))
            nodes.extend(parent for parent, _ in node.next_functions)
        return {name: p for name, p in self.model.named_parameters() if id(p) in reached}


def _need_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import, needed here alone
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ModelError(
            "compiled blocks need a C++ compiler and none was found: install g++, set CXX to one, or do not compile"
        ) from None


def _probe_ids(model: PreTrainedModel) -> Tensor:
    return torch.zeros(1, 2, dtype=torch.int64, device=model.device)


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """Eval mode for a moment, so that a probe draws no random number; every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
