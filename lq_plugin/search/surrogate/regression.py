"""Bayesian linear regression of a metric on what a plan chooses: single choices, pairs of them, and known sensitivity.

H(x) = Σ s(u, x_u) + Σ cross(u, x_u, v, x_v) is the harm of plan x as the measured sensitivities s predict it, with the
pairs that were measured as well (`lq_plugin.search.sensitivity.pairs`), and r_u(x) = s(u, x_u) / Σ s the share of unit
u. The metric, transformed so that noise is about the same everywhere, is

    y(x) = β₀ + β₁ log H(x) + Σ_u α(u, x_u) + Σ_u r_u(x) θ(u, x_u) + 2 Σ_{u<v} √(r_u r_v)(x) ρ(u, x_u, v, x_v) + ε

with independent normal priors: the sensitivities' law is the prior mean, α what it does not see, θ errors of the
measured sensitivities (∂ log H / ∂ log s = r), and ρ the cross terms of two units that were not measured, relative to
√(s_u s_v). CLADO measures all of them one by one (Deng et al., "Mixed-Precision Quantization for Deep Vision Models
with Integer Quadratic Programming", DAC 2025, arXiv 2307.05657); here they are learned from whole plans, with their
uncertainty. Choices of one unit that are alike in sensitivity have alike effects.

There are many more weights than trials, so the posterior is computed in the dual form (Rasmussen, Williams, "Gaussian
Processes for Machine Learning", 2006, equations 2.11 and 2.12): only products of features are needed, and that of all
pairs is ((Σ k_u)² - Σ k_u²) / 2. The prior's variances maximize the marginal likelihood (equation 2.30).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag, solve_triangular

from lq_plugin.errors import QuantizationError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
#: A unit and its choice, another unit and its choice, and their harm beyond the sum: indices and a number.
Cross = tuple[int, int, int, int, float]

#: Prior variance of β: wide, for targets of unit variance.
_WIDE = 100.0
#: The least harm of a choice, as a share of the largest in its table: exact choices have log s = -∞.
_LEAST = 1e-5
#: The least harm of a plan, as a share of the sum over its units: pairs may cancel more than there is.
_LEAST_OF_SUM = 0.1
#: Plans that are predicted at once: their features stay in the caches.
_ROWS = 512
#: Added to the diagonal, for a kernel matrix that is positive in float64 as well.
_JITTER = 1e-8


@dataclass(frozen=True)
class Prior:
    """Standard deviations of the weights and of the noise, for targets of unit variance.

    Args:
        single: of Σ_u α.
        share: of Σ_u r_u θ for a plan in which one unit does all harm.
        pair: of the sum over pairs for a plan in which two units do half of the harm each.
        noise: of ε.
        length: log sensitivities that are so far apart have effects of correlation exp(-½).
        own: share of an effect's variance that belongs to its choice alone.
    """

    single: float = 0.3
    share: float = 0.5
    pair: float = 0.5
    noise: float = 0.1
    length: float = 2.0
    own: float = 0.2


#: What is tried for each field, in turn.
_GRID: dict[str, tuple[float, ...]] = {
    "noise": (0.02, 0.05, 0.1, 0.2, 0.4),
    "single": (0.0, 0.1, 0.3, 0.6, 1.0, 2.0),
    "share": (0.0, 0.2, 0.5, 1.0, 2.0),
    "pair": (0.0, 0.2, 0.5, 1.0, 2.0),
    "length": (1.0, 2.0, 4.0),
    "own": (0.05, 0.2, 0.6),
}


class Features:
    """Products of the features of plans.

    Args:
        harms: of each choice of each unit; a plan is an index into each of them.
        pairs: that were measured, each once.

    Raises:
        QuantizationError: a harm that is no finite number.
    """

    def __init__(self, harms: Sequence[Floats], pairs: Sequence[Cross] = ()) -> None:
        self.pairs = pairs
        self.harms = [np.asarray(row, dtype=np.float64) for row in harms]
        odd = [unit for unit, row in enumerate(self.harms) if not np.isfinite(row).all()]
        if odd:
            raise QuantizationError(
                f"harms are finite numbers, those of unit {odd[0]} are {self.harms[odd[0]].tolist()}"
            )
        largest = max((float(row.max()) for row in self.harms), default=0.0) or 1.0
        self.harms = [np.maximum(row, _LEAST * largest) for row in self.harms]

    def shares(self, plans: Ints) -> tuple[Floats, Floats]:
        """Returns log H `[plans]` and r `[plans, units]`."""
        each = np.stack([row[plans[:, unit]] for unit, row in enumerate(self.harms)], 1)
        total = each.sum(1)
        harm = total.copy()
        for unit, choice, other, other_choice, cross in self.pairs:
            harm += cross * ((plans[:, unit] == choice) & (plans[:, other] == other_choice))
        return np.log(np.maximum(harm, _LEAST_OF_SUM * total)), each / total[:, None]

    def alike(self, prior: Prior) -> list[Floats]:
        """Returns the correlation of the effects of any two choices of each unit, `[choices, choices]`."""
        found = []
        for row in self.harms:
            apart = (np.log(row)[:, None] - np.log(row)[None]) / prior.length
            found.append((1 - prior.own) * np.exp(-0.5 * apart**2) + prior.own * np.eye(len(row)))
        return found

    def products(self, one: Ints, other: Ints, prior: Prior, sides: Sequence[Floats] = ()) -> tuple[Floats, ...]:
        """Returns the sums over products of features `[one, other]` of α, θ and ρ, for weights of unit variance.

        Args:
            one, other: plans, `[plans, units]`.
            prior: for what choices have in common.
            sides: what `sides` gives for `other`, where it is at hand.
        """
        ones, shares, roots = sides or self.sides(other, prior)
        mine = self.shares(one)[1]
        single = self._chosen(one, np.ones_like(mine)) @ ones / len(self.harms)
        share, square = np.hsplit(self._chosen(one, mine) @ shares, 2)
        return single, share, 2.0 * ((self._chosen(one, np.sqrt(mine)) @ roots) ** 2 - square)

    def sides(self, plans: Ints, prior: Prior) -> tuple[Floats, Floats, Floats]:
        """Returns what the features of other plans are multiplied by, `[choices, plans]`; of shares two side by side.

        Products of matrices: many times faster than unit by unit.
        """
        alike = block_diag(*self.alike(prior))
        theirs = self.shares(plans)[1]
        ones, shares, roots = (self._chosen(plans, each).T for each in (np.ones_like(theirs), theirs, np.sqrt(theirs)))
        return alike @ ones, np.hstack([alike @ shares, alike**2 @ shares]), alike @ roots

    def _chosen(self, plans: Ints, weights: Floats) -> Floats:
        """Returns a row for each plan, with a weight `[plans, units]` for each choice that it makes."""
        sizes = [len(row) for row in self.harms]
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        found = np.zeros((len(plans), sum(sizes)))
        found[np.arange(len(plans))[:, None], starts + plans] = weights
        return found

    def kernel(self, one: Ints, other: Ints, prior: Prior, sides: Sequence[Floats] = ()) -> Floats:
        """Returns the prior covariance of what two lists of plans score, without noise; see `products`.

        Args:
            one, other: plans, `[plans, units]`.
            prior: the parameters of the covariance.
            sides: of `products`.
        """
        parts = self.products(one, other, prior, sides)
        return self.combined(one, other, parts, prior)

    def combined(self, one: Ints, other: Ints, parts: Sequence[Floats], prior: Prior) -> Floats:
        """Returns the covariance from `products`.

        Args:
            one, other: plans, `[plans, units]`.
            parts: of `products`.
            prior: the parameters of the covariance.
        """
        mine, theirs = self.shares(one)[0], self.shares(other)[0]
        single, share, pair = parts
        law = _WIDE * (1.0 + np.outer(mine, theirs))
        found: Floats = law + prior.single**2 * single + prior.share**2 * share + prior.pair**2 * pair
        return found

    def variance(self, plans: Ints, prior: Prior) -> Floats:
        """Returns the prior variance of what each plan scores: the diagonal of the kernel."""
        log_harm, shares = self.shares(plans)
        # Every choice is like itself, so that only the shares are left.
        pair = 2.0 * (shares.sum(1) ** 2 - (shares**2).sum(1))
        law = _WIDE * (1.0 + log_harm**2)
        found: Floats = law + prior.single**2 + prior.share**2 * (shares**2).sum(1) + prior.pair**2 * pair
        return found


class Regression:
    """The posterior after some finished trials.

    Args:
        features: of the space.
        plans: evaluated, `[trials, units]`.
        targets: what they scored, transformed, `[trials]`.
        prior: of the weights.
    """

    def __init__(self, features: Features, plans: Ints, targets: Floats, prior: Prior) -> None:
        self.features, self.plans, self.prior = features, plans, prior
        self._center, self._scale = float(targets.mean()), float(targets.std()) or 1.0
        self._targets = (targets - self._center) / self._scale
        self._sides = features.sides(plans, prior)
        kernel = features.kernel(plans, plans, prior, self._sides)
        self._root = _root(kernel, prior)
        inverse_root = solve_triangular(self._root, np.eye(len(kernel)), lower=True)
        self._inverse: Floats = inverse_root.T @ inverse_root
        self._weights: Floats = self._inverse @ self._targets

    @cached_property
    def evidence(self) -> float:
        """The log marginal likelihood of the targets."""
        return _evidence(self._root, self._targets) - len(self._targets) * float(np.log(self._scale))

    def predict(self, plans: Ints) -> tuple[Floats, Floats]:
        """Returns mean and standard deviation of what plans would score, noise left out.

        Args:
            plans: `[plans, units]`.
        """
        if len(plans) > _ROWS:
            parts = [self.predict(plans[start : start + _ROWS]) for start in range(0, len(plans), _ROWS)]
            means, deviations = zip(*parts, strict=True)
            return np.concatenate(means), np.concatenate(deviations)
        cross = self.features.kernel(plans, self.plans, self.prior, self._sides)
        mean = cross @ self._weights
        variance = self.features.variance(plans, self.prior) - ((cross @ self._inverse) * cross).sum(1)
        deviation = np.sqrt(np.maximum(variance, _JITTER))
        return self._center + self._scale * mean, self._scale * deviation

    @property
    def noise(self) -> float:
        """Standard deviation of the noise, in the targets' unit."""
        return self.prior.noise * self._scale


