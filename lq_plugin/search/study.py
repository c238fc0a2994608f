"""Search the bits of one model: a worker loads and calibrates once, then Optuna proposes plan after plan.

    result = search(model, datamodule, Space(weight={"bit_widths": [2, 3, 4, 8], "ranges": ["mse"]}), metric="val/acc")
    result.best(4.0).plan.to_yaml("plan.yaml")

Any number of processes may call `search` with the same study name on the same storage: they share
the trials, and `n_trials` counts those of all of them and of earlier runs.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import optuna
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from optuna import Study, Trial
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from lq_plugin.errors import QuantizationError, raise_all
from lq_plugin.search.constraint import Constraint, parse_constraints
from lq_plugin.search.costs import COUNTED, LATENCY
from lq_plugin.search.evaluator import Evaluator
from lq_plugin.search.interrupt import StopRequest, stop_on_signal
from lq_plugin.search.latency import latency_options, measure_front, share_latency
from lq_plugin.search.objective import ERROR, ORIGIN, PLAN, RETRIES, Objective
from lq_plugin.search.progress import SearchProgress
from lq_plugin.search.proposer import Proposer, waiting_trial
from lq_plugin.search.result import SearchResult
from lq_plugin.search.seeds import Seed, distinct, make_seeds, unit_costs
from lq_plugin.search.sensitivity import measure_sensitivity
from lq_plugin.search.space import Space
from lq_plugin.search.storage import HEARTBEAT, StudyError, has_heartbeat, locked, open_study, quiet

if TYPE_CHECKING:
    from lq_plugin.export.latency import LatencyOptions

log = logging.getLogger(__name__)

#: User attribute of a study whose first trials are in its queue.
SEEDED = "seeded"
_COMPLETE, _RUNNING, _WAITING = TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING
#: Seconds between two looks at what other workers do.
_POLL = 0.5

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
    cost: str | Sequence[str] | None = "effective_bits",
    constraints: str | Sequence[str] = (),
    study_name: str = "lq_search",
    storage: BaseStorage | str | None = None,
    output_dir: str | Path | None = None,
    sampler: Sampler = tpe,
    seed: int = 0,
    worker: int = 0,
    uniform: bool = True,
    seeds: int = 16,
    sensitivity: str = "auto",
    sensitivity_batches: int = 2,
    latency: Mapping[str, Any] | None = None,
    heartbeat: int = HEARTBEAT,
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
        n_trials: complete trials that the study shall have in the end, earlier runs and other workers included. There are fewer
            where the space has fewer plans.
        mode: `"max"` or `"min"` of the metric.
        cost: the other objectives, minimized: `"effective_bits"`, `"bytes"`, `"bops"`, `"latency"` (milliseconds), several of them,
            or None for the metric alone.
        constraints: what a plan must keep: `"effective_bits <= 4.5"`, `"val/acc >= 0.9"`. A plan whose cost is too high is not evaluated.
        study_name: a study of that name goes on.
        storage: an Optuna storage or its URL. None: `study.db` (SQLite) in `output_dir`, in memory without one.
        output_dir: gets `front.csv`, `plans/*.yaml` and `pareto.png`, also when the search is interrupted.
        sampler: an Optuna sampler, or a class or function that makes one from `seed`, which every run and worker has its own of.
        seed: of the sampler and of the order of calibration data.
        worker: tells processes on the same study apart.
        uniform: start with every bit-width of the space for all weights alike, as points of reference.
        seeds: then try so many plans that the sensitivity of each tensor promises to be good (`lq_plugin.search.seeds`); 0: none.
        sensitivity: what it is measured by, see `lq_plugin.search.sensitivity`.
        sensitivity_batches: of calibration data that it is measured on.
        latency: where it is measured, `{"runtime": "onnxruntime", "batch": 1, "threads": 1, "cache": "latency.json"}`, see
            `lq_plugin.export.latency.LatencyOptions`. With it, or where a cost or constraint is `latency`, each trial has one.
        heartbeat: seconds between signs of life of a running trial. One that is silent for three times as long, because its
            worker was killed, is tried again by another worker, or by the next run.
        max_failures: trials of this run that may raise before it gives up.
        progress: show a progress bar.
        trainer, calibration_batches, phases, dataloader: see `Evaluator`.

    Raises:
        QuantizationError: a space or metric that does not fit, a study made for others, too many failed trials.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the results so far are written.
    """
    if mode not in ("max", "min"):
        raise QuantizationError(f"mode is 'max' or 'min', got {mode!r}")
    costs = () if cost is None else (cost,) if isinstance(cost, str) else tuple(cost)
    limits = parse_constraints(constraints)
    timed = latency is not None or LATENCY in (*costs, *(limit.name for limit in limits))
    timing = latency_options(latency) if timed else None
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
        objective = Objective(evaluator, metric, costs, limits)
        _check_reachable(evaluator, [limit for limit in limits if limit.name in COUNTED])
        directions = ["maximize" if mode == "max" else "minimize", *(["minimize"] * len(costs))]
        study = open_study(study_name, storage, directions, _fingerprint(evaluator, metric, mode, costs, limits, timing), heartbeat)
        if timing is not None:
            with locked(storage):
                share_latency(evaluator, study, timing)
            _check_reachable(evaluator, [limit for limit in limits if limit.name == LATENCY])
        earlier = study.get_trials(deepcopy=False)
        # With the same seed again it would propose the same plans again.
        entropy = np.random.SeedSequence([seed, worker, len(earlier)])
        with quiet():
            proposing = sampler if isinstance(sampler, BaseSampler) else sampler(seed=int(entropy.generate_state(1)[0]))
        proposer = Proposer(study, proposing, evaluator, limits)
        study.sampler = proposer
        uniform_plans = [Seed(bound.uniform(bits), f"uniform {bits} bits") for bits in bound.bit_widths if uniform]
        with locked(storage):
            if not study.user_attrs.get(SEEDED):
                size = costs[0] if costs else "effective_bits"
                promising = promising_plans(evaluator, seeds, size, limits, sensitivity, sensitivity_batches) if seeds else []
                for plan in distinct([*uniform_plans, *promising]):
                    study.add_trial(waiting_trial(bound, plan.params, evaluator, limits, {ORIGIN: plan.origin}))
                study.set_user_attr(SEEDED, True)
        float_bytes = evaluator.cost({}).bytes

        def result() -> SearchResult:
            return SearchResult(study, metric, costs, mode == "max", evaluator.float_metrics, float_bytes)

        bar = SearchProgress(n_trials, metric) if progress else nullcontext()
        try:
            _Loop(study, objective, proposer, n_trials, max_failures, stop).run(bar)
            if timing is not None and stop.received is None:
                with locked(storage):
                    measure_front(evaluator, result(), timing)
        finally:
            study.sampler = proposing
            if output_dir is not None:
                _write(result, Path(output_dir))
    if stop.received is not None:
        raise KeyboardInterrupt(signal.strsignal(stop.received))
    return result()


