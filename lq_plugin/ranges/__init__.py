"""Range estimation: statistics of a tensor to the bounds it is clipped at.

`Sample` holds what is known about the values, `Histogram` collects it from a stream,
`estimate_range` turns it into bounds by one of the registered estimators, and `compare_ranges`
puts all of them side by side.
"""

from lq_plugin.ranges import estimators  # noqa: F401 - importing registers them
from lq_plugin.ranges.histogram import Histogram as Histogram
from lq_plugin.ranges.laboratory import (
    RangeEntry as RangeEntry,
    RangeTable as RangeTable,
    compare_ranges as compare_ranges,
)
from lq_plugin.ranges.registry import (
    RangeFunction as RangeFunction,
    estimate_range as estimate_range,
    register_range as register_range,
    registered_ranges as registered_ranges,
)
from lq_plugin.ranges.sample import Sample as Sample
from lq_plugin.ranges.summarize import summarize as summarize
