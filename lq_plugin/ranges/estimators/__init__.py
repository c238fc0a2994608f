"""Range estimators, one file each; importing this package registers them."""

from lq_plugin.ranges.estimators import (
    aciq as aciq,
    kl as kl,
    learned as learned,
    minmax as minmax,
    mse as mse,
    octav as octav,
    percentile as percentile,
)
