"""Search the bits of one model: a worker loads and calibrates once, then Optuna proposes plan after plan.

    result = search(model, datamodule, Space(weight={"bit_widths": [2, 3, 4, 8], "ranges": ["mse"]}), metric="val/acc")
    result.best(4.0).plan.to_yaml("plan.yaml")

Any number of processes may call `search` with the same study name on the same storage: they share
the trials, and `n_trials` counts those of all of them and of earlier runs.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from optuna import Study, Trial
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from lq_plugin.errors import QuantizationError
from lq_plugin.search.evaluator import Evaluator
from lq_plugin.search.interrupt import StopRequest, stop_on_signal
from lq_plugin.search.objective import ERROR, ORIGIN, RETRIES, Objective
from lq_plugin.search.progress import SearchProgress
from lq_plugin.search.result import SearchResult
from lq_plugin.search.space import Space
from lq_plugin.search.storage import StudyError, open_study, quiet

log = logging.getLogger(__name__)

#: A sampler, or what makes one from `seed=`.
Sampler: TypeAlias = "BaseSampler | Callable[..., BaseSampler]"


def tpe(seed: int) -> BaseSampler:
    """Optuna's TPE over all parameters jointly; several objectives are fine."""
    with quiet():
        return TPESampler(multivariate=True, seed=seed)


def search(
    model: LightningModule,
    datamodule: LightningDataModule | None,
    space: Space | Mapping[str, Any],
    metric: str,
    n_trials: int = 60,
    *,
    mode: str = "max",
    cost: str = "effective_bits",
    study_name: str = "lq_search",
    storage: BaseStorage | str | None = None,
    output_dir: str | Path | None = None,
    sampler: Sampler = tpe,
    seed: int = 0,
    worker: int = 0,
    uniform: bool = True,
    max_failures: int = 10,
    progress: bool = True,
    trainer: Callable[..., Trainer] = Trainer,
    calibration_batches: int = 8,
    phases: Sequence[str] = ("fold_batch_norm", "calibrate"),
    dataloader: Iterable[Any] | None = None,
) -> SearchResult:
    """Find plans with the best metric for every size.

    The model is float again in the end, bit for bit.

    Args:
        model: trained.
        datamodule: validation data to score plans on, training data to calibrate with.
        space: what may be chosen for which layer.
        metric: a name that the module logs in validation.
        n_trials: complete trials that the study shall have in the end, earlier runs and other workers included.
        mode: `"max"` or `"min"` of the metric.
        cost: the other objective, minimized: `"effective_bits"`, `"bytes"` or `"bops"`.
        study_name: a study of that name goes on.
        storage: an Optuna storage or its URL. None: `study.db` (SQLite) in `output_dir`, in memory without one.
        output_dir: gets `front.csv`, `plans/*.yaml` and `pareto.png`, also when the search is interrupted.
        sampler: an Optuna sampler, or a class or function that makes one from `seed`, which every run and worker has its own of.
        seed: of the sampler and of the order of calibration data.
        worker: tells processes on the same study apart.
        uniform: start with every bit-width of the space for all weights alike, as points of reference.
        max_failures: trials of this run that may raise before it gives up.
        progress: show a progress bar.
        trainer, calibration_batches, phases, dataloader: see `Evaluator`.

    Raises:
        QuantizationError: a space or metric that does not fit, a study made for others, too many failed trials.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the results so far are written.
    """
    if mode not in ("max", "min"):
        raise QuantizationError(f"mode is 'max' or 'min', got {mode!r}")
    if output_dir is not None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        storage = storage or f"sqlite:///{Path(output_dir).resolve() / 'study.db'}"
    evaluator = Evaluator(
        model, datamodule, trainer=trainer, calibration_batches=calibration_batches, phases=phases, dataloader=dataloader, seed=seed
    )
    with evaluator, stop_on_signal() as stop:
        bound = evaluator.calibrate(space)
        for tensor, reasons in bound.excluded.items():
            log.info("left out for %s: %s", tensor, "; ".join(reasons))
        objective = Objective(evaluator, metric, cost)
        directions = ["maximize" if mode == "max" else "minimize", "minimize"]
        first = [(bound.uniform(bits), {ORIGIN: f"uniform {bits} bits"}) for bits in bound.bit_widths if uniform]
        study = open_study(study_name, storage, directions, _fingerprint(evaluator, metric, mode, cost), first)
        earlier = study.get_trials(deepcopy=False)
        objective.remember(earlier)
        # With the same seed again it would propose the same plans again.
        entropy = np.random.SeedSequence([seed, worker, len(earlier)])
        with quiet():
            study.sampler = sampler if isinstance(sampler, BaseSampler) else sampler(seed=int(entropy.generate_state(1)[0]))
        float_bytes = evaluator.cost({}).bytes

        def result() -> SearchResult:
            return SearchResult(study, metric, cost, mode == "max", evaluator.float_metrics, float_bytes)

        bar = SearchProgress(n_trials, metric) if progress else nullcontext()
        try:
            _optimize(study, objective, n_trials, max_failures, stop, bar)
        finally:
            if output_dir is not None:
                _write(result, Path(output_dir))
    if stop.received is not None:
        raise KeyboardInterrupt(signal.strsignal(stop.received))
    return result()


def _optimize(
    study: Study, objective: Objective, n_trials: int, max_failures: int, stop: StopRequest, bar: AbstractContextManager[Any]
) -> None:
    failed: list[FrozenTrial] = []

    def complete() -> int:
        return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    with bar as shown, quiet():

        def after(study: Study, trial: FrozenTrial) -> None:
            count = complete()
            if trial.state == TrialState.FAIL:
                failed.append(trial)
                log.warning("trial %d failed: %s", trial.number, _last_line(trial))
            if shown is not None:
                shown.update(count, trial, len(failed))
            if stop or count >= n_trials or len(failed) > max_failures:
                study.stop()

        count = complete()
        if shown is not None:
            shown.update(count)
        if count < n_trials and not stop:
            try:
                study.optimize(objective, catch=(Exception,), callbacks=[after])
            except KeyboardInterrupt:
                _try_again(study, objective.interrupted)
                raise
    if len(failed) > max_failures:
        error = failed[-1].user_attrs.get(ERROR, "no traceback")
        raise StudyError(f"{len(failed)} trials of this run failed, max_failures is {max_failures}; the last one:\n{error}")


def _try_again(study: Study, trial: Trial | None) -> None:
    """Enqueue an interrupted trial, so that the next run takes it up."""
    if trial is not None and trial.params:
        kept = {ORIGIN: trial.user_attrs[ORIGIN]} if ORIGIN in trial.user_attrs else {}
        study.enqueue_trial(trial.params, user_attrs=kept | {RETRIES: trial.number})


def _fingerprint(evaluator: Evaluator, metric: str, mode: str, cost: str) -> dict[str, Any]:
    assert evaluator.space is not None
    return {
        "metric": metric,
        "mode": mode,
        "cost": cost,
        "weights of the model": evaluator.weights,
        "calibration": {"batches": evaluator.calibration_batches, "seed": evaluator.seed, "phases": list(evaluator.phases)},
        "space": evaluator.space.describe(),
    }


def _write(result: Callable[[], SearchResult], folder: Path) -> None:
    """Write until nothing is new: another worker may have finished a trial meanwhile, and written before us."""
    written = -1
    while written != len((latest := result()).candidates):
        latest.write(folder)
        written = len(latest.candidates)


def _last_line(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get(ERROR, "no traceback")).strip().splitlines()[-1]
