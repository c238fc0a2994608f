"""GPTQ over models: each kind of layer against the linear problem that it is, what is left out, and what comes of bad
input."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin import CalibrationError, QuantizationError, QuantPlan, Rule, calibrate, prepare
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.functional.gptq import gptq_quantize
from lq_plugin.ptq.batch_norm.correct import correct_batch_norm
from lq_plugin.ptq.gptq import quantize as quantize_module
from lq_plugin.ptq.gptq.hessian import InputHessian
from lq_plugin.ptq.gptq.quantize import gptq
from lq_plugin.ptq.layerwise.activation_cache import ActivationCache
from lq_plugin.ptq.layerwise.walk import UnitWalk

SPECS = [
    "int3 per_channel mse",
    "int2 affine mse per_channel",
    "int3",
    "int3 group4 mse ragged",
    "int4 group4:4 ragged",
    "int3 lsq",
]


def correlated(count: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel()
    mixing = torch.randn(3, size, generator=generator)
    x = torch.randn(count, 3, generator=generator) @ mixing + 0.2 * torch.randn(count, size, generator=generator)
    return x.reshape(count, *shape)


def prepared(
    net: nn.Module, batches: list[Any], weight: str = "int3 per_channel mse", inputs: str | None = None
) -> nn.Module:
    prepare(net, QuantPlan([Rule("*", weight=weight, input=inputs)]))
    calibrate(net, batches)
    return net.eval()


class Conv1D(nn.Module):
    """Hugging Face's linear layer, by its published definition: the weight is `[C_in, C_out]`."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"

LAYERS = {
    "HF Conv1D": (lambda: Conv1D(6, 12), (5, 12)),
    "linear": (lambda: nn.Linear(12, 6), (12,)),
    "linear on sequences": (lambda: nn.Linear(12, 6, bias=False), (5, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, dilation=2, padding=1), (6, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1)), (4, 5, 6)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same"), (4, 5, 5)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), (4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2), (8, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6), (6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=2), (2, 4, 4, 4)),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_and_granularity(kind: str, spec: str) -> None:
    torch.manual_seed(1)
    make, shape = LAYERS[kind]
    layer, x = make(), correlated(96, *shape)
    target = layer(x)
    net = prepared(nn.Sequential(layer), [x], spec)
    nearest = net(x)
    result = gptq(net, [x[:40], x[40:]])
    fit = result.layers["0"]
    assert not result.skipped
    assert torch.equal(layer.quantized_weight(), layer.weight), "the weights are the levels"
    errors = [float((y - target).double().square().sum()) for y in (nearest, net(x))]
    assert errors[1] <= errors[0] * (1 + 1e-6)
    bias = 0.0 if layer.bias is None else layer.bias.detach().reshape(-1, *[1] * (-layer.input_axis - 1))
    whole = float((target - bias).double().square().sum())
    assert fit.before == pytest.approx(errors[0] / whole, rel=1e-3)
    assert fit.after == pytest.approx(errors[1] / whole, rel=1e-3)


@torch.no_grad()
def test_rows_that_come_out_worse_are_rounded_to_nearest() -> None:
    """Clipped weights leave large errors, which columns that are clipped themselves cannot make up for."""
    worse = 0
    for seed in range(30):
        torch.manual_seed(seed)
        layer, x = nn.Linear(6, 16), correlated(40, 6, seed=seed)
        target = layer(x)
        net = prepared(nn.Sequential(layer), [x], "int2 per_tensor minmax")
        before = (net(x) - target).square().sum(0)
        fit = gptq(net, [x], dampening=1e-6).layers["0"]
        after = (net(x) - target).square().sum(0)
        assert (after <= before * (1 + 1e-4) + 1e-9).all()
        worse += fit.nearest_rows > 0
    assert worse, "no row was ever worse: the test shows nothing"


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_is_the_linear_problem_on_unfolded_columns(groups: int) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2, groups=groups, bias=False), correlated(64, 4, 7, 7)
    float_weight = conv.weight.clone()
    net = prepared(nn.Sequential(conv), [x])
    scale = conv.weight_quantizer.scale.clone()
    gptq(net, [x])
    columns = F.unfold(x, 3, dilation=2, padding=1, stride=2).transpose(1, 2).reshape(-1, 4 * 9)
    for g, part in enumerate(columns.chunk(groups, dim=1)):
        rows = slice(g * 8 // groups, (g + 1) * 8 // groups)
        linear = nn.Linear(part.shape[1], 8 // groups, bias=False)
        linear.weight.copy_(float_weight[rows].flatten(1))
        alone = prepared(nn.Sequential(linear), [part])
        alone[0].weight_quantizer.fix(scale[rows].flatten(1), torch.zeros(8 // groups, 1))
        gptq(alone, [part])
        torch.testing.assert_close(conv.weight[rows].flatten(1), linear.weight)
        if groups < 4:
            assert not torch.equal(linear.weight, alone[0].weight_quantizer(float_weight[rows].flatten(1)))


@torch.no_grad()
def test_inputs_come_from_the_quantized_layers_in_front() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6)), correlated(200, 12)
    weights = [net[i].weight.clone() for i in (0, 2)]
    prepared(net, [x], inputs="uint4 affine mse")
    first, second = net[0], net[2]
    gptq(net, [x[:70], x[70:]], act_order=False)
    inner = second.input_quantizer(net[1](first(x))).double()
    for layer, inputs, weight in ((first, first.input_quantizer(x).double(), weights[0]), (second, inner, weights[1])):
        quantizer = layer.weight_quantizer
        want = gptq_quantize(
            weight, inputs.T @ inputs, quantizer.scale, quantizer.zero_point, quantizer.spec.grid, act_order=False
        )
        torch.testing.assert_close(layer.weight.detach(), want)


@torch.no_grad()
def test_a_layer_that_is_called_twice_sees_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x[:, :8]) + self.fc(input=x[:, 8:])

    torch.manual_seed(0)
    net, x = Twice(), correlated(100, 16)
    weight = net.fc.weight.clone()
    prepared(net, [x])
    fit = gptq(net, [x]).layers["fc"]
    both, quantizer = torch.cat([x[:, :8], x[:, 8:]]).double(), net.fc.weight_quantizer
    assert fit.samples == 200
    want = gptq_quantize(weight, both.T @ both, quantizer.scale, quantizer.zero_point, quantizer.spec.grid)
    torch.testing.assert_close(net.fc.weight.detach(), want)


class Standardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Own(nn.LSTM):
    """A forward of its own, which may compute something else inside."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input, hx)


class Everything(nn.Module):
    """One of each kind that GPTQ does not do, and two that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.fc = nn.Linear(8, 8)
        self.lstm = Own(8, 8, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 8, 2)
        self.standardized = Standardized(1, 1, 3, padding=1)
        self.ternary = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 20, bias=False)
        self.tied.weight = self.embedding.weight
        self.xnor = nn.Linear(20, 4)
        self.unused = nn.Linear(8, 8)
        self.last = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.fc(self.embedding(tokens)))
        x = self.up(x.transpose(1, 2)).transpose(1, 2)
        x = self.standardized(x.unsqueeze(1)).squeeze(1)
        return self.last(self.xnor(self.tied(self.ternary(x))))


