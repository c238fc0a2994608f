"""Metrics of the variants of a model in a run: float, PTQ and QAT, with the samples that were evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING, Any

from lq_plugin.callbacks.base import QuantizationCallback
from lq_plugin.callbacks.ptq import PTQ
from lq_plugin.errors import QuantizationError
from lq_plugin.model.graph.tensor_identity import leading_size
from lq_plugin.model.prepare import quantizers

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

Metrics = Mapping[str, float]


def checked(scores: Mapping[str, Metrics] | None) -> dict[str, dict[str, float]]:
    """Returns scores by variant and metric as plain floats.

    Raises:
        QuantizationError: it is something else.

    >>> checked({"float": {"val/acc": 1}})
    {'float': {'val/acc': 1.0}}
    """
    try:
        return {
            str(variant): {str(name): float(value) for name, value in metrics.items()}
            for variant, metrics in (scores or {}).items()
        }
    except (AttributeError, TypeError, ValueError):
        raise QuantizationError(
            f"scores are metrics by variant, such as {{'float': {{'val/acc': 0.98}}}}, got {scores!r}"
        ) from None


class Scoreboard:
    """Metrics by variant, and how many samples each metric is of.

    Args:
        given: scores that are known before the run.
    """

    def __init__(self, given: Mapping[str, Metrics] | None = None) -> None:
        self.by_variant = checked(given)
        self.samples: dict[str, int] = {}
        self._count: int | None = 0
        self._before: dict[str, Any] = {}

    def add(self, variant: str, metrics: Metrics) -> None:
        """Keeps the metrics of a variant; later ones of the same names replace earlier ones."""
        self.by_variant.setdefault(variant, {}).update(checked({variant: metrics})[variant])

    def start(self, trainer: Trainer) -> None:
        """Notes that an evaluation begins."""
        self._count = 0
        self._before = dict(trainer.callback_metrics)

    def see(self, batch: Any, loader: int) -> None:
        """A batch was evaluated; with several loaders nobody knows which metric is of which."""
        size = leading_size(batch)
        self._count = None if size is None or loader or self._count is None else self._count + size

    def end(self, trainer: Trainer, callback: QuantizationCallback) -> None:
        """The evaluation is over: what it logged are metrics of the model as it is.

        Before the first step of a QAT that is PTQ: `Trainer(num_sanity_val_steps=-1)` evaluates it on all samples. It
        is the float model where the schedule has not switched any quantizer on yet; an evaluation in such a part of the
        training is of none of the three variants, and not kept.
        """
        if trainer.sanity_checking and trainer.num_sanity_val_steps != inf:
            return
        chosen = quantizers(trainer.lightning_module)
        if isinstance(callback, PTQ) or not chosen or any(quantizer.is_enabled for quantizer in chosen):
            variant = "PTQ" if trainer.sanity_checking or isinstance(callback, PTQ) else "QAT"
        elif trainer.sanity_checking:
            variant = "float"
        else:
            return
        # The Trainer keeps metrics of the training there also. What was logged since the start is another tensor, even
        # where the number is the same.
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if value is not self._before.get(name)
        }
        if metrics:
            self.add(variant, metrics)
        if self._count:
            self.samples |= dict.fromkeys(metrics, self._count * trainer.world_size)
