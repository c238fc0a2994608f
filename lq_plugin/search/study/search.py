"""Searches the bits of one model: a worker loads and calibrates it once, then Optuna proposes plan after plan.

    result = search(model, datamodule, Space(weight={"bit_widths": [2, 3, 4, 8], "ranges": ["mse"]}), metric="val/acc")
    result.best(4.0).plan.to_yaml("plan.yaml")

Any number of processes may call `search` with the same study name on the same storage: they share
the trials, and `n_trials` counts those of all of them and of earlier runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lq_plugin.search.space.space import Space
from lq_plugin.search.study.config import SearchConfig, tpe as tpe
from lq_plugin.search.study.result import SearchResult
from lq_plugin.search.study.worker import StudyWorker

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule


def search(
    model: LightningModule,
    datamodule: LightningDataModule | None,
    space: Space | Mapping[str, Any],
    metric: str,
    n_trials: int = 60,
    **options: Any,
) -> SearchResult:
    """Returns the plans with the best metric for every size. The model is float again in the end, bit for bit.

    Args:
        model: trained.
        datamodule: validation data to score plans on, training data to calibrate with.
        space: what may be chosen for which layer.
        metric: a name that the module logs in validation.
        n_trials: complete trials that the study shall have in the end.
        options: the other fields of `lq_plugin.search.SearchConfig`, such as `cost`, `constraints` and `output_dir`.

    Raises:
        QuantizationError: a space or metric that does not fit, a study with another request, too many failed trials.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the results so far are written.
    """
    return StudyWorker(SearchConfig(model, datamodule, space, metric, n_trials, **options)).work()
