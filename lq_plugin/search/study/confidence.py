"""Confidence in what plans score: intervals of repeated scores, and which of two plans is better for sure.

A trial's own score says too much: the front holds the trials that are good and those that were lucky, so its scores are
too high on average (Cawley, Talbot, "On over-fitting in model selection and subsequent selection bias in performance
evaluation", JMLR 11, 2010). Scores that are taken after the choice, of other data or with other random numbers, do not
have this bias. Each of them is called a look. From n looks of one plan comes Student's interval,

    x̄ ± t(n - 1, (1 + level) / 2) · s / √n

Two plans are compared by the interval of their differences, look by look: they see the same batches, so what makes a
batch hard cancels, as in races of algorithms (Maron, Moore, "Hoeffding races", NeurIPS 1993; Birattari et al., "A
racing algorithm for configuring metaheuristics", GECCO 2002). An interval holds for its plan alone: that all of m plans
lie in theirs is less certain.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit

from lq_plugin.errors import QuantizationError, is_integer, name_faults, raise_all

#: Scores of one plan by the number of the look; None where one is no number.
Scores = Mapping[int, float | None]
#: Looks that two plans must share before one is called better.
_SHARED = 3
#: The least number of looks that an interval is asked of.
LEAST = 3
#: User attribute of a study: what its looks are, as `Looks.describe` and the level say.
CONFIRM = "confirm"
#: The start of the name of a study's user attribute with one look: `look 12 0` is the first of trial 12.
_LOOK = "look"
#: The same of who takes a look; None once it has failed.
_CLAIM = "claim"


@dataclass(frozen=True)
class Confirm:
    """Options of scoring the plans near the front again.

    Args:
        looks: scores of a plan at most.
        level: of the intervals.
        most: looks of all plans together; None: as many as the search has trials.
        every: while the search goes on, one look after so many trials of a worker; 0: only in the end.

    Raises:
        QuantizationError: listing everything that cannot be.
    """

    looks: int = 8
    level: float = 0.95
    most: int | None = None
    every: int = 4

    def __post_init__(self) -> None:
        faults = []
        for name, least in (("looks", LEAST), ("most", 0), ("every", 0)):
            value = getattr(self, name)
            if not is_integer(value, least) and not (name == "most" and value is None):
                faults.append(f"{name} is an integer, {least} or more, got {value!r}")
        if not isinstance(self.level, float) or not 0.0 < self.level < 1.0:
            faults.append(f"level is a number between 0 and 1, as 0.95, got {self.level!r}")
        raise_all(QuantizationError, "confirm", faults)

    @classmethod
    def parse(cls, value: Confirm | Mapping[str, Any]) -> Confirm:
        """Returns the options of a mapping such as `{"looks": 8}`.

        Raises:
            QuantizationError: unknown options, or impossible values.
        """
        if isinstance(value, cls):
            return value
        names = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping):
            raise QuantizationError(f"confirm is a mapping of {', '.join(names)}, or None, got {value!r}")
        raise_all(QuantizationError, "confirm", name_faults("option", value, names))
        return cls(**{str(key): item for key, item in value.items()})


@dataclass(frozen=True)
class Interval:
    """Interval of a plan's score.

    Args:
        mean: of its looks.
        low, high: bounds of the interval.
        looks: their number.
    """

    mean: float
    low: float
    high: float
    looks: int


def check_confirm(value: Any) -> Confirm | None:
    """Returns the options that a search is given; None where plans are not confirmed.

    Raises:
        QuantizationError: see `Confirm`.
    """
    if value is None:
        return None
    if isinstance(value, Confirm | Mapping):
        return Confirm.parse(value)
    raise QuantizationError(f"confirm is a mapping such as {{looks: 8}}, or None, got {value!r}")


def interval(scores: Sequence[float], level: float) -> Interval | None:
    """Returns Student's interval of independent scores; None of fewer than two.

    Args:
        scores: at least two.
        level: the probability with which it holds what they are the mean of.

    >>> found = interval([0.8, 0.9, 1.0], 0.95)
    >>> round(found.low, 4), round(found.high, 4)  # 0.9 ± 4.3027 · 0.1 / √3
    (0.6516, 1.1484)
    """
    if len(scores) < 2:
        return None
    mean, deviation = fmean(scores), stdev(scores)
    half = quantile(len(scores) - 1, level) * deviation / math.sqrt(len(scores))
    return Interval(mean, mean - half, mean + half, len(scores))


@lru_cache(maxsize=256)
def quantile(freedom: int, level: float) -> float:
    """Returns how many deviations an interval reaches to each side."""
    return float(stdtrit(freedom, (1 + level) / 2))


def better(mine: Scores, theirs: Scores, level: float) -> bool:
    """Returns whether one plan scores more than another by the interval of their differences.

    Args:
        mine, theirs: larger is better.
        level: of the interval.
    """
    difference = interval(_differences(mine, theirs), level)
    return difference is not None and difference.looks >= _SHARED and difference.low > 0


def usable(scores: Mapping[int, Scores]) -> tuple[dict[int, dict[int, float | None]], set[int]]:
    """Returns the looks without those that no plan can be judged by, and the numbers of these.

    They are looks in which two plans score no number: the fault is that of their batches, such as an AUROC without
    samples of a class.

    Args:
        scores: by trial.
    """
    failed = Counter(look for each in scores.values() for look, score in each.items() if score is None)
    unusable = {look for look, count in failed.items() if count > 1}
    kept = {
        trial: {look: score for look, score in each.items() if look not in unusable} for trial, each in scores.items()
    }
    return kept, unusable


def spread(scores: Iterable[Scores]) -> tuple[float, int] | None:
    """Returns the standard deviation of a look around its plan's mean, pooled over plans, and its degrees of freedom.

    None where no plan has two looks.
    """
    return _pooled([[score for score in each.values() if score is not None] for each in scores])


def spread_of_differences(scores: Sequence[Scores]) -> float | None:
    """Returns the standard deviation of the difference of two plans in one look; None where no two plans share two."""
    if not scores:
        return None
    first = max(range(len(scores)), key=lambda i: len(scores[i]))
    found = _pooled([_differences(scores[first], other) for i, other in enumerate(scores) if i != first])
    return None if found is None else found[0]


def _differences(mine: Scores, theirs: Scores) -> list[float]:
    pairs = [(mine[look], theirs[look]) for look in sorted(mine.keys() & theirs.keys())]
    return [a - b for a, b in pairs if a is not None and b is not None]


def _pooled(groups: Iterable[Sequence[float]]) -> tuple[float, int] | None:
    counted = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in counted)
    if not freedom:
        return None
    squares = sum((value - mean) ** 2 for group in counted for mean in [fmean(group)] for value in group)
    return math.sqrt(squares / freedom), freedom


def look_key(trial: int, look: int) -> str:
    """Returns the name of the study's user attribute that holds a look."""
    return f"{_LOOK} {trial} {look}"


def claim_key(trial: int, look: int) -> str:
    """Returns the name of the study's user attribute that says which worker takes a look."""
    return f"{_CLAIM} {trial} {look}"


def looks_in(attributes: Mapping[str, Any]) -> dict[int, dict[int, float | None]]:
    """Returns all looks among a study's user attributes, by trial and look."""
    found: dict[int, dict[int, float | None]] = {}
    for (trial, look), value in _numbered(attributes, _LOOK).items():
        found.setdefault(trial, {})[look] = value
    return found


def claims_in(attributes: Mapping[str, Any]) -> dict[tuple[int, int], str]:
    """Returns who takes which look, by trial and look; looks that have a score are left out."""
    taken = _numbered(attributes, _LOOK)
    claims = _numbered(attributes, _CLAIM)
    return {place: who for place, who in claims.items() if who is not None and place not in taken}


def _numbered(attributes: Mapping[str, Any], kind: str) -> dict[tuple[int, int], Any]:
    found = {}
    for name, value in attributes.items():
        first, *numbers = name.split(" ")
        if first == kind and len(numbers) == 2:
            found[int(numbers[0]), int(numbers[1])] = value
    return found
