"""Scaled dot-product attention with quantizers of its operands, and the masks that torch's attention takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Quantize = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AttentionQuantizers:
    """Quantizers of the operands inside of an attention; None: they stay float.

    Args:
        query, key: the operands of the first product, `[N, heads, L, features]`.
        scores: what the softmax takes, before masks are added.
        probabilities, value: the operands of the second product.
    """

    query: Quantize | None = None
    key: Quantize | None = None
    scores: Quantize | None = None
    probabilities: Quantize | None = None
    value: Quantize | None = None

    def __bool__(self) -> bool:
        return any((self.query, self.key, self.scores, self.probabilities, self.value))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    need_weights: bool,
    inside: AttentionQuantizers,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns softmax(q kᵀ · scale + mask) v, and the probabilities where they are wanted.

    torch's fused kernel computes it as long as nobody looks inside.

    Args:
        q, k, v: `[N, heads, L, features]`, of keys and values `[N, heads, S, features]`.
        mask: added to the scores `[N, heads, L, S]`, broadcastable to them.
        dropout: share of the probabilities that become 0; 0 in evaluation.
        is_causal: query i sees the first i + 1 keys alone.
        need_weights: the probabilities are wanted.
        inside: quantizers of what the kernel does not show.
        scale: of the scores; None: 1 / √features.
    """
    if not (inside or need_weights):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale), None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = _through(inside.query, q) @ _through(inside.key, k).transpose(-2, -1) * scale
    scores = _through(inside.scores, scores)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        causal = torch.zeros_like(future, dtype=q.dtype).masked_fill_(future, -torch.inf)
        mask = causal if mask is None else mask + causal
    masked = scores if mask is None else scores + mask
    blind = None
    if mask is not None and not need_weights:
        # As torch's kernel has it: a query that sees no key gets 0. With weights, it gets NaN from torch.
        blind = masked.isneginf().all(-1, keepdim=True)
        masked = masked.masked_fill(blind, 0.0)  # the gradient of a softmax of nothing but -inf is NaN
    probabilities = masked.softmax(-1).to(q.dtype)  # a mask may have more bits
    if blind is not None:
        probabilities = probabilities.masked_fill(blind, 0.0)
    if dropout:
        probabilities = F.dropout(probabilities, dropout)
    y = _through(inside.probabilities, probabilities) @ _through(inside.value, v)
    return y, probabilities if need_weights else None


def attention_with(
    probabilities: Quantize,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Returns `F.scaled_dot_product_attention` of these, with quantized probabilities.

    Args:
        probabilities: their quantizer.
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: as torch's function takes them; a boolean
            mask is True where a query sees a key.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = _added(attn_mask.logical_not(), query)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    inside = AttentionQuantizers(probabilities=probabilities)
    return attend(query, key, value, attn_mask, dropout_p, is_causal, False, inside, scale)[0]


def are_masks(mask: Tensor | None, shapes: list[tuple[int, ...]]) -> bool:
    """Returns True for None and for a mask of one of these shapes, boolean or added to the scores."""
    return mask is None or (tuple(mask.shape) in shapes and (mask.dtype == torch.bool or mask.is_floating_point()))


def joined(key_padding_mask: Tensor | None, attn_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Returns masks as torch's attention takes them as one that is added to scores `[N, heads, L, S]`.

    Args:
        key_padding_mask: `[N, S]`.
        attn_mask: `[L, S]` or `[N · heads, L, S]`.
        q: `[N, heads, L, features]`.
    """
    batch, heads, length, _ = q.shape
    mask = _added(attn_mask, q)
    if mask is not None:
        mask = mask if mask.ndim == 2 else mask.view(batch, heads, length, mask.shape[-1])
    padding = _added(key_padding_mask, q)
    if padding is None:
        return mask
    padding = padding.view(batch, 1, 1, padding.shape[-1])
    return padding if mask is None else mask + padding


def _added(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask that is added: -inf where a boolean one is True."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf)


def _through(quantize: Quantize | None, x: Tensor) -> Tensor:
    return x if quantize is None else quantize(x)