@torch.no_grad()
def test_what_it_cannot_do_is_listed_with_reasons() -> None:
    torch.manual_seed(0)
    net, tokens = Everything(), torch.randint(20, (16, 5))
    rules = [
        Rule("*", weight="int4 per_channel"),
        Rule("ternary", weight="ttq"),
        Rule("xnor", weight="int4", input="xnor"),
    ]
    prepare(net, QuantPlan(rules))
    calibrate(net, [tokens])
    before = copy.deepcopy(net.state_dict())
    result = gptq(net, [tokens])
    assert list(result.layers) == ["fc", "lstm.weight_ih_l0", "last"]
    reasons = {
        "embedding": "Embedding is no product",
        "lstm.weight_hh_l0": "inside the kernel of 'lstm'",
        "up": "transposed convolution",
        "standardized": "Standardized has a forward of its own",
        "ternary": "ttq has no levels under fixed scales",
        "tied": "shared with 'embedding.weight'",
        "xnor": "XNOR",
        "unused": "no batch reached it",
    }
    assert set(result.skipped) == set(reasons)
    for name, reason in reasons.items():
        assert reason in result.skipped[name], name
    changed = {
        key for key, value in net.state_dict().items() if key not in before or not torch.equal(value, before[key])
    }
    assert {key.split(".")[0] for key in changed} == {"fc", "lstm", "last"}
    assert "lstm.weight_hh_l0" not in changed


