"""Scores of exported files: each plan of a front, written for the study's target and evaluated in its runtime."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lq_plugin.errors import ExportError
from lq_plugin.export.certificate import computed_by
from lq_plugin.export.inputs import inputs_of
from lq_plugin.export.target import Target, export_model, target_of
from lq_plugin.model.calibrate import evaluating
from lq_plugin.search.evaluation.costs import COSTS
from lq_plugin.search.evaluation.evaluator import Evaluator
from lq_plugin.search.study.latency import example_inputs
from lq_plugin.search.study.result import FILES, SearchResult
from lq_plugin.utilities.files import make_folder

log = logging.getLogger(__name__)

#: Runs of a file that count; the median does.
_ROUNDS = 25


def score_files(evaluator: Evaluator, result: SearchResult, folder: Path) -> None:
    """Writes a file for each plan of the front, evaluates the model computed by it, and keeps the scores in the study.

    Args:
        evaluator: calibrated, with a target.
        result: whose front is scored; plans that have scores are left out.
        folder: of the files, which stay there under their plans' names.

    Raises:
        ExportError: a file that cannot be written or read, or a validation that does not call the module's forward.
    """
    target = target_of(name=evaluator.target)
    inputs = example_inputs(evaluator)
    batches = _calibration_inputs(evaluator) if target.needs_batches({}) else None
    scores = dict(result.study.user_attrs.get(FILES, {}))
    for candidate in result.front:
        if str(candidate.number) in scores:
            continue
        evaluator.apply(evaluator.layer_plans(candidate.plan))
        path = make_folder(folder) / f"{Path(candidate.file_name).stem}{target.suffix}"
        with evaluating(evaluator.model):
            size = export_model(evaluator.model, path, inputs, batches, target.name)
        with computed_by(evaluator.model, target, path, None) as calls:
            metrics = evaluator.validate()
        if not calls.number:
            raise ExportError(
                f"score=file: the validation_step of {type(evaluator.model).__name__} does not call self(...), so it "
                "cannot be computed by a file"
            )
        found = {f"file/{name}": value for name, value in metrics.items() if name not in COSTS}
        scores[str(candidate.number)] = found | {"file_bytes": size, "file_ms": _milliseconds(target, path, inputs)}
        log.info("score=file: trial %d: %s", candidate.number, scores[str(candidate.number)])
    result.study.set_user_attr(FILES, scores)


def _calibration_inputs(evaluator: Evaluator) -> list[Any]:
    """Returns inputs of training data, as many batches as ranges come from."""
    loader = evaluator.dataloader
    if loader is None:
        source: Any = evaluator.datamodule or evaluator.model
        loader = source.train_dataloader()
    return list(inputs_of(loader, evaluator.calibration_batches))


def _milliseconds(target: Target, path: Path, inputs: list[Any]) -> float:
    """Returns the median time of a sample, of runs on one batch."""
    run: Callable[..., Any] = target.open(path, target.runtime_of(None), None).run
    run(*inputs)
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        run(*inputs)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3 / len(inputs[0])
