"""Multi-head attention: the projections of query, key and value, and of the output."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from lq_plugin.layers.compound import CompoundWeight, InnerWeight, InputWeight, QuantizedCompound, register_compound


@register_compound(nn.MultiheadAttention)
class QuantizedAttention(QuantizedCompound):
    """The float attention on Q(query), Q(key), Q(value), with quantized projections.

    Query, key and value `[L, N, E]`, `[N, L, E]` or `[L, E]`. Projections are one weight `in_proj_weight` `[3 E, E]`, whose
    input quantizer serves all three (once where they are one tensor); or, where `kdim` or `vdim` differ, `q_proj_weight`,
    `k_proj_weight` and `v_proj_weight`, each with its own. The weight of `out_proj` `[E, E]` is a layer under that name.
    """

    input_names = ("query", "key", "value")
    remark = "attention scores and probabilities and the biases stay float"

    @staticmethod
    def weights(module: nn.Module) -> list[CompoundWeight]:
        same = cast(Any, module)._qkv_same_embed_dim
        inputs = ["in_proj_weight"] if same else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        out = InnerWeight(module, "out_proj", "out_proj.weight", remark="its input, the attention's output, stays float")
        return [*(InputWeight(module, name) for name in inputs), out]

    @staticmethod
    def key_of(module: nn.Module, name: str) -> str:
        return "in_proj_weight" if cast(Any, module)._qkv_same_embed_dim else f"{name[0]}_proj_weight"
