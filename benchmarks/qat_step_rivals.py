"""Quantized training steps of `benchmarks.qat_step`: ours and other libraries'."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.environments import PeerError
from benchmarks.peers.training import PeerStep
from benchmarks.qat_step_models import Step, load
from lq_plugin import QuantPlan, Rule, prepare
from lq_plugin.callbacks import QAT
from lq_plugin.layers.integer import integer_choices, integer_report
from lq_plugin.model import calibrate, commit_observers, quantizers
from lq_plugin.native import use_native
from lq_plugin.quantizers import ActivationQuantizer


class Unavailable(Exception):
    """An implementation that has not this setting, or is not installed."""


#: Weights and inputs of settings that are no bit-widths. The words of `QuantSpec`.
FORMATS = {
    "MX6": ("mx6", "mx6"),
    "MXFP8": ("mxfp8", "mxfp8"),
    "MXFP4": ("mxfp4", "mxfp4"),
    "NVFP4": ("nvfp4", "nvfp4"),
    "VS": ("int4 group16:4 ragged", "int8 group16:8 ragged"),
    "BNN": ("sign", "sign"),
    "TTQ": ("ttq", "uint8 affine"),
}


def plan_of(setting: str) -> QuantPlan:
    """Weights per channel, inputs per tensor, on every layer; or the format."""
    if setting in FORMATS:
        weight, inputs = FORMATS[setting]
        return QuantPlan([Rule("*", weight=weight, input=inputs)])
    if setting == "LSQ":
        return QuantPlan([Rule("*", weight="int4 per_channel lsq", input="int4 lsq")])
    return QuantPlan.parse(setting.lower())


def _ours(name: str, setting: str, device: str) -> Step:
    model, batch = load(name, device)
    prepare(model, plan_of(setting))
    calibrate(model, [batch[0]])
    return _training(model, batch)


def _training(model: nn.Module, batch: Any) -> Step:
    model.train()
    chosen = quantizers(model)
    for quantizer in chosen:
        quantizer.observing = isinstance(quantizer, ActivationQuantizer)
    return Step(model, batch, after=lambda: commit_observers(chosen))


def pure(name: str, setting: str, device: str) -> Step:
    """Torch operations alone."""
    step = _ours(name, setting, device)
    forward = step.forward

    def without(x: Tensor) -> Tensor:
        with use_native(False):
            return forward(x)

    step.forward = without
    return step


def native(name: str, setting: str, device: str) -> Step:
    """The compiled kernels."""
    if device != "cpu":
        raise Unavailable("runs on CPU")
    step = _ours(name, setting, device)
    forward = step.forward

    def within(x: Tensor) -> Tensor:
        with use_native(True):
            return forward(x)

    step.forward = within
    return step


def integer(name: str, setting: str, device: str, precision: str = "32-true") -> Step:
    """Integer products in the forward pass, as the callback sets them up: layers are tried in this precision."""
    from lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self, net: nn.Module, batch: Any) -> None:
            super().__init__()
            self.net, self.data = net, batch

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(self.data[0]), self.data[1])

        def train_dataloader(self) -> Any:
            return [0]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), 0.0)

    model, batch = load(name, device)
    if precision == "bf16-true":
        batch = batch[0].to(torch.bfloat16), batch[1]
    accelerator = "gpu" if device.startswith("cuda") else "cpu"
    options: Any = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "precision": precision,
    }
    callback = QAT(
        plan_of(setting), forward="integer", calibration_step=lambda module, data: module.net(module.data[0])
    )
    for noisy in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(max_steps=1, accelerator=accelerator, devices=1, callbacks=[callback], **options).fit(
            Module(model, batch)
        )
    if not any(integer_choices(model).values()):
        raise Unavailable("; ".join(sorted(set(integer_report(model).values()))))
    return _training(model.to(device), batch)


def compiled(name: str, setting: str, device: str) -> Step:
    """The whole quantized model in one graph."""
    step = _ours(name, setting, device)
    step.forward = torch.compile(step.model, fullgraph=True)
    return step


def float_compiled(name: str, setting: str, device: str) -> Step:
    """The whole float model in one graph."""
    model, batch = load(name, device)
    return Step(model, batch, torch.compile(model, fullgraph=True))


def float_channels_last(name: str, setting: str, device: str) -> Step:
    """The float step on channels-last images, which integer convolutions give to what comes after them."""
    model, (x, labels) = load(name, device)
    if x.ndim != 4:
        raise Unavailable("has no images")
    last = torch.channels_last
    return Step(model.to(memory_format=last), (x.to(memory_format=last), labels))


def torch_ao(name: str, setting: str, device: str) -> Step:
    """Fused moving-average fake-quantizers of torch.ao on each convolution and linear layer."""
    if setting == "LSQ":
        raise Unavailable("its learned fake-quantizers are no part of its API")
    _refuse_formats(setting)
    from torch.ao.nn import qat
    from torch.ao.quantization import (
        FusedMovingAvgObsFakeQuantize,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
        QConfig,
    )

    weight_bits, input_bits = int(setting[1]), int(setting[3])
    half = 2 ** (weight_bits - 1)
    config = QConfig(
        activation=FusedMovingAvgObsFakeQuantize.with_args(
            observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=2**input_bits - 1, dtype=torch.quint8
        ),
        weight=FusedMovingAvgObsFakeQuantize.with_args(
            observer=MovingAveragePerChannelMinMaxObserver, quant_min=-half, quant_max=half - 1, dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        ),
    )  # fmt: skip
    with _quiet():
        model, batch = load(name, device)
        for owner in list(model.modules()):
            for key, child in list(owner.named_children()):
                kind = {nn.Conv2d: qat.Conv2d, nn.Linear: qat.Linear}.get(type(child))
                if kind is not None:
                    child.qconfig = config
                    swapped = kind.from_float(child)
                    fake: Any = config.activation()
                    swapped.register_forward_pre_hook(_on_input(fake))
                    swapped.add_module("input_fake_quant", fake)
                    setattr(owner, key, swapped)
    return Step(model.to(device), batch)


def _on_input(fake: nn.Module) -> Callable[[nn.Module, Any], Any]:
    return lambda module, inputs: (fake(inputs[0]),)


def torchao_config(name: str, setting: str, device: str) -> Step:
    """torchao's QATConfig: linear layers with weights per channel and inputs per token."""
    if setting == "LSQ":
        raise Unavailable("has none")
    _refuse_formats(setting)
    if name != "encoder":
        raise Unavailable("does nothing to convolutions")
    with _quiet():
        from torchao.quantization import quantize_
        from torchao.quantization.granularity import PerAxis, PerToken
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        bits = {4: torch.int4, 8: torch.int8}
        model, batch = load(name, device)
        inputs = IntxFakeQuantizeConfig(bits[int(setting[3])], PerToken(), is_symmetric=False)
        weights = IntxFakeQuantizeConfig(bits[int(setting[1])], PerAxis(0))
        quantize_(model, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))
    return Step(model, batch)


