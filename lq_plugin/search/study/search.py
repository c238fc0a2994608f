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
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage

from lq_plugin.errors import QuantizationError, raise_all
from lq_plugin.search.evaluation.costs import COUNTED, COUNTS, LATENCY
from lq_plugin.search.evaluation.evaluator import Evaluator
from lq_plugin.search.evaluation.levels import Level
from lq_plugin.search.sensitivity.measure import measure_sensitivity
from lq_plugin.search.shared.database import HEARTBEAT, locked, quiet
from lq_plugin.search.shared.interrupt import stop_on_signal
from lq_plugin.search.shared.storage import open_study
from lq_plugin.search.space.constraint import Constraint
from lq_plugin.search.space.space import Space
from lq_plugin.search.study.latency import measure_front, share_latency
from lq_plugin.search.study.loop import Loop
from lq_plugin.search.study.objective import ORIGIN, Objective
from lq_plugin.search.study.options import read_options
from lq_plugin.search.study.progress import SearchProgress
from lq_plugin.search.study.promotion import Ladder
from lq_plugin.search.study.proposer import Proposer, waiting_trial
from lq_plugin.search.study.refine import Refiner
from lq_plugin.search.study.result import SearchResult
from lq_plugin.search.study.seeds import Seed, Table, distinct, make_seeds, unit_costs
from lq_plugin.utilities.files import make_folder

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    from lq_plugin.export.options import LatencyOptions

log = logging.getLogger(__name__)

