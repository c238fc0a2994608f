"""Multi-head attention: the projections of query, key and value, and of the output."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin.layers.base import QuantizedLayer
from lq_plugin.layers.compound.base import (
    CompoundWeight,
    InnerWeight,
    InputWeight,
    QuantizedCompound,
    register_compound,
)
from lq_plugin.layers.integer import integer_forward


@register_compound(nn.MultiheadAttention)
class QuantizedAttention(QuantizedCompound):
    """The float attention on Q(query), Q(key), Q(value), with quantized projections.

    Query, key and value `[L, N, E]`, `[N, L, E]` or `[L, E]`. Projections are one weight `in_proj_weight` `[3 E, E]`,
    whose input quantizer serves all three (once where they are one tensor); or, where `kdim` or `vdim` differ,
    `q_proj_weight`, `k_proj_weight` and `v_proj_weight`, each with its own. The weight of `out_proj` `[E, E]` is a
    layer under that name.
    """

    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    out_proj: nn.Linear

    input_names = ("query", "key", "value")
    remark = "attention scores and probabilities and the biases stay float"

    @staticmethod
    def weights(module: nn.Module) -> list[CompoundWeight]:
        same = cast(Any, module)._qkv_same_embed_dim
        inputs = ["in_proj_weight"] if same else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        out = InnerWeight(
            module, "out_proj", "out_proj.weight", remark="its input, the attention's output, stays float"
        )
        return [*(InputWeight(module, name) for name in inputs), out]

    @staticmethod
    def key_of(module: nn.Module, name: str) -> str:
        return "in_proj_weight" if cast(Any, module)._qkv_same_embed_dim else f"{name[0]}_proj_weight"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        part = self._parts().get("in_proj_weight")
        # A subclass may mean something else by its arguments.
        if part is not None and part._integer_state is not None and type(self).float_class is nn.MultiheadAttention:
            y = self._integer_forward(part, *args, **kwargs)
            if y is not None:
                return y, None
        return super().forward(*args, **kwargs)

    def _integer_forward(
        self,
        part: QuantizedLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Tensor | None:
        """Self-attention whose projection is summed with integers; None: torch's own forward is to compute it."""
        module, state = cast(Any, self), cast(Any, part._integer_state)
        plain = query is key and key is value and query.ndim == 3 and not need_weights and not query.is_nested
        if not plain or module.bias_k is not None or module.add_zero_attn or (is_causal and attn_mask is None):
            state.refusals["it is not self-attention of a batch whose weights nobody reads"] = None
            return None
        batch, length = query.shape[:2] if self.batch_first else (query.shape[1], query.shape[0])
        if not _are_masks(key_padding_mask, [(batch, length)]) or not _are_masks(
            attn_mask, [(length, length), (batch * self.num_heads, length, length)]
        ):
            return None  # torch says what is wrong with them
        projected = integer_forward(part, query)
        if projected is None:
            return None
        # [N, L, 3 E] or [L, N, 3 E] to three of [N, heads, L, E / heads], views.
        heads = projected.unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = heads.permute(2, 0, 3, 1, 4) if self.batch_first else heads.permute(2, 1, 3, 0, 4)
        # With padding, what is causal is in the joined mask.
        is_causal = is_causal and key_padding_mask is None
        mask = None if is_causal else _joined(key_padding_mask, attn_mask, q)
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if module.training else 0.0, is_causal)
        y = (y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1, 3)).flatten(2)
        out = self._parts().get("out_proj")
        return F.linear(y, self.out_proj.weight if out is None else out.quantized_weight(), self.out_proj.bias)


def _are_masks(mask: Tensor | None, shapes: list[tuple[int, ...]]) -> bool:
    return mask is None or (tuple(mask.shape) in shapes and (mask.dtype == torch.bool or mask.is_floating_point()))


def _joined(key_padding_mask: Tensor | None, attn_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Masks as torch's attention takes them, as one that is added to scores `[N, heads, L, L]`."""
    batch, heads, length, _ = q.shape
    mask = _added(attn_mask, q)
    if mask is not None:
        mask = mask if mask.ndim == 2 else mask.view(batch, heads, length, length)
    padding = _added(key_padding_mask, q)
    if padding is None:
        return mask
    padding = padding.view(batch, 1, 1, length)
    return padding if mask is None else mask + padding


def _added(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask that is added: -inf where a boolean one is True."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf)