def torchao_mx(name: str, setting: str, device: str) -> Step:
    """torchao's MXTensor there and back, weights and inputs of linear layers, straight through: it has no training with
    them."""
    if setting not in ("MXFP8", "MXFP4"):
        raise Unavailable("has MX formats only")
    if name != "encoder":
        raise Unavailable("would take linear layers only")
    with _quiet():
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

    element = torch.float8_e4m3fn if setting == "MXFP8" else torch.float4_e2m1fn_x2

    class Fake(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return MXTensor.to_mx(x, element, 32).dequantize(x.dtype)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad

    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(Fake.apply(x), Fake.apply(self.weight), self.bias)

    model, batch = load(name, device)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return Step(model, batch)


def _refuse_formats(setting: str) -> None:
    if setting in FORMATS:
        raise Unavailable("has no such format")


def torchao_pt2e(name: str, setting: str, device: str) -> Step:
    """torchao's export flow with the X86 quantizer."""
    if setting != "W8A8":
        raise Unavailable("its X86 quantizer has 8 bits")
    with _quiet():
        from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
        model, batch = load(name, device)
        exported = torch.export.export(copy.deepcopy(model), (batch[0],), strict=True).module()
        prepared = prepare_qat_pt2e(exported, quantizer)
    return Step(prepared, batch)


def brevitas(variant: str, name: str, setting: str, device: str, precision: str = "32-true") -> PeerStep:
    """Brevitas, in its own environment."""
    if setting == "LSQ":
        raise Unavailable("W4A4 has its learned ranges")
    _refuse_formats(setting)
    if device != "cpu":
        raise Unavailable("runs on CPU")
    try:
        return PeerStep("brevitas", variant, name, setting, torch.get_num_threads(), precision)
    except PeerError as error:
        raise Unavailable(str(error)) from error


@contextlib.contextmanager
def _quiet() -> Any:
    """Peers warn of deprecations, their own and torch's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


#: Those that run in a process of their own, in a precision that they are told.
PEERS = ("brevitas collecting", "brevitas learned")
#: Those that are told the precision.
TOLD = (*PEERS, "lq integer")
IMPLEMENTATIONS: dict[str, Callable[..., Step | PeerStep]] = {
    "lq pure": pure,
    "lq native": native,
    "lq integer": integer,
    "lq compiled": compiled,
    "float compiled": float_compiled,
    "float channels_last": float_channels_last,
    "torch.ao": torch_ao,
    "torchao QATConfig": torchao_config,
    "torchao MXTensor": torchao_mx,
    "torchao pt2e": torchao_pt2e,
    **{name: partial(brevitas, name.removeprefix("brevitas ")) for name in PEERS},
}
