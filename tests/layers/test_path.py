"""The way of one weight from its layer to the arithmetic, which every training step takes for every layer."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lq_plugin
from lq_plugin import calibrate, prepare
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


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 8, 3), nn.Linear(16, 8)], ids=["conv", "linear"])
@pytest.mark.parametrize("native", [False, True])
def test_a_weight_enters_at_most_twelve_definitions(layer: nn.Module, native: bool) -> None:
    if native and not lq_plugin.native.available():
        pytest.skip("no compiler")
    model = nn.Sequential(layer)
    x = torch.ones(2, 3, 8, 8) if isinstance(layer, nn.Conv2d) else torch.ones(2, 16)
    prepare(model, "w4a8")
    calibrate(model, [x])
    with use_native(native):
        model.train()(x)
        path = entered(model[0].quantized_weight)
    assert "quantized_weight" in path[0]
    assert len(path) <= 12, path


@pytest.mark.parametrize("plan", ["w4a8", "w4 mse a8 mse", "int4 per_channel lsq / int8 lsq"])
def test_a_spec_is_worked_out_once(plan: str) -> None:
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.ones(2, 16)
    prepare(model, plan)
    calibrate(model, [x])
    with use_native(False):
        model.train()(x)
        weight, inputs = entered(model[0].quantized_weight), entered(lambda: model[0].quantized_input(x))
    assert not [name for name in (*weight, *inputs) if name.split()[-1] in ("grid", "kind", "has_grid", "stochastic")]
    assert (len(weight) <= 14, len(inputs) <= 16) == (True, True), (weight, inputs)


def test_layers_without_xnor_do_not_ask_for_its_scale() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    prepare(model, "w4a8")
    calibrate(model, [torch.ones(2, 16)])
    assert not [name for name in entered(lambda: model(torch.ones(2, 16))) if "scale" in name.split()[-1]]
