"""Scores of one model in float, after PTQ and after QAT, with the uncertainty of a share of samples."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite

from lq_plugin.report.data import Score, digits

#: Probability that an interval holds the true share.
CONFIDENCE = 0.95
#: Names of metrics that may be a share of samples: `val/acc`, `top5`, `test_accuracy`, `error_rate`.
_SHARES = re.compile(r"(^|[/_.])(acc|accuracy|top_?\d+|error|error_rate)($|[/_.])")
#: Above so many samples the last digit of a float32 stands for more than a quarter of a sample.
_MOST = 4_000_000
#: Names of what was not scored on the samples of an evaluation.
_TRAINING = re.compile(r"(^|[/_.])train")


def make_scores(
    by_variant: Mapping[str, Mapping[str, float]], samples: Mapping[str, int] | int | None = None
) -> list[Score]:
    """Returns a score for each variant and metric, those of one metric together, in the order of the first variant.

    A share of samples (an accuracy: k of n are right) has Wilson's interval of 95 %. A metric counts as one when its
    name says so and k is an integer; others have no interval, nor have those of more than four million samples,
    where a float32 metric does not tell integers from others.

    Args:
        by_variant: metrics by name, by variant: `{"float": {"val/acc": 0.98}, "QAT": {"val/acc": 0.97}}`.
        samples: that each metric was computed on, by its name, or of all.

    Reference: Wilson, 1927, in Brown, Cai and DasGupta, "Interval Estimation for a Binomial Proportion", Statistical
    Science 16(2), 2001, equation 4.

    >>> [score] = make_scores({"float": {"val/acc": 0.9}}, 100)
    >>> score.low, score.high
    (0.8256, 0.9448)
    """
    names = dict.fromkeys(name for metrics in by_variant.values() for name in metrics)
    found = []
    for name in names:
        count = samples if samples is None or isinstance(samples, int) else samples.get(name)
        for variant, metrics in by_variant.items():
            if (value := metrics.get(name)) is None or not isfinite(value) or _TRAINING.search(name):
                continue
            right = None if count is None else _right(name, value, count)
            low, high = (None, None) if right is None or count is None else wilson(right, count)
            found.append(Score(variant, name, digits(value, 6), count, low, high))
    return found


def wilson(right: int, count: int) -> tuple[float, float]:
    """Returns the bounds of Wilson's interval of a share, with four digits."""
    from scipy.stats import binomtest  # not at the top: it takes a second

    found = binomtest(right, count).proportion_ci(CONFIDENCE, method="wilson")
    return digits(found.low), digits(found.high)


def _right(name: str, value: float, count: int) -> int | None:
    """Returns how many samples are right, where the metric is a share of them."""
    if not _SHARES.search(name) or not 0 <= value <= 1 or not 1 <= count <= _MOST:
        return None
    right = value * count
    # Metrics are float32, of which the last digit is 6e-8.
    return round(right) if abs(right - round(right)) <= max(1e-3, 6e-8 * count) else None
