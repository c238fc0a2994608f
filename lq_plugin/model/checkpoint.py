"""Load checkpoints, float or quantized, into a model. No code in a file is executed."""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from lq_plugin.errors import PlanError
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.layers import leave_out
from lq_plugin.model.ledger import Ledger
from lq_plugin.model.older_files import leave_out_newer, put_back_newer
from lq_plugin.model.operations.quantized import operations_in
from lq_plugin.model.prepare import prepare, quantized_layers, quantizers, remove
from lq_plugin.model.unreached import REASON, settle, unreached, without_range
from lq_plugin.quantizers import ActivationQuantizer

_Module = TypeVar("_Module", bound=nn.Module)


def load_float_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a Lightning checkpoint or a `.safetensors` state dict into a float `model`, strictly.

    Raises:
        FileNotFoundError: there is no such file.
        PlanError: it is truncated, has code in it, is no checkpoint, or of a quantized model.
        RuntimeError: its keys or shapes are not the model's, which is as before then.
    """
    path = Path(path)
    state = _state_dict(_read(path), path)
    if is_quantized(state) and not quantized_layers(model):
        raise PlanError(
            f"{path} is a checkpoint of a quantized model, which lq_plugin.load_checkpoint reads, with its plan and "
            "ranges"
        )
    with _unchanged_on_failure(model):
        model.load_state_dict(state)


@overload
def load_checkpoint(
    model: type[_Module], path: str | Path, plan: QuantPlan | str | Mapping[str, Any] | None = None, **arguments: Any
) -> _Module: ...


@overload
def load_checkpoint(
    model: nn.Module, path: str | Path, plan: QuantPlan | str | Mapping[str, Any] | None = None
) -> Ledger: ...


def load_checkpoint(
    model: nn.Module | type[nn.Module],
    path: str | Path,
    plan: QuantPlan | str | Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Ledger | nn.Module:
    """Prepares a float `model` with a checkpoint's plan and loads its weights and ranges, strictly.

    Args:
        model: of the class that was trained, on any device; or the class itself, which is built with the
            hyper-parameters in the file (`save_hyperparameters`).
        path: written by a Trainer with `QAT` or `PTQ`, or by `torch.save(model.state_dict(), path)`.
            No code in it is executed.
        plan: needed where the file holds none (weights-only checkpoints, bare state dicts).
        arguments: of the class, where the file lacks them or has others.

    Returns:
        The ledger; of a class, the model. It computes what it did when it was saved, bit for bit.

    Raises:
        FileNotFoundError: there is no such file.
        PlanError: it is truncated, has code in it, is no checkpoint (but a packed file), or of a float model; or there
            is no plan; or the class cannot be built with what is in it.
        RuntimeError: its keys or shapes are not the model's.
            After every error the model is as before.
    """
    path = Path(path)
    content = _read(path)
    state = _state_dict(content, path)
    if not is_quantized(state):
        raise PlanError(
            f"{path} is a float checkpoint: load it with model.load_state_dict, then calibrate or train quantized"
        )
    plan = _saved_plan(content, path) if plan is None else plan
    if isinstance(model, type):
        built = _built(model, content, path, arguments)
        _load(built, state, plan, path)
        return built
    if arguments:
        raise PlanError(
            f"{', '.join(arguments)}: arguments are for a class, which load_checkpoint builds; {type(model).__name__} "
            "is built"
        )
    return _load(model, state, plan, path)


def _built(kind: type[nn.Module], content: Mapping[str, Any], path: Path, arguments: Mapping[str, Any]) -> nn.Module:
    """A model of a LightningModule's class, with the hyper-parameters of its checkpoint."""
    saved = content.get("hyper_parameters", {})
    if "_instantiator" in saved:
        raise PlanError(
            f"{path} was written under LightningCLI, which builds its classes: give load_checkpoint an instance"
        )
    parameters = inspect.signature(kind).parameters
    named = {
        name
        for name, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    if (name := content.get("hparams_name")) in named:
        saved = {name: saved}  # one argument holds all of them
    if len(named) == len(parameters):
        saved = {key: value for key, value in saved.items() if key in named}
    try:
        inspect.signature(kind).bind(**{**saved, **arguments})
    except TypeError as error:
        raise PlanError(
            f"{kind.__name__} cannot be built with the hyper-parameters in {path} ({', '.join(saved) or 'none'}): "
            f"{error}; call "
            f"save_hyperparameters() in its __init__, give load_checkpoint({kind.__name__}, path, name=...) the "
            "others, or an instance"
        ) from error
    model = kind(**{**saved, **arguments})
    if (configure := getattr(model, "configure_model", None)) is not None:
        configure()
    return model


def _load(model: nn.Module, state: Mapping[str, Any], plan: QuantPlan | str | Mapping[str, Any], path: Path) -> Ledger:
    with _unchanged_on_failure(model):
        put_back_newer(model)
        shapes = {key: tuple(getattr(value, "shape", ())) for key, value in state.items()}
        ledger = prepare(model, plan, operations_in(shapes))
        left_out = leave_out_newer(model, state)
        if left_out:
            ledger = prepare(model, plan, operations_in(shapes))
        model.load_state_dict(state)
        from_data = [q for q in quantizers(model) if isinstance(q, ActivationQuantizer) and q.needs_calibration]
        if any(quantizer.is_calibrated for quantizer in from_data):
            # Data has come, and has not reached the others.
            settle({}, model)
            missing = without_range(model)
        else:
            missing = [*from_data, *without_range(model)]
        if missing:
            names = ", ".join(dict.fromkeys(quantizer.name for quantizer in missing[:5]))
            raise PlanError(f"{path} has no ranges for {names}: it was written before they were calibrated")
        ledger.note_unreached(unreached(model), REASON)
    if left_out:
        warnings.warn(
            f"{path} comes from a version without ranges for {', '.join(left_out)}: they stay float, although the plan "
            "quantizes them",
            stacklevel=3,
        )
    return ledger


def _read(path: Path) -> Any:
    try:
        return (
            _read_safetensors(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except PlanError:
        raise
    except pickle.UnpicklingError as error:
        raise PlanError(
            f"{path} cannot be read: it holds more than tensors and plain values, or is damaged: {error}"
        ) from error
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (EOFError, RuntimeError, SafetensorError, ValueError, KeyError, OSError) as error:
        raise PlanError(
            f"{path} cannot be read, it is truncated or no checkpoint: {type(error).__name__}: {error}"
        ) from error


def _read_safetensors(path: Path) -> Mapping[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("format") == "lq_plugin.packed":
            raise PlanError(f"{path} is a packed file, which lq_plugin.export.load_packed reads")
    return load_file(path)


def _state_dict(content: Any, path: Path) -> Mapping[str, Any]:
    """The tensors of a Lightning checkpoint, or of a bare state dict."""
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise PlanError(f"{path} is no checkpoint: it holds {type(content).__name__} where a state dict is expected")
    return state


def is_quantized(state: Mapping[str, Any]) -> bool:
    """Returns whether a state dict is of a quantized model."""
    return any(key.endswith(("_quantizer.calibrated", "_quantizer.last.calibrated")) for key in state)


def _saved_plan(content: Mapping[str, Any], path: Path) -> QuantPlan:
    callbacks = content.get("callbacks")
    entries = callbacks.values() if isinstance(callbacks, Mapping) else ()
    # Other callbacks may keep a "plan" of their own.
    plans = [
        entry["plan"] for entry in entries if isinstance(entry, Mapping) and isinstance(entry.get("plan"), Mapping)
    ]
    saved = [plan for plan in plans if "rules" in plan]
    if not saved:
        raise PlanError(
            f"{path} holds no plan: it was saved with weights only, or without QAT and PTQ; give load_checkpoint(..., "
            "plan=...)"
        )
    return QuantPlan.from_dict(saved[0])


@contextmanager
def _unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Restores weights, buffers and quantizers when something raises inside.

    `load_state_dict` copies what fits, and raises only then.
    """
    layers = [layer for _, layer in quantized_layers(model)]
    left_out = [(layer, slot) for layer in layers for slot in layer._left_out]
    before = {
        key: value.detach().clone() if isinstance(value, torch.Tensor) else value
        for key, value in model.state_dict().items()
    }
    try:
        yield
    except BaseException:
        if layers:
            put_back_newer(model)
            for layer, slot in left_out:
                leave_out(layer, slot)
        else:
            remove(model)
        model.load_state_dict(before)
        raise