#: User attribute of a study whose first trials are in its queue.
SEEDED = "seeded"
#: What was measured for them: the harm of each choice of each unit.
SENSITIVITY = "sensitivity"

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
    fidelity: Sequence[Level | Mapping[str, Any]] | None = None,
    promote_within: float | None = None,
    promote_first: int = 4,
    pruner: BasePruner | Mapping[str, Any] | None = None,
    progress: bool = True,
    trainer: Callable[..., Trainer] | None = None,
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
        n_trials: complete trials that the study shall have in the end, earlier runs and other workers included. There
            are fewer where the space has fewer plans. Trials that were stopped below the top level of `fidelity` count,
            too.
        mode: `"max"` or `"min"` of the metric.
        cost: the other objectives, minimized: `"effective_bits"`, `"quantizable_effective_bits"`, `"bytes"`, `"bops"`,
            `"latency"` (milliseconds), several of them, or None for the metric alone; see
            `lq_plugin.search.evaluation.costs` for what they count.
        constraints: what a plan must keep: `"effective_bits <= 4.5"`, `"val/acc >= 0.9"`. A plan whose cost is too high
            is not evaluated.
        study_name: a study of that name goes on.
        storage: an Optuna storage or its URL. None: `study.db` (SQLite) in `output_dir`, in memory without one.
        output_dir: gets `front.csv`, `plans/*.yaml` and `pareto.png`, also when the search is interrupted.
        sampler: an Optuna sampler, or a class or function that makes one from `seed`, which every run and worker has
            its own of. With seeds and one cost it proposes every fourth plan, and the others fill the gaps of the front
            (`lq_plugin.search.study.refine`).
        seed: of the sampler and of the order of calibration data.
        worker: tells processes on the same study apart.
        uniform: start with every bit-width of the space for all weights alike, as points of reference.
        seeds: then try so many plans that the sensitivity of each tensor promises to be good
            (`lq_plugin.search.study.seeds`); 0: none.
        sensitivity: what it is measured by, see `lq_plugin.search.sensitivity.measure`.
        sensitivity_batches: of calibration data that it is measured on.
        latency: where it is measured, `{"runtime": "onnxruntime", "batch": 1, "threads": 1, "cache": "latency.json"}`,
            see `lq_plugin.export.options.LatencyOptions`. With it, or where a cost or constraint is `latency`, each
            trial has one.
        heartbeat: seconds between signs of life of a running trial. One that is silent for three times as long, because
            its worker was killed, is tried again by another worker, or by the next run.
        max_failures: trials of this run that may raise before it gives up.
        fidelity: levels of evaluation, the cheapest first (`lq_plugin.search.evaluation.levels.Level`): `[{"batches":
            4}, {}, {"reconstruct": {"iterations": 100}}, {"qat": {"max_epochs": 1}}]`. Only what is near the front of
            all trials at its level climbs to the next; the front has only trials of the top level. None: one level, PTQ
            on all validation data.
        promote_within: how far behind a trial that costs no less another one may be and still climb, in the metric's
            unit;
            None: a twentieth of what the float model scores. A level may have its own.
        promote_first: trials at a level that climb in any case.
        pruner: with one objective decides, too, which trials climb: an Optuna pruner, or a mapping with its `_target_`.
            Steps are levels, from 0.
        progress: show a progress bar.
        trainer, calibration_batches, phases, dataloader: see `Evaluator`.

    Raises:
        QuantizationError: a space or metric that does not fit, a study made for others, too many failed trials.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the results so far are written.
    """
    options = read_options(
        model, n_trials=n_trials, mode=mode, cost=cost, constraints=constraints, sensitivity=sensitivity,
        latency=latency,
        fidelity=fidelity, promote_within=promote_within, promote_first=promote_first, pruner=pruner, trainer=trainer,
        phases=phases,
        datamodule=datamodule, metric=metric, study_name=study_name, storage=storage, output_dir=output_dir,
        sampler=sampler, seed=seed,
        worker=worker, uniform=uniform, seeds=seeds, sensitivity_batches=sensitivity_batches, heartbeat=heartbeat,
        max_failures=max_failures, progress=progress, calibration_batches=calibration_batches, dataloader=dataloader,
    )  # fmt: skip
    space = Space.parse(space)
    costs, limits, levels, timing = options.costs, options.limits, options.levels, options.timing
    if output_dir is not None:
        make_folder(output_dir)
        storage = storage or f"sqlite:///{Path(output_dir).resolve() / 'study.db'}"
    evaluator = Evaluator(
        model,
        datamodule,
        trainer=trainer,
        calibration_batches=calibration_batches,
        phases=phases,
        dataloader=dataloader,
        seed=seed,
    )
    with evaluator, stop_on_signal() as stop:
        bound = evaluator.calibrate(space)
        for tensor, reasons in bound.excluded.items():
            log.info("left out for %s: %s", tensor, "; ".join(reasons))
        objective = Objective(evaluator, metric, costs, limits)
        if levels:
            objective.ladder = Ladder(evaluator, levels, metric, costs, mode == "max", promote_within, promote_first)
        _check_reachable(evaluator, [limit for limit in limits if limit.name in COUNTED])
        directions = ["maximize" if mode == "max" else "minimize", *(["minimize"] * len(costs))]
        fingerprint = _fingerprint(evaluator, metric, mode, costs, limits, timing, levels)
        study = open_study(study_name, storage, directions, fingerprint, heartbeat)
        if levels:
            study.pruner = options.pruning
        if timing is not None:
            with locked(storage):
                share_latency(evaluator, study, timing)
            _check_reachable(evaluator, [limit for limit in limits if limit.name == LATENCY])
        earlier = study.get_trials(deepcopy=False)
        # With the same seed again it would propose the same plans again.
        entropy = np.random.SeedSequence([seed, worker, len(earlier)])
        with quiet():
            proposing = sampler if isinstance(sampler, BaseSampler) else sampler(seed=int(entropy.generate_state(1)[0]))
        uniform_plans = [Seed(bound.uniform(bits), f"uniform {bits} bits") for bits in bound.bit_widths if uniform]
        size = costs[0] if costs else "effective_bits"
        with locked(storage):
            if not study.user_attrs.get(SEEDED):
                promising: list[Seed] = []
                if seeds:
                    table = measure_sensitivity(evaluator, sensitivity, sensitivity_batches)
                    promising = promising_plans(evaluator, table.values, seeds, size, limits)
                    study.set_user_attr(SENSITIVITY, table.values)
                for plan in distinct([*uniform_plans, *promising]):
                    study.add_trial(waiting_trial(bound, plan.params, evaluator, limits, {ORIGIN: plan.origin}))
                study.set_user_attr(SEEDED, True)
        known = study.user_attrs.get(SENSITIVITY)
        refiner = None
        if known is not None and len(costs) == 1:
            refiner = Refiner(
                bound, known, *unit_costs(evaluator, size), largest(limits, size), int(entropy.generate_state(2)[1])
            )
        proposer = Proposer(study, proposing, evaluator, limits, refiner)
        study.sampler = proposer
        float_bytes = evaluator.cost({}).bytes

        def result() -> SearchResult:
            return SearchResult(study, metric, costs, mode == "max", evaluator.float_metrics, float_bytes)

        bar = SearchProgress(n_trials, metric) if progress else nullcontext()
        try:
            Loop(study, objective, proposer, n_trials, max_failures, stop).run(bar)
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
    evaluator: Evaluator, sensitivity: Table, count: int, cost: str, limits: Sequence[Constraint] = ()
) -> list[Seed]:
    """Up to `count` plans that the sensitivity of each tensor promises to be good."""
    assert evaluator.space is not None
    base, costs = unit_costs(evaluator, cost)
    return make_seeds(evaluator.space, sensitivity, costs, base, count, largest(limits, cost))


def largest(limits: Sequence[Constraint], cost: str) -> float:
    """What a plan may cost."""
    return min((limit.bound for limit in limits if limit.name == cost and limit.relation == "<="), default=np.inf)


def _fingerprint(
    evaluator: Evaluator,
    metric: str,
    mode: str,
    costs: Sequence[str],
    limits: Sequence[Constraint],
    timing: LatencyOptions | None,
    levels: Sequence[Level],
) -> dict[str, Any]:
    assert evaluator.space is not None
    # Only where they are asked for: studies of before have none.
    added: dict[str, Any] = {} if timing is None else {"latency": timing.place}
    if levels:
        added["fidelity"] = [level.measures() for level in levels]
    return added | {
        "metric": metric,
        "mode": mode,
        "cost": ", ".join(costs),
        "constraints": [str(limit) for limit in limits],
        "weights of the model": evaluator.weights,
        "calibration": {
            "batches": evaluator.calibration_batches,
            "seed": evaluator.seed,
            "phases": list(evaluator.phases),
        },
        "space": evaluator.space.describe(),
        **COUNTS,
    }


def _write(result: Callable[[], SearchResult], folder: Path) -> None:
    """Write until nothing is new: another worker may have finished a trial meanwhile, and written before us."""
    written = -1
    while written != len((latest := result()).candidates):
        latest.write(folder)
        written = len(latest.candidates)
