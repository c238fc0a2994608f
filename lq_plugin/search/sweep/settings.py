"""The settings of `hydra.sweeper`, checked once before the first job."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from lq_plugin.errors import QuantizationError, did_you_mean, is_integer, name_faults, raise_all
from lq_plugin.search.evaluation.costs import COUNTED
from lq_plugin.search.shared.build import build, part_class
from lq_plugin.search.shared.database import HEARTBEAT
from lq_plugin.search.shared.dominance import DominancePruner
from lq_plugin.search.space.constraint import parse_constraints
from lq_plugin.search.sweep.job import StudyAccess

_SAMPLER, _PRUNER = "hydra.sweeper.sampler", "hydra.sweeper.pruner"
#: Where `+lq=qat` and `+lq=ptq` take their plan.
PLAN_KEYS = ("callbacks.lq_qat.plan", "callbacks.lq_ptq.plan")


@dataclass(frozen=True)
class SweepSettings:
    """The fields of `hydra.sweeper`.

    Args:
        study_name: name of the study; one that exists is continued.
        storage: an Optuna URL, or the config of a storage. None: `study.db` (SQLite) in `hydra.sweep.dir`.
        direction: `"minimize"` or `"maximize"`; a list for several objectives: those that the task returns, then
            `costs`.
        n_trials: trials that the study shall have in the end, complete ones and those that a pruner stopped, earlier
            runs included.
        n_jobs: jobs that the launcher gets at once.
        seed: of the sampler; each run draws others.
        sampler: the config of an Optuna sampler; TPE when None.
        pruner: the config of an Optuna pruner; None: nothing is pruned. With several objectives, a metric and costs:
            `lq_plugin.search.shared.dominance.DominancePruner`.
        params: by override key, in Hydra's sweep syntax, or a plain value; the command line wins.
        layers: a space over layers by patterns: the fields of `Space`, and `plan`, whose rules come first. Each
            trial's plan is written to `plans/<number>.yaml` in `hydra.sweep.dir`.
        plan_key: what is set to that file; None: `PLAN_KEYS`, as far as they are in the config.
        uniform: with `layers`, start with every bit-width for all weights alike.
        enqueue: parameter values of first trials; what they leave out is sampled.
        costs: of the quantized model, as further objectives: some of `COUNTED`. `TrialReport` measures them.
        constraints: on costs and logged metrics: `"effective_bits <= 4.5"`.
        retries: how often a trial that raised is tried again. Interrupted ones are tried again anyway, up to three
            times.
        max_failures: trials of this run that may fail.
        heartbeat: seconds between signs of life of a running trial; after three times as long it counts as killed.
        sweep_dir: absolute `hydra.sweep.dir`.
    """

    study_name: str
    storage: Any
    direction: Any
    n_trials: int
    n_jobs: int
    seed: int
    sampler: Any
    pruner: Any
    params: Mapping[str, Any]
    layers: Mapping[str, Any] | None
    plan_key: str | Sequence[str] | None
    uniform: bool
    enqueue: Sequence[Mapping[str, Any]]
    costs: Sequence[str]
    constraints: Sequence[str]
    retries: int
    max_failures: int
    heartbeat: int = HEARTBEAT
    sweep_dir: Path = Path()

    def __post_init__(self) -> None:
        valid = ("minimize", "maximize")
        faults = self._kind_faults()
        faults += [f"direction {d!r} is none of {', '.join(valid)}" for d in self.directions if d not in valid]
        faults += name_faults("cost", self.costs, COUNTED)
        if len(self.directions) <= len(self.costs):
            faults.append(
                f"{len(self.directions)} directions for what the task returns and {len(self.costs)} costs; write one "
                "for each"
            )
        smallest = {"n_trials": 1, "n_jobs": 1, "retries": 0, "max_failures": 0, "heartbeat": 1}
        faults += [
            f"{name} is {least} or more, got {value!r}"
            for name, least in smallest.items()
            if (value := getattr(self, name)) < least
        ]
        if self.pruner is not None and len(self.directions) > 1:
            faults += self._several_objectives()
        for entry in self.enqueue:
            if not isinstance(entry, Mapping):
                faults.append(f"enqueue is a list of mappings from parameters to values, got {entry!r}")
        raise_all(QuantizationError, "hydra.sweeper", faults)
        parse_constraints(self.constraints)
        if self.pruner is not None:
            build(self.pruner, BasePruner, _PRUNER)

    def _kind_faults(self) -> list[str]:
        """Returns what is wrong with the kinds of values that Hydra does not check."""
        seeds = {"seed": self.seed}
        if isinstance(self.sampler, Mapping) and self.sampler.get("seed") is not None:
            seeds["sampler.seed"] = self.sampler["seed"]
        faults = [
            f"{name} is an integer, 0 or more, got {value!r}"
            for name, value in seeds.items()
            if not is_integer(value, 0)
        ]
        faults += [
            f"{name} is a mapping or null, got {value!r}"
            for name in ("sampler", "pruner", "layers")
            if not isinstance(value := getattr(self, name), Mapping | None)
        ]
        if not isinstance(self.storage, str | Mapping):
            faults.append(f"storage is an Optuna URL, a mapping or null, got {self.storage!r}")
        if not isinstance(self.plan_key, str | Sequence | None):
            faults.append(f"plan_key is a config key, a list of them or null, got {self.plan_key!r}")
        return faults

    def _several_objectives(self) -> list[str]:
        """Returns why a pruner cannot serve several objectives."""
        try:
            ours = issubclass(part_class(self.pruner, BasePruner, _PRUNER), DominancePruner)
        except QuantizationError as error:
            return [str(error)]
        if not ours:
            return [
                "Optuna's pruners need a single objective; with several: "
                "lq_plugin.search.shared.dominance.DominancePruner"
            ]
        if len(self.directions) != len(self.costs) + 1:
            return [
                "DominancePruner needs one metric, all other objectives in costs: it must know them before the training"
            ]
        return []

    @classmethod
    def from_config(cls, config: DictConfig) -> SweepSettings:
        """Reads `config.hydra.sweeper`.

        Raises:
            QuantizationError: listing everything that is wrong in it.
        """
        values: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
        sweep_dir = Path(str(config.hydra.sweep.dir)).absolute()
        names = {f.name for f in fields(cls)}
        unknown = [key for key in values if key not in names and not key.startswith("_")]
        raise_all(
            QuantizationError, "hydra.sweeper", [f"unknown key {key!r}.{did_you_mean(key, names)}" for key in unknown]
        )
        values = {key: value for key, value in values.items() if key in names}
        values["storage"] = _absolute(values["storage"] or f"sqlite:///{sweep_dir / 'study.db'}")
        for name in ("constraints", "costs"):
            values[name] = [values[name]] if isinstance(values[name], str) else list(values[name] or ())
        return cls(**values, sweep_dir=sweep_dir)

    @property
    def directions(self) -> list[Any]:
        """Optuna's direction of each objective."""
        given = (
            list(self.direction)
            if isinstance(self.direction, Sequence) and not isinstance(self.direction, str)
            else [self.direction]
        )
        # Optuna's sweeper of Hydra writes an enumeration.
        return [d.name.lower() if isinstance(d, StudyDirection) else d for d in given]

    @property
    def study_access(self) -> StudyAccess:
        """The settings by which a job, in any process, finds its trial."""
        return StudyAccess(
            self.study_name,
            self.storage,
            self.heartbeat,
            self.pruner,
            len(self.directions),
            tuple(self.costs),
            parse_constraints(self.constraints),
        )

    def make_sampler(self, known: int) -> BaseSampler:
        """Returns the sampler, which draws differently for each number of `known` trials."""
        config = dict(
            self.sampler or {"_target_": "optuna.samplers.TPESampler", "multivariate": True, "constant_liar": True}
        )
        base = config.pop("seed", None)
        seed = int(np.random.SeedSequence([self.seed if base is None else base, known]).generate_state(1)[0])
        seeded = "seed" in inspect.signature(part_class(config, BaseSampler, _SAMPLER)).parameters
        found: BaseSampler = build(config | ({"seed": seed} if seeded else {}), BaseSampler, _SAMPLER)
        return found

    def plan_keys(self, config: DictConfig) -> list[str]:
        """Returns the config keys that take the path of the plan file.

        Raises:
            QuantizationError: one is not in the config, and the trials would ignore their plans.
        """
        if self.layers is None:
            return []
        wanted = (
            PLAN_KEYS
            if self.plan_key is None
            else [self.plan_key]
            if isinstance(self.plan_key, str)
            else list(self.plan_key)
        )
        there = [key for key in wanted if _has(config, key)]
        if self.plan_key is None and not there:
            raise QuantizationError(
                f"hydra.sweeper.layers: none of {', '.join(PLAN_KEYS)} is in the config; add +lq=qat, or set "
                "hydra.sweeper.plan_key"
            )
        missing = [f"{key} is not in the config" for key in wanted if key not in there and self.plan_key is not None]
        raise_all(QuantizationError, "hydra.sweeper.plan_key", missing)
        return there


def _has(config: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return isinstance(node, DictConfig) and name in node


def _absolute(storage: Any) -> Any:
    """Returns a SQLite file's URL with its absolute path, because a job may run in another folder."""
    if not isinstance(storage, str):
        return storage
    try:
        url = make_url(storage)
    except ArgumentError as error:
        raise QuantizationError(f"hydra.sweeper.storage is no URL: {error}") from None
    if url.drivername.startswith("sqlite"):
        if not url.database or url.database == ":memory:":
            raise QuantizationError(
                "hydra.sweeper.storage: a study in memory cannot be shared with jobs; name a file: sqlite:///study.db"
            )
        return url.set(database=os.path.abspath(url.database)).render_as_string(hide_password=False)
    return storage
