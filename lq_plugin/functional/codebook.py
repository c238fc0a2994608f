"""k-means codebooks: each weight is one of k = 2^b shared numbers, of which only the index is stored.

    i_j = argmin_k |w_j - C_k|  (ties to the lower),        ŵ_j = C_{i_j}

| method | centroids start | then |
|---|---|---|
| `linear` | evenly over [min, max] | Lloyd |
| `quantile` | at the quantiles (k + 1/2) / levels | Lloyd |
| `kmeans++` | at weights drawn with probability ∝ squared distance to the nearest one drawn before | Lloyd |
| `exact` | at the optimum of Σ (w - ŵ)² (`lq_plugin.functional.exact_kmeans`) | Lloyd, where it saw a summary only |

Lloyd's iteration assigns, then moves each centroid to the mean of its members. One that has none moves to the weight
that is farthest from its own centroid (several to the several farthest), so that the error never grows. With fewer
distinct weights than levels the centroids left over stay where they were, and nothing is assigned to them.

Backward (g = ∂L/∂ŵ):

    ∂L/∂C_k = Σ_j g_j · 1{i_j = k} / n_k    (`mean`; `sum`, the paper's, does not divide by n_k = Σ_j 1{i_j = k})
    ∂L/∂w_j = g_j                           (straight through, in `fake_quantize_codebook`)

With `mean` a step of SGD moves a centroid as far as its members would have moved on average, so that the learning rate
of the weights suits it. A sum over thousands of weights takes a rate thousands of times smaller; to Adam both are the
same.

n weights take n · b bits and 32 · k for the codebook.

Reference: Han, Mao, Dally, "Deep Compression", ICLR 2016 (arXiv 1510.00149), section 3, eqs. 2 and 3; it finds
`linear` best for accuracy after fine-tuning. Arthur, Vassilvitskii, "k-means++", SODA 2007.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lq_plugin.functional.exact_kmeans import exact_centroids
from lq_plugin.functional.pieces import AT_A_TIME, sort_rows

Method = Literal["exact", "linear", "quantile", "kmeans++"]
Gradient = Literal["mean", "sum"]
METHODS: tuple[str, ...] = get_args(Method)
#: Lloyd iterations at most; in one dimension tens are enough for the error to settle.
ITERATIONS = 100
#: Summary points of a row that `exact` solves for; a row with no more distinct weights is solved as it is.
MAX_POINTS = 4096
#: Values of a long row that have one sum.
_BLOCK = 1024


def codebook_kmeans(
    rows: Tensor,
    levels: int,
    method: Method = "linear",
    generator: torch.Generator | None = None,
    iterations: int = ITERATIONS,
    max_points: int = MAX_POINTS,
) -> Tensor:
    """Returns the centroids of each row.

    Args:
        rows: `[R, n]`, finite; what shares a codebook in a row (`lq_plugin.functional.grouping.to_rows`).
        levels: k, at least 1.
        method: how they are found.
        generator: of the random draws; `kmeans++` needs one.
        iterations: of Lloyd, at most.
        max_points: of `exact`, see `exact_centroids`.

    Returns:
        Float32 `[R, levels]`, ascending.

    Raises:
        ValueError: listing all of: an unknown method, no levels, no weights or non-finite ones, no generator.

    >>> codebook_kmeans(torch.tensor([[0.0, 0.1, 1.0, 1.2, 5.0]]), 3)
    tensor([[0.0500, 1.1000, 5.0000]])
    """
    _check(rows, levels, method, generator)
    ordered = sort_rows(rows.detach().to(torch.float32, copy=True))
    if method == "exact":
        centroids, optimal = exact_centroids(ordered, levels, max_points)
        iterations = 0 if optimal else iterations
    elif method == "linear":
        low, high = ordered[:, :1], ordered[:, -1:]
        ramp = torch.linspace(0, 1, levels, device=rows.device)
        centroids = low * (1 - ramp) + high * ramp
    elif method == "quantile":
        position = ((torch.arange(levels, device=rows.device) + 0.5) / levels * ordered.shape[1]).long()
        centroids = ordered[:, position]
    else:
        assert generator is not None
        centroids = _plus_plus(ordered, levels, generator)
    return lloyd(ordered, centroids, iterations)


def lloyd(ordered: Tensor, centroids: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Runs Lloyd's iteration until nothing moves, or a number of times.

    Args:
        ordered: `[R, n]`, each row ascending.
        centroids: `[R, levels]`, where to start; ascending.

    Returns:
        Float32 `[R, levels]`, ascending.

    >>> lloyd(torch.tensor([[0.0, 1.0, 8.0, 9.0]]), torch.tensor([[-5.0, 4.0]]))  # -5 has no members at first
    tensor([[0.5000, 8.5000]])
    """
    count = ordered.shape[1]
    if len(ordered) > 1 and ordered.numel() > AT_A_TIME:
        step = max(AT_A_TIME // count, 1)
        pairs = zip(ordered.split(step), centroids.split(step), strict=True)
        return torch.cat([lloyd(some, start, iterations) for some, start in pairs])
    sums_before = _prefix_sums(ordered)
    for _ in range(iterations):
        inner = torch.searchsorted(ordered, midpoints(centroids), right=True)
        edges = torch.nn.functional.pad(inner, (1, 0))
        edges = torch.cat([edges, torch.full_like(edges[:, :1], count)], 1)
        first, last = edges[:, :-1], edges[:, 1:]
        members = last - first
        means = ((sums_before(last) - sums_before(first)) / members.clamp(min=1)).float()
        # The difference of two long sums may miss its members by a rounding.
        means = means.clamp(ordered.gather(1, first.clamp(max=count - 1)), ordered.gather(1, (last - 1).clamp(min=0)))
        moved = torch.where(members > 0, means, centroids)
        if (members == 0).any():
            moved = _refill(ordered, moved, first, last)
        moved = moved.sort(1).values
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _prefix_sums(ordered: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns a function from indices `[R, k]` to the float64 sums of the values before them.

    For one long row it keeps no sum for each of its values.
    """
    if ordered.numel() <= AT_A_TIME:
        sums = torch.nn.functional.pad(ordered.double().cumsum(1), (1, 0))
        return lambda index: sums.gather(1, index)
    row, block = ordered[0], _BLOCK
    blocks = row[: len(row) // block * block].view(-1, block)
    whole = torch.cat([some.double().sum(1) for some in blocks.split(AT_A_TIME // 4 // block)])
    before = torch.nn.functional.pad(whole.cumsum(0), (1, 0))
    inside = torch.arange(block, device=row.device)

    def of_one_row(index: Tensor) -> Tensor:
        starts = index[0] // block * block
        places = (starts.unsqueeze(1) + inside).clamp(max=len(row) - 1)
        rest = row[places].double() * (inside < (index[0] - starts).unsqueeze(1))
        return (before[index[0] // block] + rest.sum(1)).unsqueeze(0)

    return of_one_row


def midpoints(centroids: Tensor) -> Tensor:
    """Returns the largest float32 not above the middle of each two neighbours, `[R, levels - 1]`.

    A weight is not above it exactly if it is not nearer to the upper neighbour.

    >>> midpoints(torch.tensor([[0.0, 1.0, 4.0]]))
    tensor([[0.5000, 2.5000]])
    """
    exact = (centroids[:, :-1].double() + centroids[:, 1:].double()) / 2
    rounded = exact.float()
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.double() > exact, below, rounded).contiguous()


def assign(rows: Tensor, centroids: Tensor) -> Tensor:
    """Returns the index of the nearest centroid, ties to the lower.

    Args:
        rows: `[R, n]`.
        centroids: `[R, levels]`, ascending.

    Returns:
        `[R, n]`, uint8 up to 256 levels, int64 above.

    >>> assign(torch.tensor([[0.1, 0.5, 9.0]]), torch.tensor([[0.0, 1.0, 4.0]]))
    tensor([[0, 0, 2]], dtype=torch.uint8)
    """
    bounds = midpoints(centroids.detach().float())
    indices = torch.empty(
        rows.shape, dtype=torch.uint8 if centroids.shape[1] <= 256 else torch.int64, device=rows.device
    )
    for some in _columns(rows):
        indices[:, some] = torch.searchsorted(bounds, rows[:, some].detach().float().contiguous())
    return indices


def _columns(rows: Tensor) -> Iterator[slice]:
    """Yields slices of all columns, small enough that an eight-byte index for each element takes little memory."""
    step = max(AT_A_TIME // 4 // max(len(rows), 1), 1)
    yield from (slice(start, start + step) for start in range(0, rows.shape[1], step))


def _values(centroids: Tensor, indices: Tensor) -> Tensor:
    values = torch.empty(indices.shape, dtype=centroids.dtype, device=centroids.device)
    for some in _columns(indices):
        values[:, some] = centroids.gather(1, indices[:, some].long())
    return values


def lookup(centroids: Tensor, indices: Tensor, gradient: Gradient = "mean") -> Tensor:
    """Returns the centroids at indices; a centroid's gradient is the mean, or the sum, of its members'.

    Args:
        centroids: `[R, levels]`.
        indices: `[R, n]`, integers.
        gradient: `mean` or `sum`.

    Returns:
        `[R, n]`, in the dtype of the centroids.

    Raises:
        ValueError: for another `gradient`.

    >>> c = torch.tensor([[0.0, 1.0]], requires_grad=True)
    >>> lookup(c, torch.tensor([[1, 1, 0]])).backward(torch.tensor([[1.0, 2.0, 5.0]]))
    >>> c.grad
    tensor([[5.0000, 1.5000]])
    """
    _check_gradient(gradient)
    y: Tensor = _Lookup.apply(centroids, indices, gradient)
    return y


def fake_quantize_codebook(x: Tensor, centroids: Tensor, indices: Tensor, gradient: Gradient = "mean") -> Tensor:
    """Returns the centroids at indices; the gradient goes to them and straight through to the latent weights.

    Forward:  x̂_j = C_{i_j}

    Backward: ∂L/∂C_k = the mean of g_j over the members of k, or their sum;  ∂L/∂x_j = g_j

    Args:
        x: `[R, n]`, the weights that the indices stand for; only their gradient depends on them.
        centroids: `[R, levels]`.
        indices: `[R, n]`, integers.
        gradient: `mean` or `sum`.

    Returns:
        `[R, n]`, in the dtype of `x`.

    Raises:
        ValueError: for another `gradient`.

    >>> x = torch.tensor([[0.9, 0.2]], requires_grad=True)
    >>> c = torch.tensor([[0.0, 1.0]])
    >>> fake_quantize_codebook(x, c, assign(x, c)).sum().backward()
    >>> x.grad
    tensor([[1., 1.]])
    """
    _check_gradient(gradient)
    y: Tensor = _FakeQuantizeCodebook.apply(x, centroids, indices, gradient)
    return y


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, centroids: Any, indices: Any, gradient: Tensor) -> Any:
        ctx.save_for_backward(indices)
        ctx.levels, ctx.gradient = centroids.shape[1], gradient
        return _values(centroids, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        return _to_centroids(grad, indices, ctx.levels, ctx.gradient).to(grad.dtype), None, None


class _FakeQuantizeCodebook(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, centroids: Any, indices: Any, gradient: Tensor) -> Any:
        ctx.save_for_backward(indices)
        ctx.levels, ctx.gradient, ctx.dtype = centroids.shape[1], gradient, centroids.dtype
        return _values(centroids, indices).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (indices,), to_centroids = ctx.saved_tensors, None
        if ctx.needs_input_grad[1]:
            to_centroids = _to_centroids(grad, indices, ctx.levels, ctx.gradient).to(ctx.dtype)
        return grad, to_centroids, None, None


def _to_centroids(grad: Tensor, indices: Tensor, levels: int, gradient: str) -> Tensor:
    grad, indices = grad.to(torch.promote_types(grad.dtype, torch.float32)), indices.long()
    total = grad.new_zeros(grad.shape[0], levels).scatter_add_(1, indices, grad)
    if gradient == "mean":
        members = torch.zeros_like(total).scatter_add_(1, indices, torch.ones_like(grad))
        total /= members.clamp_(min=1)
    return total


def _refill(ordered: Tensor, centroids: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Moves centroids without members to the weights farthest from their centroids.

    In a sorted cluster these are its ends, so that each cluster has only two candidates.
    """
    members = last > first
    ends = torch.stack([first, last - 1], 2).clamp(0, ordered.shape[1] - 1)
    values = ordered.gather(1, ends.flatten(1))
    distance = (values - centroids.repeat_interleave(2, 1)).abs() * members.repeat_interleave(2, 1)
    farthest, order = distance.sort(stable=True, dim=1, descending=True)
    rank = (~members).cumsum(1) - 1  # the first without members takes the farthest weight
    rank = rank.clamp(min=0)
    replace = ~members & (farthest.gather(1, rank) > 0)
    return torch.where(replace, values.gather(1, order.gather(1, rank)), centroids)


def _plus_plus(ordered: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    rows, count = ordered.shape
    draws = torch.rand(levels, rows, 1, generator=generator, device=generator.device, dtype=torch.float64).to(
        ordered.device
    )
    chosen = [ordered.gather(1, (draws[0] * count).long().clamp(max=count - 1))]
    distance = (ordered - chosen[0]).double().square()
    for draw in draws[1:]:
        cumulative = distance.cumsum(1)
        # right=True: never a weight of probability 0, which does not raise the sum.
        index = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True).clamp(max=count - 1)
        chosen.append(ordered.gather(1, index))
        distance = torch.minimum(distance, (ordered - chosen[-1]).double().square())
    return torch.cat(chosen, 1).sort(1).values


def _check(rows: Tensor, levels: int, method: str, generator: torch.Generator | None) -> None:
    faults = []
    if method not in METHODS:
        faults.append(f"no method {method!r}, it is one of {', '.join(METHODS)}")
    if levels < 1:
        faults.append(f"levels must be at least 1, got {levels}")
    if rows.ndim != 2 or not rows.shape[1]:
        faults.append(f"rows must be [R, n] with n ≥ 1, got {list(rows.shape)}")
    elif not torch.stack([rows.amin(), rows.amax()]).isfinite().all():
        faults.append("rows must be finite")
    if method == "kmeans++" and generator is None:
        faults.append("kmeans++ draws at random and needs a generator")
    if faults:
        raise ValueError("codebook_kmeans: " + "; ".join(faults))


def _check_gradient(gradient: str) -> None:
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient must be one of {', '.join(get_args(Gradient))}, got {gradient!r}")
