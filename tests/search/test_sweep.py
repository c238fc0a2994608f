"""A sweep without Hydra's launchers: which trials are run, and what becomes of those that fail."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from optuna.trial import FrozenTrial, TrialState

from hydra_plugins.lq_sweeper import LQSweeperConf
from lq_plugin import QAT
from lq_plugin.demo.digits import DigitsCNN
from lq_plugin.errors import QuantizationError
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.search import DominancePruner, StudyError, TrialReport
from lq_plugin.search.study.objective import ERROR, METRICS, PLAN
from lq_plugin.search.sweep.job import INTERRUPTED, TrialFailure, TrialJob, current_trial
from lq_plugin.search.sweep.settings import SweepSettings
from lq_plugin.search.sweep.sweep import sweep

from .test_evaluator import quiet_trainer

X = {"x": "interval(0, 1)"}
COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


class Sweeps:
    """Sweeps in one folder. Jobs run here, one after the other, without Hydra; `launched` has the numbers of each
    batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launched: list[list[int]] = []
        self.given: list[list[str]] = []

    def config(self, **settings: Any) -> DictConfig:
        sweeper = OmegaConf.merge(OmegaConf.structured(LQSweeperConf), {"n_trials": 4, "heartbeat": 1, **settings})
        return OmegaConf.create(
            {
                "hydra": {"sweep": {"dir": str(self.folder)}, "sweeper": sweeper},
                "callbacks": {"lq_qat": {"plan": "w4a8"}},
                "x": 0,
            }
        )

    def __call__(self, task: Callable[[dict[str, str]], Any], arguments: Sequence[str] = (), **settings: Any) -> None:
        config = self.config(**settings)
        read = SweepSettings.from_config(config)
        job = TrialJob.wrapping(task, read.study_access)

        def launch(overrides: Sequence[Sequence[str]], first: int) -> None:
            self.launched.append(list(range(first, first + len(overrides))))
            for number, lines in enumerate(overrides, first):
                self.given.append(list(lines))
                with contextlib.suppress(TrialFailure):  # Hydra keeps it in the job's return value
                    job.run(number, dict(line.split("=", 1) for line in lines))

        sweep(read, arguments, config, None, launch, lambda batch: None)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        study = optuna.load_study(study_name="lq_sweep", storage=f"sqlite:///{self.folder / 'study.db'}")
        return study.get_trials(deepcopy=False, states=states or None)


@pytest.fixture
def sweeps(tmp_path: Path) -> Sweeps:
    return Sweeps(tmp_path)


def parabola(cfg: dict[str, str]) -> float:
    return (float(cfg["x"]) - 0.3) ** 2


def test_job_numbers_are_trial_numbers_and_the_study_goes_on(sweeps):
    sweeps(parabola, n_jobs=2, params=X)
    assert sweeps.launched == [[0, 1], [2, 3]]
    sweeps(parabola, n_jobs=3, n_trials=6, params=X)
    assert sweeps.launched[2:] == [[4, 5]]
    complete = sweeps.trials(COMPLETE)
    assert [trial.number for trial in complete] == list(range(6))
    assert len({trial.params["x"] for trial in complete}) == 6, "a run that goes on draws others"
    assert [trial.value for trial in complete] == [parabola(trial.params) for trial in complete]
    best = yaml.safe_load((sweeps.folder / "optimization_results.yaml").read_text())["best_trials"]
    assert best == [
        {"number": t.number, "values": t.values, "params": t.params}
        for t in complete
        if t.value == min(c.value for c in complete)
    ]
    sweeps(parabola, n_trials=6, params=X)
    assert len(sweeps.trials()) == 6


