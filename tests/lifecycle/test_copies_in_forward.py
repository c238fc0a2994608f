"""Models that copy, pickle or save parts of themselves while they run: nothing that watches the part goes with it."""

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lq_plugin
from lq_plugin import QuantPlan, calibrate, prepare
from lq_plugin.model import quantizers
from lq_plugin.model.graph.record import record
from lq_plugin.ptq.phases import run_phases

PHASES = {
    "smooth": (["smooth_quant", "calibrate", "correct_batch_norm"], "w8a8"),
    "bias": (["calibrate", "bias_correct"], "w4a8"),
    "gptq": (["calibrate", {"gptq": {"asymmetric": True}}], "w4a8"),
    "gptq, norms": (["calibrate", {"gptq": {"correct_batch_norm": True}}], "w4a8"),
    "reconstruct": (["calibrate", {"reconstruct": {"iterations": 2, "by": "layer"}}], "w4a8"),
}


def saved(part):
    file = io.BytesIO()
    torch.save(part, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "copied": copy.deepcopy,
    "pickled": lambda part: pickle.loads(pickle.dumps(part)),
    "saved": saved,
}


class Net(nn.Module):
    def __init__(self, way=None):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)
        self.way, self.made = way, []

    def forward(self, x):
        if self.way is not None:
            copied = WAYS[self.way](nn.ModuleList([self.norm, self.block, self.head]))
            norm, block, head = copied
            head(block(norm(torch.full_like(x, 50.0))))  # what it sees is far from what the model sees
            self.made.append(copied)
        return self.head(self.block(self.norm(x)))


def hooks_of(model):
    return [(m._forward_hooks, m._forward_pre_hooks, m._forward_hooks_always_called) for m in model.modules()]


def batches():
    return list(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("way", WAYS)
def test_a_recording(way):
    model, plain, x = Net(way).eval(), Net().eval(), batches()[0]
    with torch.no_grad():
        recording = record(model, lambda: model(x))
        wanted = record(plain, lambda: plain(x))
        assert torch.equal(model(x), plain(x))
    assert [call.name for call in recording.module_calls] == [call.name for call in wanted.module_calls]
    # It lives on, unwatched.
    made = model.made[0]
    assert not any(any(hooks) for hooks in hooks_of(made))
    assert torch.equal(made[2](x), plain.head(x))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("phases", PHASES)
def test_phases_find_what_they_find_without_the_copies(phases, way):
    states = []
    for model in (Net(way).eval(), Net().eval()):
        names, plan = PHASES[phases]
        run_phases(model, plan, batches(), names)
        states.append(model.state_dict())
        assert not any(any(hooks) for hooks in hooks_of(model))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_copy_of_a_calibration_gathers_nothing():
    model = Net("copied").eval()
    prepare(model, "w8a8")
    calibrate(model, batches())
    assert all(quantizer.collector is None for made in model.made for quantizer in quantizers(made))


class Residual(nn.Module):
    """Has operations that are quantized, so that hooks stay on its layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.uncopyable = nn.Linear(8, 8), nn.Linear(8, 8), None

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x) + x) + x)


@pytest.mark.parametrize("way", WAYS)
def test_quantized_operations(way):
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(4, 8)
    rules = [{"match": "*", "weight": "int8 per_channel", "input": "int8"}, {"match": "add_*", "input": "int8"}]
    prepare(model, QuantPlan.parse({"rules": rules}), record(model, lambda: model(x)))
    calibrate(model, [x])
    y = model(x)
    whole = WAYS[way](model)
    assert torch.equal(whole(x), y)
    # Nothing of the owner goes with a part, so that it can be anything.
    model.uncopyable = (number for number in range(3))
    part = WAYS[way](model.first)
    assert torch.equal(part(x), model.first(x))
    assert not any(any(hooks) for hooks in hooks_of(part))
    assert torch.equal(model(x), y)


def test_every_hook_of_ours_knows_its_module():
    """`lq_plugin.utilities.hooks` puts them on; what stays with quantizers copies itself."""
    folder = Path(lq_plugin.__file__).parent
    found = {
        str(path.relative_to(folder))
        for path in folder.rglob("*.py")
        if re.search(r"\.register_forward(_pre)?_hook\(", path.read_text())
    }
    assert found == {"utilities/hooks.py", "layers/shared_inputs.py"}