class Reader(nn.Module):
    """Queries, keys and values of one tensor, a gate and its partner of another, and a layer by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 8, bias=False), nn.Linear(12, 6)
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.softplus(x)
        y = torch.tanh(self.q(x) * self.k(x)).mean(-1, keepdim=True) * self.v(x)
        return self.down(torch.sigmoid(self.gate(y)) * self.up(y))


@torch.no_grad()
@pytest.mark.parametrize("spec", ["int3 per_channel mse", "int3 group4 ragged", "mxfp4"])
def test_layers_that_read_one_tensor_are_solved_for_as_one(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights that each gets by itself, and of a pass of the inputs for each tensor."""
    torch.manual_seed(0)
    x, net = correlated(96, 12), Reader()
    net = prepared(net, [x], spec)
    alone, sums = copy.deepcopy(net), []
    add = InputHessian.add
    monkeypatch.setattr(InputHessian, "add", lambda self, *args: sums.append(self) or add(self, *args))
    result = gptq(net, [x[:50], x[50:]])
    assert len(sums) == 2 * 3
    assert list(result.layers) == ["q", "k", "v", "gate", "up", "down"]
    monkeypatch.setattr(quantize_module._GPTQ, "_tensor_read", lambda *args: None)
    separate = gptq(alone, [x[:50], x[50:]])
    assert len(sums) == 2 * 3 + 2 * 6
    for name, fit in separate.layers.items():
        assert torch.equal(net.get_submodule(name).weight, alone.get_submodule(name).weight)
        found = result.layers[name]
        assert (found.before, found.after) == pytest.approx((fit.before, fit.after), rel=1e-6)
        assert (found.samples, found.nearest_rows, found.dead) == (fit.samples, fit.nearest_rows, fit.dead)


