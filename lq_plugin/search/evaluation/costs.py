"""Costs that a search can minimize next to its metric, and that constraints can limit.

All of it is of the whole model, what stays float included, and work is that of one input sample: a limit means the same
whatever the batch size and however much of a model can hold quantizers. `effective_bits <= 4.5` limits the mean bits of
a parameter, so that the packed file takes about 4.5 bits for each; experts, norms or tables of positions that stay
float count with the bits of their dtype, and where they are too many no plan keeps the limit, which is said before the
first trial. `quantizable_effective_bits` leaves them out: the mean over the weights that a plan can change. See
`lq_plugin.model.measure.cost` for the definitions, `energy` and `activation_memory` there for those.
"""

from __future__ import annotations

from collections.abc import Iterable

from lq_plugin.errors import name_faults
from lq_plugin.model.measure.cost import Cost

#: Totals of the cost model.
COUNTED = ("effective_bits", "quantizable_effective_bits", "bytes", "bops", "energy")
#: Bytes of activations of one sample at the fullest moment of a pass.
ACTIVATION_MEMORY = "activation_memory"
#: Milliseconds a sample on the target runtime, from a table that is measured first.
LATENCY = "latency"
#: All of them.
COSTS = (*COUNTED, ACTIVATION_MEMORY, LATENCY)
#: Those that the specs of a plan give, without a measurement.
PRICED = (*COUNTED, ACTIVATION_MEMORY)
#: Their names on an axis.
LABELS = {
    "effective_bits": "effective bits a parameter",
    "quantizable_effective_bits": "effective bits of quantizable layers",
    "bytes": "bytes",
    "bops": "bit operations a sample",
    "energy": "microjoules a sample, by Horowitz's table",
    ACTIVATION_MEMORY: "bytes of activations a sample at most",
    LATENCY: "milliseconds a sample",
}
#: What costs are of, for the fingerprint of a study: trials that counted something else cannot be compared.
COUNTS = {"costs count": "the whole model, for one input sample"}


def cost_totals(cost: Cost) -> dict[str, float]:
    """Returns the counted totals by name, which trials carry next to the metrics."""
    return {name: value for name in COUNTED if (value := getattr(cost, name)) is not None}


def unknown_costs(names: Iterable[str]) -> list[str]:
    """Returns a fault for each name that is not a cost."""
    return name_faults("cost", names, COSTS)
