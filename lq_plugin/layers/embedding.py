"""Embedding tables: a weight and no float input."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin.layers.base import QuantizedLayer
from lq_plugin.layers.registry import register_layer


@register_layer(nn.Embedding)
class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """Rows of Q(W). Weight `[num_embeddings, embedding_dim]`; a channel is one row, groups run inside a row."""

    float_class = nn.Embedding
    slots = ("weight", "output")

    def channels(self) -> tuple[int, int]:
        return 0, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if self.max_norm is not None:
            # F.embedding renormalises the table it is given in place: that must be the table itself, not its quantized copy.
            F.embedding(input, weight.detach(), self.padding_idx, self.max_norm, self.norm_type)
        rows = F.embedding(input, self.quantize_weight(weight), self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
        return self.quantized_output(rows)
