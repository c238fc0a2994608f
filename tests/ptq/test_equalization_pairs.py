"""Every layer whose channels cannot be scaled safely is refused, with the reason, and stays as it is."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lq_plugin.model.graph.record import Recording, record
from lq_plugin.ptq.equalization.equalize import equalize
from tests.models import Function, SharedConv, TwoConsumers, randomize


@torch.no_grad()
def recorded(model: nn.Module, x: Tensor) -> Recording:
    return record(model.eval(), lambda: model(x))


class Views(nn.Module):
    """Reshapes between two layers, outside any Sequential."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, 6), nn.Linear(6, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


class Tied(nn.Module):
    """A decoder that is the encoder transposed: one storage, two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class Regularized(nn.Module):
    """A weight that is also read outside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))) + self.b.weight.sum()


class Standardized(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight / self.weight.norm(), self.bias)


def tail(between: nn.Module, **kwargs: bool) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3, **kwargs), between, nn.Conv2d(6, 4, 1))


def hooked() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(216, 2))
    model[2].register_forward_pre_hook(lambda _, args: (args[0].reshape(-1, 6, 36).transpose(1, 2).flatten(1),))
    return model


def broken() -> nn.Sequential:
    model = tail(nn.ReLU())
    model[2].weight.data[0] = torch.nan
    return model


IMAGES = (2, 3, 8, 8)
REFUSALS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str]] = {
    "relu6": (lambda: tail(nn.ReLU6()), IMAGES, "0", r"'1' \(ReLU6\) after it is not known to pass channel scales on"),
    "gelu": (lambda: tail(Function(lambda _, x: F.gelu(x))), IMAGES, "0", r"\(gelu\) after it is not known"),
    "batch norm": (lambda: randomize(tail(nn.BatchNorm2d(6))), IMAGES, "0", "'1' .*not folded: fold_batch_norm first"),
    "own batch": (lambda: tail(nn.BatchNorm2d(6, affine=False)), IMAGES, "0", "without running statistics or affine"),
    "group norm": (lambda: tail(nn.GroupNorm(2, 6)), IMAGES, "0", "not known"),
    "functional sum": (lambda: tail(Function(lambda _, x: x + x)), IMAGES, "0", "reads something else also|not known"),
    "two readers": (lambda: TwoConsumers(3), IMAGES, "conv", "2 readers: 'bn', 'add_0'"),
    "called twice": (lambda: SharedConv(3), IMAGES, "conv", "called 2 times"),
    "not called": (lambda: nn.ModuleList([nn.Identity(), nn.Linear(2, 2)]), IMAGES, "1", "not called"),
    "last": (lambda: nn.Sequential(nn.Conv2d(3, 2, 1)), IMAGES, "0", "what the model returns"),
    "last relu": (lambda: nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU()), IMAGES, "0", "what the model returns"),
    "pool over channels": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.MaxPool1d(2), nn.Linear(3, 2)),
        (2, 5, 4),
        "0",
        r"pools over the channels, dim -1 of \[2, 5, 6\]",
    ),
    "other axis": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Linear(6, 2)),
        IMAGES,
        "0",
        "the channels are dim -3 .* dim -1",
    ),
    "transposed view": (
        lambda: Views(lambda x: x.t().reshape(6, 6)),
        (6, 4),
        "a",
        "reads a view, cast or reshaped copy",
    ),
    "flattened outside": (lambda: Views(lambda x: x.flatten(0, 1)), (2, 5, 4), "a", "reads a view"),
    "flatten, hooked": (hooked, IMAGES, "0", "reads something else|reads a view|not known"),
    "flatten all": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Flatten(), nn.Linear(30, 2)),
        (2, 5, 4),
        "0",
        "flattens beyond a channel",
    ),
    "tied": (Tied, (2, 4), "a", "'a.weight' is shared with 'b.weight'"),
    "read elsewhere": (Regularized, (2, 4), "a", "'b.weight' is also read by"),
    "computed": (
        lambda: nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.Linear(6, 2)),
        (2, 4),
        "0",
        "ParametrizedLinear has a forward|its weight is computed",
    ),
    "own forward": (
        lambda: nn.Sequential(nn.Linear(4, 6), Standardized(6, 2)),
        (2, 4),
        "0",
        "'1' .*Standardized has a forward of its own",
    ),
    "attention": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LSTM(6, 2)),
        (2, 3, 4),
        "0",
        r"'1' \(LSTM\) after it is not known",
    ),
    "nan": (broken, IMAGES, "0", "'2' .*NaN or Inf"),
}


@pytest.mark.parametrize("name", REFUSALS)
@torch.no_grad()
def test_what_is_refused_says_why_and_stays(name: str) -> None:
    build, shape, layer, reason = REFUSALS[name]
    model = build()
    x = torch.randn(shape)
    recording = recorded(model, x) if not isinstance(model, nn.ModuleList) else record(model, lambda: model[0](x))
    before = copy.deepcopy(model.state_dict())
    result = equalize(model, recording)
    found = {refused.name: str(refused) for refused in result.refused}
    assert re.search(reason, found[layer]), found
    assert result.pairs == ()
    assert result.iterations == 0
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
