"""Scales on which a metric's noise, and what a choice does to it, are about the same everywhere.

An accuracy falls by 0.1 points between 8 and 6 bits and by 30 between 3 and 2, a loss may grow a hundredfold: a plan's
effects add up in logits or logarithms. Which scale fits is asked of the data, by the marginal likelihood of the
regression, with the transform's Jacobian as a density of the original values has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lq_plugin.search.surrogate.regression import Floats

#: A share is kept that far from 0 and 1.
_EDGE = 1e-3


@dataclass(frozen=True)
class Transform:
    """An increasing function of a metric.

    Args:
        name: of the function.
        fits: whether it is defined for such values.
        apply: to values.
        log_slope: logarithm of its derivative.
    """

    name: str
    fits: Callable[[Floats], bool]
    apply: Callable[[Floats], Floats]
    log_slope: Callable[[Floats], Floats]


def _share(values: Floats) -> Floats:
    return np.clip(values, _EDGE, 1 - _EDGE)


PLAIN = Transform("plain", lambda x: True, lambda x: x, np.zeros_like)
LOGIT = Transform(
    "logit",
    lambda x: bool(((x >= 0) & (x <= 1)).all()),
    lambda x: np.log(_share(x) / (1 - _share(x))),
    lambda x: -np.log(_share(x) * (1 - _share(x))),
)
LOG = Transform("log", lambda x: bool((x > 0).all()), np.log, lambda x: -np.log(x))
TRANSFORMS = (PLAIN, LOGIT, LOG)
