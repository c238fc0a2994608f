"""Constraints on plans: `"effective_bits <= 4.5"`."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lq_plugin.errors import QuantizationError, raise_all

_PATTERN = re.compile(r"\s*(\S+?)\s*(<=|>=)\s*([-+]?\d[\d_]*\.?\d*(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Constraint:
    """A limit of a cost or of a logged metric.

    Args:
        name: of the cost or metric.
        relation: `"<="` or `">="`.
        limit: the value that is still allowed.

    >>> limit = Constraint.parse("effective_bits <= 4.5")
    >>> limit.violation({"effective_bits": 5.0}), limit.violation({"effective_bits": 4.0})
    (0.5, -0.5)
    """

    name: str
    relation: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """Reads `"name <= number"` or `"name >= number"`.

        Raises:
            QuantizationError: it is neither.
        """
        found = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise QuantizationError(
                f"a constraint is written 'effective_bits <= 4.5' or 'val/acc >= 0.9', got {text!r}"
            )
        return cls(found[1], found[2], float(found[3]))

    @property
    def bound(self) -> float:
        """The former name of `limit`."""
        warnings.warn("Constraint.bound is Constraint.limit now", DeprecationWarning, stacklevel=2)
        return self.limit

    def violation(self, values: Mapping[str, float]) -> float:
        """Returns by how much the value exceeds the limit; 0 or less where the constraint is kept."""
        excess = values[self.name] - self.limit
        return excess if self.relation == "<=" else -excess

    def __str__(self) -> str:
        return f"{self.name} {self.relation} {self.limit:g}"


def parse_constraints(texts: Iterable[str] | str) -> tuple[Constraint, ...]:
    """Reads several constraints; one may be a plain string.

    Raises:
        QuantizationError: listing every one that cannot be read.
    """
    found: list[Constraint] = []
    faults: list[str] = []
    for text in [texts] if isinstance(texts, str) else texts:
        try:
            found.append(Constraint.parse(text))
        except QuantizationError as error:
            faults.append(str(error))
    raise_all(QuantizationError, "cannot read the constraints", faults)
    return tuple(found)


def largest(limits: Iterable[Constraint], cost: str) -> float:
    """Returns the most that a plan may cost under these constraints; infinity where none limits this cost from above.

    >>> largest(parse_constraints(["bytes <= 900", "bytes <= 800", "val/acc >= 0.9"]), "bytes")
    800.0
    """
    return min((one.limit for one in limits if one.name == cost and one.relation == "<="), default=math.inf)
