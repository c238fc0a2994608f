"""Blocks of reconstruction: where their sums are modules of their own, and what is a sum but no block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin import PTQ, prepare
from lq_plugin.model.graph.record import record
from lq_plugin.ptq.reconstruction.units import find_units
from tests.callbacks.conftest import Data, Module, trainer  # noqa: F401  (a fixture)


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Output(nn.Module):
    """The last layer of a part of a post-norm transformer layer, with the sum and the norm after it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(inputs, outputs), nn.LayerNorm(outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.norm(self.dense(x) + skip)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = *(nn.Linear(8, 8) for _ in range(3)), Output(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-1, -2)
        return self.output(scores.softmax(-1) @ self.value(x), x)


class PostNorm(nn.Module):
    """A layer as in Hugging Face's BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = Attention(), nn.Linear(8, 16), Output(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return self.output(F.gelu(self.intermediate(x)), x)


class Rotary(nn.Module):
    """A pre-norm layer, the attention of which adds halves of queries to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up, self.down = RotaryAttention(), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(F.silu(self.up(x)))


class RotaryAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        q = q * torch.cos(x) + torch.cat([-q[..., 4:], q[..., :4]], -1) * torch.sin(x)
        return (q @ x.transpose(-1, -2)).softmax(-1) @ self.value(x)


class Residual(nn.Module):
    """A residual block whose sum is a module, with a layer on the short way as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.short, self.add = *(nn.Linear(8, 8) for _ in range(3)), Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.second(F.relu(self.first(x))), self.short(x))


class Body(nn.Module):
    """Blocks with a long connection around them, and another block after that."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.add = nn.Sequential(Residual(), Residual()), Add()
        self.one, self.two, self.more = nn.Linear(8, 8), nn.Linear(8, 8), Add()

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(x, self.blocks(x))
        return self.more(x, self.two(F.relu(self.one(x))))


class Net(nn.Module):
    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(8, 8), nn.Sequential(*body), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


def units_of(model: nn.Module, x: Any) -> list[tuple[str, int]]:
    prepare(model.eval(), "w4")
    units, uncalled = find_units(model, record(model, lambda: model(x)))
    assert not uncalled
    return [(unit.name, len(unit.layers)) for unit in units]


@pytest.mark.parametrize(
    ("body", "blocks"),
    [
        ([PostNorm(), PostNorm()], [("body.0", 6), ("body.1", 6)]),
        ([Rotary(), Rotary()], [("body.0", 4), ("body.1", 4)]),
        ([Residual(), Residual()], [("body.0", 3), ("body.1", 3)]),
        ([Body()], [("body.0.blocks.0", 3), ("body.0.blocks.1", 3), ("body.0.one", 1), ("body.0.two", 1)]),
        ([nn.Linear(8, 8), nn.Linear(8, 8)], [("body.0", 1), ("body.1", 1)]),
    ],
    ids=["post-norm", "rotary", "sum-as-module", "long", "none"],
)
def test_a_block_is_what_connections_lead_around(body: list[nn.Module], blocks: list[tuple[str, int]]) -> None:
    assert units_of(Net(*body), torch.randn(2, 3, 8)) == [("stem", 1), *blocks, ("head", 1)]


@pytest.mark.parametrize("name", ["Bert", "Electra", "DistilBert", "GPT2", "Llama", "ViT"])
def test_blocks_of_hugging_face_models_are_their_layers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "Bert": {"intermediate_size": 64},
        "Electra": {"intermediate_size": 64, "embedding_size": 32},
        "DistilBert": {"hidden_dim": 64},
        "Llama": {"intermediate_size": 64},
        "ViT": {"intermediate_size": 64, "image_size": 16, "patch_size": 8},
    }.get(name, {})
    sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    config = getattr(transformers, f"{name}Config")(**sizes, bos_token_id=0, eos_token_id=0)
    model = getattr(transformers, f"{name}Model")(config)
    x = torch.randn(2, 3, 16, 16) if name == "ViT" else torch.randint(0, 50, (2, 8))
    found = [size for name, size in units_of(model, x) if name.rpartition(".")[2].isdigit()]
    assert found == {"GPT2": [4, 4], "Llama": [7, 7]}.get(name, [6, 6])


def test_the_log_says_how_many_layers_are_alone(trainer: Any, caplog: Any) -> None:  # noqa: F811
    ptq = PTQ("w4", phases=["calibrate", {"reconstruct": {"iterations": 1}}])
    with caplog.at_level("INFO"):
        trainer(ptq).validate(Module(), datamodule=Data(), verbose=False)
    sizes = [len(layers) for layers in ptq.reconstruction.layers.values()]
    several = sum(size > 1 for size in sizes)
    assert (
        f"reconstruct by block: {several} units of several layers, {len(sizes) - several} of one layer" in caplog.text
    )
