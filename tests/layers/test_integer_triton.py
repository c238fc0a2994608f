"""Layers whose forward pass the Triton kernels compute with integers, against fake quantization by torch operations.

On a GPU where there is one, else in Triton's interpreter on CPU tensors, which truncates to bfloat16 where a GPU rounds
to it.
"""

import copy
import sys

import lightning
import pytest
import torch
from torch import nn

from lq_plugin import QAT
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.layers.integer import (
    arithmetic as arithmetic_module,
    enable_integer_forward,
    integer_report,
    settle_integer_forward,
)
from lq_plugin.layers.integer.arithmetic import arithmetic_on
from lq_plugin.model import quantizers
from lq_plugin.native import switch as switch_module, use_native
from tests.layers.test_integer import W8A8, assert_close, prepared

triton = pytest.importorskip("triton", reason="no Triton for this platform")
from lq_plugin.layers.integer.triton_arithmetic import TritonArithmetic  # noqa: E402
from lq_plugin.native.triton_kernels import TritonKernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What the interpreter's numpy says of infinities, which are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture
def triton_everywhere(monkeypatch):
    """The interpreter's tensors are on the CPU, of every dtype that a GPU takes."""
    fake, integer = TritonKernels(), TritonArithmetic()
    monkeypatch.setattr(switch_module, "_compiled", lambda: fake)
    monkeypatch.setattr("lq_plugin.layers.integer.forward.arithmetic_on", lambda device: integer)
    switch_module.active.cache_clear()
    yield
    switch_module.active.cache_clear()


def scalar(value):
    return torch.tensor([value], device=DEVICE)


def generated(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE)


def outcome(model, x, autocast=None):
    """Output, gradients of input and parameters, and what the observers saw."""
    for quantizer in quantizers(model):
        if hasattr(quantizer, "batch_min"):
            quantizer.batch_min.fill_(torch.inf)
            quantizer.batch_max.fill_(-torch.inf)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
        y = model(x)
    names, parameters = zip(*model.named_parameters(), strict=True)
    # Sums of few bits, so that halves hold them well.
    slope = torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape).to(y.dtype)
    gradients = torch.autograd.grad(y, [x, *parameters], slope)
    seen = [value.clone() for q in quantizers(model) if hasattr(q, "batch_min") for value in (q.batch_min, q.batch_max)]
    return y.detach(), dict(zip(("x", *names), gradients, strict=True)), seen


def assert_same_as_fake_quantization(model, x, tolerance=1e-5, autocast=None):
    with use_native(False):
        y, gradients, seen = outcome(model, x, autocast)
    integer = copy.deepcopy(model)
    enable_integer_forward(integer, True)
    y2, gradients2, seen2 = outcome(integer, x, autocast)
    assert set(integer_report(integer).values()) == {"integer"}
    assert y2.dtype == y.dtype
    assert_close(y2.float(), y.float(), tolerance)
    for name, gradient in gradients.items():
        assert gradients2[name].dtype == gradient.dtype
        assert_close(gradients2[name].float(), gradient.float(), tolerance)
    assert all(map(torch.equal, seen2, seen))
    return integer


LAYERS = [
    (lambda: nn.Linear(20, 9), (3, 4, 20)),
    (lambda: nn.Linear(7, 33, bias=False), (70, 7)),
    (lambda: nn.Conv2d(5, 6, 3, padding=1), (2, 5, 6, 7)),
    (lambda: nn.Conv2d(32, 4, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), bias=False), (2, 32, 6, 5)),
    (lambda: nn.Conv2d(8, 3, 1, stride=2), (2, 8, 5, 5)),
]


@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize(
    "plan",
    [
        W8A8, "int8 / uint8 affine ema", "int4 per_channel / int8 ema", "int8 per_channel mse / uint4 minmax",
        "int3 percentile:80 / int8 affine percentile:90",
    ],
)  # fmt: skip
@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_layers(number, plan):
    make, shape = LAYERS[number]
    torch.manual_seed(number)
    x = generated(*shape) + 0.4
    # Beyond the calibrated range something is clipped.
    assert_same_as_fake_quantization(prepared(nn.Sequential(make()).to(DEVICE), plan, x), x * 1.3)


@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize("weights_too", [False, True])
def test_channels_last(weights_too):
    x = generated(2, 5, 6, 7).to(memory_format=torch.channels_last)
    model = prepared(nn.Sequential(nn.Conv2d(5, 6, 3)).to(DEVICE), W8A8, x)
    if weights_too:
        model.to(memory_format=torch.channels_last)
    assert_same_as_fake_quantization(model, x * 1.3)


# What is compared with rounds each product's operands, the integer sums round the result alone.
ROUNDING = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("number", [0, 2])
def test_half_precision(number, dtype):
    make, shape = LAYERS[number]
    torch.manual_seed(number)
    x = (generated(*shape) + 0.4).to(dtype)
    assert_same_as_fake_quantization(
        prepared(nn.Sequential(make()).to(DEVICE, dtype), W8A8, x), x * 1.3, ROUNDING[dtype]
    )


@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("number", [0, 2])
def test_autocast(number, dtype):
    make, shape = LAYERS[number]
    torch.manual_seed(number)
    x = generated(*shape) + 0.4
    model = prepared(nn.Sequential(make()).to(DEVICE), W8A8, x)
    assert_same_as_fake_quantization(model, x * 1.3, ROUNDING[dtype], autocast=dtype)
    assert_same_as_fake_quantization(model, (x * 1.3).to(dtype), ROUNDING[dtype], autocast=dtype)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize("autocast", [None, torch.float16])
