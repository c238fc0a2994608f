"""Everything a search is asked for, read and checked before a model is trained, loaded or calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from lq_plugin.errors import MissingPackageError, QuantizationError, is_integer, name_faults, raise_all
from lq_plugin.export.options import LatencyOptions
from lq_plugin.export.planned import known_target
from lq_plugin.export.target import TARGETS
from lq_plugin.extras import need_packages
from lq_plugin.ptq.phases import check_phases, names_and_options
from lq_plugin.search.evaluation.costs import LATENCY, unknown_costs
from lq_plugin.search.evaluation.rungs import Rung, margin_faults, parse_rungs, rung_faults
from lq_plugin.search.sensitivity.measure import AUTO, MEASURES
from lq_plugin.search.sensitivity.pairs import check_pairs
from lq_plugin.search.shared.build import build
from lq_plugin.search.shared.database import HEARTBEAT, quiet
from lq_plugin.search.space.constraint import Constraint, parse_constraints
from lq_plugin.search.space.space import Space
from lq_plugin.search.study.confidence import Confirm, check_confirm
from lq_plugin.search.study.latency import latency_options
from lq_plugin.search.surrogate.sampler import SurrogateSampler
from lq_plugin.utilities.lightning_packages import either
from lq_plugin.utilities.passwords import masked, passwords_in, without

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    from lq_plugin.search.study.result import SearchResult

#: A sampler, or a class or function that makes one from `seed=`.
Sampler: TypeAlias = "BaseSampler | Callable[..., BaseSampler]"


def tpe(seed: int) -> BaseSampler:
    """Returns Optuna's TPE over all parameters jointly, for one objective or several."""
    with quiet():
        return TPESampler(multivariate=True, seed=seed)