def likeliest(features: Features, plans: Ints, targets: Floats, start: Prior | None = None) -> Prior:
    """Returns the prior with the largest marginal likelihood, by a search along one field after the other.

    Args:
        features: of the space.
        plans: evaluated.
        targets: what they scored, transformed.
        start: of the search.
    """
    scaled = (targets - targets.mean()) / (float(targets.std()) or 1.0)
    best = start or Prior()
    known: dict[tuple[float, float], tuple[Floats, ...]] = {}

    def evidence(prior: Prior) -> float:
        key = prior.length, prior.own
        if key not in known:
            known[key] = features.products(plans, plans, prior)
        return _evidence(_root(features.combined(plans, plans, known[key], prior), prior), scaled)

    value = evidence(best)
    for _ in range(3):
        before = best
        for field, values in _GRID.items():
            for tried in values:
                other = replace(best, **{field: tried})
                if other != best and (found := evidence(other)) > value:
                    best, value = other, found
        if best == before:
            break
    return best


def _root(kernel: Floats, prior: Prior) -> Floats:
    noise = (prior.noise**2 + _JITTER) * np.eye(len(kernel))
    return np.asarray(np.linalg.cholesky(kernel + noise), dtype=np.float64)


def _evidence(root: Floats, targets: Floats) -> float:
    solved = solve_triangular(root, targets, lower=True)
    total = -0.5 * solved @ solved - np.log(np.diag(root)).sum() - 0.5 * len(targets) * np.log(2 * np.pi)
    return float(total)