@pytest.mark.slow
def test_failures_are_recorded_and_the_sweep_goes_on(sweeps):
    def task(cfg: dict[str, str]) -> Any:
        return {
            "0": 1.0,
            "1": 1 / 0 if cfg["x"] == "1" else 0,
            "2": float("nan"),
            "3": None,
            "4": "text",
            "5": [1.0, 2.0],
        }[cfg["x"]]

    sweeps(task, ["x=0,1,2,3,4,5,6"], n_trials=7)
    errors = {trial.params["x"]: trial.user_attrs[ERROR] for trial in sweeps.trials(FAIL)}
    wanted = {
        1: "ZeroDivisionError",
        2: "objective is nan",
        3: "set optimized_metric",
        4: "'text'",
        5: "gave 2 values",
        6: "KeyError: '6'",
    }
    assert errors.keys() == wanted.keys()
    assert all(words in errors[x] and "Traceback" in errors[x] for x, words in wanted.items())
    assert [trial.params for trial in sweeps.trials(COMPLETE)] == [{"x": 0}]
    assert len(sweeps.trials()) == 7, "none is tried twice"


@pytest.mark.slow
def test_too_many_failures_end_it(sweeps):
    def task(cfg: dict[str, str]) -> float:
        raise RuntimeError("never")

    with pytest.raises(StudyError, match=r"3 trials of this run failed, max_failures is 2(.|\n)*RuntimeError: never"):
        sweeps(task, params=X, max_failures=2)
    assert len(sweeps.trials(FAIL)) == 3


def test_failed_trials_are_tried_again_where_asked(sweeps):
    attempts: list[str] = []

    def task(cfg: dict[str, str]) -> float:
        attempts.append(cfg["x"])
        if attempts.count(cfg["x"]) < 3:
            raise RuntimeError("not yet")
        return 1.0

    sweeps(task, params=X, n_trials=1, retries=2)
    assert len(set(attempts)) == 1
    (complete,) = sweeps.trials(COMPLETE)
    assert complete.system_attrs["retry_history"] == [0, 1]
    assert sweeps.launched == [[0], [1], [2]]


def test_interrupted_trials_are_tried_again_by_the_next_run(sweeps):
    def interrupted(cfg: dict[str, str]) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweeps(interrupted, params=X, n_trials=3, n_jobs=2)
    first, second = sweeps.trials(FAIL)
    assert first.user_attrs[INTERRUPTED]
    assert second.user_attrs[INTERRUPTED]
    assert "without a word" in second.user_attrs[ERROR]
    sweeps(parabola, params=X, n_trials=3, n_jobs=2)
    complete = sweeps.trials(COMPLETE)
    assert [trial.params["x"] for trial in complete[:2]] == [first.params["x"], second.params["x"]]
    assert len(complete) == 3


def test_a_launcher_that_dies_takes_only_what_was_unfinished(sweeps):
    deaths = []

    def task(cfg: dict[str, str]) -> float:
        if len(sweeps.trials(COMPLETE)) == 1 and not deaths:
            deaths.append(cfg["x"])
            raise MemoryError
        return parabola(cfg)

    original = TrialJob.run

    def run(self: TrialJob, number: int, cfg: Any) -> Any:
        if number == 1 and not deaths:
            deaths.append(number)
            raise OSError("the pool is gone")
        return original(self, number, cfg)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrialJob, "run", run)
        sweeps(task, params=X, n_trials=4, n_jobs=3)
    failed = sweeps.trials(FAIL)
    assert [trial.number for trial in failed] == [1, 2]
    assert all("the pool is gone" in trial.user_attrs[ERROR] for trial in failed)
    again = {
        trial.system_attrs["retry_history"][0]: trial.params
        for trial in sweeps.trials(COMPLETE)
        if "retry_history" in trial.system_attrs
    }
    assert again == {trial.number: trial.params for trial in failed}
    assert len(sweeps.trials(COMPLETE)) == 4


def test_a_job_that_was_given_up_does_not_run(sweeps):
    ran = []

    def task(cfg: dict[str, str]) -> float:
        if not ran:
            # Another process takes the second job of the batch for dead.
            study = optuna.load_study(study_name="lq_sweep", storage=f"sqlite:///{sweeps.folder / 'study.db'}")
            study.tell(1, state=FAIL)
        ran.append(cfg["x"])
        return 1.0

    sweeps(task, params=X, n_jobs=2, n_trials=2)
    first, given_up, last = sweeps.trials()
    assert ran == [str(first.params["x"]), str(last.params["x"])]
    job = TrialJob(task, SweepSettings.from_config(sweeps.config()).study_access)
    with pytest.raises(StudyError, match="trial 1 is FAIL: this job was taken for dead"):
        job.run(given_up.number, {})


