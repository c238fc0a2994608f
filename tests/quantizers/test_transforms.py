"""Forward-mode derivatives and transforms of torch.func: values bit-equal, the derivatives of the backward pass."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp, vmap

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.model import quantizers
from lq_plugin.native import use_native
from tests.quantizers.test_format_contract import ESTIMATED, INPUTS, WEIGHTS

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # torch.func.jvp of torch 2.13
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
#: One of each kind of arithmetic; the others are slow only because they are many.
KINDS = {
    "weight": ("int4 per_channel mse", "int2 per_channel lsq", "int3 mse mad", "mxfp4:mse", "bwn:paper per_tensor",
               "ttq", "twn:exact per_channel", "seq", "kmeans2"),
    "input": ("fp8 ema", "int8 dynamic", "sign stochastic", "xnor", "uint4 pact", "uint8 affine ema"),
}  # fmt: skip
PLANS = [
    pytest.param(slot, spec, marks=[] if spec in KINDS[slot] else pytest.mark.slow)
    for slot, specs in (("weight", WEIGHTS), ("input", [*INPUTS, *ESTIMATED]))
    for spec in specs
]


def ready(slot, spec):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 6)), torch.randn(5, 20)
    prepare(net, QuantPlan([Rule("*", **{slot: spec})]))
    calibrate(net, [x])
    return net.train(), 2 * x


@pytest.mark.parametrize("native", [None, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("slot", "spec"), PLANS)
def test_every_mode_has_the_derivatives_of_the_backward_pass(slot, spec, native):
    net, x = ready(slot, spec)
    parameters = dict(net.named_parameters())
    tangents = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    u, t = torch.randn(5, 6), torch.randn_like(x)

    def run(parameters, x):
        return functional_call(net, parameters, (x,))

    with use_native(native):
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        if "kmeans" in spec:
            # Centroids are the mean of what is theirs, which is no function of single elements.
            with pytest.raises(RuntimeError, match="setup_context"):
                vjp(run, parameters, x)
            return
        wanted = torch.autograd.grad((y * u).sum(), [*parameters.values(), leaf], allow_unused=True)
        product = sum((g * v).sum() for g, v in zip(wanted, [*tangents.values(), t], strict=True) if g is not None)

        value, pull = vjp(run, parameters, x)
        assert torch.equal(value, y)
        found, on_x = pull(u)
        for expected, got in zip(wanted, [*found.values(), on_x], strict=True):
            torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected)

        value, tangent = jvp(run, (parameters, x), (tangents, t))
        assert torch.equal(value, y)
        torch.testing.assert_close((u * tangent).sum(), product, rtol=1e-4, atol=1e-4)

        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(p.detach(), tangents[name]) for name, p in parameters.items()}
            value, same = forward_ad.unpack_dual(run(duals, forward_ad.make_dual(x, t)))
            assert torch.equal(value, y)
            torch.testing.assert_close(same, tangent)


@pytest.mark.parametrize("plan", ["int8 per_channel / int8 mse", "int4 lsq / uint8 affine ema"])
def test_gradients_of_single_samples(plan):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 6)), torch.randn(5, 20)
    prepare(net, plan)
    calibrate(net, [x])
    net.train()
    moving = [quantizer for quantizer in quantizers(net) if getattr(quantizer, "moving", False)]
    for quantizer in moving:
        quantizer.observing = True
    parameters = dict(net.named_parameters())

    def loss(parameters, sample):
        return functional_call(net, parameters, (sample.unsqueeze(0),)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, 2 * x)
    seen = [(q.batch_min.clone(), q.batch_max.clone()) for q in moving]
    for index, sample in enumerate(2 * x):
        net.zero_grad()
        loss(parameters, sample).backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(found[name][index], parameter.grad)
    # What they noted are the extremes of all samples.
    assert seen == [(q.batch_min, q.batch_max) for q in moving]
