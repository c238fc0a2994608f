"""Builds a model from its name on the command line: `package.module:callable`, or a Hydra model config."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from lq_plugin.errors import QuantizationError, did_you_mean

_HOW = "give module:callable (torchvision.models:resnet18), or the name of a config in the group `model`"


def build_model(name: str, arguments: Sequence[str] = (), config_dir: str | Path | None = None) -> nn.Module:
    """Builds a model. This runs the code that the name refers to, and no other: no file is unpickled.

    Args:
        name: `module:callable`, imported from the working directory or the environment and called; or a config
            `model/<name>.yaml`, of `config_dir` or of lq_plugin.
        arguments: `key=value` for the callable, or Hydra overrides of the config's own keys; values are YAML.
        config_dir: folder with the user's own configs.

    Raises:
        QuantizationError: no such module, callable or config, arguments that do not fit, or something that is no
            module.

    >>> build_model("torch.nn:Linear", ["in_features=4", "out_features=2"])
    Linear(in_features=4, out_features=2, bias=True)
    """
    built = _imported(name, arguments) if ":" in name else _composed(name, arguments, config_dir)
    if not isinstance(built, nn.Module):
        raise QuantizationError(f"{name} made a {type(built).__name__}, not a torch.nn.Module")
    return built


def _imported(name: str, arguments: Sequence[str]) -> Any:
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise QuantizationError(
                    f"{name}: there is no {part!r} in {module_name}.{did_you_mean(part, dir(found))}"
                )
            found = getattr(found, part)
    except QuantizationError:
        raise
    except (ModuleNotFoundError, ValueError, TypeError) as error:  # the last two: no name, or a relative one
        raise QuantizationError(f"{name}: {error}; {_HOW}") from error
    finally:
        sys.path.remove("")
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise QuantizationError(f"{name} is a {type(found).__name__}, neither a module nor a callable that makes one")
    keywords = _keywords(arguments)
    try:
        return found(**keywords)
    except (TypeError, ValueError, RuntimeError) as error:
        raise QuantizationError(f"{name}: {error}; give its arguments as key=value") from error


def _keywords(arguments: Sequence[str]) -> dict[str, Any]:
    pairs = [argument.partition("=") for argument in arguments]
    wrong = [key for key, equals, _ in pairs if not equals or not key.isidentifier()]
    if wrong:
        raise QuantizationError(f"arguments are written key=value, got {', '.join(map(repr, wrong))}")
    return {key: _value(key, text) for key, _, text in pairs}


def _value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise QuantizationError(f"{key}={text}: the value is no YAML: {error}") from error


def _composed(name: str, arguments: Sequence[str], config_dir: str | Path | None) -> Any:
    from hydra import compose, initialize_config_dir, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.utils import instantiate

    GlobalHydra.instance().clear()
    start = (
        initialize_config_module("lq_plugin.conf", version_base="1.3")
        if config_dir is None
        else initialize_config_dir(str(Path(config_dir).resolve()), version_base="1.3")
    )
    try:
        with start:
            ours = [] if config_dir is None else ["hydra.searchpath=[pkg://lq_plugin.conf]"]
            cfg = compose(overrides=[*ours, f"+model={name}", *(f"model.{argument}" for argument in arguments)])
            return instantiate(cfg.model)
    # Hydra's own of a number for a name, and of one that is too long for a file.
    except (HydraException, ValueError, TypeError, OSError) as error:
        raise QuantizationError(f"model {name!r}: {error}\n{_HOW}") from error


def zeros(shape: str) -> torch.Tensor:
    """Returns a batch of zeros of a shape like `1,3,32,32`.

    Raises:
        QuantizationError: no shape.

    >>> zeros("1,3,4,4").shape
    torch.Size([1, 3, 4, 4])
    """
    try:
        sizes = [int(size) for size in shape.replace("x", ",").split(",")]
        if min(sizes) < 1:
            raise ValueError
    except ValueError:
        raise QuantizationError(f"a shape is written like 1,3,32,32, got {shape!r}") from None
    return torch.zeros(sizes)
