"""Embedding tables and bags of their rows: a weight and no float input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin.functional.lookup import Reading, read_rows
from lq_plugin.layers.base import QuantizedLayer
from lq_plugin.layers.registry import register_layer
from lq_plugin.quantizers import WeightQuantizer


@register_layer(nn.Embedding)
class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """Rows of Q(W). Weight `[num_embeddings, embedding_dim]`; a channel is one row, groups run inside a row.

    Rows are looked up first and quantized then, so that a table of any size costs what is read of it, unless what a row
    becomes depends on the others.
    """

    float_class = nn.Embedding
    slots = ("weight", "output")

    def channels(self) -> tuple[int, int]:
        return 0, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        # What there is most often, without the detour by `__getattr__`: a look-up takes a few microseconds.
        held, quantizer = self._parameters.get("weight"), self._modules.get("weight_quantizer")
        weight: Tensor = self.weight if held is None or "weight" in self.__dict__ else held
        if self.max_norm is not None:
            # F.embedding renormalises the table it is given in place: that must be the table itself, not its quantized
            # copy.
            F.embedding(input, weight.detach(), self.padding_idx, self.max_norm, self.norm_type)
        reading = Reading(self.padding_idx, self.scale_grad_by_freq, self.sparse)
        if isinstance(quantizer, WeightQuantizer) and input.numel() and quantizer.takes_rows(reading):
            return self.quantized_output(quantizer.quantize_rows(weight, input, reading))
        if quantizer is not None and self.sparse:
            reading = reading._replace(sparse=False)
            if weight.requires_grad and torch.is_grad_enabled():
                weight = _SparseGradient.apply(weight)
        return self.quantized_output(read_rows(self.quantized_weight(weight), input, reading))


@register_layer(nn.EmbeddingBag)
class QuantizedEmbeddingBag(QuantizedLayer, nn.EmbeddingBag):
    """Sums, means or maxima of rows of Q(W). Weight `[num_embeddings, embedding_dim]`; a channel is one row."""

    float_class = nn.EmbeddingBag
    slots = ("weight", "output")
    added_slots = ("weight", "output")

    def channels(self) -> tuple[int, int]:
        return 0, self.embedding_dim

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        weight, sparse = self.weight, self.sparse
        if self.max_norm is not None:  # of the table itself, see QuantizedEmbedding
            F.embedding(input, weight.detach(), self.padding_idx, self.max_norm, self.norm_type)
        if self.weight_quantizer is not None and sparse:
            sparse = False
            if weight.requires_grad and torch.is_grad_enabled():
                weight = _SparseGradient.apply(weight)
        y = F.embedding_bag(
            input,
            self.quantized_weight(weight),
            offsets,
            None,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
        return self.quantized_output(y)


class _SparseGradient(torch.autograd.Function):
    """The table itself; what comes back of it, of which most rows are 0, becomes a sparse gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Any:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.to_sparse(1)
