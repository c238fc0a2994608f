"""One worker of a study, from its first look at the model to the files that show what was found."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from optuna import Study
from optuna.samplers import BaseSampler

from lq_plugin.errors import QuantizationError, raise_all
from lq_plugin.search.evaluation.costs import COUNTS, LATENCY, PRICED
from lq_plugin.search.evaluation.evaluator import Evaluator
from lq_plugin.search.evaluation.looks import Looks
from lq_plugin.search.sensitivity.measure import measure_sensitivity
from lq_plugin.search.sensitivity.pairs import Pair, influential_pairs, measure_pairs
from lq_plugin.search.shared.database import locked, quiet
from lq_plugin.search.shared.interrupt import StopRequest, stop_on_signal
from lq_plugin.search.shared.storage import open_study
from lq_plugin.search.space.constraint import Constraint, largest
from lq_plugin.search.space.model_space import ModelSpace, Params
from lq_plugin.search.study.candidates import Candidate
from lq_plugin.search.study.confidence import LEAST
from lq_plugin.search.study.config import SearchConfig
from lq_plugin.search.study.confirmation import Confirmation
from lq_plugin.search.study.dashboard import Dashboard
from lq_plugin.search.study.file_scores import score_files
from lq_plugin.search.study.latency import measure_front, share_latency, smallest_latency
from lq_plugin.search.study.loop import Loop
from lq_plugin.search.study.objective import MEASURE, ORIGIN, PAIRS, SENSITIVITY, Objective
from lq_plugin.search.study.progress import SearchProgress
from lq_plugin.search.study.promotion import Ladder
from lq_plugin.search.study.proposer import Proposer, waiting_trial
from lq_plugin.search.study.refine import Refiner
from lq_plugin.search.study.result import SearchResult
from lq_plugin.search.study.seeds import Seed, Table, distinct, make_seeds, smallest_plan, unit_costs
from lq_plugin.search.surrogate.problem import Problem
from lq_plugin.search.surrogate.sampler import SurrogateSampler
from lq_plugin.utilities.files import make_folder

log = logging.getLogger(__name__)

#: User attribute of a study whose first trials are in its queue.
SEEDED = "seeded"


class StudyWorker:
    """Works on a study: `open` it, `seed` its queue, `run` trials, `finish` with the files. `work` does all four.

    Other workers may do the same at the same time; what is done once for a study is done by the first one.

    Args:
        config: what is searched for.

    Raises:
        QuantizationError: a folder that cannot be made, or a Trainer with several devices.
    """

    #: Set by `open`.
    space: ModelSpace
    study: Study
    objective: Objective
    sampler: BaseSampler
    float_bytes: int

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        self.storage = config.storage
        if config.output_dir is not None:
            make_folder(config.output_dir)
            self.storage = self.storage or f"sqlite:///{Path(config.output_dir).resolve() / 'study.db'}"
        self.dashboard: Dashboard | None = None
        self.confirmation: Confirmation | None = None
        self._trials = 0
        self._unit_costs: dict[str, tuple[float, Table]] = {}
        self.evaluator = Evaluator(
            config.model,
            config.datamodule,
            trainer=config.trainer,
            calibration_batches=config.calibration_batches,
            phases=config.phases,
            dataloader=config.dataloader,
            seed=config.seed,
            target=config.target,
        )

    def work(self) -> SearchResult:
        """Searches until the study has its trials, and gives the float model back.

        Raises:
            QuantizationError: a space or metric that does not fit, a study with another request, too many failures.
            KeyboardInterrupt: after Ctrl-C or SIGTERM, once the results so far are written.
        """
        with self.evaluator, stop_on_signal() as stop:
            self.open()
            self.seed()
            try:
                self.run(stop)
            finally:
                self.finish()
        if stop.received is not None:
            raise KeyboardInterrupt(signal.strsignal(stop.received))
        return self.result()

    def open(self) -> None:
        """Calibrates the model, checks that the request can be met, and opens the study.

        Raises:
            QuantizationError: a space, metric or constraint that does not fit, or a study with another request.
        """
        config, evaluator = self.config, self.evaluator
        self.space = evaluator.calibrate(config.space)
        for tensor, reasons in self.space.excluded.items():
            log.info("left out for %s: %s", tensor, "; ".join(reasons))
        self.float_bytes = evaluator.cost({}).bytes
        self.objective = Objective(evaluator, config.metric, config.costs, config.limits)
        if config.dashboard:
            assert config.output_dir is not None
            self.dashboard = Dashboard(config.output_dir, config.metric, config.costs)
            self.objective.evaluated = self.dashboard.trial
        if config.rungs:
            self.objective.ladder = Ladder(
                evaluator,
                config.rungs,
                config.metric,
                config.costs,
                config.maximize,
                config.promote_within,
                config.promote_first,
            )
        self._check_reachable(limit for limit in config.limits if limit.name in PRICED)
        self.study = open_study(
            config.study_name,
            self.storage,
            config.directions,
            self._fingerprint(),
            config.heartbeat,
            names=[config.metric, *config.costs],
        )
        if config.rungs:
            self.study.pruner = config.pruning
        if config.timing is not None:
            with locked(self.storage):
                share_latency(evaluator, self.study, config.timing)
            self._check_reachable(limit for limit in config.limits if limit.name == LATENCY)
        self.confirmation = self._confirmation()
        # With the same seed again a sampler would propose the same plans again.
        entropy = np.random.SeedSequence([config.seed, config.worker, len(self.study.get_trials(deepcopy=False))])
        first, self._refiner_seed = entropy.generate_state(2).tolist()
        with quiet():
            given = config.sampler
            self.sampler = given if isinstance(given, BaseSampler) else given(seed=first)

    @property
    def is_open(self) -> bool:
        """True once there is a study, so that there are results, though none may be complete."""
        return hasattr(self, "study")

    def seed(self) -> None:
        """Puts the first plans into the queue, unless another worker or an earlier run has done it."""
        config = self.config
        with locked(self.storage):
            if self.study.user_attrs.get(SEEDED):
                if config.pairs and PAIRS not in self.study.user_attrs:
                    log.warning(
                        "pairs=%d: none are measured, the study has its first plans without pairs", config.pairs
                    )
                return
            widths = self.space.bit_widths if config.uniform else []
            plans = [Seed(self.space.uniform(bits), f"uniform {bits} bits") for bits in widths]
            if config.seeds:
                measured = measure_sensitivity(self.evaluator, config.sensitivity, config.sensitivity_batches)
                harm = measured.values
                base, costs = self._costs_of_choices(config.size)
                most = largest(config.limits, config.size)
                seeds = make_seeds(self.space, harm, costs, base, config.seeds, most)
                if config.pairs:
                    chosen = influential_pairs(self.space, harm, [seed.params for seed in seeds], config.pairs)
                    pairs = measure_pairs(self.evaluator, measured.measure, chosen, config.sensitivity_batches)
                    seeds = make_seeds(self.space, harm, costs, base, config.seeds, most, pairs)
                    self.study.set_user_attr(PAIRS, [pair.row() for pair in pairs])
                plans += seeds
                self.study.set_user_attr(SENSITIVITY, harm)
                self.study.set_user_attr(MEASURE, measured.measure)
            for plan in distinct(plans):
                origin = {ORIGIN: plan.origin}
                self.study.add_trial(waiting_trial(self.space, plan.params, self.evaluator, config.limits, origin))
            self.study.set_user_attr(SEEDED, True)

    def run(self, stop: StopRequest) -> None:
        """Evaluates trials until the study has enough, the space is exhausted, or `stop` asks to end.

        Raises:
            StudyError: too many failed trials, or constraints that leave hardly any plan.
        """
        config = self.config
        refiner = problem = None
        if isinstance(self.sampler, SurrogateSampler):
            problem = self._problem()
            self.sampler.attach(problem)
        else:
            refiner = self._refiner()
        proposer = Proposer(self.study, self.sampler, self.evaluator, config.limits, refiner)
        self.study.sampler = proposer
        bar = SearchProgress(config.n_trials, config.metric, config.maximize) if config.progress else nullcontext()
        loop = Loop(self.study, self.objective, proposer, config.n_trials, config.max_failures, stop)
        if (confirmation := self.confirmation) is not None:
            confirmation.failed = loop.failed_looks
            proposer.means = confirmation.means
            if problem is not None:
                problem.means = confirmation.means
        loop.after = self._after
        loop.run(bar)
        if confirmation is not None:
            confirmation.finish(self.result(), lambda: stop.received is not None or loop.too_many_failed)
            loop.check()
            if self.result().unconfirmed:
                log.warning("confirm: every plan has a look that is no number: they go by what their trials scored")
        if config.timing is not None and stop.received is None:
            with locked(self.storage):
                measure_front(self.evaluator, self.result(), config.timing)
        if config.score == "file" and stop.received is None:
            assert config.output_dir is not None
            with locked(self.storage):
                score_files(self.evaluator, self.result(), Path(config.output_dir) / "files")

    def finish(self) -> None:
        """Writes the files of the results so far, and leaves the study with the sampler that was asked for."""
        self.study.sampler = self.sampler
        if self.config.output_dir is None:
            return
        # Until nothing is new: another worker may have finished a trial or look meanwhile, and written before us.
        written: list[tuple[int, float]] | None = None
        latest = self.result()
        while written != (found := [(c.number, c.bound) for c in latest.candidates]):
            latest.write(self.config.output_dir)
            written, latest = found, self.result()
        if self.dashboard is not None and latest.candidates:
            self.dashboard.study(latest, Path(self.config.output_dir) / "report.html")

    def result(self) -> SearchResult:
        """Returns what the study has found so far; `open` comes first."""
        config = self.config
        return SearchResult(
            self.study, config.metric, config.costs, config.maximize, self.evaluator.float_metrics, self.float_bytes
        )

    def _after(self) -> None:
        """Looks again at a plan near the front, every few trials, and tells the results so far."""
        config = self.config
        self._trials += 1
        if self.confirmation is not None and (every := self.confirmation.options.every) and not self._trials % every:
            self.confirmation.step(self.result())
        if config.on_trial is not None:
            config.on_trial(self.result())

    def _confirmation(self) -> Confirmation | None:
        """Returns what scores plans again, where that is asked for."""
        config, evaluator = self.config, self.evaluator
        if config.confirming is None:
            return None
        looks = Looks(evaluator, config.confirming.looks, LEAST, config.rungs)
        if not looks.fresh:
            log.info("confirm: trials read all validation data, so looks are parts of it")

        def take(candidate: Candidate, look: int) -> float | None:
            score = looks.take(evaluator.layer_plans(candidate.plan), look).get(config.metric, float("nan"))
            return score if math.isfinite(score) else None

        return Confirmation(self.study, looks, take, config.confirming, config.n_trials)

    def _refiner(self) -> Refiner | None:
        """Returns what fills the gaps of the front, where sensitivity is known and there is one cost."""
        known = self.study.user_attrs.get(SENSITIVITY)
        if known is None or len(self.config.costs) != 1:
            return None
        size = self.config.size
        base, costs = self._costs_of_choices(size)
        return Refiner(self.space, known, base, costs, largest(self.config.limits, size), self._refiner_seed)

    def _problem(self) -> Problem:
        """Returns what is known of the space before any trial."""
        config = self.config
        timed = self.evaluator.latency is not None
        known = [limit for limit in config.limits if limit.name in PRICED or (timed and limit.name == LATENCY)]
        limits = [(limit, *self._costs_of_choices(limit.name)) for limit in known]
        costs = [self._costs_of_choices(cost) for cost in config.costs]

        def exact(params: Params) -> list[float]:
            found = self.evaluator.costs(self.space.layer_plans(params))
            return [found[cost] for cost in config.costs]

        def exact_limits(params: Params) -> list[float]:
            found = self.evaluator.costs(self.space.layer_plans(params))
            return [found[limit.name] for limit in known]

        harm = self.study.user_attrs.get(SENSITIVITY, {})
        pairs = [Pair(*row) for row in self.study.user_attrs.get(PAIRS, ())]
        return Problem(self.space, harm, costs, limits, exact, exact_limits, pairs)

    def _costs_of_choices(self, cost: str) -> tuple[float, Table]:
        """Returns `unit_costs`, computed once for each cost."""
        if cost not in self._unit_costs:
            self._unit_costs[cost] = unit_costs(self.evaluator, cost)
        return self._unit_costs[cost]

    def _check_reachable(self, limits: Iterable[Constraint]) -> None:
        """Refuses limits of costs that the smallest plan breaks."""
        faults = []
        for limit in limits:
            if limit.relation == "<=":
                smallest = self._smallest(limit.name)
                if smallest > limit.limit * (1 + 1e-9):
                    faults.append(f"no plan of the space keeps '{limit}': the smallest has {smallest:.6g}")
        raise_all(QuantizationError, "cannot search", faults)

    def _smallest(self, cost: str) -> float:
        """Returns a cost that no plan of the space is below."""
        if cost == LATENCY:
            return smallest_latency(self.evaluator)
        plan = smallest_plan(self.space, self._costs_of_choices(cost)[1])
        return self.evaluator.costs(self.space.layer_plans(plan))[cost]

    def _fingerprint(self) -> dict[str, Any]:
        """Returns what the trials of one study have in common, as plain values."""
        config, evaluator = self.config, self.evaluator
        # Only where they are asked for: earlier studies have none.
        added: dict[str, Any] = {} if config.timing is None else {"latency": config.timing.place}
        if config.rungs:
            added["fidelity"] = [rung.measures() for rung in config.rungs]
        return added | {
            "metric": config.metric,
            "mode": config.mode,
            "cost": ", ".join(config.costs),
            "constraints": [str(limit) for limit in config.limits],
            "weights of the model": evaluator.weights,
            "calibration": {
                "batches": evaluator.calibration_batches,
                "seed": evaluator.seed,
                "phases": list(evaluator.phases),
            },
            "space": self.space.describe(),
            **COUNTS,
        }
