"""`Sample`: the weighted values that range estimators look at.

Every estimator takes a `Sample` and nothing else, so weights (real elements) and activations
(a histogram of many batches) share one code path, and several estimators share one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lq_plugin.errors import CalibrationError


@dataclass(frozen=True, eq=False)
class Sample:
    """Weighted values of `rows` independent distributions.

    Shapes: `values [rows, n]`, `mass [rows, n]`, `minimum [rows]`, `maximum [rows]`,
    `edges [rows, m + 1]` with `m <= n`.

    Attributes:
        values: float32.
        mass: how many elements each value stands for, >= 0; None is one each. Columns that pad
            a row have mass 0.
        minimum, maximum: exact bounds of the data, float32; `values` may stop short of them.
        edges: None where all values are exact. Otherwise the first `m` columns are histogram
            bins between consecutive ascending edges, their mass spread evenly; the remaining
            columns are exact points, among them the zeros of a ReLU output.
    """

    values: Tensor
    mass: Tensor | None
    minimum: Tensor
    maximum: Tensor
    edges: Tensor | None = None

    def __post_init__(self) -> None:
        faults = []
        if self.values.dim() != 2:
            faults.append(f"values must be [rows, n], got {list(self.values.shape)}")
        if self.mass is not None and self.mass.shape != self.values.shape:
            faults.append(f"mass must be like values {list(self.values.shape)}, got {list(self.mass.shape)}")
        for label, bound in (("minimum", self.minimum), ("maximum", self.maximum)):
            if bound.shape != self.values.shape[:1]:
                faults.append(f"{label} must be [rows], got {list(bound.shape)}")
        if self.edges is not None and self.edges.shape[-1] > self.values.shape[-1] + 1:
            faults.append(
                f"{self.edges.shape[-1]} edges need {self.edges.shape[-1] - 1} values, got {self.values.shape[-1]}"
            )
        if faults:
            raise CalibrationError("impossible Sample: " + "; ".join(faults))

    @property
    def rows(self) -> int:
        """Number of independent distributions."""
        return self.values.shape[0]

    def weights(self) -> Tensor:
        """Returns `mass`, or ones where it is None, in float32 at least."""
        return torch.ones_like(self.values) if self.mass is None else self.mass

    def total(self) -> Tensor:
        """Returns the number of elements each row stands for, float64 `[rows]`."""
        if self.mass is None:
            return torch.full_like(self.minimum, self.values.shape[1], dtype=torch.float64)
        return self.mass.sum(dim=1, dtype=torch.float64)

    def average(self, of: Tensor) -> Tensor:
        """Returns the weighted mean of `of [rows, n]`, float64 `[rows]`; 0 for a row without mass."""
        if self.mass is None:
            return of.mean(dim=1, dtype=torch.float64)
        return (of * self.mass).sum(dim=1, dtype=torch.float64) / self.total().clamp(min=1e-300)

    def row(self, index: int) -> Sample:
        """Returns one row as a sample of its own."""
        return self.select(slice(index, index + 1))

    def reach(self) -> Tensor:
        """Returns the largest magnitude of each row, `[rows]`."""
        return torch.maximum(self.maximum.abs(), self.minimum.abs())

    def bars(self, bins: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Returns edges `[bins + 1]` of equal width with zero inside, counts `[bins]`, and the share of zeros left out.

        Of a sample with one row. Exact zeros have a level on every grid; where they are more than one in ten, they are
        not in the counts, else the share is 0. The mass of a bin of the sample is spread evenly over its width.
        """
        low, high = min(float(self.minimum), 0.0), max(float(self.maximum), 0.0)
        if low == high:
            low, high = -1.0, 1.0
        edges, counts = np.linspace(low, high, bins + 1), np.zeros(bins)
        mass, values = self.weights()[0].double().numpy(), self.values[0].double().numpy()
        inside = 0 if self.edges is None else self.edges.shape[1] - 1
        if self.edges is not None:
            known, first = np.unique(self.edges[0].double().numpy(), return_index=True)
            last = np.append(first[1:] - 1, inside)
            counts += np.diff(np.interp(edges, known, np.concatenate([[0.0], np.cumsum(mass[:inside])])[last]))
        points, weights = values[inside:], mass[inside:]
        at_zero = points == 0
        share = float(weights[at_zero].sum() / mass.sum())
        keep = ~at_zero if share > 0.1 else np.ones_like(at_zero)
        counts += np.histogram(points[keep], edges, weights=weights[keep])[0]
        return edges, counts, share if share > 0.1 else 0.0

    def select(self, index: Tensor | slice) -> Sample:
        """Returns the rows at `index`: int64 positions, a bool mask or a slice."""
        mass = None if self.mass is None else self.mass[index]
        edges = None if self.edges is None else self.edges[index]
        return Sample(self.values[index], mass, self.minimum[index], self.maximum[index], edges)

    def normalized(self) -> tuple[Sample, Tensor]:
        """Returns each row divided by a power of two so that its largest magnitude lies in [0.5, 1).

        The division is exact, so an estimate on the normalized sample times the factor is the
        estimate, whatever the magnitude of the data: squares neither overflow nor underflow.

        Returns:
            `(sample, factor [rows])`.
        """
        exponent = torch.frexp(self.reach()).exponent.clamp(-126, 126)
        factor, inverse = _power_of_two(exponent), _power_of_two(-exponent)
        edges = None if self.edges is None else self.edges * inverse.unsqueeze(1)
        scaled = Sample(
            self.values * inverse.unsqueeze(1), self.mass, self.minimum * inverse, self.maximum * inverse, edges
        )
        return scaled, factor

    @classmethod
    def from_tensor(cls, x: Tensor, mask: Tensor | None = None, name: str = "tensor") -> Sample:
        """Returns the elements of `x` themselves; for large tensors there is `lq_plugin.ranges.summarize`.

        Args:
            x: floating point `[rows, n]`; a row is a channel or a group.
            mask: bool `[rows, n]`, True for real elements; padding never enters.
            name: what error messages call the tensor.

        Raises:
            CalibrationError: the tensor is empty or holds NaN or Inf, or a row has no element.
        """
        if x.dim() != 2:
            raise CalibrationError(f"{name}: ranges are estimated on [rows, n], got shape {list(x.shape)}")
        if x.numel() == 0:
            raise CalibrationError(f"{name}: no elements to estimate a range from, shape {list(x.shape)}")
        x = x.detach().float()
        if mask is not None:
            if mask.shape != x.shape:
                raise CalibrationError(f"{name}: mask must be like the tensor {list(x.shape)}, got {list(mask.shape)}")
            if not bool((present := mask.any(dim=1)).all()):
                raise CalibrationError(f"{name}: {int((~present).sum())} of {x.shape[0]} rows have no element")
            # Padding may hold anything, NaN included; masked rows keep one real element, so 0 is safe.
            minimum = x.masked_fill(~mask, torch.inf).amin(dim=1)
            maximum = x.masked_fill(~mask, -torch.inf).amax(dim=1)
            refuse_non_finite(minimum, maximum, name)
            return cls(x.masked_fill(~mask, 0.0), mask.float(), minimum, maximum)
        minimum, maximum = x.amin(dim=1), x.amax(dim=1)
        refuse_non_finite(minimum, maximum, name)
        return cls(x, None, minimum, maximum)

    @classmethod
    def from_histogram(
        cls,
        edges: Tensor,
        counts: Tensor,
        zeros: Tensor | None = None,
        minimum: Tensor | None = None,
        maximum: Tensor | None = None,
        name: str = "tensor",
    ) -> Sample:
        """Returns the sample of values that are known only by the bin they fell into.

        Args:
            edges: `[rows, m + 1]` (or `[m + 1]`), ascending.
            counts: `[rows, m]` (or `[m]`), >= 0.
            zeros: `[rows]`, elements that were exactly 0 and are not in `counts`.
            minimum, maximum: exact bounds `[rows]`; None takes the outermost edges of the bins
                with counts.
            name: what error messages call the tensor.

        Raises:
            CalibrationError: shapes that do not fit, NaN, negative or no counts.

        >>> Sample.from_histogram(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([5.0, 1.0])).values
        tensor([[0.5000, 2.0000]])
        """
        edges, counts = torch.atleast_2d(edges).float(), torch.atleast_2d(counts)
        if edges.shape[0] != counts.shape[0] or edges.shape[1] != counts.shape[1] + 1:
            raise CalibrationError(
                f"{name}: edges {list(edges.shape)} do not fit counts {list(counts.shape)}; one edge more than bins"
            )
        mass = counts.to(torch.float64)
        refuse_non_finite(edges.amin(dim=1), edges.amax(dim=1), name)
        if not bool((edges.diff(dim=1) >= 0).all()):
            raise CalibrationError(f"{name}: histogram edges must ascend")
        if not bool(mass.isfinite().all()) or bool((mass < 0).any()):
            raise CalibrationError(f"{name}: histogram counts must be finite and >= 0")
        seen = mass.sum(dim=1) + (0 if zeros is None else zeros)
        if bool((seen == 0).any()):
            raise CalibrationError(f"{name}: an empty histogram has no range")
        outermost_low = edges[:, :-1].masked_fill(mass == 0, torch.inf).amin(dim=1)
        outermost_high = edges[:, 1:].masked_fill(mass == 0, -torch.inf).amax(dim=1)
        if zeros is not None:
            outermost_low = torch.where(zeros > 0, outermost_low.clamp(max=0.0), outermost_low)
            outermost_high = torch.where(zeros > 0, outermost_high.clamp(min=0.0), outermost_high)
        minimum = outermost_low if minimum is None else minimum.float()
        maximum = outermost_high if maximum is None else maximum.float()
        refuse_non_finite(minimum, maximum, name)
        # No density beyond the exact bounds: a bin that straddles one ends there.
        edges = edges.clamp(minimum.unsqueeze(1), maximum.unsqueeze(1))
        values = (edges[:, :-1] * 0.5 + edges[:, 1:] * 0.5).float()
        if zeros is not None:
            values = torch.cat([values, torch.zeros_like(values[:, :1])], dim=1)
            mass = torch.cat([mass, zeros.to(torch.float64).unsqueeze(1)], dim=1)
        return cls(values, mass, minimum, maximum, edges)


def refuse_non_finite(minimum: Tensor, maximum: Tensor, name: str) -> None:
    """Raises `CalibrationError` if bounds are NaN or Inf; NaN propagates into them from the data.

    Args:
        minimum, maximum: the bounds, `[rows]`.
        name: of the tensor, for messages.
    """
    if bool(torch.isfinite(minimum).all()) and bool(torch.isfinite(maximum).all()):
        return
    kind = "NaN" if bool(minimum.isnan().any()) or bool(maximum.isnan().any()) else "Inf"
    rows = int((~(minimum.isfinite() & maximum.isfinite())).sum())
    raise CalibrationError(f"{name}: {kind} in {rows} of {minimum.numel()} rows; ranges need finite values")


def _power_of_two(exponent: Tensor) -> Tensor:
    """Returns 2^exponent for integers in -126..127, exact (built from the bits)."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
