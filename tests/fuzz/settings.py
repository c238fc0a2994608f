"""Settings of searches and sweeps."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Trainer
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.lq_sweeper import LQSweeperConf
from lq_plugin.demo.digits import DigitsCNN
from lq_plugin.model.survey import Survey
from lq_plugin.search.space.patterns import PatternSpace
from lq_plugin.search.space.space import Space
from lq_plugin.search.study.config import SearchConfig
from lq_plugin.search.sweep.overrides import JobOverrides
from lq_plugin.search.sweep.settings import SweepSettings
from tests.fuzz.mutate import mutated
from tests.fuzz.target import OTHER, SAME, Target

SPACE: dict[str, Any] = {
    "weight": {"bit_widths": [2, 4, 8], "granularities": ["per_channel", "group16"], "ranges": ["mse", "minmax"]},
    "input": ["uint8 affine mse", "float"],
    "rules": [{"match": "type:Linear", "weight": "int8 per_channel"}, {"match": "re:block.*", "input": "uint8 affine"}],
    "tie": ["down.*"],
}
OPTIONS: dict[str, Any] = {
    "metric": "val/acc", "mode": "max", "cost": ["effective_bits", "bops"], "constraints": ["effective_bits <= 4.5",
    "val/acc >= 0.9"],
    "n_trials": 3, "study_name": "fuzz", "uniform": True, "seeds": 4, "sensitivity": "auto", "sensitivity_batches": 2,
    "latency": None,
    "heartbeat": 10, "max_failures": 10, "promote_within": None, "promote_first": 4, "pruner": None,
    "calibration_batches": 8,
    "fidelity": [{"batches": 4}, {}, {"reconstruct": {"iterations": 100}}, {"qat": {"max_epochs": 1}}],
    "phases": ["fold_batch_norm", "calibrate"], "seed": 0, "worker": 0,
}  # fmt: skip
SWEEP: dict[str, Any] = {
    "study_name": "fuzz", "direction": ["maximize", "minimize"], "n_trials": 4, "n_jobs": 2, "seed": 1,
    "costs": ["effective_bits"],
    "sampler": {"_target_": "optuna.samplers.TPESampler", "multivariate": True, "n_startup_trials": 4},
    "pruner": {"_target_": "lq_plugin.search.shared.dominance.DominancePruner"}, "params": {"x": "interval(0, 1)",
    "y": "choice(1, 2)", "z": 3},
    "layers": {"weight": SPACE["weight"], "rules": SPACE["rules"], "plan": "w4a8"}, "plan_key": "callbacks.lq_qat.plan",
    "uniform": True,
    "enqueue": [{"x": 0.5}], "constraints": ["effective_bits <= 4.5"], "retries": 1, "max_failures": 3, "heartbeat": 10,
    "storage": "sqlite:///study.db",
}  # fmt: skip
WORDS = (
    *(
        "effective_bits",
        "latency",
        "min",
        "maximize",
        "val/acc <= 1",
        "kl",
        "calibrate",
        "gptq",
        "equalize",
        "residual",
        "x=1",
    ),
    *(
        "sqlite:///other.db",
        "postgresql://nobody@nowhere/x",
        "choice(1, 2)",
        "range(1, 3)",
        "interval(1, 0)",
        "optuna.pruners.NopPruner",
    ),
    *(
        {"_target_": "optuna.pruners.MedianPruner"},
        {"_target_": "optuna.samplers.RandomSampler"},
        {"match": "*", "weight": "int4"},
    ),
)


class SearchSettings(Target):
    name = "search settings"
    share = 1500
    legitimate = "another number, name or choice that `lq_plugin.search.search` takes"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = DigitsCNN(width=8)
        self.survey = Survey.of(self.model)
        self.given = {"space": SPACE, "options": OPTIONS}

    def unmutated(self) -> Any:
        return self.given

    def mutated(self, rng: random.Random) -> Any:
        part = rng.choice(list(self.given))
        return self.given | {part: mutated(rng, self.given[part], words=WORDS)}

    def use(self, case: Any) -> str:
        space = Space.parse(case["space"])
        space.bind(self.survey.infos(), self.survey.others())
        # By keywords, as from Python and from Hydra: each is there, and none is new.
        given = case["options"] if isinstance(case["options"], dict) else {}
        options = OPTIONS | {key: value for key, value in given.items() if key in OPTIONS}
        SearchConfig(self.model, None, case["space"], trainer=partial(Trainer, accelerator="cpu"), **options)
        return SAME if case == self.given else OTHER


class SweepConfig(Target):
    name = "sweep settings"
    share = 1000
    legitimate = "another number, name or choice that `hydra.sweeper` takes"
    errors = (OmegaConfBaseException,)  # Hydra's own message, before the sweeper is made

    def unmutated(self) -> Any:
        return SWEEP

    def mutated(self, rng: random.Random) -> Any:
        return mutated(rng, SWEEP, words=WORDS)

    def use(self, case: Any) -> str:
        sweeper = OmegaConf.merge(OmegaConf.structured(LQSweeperConf), OmegaConf.create(case))
        hydra = {"sweep": {"dir": str(self.folder)}, "sweeper": sweeper}
        config: Any = OmegaConf.create(
            {"hydra": hydra, "callbacks": {"lq_qat": {"plan": "w4a8"}}, "x": 0, "y": 0, "z": 0}
        )
        try:
            settings = SweepSettings.from_config(config)
            jobs = JobOverrides.parse(settings.params, [], None)
            layers = None if settings.layers is None else PatternSpace.parse(settings.layers)
            settings.plan_keys(config)
            settings.make_sampler(0)
            assert settings.study_access
        except OmegaConfBaseException as error:
            raise AssertionError(f"OmegaConf's error behind the merge: {error}") from error
        return SAME if case == SWEEP and jobs and layers else OTHER
