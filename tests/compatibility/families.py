"""The small models and plans that the files of earlier builds hold.

A file can only be read into the model that it was written from: change nothing here, add to it (with a name of its
own) and write another archive, see README.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import PTQ, QAT, QuantPlan, Rule
from lq_plugin.model import quantized_layers

FEATURES, SAMPLES, BATCH = 32, 32, 8

#: What a layer is, and the shape of one sample that it takes out of the first features.
KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(32, 3), (32,)),
    "ragged": (lambda: nn.Linear(20, 3), (20,)),
    "conv": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4)),
    "wide": (lambda: nn.Conv2d(16, 3, 1), (16, 2, 1)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 2, groups=4), (4, 2, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 3, 3), (4, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2), (2, 2, 2, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2), (2, 4, 4)),
    "embedding": (lambda: nn.Embedding(12, 4), (6,)),
    "lstm": (lambda: nn.LSTM(8, 3, batch_first=True), (4, 8)),
    "gru": (lambda: nn.GRU(8, 2, batch_first=True), (4, 8)),
    "rnn": (lambda: nn.RNN(8, 2, batch_first=True), (4, 8)),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (4, 8)),
}


@dataclass(frozen=True)
class Layer:
    """One layer of a `Zoo` and its specs; a mapping of moments to specs stands for stages."""

    kind: str
    weight: str | Mapping[str, str] | None = None
    input: str | Mapping[str, str] | None = None
    output: str | None = None

    @property
    def name(self) -> str:
        """Name of the submodule: the words of its specs."""
        words = [
            self.kind,
            *(f"{slot[0]} {getattr(self, slot)}" for slot in ("weight", "input", "output") if getattr(self, slot)),
        ]
        return re.sub(r"[^a-z0-9]+", "_", " ".join(words).lower()).strip("_")

    def rules(self) -> Iterator[Rule]:
        """Rules for this layer alone (a compound module has several layers)."""
        match = f"re:net\\.{self.name}(\\..*)?"
        for slot in ("weight", "input", "output"):
            given = getattr(self, slot)
            for start, spec in given.items() if isinstance(given, Mapping) else [("", given)] if given else []:
                yield Rule(match, start=start or None, **{slot: spec})


class Zoo(nn.Module):
    """Layers next to each other, on the same features, so that none inherits the rounding errors of another."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.shapes = {}
        for layer in layers:
            make, self.shapes[layer.name] = KINDS[layer.kind]
            self.add_module(layer.name, make())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, layer in self.named_children():
            shape = self.shapes.get(name)
            if shape is None:
                continue
            given = x[:, : prod(shape)].reshape(-1, *shape)
            if isinstance(layer, nn.Embedding):
                found[name] = layer((given * 5).long() % layer.num_embeddings)
            elif isinstance(layer, nn.MultiheadAttention):
                found[name] = layer(given, given, given)[0]
            else:
                out = layer(given)
                found[name] = out[0] if isinstance(out, tuple) else out
        return found


class Operations(nn.Module):
    """Operations that no layer owns, on the features themselves and on a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x[:, :32].reshape(-1, 4, 8)
        products = x @ x.transpose(1, 2)
        return {"matmul": products, "add": x + self.fc(x)}


class Folding(nn.Module):
    """Convolutions with batch norms, for the phases of PTQ."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.reshape(-1, 2, 4, 4)
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return {"fc": self.fc(x.mean((2, 3)))}