def test_projections_of_attention(autocast):
    torch.manual_seed(0)
    x = generated(2, 5, 16)
    model = prepared(Attending().to(DEVICE), W8A8, x)
    with use_native(False):
        y, gradients, _ = outcome(model, x, autocast)
    enable_integer_forward(model, True)
    y2, gradients2, _ = outcome(model, x, autocast)
    assert integer_report(model)["attention.in_proj_weight"] == "integer"
    assert y2.dtype == y.dtype
    assert_close(y2.float(), y.float(), 1e-5 if autocast is None else ROUNDING[autocast])
    for name, gradient in gradients.items():
        assert_close(gradients2[name].float(), gradient.float(), 1e-5 if autocast is None else 2 * ROUNDING[autocast])


@pytest.mark.usefixtures("triton_everywhere")
def test_what_is_kept_for_backward_is_a_quarter():
    x = generated(16, 64, 8, 4).requires_grad_()
    model = prepared(nn.Sequential(nn.Conv2d(64, 8, 1)).to(DEVICE), W8A8, x.detach())
    enable_integer_forward(model, True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        model(x)
    assert sum(kept) < 0.3 * x.numel() * 4


@pytest.mark.usefixtures("triton_everywhere")
def test_a_nan_gets_through():
    x = generated(4, 16)
    model = prepared(nn.Sequential(nn.Linear(16, 3)).to(DEVICE), W8A8, x)
    enable_integer_forward(model, True)
    broken = x.clone()
    broken[1, 2] = torch.nan
    y, gradients, seen = outcome(model, broken)
    assert y.isnan().all()
    assert gradients["0.weight"].isnan().all()
    assert torch.cat(seen).isnan().all()
    with torch.no_grad():
        model[0].weight[1, 5] = torch.nan
    assert model(x).isnan().any(0).tolist() == [False, True, False]
    model[0].weight_quantizer.fix(torch.full((3, 1), 0.1), torch.zeros(3, 1))
    assert model(x).isnan().any(0).tolist() == [False, True, False]


@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), "2 groups"),
        (nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
        (nn.Conv2d(8, 8, 3, padding="same"), "padding"),
    ],
)
def test_what_is_not_covered_says_why(layer, reason):
    x = generated(1, 8, 5, 5)
    model = prepared(nn.Sequential(layer).to(DEVICE), W8A8, x)
    expected = model(x).detach()
    enable_integer_forward(model, True)
    assert torch.equal(model(x).detach(), expected)
    assert reason in integer_report(model)["0"]


@pytest.mark.usefixtures("triton_everywhere")
def test_calls_that_are_not_covered_are_named():
    x = generated(2, 8, 5, 5)
    model = prepared(nn.Sequential(nn.Conv2d(8, 8, 3)).to(DEVICE), W8A8, x)
    enable_integer_forward(model, True)
    # torch says what is wrong with these; the kernels would read what is not theirs.
    for wrong in (x[:, :7].contiguous(), x[..., :2].contiguous()):
        with pytest.raises(RuntimeError):
            model(wrong)
    assert "does not fit" in integer_report(model)["0"]
    model[0].groups = 2
    with pytest.raises(RuntimeError):
        model(x)
    assert "2 groups" in integer_report(model)["0"]
    model[0].groups = 1
    # Weights of another dtype than the input's, without autocast.
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(RuntimeError):
            model.to(dtype)(x)
    assert "it is in torch.float16, torch.float32" in integer_report(model)["0"]
    assert "it is in torch.float32, torch.float64" in integer_report(model)["0"]


@pytest.mark.usefixtures("triton_everywhere")
def test_a_trial_chooses():
    x = generated(4, 16)
    model = prepared(nn.Sequential(nn.Linear(16, 5)).to(DEVICE), W8A8, x)
    with use_native(False):
        expected = outcome(model, x)
    enable_integer_forward(model)
    y, _, seen = outcome(model, x)
    assert_close(y, expected[0])
    assert all(map(torch.equal, seen, expected[2]))
    ratio = model[0]._integer_state.ratio
    assert ratio > 0
    model[0]._integer_state.worth = ratio / 2
    settle_integer_forward(model)
    assert "slower" in integer_report(model)["0"]


@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.slow
def test_a_trainer_trains_as_with_fake_quantization(tmp_path):
    outcomes = []
    for forward in ("fake_quantize", "integer_always"):
        torch.manual_seed(0)
        model = DigitsCNN(width=4)
        trainer = lightning.Trainer(
            max_steps=2, callbacks=[QAT("w8a8", forward=forward)], accelerator="gpu" if DEVICE == "cuda" else "cpu",
            devices=1,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
            num_sanity_val_steps=0, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(model, datamodule=DigitsDataModule(batch_size=4))
        outcomes.append({name: value.cpu() for name, value in model.state_dict().items()})
    assert "integer" in integer_report(model).values()
    assert outcomes[0].keys() == outcomes[1].keys()
    for name, value in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_devices_without_it_say_why(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    arithmetic_on.cache_clear()
    assert arithmetic_on(torch.device("meta")) == "it is on meta"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert arithmetic_on(torch.device("cuda:0")) == "its GPU has compute capability 7.5, and 8-bit products ask for 8.0"
    arithmetic_on.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert isinstance(arithmetic_on(torch.device("cuda:0")), TritonArithmetic)
    arithmetic_on.cache_clear()
    monkeypatch.setitem(sys.modules, "lq_plugin.layers.integer.triton_arithmetic", None)
    assert "pip install triton" in arithmetic_on(torch.device("cuda:0"))
    arithmetic_on.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "NVIDIA" in arithmetic_on(torch.device("cuda:0"))
    arithmetic_on.cache_clear()
    monkeypatch.setattr(arithmetic_module, "integer_kernels", lambda: "no compiler")
    assert arithmetic_on(torch.device("cpu")) == "no compiler"
    arithmetic_on.cache_clear()