@dataclass(frozen=True, eq=False)
class SearchConfig:
    """Everything a search is asked for; its fields are the arguments of `lq_plugin.search.search`.

    Args:
        model: trained. Checks look at its class and attributes only, so a model that is not trained yet will do.
        datamodule: validation data to score plans on, training data to calibrate with.
        space: what may be chosen for which layer: a `Space`, or a mapping with its fields.
        metric: a name that the module logs in validation.
        n_trials: complete trials that the study shall have in the end, including those of earlier runs and of other
            workers. There are fewer where the space has fewer plans. Trials that stopped below the top rung of
            `fidelity` count also.
        mode: `"max"` or `"min"` of the metric.
        cost: the other objectives, minimized: `"effective_bits"`, `"quantizable_effective_bits"`, `"bytes"`, `"bops"`,
            `"energy"` (microjoules), `"activation_memory"` (bytes), `"latency"` (milliseconds), several of them, or
            None for the metric alone; see `lq_plugin.search.evaluation.costs` for what they count.
        constraints: what a plan must keep: `"effective_bits <= 4.5"`, `"val/acc >= 0.9"`. A plan whose cost is too high
            is not evaluated.
        study_name: name of the study; one that exists is continued.
        storage: an Optuna storage or its URL. None: `study.db` (SQLite) in `output_dir`, in memory without one.
        output_dir: folder for `front.csv`, `plans/*.yaml`, `pareto.png` and the report, written also when the search is
            interrupted.
        sampler: an Optuna sampler, or a class or function that makes one from `seed`, which differs between runs and
            workers. `lq_plugin.search.SurrogateSampler`, the default, proposes all plans after the first ones. Of any
            other, such as `lq_plugin.search.tpe`, with seeds and one cost, comes every fourth plan, and the rest fill
            the gaps of the front (`lq_plugin.search.study.refine`).
        seed: of the sampler and of the order of calibration data, 0 to 2^32 - 1.
        worker: number of this process among those on the same study, from 0.
        uniform: start with every bit-width of the space for all weights alike, as points of reference.
        seeds: number of plans to try next that the sensitivity of each tensor predicts to be good
            (`lq_plugin.search.study.seeds`); 0: none.
        sensitivity: the measure that predicts them, see `lq_plugin.search.sensitivity.measure`.
        sensitivity_batches: batches of calibration data that it is measured on.
        pairs: number of pairs of choices that are measured together as well, those that matter most to these plans
            (`lq_plugin.search.sensitivity.pairs`): plans are then chosen by a quadratic program, and a
            `SurrogateSampler` knows the pairs before any trial.
        latency: where latency is measured, `{"runtime": "onnxruntime", "batch": 1, "threads": 1, "cache":
            "latency.json"}`, see `lq_plugin.export.options.LatencyOptions`; the runtime is that of the target unless
            it is named. With it, or where a cost or constraint is `latency`, each trial has one.
        heartbeat: seconds between signs of life of a running trial. A trial that is silent for three times as long,
            because its worker was killed, is tried again by another worker, or by the next run.
        max_failures: trials of this run, and looks at plans (`confirm`), that may raise before it gives up.
        fidelity: rungs of evaluation, the cheapest first (`lq_plugin.search.evaluation.rungs.Rung`): `[{"batches":
            4}, {}, {"reconstruct": {"iterations": 100}}, {"qat": {"max_epochs": 1}}]`. Only trials near the front of
            their rung climb to the next; the front of the search has trials of the top rung only. None: one rung,
            PTQ on all validation data.
        promote_within: by how much, in the metric's unit, a trial may be worse than another one that costs no more, and
            still climb. None: a twentieth of what the float model scores. A rung may have its own.
        promote_first: trials at a rung that climb in any case.
        pruner: with one objective, also decides which trials climb: an Optuna pruner, or a mapping with its `_target_`.
            Steps are rungs, from 0.
        progress: show a progress bar.
        target: name of the export target that plans are for (`lq_plugin.export.target`): what its files cannot hold is
            no choice, and the others are on its own grid. None: any plan.
        score: `"file"` writes each plan of the front for `target` at the end, into `output_dir`, and evaluates the
            model computed by the file: its metrics, bytes and milliseconds stand next to those of the trial. `"model"`:
            no files.
        confirm: score the plans near the front again, `{"looks": 8}`, on validation batches that trials do not read
            (`limit_val_batches`), or on parts of those that they read, and with other seeds
            (`lq_plugin.search.study.confidence.Confirm`). The front and `best` then go by the lower bound of each
            plan's interval. None: each plan is scored once.
        dashboard: write notes and artifacts for optuna-dashboard: of each trial its plan, of the study its page
            (`lq_plugin.search.study.dashboard`); needs `output_dir`.
        on_trial: called after each trial of this process with the `SearchResult` so far, such as
            `lq_plugin.search.StudyLogs(loggers).update`.
        trainer, calibration_batches, phases, dataloader: see `lq_plugin.search.Evaluator`.

    Attributes:
        costs: names of the costs that are minimized.
        limits: the constraints.
        confirming: how plans are scored again; None: not at all.
        rungs: of evaluation; empty where there is one way to evaluate.
        pruning: the pruner; one that never prunes when none is given.
        timing: where latency is measured; None: nowhere.

    Raises:
        QuantizationError: listing everything that is wrong.
        MissingPackageError: a package that latency is measured with is not installed.
    """

    model: LightningModule = field(repr=False)
    datamodule: LightningDataModule | None = field(repr=False)
    space: Space | Mapping[str, Any]
    metric: str
    n_trials: int = 60
    _: KW_ONLY
    mode: Literal["max", "min"] = "max"
    cost: str | Sequence[str] | None = "effective_bits"
    constraints: str | Sequence[str] = ()
    study_name: str = "lq_search"
    storage: BaseStorage | str | None = field(default=None, repr=False)  # a URL may have a password
    output_dir: str | Path | None = None
    sampler: Sampler = SurrogateSampler
    seed: int = 0
    worker: int = 0
    uniform: bool = True
    seeds: int = 16
    sensitivity: str = AUTO
    sensitivity_batches: int = 2
    pairs: int = 0
    latency: Mapping[str, Any] | None = None
    heartbeat: int = HEARTBEAT
    max_failures: int = 10
    fidelity: Sequence[Rung | Mapping[str, Any]] | None = None
    promote_within: float | None = None
    promote_first: int = 4
    pruner: BasePruner | Mapping[str, Any] | None = None
    progress: bool = True
    target: str | None = None
    score: Literal["model", "file"] = "model"
    confirm: Confirm | Mapping[str, Any] | None = None
    dashboard: bool = False
    on_trial: Callable[[SearchResult], object] | None = field(default=None, repr=False)
    trainer: Callable[..., Trainer] | None = None
    calibration_batches: int = 8
    phases: Sequence[str | Mapping[str, Any]] = ("fold_batch_norm", "calibrate")
    dataloader: Iterable[Any] | None = field(default=None, repr=False)
    costs: tuple[str, ...] = field(init=False, repr=False, default=())
    limits: tuple[Constraint, ...] = field(init=False, repr=False, default=())
    confirming: Confirm | None = field(init=False, repr=False, default=None)
    rungs: tuple[Rung, ...] = field(init=False, repr=False, default=())
    pruning: BasePruner = field(init=False, repr=False, default_factory=NopPruner)
    timing: LatencyOptions | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        wrong = self._wrong_kinds()
        faults = list(wrong.values())

        def read(what: Callable[[], Any], default: Any = None) -> Any:
            try:
                return what()
            except MissingPackageError:
                raise
            except QuantizationError as error:
                faults.append(str(error))
                return default

        if self.output_dir is not None:
            need_packages("search(output_dir=...), which draws the front,", "matplotlib")
        if self.dashboard is True:
            need_packages("dashboard=True", "optuna_dashboard")
            faults += [] if self.output_dir is not None else ["dashboard=True needs output_dir, a folder for artifacts"]
        elif self.dashboard is not False:
            faults.append(f"dashboard is True or False, got {self.dashboard!r}")
        if self.mode not in ("max", "min"):
            faults.append(f"mode is 'max' or 'min', got {self.mode!r}")
        costs: tuple[str, ...] = ()
        if self.cost is not None and "cost" not in wrong:
            costs = (self.cost,) if isinstance(self.cost, str) else tuple(self.cost)
        faults += unknown_costs(costs)
        faults += name_faults("sensitivity measure", [self.sensitivity], (AUTO, *MEASURES))
        if self.pairs and "pairs" not in wrong and self.sensitivity in MEASURES:
            read(lambda: check_pairs(self.sensitivity))
        if self.pairs and self.seeds == 0:
            faults.append(f"pairs={self.pairs!r} are those of the first plans: seeds is 1 or more then, got 0")
        read(lambda: check_phases(*names_and_options(self.phases)))
        if self.target is not None:
            read(lambda: known_target(self.target))
        faults += self._score_faults()
        confirming = read(lambda: check_confirm(self.confirm))
        rungs: tuple[Rung, ...] = ()
        if (fidelity := self.fidelity) is not None:
            rungs = read(lambda: parse_rungs(fidelity), ())
            if not wrong.keys() & {"model", "trainer"}:
                read(lambda: faults.extend(rung_faults(rungs, self.model, self.phases, self.trainer)))
        pruning = self.pruning
        if self.pruner is not None:
            given = self.pruner
            pruning = given if isinstance(given, BasePruner) else read(lambda: build(given, BasePruner, "pruner"))
            faults += self._pruner_faults(len(costs))
        faults += margin_faults(self.promote_within)
        limits = read(lambda: parse_constraints(self.constraints), ()) if "constraints" not in wrong else ()
        timed = self.latency is not None or LATENCY in (*costs, *(limit.name for limit in limits))
        timing = read(lambda: latency_options(self.latency, self.target)) if timed and "latency" not in wrong else None
        raise_all(QuantizationError, "cannot search", faults)
        derived = {"costs": costs, "limits": limits, "rungs": rungs, "pruning": pruning, "timing": timing}
        derived["confirming"] = confirming
        for name, value in (derived | {"space": Space.parse(self.space)}).items():
            object.__setattr__(self, name, value)

    @property
    def maximize(self) -> bool:
        """True if more of the metric is better."""
        return self.mode == "max"

    @property
    def size(self) -> str:
        """Name of the cost that plans of different sizes are compared by."""
        return self.costs[0] if self.costs else "effective_bits"

    @property
    def directions(self) -> list[str]:
        """Optuna's direction of each objective: the metric, then the costs."""
        return ["maximize" if self.maximize else "minimize", *(["minimize"] * len(self.costs))]

    def _wrong_kinds(self) -> dict[str, str]:
        """Returns what is wrong with the kind of each field, by its name."""
        given = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}
        faults = {}
        for name, (least, most) in _COUNTS.items():
            value = given[name]
            if not is_integer(value, least) or (most is not None and value > most):
                allowed = f"{least} or more" + ("" if most is None else f", {most} at most")
                faults[name] = f"{name} is an integer, {allowed}, got {value!r}"
        for name, (kind, fits) in _KINDS.items():
            if not fits(given[name]):
                faults[name] = f"{name} is {kind}, got {repr(masked(given[name]))[:100]}"
        if isinstance(url := self.storage, str):
            try:
                make_url(url)
            except (ArgumentError, ValueError) as error:
                faults["storage"] = f"storage {masked(url)!r} is no URL: {without(str(error), passwords_in(url))}"
        return faults

    def _score_faults(self) -> Iterable[str]:
        """Returns why files cannot be scored."""
        if self.score not in ("model", "file"):
            yield f"score is 'model' or 'file', got {self.score!r}"
        if self.score == "file":
            chosen = TARGETS.get(self.target or "")
            if self.target is None or (chosen is not None and chosen.suffix is None):
                files = ", ".join(name for name, target in TARGETS.items() if target.suffix is not None)
                yield f"score='file' needs a target that writes files: {files}; got target={self.target!r}"
            if self.output_dir is None:
                yield "score='file' needs output_dir, a folder for the files"
            if self.fidelity is not None:
                yield "score='file' writes models that are calibrated, not trained: it is for fidelity=None"

    def _pruner_faults(self, costs: int) -> Iterable[str]:
        """Returns why a pruner, which is given, has nothing to decide."""
        if costs:
            yield (
                f"a pruner decides about one objective (cost=None), here are {1 + costs}: dominance decides, see "
                "promote_within"
            )
        if self.fidelity is None:
            yield "a pruner decides which trials climb to the next rung: without fidelity there is one rung"


