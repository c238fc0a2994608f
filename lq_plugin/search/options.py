"""What a search is asked for, read and checked before a model is trained, loaded or calibrated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optuna.pruners import BasePruner, NopPruner

from lq_plugin.callbacks.phases import check_phases, names_and_options
from lq_plugin.errors import MissingPackageError, QuantizationError, did_you_mean, raise_all
from lq_plugin.export_options import LatencyOptions
from lq_plugin.search.build import build
from lq_plugin.search.constraint import Constraint, parse_constraints
from lq_plugin.search.costs import COSTS, LATENCY
from lq_plugin.search.latency import latency_options
from lq_plugin.search.levels import Level, level_faults, margin_faults, parse_levels
from lq_plugin.search.sensitivity import AUTO, MEASURES

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
) -> Options:
    """Read the options of `lq_plugin.search.search` by these names; of the model nothing but its class is looked at.

    Raises:
        QuantizationError: listing everything that is wrong in them.
        MissingPackageError: a package that latency is measured with is not installed.
    """
    faults: list[str] = []
    found = Options(costs=() if cost is None else (cost,) if isinstance(cost, str) else tuple(cost))

    def read(what: Callable[[], Any], default: Any = None) -> Any:
        try:
            return what()
        except MissingPackageError:
            raise
        except QuantizationError as error:
            faults.append(str(error))
            return default

    if isinstance(n_trials, bool) or not isinstance(n_trials, int) or n_trials < 0:
        faults.append(f"n_trials is a number of trials, got {n_trials!r}")
    if mode not in ("max", "min"):
        faults.append(f"mode is 'max' or 'min', got {mode!r}")
    faults += [
        f"unknown cost {name!r}; valid: {', '.join(COSTS)}.{did_you_mean(str(name), COSTS)}" for name in found.costs if name not in COSTS
    ]
    if sensitivity not in (AUTO, *MEASURES):
        near = did_you_mean(str(sensitivity), MEASURES)
        faults.append(f"unknown sensitivity measure {sensitivity!r}; valid: {AUTO}, {', '.join(MEASURES)}.{near}")
    read(lambda: check_phases(*names_and_options(phases)))
    if fidelity is not None:
        found.levels = read(lambda: parse_levels(fidelity), ())
        read(lambda: faults.extend(level_faults(found.levels, model, phases, trainer)))
    if pruner is not None:
        found.pruning = pruner if isinstance(pruner, BasePruner) else read(lambda: build(pruner, BasePruner, "pruner"))
        if found.costs:
            number = 1 + len(found.costs)
            faults.append(f"a pruner decides about one objective (cost=None), here are {number}: dominance decides, see promote_within")
        if fidelity is None:
            faults.append("a pruner decides which trials climb to the next level: without fidelity there is one level")
    faults += margin_faults(promote_within)
    if isinstance(promote_first, bool) or not isinstance(promote_first, int) or promote_first < 0:
        faults.append(f"promote_first is a number of trials, got {promote_first!r}")
    found.limits = read(lambda: parse_constraints(constraints), ())
    if latency is not None or LATENCY in (*found.costs, *(limit.name for limit in found.limits)):
        found.timing = read(lambda: latency_options(latency))
    raise_all(QuantizationError, "cannot search", faults)
    return found