@torch.no_grad()
def test_layers_with_inputs_of_their_own_are_not_joined() -> None:
    """Quantized inputs have ranges of their own; views of one tensor are other tensors."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x)
            return self.first(y[:, :6]) + self.second(y[:, 6:])

    x = correlated(64, 12)
    for net, inputs in ((Views(), None), (Reader(), "uint8 affine")):
        walk = UnitWalk(prepared(net, [x], inputs=inputs), [x], net, ActivationCache(), "layer")
        options = {"dampening": 0.01, "act_order": True, "block_columns": 128}
        rounding = quantize_module._GPTQ(walk, options, False)
        assert {rounding._tensor_read(unit, {}, None) for unit in walk.units} == {None}


@torch.no_grad()
def test_it_is_idempotent_and_travels_in_the_state_dict() -> None:
    torch.manual_seed(0)
    x = correlated(100, 12)
    net = prepared(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)), [x], "int3 per_channel")
    fresh = copy.deepcopy(net)
    gptq(net, [x])
    y, state = net(x), copy.deepcopy(net.state_dict())
    assert all(layer.weight_quantizer.is_enabled for layer in (net[0], net[2]))
    gptq(net, [x])
    assert torch.equal(net(x), y)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), y)


@torch.no_grad()
@pytest.mark.parametrize("context", ["plain", "inference_mode", "autocast"])
def test_batches_and_contexts_do_not_matter(context: str) -> None:
    torch.manual_seed(0)
    x = correlated(90, 12)
    float_net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    plain = prepared(copy.deepcopy(float_net), [x])
    fit = gptq(plain, [x]).layers["0"]
    net = prepared(float_net, [x])
    batches = [{"x": part} for part in x.split([10, 50, 30])]
    mode = torch.inference_mode() if context == "inference_mode" else nullcontext()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=context == "autocast")
    with mode, autocast:
        found = gptq(net, iter(batches), lambda batch: net(batch["x"])).layers["0"]
    assert (found.before, found.after) == pytest.approx((fit.before, fit.after), rel=1e-4)
    same = [float((a.weight == b.weight).double().mean()) for a, b in ((plain[0], net[0]), (plain[2], net[2]))]
    assert same[0] == 1.0
    # The first layer's output, the second one's input, is bfloat16 under autocast.
    assert same[1] > (0.9 if context == "autocast" else 0.999)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = correlated(90, 12)
    one = prepared(nn.Sequential(nn.Linear(12, 16)), [x])
    other = copy.deepcopy(one)
    gptq(one, [x])
    torch.set_default_dtype(dtype)
    try:
        gptq(other, [x])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(one[0].weight, other[0].weight)


@torch.no_grad()
@pytest.mark.parametrize("dampening", [0.01, 1e-4])
@pytest.mark.parametrize("precision", ["highest", "medium", "autocast"])
def test_hessians_are_sums_over_all_batches(dampening: float, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's in float64; of float32 products where the dampening is far above their rounding, of float64 ones else."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(300, 4)), 3.0 + correlated(3000, 300)
    prepared(net, [x[:50]])
    found = []
    mean = InputHessian.mean_over_ranks
    monkeypatch.setattr(InputHessian, "mean_over_ranks", lambda self: found.append(mean(self)) or found[-1])
    torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            gptq(net, list(x.split(1100)), dampening=dampening)
    finally:
        torch.set_float32_matmul_precision("highest")
    rows = x.double().numpy()
    want = 2.0 * rows.T @ rows
    (hessian, difference), diagonal = found[0], np.sqrt(np.diag(want))
    off = np.abs(hessian[0].numpy() - want) / np.outer(diagonal, diagonal)
    assert difference is None
    assert off.max() < (1e-6 if dampening > 1e-3 else 1e-14)
    assert torch.equal(hessian, hessian.mT)


def _rank(rank: int, path: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{path}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)).eval()
    x = correlated(256, 2, 5, 5)
    prepared(net, [x], inputs="uint4 affine")
    alone = copy.deepcopy(net)
    gptq(net, [x[rank::2]])
    torch.save(net.state_dict(), f"{path}/{rank}.pt")
    with pytest.raises(CalibrationError, match=r"in the process of rank 1"):
        gptq(net, [x] if rank == 0 else [])
    with pytest.raises(CalibrationError, match=r"NaN or Inf"):
        gptq(alone, [x if rank == 0 else x * torch.nan])
    dist.destroy_process_group()
    gptq(alone, [x])
    assert float((alone[4].weight == net[4].weight).double().mean()) > 0.95


@pytest.mark.slow
def test_processes_round_the_same(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def states(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


@torch.no_grad()
def test_bad_input_is_named_and_nothing_is_changed() -> None:
    torch.manual_seed(0)
    x = correlated(8, 12)
    net = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 4))
    with pytest.raises(CalibrationError, match="prepare it first"):
        gptq(net, [x])
    prepare(net, QuantPlan([Rule("*", weight="int3 per_channel mse", input="uint4 affine mse")]))
    with pytest.raises(CalibrationError, match=r"calibrate first: 4 faults(.|\n)*3.input .* has no range yet"):
        gptq(net, [x])
    calibrate(net.eval(), [x])
    with pytest.raises(CalibrationError, match="0 batches"):
        gptq(net, [])
    with pytest.raises(
        QuantizationError,
        match=r"2 faults\n.*dampening must not be negative, got -1\n.*block_columns is an integer from 1",
    ):
        gptq(net, [x], dampening=-1, block_columns=0)
    before = states(net)
    with pytest.raises(
        CalibrationError, match="GPTQ of '0': its Hessian is not positive definite, with a dampening of 0"
    ):
        gptq(net, [x], dampening=0.0)
    # The first layer has inputs enough, the second has not.
    with pytest.raises(CalibrationError, match="GPTQ of '3': its Hessian is not positive definite"):
        gptq(net, [correlated(15, 12)], dampening=0.0)
    assert not net[0].weight_quantizer.is_fixed
    assert net[0].weight_quantizer.is_enabled
    broken = x.clone()
    broken[2, 3] = torch.nan
    with pytest.raises(CalibrationError, match="GPTQ of '0': its weight or the products of its inputs hold NaN or Inf"):
        gptq(net, [x, broken])
    after = states(net)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not net[1]._forward_pre_hooks


@pytest.fixture(scope="module")
def digits() -> tuple[DigitsCNN, Tensor, Tensor, Tensor]:
    """A small CNN after a few epochs, training images, test images and labels."""
    seed_everything(0, verbose=False)
    model, data = DigitsCNN(width=8), DigitsDataModule()
    silent: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    Trainer(accelerator="cpu", devices=1, max_epochs=4, **silent).fit(model, datamodule=data)
    return model.eval(), data.splits["train"].tensors[0][:256], *data.splits["test"].tensors


@torch.no_grad()
@pytest.mark.parametrize("spec", ["w3 per_channel mse", "w3 per_tensor mse"])
def test_three_bit_weights_of_a_trained_network(digits: tuple[DigitsCNN, Tensor, Tensor, Tensor], spec: str) -> None:
    model, images, test_images, labels = digits
    batches, target = list(images.split(64)), model(test_images)
    nearest = copy.deepcopy(model)
    prepare(nearest, spec)
    calibrate(nearest, batches)
    corrected, plain, mine = (copy.deepcopy(nearest) for _ in range(3))
    correct_batch_norm(corrected, batches)
    assert gptq(plain, batches, correct_batch_norm=False).batch_norms is None
    result = gptq(mine, batches)
    assert len(result.layers) == 6
    assert result.batch_norms is not None
    assert len(result.batch_norms.shifts) == 5
    errors = [float((net(test_images) - target).square().mean()) for net in (nearest, corrected, plain, mine)]
    accuracy = [float((net(test_images).argmax(1) == labels).float().mean()) for net in (nearest, mine)]
    assert errors[2] < 0.5 * errors[0]
    assert errors[3] < 0.8 * errors[1]
    assert errors[3] < 0.8 * errors[2], "the statistics are corrected"
    assert accuracy[1] > accuracy[0]
