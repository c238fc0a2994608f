"""Codebooks against brute force, scikit-learn, and plain loops."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.cluster import KMeans

from lq_plugin.functional.codebook import (
    METHODS,
    assign,
    codebook_kmeans,
    fake_quantize_codebook,
    lloyd,
    lookup,
    midpoints,
)
from lq_plugin.functional.exact_kmeans import exact_centroids, summary, weighted_kmeans

methods = pytest.mark.parametrize("method", METHODS)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def inertia(rows: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    return (rows.double() - lookup(centroids, assign(rows, centroids)).double()).square().sum(1)


def brute_force(values: np.ndarray, levels: int) -> float:
    """The smallest squared error over all cuts of the sorted values into at most `levels` runs."""
    values = np.sort(values.astype(np.float64))
    n = len(values)
    cuts = combinations(range(1, n), min(levels, n) - 1)
    return min(sum(((part - part.mean()) ** 2).sum() for part in np.split(values, cut)) for cut in cuts)


def bimodal(rows: int = 3, n: int = 500) -> torch.Tensor:
    x = torch.randn(rows, n, generator=seeded())
    return torch.where(torch.rand(rows, n, generator=seeded()) < 0.3, 5 + x / 4, x)


@given(
    hnp.arrays(
        np.float32, st.integers(1, 9), elements=st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1.0, 2.0])
    ),
    st.integers(1, 5),
)
@example(np.array([0, 0, 0, 1, -2e-22], np.float32), 3)
def test_exact_is_the_optimum(values, levels):
    rows = torch.from_numpy(values)[None]
    centroids = codebook_kmeans(rows, levels, "exact")
    assert centroids.shape == (1, levels)
    assert (centroids.diff(dim=1) >= 0).all()
    best = brute_force(values, levels)
    assert inertia(rows, centroids).item() == pytest.approx(
        best, rel=1e-5, abs=1e-7 * (1 + float(np.square(values).sum()))
    )


@pytest.mark.parametrize("levels", [2, 4, 7, 16])
def test_exact_is_at_least_as_good_as_sklearn(levels):
    rows = bimodal()
    mine = inertia(rows, codebook_kmeans(rows, levels, "exact"))
    for row, got in zip(rows, mine, strict=True):
        best = KMeans(levels, n_init=10, random_state=0).fit(row.double().numpy()[:, None])
        assert got.item() <= best.inertia_ * (1 + 1e-6)
        assert got.item() > 0.5 * best.inertia_


# Not 16 linear ones: some have no members, and scikit-learn moves those at another moment.
@pytest.mark.parametrize(("start", "levels"), [("linear", 4), ("quantile", 4), ("quantile", 16)])
def test_lloyd_ends_where_sklearn_does_from_the_same_start(levels, start):
    rows = bimodal(2, 400)
    if start == "linear":
        centroids = torch.stack([torch.linspace(float(r.min()), float(r.max()), levels) for r in rows])
    else:
        centroids = torch.quantile(rows, (torch.arange(levels) + 0.5) / levels, dim=1).T.contiguous()
    got = lloyd(rows.sort(1).values, centroids, 300)
    for row, first, mine in zip(rows, centroids, got, strict=True):
        theirs = KMeans(levels, init=first.double().numpy()[:, None], n_init=1, max_iter=300, tol=0.0).fit(
            row.double().numpy()[:, None]
        )
        np.testing.assert_allclose(mine.numpy(), np.sort(theirs.cluster_centers_[:, 0]), atol=1e-5)


@methods
def test_centroids_are_the_means_of_their_members(method):
    rows = bimodal()
    centroids = codebook_kmeans(rows, 6, method, seeded())
    indices = assign(rows, centroids)
    for r in range(3):
        want = torch.stack([rows[r][indices[r] == k].mean() for k in range(6)])
        torch.testing.assert_close(centroids[r], want)
    assert (inertia(rows, centroids) <= 3 * inertia(rows, codebook_kmeans(rows, 6, "exact"))).all()


@methods
def test_rows_do_not_depend_on_each_other(method):
    if method == "kmeans++":
        pytest.skip("draws depend on the number of rows")
    rows = torch.cat([bimodal(), 100 * bimodal() + 7])
    together = codebook_kmeans(rows, 5, method)
    apart = torch.cat([codebook_kmeans(row[None], 5, method) for row in rows])
    torch.testing.assert_close(together, apart)


def test_seeds_of_kmeans_plus_plus():
    rows = bimodal()
    once, again = (codebook_kmeans(rows, 8, "kmeans++", seeded()) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, codebook_kmeans(rows, 8, "kmeans++", torch.Generator().manual_seed(1)))


def test_kmeans_plus_plus_draws_distinct_weights_by_squared_distance():
    row = torch.tensor([[0.0, 0.0, 0.0, 1.0, 3.0]])
    three = {
        tuple(codebook_kmeans(row, 3, "kmeans++", torch.Generator().manual_seed(s), iterations=0)[0].tolist())
        for s in range(50)
    }
    assert three == {(0.0, 1.0, 3.0)}
    # First 0 (3 of 5), then 3 rather than 1 with 9 : 1; first 1, then 3 with 4 : 3; first 3, then 0 with 27 : 4.
    pairs = [
        tuple(codebook_kmeans(row, 2, "kmeans++", torch.Generator().manual_seed(s), iterations=0)[0].tolist())
        for s in range(1500)
    ]
    want = {
        (0.0, 3.0): 0.6 * 0.9 + 0.2 * 27 / 31,
        (0.0, 1.0): 0.6 * 0.1 + 0.2 * 3 / 7,
        (1.0, 3.0): 0.2 * 4 / 7 + 0.2 * 4 / 31,
    }
    for pair, share in want.items():
        assert pairs.count(pair) / 1500 == pytest.approx(share, abs=0.04)


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 30)), elements=st.floats(-10, 10, width=32)),
    st.integers(1, 8),
    st.sampled_from(["linear", "quantile", "kmeans++"]),
)
def test_an_iteration_never_raises_the_error(array, levels, method):
    rows = torch.from_numpy(array)
    errors = [inertia(rows, codebook_kmeans(rows, levels, method, seeded(), iterations=count)) for count in range(6)]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-5) + 1e-8).all()


def test_a_tie_belongs_to_the_lower_centroid():
    row = torch.tensor([[0.0, 1.0, 2.0]])
    assert lloyd(row, torch.tensor([[0.0, 2.0]]), iterations=1).tolist() == [[0.5, 2.0]]


def test_centroids_without_members_move_to_the_farthest_weights():
    row = torch.tensor([[0.0, 1.0, 2.0, 10.0, 14.0]])
    # Means 1 and 12, both others are unused: 10 and 14 are the farthest, the lower first.
    got = lloyd(row, torch.tensor([[-50.0, 1.0, 11.0, 90.0]]), iterations=1)
    assert got.tolist() == [[1.0, 10.0, 12.0, 14.0]]
    # 12 now has no members: the next one moves to 0.
    assert lloyd(row, got).tolist() == [[0.0, 1.5, 10.0, 14.0]]


@methods
def test_fewer_distinct_weights_than_levels(method):
    rows = torch.tensor([[1.0, 1.0, 4.0], [2.0, 2.0, 2.0]])
    centroids = codebook_kmeans(rows, 8, method, seeded())
    assert centroids.isfinite().all()
    assert torch.equal(lookup(centroids, assign(rows, centroids)), rows)


def test_summaries_of_long_rows():
    rows = torch.cat([bimodal(1, 50_000), torch.tensor([[400.0]])], 1)  # an outlier must not take all the points
    exact = inertia(rows, codebook_kmeans(rows, 8, "exact", max_points=50_001))
    for points in (256, 4096):
        approximate, optimal = exact_centroids(rows.sort(1).values, 8, points)
        assert not optimal
        assert inertia(rows, approximate).item() < exact.item() * (1.01 if points == 4096 else 1.2)
        polished = inertia(rows, codebook_kmeans(rows, 8, "exact", max_points=points)).item()
        assert exact.item() <= polished * (1 + 1e-6)
        assert polished < exact.item() * (1.0001 if points == 4096 else 1.01)


@pytest.mark.parametrize(("levels", "error"), [(2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497)])
def test_lloyd_and_max_s_table_for_the_normal_distribution(levels, error):
    # Max, "Quantizing for Minimum Distortion", 1960, table I, on the normal quantiles instead of a sample.
    probability = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    rows = torch.special.ndtri(probability).float()[None]
    for method in METHODS[:3]:
        centroids = codebook_kmeans(rows, levels, method, iterations=1000)
        assert inertia(rows, centroids).item() / 200_000 == pytest.approx(error, rel=2e-3)


@given(hnp.arrays(np.float64, st.integers(20, 60), elements=st.floats(-5, 5)), st.integers(4, 20))
def test_a_summary_keeps_count_and_sum(values, points):
    ordered = np.sort(values)
    means, counts = summary(ordered, points)
    assert len(means) <= points
    assert counts.sum() == len(values)
    assert (counts > 0).all()
    np.testing.assert_allclose((means * counts).sum(), values.sum(), atol=1e-9)
    assert (np.diff(means) >= -1e-12).all()


def test_weights_count_as_often():
    points, counts = np.array([0.0, 1.0, 4.0, 5.0, 9.0]), np.array([3, 1, 1, 2, 1])
    for levels in range(1, 6):
        repeated = np.repeat(points, counts)
        got = weighted_kmeans(points, counts, levels)
        nearest = np.abs(repeated[:, None] - got).min(1)
        assert np.square(nearest).sum() == pytest.approx(brute_force(repeated, levels))


@given(hnp.arrays(np.float32, 4, elements=st.floats(-(2.0**100), 2.0**100, width=32)), st.integers(0, 2))
def test_midpoints_are_the_last_numbers_of_the_lower_side(array, k):
    centroids = torch.from_numpy(np.sort(array))[None]
    middle = midpoints(centroids)[0, k]
    exact = (centroids[0, k].double() + centroids[0, k + 1].double()) / 2
    assert middle.double() <= exact < torch.nextafter(middle, torch.tensor(torch.inf)).double()


def test_assign_takes_the_nearest_and_the_lower_of_two():
    centroids = torch.tensor([[-1.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
    rows = torch.tensor([[-9.0, -0.5, 1.0, 1.01, 9.0], [0.0, 0.5, 0.51, -1.0, 2.0]])
    assert assign(rows, centroids).tolist() == [[0, 0, 1, 2, 2], [0, 1, 2, 0, 2]]  # of equal ones, either
    assert assign(rows, centroids[:, :1]).tolist() == [[0] * 5] * 2
    random = torch.randn(2, 999, generator=seeded())
    assert torch.equal(
        assign(random, centroids)[:1].long(), (random[:1, :, None] - centroids[:1, None]).abs().argmin(2)
    )
    assert assign(random, centroids).dtype == torch.uint8
    many = torch.linspace(-1, 1, 256).expand(2, 256)
    assert torch.equal(assign(many, many), torch.arange(256).to(torch.uint8).expand(2, 256))
    assert assign(random, torch.linspace(-3, 3, 300).expand(2, 300)).dtype == torch.int64


@pytest.mark.parametrize("gradient", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_gradients_of_the_centroids(gradient, dtype):
    x = bimodal(2, 60).requires_grad_()
    centroids = codebook_kmeans(x, 5, "exact")
    centroids[:, 4] = 1e6  # without members
    centroids.requires_grad_()
    indices = assign(x, centroids).to(dtype)
    upstream = torch.randn(2, 60)
    want = torch.zeros(2, 5)
    for r in range(2):
        for k in range(4):
            g = upstream[r][indices[r] == k]
            want[r, k] = g.sum() if gradient == "sum" else g.mean()
    y = lookup(centroids, indices, gradient)
    y.backward(upstream)
    torch.testing.assert_close(centroids.grad, want)
    centroids.grad = None
    z = fake_quantize_codebook(x, centroids, indices, gradient)
    z.backward(upstream)
    torch.testing.assert_close(centroids.grad, want)
    assert torch.equal(x.grad, upstream)
    assert torch.equal(y, z)
    assert torch.equal(y, torch.stack([c[i.long()] for c, i in zip(centroids, indices, strict=True)]))


def test_sum_is_the_gradient_of_the_forward_pass():
    centroids = torch.randn(2, 4, dtype=torch.float64, generator=seeded()).requires_grad_()
    indices = torch.randint(0, 4, (2, 20), generator=seeded())
    assert torch.autograd.gradcheck(lambda c: lookup(c, indices, "sum"), (centroids,))


@pytest.mark.parametrize("function", [lambda x, c, i: lookup(c, i), fake_quantize_codebook])
def test_sgd_moves_a_centroid_as_far_as_its_members_on_average(function):
    w, upstream = bimodal(2, 300), torch.randn(2, 300, generator=seeded())
    centroids = codebook_kmeans(w, 4, "exact")
    indices = assign(w, centroids).long()
    moved = w.double() - 0.05 * upstream.double()
    want = torch.stack([torch.stack([moved[r][indices[r] == k].mean() for k in range(4)]) for r in range(2)])
    trained = centroids.clone().requires_grad_()
    function(w.clone().requires_grad_(), trained, indices).backward(upstream)
    torch.optim.SGD([trained], lr=0.05).step()
    # The centroids start at the means of their members.
    torch.testing.assert_close(trained.detach(), want.float(), rtol=1e-4, atol=1e-5)


def test_dtypes_and_what_is_saved():
    x = torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True)
    centroids = torch.tensor([[-1.0, 1.0], [-2.0, 2.0]], requires_grad=True)
    indices = assign(x, centroids)
    y = fake_quantize_codebook(x, centroids, indices)
    assert y.dtype == torch.bfloat16
    assert [t.data_ptr() for t in y.grad_fn.saved_tensors] == [indices.data_ptr()]
    y.sum().backward()
    assert (x.grad.dtype, centroids.grad.dtype) == (torch.bfloat16, torch.float32)


def test_all_faults_at_once():
    with pytest.raises(ValueError, match=r"no method 'lloyd'.*levels must be at least 1, got 0.*rows must be finite"):
        codebook_kmeans(torch.tensor([[torch.nan]]), 0, "lloyd")
    with pytest.raises(ValueError, match="needs a generator"):
        codebook_kmeans(torch.ones(1, 3), 2, "kmeans++")
    with pytest.raises(ValueError, match=r"n ≥ 1, got \[2, 0\]"):
        codebook_kmeans(torch.ones(2, 0), 2)
    for function in (lambda: lookup(torch.ones(1, 2), torch.zeros(1, 3), "max"),):
        with pytest.raises(ValueError, match="one of mean, sum, got 'max'"):
            function()


@pytest.mark.parametrize("rows", [1, 7])
def test_what_is_worked_on_at_a_time_changes_nothing(rows, monkeypatch):
    weights = bimodal(rows, 10_007)
    start = torch.linspace(-3, 6, 8).repeat(rows, 1)
    expected = lloyd(weights.sort(1).values, start)
    found, values = assign(weights, expected), lookup(expected, assign(weights, expected))
    monkeypatch.setattr("lq_plugin.functional.codebook.AT_A_TIME", 5000)
    monkeypatch.setattr("lq_plugin.functional.codebook._BLOCK", 64)
    torch.testing.assert_close(lloyd(weights.sort(1).values, start), expected, rtol=1e-6, atol=0)
    assert torch.equal(assign(weights, expected), found)
    assert torch.equal(lookup(expected, found), values)


def test_a_summary_of_float32_is_that_of_its_values():
    row = bimodal(1, 20_000).sort(1).values[0].numpy()
    for mine, doubles in zip(summary(row, 512), summary(row.astype(np.float64), 512), strict=True):
        np.testing.assert_array_equal(mine, doubles)
