"""Example inputs from the batches of a loader."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lq_plugin.errors import ExportError
from lq_plugin.model.loaders import loaders_in


def inputs_of(batches: Iterable[Any], count: int) -> list[Tensor]:
    """Returns the input tensor of up to `count` batches, on the CPU: the batch itself, or its first element.

    Args:
        batches: a loader, or several as a LightningDataModule may give them: one after the other.
        count: of the batches.

    Raises:
        ExportError: when a batch is neither.
    """
    found: list[Tensor] = []
    for batch in itertools.chain.from_iterable(loaders_in(batches)):
        if len(found) == count:
            break
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise ExportError(
                f"a batch is a tensor or starts with one, got {type(batch).__name__}; "
                "call export_onnx(model, inputs, path) and verify of lq_plugin.export from Python for others"
            )
        found.append(x.detach().cpu())
    return found
