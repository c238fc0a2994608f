"""Harm of two choices together, beyond the sum of what each does alone.

The sum of sensitivities leaves out that the errors of two tensors add to or cancel each other. With x the vector of all
choices, the loss of a plan to second order is xᵀGx: its diagonal is the sensitivities, an element off it is half of

    cross(i, j) = s(i, j) - s(i) - s(j)

where s(i, j) is measured with both choices and everything else float (CLADO: Deng et al., "Mixed-Precision Quantization
for Deep Vision Models with Integer Quadratic Programming", DAC 2025, arXiv 2307.05657). CLADO measures all pairs, half
the square of layers times choices, and makes G positive semidefinite. Here those are measured that change the predicted
harm of good plans most, and are taken as measured; what the other pairs do is learned from finished trials
(`lq_plugin.search.surrogate.regression`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import combinations
from math import isfinite, sqrt
from typing import TYPE_CHECKING

from lq_plugin.errors import QuantizationError
from lq_plugin.search.sensitivity.measure import FORWARD, Changes, Measurement

if TYPE_CHECKING:
    from lq_plugin.search.evaluation.evaluator import Evaluator
    from lq_plugin.search.space.model_space import ModelSpace, Params


@dataclass(frozen=True)
class Pair:
    """Two choices of different units.

    Args:
        unit, choice: the first one; choices are texts.
        other, other_choice: the second one.
        cross: harm of both together less that of each alone; below 0 where their errors cancel.
    """

    unit: str
    choice: str
    other: str
    other_choice: str
    cross: float

    def row(self) -> tuple[str, str, str, str, float]:
        """Returns plain values, of which `Pair(*row)` makes the same pair."""
        return astuple(self)


def influential_pairs(
    space: ModelSpace, sensitivity: Mapping[str, Mapping[str, float]], plans: Iterable[Params], count: int
) -> list[Changes]:
    """Returns the pairs of choices that change the harm of some plans most if their errors are alike.

    Errors of correlation ρ have cross = 2 ρ √(s(i) s(j)), so a pair counts for 2 √(s(i) s(j)) / H in each plan that has
    it, H being the plan's summed sensitivity.

    Args:
        space: what may be chosen.
        sensitivity: harm of each choice.
        plans: values of the parameters; those that a search would begin with.
        count: number of pairs at most, the most influential first.
    """
    units = [unit for unit in space.units if len(unit.choices) > 1]
    weights: dict[Changes, float] = defaultdict(float)
    for params in plans:
        chosen = [(unit, unit.choice(params)) for unit in units]
        roots = [(change, sqrt(sensitivity[change[0].name][str(change[1])])) for change in chosen]
        total = sum(root**2 for _, root in roots)
        for (one, root), (other, other_root) in combinations([entry for entry in roots if entry[1] > 0], 2):
            weights[one, other] += 2.0 * root * other_root / total
    return sorted(weights, key=lambda pair: -weights[pair])[:count]


def measure_pairs(evaluator: Evaluator, measure: str, pairs: Sequence[Changes], batches: int = 2) -> list[Pair]:
    """Measures pairs of choices, and each of the choices alone on the same data, everything else float.

    Each takes a forward pass over the batches from the first of its layers on.

    Args:
        evaluator: calibrated.
        measure: a forward pass of the whole model, see `check_pairs`.
        pairs: of choices of different units, such as `influential_pairs` returns.
        batches: of calibration data.

    Raises:
        QuantizationError: another measure, or a harm that is not finite.
    """
    check_pairs(measure)
    if not pairs:
        return []
    # A loader that shuffles gives other batches than those that the sensitivities were measured on.
    singles: list[Changes] = [(change,) for change in dict.fromkeys(change for pair in pairs for change in pair)]
    worker = Measurement(evaluator, (measure,), batches, "float", [*singles, *pairs])
    evaluator.run(worker)
    harms = worker.harms[measure]
    found = []
    for one, other in pairs:
        (unit, choice), (other_unit, other_choice) = one, other
        cross = harms[one, other] - harms[(one,)] - harms[(other,)]
        if not isfinite(cross):
            names = f"{unit.name}, {choice} with {other_unit.name}, {other_choice}"
            raise QuantizationError(f"the sensitivity {measure} of {names} is not finite")
        found.append(Pair(unit.name, str(choice), other_unit.name, str(other_choice), cross))
    return found


def check_pairs(measure: str) -> None:
    """Refuses measures that pairs cannot be measured by.

    Raises:
        QuantizationError: naming those that can.
    """
    able = [name for name in FORWARD if name != "layer_sqnr"]
    if measure not in able:
        raise QuantizationError(f"pairs are measured on the model's output: by {', '.join(able)}, not by {measure!r}")
