"""What a search is asked for, read and checked before a model is trained, loaded or calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from lq_plugin.errors import MissingPackageError, QuantizationError, did_you_mean, raise_all
from lq_plugin.export.options import LatencyOptions
from lq_plugin.ptq.phases import check_phases, names_and_options
from lq_plugin.search.evaluation.costs import COSTS, LATENCY
from lq_plugin.search.evaluation.levels import Level, level_faults, margin_faults, parse_levels
from lq_plugin.search.sensitivity.measure import AUTO, MEASURES
from lq_plugin.search.shared.build import build
from lq_plugin.search.space.constraint import Constraint, parse_constraints
from lq_plugin.search.study.latency import latency_options
from lq_plugin.utilities.lightning_packages import either
from lq_plugin.utilities.passwords import masked, passwords_in, without

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


@dataclass
class Options:
    """What was read.

    Args:
        costs: to be minimized.
        limits: what a plan must keep.
        levels: of evaluation, none where there is one way to evaluate.
        pruning: decides, too, which trials climb.
        timing: where latency is measured; None: it is not.
    """

    costs: tuple[str, ...] = ()
    limits: tuple[Constraint, ...] = ()
    levels: tuple[Level, ...] = ()
    pruning: BasePruner = field(default_factory=NopPruner)
    timing: LatencyOptions | None = None


#: Options that count something, and the least and the largest that each may be.
_COUNTS = {
    "n_trials": (0, None), "seed": (0, 2**32 - 1), "worker": (0, None), "seeds": (0, None), "sensitivity_batches": (1,
    None),
    "heartbeat": (1, None), "max_failures": (0, None), "promote_first": (0, None), "calibration_batches": (1, None),
}  # fmt: skip


def argument_faults(given: Mapping[str, Any]) -> dict[str, str]:
    """Returns, by its name, what is wrong with the kind of each argument of `lq_plugin.search.search`, of those that
    are given."""
    faults = {}
    for name, (least, most) in _COUNTS.items():
        value = given.get(name, least)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < least
            or (most is not None and value > most)
        ):
            limits = f"{least} or more" + ("" if most is None else f", {most} at most")
            faults[name] = f"{name} is an integer, {limits}, got {value!r}"
    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "model": ("a LightningModule", lambda x: isinstance(x, either("LightningModule"))),
        "datamodule": (
            "a LightningDataModule or None",
            lambda x: x is None or isinstance(x, either("LightningDataModule")),
        ),
        "metric": ("the name of a logged metric", lambda x: isinstance(x, str) and x != ""),
        "study_name": ("a name", lambda x: isinstance(x, str) and x != ""),
        "cost": ("a name, several names, or None", lambda x: x is None or isinstance(x, str | Sequence)),
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
    for name, (what, fits) in kinds.items():
        if name in given and not fits(given[name]):
            faults[name] = f"{name} is {what}, got {repr(masked(given[name]))[:100]}"
    if isinstance(url := given.get("storage"), str):
        try:
            make_url(url)
        except (ArgumentError, ValueError) as error:
            faults["storage"] = f"storage {masked(url)!r} is no URL: {without(str(error), passwords_in(url))}"
    return faults


def read_options(
    model: LightningModule,
    *,
    n_trials: int,
    mode: str,
    cost: str | Sequence[str] | None,
    constraints: str | Sequence[str],
    sensitivity: str,
    latency: Mapping[str, Any] | None,
    fidelity: Sequence[Level | Mapping[str, Any]] | None,
    promote_within: float | None,
    promote_first: int,
    pruner: BasePruner | Mapping[str, Any] | None,
    trainer: Callable[..., Trainer] | None,
    phases: Sequence[str],
    **others: Any,
) -> Options:
    """Read the options of `lq_plugin.search.search` by these names; of the model nothing but its class is looked at.

    Of `others`, which are used as they are, the kinds are checked.

    Raises:
        QuantizationError: listing everything that is wrong in them.
        MissingPackageError: a package that latency is measured with is not installed.
    """
    given = {name: value for name, value in locals().items() if name != "others"} | others
    wrong = argument_faults(given)
    faults = list(wrong.values())
    found = Options(costs=() if cost is None or "cost" in wrong else (cost,) if isinstance(cost, str) else tuple(cost))

    def read(what: Callable[[], Any], default: Any = None) -> Any:
        try:
            return what()
        except MissingPackageError:
            raise
        except QuantizationError as error:
            faults.append(str(error))
            return default

    if mode not in ("max", "min"):
        faults.append(f"mode is 'max' or 'min', got {mode!r}")
    faults += [
        f"unknown cost {name!r}; valid: {', '.join(COSTS)}.{did_you_mean(str(name), COSTS)}"
        for name in found.costs
        if name not in COSTS
    ]
    if sensitivity not in (AUTO, *MEASURES):
        near = did_you_mean(str(sensitivity), MEASURES)
        faults.append(f"unknown sensitivity measure {sensitivity!r}; valid: {AUTO}, {', '.join(MEASURES)}.{near}")
    read(lambda: check_phases(*names_and_options(phases)))
    if fidelity is not None:
        found.levels = read(lambda: parse_levels(fidelity), ())
        if not wrong.keys() & {"model", "trainer"}:
            read(lambda: faults.extend(level_faults(found.levels, model, phases, trainer)))
    if pruner is not None:
        found.pruning = pruner if isinstance(pruner, BasePruner) else read(lambda: build(pruner, BasePruner, "pruner"))
        if found.costs:
            number = 1 + len(found.costs)
            faults.append(
                f"a pruner decides about one objective (cost=None), here are {number}: dominance decides, see "
                "promote_within"
            )
        if fidelity is None:
            faults.append("a pruner decides which trials climb to the next level: without fidelity there is one level")
    faults += margin_faults(promote_within)
    if "constraints" not in wrong:
        found.limits = read(lambda: parse_constraints(constraints), ())
    if "latency" not in wrong and (
        latency is not None or LATENCY in (*found.costs, *(limit.name for limit in found.limits))
    ):
        found.timing = read(lambda: latency_options(latency))
    raise_all(QuantizationError, "cannot search", faults)
    return found
