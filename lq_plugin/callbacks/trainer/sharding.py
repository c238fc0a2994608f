"""Parameters that a strategy has spread over processes: what is supported, what is refused, and what must be joined.

FSDP2 (`fully_shard` in `configure_model`, with `ModelParallelStrategy`) is supported: a weight is whole when its layer
runs, so that it is quantized as in one process. Learned ranges come in after the sharding and are whole in every
process; their gradients are averaged here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lq_plugin.errors import PlanError, raise_all
from lq_plugin.model.prepare import quantizers
from lq_plugin.utilities.lightning_packages import either

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def refuse_unsupported(trainer: Trainer, pl_module: LightningModule, whole: Sequence[str] = ()) -> None:
    """Refuses, before any work, what cannot be quantized under the Trainer's strategy.

    Args:
        trainer: the Trainer.
        pl_module: the module, after `configure_model`.
        whole: what the callback does that needs the whole model in every process.

    Raises:
        PlanError: `FSDPStrategy`; layers split by tensor parallelism; weights that are not there yet; what needs the
            whole model.
    """
    faults = []
    if isinstance(trainer.strategy, either("strategies.FSDPStrategy")):
        faults.append("FSDPStrategy flattens weights and scales into one parameter")
    for name, parameter in pl_module.named_parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and "tensor_parallel" in (mesh.mesh_dim_names or ()):
            faults.append(f"{name} is split by tensor parallelism, its scales would be those of a part")
        elif parameter.is_meta:
            faults.append(f"{name} is on the meta device, it has no values yet")
    if whole and any(_sharded(pl_module)):
        faults.append(f"{', '.join(whole)}: needs the whole model, which is split over processes")
    supported = "supported: DDP, and ModelParallelStrategy with fully_shard on a module whose weights are there"
    raise_all(PlanError, f"quantization under {type(trainer.strategy).__name__} ({supported})", faults)


def warn_of_copies(trainer: Trainer, pl_module: LightningModule) -> None:
    """Warns that only copies are quantized where the Trainer trains copies: `ddp_spawn`, `ddp_fork`, `ddp_notebook`.

    Lightning brings the trained weights back into the module of the process that called `fit`, and no callback runs
    there. A module that held quantizers before takes the ranges also.
    """
    if isinstance(
        trainer.strategy.launcher, either("strategies.launchers._MultiProcessingLauncher")
    ) and not quantizers(pl_module):
        rank_zero_warn(
            f"the processes of {trainer.strategy.launcher._start_method!r} quantize their copies; the module that fit "
            "was called with "
            "stays float, with the trained weights. lq_plugin.prepare(module, plan) before fit makes it the quantized "
            "one; "
            'or use strategy="ddp", or load a checkpoint with lq_plugin.load_checkpoint'
        )


@contextmanager
def resharded(pl_module: nn.Module) -> Iterator[None]:
    """Splits parameters again after forward passes inside, which leave them whole.

    A checkpoint cannot be loaded into whole ones.
    """
    try:
        yield
    finally:
        for module in _sharded(pl_module):
            module.reshard()


@contextmanager
def whole_weights(pl_module: nn.Module) -> Iterator[None]:
    """Makes all weights whole inside, in every process, so that ranges can be found from them."""
    with resharded(pl_module):
        for module in _sharded(pl_module):
            module.unshard()
        yield


def average_gradients(trainer: Trainer, pl_module: LightningModule) -> None:
    """Gives every process the mean gradient of each learned range that FSDP2 does not know of."""
    if not isinstance(trainer.strategy, either("strategies.ModelParallelStrategy")) or not any(_sharded(pl_module)):
        return
    whole = [
        p
        for q in quantizers(pl_module)
        for p in q.parameters(recurse=False)
        if p.requires_grad and not hasattr(p, "device_mesh")
    ]
    if not whole:
        return
    group = trainer.strategy.device_mesh["data_parallel"].get_group()
    bucket = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in whole])
    dist.all_reduce(bucket, group=group)
    bucket /= dist.get_world_size(group)
    for parameter, gradient in zip(whole, bucket.split([p.numel() for p in whole]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def _sharded(pl_module: nn.Module) -> Iterator[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    yield from (module for module in pl_module.modules() if isinstance(module, FSDPModule))
