"""The target of asymmetric calibration against numpy's least squares, and the rounding towards it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lq_plugin.functional.gptaq import asymmetric_target
from lq_plugin.functional.gptq import gptq_quantize
from lq_plugin.intent.spec import IntegerGrid


def problem(columns: int = 16, samples: int = 80, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs of the float model and of the quantized one, `[samples, columns]`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, columns, generator=generator)
    floats = torch.randn(samples, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
    floats += 0.3 * torch.randn(samples, columns, generator=generator)
    mixing = torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=generator)
    return weight, floats, floats @ mixing + 0.1 * torch.randn(samples, columns, generator=generator)


def sums(floats: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return 2.0 * (x.T @ x).double(), 2.0 * ((floats - x).double().T @ x.double())


@pytest.mark.parametrize("dampening", [0.0, 0.01, 0.3])
def test_it_is_numpys_least_squares_fit_of_the_float_outputs(dampening: float) -> None:
    """min ‖V X - W X̃‖² + λ / 2 ‖V - W‖², as one least squares problem with λ's rows appended."""
    weight, floats, x = problem()
    hessian, difference = sums(floats, x)
    ridge = np.sqrt(dampening * float(hessian.diagonal().mean()) / 2) * np.eye(16)
    left = np.concatenate([x.double().numpy(), ridge])
    right = np.concatenate([floats.double().numpy() @ weight.double().numpy().T, ridge @ weight.double().numpy().T])
    want = np.linalg.lstsq(left, right, rcond=None)[0].T
    got = asymmetric_target(weight, hessian, difference, dampening)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-4)


def test_equal_inputs_leave_the_weight_as_it_is() -> None:
    weight, floats, _ = problem()
    assert torch.equal(asymmetric_target(weight, *sums(floats, floats)), weight.double())


def test_columns_whose_input_is_always_zero_stay_and_are_not_made_use_of() -> None:
    weight, floats, x = problem()
    x[:, [2, 9]] = 0.0
    got = asymmetric_target(weight, *sums(floats, x))
    live = [j for j in range(16) if j not in (2, 9)]
    assert torch.equal(got[:, [2, 9]], weight[:, [2, 9]].double())
    hessian, difference = sums(floats, x)
    # The float inputs of dead columns are made up for by live ones: their rows of the differences count.
    damped = hessian[live][:, live] + 0.01 * hessian.diagonal()[live].mean() * torch.eye(14)
    want = weight[:, live].double() + torch.linalg.solve(damped, (weight.double() @ difference[:, live]).T).T
    torch.testing.assert_close(got[:, live], want)


def test_leading_dims_are_problems_of_their_own() -> None:
    problems = [problem(seed=seed) for seed in range(3)]
    pairs = [sums(floats, x) for _, floats, x in problems]
    weights = torch.stack([weight for weight, _, _ in problems])
    got = asymmetric_target(weights, *(torch.stack(t) for t in zip(*pairs, strict=True)))
    for index, pair in enumerate(pairs):
        torch.testing.assert_close(got[index], asymmetric_target(weights[index], *pair))


@pytest.mark.parametrize("seed", range(5))
def test_rounding_towards_it_comes_nearer_to_the_float_outputs(seed: int) -> None:
    weight, floats, x = problem(seed=seed)
    hessian, difference = sums(floats, x)
    grid, zero = IntegerGrid(-4, 3), torch.zeros(())
    scale = (weight.abs().amax(1, keepdim=True) / 3.5).expand_as(weight)
    plain = gptq_quantize(weight, hessian, scale, zero, grid)
    mine = gptq_quantize(asymmetric_target(weight, hessian, difference), hessian, scale, zero, grid)
    errors = [float((x @ w.T - floats @ weight.T).square().sum()) for w in (mine, plain)]
    assert errors[0] < 0.9 * errors[1]
