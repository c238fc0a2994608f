"""Range estimation: statistics of a tensor to the bounds it is clipped at.

`Sample` holds what is known about the values, `Histogram` collects it from a stream,
`estimate_range` turns it into bounds by one of the registered estimators, and `compare_ranges`
puts all of them side by side.
"""

from lq_plugin.ranges import aciq, kl, learned, minmax, mse, octav, percentile  # noqa: F401 - importing registers them
from lq_plugin.ranges.histogram import Histogram
from lq_plugin.ranges.laboratory import RangeEntry, RangeTable, compare_ranges
from lq_plugin.ranges.registry import RangeFunction, estimate_range, register_range, registered_ranges
from lq_plugin.ranges.sample import Sample

__all__ = [
    "Histogram",
    "RangeEntry",
    "RangeFunction",
    "RangeTable",
    "Sample",
    "compare_ranges",
    "estimate_range",
    "register_range",
    "registered_ranges",
]
