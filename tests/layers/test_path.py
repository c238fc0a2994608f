"""The way of one weight from its layer to the arithmetic, which every training step takes for every layer."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lq_plugin
from lq_plugin import calibrate, prepare
from lq_plugin.model.prepare import quantizers
from lq_plugin.native import use_native

ROOT = str(Path(lq_plugin.__file__).parent)
NO_DEFINITIONS = ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>", "<lambda>", "<module>")


def entered(call: Callable[[], Any]) -> list[str]:
    """Functions and methods of the package that `call` enters, each once, in order."""
    found: dict[str, None] = {}

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOT) and code.co_name not in NO_DEFINITIONS:
            found[f"{Path(code.co_filename).name}:{code.co_firstlineno} {code.co_name}"] = None

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return list(found)


def ready(layer: nn.Module, plan: str, native: bool) -> nn.Sequential:
    """Returns a layer in training, as `QAT` has it."""
    if native and not lq_plugin.native.available():
        pytest.skip("no compiler")
    model = nn.Sequential(layer)
    x = torch.ones(2, 3, 8, 8) if isinstance(layer, nn.Conv2d) else torch.ones(2, 32)
    prepare(model, plan)
    calibrate(model, [x])
    for quantizer in quantizers(model):
        quantizer.observing = getattr(quantizer, "moving", False)
    model.train()(x)
    return model


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 8, 3), nn.Linear(32, 8)], ids=["conv", "linear"])
@pytest.mark.parametrize("native", [False, True])
def test_a_weight_enters_at_most_twelve_definitions(layer: nn.Module, native: bool) -> None:
    with use_native(native):
        path = entered(ready(copy.deepcopy(layer), "w4a8", native)[0].quantized_weight)
    assert "quantized_weight" in path[0]
    assert len(path) <= 12, path


@pytest.mark.parametrize(
    ("spec", "by_torch", "by_kernels"),
    [
        ("int4 per_channel mse", 11, 14),
        ("int4 group32", 13, 13),
        ("int4 group32 mse", 13, 16),
        ("int4 per_channel lsq", 10, 11),
        ("int4 group32 lsq", 12, 13),
        ("ttq", 16, 17),
        ("twn", 18, 18),
        ("mx6", 19, 14),
        ("mxfp4", 19, 15),
    ],
)
def test_other_weights(spec: str, by_torch: int, by_kernels: int) -> None:
    for native, most in ((False, by_torch), (True, by_kernels)):
        with use_native(native):
            path = entered(ready(nn.Linear(32, 8), spec, native)[0].quantized_weight)
        assert len(path) <= most, path


@pytest.mark.parametrize(
    ("spec", "by_torch", "by_kernels"),
    [
        ("int8 ema", 13, 12),
        ("int8 mse", 12, 12),
        ("int8 per_channel mse", 13, 14),
        ("int8 lsq", 11, 12),
        ("uint4 pact", 12, 15),
        ("uint8 affine dynamic", 14, 16),
        ("int8 per_token dynamic", 14, 16),
    ],
)
def test_inputs(spec: str, by_torch: int, by_kernels: int) -> None:
    for native, most in ((False, by_torch), (True, by_kernels)):
        with use_native(native):
            layer, x = ready(nn.Linear(32, 8), f"int8 / {spec}", native)[0], torch.ones(2, 32)
            path = entered(lambda layer=layer, x=x: layer.quantized_input(x))
        assert len(path) <= most, path


@pytest.mark.parametrize("plan", ["w4a8", "w4 mse a8 mse", "int4 per_channel lsq / int8 lsq"])
def test_a_spec_is_worked_out_once(plan: str) -> None:
    with use_native(False):
        layer, x = ready(nn.Linear(32, 8), plan, False)[0], torch.ones(2, 32)
        path = [*entered(layer.quantized_weight), *entered(lambda: layer.quantized_input(x))]
    assert not [name for name in path if name.split()[-1] in ("grid", "kind", "has_grid", "stochastic")]


def test_layers_without_xnor_do_not_ask_for_its_scale() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    prepare(model, "w4a8")
    calibrate(model, [torch.ones(2, 16)])
    assert not [name for name in entered(lambda: model(torch.ones(2, 16))) if "scale" in name.split()[-1]]
