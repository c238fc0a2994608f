"""What a search can minimize beside its metric."""

from __future__ import annotations

from lq_plugin.model.cost import Cost

#: Totals of the cost model.
COUNTED = ("effective_bits", "bytes", "bops")
#: Milliseconds on the target runtime, from a table that is measured first.
LATENCY = "latency"
#: All of them.
COSTS = (*COUNTED, LATENCY)


def cost_totals(cost: Cost) -> dict[str, float]:
    """The counted totals, which trials carry beside the metrics."""
    return {name: value for name in COUNTED if (value := getattr(cost, name)) is not None}
