"""Contents of the bytes of a model: codes of weights, their scales, ranges of activations, and what stays float."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn

from lq_plugin.layers import QuantizedLayer, weight_of
from lq_plugin.model.measure.cost import Cost, spec_bits
from lq_plugin.model.survey import Survey

#: Parts of a file, in the order in which they are shown.
PARTS = ("weights", "scales", "ranges", "float", "table")


def stored_bytes(model: nn.Module, priced: Cost) -> dict[str, int]:
    """Returns the bytes of each of `PARTS`; together they are `priced.bytes`.

    `weights` are the codes of quantized weights, `scales` their scales, zero points and codebooks, `ranges` what
    quantizers of activations hold, `float` everything that stays float, and `table` what a packed file needs to say
    where the rest is.

    Args:
        model: prepared or float.
        priced: its cost, from `lq_plugin.model.measure.cost.cost`.

    >>> import lq_plugin
    >>> from lq_plugin.model.measure.cost import cost
    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> _ = lq_plugin.prepare(net, {"rules": [{"match": "0", "weight": "int4 group16"}]})
    >>> parts = stored_bytes(net, cost(net))
    >>> parts["weights"], parts["scales"], parts["float"]  # 64 · 64 / 2, 4 · 256, 4 · (64 · 8 + 64 + 8)
    (2048, 1024, 2336)
    """
    layers = Survey.of(model).candidates
    found = dict.fromkeys(PARTS, 0)
    found["float"], found["table"] = priced.other_bytes, priced.table_bytes
    for row in priced:
        layer: Any = layers[row.name]
        stored = -(-row.storage_bits // 8)
        found["ranges"] += row.bytes - stored
        spec = layer.layer_plan.weight if isinstance(layer, QuantizedLayer) else None
        if spec is None or not row.storage_bits:
            found["float"] += stored
            continue
        shape = tuple(type(layer).canonical(layer, weight_of(layer)).shape)
        each = spec.bit_width if spec.kind.code_bits is None else spec.kind.code_bits
        quantized, codes = spec_bits(spec, shape), prod(shape) * each
        # What is more is a float copy, of a weight that is read past its layer.
        in_float = max(0, row.storage_bits - quantized) // 8
        found["weights"] += codes // 8
        found["scales"] += stored - in_float - codes // 8
        found["float"] += in_float
    return found