def _check_reachable(evaluator: Evaluator, limits: Sequence[Constraint]) -> None:
    """Refuse a bound on a cost that the smallest plan breaks.

    Raises:
        QuantizationError: naming what the smallest costs.
    """
    faults = []
    for limit in limits:
        if limit.relation == "<=":
            base, costs = unit_costs(evaluator, limit.name)
            smallest = base + sum(min(values.values()) for values in costs.values())
            if smallest > limit.bound * (1 + 1e-9):
                faults.append(f"no plan of the space keeps '{limit}': the smallest has {smallest:.6g}")
    raise_all(QuantizationError, "cannot search", faults)


def promising_plans(
    evaluator: Evaluator, count: int, cost: str, limits: Sequence[Constraint] = (), measure: str = "auto", batches: int = 2
) -> list[Seed]:
    """Measure the sensitivity of each tensor, and make up to `count` plans of it.

    Raises:
        QuantizationError: see `measure_sensitivity`.
    """
    assert evaluator.space is not None
    table = measure_sensitivity(evaluator, measure, batches)
    base, costs = unit_costs(evaluator, cost)
    most = min((limit.bound for limit in limits if limit.name == cost and limit.relation == "<="), default=np.inf)
    return make_seeds(evaluator.space, table.values, costs, base, count, most)