def test_pruning(sweeps):
    def task(cfg: dict[str, str]) -> float:
        trial = current_trial()
        assert trial is not None
        assert trial.params == {"x": float(cfg["x"])}
        for step in range(3):
            trial.report(parabola(cfg), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return parabola(cfg)

    pruner = {"_target_": "optuna.pruners.ThresholdPruner", "upper": 0.1}
    sweeps(task, params=X, n_trials=12, pruner=pruner)
    pruned, complete = sweeps.trials(PRUNED), sweeps.trials(COMPLETE)
    assert pruned
    assert all(len(trial.intermediate_values) == 1 and trial.value > 0.1 for trial in pruned)
    assert all(trial.value <= 0.1 for trial in complete)
    assert len(pruned) + len(complete) == 12, "both were trained"
    assert current_trial() is None


DOMINANCE = {
    "_target_": "lq_plugin.search.shared.dominance.DominancePruner",
    "margin": 0.05,
    "n_startup_trials": 4,
    "n_warmup_steps": 1,
}


@pytest.mark.slow
def test_pruning_by_dominance_with_several_objectives(sweeps):
    """A trial of many bits is good, or spoilt: then others that cost no more are far better at the same step."""
    x = ", ".join(map(str, range(1, 11)))

    def task(cfg: dict[str, str]) -> float:
        trial = current_trial()
        assert trial is not None
        bits, spoilt = float(cfg["x"]), cfg["y"] == "1"
        for step in range(4):
            metric = (0.0 if spoilt else bits / 10) + 0.01 * step
            trial.report(metric, step)  # the costs are not known yet
            trial.require({"effective_bits": bits})
            trial.report(metric, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return metric

    settings = {"direction": ["maximize", "minimize"], "costs": ["effective_bits"], "pruner": DOMINANCE}
    good = [{"x": bits, "y": 0} for bits in (2, 3, 4, 5)]
    tried = [{"x": 6, "y": 1}, {"x": 1, "y": 1}, {"x": 2, "y": 1}, {"x": 3, "y": 1}, {"x": 1, "y": 0}]
    sweeps(task, params={"x": f"choice({x})", "y": "choice(0, 1)"}, n_trials=9, enqueue=[*good, *tried], **settings)
    pruned, complete = sweeps.trials(PRUNED), sweeps.trials(COMPLETE)
    assert len(pruned) + len(complete) == 9, "what was stopped in its course counts"
    # 1 and 2 bits cost less than two others that are done, however bad they are.
    assert [trial.params for trial in pruned] == [tried[0], tried[3]]
    assert [trial.user_attrs["reports"] for trial in pruned] == [
        {"costs": [bits], "steps": {"0": 0.0, "1": 0.01}} for bits in (6.0, 3.0)
    ], "at the first step after the warm-up"


def test_a_training_is_stopped_by_dominance(sweeps, datamodule, trained):
    """A real QAT: with too high a learning rate nothing is learned, at the same bits."""
    epochs = []

    def task(cfg: dict[str, str]) -> float:
        model = DigitsCNN(width=8, lr=float(cfg["lr"]))
        model.load_state_dict(trained.state_dict())
        callbacks = [QAT("w3a8"), TrialReport("val/acc")]
        trainer = quiet_trainer(callbacks=callbacks, max_epochs=3, limit_train_batches=4, num_sanity_val_steps=0)
        try:
            trainer.fit(model, datamodule=datamodule)
        finally:
            epochs.append(trainer.current_epoch)
        return float(trainer.callback_metrics["val/acc"])

    sweeps(
        task,
        params={"lr": "choice(1e-4, 2e-4, 5.0)"},
        direction=["maximize", "minimize"],
        costs=["effective_bits"],
        n_trials=3,
        pruner={**DOMINANCE, "n_startup_trials": 2, "margin": 0.2},
        enqueue=[{"lr": rate} for rate in (1e-4, 2e-4, 5.0)],
    )
    (stopped,), complete = sweeps.trials(PRUNED), sweeps.trials(COMPLETE)
    assert [trial.params["lr"] for trial in complete] == [1e-4, 2e-4]
    assert list(stopped.user_attrs["reports"]["steps"]) == ["0", "1"]
    assert stopped.user_attrs["reports"]["costs"] == [trial.values[1] for trial in complete][:1]
    assert epochs[:2] == [3, 3]
    assert epochs[2] < 3


def test_the_rules_of_the_dominance_pruner():
    study = optuna.create_study(directions=["minimize", "minimize", "maximize"])

    def trial(
        state: TrialState, *course: float, costs: Sequence[float] = (4.0, 10.0), excess: float = -1.0
    ) -> FrozenTrial:
        reports = {"costs": list(costs), "steps": {str(step): value for step, value in enumerate(course)}}
        values = [course[-1], *costs] if state == COMPLETE else None
        attrs = {"reports": reports}
        return optuna.create_trial(state=state, values=values, user_attrs=attrs, constraints={"c": excess})

    for _ in range(2):
        study.add_trial(trial(COMPLETE, 3.0, 2.0, 1.0))
    study.add_trial(trial(COMPLETE, 0.0, 0.0, 0.0, excess=1.0))  # not allowed, so nothing to be measured by

    def pruned(*course: float, costs: Sequence[float] = (4.0, 10.0), **rules: Any) -> bool:
        return DominancePruner(**{"n_startup_trials": 3, **rules}).prune(
            study, trial(TrialState.RUNNING, *course, costs=costs)
        )

    assert pruned(3.5)
    assert pruned(2.0, 2.5)
    assert not pruned(4.0, 2.0), "as good at the same step"
    assert not pruned(3.5, margin=0.5)
    assert pruned(3.6, margin=0.5)
    assert not pruned(3.5, costs=(3.0, 10.0)), "it costs less"
    assert not pruned(3.5, costs=(4.0, 11.0)), "of the second cost, more is better"
    assert pruned(3.5, costs=(5.0, 9.0))
    assert not pruned(3.5, n_dominating=3)
    assert not pruned(3.5, n_startup_trials=4)
    assert not pruned(3.5, n_warmup_steps=1)
    assert pruned(3.5, 3.5, n_warmup_steps=1)
    assert [pruned(*[9.0] * steps, interval_steps=2) for steps in (1, 2, 3)] == [True, False, True]
    assert not pruned(9.0, 9.0, 9.0, 9.0), "no complete trial has come so far"
    assert not pruned()
    assert not pruned(9.0, costs=()), "its costs are unknown"
    with pytest.raises(QuantizationError, match="DominancePruner: 3 faults"):
        DominancePruner(margin=-1, n_dominating=0, interval_steps=0)

    alone = optuna.create_study(direction="minimize")
    for value in (1.0, 1.0, 2.0):
        alone.add_trial(optuna.create_trial(value=value, intermediate_values={0: value}))
    running = alone.ask()
    running.report(3.0, 0)
    assert DominancePruner(n_startup_trials=3).prune(alone, alone.trials[-1]), "with one objective by the metric alone"


def test_costs_are_objectives_and_constraints_come_before_training(sweeps):
    trained = []

    def task(cfg: dict[str, str]) -> float:
        trial = current_trial()
        assert trial is not None
        bits = 10 * float(cfg["x"])
        trial.require({"effective_bits": bits})
        trained.append(bits)
        trial.note({"val/acc": bits / 10})
        return bits

    settings = {
        "direction": ["maximize", "minimize"],
        "costs": ["effective_bits"],
        "constraints": ["effective_bits <= 4", "val/acc >= 0.2"],
    }
    sweeps(task, params=X, n_trials=5, **settings)
    complete, pruned = sweeps.trials(COMPLETE), sweeps.trials(PRUNED)
    assert len(complete) == 5
    assert [trial.values for trial in complete] == [[bits, bits] for bits in trained]
    assert max(trained) <= 4
    assert pruned
    assert all(trial.constraints["effective_bits <= 4"] > 0 for trial in pruned)
    assert all(
        trial.constraints["val/acc >= 0.2"] == pytest.approx(0.2 - trial.user_attrs[METRICS]["val/acc"])
        for trial in complete
    )


def test_a_constraint_on_what_nobody_noted_is_a_failure(sweeps):
    with pytest.raises(StudyError, match=r"TrialReport among the callbacks\?: constraint on val/acc: no such value"):
        sweeps(parabola, params=X, constraints=["val/acc >= 0.5"], max_failures=0)


def test_layers_get_a_plan_file_each(sweeps):
    layers = {
        "plan": "w8a8",
        "rules": [
            {"match": "conv*", "weight": {"bit_widths": [2, 4, 8]}},
            {"match": "fc", "weight": ["int4", "float"]},
        ],
    }
    plans = []

    def task(cfg: dict[str, str]) -> float:
        plans.append(QuantPlan.from_yaml(cfg["callbacks.lq_qat.plan"].strip("'")))
        return float(plans[-1].rules[1].weight.bit_width)  # type: ignore[union-attr]

    sweeps(task, params=X, layers=layers, enqueue=[{"x": 0.25, "fc.weight": "float"}])
    complete = sweeps.trials(COMPLETE)
    assert [QuantPlan.from_dict(trial.user_attrs[PLAN]) for trial in complete] == plans
    assert [plan.rules[0] for plan in plans] == [QuantPlan.parse("w8a8").rules[0]] * 4
    assert complete[0].params["x"] == 0.25
    assert str(plans[0].rules[2].weight) == "float"
    assert [plan.rules[1].weight.bit_width for plan in plans[1:]] == [8, 4, 2], "all weights alike, first"
    assert QuantPlan.from_yaml(sweeps.folder / "best_plan.yaml").rules[1] == plans[3].rules[1]


def test_a_small_space_is_tried_once_and_to_the_end(sweeps):
    sweeps(lambda cfg: float(cfg["x"]), ["x=range(0,3)", "y=a,b"], n_trials=50, n_jobs=4)
    assert len(sweeps.trials(COMPLETE)) == 6
    assert len({tuple(trial.params.items()) for trial in sweeps.trials()}) == 6
    assert sweeps.launched == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["NSGAIISampler", "RandomSampler", "TPESampler"])
def test_samplers(sweeps, sampler):
    small = {"population_size": 3} if sampler == "NSGAIISampler" else {}
    settings = {"n_trials": 7, "n_jobs": 3, "params": X | {"y": "interval(0, 1)"}}
    sampler_config = {"_target_": f"optuna.samplers.{sampler}", "seed": 3, **small}
    sweeps(parabola, sampler=sampler_config, **settings)
    other = Sweeps(sweeps.folder / "again")
    other(parabola, sampler=sampler_config, **settings)
    assert [trial.params for trial in other.trials()] == [trial.params for trial in sweeps.trials()], "the seed decides"
    if sampler == "NSGAIISampler":
        assert (
            max(
                value for trial in sweeps.trials() for name, value in trial.system_attrs.items() if "generation" in name
            )
            >= 1
        )


def test_a_study_for_something_else_is_refused(sweeps):
    sweeps(parabola, ["epochs=3"], params=X)
    sweeps(parabola, ["epochs=3", "paths.data_dir=elsewhere", "logger=csv"], params=X, n_trials=5)
    with pytest.raises(StudyError, match=r"overrides: only in the study epochs=3; only now epochs=4"):
        sweeps(parabola, ["epochs=4"], params=X)
    with pytest.raises(StudyError, match=r"params x: FloatDistribution.*high=1.0.* in the study, .*high=2.0.* now"):
        sweeps(parabola, ["epochs=3"], params={"x": "interval(0, 2)"})
    assert len(sweeps.trials()) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to sweep"),
        ({"params": X, "direction": "up"}, "direction 'up' is none of minimize, maximize"),
        (
            {"params": X, "costs": ["effective_bit"]},
            r"2 faults(.|\n)*unknown cost 'effective_bit'(.|\n)*'effective_bits'(.|\n)*one for each",
        ),
        ({"params": X, "costs": [["effective_bits"]]}, r"unknown cost \['effective_bits'\]; valid: "),
        ({"params": X, "storage": "sqlite://"}, "cannot be shared"),
        ({"params": X, "storage": "nowhere"}, "is no URL"),
        ({"params": X, "enqueue": [{"x": 3}, {"z": 1}]}, r"x cannot be 3(.|\n)*no parameter 'z'"),
        (
            {"layers": {"weight": ["int4", "int8"]}, "plan_key": "callbacks.lq_ptq.plan"},
            "callbacks.lq_ptq.plan is not in the config",
        ),
        (
            {"params": X, "sampler": {"_target_": "optuna.pruners.NopPruner"}},
            "hydra.sweeper.sampler: optuna.pruners.NopPruner is no Optuna BaseSampler",
        ),
        (
            {"params": X, "sampler": {"_target_": "optuna.samplers.TPESampler", "sed": 1}},
            "unexpected keyword argument 'sed'",
        ),
        ({"params": X, "pruner": {"_target_": "os.system", "command": "true"}}, "os.system is no Optuna BasePruner"),
        (
            {"params": X, "direction": ["minimize"] * 2, "pruner": {"_target_": "optuna.pruners.MedianPruner"}},
            "single objective",
        ),
        (
            {"params": X, "direction": ["minimize"] * 2, "pruner": DOMINANCE},
            "DominancePruner needs one metric, all other",
        ),
        (
            {"params": X, "direction": ["minimize"] * 2, "pruner": {"_target_": "optuna.Nothing"}},
            "cannot find optuna.Nothing",
        ),
        ({"params": X, "sampler": "tpe"}, "sampler is a mapping or null, got 'tpe'"),
        ({"params": X, "seed": -1}, "seed is an integer, 0 or more, got -1"),
        (
            {"params": X, "sampler": {"_target_": "optuna.samplers.TPESampler", "seed": "x"}},
            "sampler.seed is an integer, 0 or more, got 'x'",
        ),
        ({"params": X, "direction": 3}, "direction 3 is none of minimize, maximize"),
        ({"params": X, "storage": 3}, "storage is an Optuna URL, a mapping or null, got 3"),
        ({"layers": "w4"}, "layers is a mapping or null, got 'w4'"),
        ({"params": {"x": "²"}}, "cannot sweep: .*x=²"),
    ],
)
def test_settings_that_cannot_be(sweeps, settings, message):
    with pytest.raises(QuantizationError, match=message):
        sweeps(parabola, **settings)


