"""Outputs of layers that are done: kept while something reads them, then on disk, whatever way a batch takes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lq_plugin import calibrate, prepare
from lq_plugin.ptq.gptq import gptq
from lq_plugin.ptq.layerwise import replay as replay_module
from lq_plugin.ptq.layerwise.activation_cache import ActivationCache
from lq_plugin.ptq.layerwise.replay import Replay
from lq_plugin.ptq.layerwise.unread import Unread


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Chain(nn.Module):
    """Residual blocks; the last one reads what the first has given, where `skip` says so of the batch."""

    def __init__(self, blocks: int, skip: str = "never") -> None:
        super().__init__()
        self.blocks, self.head, self.skip = nn.ModuleList(Block() for _ in range(blocks)), nn.Linear(12, 4), skip

    def forward(self, x: Tensor) -> Tensor:
        skips = self.skip == "always" or (self.skip == "second batch" and float(x[0, 0]) > 0)
        x = first = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = block(x)
            if block is self.blocks[-2] and skips:
                first += 1.0  # in place
                x = torch.tanh(x) * first
        y: Tensor = self.head(x)
        return y


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    first, second = torch.randn(40, 12), torch.randn(40, 12)
    first[0, 0], second[0, 0] = -1.0, 1.0
    return [first, second]


def ready(blocks: int, skip: str = "never") -> nn.Module:
    torch.manual_seed(0)
    net = Chain(blocks, skip).eval()
    prepare(net, "w3 per_channel mse")
    calibrate(net, batches())
    return net


@pytest.mark.parametrize("skip", ["never", "always", "second batch"])
def test_what_is_put_away_changes_no_weight(skip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, fetched = ready(5, skip), []
    plain = copy.deepcopy(net)
    value = Unread.value
    monkeypatch.setattr(Unread, "value", lambda self: fetched.append(self) or value(self))
    gptq(net, batches())
    # The recorded batch skips nothing: that the second one does is found out when it reads.
    assert bool(fetched) == (skip == "second batch")
    monkeypatch.setattr(replay_module, "unread_modules", lambda *args: set())
    gptq(plain, batches())
    for key, want in plain.state_dict().items():
        assert torch.equal(net.state_dict()[key], want), key


def test_what_is_held_does_not_grow_with_the_number_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory, beside the batches, while what is on disk does."""
    held: dict[int, list[tuple[int, int]]] = {}
    finish = Replay.finish

    def noted(self: Replay, layers: list[str]) -> None:
        finish(self, layers)
        held[len(self.modules)].append((self.cache.in_memory, self.cache.on_disk))

    monkeypatch.setattr(Replay, "finish", noted)
    for blocks in (3, 9):
        net = ready(blocks)
        held[len(dict(net.named_modules()))] = []
        gptq(net, batches())
    few, many = held.values()
    assert max(memory for memory, _ in many) == max(memory for memory, _ in few)
    assert many[-1][1] > few[-1][1]


def test_a_stand_in_is_the_tensor_once_it_is_read() -> None:
    with ActivationCache(budget=0) as cache:
        cache.put("x", torch.arange(6.0).view(2, 3).t())
        stand_in = Unread(cache.get("x"), torch.device("cpu"), lambda: cache.get("x"))
        assert (stand_in.shape, stand_in.stride(), stand_in.dtype) == ((3, 2), (1, 3), torch.float32)
        again = stand_in.again()
        again += 1.0
        assert torch.equal(torch.relu(again), cache.get("x") + 1.0)
        assert torch.equal(stand_in @ torch.ones(2), cache.get("x").sum(1))
        assert stand_in.again().numpy().tolist() == stand_in.again().tolist() == cache.get("x").tolist()
        assert torch.equal(copy.deepcopy(stand_in.again()), cache.get("x"))
        assert stand_in.again().data_ptr() != 0