class _Loop:
    """One worker's share of the trials."""

    def __init__(self, study: Study, objective: Objective, proposer: Proposer, n_trials: int, max_failures: int, stop: StopRequest) -> None:
        self.study, self.objective, self.proposer = study, objective, proposer
        self.n_trials, self.max_failures, self.stop = n_trials, max_failures, stop
        self.failed: list[FrozenTrial] = []
        self.shown: Any = None
        #: Only then do the trials of a killed worker end.
        self.heartbeat = has_heartbeat(study._storage)

    def run(self, bar: AbstractContextManager[Any]) -> None:
        with bar as self.shown, quiet():
            self._show(None)
            while (missing := self.n_trials - self._count(_COMPLETE)) > 0:
                if self.stop or len(self.failed) > self.max_failures or self._exhausted():
                    break
                if self.heartbeat and self._count(_RUNNING) >= missing:
                    # Others do the rest; should one of them have been killed, its trial comes back into the queue.
                    optuna.storages.fail_stale_trials(self.study)
                    time.sleep(_POLL)
                    if not self._count(_WAITING):
                        continue
                if not self._count(_WAITING):
                    self.proposer.publish()
                try:
                    self.study.optimize(self.objective, n_trials=1, catch=(Exception,), callbacks=[self._after])
                except KeyboardInterrupt:
                    _try_again(self.study, self.objective.interrupted)
                    raise
            self._reap()
        if len(self.failed) > self.max_failures:
            error = self.failed[-1].user_attrs.get(ERROR, "no traceback")
            raise StudyError(f"{len(self.failed)} trials of this run failed, max_failures is {self.max_failures}; the last one:\n{error}")

    def _exhausted(self) -> bool:
        """Whether every plan of the space has been tried."""
        size = self.proposer.space.size
        if size > 10_000:
            return False
        tried = self.study.get_trials(deepcopy=False, states=(_COMPLETE, TrialState.PRUNED))
        return len({frozenset(trial.params.items()) for trial in tried}) >= size

    def _count(self, state: TrialState) -> int:
        return len(self.study.get_trials(deepcopy=False, states=(state,)))

    def _after(self, study: Study, trial: FrozenTrial) -> None:
        if trial.state == TrialState.FAIL:
            self.failed.append(trial)
            log.warning("trial %d failed: %s", trial.number, _last_line(trial))
        self._show(trial)

    def _show(self, last: FrozenTrial | None) -> None:
        if self.shown is not None:
            self.shown.update(self._count(_COMPLETE), last, len(self.failed))

    def _reap(self) -> None:
        """Leave no trial of a killed worker running, if this worker is the last one."""
        storage = self.study._storage
        interval = storage.get_heartbeat_interval() if self.heartbeat else None  # type: ignore[attr-defined]
        until = time.monotonic() + 4 * (interval or 0)
        while not self.stop and self._count(_RUNNING) and time.monotonic() < until:
            optuna.storages.fail_stale_trials(self.study)
            time.sleep(_POLL)


def _try_again(study: Study, trial: Trial | None) -> None:
    """Enqueue an interrupted trial, so that the next run takes it up."""
    if trial is not None and trial.params:
        kept = {name: trial.user_attrs[name] for name in (ORIGIN, PLAN) if name in trial.user_attrs}
        attrs = kept | {RETRIES: trial.number}
        study.add_trial(create_trial(state=_WAITING, params=trial.params, distributions=trial.distributions, user_attrs=attrs))


def _fingerprint(
    evaluator: Evaluator, metric: str, mode: str, costs: Sequence[str], limits: Sequence[Constraint], timing: LatencyOptions | None
) -> dict[str, Any]:
    assert evaluator.space is not None
    # Only where it is measured: studies of before have none.
    return ({} if timing is None else {"latency": timing.place}) | {
        "metric": metric,
        "mode": mode,
        "cost": ", ".join(costs),
        "constraints": [str(limit) for limit in limits],
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
