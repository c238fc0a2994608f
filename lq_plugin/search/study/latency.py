"""The latency table of a search: every layer under every pair of specs that the space has for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from optuna import Study
from torch import Tensor

from lq_plugin.errors import CalibrationError, ExportError
from lq_plugin.export.inputs import inputs_of
from lq_plugin.export.options import LatencyOptions
from lq_plugin.export.target import TARGETS, Target, timed_runtimes
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.search.evaluation.evaluator import Evaluator
from lq_plugin.search.space.model_space import ModelSpace
from lq_plugin.search.study.result import MEASURED, TABLE, SearchResult

if TYPE_CHECKING:
    from lq_plugin.export.latency import LatencyTable

log = logging.getLogger(__name__)


def latency_options(given: Mapping[str, Any] | None, target: str | None = None) -> LatencyOptions:
    """Returns the options of a mapping such as `{"runtime": "onnxruntime", "batch": 1}`.

    Args:
        given: options by name.
        target: export target of the search, whose runtime is the default; None: there is none.

    Raises:
        ExportError: options that do not exist, or with impossible values; a target whose layers cannot be timed.
        MissingPackageError: without the runtime, or what writes its files (`pip install "lq_plugin[onnx]"`).
    """
    chosen = dict(given or {})
    if target in TARGETS and "runtime" not in chosen:
        chosen["runtime"] = _runtime_of(TARGETS[target])
    try:
        options = LatencyOptions(**chosen)
    except TypeError as error:
        raise ExportError(
            f"options of latency: {error}; valid: {', '.join(LatencyOptions.__dataclass_fields__)}"
        ) from error
    timed_runtimes()[options.runtime].need_packages("latency", options.runtime)
    return options


def _runtime_of(target: Target) -> str:
    """Returns the runtime in which layers of a target's files are timed."""
    for runtime in target.runtimes:
        if runtime in target.timings:
            return runtime
    raise ExportError(
        f"latency: no layer of a file of {target.name} can be timed alone, so that no table says what a plan costs. "
        "Choose another cost, and score='file' for the milliseconds of the front's files; or latency={'runtime': ...} "
        f"with one of {', '.join(sorted(timed_runtimes()))}"
    )


def share_latency(evaluator: Evaluator, study: Study, options: LatencyOptions) -> LatencyTable:
    """Adds `latency` to the evaluator's costs, from the study's table, which is measured if it has none yet.

    Args:
        evaluator: calibrated.
        study: that keeps the table.
        options: where latency is measured.

    Raises:
        ExportError: a model or spec that cannot be exported.
        CalibrationError: no validation batch.
    """
    from lq_plugin.export.latency import LatencyTable, latency_table

    assert evaluator.space is not None
    known = study.user_attrs.get(TABLE)
    if known is None:
        table = latency_table(evaluator.model, example_inputs(evaluator), pairs(evaluator.space), options)
        study.set_user_attr(TABLE, asdict(replace(table, options=replace(options, cache=None))))
    else:
        table = LatencyTable(**{**known, "options": options})
    for name, reason in table.left_out.items():
        log.warning("latency: %s counts as float: %s", name, reason)
    evaluator.latency = table.predict
    return table


def smallest_latency(evaluator: Evaluator) -> float:
    """Returns the milliseconds that no plan is faster than: of each layer the fastest pair of specs.

    Args:
        evaluator: calibrated, with latency.
    """
    assert evaluator.space is not None
    assert evaluator.latency is not None
    floating = evaluator.latency({})
    gains: dict[str, float] = {}
    for plans in pairs(evaluator.space):
        (name,) = plans
        gains[name] = min(gains.get(name, math.inf), evaluator.latency(plans) - floating)
    return floating + sum(gains.values())


def measure_front(evaluator: Evaluator, result: SearchResult, options: LatencyOptions) -> None:
    """Measures the whole model under each plan of the front, and keeps the result in the study.

    Args:
        evaluator: calibrated.
        result: whose front is measured.
        options: where latency is measured.
    """
    from lq_plugin.export.latency import model_graph, model_latency

    measured = dict(result.study.user_attrs.get(MEASURED, {}))
    inputs = example_inputs(evaluator)
    # Plans exchange quantizers, the float weights are the same.
    graph = model_graph(evaluator.model, inputs, options)
    for candidate in result.front:
        if str(candidate.number) not in measured:
            evaluator.apply(evaluator.layer_plans(candidate.plan))
            measured[str(candidate.number)] = model_latency(evaluator.model, inputs, options, graph)
    result.study.set_user_attr(MEASURED, measured)


def example_inputs(evaluator: Evaluator) -> list[Tensor]:
    """Returns the first part of the first validation batch, the model's input, as a list of one tensor.

    Raises:
        CalibrationError: there is no batch.
        ExportError: its first part is not a tensor.
    """
    if inputs := inputs_of(evaluator.trainer.val_dataloaders or (), 1):
        return inputs
    raise CalibrationError("latency is measured on a batch of validation data, and there is none")


def pairs(space: ModelSpace) -> Iterator[dict[str, LayerPlan]]:
    """Yields every pair of a weight's and an input's specs, layer by layer."""
    choices: dict[str, dict[str, list[QuantSpec | None]]] = {}
    for unit in space.units:
        for name in unit.layers:
            choices.setdefault(name, {})[unit.slot] = [
                choice if isinstance(choice, QuantSpec) else None for choice in unit.choices
            ]
    for name, slots in choices.items():
        for weight, read in product(slots.get("weight", [None]), slots.get("input", [None])):
            yield {name: LayerPlan(weight=weight, input=read)}
