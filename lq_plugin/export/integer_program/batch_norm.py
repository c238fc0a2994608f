"""Batch norms after products move into the scales of the weight and into the bias."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from lq_plugin.export.integer_program.graph import constant, kind
from lq_plugin.export.integer_program.product import products

_BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"


def fold_batch_norms(module: GraphModule) -> None:
    """Folds, in place, each batch norm that alone reads a product with a stored weight.

    γ·(W∗x + b - μ) / √(σ² + ε) + β is a product with W·f and (b - μ)·f + β, where f = γ / √(σ² + ε), for each channel.
    |f| goes into the scale, its sign into the integers; where f is 0 the integers are 0.
    """
    for product in products(module):
        readers = list(product.node.users)
        if len(readers) != 1 or kind(readers[0]) != _BATCH_NORM:
            continue
        factor, shift = _factors(module, readers[0])
        codes = product.codes * product.along_channels(factor.sign().to(product.codes.dtype))
        scale = (product.scale.double() * factor.abs()).float()
        product.replace(codes, scale, (product.bias.double() * factor + shift).float())
        # The other two results are statistics, of no use in evaluation.
        for result in list(readers[0].users):
            result.replace_all_uses_with(product.node)
            module.graph.erase_node(result)
        module.graph.erase_node(readers[0])


def _factors(module: GraphModule, norm: Node) -> tuple[Tensor, Tensor]:
    """Returns f and β - μ·f of a batch norm, in float64 `[C]`."""
    gamma, beta, mean, variance = (constant(module, value) for value in norm.args[1:5])
    assert mean is not None
    assert variance is not None
    epsilon: Any = norm.args[6]
    factor = (variance.double() + epsilon).rsqrt()
    factor = factor if gamma is None else factor * gamma.double()
    shift = -mean.double() * factor
    return factor, shift if beta is None else shift + beta.double()