#: Fields that count something: the least and the largest that each may be.
_COUNTS: dict[str, tuple[int, int | None]] = {
    "n_trials": (0, None),
    "seed": (0, 2**32 - 1),
    "worker": (0, None),
    "seeds": (0, None),
    "sensitivity_batches": (1, None),
    "pairs": (0, None),
    "heartbeat": (1, None),
    "max_failures": (0, None),
    "promote_first": (0, None),
    "calibration_batches": (1, None),
}
#: What the other fields are, in words, and whether a value is that.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a LightningModule", lambda x: isinstance(x, either("LightningModule"))),
    "datamodule": (
        "a LightningDataModule or None",
        lambda x: x is None or isinstance(x, either("LightningDataModule")),
    ),
    "metric": ("the name of a logged metric", lambda x: isinstance(x, str) and x != ""),
    "study_name": ("a name", lambda x: isinstance(x, str) and x != ""),
    "cost": ("a name, several names, or None", lambda x: isinstance(x, str | Sequence | None)),
    "constraints": ("a text or several", lambda x: isinstance(x, str | Sequence)),
    "latency": ("a mapping of options or None", lambda x: isinstance(x, Mapping | None)),
    "storage": ("an Optuna storage, its URL, or None", lambda x: isinstance(x, BaseStorage | str | None)),
    "output_dir": ("a folder or None", lambda x: isinstance(x, str | Path | None)),
    "sampler": (
        "an Optuna sampler, or what makes one from a seed",
        lambda x: isinstance(x, BaseSampler) or callable(x),
    ),
    "trainer": ("a class or function that makes a Trainer", lambda x: x is None or callable(x)),
    "dataloader": ("an iterable of batches or None", lambda x: isinstance(x, Iterable | None)),
    "uniform": ("true or false", lambda x: isinstance(x, bool)),
    "progress": ("true or false", lambda x: isinstance(x, bool)),
}
