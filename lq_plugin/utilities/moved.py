"""Import paths of earlier versions, which still work, with a `DeprecationWarning`.

A module that moved is imported from its new place; both names are one module. CHANGELOG.md says until when.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Modules that are in another place since 0.2: the documented ones, and some that scripts of users were seen to import.
MOVED = {
    f"lq_plugin.{old}": f"lq_plugin.{new}"
    for old, new in {
        "callbacks.data": "callbacks.trainer.data",
        "cli": "commands.entry",
        "export.onnx": "export.onnx_file.write",
        "export.sums": "export.onnx_file.sums",
        "export_options": "export.options",
        "formats": "intent.formats",
        "granularity": "intent.granularity",
        "name_pattern": "intent.name_pattern",
        "plan": "intent.plan",
        "schedule": "intent.schedule",
        "spec": "intent.spec",
        "model.batch_norm": "ptq.batch_norm.reestimate",
        "model.bias_correct": "ptq.bias_correction.correct",
        "model.blocks": "ptq.reconstruction.units",
        "model.correct_batch_norm": "ptq.batch_norm.correct",
        "model.cost": "model.measure.cost",
        "model.equalize": "ptq.equalization.equalize",
        "model.fidelity": "model.measure.fidelity",
        "model.fold_batch_norm": "ptq.batch_norm.fold",
        "model.gptq": "ptq.gptq.quantize",
        "model.numbering": "model.graph.numbering",
        "model.observe": "model.training",
        "model.operation_rules": "model.operations.rules",
        "model.reconstruct": "ptq.reconstruction.reconstruct",
        "model.record": "model.graph.record",
        "model.smooth_quant": "ptq.smooth_quant.smooth",
        "model.unit_store": "ptq.reconstruction.store",
        "ranges.aciq": "ranges.estimators.aciq",
        "ranges.kl": "ranges.estimators.kl",
        "ranges.learned": "ranges.estimators.learned",
        "ranges.minmax": "ranges.estimators.minmax",
        "ranges.mse": "ranges.estimators.mse",
        "ranges.octav": "ranges.estimators.octav",
        "ranges.percentile": "ranges.estimators.percentile",
        "report.main": "commands.report",
        "report.study": "search.study.report",
        "search.bound": "search.space.model_space",
        "search.costs": "search.evaluation.costs",
        "search.evaluation.levels": "search.evaluation.rungs",
        "search.space.bound": "search.space.model_space",
        "search.dominance": "search.shared.dominance",
        "search.evaluator": "search.evaluation.evaluator",
        "search.interrupt": "search.shared.interrupt",
        "search.latency": "search.study.latency",
        "search.levels": "search.evaluation.rungs",
        "search.refine": "search.study.refine",
        "search.residual": "search.space.residual",
        "search.result": "search.study.result",
        "search.seeds": "search.study.seeds",
        "search.trial_report": "search.sweep.trial_report",
    }.items()
}

#: Public names that are in another module since 0.2, or have another name, while the package that had them stayed.
MOVED_NAMES = {
    f"lq_plugin.{old}": f"lq_plugin.{new}"
    for old, new in {
        "report.study_report": "search.study.report.study_report",
        "search.BoundSpace": "search.space.model_space.ModelSpace",
        "search.Level": "search.evaluation.rungs.Rung",
        # By way of the former modules, which are these.
        "search.evaluation.rungs.Level": "search.evaluation.rungs.Rung",
        "search.evaluation.rungs.parse_levels": "search.evaluation.rungs.parse_rungs",
        "search.space.model_space.BoundSpace": "search.space.model_space.ModelSpace",
        "intent.schedule.Phase": "intent.schedule.Switches",
        "ptq.equalization.equalize.RefusedLayer": "ptq.own_parameters.Refused",
        "ptq.smooth_quant.smooth.Unsmoothed": "ptq.own_parameters.Refused",
        "ptq.gptq.quantize.GPTQFit": "ptq.gptq.quantize.RoundedLayer",
        "ptq.reconstruction.learn.Fit": "ptq.reconstruction.learn.UnitResult",
        "quantizers.InputQuantizer": "quantizers.activation.ActivationQuantizer",
        "quantizers.LSQInputQuantizer": "quantizers.learned.LSQActivationQuantizer",
        "quantizers.MXInputQuantizer": "quantizers.mx.MXActivationQuantizer",
        "quantizers.PACTInputQuantizer": "quantizers.learned.PACTActivationQuantizer",
        "quantizers.SignInputQuantizer": "quantizers.binary.SignActivationQuantizer",
        "quantizers.VectorInputQuantizer": "quantizers.vector.VectorActivationQuantizer",
        "quantizers.XNORInputQuantizer": "quantizers.binary.XNORActivationQuantizer",
        "quantizers.make_input_quantizer": "quantizers.registry.make_activation_quantizer",
        "ranges.distributions.Fit": "ranges.distributions.FittedDistributions",
        "report.data.Phase": "report.data.ScheduledChange",
    }.items()
}


def moved_name(package: str, name: str) -> object | None:
    """Returns what a package had under this name before it moved, with a `DeprecationWarning`; None: nothing did."""
    new = MOVED_NAMES.get(f"{package}.{name}")
    if new is None:
        return None
    warnings.warn(f"{package}.{name} is {new} now", DeprecationWarning, stacklevel=3)
    home, _, present = new.rpartition(".")
    found: object = getattr(import_module(home), present)
    return found


def former_names(module: str) -> Callable[[str], object]:
    """Returns a module's `__getattr__`, which gives what has another name now.

    >>> former_names("lq_plugin.intent.schedule")("Other")
    Traceback (most recent call last):
    AttributeError: module 'lq_plugin.intent.schedule' has no attribute 'Other'
    """

    def attribute(name: str) -> object:
        if (found := moved_name(module, name)) is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return found

    return attribute


class _Alias(Loader):
    """Loads a module under its former name: the module itself, not a copy."""

    def __init__(self, new: str) -> None:
        self._new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self._module = import_module(self._new)
        self._spec = self._module.__spec__
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just put the former name there.
        module.__spec__ = self._spec


class _MovedModules(MetaPathFinder):
    """Finds modules by their former names, after all other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = MOVED.get(fullname)
        if new is None:
            return None
        warnings.warn(f"{fullname} is {new} now", DeprecationWarning, stacklevel=2)
        return ModuleSpec(fullname, _Alias(new))


def install() -> None:
    """Lets the import system find moved modules by their former names; a second call does nothing."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
