"""PACT's gradients and TTQ's levels by the kernels, against numpy, in every variant that runs here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lq_plugin.functional.pact import fake_quantize_pact
from lq_plugin.functional.ttq import ternarize_learned
from lq_plugin.native import available, trained as trained_module, use_native
from lq_plugin.native.trained import TrainedKernels

if not available():
    pytest.skip("no C++ compiler", allow_module_level=True)

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(SINGLE, SINGLE), (BRAIN, BRAIN), (HALF, HALF), (SINGLE, BRAIN), (SINGLE, HALF)]


@pytest.fixture(params=[*TrainedKernels().variants, "torch"])
def variant(request, monkeypatch):
    """None of them: torch operations."""
    if request.param != "torch":
        kernels = TrainedKernels(request.param)
        monkeypatch.setattr(trained_module, "_compiled", lambda: kernels)
    with use_native(request.param != "torch"):
        yield request.param


@pytest.fixture(params=PAIRS, ids=lambda pair: "-to-".join(str(dtype).removeprefix("torch.") for dtype in pair))
def pair(request):
    return request.param


def numbers(shape, dtype, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    x.view(-1)[::5] = (x.view(-1)[::5] * 2).round() / 2  # on the bounds themselves, and zeros
    return x.to(dtype)


def same(mine, values, dtype):
    """Values of numpy, rounded to the dtype."""
    return mine.dtype == dtype and torch.equal(mine.float(), torch.from_numpy(values).to(dtype).float())


@pytest.mark.parametrize("alpha", [(1,), (3, 1, 1)])
@pytest.mark.parametrize("shape", [(4, 3, 37, 5), (2, 3, 130, 130), (1, 3, 1, 2)])
def test_pact(variant, pair, shape, alpha):
    for memory in (torch.contiguous_format, torch.channels_last) if alpha == (1,) else (torch.contiguous_format,):
        x = numbers(shape, pair[0]).contiguous(memory_format=memory).requires_grad_()
        bound = torch.tensor([1.5, 2.0, 0.5][: alpha[0]]).view(alpha).requires_grad_()
        y = fake_quantize_pact(x, bound, 16, pair[1])
        upstream = numbers(shape, pair[1], seed=1)
        y.backward(upstream)
        v, a, g = x.detach().float().numpy(), bound.detach().numpy(), upstream.float().numpy()
        scale = a / np.float32(15)
        assert same(y.detach(), np.clip(np.rint(v * (np.float32(1) / scale)), 0, 15) * scale, pair[1])
        assert same(x.grad, np.where((v < 0) | (v >= a), np.float32(0), g), pair[0])
        above = np.where(v >= a, g, np.float32(0)).astype(np.float64)
        wanted = above.sum() if alpha == (1,) else above.sum((0, 2, 3))
        np.testing.assert_allclose(bound.grad.flatten().numpy(), np.atleast_1d(wanted), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("shape", "rows"), [((6, 5, 3, 3), 6), ((6, 5, 3, 3), 1), ((3, 40_001), 3), ((1, 2), 1)])
def test_ttq(variant, pair, shape, rows):
    x, sizes = numbers(shape, pair[0]).requires_grad_(), (rows, *[1] * (len(shape) - 1))
    threshold = torch.linspace(0.5, 1.0, rows).view(sizes)
    positive, negative = (torch.linspace(low, 2.0, rows).view(sizes).requires_grad_() for low in (0.3, 0.7))
    y = ternarize_learned(x, threshold, positive, negative, 0.25, pair[1])
    upstream = numbers(shape, pair[1], seed=1)
    y.backward(upstream)
    v, g = x.detach().float().numpy(), upstream.float().numpy()
    t, p, n = (value.detach().numpy() for value in (threshold, positive, negative))
    above, below = v > t, v < -t
    assert same(y.detach(), np.where(above, p, np.where(below, -n, np.float32(0))), pair[1])
    assert same(x.grad, np.where(above, p, np.where(below, n, np.float32(1))) * g, pair[0])
    for scale, where, sign in ((positive, above, 1.0), (negative, below, -1.0)):
        sums = np.where(where, g, 0).astype(np.float64).reshape(rows, -1).sum(1)
        np.testing.assert_allclose(scale.grad.flatten().numpy(), sign * 0.25 * sums, rtol=1e-6, atol=1e-6)
        assert scale.grad.shape == sizes


def test_second_derivatives_are_those_of_torch_operations():
    found = []
    for on in (True, False):
        x = numbers((5, 7), SINGLE).requires_grad_()
        alpha = torch.tensor([1.5]).requires_grad_()
        scales = [torch.tensor([0.5]).view(1, 1).requires_grad_() for _ in range(2)]
        with use_native(on):
            y = fake_quantize_pact(x, alpha, 16) * ternarize_learned(x, torch.full((1, 1), 0.4), *scales)
            slopes = torch.autograd.grad(y.sum(), [x, alpha, *scales], create_graph=True)
            sum(slope.square().sum() for slope in slopes).backward()
        found.append([*(slope.detach() for slope in slopes), x.grad, *(scale.grad for scale in scales)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
