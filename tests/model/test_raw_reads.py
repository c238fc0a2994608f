"""Weights read past their layers in ways that the model's code does not show: packed files hold them as float, too."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin import calibrate, prepare, remove
from lq_plugin.export import export_model, load_packed, save_packed
from lq_plugin.model.past_reads import weights_read_past_layers


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.name = "".join(("wei", "ght"))


class ByName(Base):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x) + F.linear(x, getattr(self.first, self.name)))
        return y


class OutOfAList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.first.weight.t()]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x) @ self.kept[0])
        return y


class ByParameters(Base):
    def forward(self, x: Tensor) -> Tensor:
        weights = [parameter for parameter in self.parameters() if parameter.dim() == 2]
        y: Tensor = self.last(torch.matmul(self.first(x), weights[0]))
        return y


#: Its code is no Python that could be looked at.
product = torch.jit.CompilationUnit(
    "def product(x: Tensor, weights: List[Tensor]):\n    return x @ weights[0]\n"
).product


class Compiled(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(product(self.first(x), self.kept))
        return y


KINDS = [ByName, OutOfAList, ByParameters, Compiled]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", ["w4", "w4a8"])
def test_the_file_holds_what_the_model_computes_with(kind: type[Base], plan: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = kind(), torch.randn(6, 16)
    prepare(net, plan)
    calibrate(net, [x])
    # Only activations need a calibration batch: without them, the example at saving shows the reads.
    save_packed(net.eval(), tmp_path / "net.safetensors", inputs=(x,) if plan == "w4" else None)
    other = kind()
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other(x), net(x))
    assert set(weights_read_past_layers(net)) == {"first.weight"}


def test_the_code_alone_does_not_show_them() -> None:
    """Without the pass no such read is found; else the test above would say nothing about it."""
    for kind in KINDS:
        net = kind()
        prepare(net, "w4")
        assert weights_read_past_layers(net) == {}


def test_a_target_is_given_the_example(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = ByName(), torch.randn(6, 16)
    prepare(net, "w4")
    calibrate(net, [])
    export_model(net.eval(), tmp_path / "net.safetensors", inputs=(x,))
    other = ByName()
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other(x), net(x))


class Tied(nn.Module):
    """The embedding, which stays float, and the product have one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.product = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.product.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.product(self.embedding(tokens))
        return y


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.attention = nn.LSTM(8, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(3, 8, 8) / math.sqrt(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(x)[0]
        y = self.attention(y, y, y)[0]
        return torch.bmm(y[:3], self.experts)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x.contiguous(memory_format=torch.channels_last))
        return y


@pytest.mark.parametrize(
    ("net", "x", "rules"),
    [
        (Tied(), torch.arange(12).view(3, 4), [{"match": "product", "weight": "int4", "input": "int8"}]),
        (Sequences(), torch.randn(4, 5, 8), "w4a8"),
        (Images(), torch.randn(2, 3, 12, 12), "w4a8"),
    ],
    ids=["Tied", "Sequences", "Images"],
)
def test_what_layers_read_is_no_read_past_them(net: nn.Module, x: Tensor, rules: object) -> None:
    prepare(net, rules if isinstance(rules, str) else {"rules": rules})
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in net.modules()]
    calibrate(net, [x])
    assert weights_read_past_layers(net) == {}
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in net.modules()] == hooks


def test_a_float_model_remembers_nothing() -> None:
    net, x = ByName(), torch.randn(2, 16)
    names = set(net.first.__dict__)
    prepare(net, "w4a8")
    calibrate(net, [x])
    assert net.first.__dict__["read_past_by"].startswith("aten")
    remove(net)
    assert set(net.first.__dict__) == names