class Searched(nn.Module):
    """Three layers in a row, for a search."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(32, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"three": self.three(torch.relu(self.two(torch.relu(self.one(x)))))}


class Module(L.LightningModule):
    """Pulls all outputs of `net` towards the sample's target."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.net(x)

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        x, y = batch
        losses = [(out.flatten(1) - y).square().mean() for out in self(x).values()]
        return torch.stack(losses).sum()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Data(L.LightningDataModule):
    """Samples that are trained on and validated with, never shuffled."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.x, self.y = x, y

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=BATCH)

    val_dataloader = train_dataloader


@dataclass(frozen=True)
class Family:
    """A model with one plan.

    Args:
        layers: of a `Zoo`; or `net` makes the model and `plan` quantizes it.
        options: of QAT, or of PTQ where there are `phases`.
        packed: a packed file of it is kept, too.
    """

    layers: tuple[Layer, ...] = ()
    net: Any = None
    plan: Mapping[str, Any] | None = None
    schedule: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    phases: tuple[Any, ...] = ()
    packed: bool = True

    def module(self, seed: int = 0) -> Module:
        """A new float model."""
        torch.manual_seed(seed)
        return Module(Zoo(self.layers) if self.net is None else self.net())

    def quant_plan(self) -> QuantPlan:
        """Returns its quantization plan."""
        if self.plan is not None:
            return QuantPlan.from_dict(dict(self.plan))
        return QuantPlan([rule for layer in self.layers for rule in layer.rules()], dict(self.schedule))


def _weights(kind: str, *specs: str) -> tuple[Layer, ...]:
    return tuple(Layer(kind, spec) for spec in specs)


_GRANULARITIES = (
    *_weights(
        "linear", "int4", "int4 per_channel", "int4 per_channel narrow", "uint4 affine", "int3 per_channel affine mse"
    ),
    *_weights(
        "linear",
        "int4 group16",
        "int4 group16 affine mse",
        "int4 group16:4",
        "int4 group16:4:channel mse",
        "int1",
        "int16",
    ),
    *_weights("ragged", "int4 group16 ragged octav"),
    *_weights("wide", "int4 group16:6", "int8 per_channel"),
    *_weights("conv", "int4 per_channel mse", "int4"),
)
_RANGES = (
    *_weights(
        "linear",
        "int4 per_channel percentile:99",
        "int4 percentile",
        "int4 kl",
        "int4 per_channel aciq",
        "int4 aciq:laplace",
    ),
    *_weights("linear", "int4 per_channel aciq_exact", "int4 per_channel octav", "int4 octav mad", "int4 identity"),
    *_weights("linear", "int4 per_channel stochastic", "int4 per_channel stochastic:7 mse"),
)
_INPUTS = tuple(
    Layer("linear", "int8 per_channel", spec)
    for spec in (
        "uint8", "uint8 affine", "uint8 affine ema", "uint8 affine ema:0.9:constant", "uint8 affine mse",
        "uint4 affine percentile:99.9", "int8 per_channel", "int8 kl", "int8 aciq:gauss", "int4 octav",
        "int4 group16:4", "uint8 affine stochastic:5", "int8 ema narrow",
    )
)  # fmt: skip
_LEARNED = (
    *_weights("linear", "int4 per_channel lsq", "int3 lsq:rounded narrow", "uint4 affine lsq", "int4 group16 lsq"),
    Layer("linear", "int4 lsq", "uint4 pact"),
    Layer("conv", "int2 per_channel lsq", "uint4 affine lsq"),
    Layer("linear", "int8", "int8 lsq", "uint8 affine ema"),
    *_weights(
        "linear", "ttq", "ttq:0.1 per_channel", "kmeans2", "kmeans3:linear:reassign", "kmeans2:quantile:sum per_channel"
    ),
    *_weights("conv", "ttq", "kmeans4:kmeans++"),
)
_BLOCKS = (
    *_weights(
        "linear",
        "mx4",
        "mx6",
        "mx9",
        "mxfp4",
        "mxfp4:rceil",
        "mxfp6_e2m3:ceil",
        "mxfp6_e3m2:even",
        "mxfp8_e5m2",
        "mxint8",
    ),
    *_weights("ragged", "mx6", "mxfp8", "nvfp4"),
    *(Layer("linear", spec, spec) for spec in ("mx9", "mxfp8_e4m3", "nvfp4", "mxfp4")),
    *_weights("wide", "nvfp4", "mx4"),
)
_LOW = (
    *_weights("linear", "sign", "sign:0.1", "sign stochastic:2", "sign identity"),
    *_weights("linear", "bwn", "bwn:paper", "twn", "twn:exact per_channel", "twn:0.75"),
    *_weights("conv", "bwn", "twn per_channel"),
    Layer("linear", "bwn", "xnor"),
    Layer("conv", "bwn", "xnor"),
    Layer("linear", "sign", "sign"),
    Layer("linear", "sign", "sign stochastic"),
)
_COMPOUND = (
    Layer("embedding", "int4 per_channel"),
    Layer("embedding", "kmeans2"),
    Layer("depthwise", "int4 per_channel lsq", "uint8 affine ema"),
    Layer("conv1d", "int4 per_channel", "uint8 affine mse"),
    Layer("conv3d", "mx6"),
    Layer("transposed", "int4 per_channel", "uint8 affine", "int8"),
    Layer("lstm", "int4 per_channel mse"),
    Layer("gru", "twn"),
    Layer("rnn", "int4 lsq"),
    Layer("attention", "int8 per_channel"),
)
_STAGES = (
    Layer("linear", {"": "int8 per_channel", "step 2": "int4 per_channel mse", "epoch 1": "ttq"}, "uint8 affine ema"),
    Layer(
        "linear", {"": "int8", "epoch 1": "int2 per_channel lsq"}, {"": "uint8 affine", "step 1": "uint4 affine lsq"}
    ),
    Layer("conv", {"step 3": "bwn"}),
    Layer("conv", {"": "float", "epoch 1": "kmeans2"}, "int8 ema:0.5"),
)
_OPERATIONS = {
    "rules": [
        {"match": "net.fc", "weight": "int8 per_channel", "input": "uint8 affine ema"},
        {"match": "net.matmul_0", "input": "uint8 affine ema"},
        {"match": "net.add_0", "input": "int4 lsq"},
    ]
}
_PTQ = {"rules": [{"match": "*", "weight": "int4 per_channel mse", "input": "uint8 affine mse"}]}

FAMILIES: dict[str, Family] = {
    "granularities": Family(_GRANULARITIES),
    "ranges": Family(_RANGES),
    "inputs": Family(_INPUTS, schedule={"observer_freeze": "epoch 2"}),
    "learned": Family(_LEARNED),
    "blocks": Family(_BLOCKS),
    "low_bits": Family(_LOW),
    "compound": Family(_COMPOUND),
    "stages": Family(
        _STAGES,
        schedule={"activations_start": "epoch 1"},
        options={"distill": {"weight": 0.5, "output": f"net.{_STAGES[1].name}"}},
        packed=False,  # one layer is float in the first epoch
    ),
    "operations": Family(net=Operations, plan=_OPERATIONS),
    # Seven bits: exact on every processor.
    "integer_forward": Family(
        tuple(Layer(kind, "int7 per_channel", "uint8 affine ema") for kind in ("linear", "conv")),
        options={"forward": "integer_always"},
    ),
    "corrected": Family(net=Folding, plan=_PTQ, phases=("fold_batch_norm", "equalize", "calibrate", "bias_correct")),
    "batch_norm": Family(net=Folding, plan=_PTQ, phases=("calibrate", "correct_batch_norm")),
    "rounded": Family(net=Folding, plan=_PTQ, phases=("fold_batch_norm", "calibrate", "gptq")),
}  # fmt: skip


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """One that writes nothing by itself."""
    return L.Trainer(
        accelerator="cpu", devices=1, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip


def train(family: Family, data: Data, path: Path) -> Module:
    """Train (or calibrate) a model quantized and write its checkpoint to `path`."""
    module = family.module()
    if family.phases:
        fit = trainer(path.parent, PTQ(family.quant_plan(), phases=family.phases, seed=0, **family.options))
        fit.validate(module, datamodule=data, verbose=False)
    else:
        fit = trainer(path.parent, QAT(family.quant_plan(), **family.options), max_epochs=1)
        fit.fit(module, datamodule=data)
    fit.save_checkpoint(path)
    return module


def resume(family: Family, data: Data, path: Path) -> Module:
    """A new model after one more optimizer step from the checkpoint at `path`."""
    module = family.module(1)
    steps = SAMPLES // BATCH + 1
    fit = trainer(path.parent, QAT(family.quant_plan(), **family.options), max_epochs=-1, max_steps=steps)
    fit.fit(module, datamodule=data, ckpt_path=path)
    assert fit.global_step == steps
    return module


def evaluated(module: Module, x: Tensor) -> dict[str, Tensor]:
    """Quantized weights, and the outputs for the first samples, in evaluation, by name."""
    module.eval()
    with torch.no_grad():
        weights = {
            f"weight/{name}": layer.quantized_weight()
            for name, layer in quantized_layers(module)
            if layer.weight_quantizer
        }
        return weights | {f"output/{name}": out for name, out in module(x[:BATCH]).items()}


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the tensors of a state dict."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}
