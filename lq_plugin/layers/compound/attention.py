"""Multi-head attention: the projections of query, key and value, and of the output, and the two products between."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin.errors import QuantizationError
from lq_plugin.layers.base import QuantizedLayer
from lq_plugin.layers.compound.attention_products import AttentionQuantizers, are_masks, attend, joined
from lq_plugin.layers.compound.base import (
    CompoundWeight,
    InnerWeight,
    InputWeight,
    QuantizedCompound,
    StateWeight,
    register_compound,
)
from lq_plugin.layers.integer import integer_forward


@register_compound(nn.MultiheadAttention)
class QuantizedAttention(QuantizedCompound):
    """The attention on Q(query), Q(key), Q(value), with quantized projections, and Q(y) before `out_proj`.

    Query, key and value `[L, N, E]`, `[N, L, E]` or `[L, E]`. Projections are one weight `in_proj_weight` `[3 E, E]`,
    whose input quantizer serves all three (once where they are one tensor); or, where `kdim` or `vdim` differ,
    `q_proj_weight`, `k_proj_weight` and `v_proj_weight`, each with its own. The weight of `out_proj` `[E, E]` is a
    layer under that name, and its input the output of the attention. A plan may name the products: `matmul_0` of query
    and key, `matmul_1` of probabilities and value, and `softmax_0`, whose operand are the scores before masks.
    """

    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    out_proj: nn.Linear

    input_names = ("query", "key", "value")
    remark = "biases stay float, and so do the scores, the probabilities and their products unless a rule names them"

    @staticmethod
    def weights(module: nn.Module) -> list[CompoundWeight]:
        same = cast(Any, module)._qkv_same_embed_dim
        inputs = ["in_proj_weight"] if same else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        projections: list[CompoundWeight] = [InputWeight(module, name) for name in inputs]
        projections[0].matrices = 3 if same else 1
        if _is_known(module):
            return [*projections, StateWeight(module, "out_proj", "out_proj.weight")]
        remark = "its input, the attention's output, stays float in a forward that is not torch's"
        return [*projections, InnerWeight(module, "out_proj", "out_proj.weight", remark=remark)]

    @staticmethod
    def key_of(module: nn.Module, name: str) -> str:
        return "in_proj_weight" if cast(Any, module)._qkv_same_embed_dim else f"{name[0]}_proj_weight"

    @staticmethod
    def casts_operands(module: nn.Module) -> bool:
        return _is_known(module)

    @staticmethod
    def inner_operations(module: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
        if not _is_known(module):
            return {}
        return {"matmul_0": ("matmul", (0, 1)), "softmax_0": ("softmax", (0,)), "matmul_1": ("matmul", (0, 1))}

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
        if not are_masks(key_padding_mask, [(batch, length)]) or not are_masks(
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
        mask = None if is_causal else joined(key_padding_mask, attn_mask, q)
        y, _ = attend(q, k, v, mask, self._dropout(), is_causal, False, self._quantizers())
        y = (y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1, 3)).flatten(2)
        out = self._parts().get("out_proj")
        weight = self.out_proj.weight if out is None else out.quantized_weight()
        return F.linear(self.reader("out_proj")(y), weight, self.out_proj.bias)

    def run_inside(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:
            raise QuantizationError(
                "attention of nested tensors is one kernel of torch, in which nothing can be quantized: pass padded "
                "tensors and key_padding_mask, or leave the input of out_proj float"
            )
        if is_causal and attn_mask is None:
            self.run(query, key, value, is_causal=True)  # torch says what is missing
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x.unsqueeze(int(not self.batch_first)) for x in (query, key, value))
            key_padding_mask = key_padding_mask if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = self._heads(query, key, value)
        batch, length, source = q.shape[0], q.shape[2], k.shape[2]
        if not are_masks(key_padding_mask, [(batch, source)]) or not are_masks(
            attn_mask, [(length, source), (batch * self.num_heads, length, source)]
        ):
            self.run(query, key, value, key_padding_mask, need_weights, attn_mask)  # torch says what is wrong with them
            shapes = [None if mask is None else tuple(mask.shape) for mask in (key_padding_mask, attn_mask)]
            raise QuantizationError(
                f"key_padding_mask is {[batch, source]} and attn_mask {[length, source]} or "
                f"{[batch * self.num_heads, length, source]}, boolean or float; got {shapes}"
            )
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else joined(key_padding_mask, attn_mask, q)
        k, v, mask = self._with_extra_keys(k, v, mask)
        y, weights = attend(q, k, v, mask, self._dropout(), causal and mask is None, need_weights, self._quantizers())
        y = (y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1, 3)).flatten(2)
        y = F.linear(self.reader("out_proj")(y), self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            y, weights = y.squeeze(int(not self.batch_first)), weights if weights is None else weights.squeeze(0)
        return y, weights

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Returns the projections as `[N, heads, L, E / heads]` each."""
        module = cast(Any, self)
        bias = module.in_proj_bias
        if query is key and key is value and module._qkv_same_embed_dim:
            projected = list(F.linear(query, module.in_proj_weight, bias).chunk(3, -1))
        else:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            same = module._qkv_same_embed_dim
            weights = module.in_proj_weight.chunk(3) if same else [getattr(self, name) for name in names]
            biases = [None] * 3 if bias is None else bias.chunk(3)
            projected = [F.linear(*given) for given in zip((query, key, value), weights, biases, strict=True)]
        heads = [x.unflatten(-1, (self.num_heads, self.head_dim)) for x in projected]
        return [x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3) for x in heads]

    def _with_extra_keys(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values with those that the module adds (`add_bias_kv`, `add_zero_attn`), which no mask hides."""
        module = cast(Any, self)
        for extra in ((module.bias_k, module.bias_v), (0.0, 0.0) if module.add_zero_attn else (None, None)):
            if extra[0] is None:
                continue
            rows = [
                x.new_zeros(*x.shape[:2], 1, self.head_dim)
                if isinstance(row, float)
                else row.view(1, self.num_heads, 1, self.head_dim).expand(x.shape[0], -1, -1, -1)
                for x, row in zip((k, v), extra, strict=True)
            ]
            k, v = (torch.cat([x, row.to(x.dtype)], 2) for x, row in zip((k, v), rows, strict=True))
            mask = mask if mask is None else F.pad(mask, (0, 1))
        return k, v, mask

    def _dropout(self) -> float:
        return self.dropout if cast(nn.Module, self).training else 0.0

    def _quantizers(self) -> AttentionQuantizers:
        places = (("matmul_0", 0), ("matmul_0", 1), ("softmax_0", 0), ("matmul_1", 0), ("matmul_1", 1))
        return AttentionQuantizers(*(self.operand(key, index) for key, index in places))


def _is_known(module: nn.Module) -> bool:
    """Returns whether an attention, quantized or not, has torch's forward."""
    return getattr(type(module), "float_class", type(module)).forward is nn.MultiheadAttention.forward
