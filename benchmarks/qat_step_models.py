"""Models of `benchmarks.qat_step`, and one training step of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.resnet18 import ResNet18
from lq_plugin.demo.resnet import CifarResNet

Batch = tuple[Tensor, Tensor]
#: Of a step, as the Trainer names them: autocast to bfloat16 or float16, or a model that is in bfloat16 itself.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Encoder(nn.Module):
    """Four encoder layers and a classifier of each token: `[N, L, 384]` to `[N, 10, L]`."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(384, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)).transpose(1, 2)


#: How to make a model, the shape of its inputs and of its labels.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...], int]] = {
    "r20": (CifarResNet, (128, 3, 32, 32), (128,), 10),
    "r18": (ResNet18, (16, 3, 112, 112), (16,), 1000),
    "encoder": (Encoder, (16, 128, 384), (16, 128), 10),
}


def load(name: str, device: str) -> tuple[nn.Module, Batch]:
    """A float model in training mode and a batch, both from a seed."""
    make, inputs, labels, classes = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().train().to(device)
        return model, (torch.randn(inputs, device=device), torch.randint(classes, labels, device=device))


class Step:
    """One training step of a model.

    Args:
        model: what is trained.
        batch: inputs and labels.
        forward: called with the inputs, where that is not the model itself.
        after: called after the optimizer's step.
        parameters: that are trained; the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        forward: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[], Any] | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
    ) -> None:
        self.model, self.batch, self.after = model, batch, after
        self.forward = model if forward is None else forward
        self.optimizer = torch.optim.SGD(model.parameters() if parameters is None else parameters, 1e-4, momentum=0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()
        if self.after is not None:
            self.after()
        if self.batch[0].is_cuda:
            torch.cuda.synchronize()

    def loss(self) -> Tensor:
        """Cross-entropy of the batch."""
        return F.cross_entropy(self.forward(self.batch[0]), self.batch[1])

    def seconds(self, clock: str) -> float:
        """Time of one step, by a key of `CLOCKS`."""
        before = CLOCKS[clock]()
        self()
        return CLOCKS[clock]() - before

    def saved(self) -> tuple[int, int]:
        """See `saved_bytes`."""
        return saved_bytes(self)


def float_step(name: str, device: str) -> Step:
    """The step that all others are compared with."""
    return Step(*load(name, device))


def in_precision(step: Any, precision: str) -> Any:
    """Returns a `Step` changed to one of `PRECISIONS`; the loss is taken outside of autocast."""
    import torch

    if precision == "bf16-true":
        step.model.to(torch.bfloat16)
        step.batch = (step.batch[0].to(torch.bfloat16), step.batch[1])
    elif precision.endswith("-mixed"):
        forward, dtype = step.forward, {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]

        def cast(x: Any) -> Any:
            with torch.autocast(x.device.type, dtype):
                return forward(x)

        step.forward = cast
    return step


def saved_bytes(step: Step) -> tuple[int, int]:
    """Bytes autograd keeps for one backward pass, as the benchmark's docstring defines them: all, and without the
    model's own."""
    sizes: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*step.model.parameters(), *step.model.buffers())}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        # Kept, so that no other storage gets its address meanwhile.
        alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.loss()
    del loss
    if step.after is not None:
        step.after()
    return sum(sizes.values()), sum(size for address, size in sizes.items() if address not in own)
