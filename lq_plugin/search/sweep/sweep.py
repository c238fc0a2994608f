"""Runs a sweep of Hydra jobs: ask Optuna, launch a batch, read how its trials went. The same command continues it."""

from __future__ import annotations

import contextlib
import logging
import signal
import traceback
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import optuna
import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf
from optuna import Study
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from lq_plugin.errors import QuantizationError
from lq_plugin.search.evaluation.costs import COUNTS
from lq_plugin.search.shared.build import build
from lq_plugin.search.shared.database import StudyError, has_heartbeat, locked, quiet, shown
from lq_plugin.search.shared.dominance import REPORTS
from lq_plugin.search.shared.interrupt import StopRequest, stop_on_signal
from lq_plugin.search.shared.others import TAKEN_FOR_DEAD, OtherWorkers
from lq_plugin.search.shared.storage import open_study
from lq_plugin.search.space.patterns import PatternSpace
from lq_plugin.search.study.objective import ERROR, PLAN
from lq_plugin.search.sweep.job import INTERRUPTED, beating
from lq_plugin.search.sweep.overrides import JobOverrides
from lq_plugin.search.sweep.proposer import SweepProposer
from lq_plugin.search.sweep.settings import SweepSettings
from lq_plugin.utilities.files import make_folder, write_file
from lq_plugin.utilities.hydra_files import hidden_yaml, hide_passwords
from lq_plugin.utilities.passwords import masked, passwords_in

log = logging.getLogger(__name__)

#: Runs jobs with these overrides; the second argument is the number of the first.
Launch = Callable[[Sequence[Sequence[str]], int], None]
#: How often a trial that was interrupted is tried again.
_INTERRUPTIONS = 3
#: Trials in a row that may end before anything is trained.
_PATIENCE = 100
#: Overrides that change nothing about a trial's value.
_HARMLESS = ("hydra", "paths", "logger", "extras", "tags", "task_name")


def sweep(
    settings: SweepSettings,
    arguments: Sequence[str],
    config: DictConfig,
    config_loader: ConfigLoader | None,
    launch: Launch,
    validate: Callable[[Sequence[Sequence[str]]], None],
) -> None:
    """Runs trials until the study has `settings.n_trials`.

    `optimization_results.yaml` in `hydra.sweep.dir` names the best trials, after each batch; with `layers`,
    `best_plan.yaml` is next to it.

    Args:
        settings: what the config says.
        arguments: overrides of the command line.
        config: the whole config.
        config_loader: knows the config groups.
        launch: hands jobs to a launcher; they record how their trials went.
        validate: composes jobs without running them.

    Raises:
        QuantizationError: settings that do not fit, a study with another request, too many failures.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the results so far are written.
    """
    jobs = JobOverrides.parse(settings.params, arguments, config_loader)
    layers = None if settings.layers is None else PatternSpace.parse(settings.layers)
    plan_keys = settings.plan_keys(config)
    distributions = jobs.distributions | ({} if layers is None else layers.distributions)
    if not distributions:
        raise QuantizationError(
            "nothing to sweep: give hydra.sweeper.params, hydra.sweeper.layers, or x=choice(...) on the command line"
        )
    make_folder(settings.sweep_dir)
    passwords = passwords_in(settings.storage)
    write_file(settings.sweep_dir / "multirun.yaml", hidden_yaml(config, passwords))
    hide_passwords(passwords)
    _warn_of_times(config)
    storage = (
        settings.storage
        if isinstance(settings.storage, str)
        else build(settings.storage, BaseStorage, "hydra.sweeper.storage")
    )
    fingerprint = {
        "direction": list(settings.directions),
        "costs": list(settings.costs),
        "constraints": list(settings.constraints),
        **(COUNTS if settings.costs or settings.constraints else {}),
        "optimized_metric": OmegaConf.select(config, "optimized_metric"),
        "params": {name: str(distribution) for name, distribution in jobs.distributions.items()},
        "layers": {} if layers is None else layers.describe(),
        "overrides": [masked(text) for text in jobs.fixed if not text.lstrip("+~").startswith(_HARMLESS)],
    }
    study = open_study(settings.study_name, storage, settings.directions, fingerprint, settings.heartbeat)
    # The proposals of this process are in the queue already; what another one takes from there is drawn at random.
    study.sampler = RandomSampler(seed=settings.seed)
    known = study.get_trials(deepcopy=False)
    first = [*settings.enqueue, *(layers.uniform() if layers is not None and settings.uniform else [])]
    proposer = SweepProposer(study, settings.make_sampler(len(known)), distributions, first)
    where = shown(settings.storage) if isinstance(settings.storage, str) else settings.storage.get("_target_")
    log.info("study %s in %s: %d trials so far", settings.study_name, where, len(known))
    with stop_on_signal() as stop:
        run = _Run(settings, study, proposer, jobs, layers, plan_keys, launch, validate, stop)
        try:
            run.all()
        finally:
            run.write_results()
    if stop.received is not None:
        raise KeyboardInterrupt(signal.strsignal(stop.received))