def test_a_config_without_a_quantization_callback_is_refused(sweeps):
    config = sweeps.config(layers={"weight": ["int4", "int8"]})
    del config.callbacks["lq_qat"]
    with pytest.raises(
        QuantizationError, match=r"none of callbacks.lq_qat.plan, callbacks.lq_ptq.plan is in the config; add \+lq=qat"
    ):
        SweepSettings.from_config(config).plan_keys(config)


def test_other_storages(sweeps, caplog):
    journal = {
        "_target_": "optuna.storages.JournalStorage",
        "log_storage": {
            "_target_": "optuna.storages.journal.JournalFileBackend",
            "file_path": str(sweeps.folder / "journal.log"),
        },
    }
    sweeps(parabola, params=X, storage=journal)
    assert "has no heartbeat" in caplog.text
    backend = optuna.storages.journal.JournalFileBackend(str(sweeps.folder / "journal.log"))
    study = optuna.load_study(study_name="lq_sweep", storage=optuna.storages.JournalStorage(backend))
    assert [trial.state for trial in study.trials] == [COMPLETE] * 4


def test_the_task_keeps_its_name():
    job = TrialJob.wrapping(parabola, None)  # type: ignore[arg-type]
    assert (job.__name__, job.__module__) == ("parabola", __name__)  # type: ignore[attr-defined]
    assert not HydraConfig.initialized()
