"""Float and quantized passes of the same batch, the second corrected by the first while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lq_plugin.errors import CalibrationError
from lq_plugin.model.calibrate import float_forward

Measured = TypeVar("Measured")


class CallWatch(Generic[Measured]):
    """Remembers each call of a layer in the float pass, and corrects the same call of the quantized pass by it.

    A subclass gives `measure` and `corrected`, and hooks `see` into the layer.

    Args:
        title: what is corrected, for messages.

    Attributes:
        correcting: False in the float pass, True in the quantized one.
        calls: what was measured in the float pass and waits for the quantized one.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.correcting = False
        self.calls: list[Measured] = []

    def measure(self, x: Tensor) -> Measured:
        """Returns the measured values of a tensor in float32 or wider."""
        raise NotImplementedError

    def corrected(self, x: Tensor, was: Measured, now: Measured) -> Tensor:
        """Returns the quantized pass's tensor, corrected by what was measured in both passes.

        Args:
            x: in float32 or wider.
            was, now: what `measure` returned in the float and in the quantized pass.
        """
        raise NotImplementedError

    def see(self, y: Tensor) -> Tensor:
        """Returns `y` unchanged in the float pass, and corrected in the quantized pass; same shape and dtype.

        Raises:
            CalibrationError: the quantized pass calls the layer more often.
        """
        x = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
        now = self.measure(x)
        if not self.correcting:
            self.calls.append(now)
            return y
        if not self.calls:
            raise self.fault("called it more often than the float pass")
        return self.corrected(x, self.calls.pop(0), now).to(y.dtype)

    def finish_batch(self) -> None:
        """Gets ready for the next batch's float pass.

        Raises:
            CalibrationError: the quantized pass called the layer less often.
        """
        if self.calls:
            raise self.fault(f"called it {len(self.calls)} times less than the float pass")
        self.correcting = False

    def fault(self, what: str) -> CalibrationError:
        """Returns the error for passes that differ."""
        return CalibrationError(
            f"cannot correct {self.title}: the quantized pass {what}; the way through the model depends on its values"
        )


def run_both(model: nn.Module, run: Callable[[Any], Any], batch: Any, watches: Collection[CallWatch[Any]]) -> None:
    """Runs a batch float and then quantized, with the watches correcting the second pass.

    Args:
        model: prepared and calibrated; the hooks of the watches are in it.
        run: runs the model on a batch.
        batch: given to both passes.
        watches: of the layers that are corrected.

    Raises:
        CalibrationError: the passes call a layer a different number of times.
    """
    with float_forward(model):
        run(batch)
    for watch in watches:
        watch.correcting = True
    run(batch)
    for watch in watches:
        watch.finish_batch()