class _Run:
    """The trials of this process."""

    def __init__(
        self,
        settings: SweepSettings,
        study: Study,
        proposer: SweepProposer,
        jobs: JobOverrides,
        layers: PatternSpace | None,
        plan_keys: Sequence[str],
        launch: Launch,
        validate: Callable[[Sequence[Sequence[str]]], None],
        stop: StopRequest,
    ) -> None:
        self.settings, self.study, self.proposer, self.jobs, self.layers = settings, study, proposer, jobs, layers
        self.plan_keys, self.launch, self.validate, self.stop = plan_keys, launch, validate, stop
        self.failures = self.idle = 0
        self.validated = False
        self.last_error = ""
        self.others = OtherWorkers(study)

    def all(self) -> None:
        """Runs batches until the study has enough trials, or too many have failed."""
        while not self.stop and (missing := self.settings.n_trials - self._done()) > 0:
            if self.failures > self.settings.max_failures:
                limit = self.settings.max_failures
                raise StudyError(
                    f"{self.failures} trials of this run failed, max_failures is {limit}; the last "
                    f"one:\n{self.last_error}"
                )
            if self.idle > _PATIENCE:
                raise StudyError(
                    f"{self.idle} trials in a row broke a constraint before they were trained; widen the space, or the "
                    "constraint"
                )
            with quiet():
                optuna.storages.fail_stale_trials(self.study)
            self._try_again()
            # Another process has them; should it be dead, they come back into the queue.
            running = len(self._trials(TrialState.RUNNING)) if has_heartbeat(self.study._storage) else 0
            if running >= missing:
                self.others.wait()
                continue
            if not self._trials(TrialState.WAITING) and self.proposer.exhausted():
                if running:
                    self.others.wait()
                    continue
                log.info("every combination has been tried")
                break
            self.others.go_on()
            self._batch(min(self.settings.n_jobs, missing - running))
        if self.failures:
            log.warning("%d trials of this run failed; the last one:\n%s", self.failures, self.last_error)

    def _batch(self, size: int) -> None:
        with locked(self.settings.storage if isinstance(self.settings.storage, str) else None):
            while len(self._trials(TrialState.WAITING)) < size and not self.proposer.exhausted():
                self.proposer.publish()
            waiting = len(self._trials(TrialState.WAITING))
            with warnings.catch_warnings():
                # Optuna does not know that we give the signs of life.
                warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used with Study.optimize")
                trials = [self.study.ask(self.proposer.distributions) for _ in range(min(size, waiting))]
        numbers = [trial.number for trial in trials]
        try:
            with beating(self.study._storage, [trial._trial_id for trial in trials]):
                overrides = {trial.number: self._overrides(trial.number, trial.params) for trial in trials}
                if not self.validated:
                    self.validate(list(overrides.values()))
                    self.validated = True
                # Launchers number their jobs without gaps.
                for block in _blocks(numbers):
                    if not self.stop:
                        self._launch(block, [overrides[number] for number in block])
        finally:
            self._settle(numbers)
            self.write_results()

    def _overrides(self, number: int, params: dict[str, Any]) -> list[str]:
        plan: list[str] = []
        if self.layers is not None:
            path = self.settings.sweep_dir / "plans" / f"{number}.yaml"
            path.parent.mkdir(exist_ok=True)
            quantization = self.layers.plan(params)
            quantization.to_yaml(path)
            storage = self.study._storage
            storage.set_trial_user_attr(
                self.study.get_trials(deepcopy=False)[number]._trial_id, PLAN, quantization.to_dict()
            )
            plan = [f"{key}={QuotedString(str(path), Quote.single).with_quotes()}" for key in self.plan_keys]
        return [*self.jobs.overrides(params), *plan]

    def _launch(self, numbers: Sequence[int], overrides: Sequence[Sequence[str]]) -> None:
        try:
            self.launch(overrides, numbers[0])
        except Exception:
            # The launcher's own failure: a worker that ran out of memory takes the batch with it.
            error = traceback.format_exc()
            log.warning("the launcher failed: %s", error.strip().splitlines()[-1])
            for trial in self._of(numbers):
                if trial.state == TrialState.RUNNING:
                    self._fail(trial, error)

    def _settle(self, numbers: Sequence[int]) -> None:
        """Records how trials ended whose jobs did not record it themselves."""
        lost = 0
        for trial in self._of(numbers):
            if trial.state == TrialState.RUNNING:
                self._fail(trial, "the job ended, or was stopped, without a word about its trial")
                trial = self._of([trial.number])[0]
            if trial.state == TrialState.FAIL and ERROR not in trial.user_attrs:
                log.warning(TAKEN_FOR_DEAD, trial.number)
            elif trial.state == TrialState.FAIL:
                self.last_error = str(trial.user_attrs.get(ERROR, "no traceback"))
                lost += 1
                log.warning("trial %d failed: %s", trial.number, self.last_error.strip().splitlines()[-1])
            elif trial.state == TrialState.COMPLETE:
                log.info("trial %d: %s %s", trial.number, trial.values, trial.params)
        self.failures += lost
        trained = [trial for trial in self._of(numbers) if trial.state != TrialState.PRUNED or _was_trained(trial)]
        self.idle = 0 if trained else self.idle + len(numbers)

    def _fail(self, trial: FrozenTrial, error: str) -> None:
        # Another process may have taken this one for dead, and failed it.
        with contextlib.suppress(UpdateFinishedTrialError):
            self.study._storage.set_trial_user_attr(trial._trial_id, ERROR, error)
            self.study._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)
            self.study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _try_again(self) -> None:
        """Queues failed trials that have attempts left, those of earlier runs included."""
        trials = self.study.get_trials(deepcopy=False)
        retried = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
        for trial in trials:
            attempts = _INTERRUPTIONS if trial.user_attrs.get(INTERRUPTED) else self.settings.retries
            history = [*trial.system_attrs.get("retry_history", ()), trial.number]
            if trial.state != TrialState.FAIL or trial.number in retried or len(history) > attempts or not trial.params:
                continue
            # As Optuna's RetryHeartbeatStaleTrialCallback writes it.
            attrs = trial.system_attrs | {"failed_trial": history[0], "retry_history": history}
            attrs = {name: value for name, value in attrs.items() if not name.startswith("constraints")}
            self.study.add_trial(
                create_trial(
                    state=TrialState.WAITING, params=trial.params, distributions=trial.distributions, system_attrs=attrs
                )
            )

    def _done(self) -> int:
        pruned = [trial for trial in self._trials(TrialState.PRUNED) if _was_trained(trial)]
        return len(self._trials(TrialState.COMPLETE)) + len(pruned)

    def _trials(self, state: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(state,))

    def _of(self, numbers: Sequence[int]) -> list[FrozenTrial]:
        trials = self.study.get_trials(deepcopy=False)
        return [trials[number] for number in numbers]

    def write_results(self) -> None:
        """Writes the best trials so far."""
        best = self.study.best_trials if self._trials(TrialState.COMPLETE) else []
        if not best:
            return
        content = {
            "name": "lq",
            "study_name": self.settings.study_name,
            "best_trials": [
                {"number": trial.number, "values": list(trial.values), "params": trial.params} for trial in best
            ],
        }
        write_file(self.settings.sweep_dir / "optimization_results.yaml", yaml.safe_dump(content, sort_keys=False))
        if self.layers is not None and len(self.settings.directions) == 1:
            write_file(self.settings.sweep_dir / "best_plan.yaml", self.layers.plan(best[0].params).to_yaml())


def _was_trained(trial: FrozenTrial) -> bool:
    """Returns whether a pruned trial was stopped during its training, not before it."""
    return bool(trial.intermediate_values) or REPORTS in trial.user_attrs


def _blocks(numbers: Sequence[int]) -> list[list[int]]:
    """Returns runs of consecutive numbers.

    >>> _blocks([3, 4, 7])
    [[3, 4], [7]]
    """
    blocks = [[number] for number in numbers[:1]]
    for before, number in pairwise(numbers):
        if number == before + 1:
            blocks[-1].append(number)
        else:
            blocks.append([number])
    return blocks


def _warn_of_times(config: DictConfig) -> None:
    raw = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    storage = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
    assert isinstance(raw, dict)
    assert isinstance(storage, dict)
    if "${now:" in str(raw["dir"]) and not storage["storage"]:
        log.warning(
            "hydra.sweep.dir=%s is another folder each time, and the study is in it: the same command would begin "
            "anew. Set hydra.sweep.dir, or hydra.sweeper.storage",
            raw["dir"],
        )
